#!/usr/bin/env python3
"""Checks README.md, CONTRIBUTING.md, SECURITY.md, CHANGELOG.md and docs/: links lead to files and headings that exist, pages
are reachable from docs/README.md, and lines of prose have at most 110 columns. What the glossary says about where a term
lives has to exist: a crate, a module or file in it, a type in that. Exit code 1 names what is wrong.

Tables and code may be longer, because they cannot be wrapped.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 110
INDEX = ROOT / "docs/README.md"
GLOSSARY = ROOT / "docs/reference/glossary.md"
CRATES = ROOT / "rust/crates"
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(text):
    """The numbered lines of a page outside of code, with whether each is a row of a table."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            yield number, line, line.startswith("|")


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = (line.lstrip("#").strip() for _, line, _ in prose(text) if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def faults(page, linked):
    text = page.read_text()
    for number, line, in_table in prose(text):
        if len(line) > COLUMNS and not in_table:
            yield number, f"{len(line)} columns, at most {COLUMNS} are allowed"
        for target in LINK.findall(line):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            linked.setdefault(page, set()).add(file)
            if not file.exists():
                yield number, f"no such file: {target}"
            elif anchor and anchor not in anchors(file.read_text()):
                yield number, f"no such heading: {target}"


def homes(text):
    """The numbered rows of tables with a column "lives in", each with the names in that column."""
    has_homes = False
    for number, line, in_table in prose(text):
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if not in_table or cells[-1] == "lives in":
            has_homes = in_table
        elif has_homes:
            yield number, re.findall(r"`([^`]+)`", cells[-1])


def is_home(source, path):
    """Whether a crate's folder `source` has the module, file or type `path`: `rings::drain`, `front/http`, `a::Type`."""
    *parents, last = re.split("::|/", path)
    module = source.joinpath(*parents)
    if not last[0].isupper():
        return (module / last).is_dir() or (module / f"{last}.rs").is_file()
    defined = re.compile(rf"\b(struct|enum|trait|type) {last}\b")
    files = [module.with_suffix(".rs"), *module.rglob("*.rs")]
    return any(defined.search(file.read_text()) for file in files if file.is_file())


def homeless(text, crates):
    """The names in a glossary that do not exist. A name that is no crate's belongs to the crate, or to the module in it, that
    comes before it."""
    folders = {crate.name: crate / "src" for crate in crates.glob("*/*") if crate.is_dir()}
    for number, names in homes(text):
        source = module = None
        for name in names:
            if name in folders:
                source = module = folders[name]
            elif source and (is_home(source, name) or is_home(module, name)):
                module = source if is_home(source, name) else module
                module = module.joinpath(*re.split("::|/", name))
            else:
                yield number, f"no such crate, module or type: {name}"


def main():
    pages = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
    linked, count = {}, 0
    for page in pages:
        for number, fault in faults(page, linked):
            print(f"{page.relative_to(ROOT)}:{number}: {fault}", file=sys.stderr)
            count += 1
    for number, fault in homeless(GLOSSARY.read_text(), CRATES):
        print(f"{GLOSSARY.relative_to(ROOT)}:{number}: {fault}", file=sys.stderr)
        count += 1
    for page in pages:
        if page.parent != ROOT and page != INDEX and page not in linked.get(INDEX, ()):
            print(f"docs/README.md: no link to {page.relative_to(ROOT)}", file=sys.stderr)
            count += 1
    print(f"check_docs: {len(pages)} pages, {count} faults")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
