#!/usr/bin/env python3
"""Checks which crate uses which, and that the files of a crate do not import each other in circles.

Layers: the folder of a crate below rust/crates is its layer. Normal and build dependencies on crates of this workspace point to the same
layer or a lower one; dev-dependencies point where they like. The table of who uses whom is printed.

Cycles: in the crates of services, planning, net and models, files import files. A file imports the file that defines what it names:
`use` and paths in the code (`crate::a::b`, `super::x`, `child::f()`) are followed through re-exports to the definition, and comments,
strings and what only tests compile are left out. So a parent that declares its children and re-exports what is theirs imports none of
them, unless its own code names it, too. A child that names what its parent's file defines imports the parent; if the parent's code names
what is the child's, the two are a cycle: what both need belongs into a file of its own, below both. To name a module only, as in
`use crate::a;`, imports nothing; `a::f()` behind it does. Methods are not looked at.

Pure crates: what cargo would build some crates with is compared with BANNED. Crates that only decide are built without sockets, TLS and
ONNX Runtime, and the head is built without the engine. This needs cargo, and compiles nothing.

known_cycles.toml lists the cycles that are left. The list may only shrink: a cycle that is not listed is an error, and so is a listed one
that is gone. `--list` prints the cycles that there are in the form of that file. Exit code 1 says that something is wrong.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib

from rust_source import CRATES, ROOT, RUST, end_of_braces, manifests, sources

ORDER = ["wire", "base", "net", "models", "engine", "planning", "trust", "services", "fleet", "tools", "testing"]
WITHOUT_CYCLES = ["services", "trust", "planning", "net", "models"]
KNOWN = ROOT / "scripts/known_cycles.toml"
PURE = ["mesh-proto", "arcanum-profiler", "mesh-pipeline", "mesh-control"]
# Crate: those that it must not be built with.
BANNED = {name: {"tokio", "quinn", "rustls", "ort"} for name in PURE} | {
    "mesh-head": {"ort", "onig", "tokenizers", "mesh-kernels"},
}

USE = re.compile(r"(?P<public>\bpub(?:\s*\([^)]*\))?\s+)?\buse\s+(?P<tree>[^;]+);")
INLINE = re.compile(r"\bmod\s+(\w+)\s*\{")
DEFINED = re.compile(r"\b(?:const|enum|fn|macro_rules!|mod|static|struct|trait|type|union)\s+(?:mut\s+)?(\w+)")
PATH = re.compile(r"(?<![\w:.])(?:r#)?\w+(?:\s*::\s*\w+)+")


def crates():
    """Name, layer, folder and manifest of each crate, from the lowest layer up."""
    found = [(tomllib.loads(path.read_text()), path.parent) for path in manifests()]
    crates = [(manifest["package"]["name"], folder.parent.name, folder, manifest) for manifest, folder in found]
    for name, layer, folder, _ in crates:
        if layer not in ORDER:
            sys.exit(f"check_layers: {name} lies in rust/crates/{layer}, which is no layer: there are {', '.join(ORDER)}")
    return sorted(crates, key=lambda crate: (ORDER.index(crate[1]), crate[0]))


def uses(manifest, own):
    """Crates of this workspace that a crate is built with."""
    tables = [manifest, *manifest.get("target", {}).values()]
    named = {name for table in tables for kind in ("dependencies", "build-dependencies") for name in table.get(kind, {})}
    return sorted(named & own.keys())


def check_layers(crates):
    own = {name: layer for name, layer, _, _ in crates}
    width = max(map(len, own))
    for name, layer, _, manifest in crates:
        used = uses(manifest, own)
        print(f"{layer:9} {name:{width}}  {' '.join(used) or '-'}".rstrip())
        for other in used:
            if ORDER.index(own[other]) > ORDER.index(layer):
                yield f"{name} ({layer}) uses {other} ({own[other]}), which is of a higher layer"


def built_with(name):
    """All crates that a crate is built with when it is built alone, itself among them."""
    # These variables give every crate the features that any crate of the workspace asks for.
    environment = {key: value for key, value in os.environ.items() if not key.endswith("FEATURE_UNIFICATION")}
    command = [os.environ.get("CARGO") or "cargo", "tree", "--locked", "--package", name, "--edges", "normal", "--prefix", "none"]
    told = subprocess.run(command, cwd=RUST, env=environment, capture_output=True, text=True)
    if told.returncode:
        sys.exit(f"check_layers: cargo tree: {told.stderr.strip()}")
    return {line.split()[0] for line in told.stdout.splitlines() if line}


def check_banned(name, used):
    for other in sorted(BANNED[name] & used):
        yield f"{name} is built with {other}: see `cargo tree --package {name} --edges normal --invert {other}`"


def leaves(tree):
    """Each path of a use tree with the name that it gets: (segments, name). The name of `*` is `*`."""
    tree = tree.strip().removeprefix("::")
    before, brace, rest = tree.partition("{")
    if not brace:
        path, _, renamed = re.sub(r"\s+", " ", tree).partition(" as ")
        segments = tuple(re.sub(r"\s|r#", "", path).split("::"))
        if segments[-1] == "self":
            segments = segments[:-1]
        return [(segments, renamed.strip() or segments[-1])] if segments and segments[0] else []
    prefix = tuple(part for part in re.sub(r"\s", "", before).split("::") if part)
    parts, depth, last = [], 0, 0
    inner = rest[: rest.rindex("}")]
    for at, letter in enumerate(inner):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append(inner[last:at])
            last = at + 1
    found = []
    for part in [*parts, inner[last:]]:
        for segments, name in leaves(part):
            # `a::{self}` is a itself.
            found.append((prefix, prefix[-1]) if segments == ("self",) else (prefix + segments, name))
        if part.strip() == "self":
            found.append((prefix, prefix[-1]))
    return found


class Modules:
    """The modules of one library: which file each lies in, what it defines, which names its `use`s give to what."""

    def __init__(self, files):
        self.file, self.code, self.defined, self.names, self.globs, self.imports = {}, {}, {}, {}, {}, {}
        for module, (path, code) in files.items():
            self.add(module, path, code)

    def add(self, module, path, code):
        while match := INLINE.search(code):
            end = end_of_braces(code, match.end() - 1)
            self.add((*module, match[1]), path, code[match.end() : end - 1])
            code = code[: match.start()] + re.sub(r"[^\n]", " ", code[match.start() : end]) + code[end:]
        self.file[module] = path
        self.names[module], self.globs[module], self.imports[module] = {}, [], []
        for match in USE.finditer(code):
            for segments, name in leaves(match["tree"]):
                self.imports[module].append((segments, name, bool(match["public"])))
                if name == "*":
                    self.globs[module].append(segments[:-1])
                else:
                    self.names[module][name] = segments
        self.code[module] = USE.sub(" ", code)
        self.defined[module] = set(DEFINED.findall(self.code[module]))

    def find(self, module, segments, seen=frozenset()):
        """The module that defines what a path means, and whether the path ends at a module; None if it leaves the crate."""
        if (module, segments) in seen:
            return None
        seen = seen | {(module, segments)}
        at, first = module, True
        for index, segment in enumerate(segments):
            rest = segments[index + 1 :]
            if first and segment == "crate":
                at = ()
            elif segment == "self" and first:
                pass
            elif segment == "super" and at:
                at = at[:-1]
                continue
            elif (*at, segment) in self.file:
                at = (*at, segment)
            elif segment in self.names[at] and self.names[at][segment][0] == segment:
                # An item of another crate, called as the crate is.
                return None if first else (at, False)
            elif segment in self.names[at]:
                return self.find(at, self.names[at][segment] + rest, seen)
            elif segment in self.defined[at]:
                return at, False
            else:
                for target in self.globs[at]:
                    found = self.find(at, (*target, segment, *rest), seen)
                    if found and not found[1]:
                        return found
                return None if first else (at, False)
            first = False
        return at, True

    def imported(self, module):
        """The modules whose definitions a module names."""
        code = self.code[module]
        words = set(re.findall(r"\w+", code))
        paths = [tuple(re.sub(r"\s|r#", "", path).split("::")) for path in PATH.findall(code)]
        for segments, name, public in self.imports[module]:
            if name == "*":
                paths += [(*segments[:-1], word) for word in words if self.has(module, segments[:-1], word)]
            elif not public or name in words:
                paths.append(segments)
        for path in paths:
            found = self.find(module, path)
            if found and not found[1]:
                yield found[0]

    def has(self, module, segments, word):
        """Whether a word may come from `segments::*`."""
        found = self.find(module, segments)
        return found is not None and found[1] and (word in self.defined[found[0]] or word in self.names[found[0]])

    def graph(self):
        """Which file imports which."""
        graph = {path: set() for path in self.file.values()}
        for module, path in self.file.items():
            graph[path] |= {self.file[other] for other in self.imported(module)} - {path}
        return graph


def circles(graph):
    """The strongly connected components of more than one file (Tarjan's algorithm)."""
    order, low, stack, found = {}, {}, [], []

    def visit(node):
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(sorted(map(str, stack[at:])))
            del stack[at:]

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return sorted(found)


def imports_within(circle, graph):
    """Which of its files each file of a cycle imports."""
    for path, used in sorted(graph.items()):
        inside = sorted(str(other) for other in used if str(other) in circle)
        if str(path) in circle:
            yield f"\n    {path} imports {', '.join(inside)}"


def print_list(crates):
    for name, layer, folder, _ in crates:
        found = circles(Modules(sources(folder / "src")).graph()) if layer in WITHOUT_CYCLES else []
        if found:
            lines = "".join(f"    {json.dumps(circle)},\n" for circle in found)
            print(f"{name} = [\n{lines}]")


def check_cycles(crates):
    known = tomllib.loads(KNOWN.read_text()) if KNOWN.is_file() else {}
    left = 0
    for name, layer, folder, _ in crates:
        listed = [sorted(circle) for circle in known.pop(name, [])]
        if layer not in WITHOUT_CYCLES:
            if listed:
                yield f"known_cycles.toml names {name}, which is not looked at"
            continue
        graph = Modules(sources(folder / "src")).graph()
        found = circles(graph)
        left += len(found)
        for circle in found:
            if circle not in listed:
                why = "shorten its line" if any(set(circle) < set(larger) for larger in listed) else "break it"
                yield f"{name}: an import cycle that {KNOWN.name} does not list, {why}: {json.dumps(circle)}{''.join(imports_within(circle, graph))}"
        for circle in listed:
            if circle not in found:
                yield f"{name}: an import cycle is gone, remove it from {KNOWN.name}: {json.dumps(circle)}"
    for name in known:
        yield f"{KNOWN.name} names {name}, which is no crate"
    print(f"{left} import cycles between files are left, all listed in {KNOWN.name}" if left else "no import cycles between files")


def main():
    parser = argparse.ArgumentParser(description="Checks layers of crates, cycles of imports and what pure crates are built with.")
    parser.add_argument("--list", action="store_true", help="print the cycles that there are, as known_cycles.toml lists them")
    arguments = parser.parse_args()
    found = crates()
    if arguments.list:
        print_list(found)
        return 0
    banned = [fault for name in BANNED for fault in check_banned(name, built_with(name))]
    faults = [*check_layers(found), *check_cycles(found), *banned]
    for fault in faults:
        print(f"check_layers: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
