#!/usr/bin/env python3
"""Checks the crates that are compiled in against deny.toml: licences, sources, banned and doubled crates; and the lock file of rust/fuzz.

Where cargo-deny is installed (on PATH, or by `make fetch-deny` in the cache), it does the check. It takes minutes to build, so elsewhere the
same rules are read from deny.toml here and applied to what `cargo metadata` says; texts of licences are not looked at then, only what crates
declare. Advisories need a database from the network: cargo-audit or cargo-deny asks it where one is installed and the database can be
reached. The last line says what was left out.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUST = ROOT / "rust"
CACHE = Path(os.environ.get("HYDRAMESH_CACHE") or ROOT / ".cache").resolve()
CARGO = os.environ.get("CARGO") or "cargo"
# Words of tools that could not reach their database, as opposed to what they found.
UNREACHABLE = re.compile(
    r"failed to (fetch|clone|connect|resolve|obtain)|couldn't (fetch|connect|resolve)|could not (fetch|connect|resolve)"
    r"|unable to (fetch|update)|network|timed? ?out|dns|connection",
    re.IGNORECASE,
)
DATABASE_SECONDS = 60


class Problem(Exception):
    """Something that cannot be checked, in words."""


def tool(name):
    """A cargo subcommand that is installed, or None."""
    cached = CACHE / "cargo-deny" / "bin" / name
    return str(cached) if cached.is_file() else shutil.which(name)


def metadata(target):
    command = [CARGO, "metadata", "--locked", "--format-version", "1", "--all-features", "--filter-platform", target]
    done = subprocess.run(command, cwd=RUST, capture_output=True, text=True)
    if done.returncode:
        raise Problem(f"cargo metadata: {done.stderr.strip()}")
    return json.loads(done.stdout)


def packages(config):
    """Every package of any target that we build for, by id."""
    found = {}
    for target in config["graph"]["targets"]:
        told = metadata(target)
        used = {node["id"] for node in told["resolve"]["nodes"]}
        found.update((package["id"], package) for package in told["packages"] if package["id"] in used)
    return found


def holds(expression, is_allowed):
    """Whether an SPDX expression can be met by licences that are allowed. A slash is an old way to write OR."""
    words = re.findall(r"\(|\)|[^\s()]+", expression.replace("/", " OR "))
    at = 0

    def peek():
        return words[at] if at < len(words) else None

    def take():
        nonlocal at
        at += 1
        return words[at - 1]

    def term():
        if peek() == "(":
            take()
            met = either()
            if peek() != ")":
                raise Problem(f"invalid SPDX expression {expression!r}")
            take()
            return met
        if peek() in (None, ")", "AND", "OR", "WITH"):
            raise Problem(f"invalid SPDX expression {expression!r}")
        name = take()
        if peek() == "WITH":
            take()
            name = f"{name} WITH {take() if peek() else ''}"
        return is_allowed(name)

    def both():
        met = term()
        while peek() == "AND":
            take()
            met = term() and met
        return met

    def either():
        met = both()
        while peek() == "OR":
            take()
            met = both() or met
        return met

    met = either()
    if peek() is not None:
        raise Problem(f"invalid SPDX expression {expression!r}")
    return met


def named(spec):
    """Name and version of `crate = "name@1.2.3"`; a version may be left out."""
    name, _, version = spec["crate"].partition("@")
    return name, version or None


def is_meant(spec, package):
    name, version = named(spec)
    return name == package["name"] and version in (None, package["version"])


def licences(config, all_packages):
    rules = config["licenses"]
    exceptions = rules.get("exceptions", [])
    unused = {exception["crate"] for exception in exceptions}
    for package in all_packages:
        if package["source"] is None and package.get("publish") == [] and rules["private"]["ignore"]:
            continue
        allowed = set(rules["allow"])
        for exception in exceptions:
            if is_meant(exception, package):
                unused.discard(exception["crate"])
                allowed |= set(exception["allow"])
        said = package["license"]
        label = f"{package['name']} {package['version']}"
        if not said:
            yield f"{label} declares no licence"
        elif not holds(said, allowed.__contains__):
            yield f"{label} is under {said}, which deny.toml does not allow"
    for crate in sorted(unused):
        yield f"deny.toml makes an exception for the licence of {crate}, which is not used"


def sources(config, all_packages):
    if (config["sources"]["unknown-registry"], config["sources"]["unknown-git"]) != ("deny", "deny"):
        raise Problem("deny.toml: [sources] is expected to deny what is unknown")
    # What a manifest names without a registry comes from cargo's own.
    usual = {need["source"] for package in all_packages for need in package["dependencies"] if is_usual(need)}
    for package in all_packages:
        if package["source"] is not None and package["source"] not in usual:
            yield f"{package['name']} {package['version']} comes from {package['source']}"


def is_usual(need):
    return need["registry"] is None and (need["source"] or "").startswith(("registry+", "sparse+"))


def bans(config, all_packages):
    rules = config["bans"]
    by_name = {}
    for package in all_packages:
        by_name.setdefault(package["name"], []).append(package)
        for banned in rules["deny"]:
            if is_meant(banned, package):
                yield f"{package['name']} {package['version']} is banned"
        if package["source"] is None:
            for dependency in package["dependencies"]:
                if dependency["req"] == "*" and not dependency.get("path"):
                    yield f"{package['name']} takes any version of {dependency['name']}"
    skipped = rules.get("skip", [])
    unused = [spec["crate"] for spec in skipped]
    for name, versions in sorted(by_name.items()):
        left = []
        for package in versions:
            specs = [spec for spec in skipped if is_meant(spec, package)]
            for spec in specs:
                if spec["crate"] in unused and len(versions) > 1:
                    unused.remove(spec["crate"])
            if not specs:
                left.append(package["version"])
        if rules["multiple-versions"] == "deny" and len(left) > 1:
            yield f"{name} is there in versions {', '.join(sorted(left))}: choose one, or give the older one's reason in [bans] skip"
    for crate in unused:
        yield f"deny.toml lets {crate} be there twice, which it is not"
    for spec in skipped:
        if not spec.get("reason"):
            yield f"deny.toml gives no reason why {spec['crate']} is there twice"


def check_ourselves(config):
    all_packages = list(packages(config).values())
    faults = [fault for check in (licences, sources, bans) for fault in check(config, all_packages)]
    for fault in faults:
        print(f"check_dependencies: {fault}", file=sys.stderr)
    return len(all_packages), not faults


def advisories(deny):
    """Asks a database of advisories: what asked it, or None; and whether all is well."""
    audit = tool("cargo-audit")
    if audit:
        command = [audit, "audit", "--file", str(RUST / "Cargo.lock")]
    elif deny:
        command = [deny, "--manifest-path", str(RUST / "Cargo.toml"), "check", "advisories"]
    else:
        return None, True
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DATABASE_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return None, True
    said = done.stdout + done.stderr
    if done.returncode and UNREACHABLE.search(said) and "RUSTSEC-" not in said:
        return None, True
    if done.returncode:
        print(said, file=sys.stderr)
    return command[1] if audit else "cargo-deny", not done.returncode


def main():
    config = tomllib.loads((ROOT / "deny.toml").read_text())
    deny, left_out = tool("cargo-deny"), []
    if deny:
        command = [deny, "--manifest-path", str(RUST / "Cargo.toml"), "--locked", "check", "--hide-inclusion-graph"]
        well = subprocess.run([*command, "bans", "licenses", "sources"], stdin=subprocess.DEVNULL).returncode == 0
        summary = f"cargo-deny {'is content' if well else 'is not content'} with bans, licences and sources"
    else:
        count, well = check_ourselves(config)
        summary = f"bans, licences and sources of {count} crates are {'' if well else 'not '}as deny.toml says"
        left_out.append("cargo-deny itself (make fetch-deny)")
    asked, safe = advisories(deny)
    if asked:
        summary += f"; {asked} knows of no advisory" if safe else f"; {asked} knows of advisories"
    else:
        left_out.append("advisories (no cargo-audit or cargo-deny, or their database cannot be reached)")
    # It is a workspace of its own, which nothing else builds.
    fuzz = [CARGO, "metadata", "--locked", "--format-version", "1", "--filter-platform", "x86_64-unknown-linux-gnu"]
    locked = subprocess.run(fuzz, cwd=RUST / "fuzz", capture_output=True, text=True)
    if locked.returncode:
        print(f"check_dependencies: rust/fuzz/Cargo.lock is stale: run `cargo metadata` in rust/fuzz: {locked.stderr.strip()}", file=sys.stderr)
    rest = f"; not there, so not run: {', '.join(left_out)}" if left_out else ""
    print(f"check_dependencies: {summary}{rest}")
    return 0 if well and safe and not locked.returncode else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Problem as problem:
        sys.exit(f"check_dependencies: {problem}")
