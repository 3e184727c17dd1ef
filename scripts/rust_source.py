"""Reads Rust sources as far as the checks of this folder need them: code without comments, strings and tests."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUST = ROOT / "rust"
CRATES = RUST / "crates"

TOKEN = re.compile(
    r"//[^\n]*"
    r"|/\*"
    r"|\b(?:br|cr|r)(?P<hashes>#*)\""
    r"|\b[bc]?\"(?:[^\"\\]|\\.)*\""
    r"|\"(?:[^\"\\]|\\.)*\""
    r"|\bb?'(?:[^'\\\n]|\\(?:x[0-9a-fA-F]{2}|u\{[^}]*\}|.))'"
    r"|'(?:[^'\\\n]|\\(?:x[0-9a-fA-F]{2}|u\{[^}]*\}|.))'",
    re.DOTALL,
)
TEST_ATTRIBUTE = re.compile(r"#\s*\[\s*cfg\s*\(\s*(?:test|all\s*\(\s*test\b[^]]*)\s*\)\s*\]|#\s*\[\s*(?:\w+::)*test\b[^]]*\]")
ATTRIBUTE = re.compile(r"\s*#\s*\[[^]]*\]")
ITEM = re.compile(r"\s*(?:pub(?:\s*\([^)]*\))?\s+)?(?:async|const|enum|extern|fn|impl|macro_rules|mod|static|struct|trait|type|unsafe|use)\b")


def code_of(text):
    """The code without comments and literals: blanks stand in their place, so that offsets and lines stay."""
    parts, at = [], 0
    while match := TOKEN.search(text, at):
        end = match.end()
        if match[0] == "/*":
            end = end_of_comment(text, end)
        elif match["hashes"] is not None:
            closed = text.find('"' + match["hashes"], end)
            end = len(text) if closed < 0 else closed + 1 + len(match["hashes"])
        parts += [text[at : match.start()], re.sub(r"[^\n]", " ", text[match.start() : end])]
        at = end
    return "".join(parts) + text[at:]


def end_of_comment(text, at):
    depth = 1
    for match in re.compile(r"/\*|\*/").finditer(text, at):
        depth += 1 if match[0] == "/*" else -1
        if depth == 0:
            return match.end()
    return len(text)


def end_of_braces(code, at):
    """Behind the bracket that closes the one at `at`."""
    depth = 0
    for match in re.compile(r"[{}()\[\]]").finditer(code, at):
        depth += 1 if match[0] in "{([" else -1
        if depth == 0:
            return match.end()
    return len(code)


def end_of_item(code, at):
    """Behind the item that begins at `at`, or behind the field, variant or arm."""
    ends = "{;" if ITEM.match(code, at) else "{;,"
    while match := re.compile(r"[{(\[;,})\]]").search(code, at):
        if match[0] in "})]":
            return match.start()
        if match[0] in ends:
            return end_of_braces(code, match.start()) if match[0] == "{" else match.end()
        at = match.end() if match[0] == "," else end_of_braces(code, match.start()) if match[0] in "([" else match.end()
    return len(code)


def without_tests(code):
    """The code without what only tests compile, and the modules in files of their own that only tests have."""
    parts, at, modules = [], 0, set()
    while match := TEST_ATTRIBUTE.search(code, at):
        item = match.end()
        while attribute := ATTRIBUTE.match(code, item):
            item = attribute.end()
        end = end_of_item(code, item)
        if named := re.match(r"\s*(?:pub(?:\s*\([^)]*\))?\s+)?mod\s+(\w+)\s*;", code[item:end]):
            modules.add(named[1])
        parts += [code[at : match.start()], re.sub(r"[^\n]", " ", code[match.start() : end])]
        at = end
    return "".join(parts) + code[at:], modules


def module_of(path, src):
    """The module path of a file below `src`, as a tuple: () is the crate's root."""
    names = path.relative_to(src).with_suffix("").parts
    return () if names == ("lib",) else names[:-1] if names[-1] == "mod" else names


def sources(src):
    """Code of each file of a library below `src` that others than tests compile, by module path: (file, code)."""
    files, only_tests = {}, set()
    for path in sorted(src.rglob("*.rs")):
        if path == src / "main.rs" or src / "bin" in path.parents:
            continue
        module = module_of(path, src)
        code, modules = without_tests(code_of(path.read_text()))
        if re.match(r"\s*#!\s*\[\s*cfg\s*\(\s*test\s*\)\s*\]", code):
            only_tests.add(module)
        only_tests |= {(*module, name) for name in modules}
        files[module] = (path.relative_to(src), code)
    is_test = lambda module: any(module[:length] in only_tests for length in range(len(module) + 1))
    return {module: found for module, found in files.items() if not is_test(module)}


def manifests():
    """The manifest of each crate below rust/crates, in order of the folders."""
    return sorted(CRATES.glob("*/*/Cargo.toml"))
