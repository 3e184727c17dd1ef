#!/usr/bin/env python3
"""Checks that each dependency of each crate is named in its sources, and each of the workspace's by a crate.

A normal dependency is to be named in src/ outside tests, a build-dependency in build.rs, a dev-dependency in tests/, benches/, examples/ or
the tests in src/. To be named is to stand in a path or a `use`. A dev-dependency that is a normal one, too, has to add features. KEPT lists
what is needed without being named; an entry that is not needed is an error, too. Exit code 1 names what to remove.
"""

import re
import sys
import tomllib

from rust_source import RUST, code_of, manifests, sources, without_tests

# Crate and dependency: why it stays.
KEPT = {
    ("mesh-head", "prometheus-client"): "the code that its derives make names it",
}
# Packages whose libraries have other names.
LIBRARIES = {"md-5": "md5"}


def normal(folder):
    """The code of libraries and binaries that is not for tests only."""
    src = folder / "src"
    code = [code for _, code in sources(src).values()]
    binaries = [src / "main.rs", *(path for path in src.glob("bin/*.rs")), *(path.parent for path in src.glob("bin/*/main.rs"))]
    for path in binaries:
        for file in sorted(path.rglob("*.rs")) if path.is_dir() else [path] if path.is_file() else []:
            code.append(without_tests(code_of(file.read_text()))[0])
    return "\n".join(code)


def everything(folder, *places):
    """All code in these folders of a crate, with the files that `#[path]` takes from elsewhere."""
    code = []
    for path in (path for place in places for path in sorted((folder / place).rglob("*.rs"))):
        text = path.read_text()
        elsewhere = [path.parent / name for name in re.findall(r"#\[path\s*=\s*\"([^\"]+)\"\]", text)]
        code += [code_of(text), *(code_of(other.read_text()) for other in elsewhere if other.is_file())]
    return "\n".join(code)


def is_named(name, code):
    name = LIBRARIES.get(name, name).replace("-", "_")
    return re.search(rf"(?<![\w:])(?:::\s*)?{name}\s*::|\buse\s+(?:::)?{name}\b|\bextern\s+crate\s+{name}\b", code) is not None


def unused(manifest, folder):
    """Kind and name of each dependency that is not named."""
    places = {
        "dependencies": normal(folder),
        "build-dependencies": code_of((folder / "build.rs").read_text()) if (folder / "build.rs").is_file() else "",
        "dev-dependencies": everything(folder, "src", "tests", "benches", "examples"),
    }
    for table in [manifest, *manifest.get("target", {}).values()]:
        for kind, code in places.items():
            for name, spec in table.get(kind, {}).items():
                doubled = kind == "dev-dependencies" and name in table.get("dependencies", {}) and not spec.get("features")
                if doubled or not is_named(name, code):
                    yield kind, name


def main():
    workspace = tomllib.loads((RUST / "Cargo.toml").read_text())["workspace"]["dependencies"]
    # Our own crates are listed whether others use them or not.
    workspace = {name: spec for name, spec in workspace.items() if "path" not in spec}
    kept, faults, count = set(KEPT), [], 0
    for path in manifests():
        manifest = tomllib.loads(path.read_text())
        crate = manifest["package"]["name"]
        kinds = [manifest.get(kind, {}) for kind in ("dependencies", "build-dependencies", "dev-dependencies")]
        count += sum(map(len, kinds))
        for names in kinds:
            workspace = {name: spec for name, spec in workspace.items() if name not in names}
        for kind, name in unused(manifest, path.parent):
            if (crate, name) in kept:
                kept.remove((crate, name))
            else:
                faults.append(f"{crate}: {name} in [{kind}] is not used")
    faults += [f"{crate}: {name} is kept in check_unused.py without need" for crate, name in sorted(kept)]
    faults += [f"{name} in [workspace.dependencies] is used by no crate" for name in workspace]
    for fault in faults:
        print(f"check_unused: {fault}", file=sys.stderr)
    print(f"{count} dependencies of our crates, {len(faults)} of them unused")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
