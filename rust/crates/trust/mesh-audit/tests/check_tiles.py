#!/usr/bin/env python3
"""Checks a transparency log in the format of C2SP tlog-tiles with nothing but hashlib: every entry, every tile, the root.

Usage: check_tiles.py FOLDER. Prints the size and the root of the checkpoint, or says what is wrong and exits with 1.
It shares no code with the program that wrote the log. Signatures are not looked at.
"""

import base64
import hashlib
import sys
from pathlib import Path


def leaf(entry):
    return hashlib.sha256(b"\0" + entry).digest()


def node(left, right):
    return hashlib.sha256(b"\1" + left + right).digest()


def root(hashes):
    """The recursive definition of RFC 6962, section 2.1."""
    if not hashes:
        return hashlib.sha256(b"").digest()
    if len(hashes) == 1:
        return hashes[0]
    split = 1
    while split * 2 < len(hashes):
        split *= 2
    return node(root(hashes[:split]), root(hashes[split:]))


def path(folder, kind, index, width):
    groups = [f"{index % 1000:03}"]
    index //= 1000
    while index:
        groups.insert(0, f"x{index % 1000:03}")
        index //= 1000
    name = "/".join(groups)
    return folder / "tile" / str(kind) / (name if width == 256 else f"{name}.p/{width}")


def entries(folder, index, width):
    data, found = path(folder, "entries", index, width).read_bytes(), []
    while data:
        length = int.from_bytes(data[:2], "big")
        if len(data) < 2 + length:
            sys.exit(f"check_tiles: bundle {index} ends within an entry")
        found.append(data[2 : 2 + length])
        data = data[2 + length :]
    if len(found) != width:
        sys.exit(f"check_tiles: bundle {index} has {len(found)} entries instead of {width}")
    return found


def main():
    folder = Path(sys.argv[1])
    text, _, signatures = (folder / "checkpoint").read_text(encoding="utf-8").rpartition("\n\n")
    origin, size, wanted, *more = text.split("\n")
    if not origin or more or not size.isdigit() or (size != "0" and size[0] == "0") or not signatures.startswith("\u2014 "):
        sys.exit("check_tiles: the checkpoint has not the form of one")
    size, wanted = int(size), base64.b64decode(wanted, validate=True)
    hashes, level = [], 0
    for index in range((size + 255) // 256):
        hashes += map(leaf, entries(folder, index, min(256, size - 256 * index)))
    if root(hashes) != wanted:
        sys.exit("check_tiles: the entries do not have the root of the checkpoint")
    while hashes:
        for index in range((len(hashes) + 255) // 256):
            part = hashes[256 * index : 256 * index + 256]
            if path(folder, level, index, len(part)).read_bytes() != b"".join(part):
                sys.exit(f"check_tiles: tile {index} of level {level} has other hashes")
        hashes = [root(hashes[at : at + 256]) for at in range(0, len(hashes) // 256 * 256, 256)]
        level += 1
    print(size, base64.b64encode(wanted).decode())


if __name__ == "__main__":
    main()
