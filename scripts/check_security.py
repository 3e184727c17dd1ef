#!/usr/bin/env python3
"""Checks that every promise in docs/explanation/security.md names a test, and that each test named there exists.

Tests are named `crate::test`, fuzz targets `fuzz::target`. Exit code 1 names what is missing.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/explanation/security.md"
CRATES = ROOT / "rust/crates"
TARGETS = ROOT / "rust/fuzz/fuzz_targets"


def folders():
    """The folder of each crate, wherever it lies below rust/crates."""
    return {path.parent.name: path.parent for path in CRATES.rglob("Cargo.toml") if "target" not in path.parts}


def tests(folder):
    """The names of all functions with an attribute that makes them tests."""
    names = set()
    for path in folder.rglob("*.rs"):
        # Attributes in any order may stand between the one that counts and the function; proptest! has its tests inside.
        found = re.finditer(r"#\[(?:\w+::)*test\b[^]]*\](?:\s*#\[[^]]*\])*\s*(?:pub\s+)?(?:async\s+)?fn\s+(\w+)", path.read_text())
        names.update(match[1] for match in found)
    return names


def main():
    crates, known, missing, promises = folders(), {}, [], 0
    for number, line in enumerate(PAGE.read_text().splitlines(), 1):
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        # Tables of promises have two columns; the others are not about tests.
        if not line.startswith("| ") or len(cells) != 2 or cells[1] == "shown by":
            continue
        promises += 1
        named = re.findall(r"`([\w-]+)::(\w+)`", cells[1])
        if not named:
            missing.append(f"{number}: no test is named for: {cells[0][:90]}")
        for word in re.findall(r"`([\w-]+)`", cells[1]):
            missing.append(f"{number}: a test of {word} is to be named for: {cells[0][:90]}")
        for crate, test in named:
            if crate == "fuzz":
                if not (TARGETS / f"{test}.rs").is_file():
                    missing.append(f"{number}: there is no fuzz target {test}")
            elif crate not in crates:
                missing.append(f"{number}: there is no crate {crate}")
            elif test not in known.setdefault(crate, tests(crates[crate])):
                missing.append(f"{number}: {crate} has no test {test}")
    for line in missing:
        print(f"docs/explanation/security.md:{line}", file=sys.stderr)
    if not promises:
        print("docs/explanation/security.md: no promise was found: has the form of its tables changed?", file=sys.stderr)
        return 1
    print(f"{promises} promises, {len(missing)} of their tests missing")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
