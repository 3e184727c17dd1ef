#!/usr/bin/env python3
"""Tests of what check_layers.py and check_unused.py make of Rust sources, and of check_docs.py."""

import tempfile
import unittest
from pathlib import Path

from check_docs import homeless
from check_layers import BANNED, PURE, Modules, built_with, check_banned, circles, leaves
from check_unused import is_named
from rust_source import code_of, module_of, without_tests


def graph(**files):
    """Imports between files that are given as `a` or `a__b` (for a/b.rs) with their text."""
    paths = {Path(name.replace("__", "/") + ".rs"): text for name, text in files.items()}
    modules = {module_of(path, Path()): (path, without_tests(code_of(text))[0]) for path, text in paths.items()}
    found = Modules(modules).graph()
    return {str(path): {str(other) for other in used} for path, used in found.items()}


class Sources(unittest.TestCase):
    def test_comments_and_literals_are_blank_and_the_rest_stays_where_it_was(self):
        text = """a("x // \\" {", 'y', '"', b'\\'', r#"" {"#, &'a str); /* /* { */ } */ b // c\nd"""
        code = code_of(text)
        self.assertEqual(len(code), len(text))
        self.assertEqual(code.split(), ["a(", ",", ",", ",", ",", ",", "&'a", "str);", "b", "d"])

    def test_what_only_tests_compile_is_left_out(self):
        code, modules = without_tests(
            "#[cfg(test)] mod tests { fn a() {} }\n#[cfg(test)]\n#[path = x]\nmod more;\nstruct S { #[cfg(test)] b: u8, c: u8 }\n"
            "#[tokio::test]\nasync fn d<A, B>(x: [u8; 3]) { e }\n#[cfg(any(test, feature = x))] mod f;"
        )
        self.assertEqual(code.split(), "struct S { c: u8 } #[cfg(any(test, feature = x))] mod f;".split())
        self.assertEqual(modules, {"more"})


class Cycles(unittest.TestCase):
    def test_each_leaf_of_a_use_tree_is_a_path(self):
        found = leaves("crate::{a::{self, B as C}, d::*}")
        self.assertEqual(found, [(("crate", "a"), "a"), (("crate", "a", "B"), "C"), (("crate", "d", "*"), "*")])

    def test_an_import_is_followed_through_reexports_to_the_definition(self):
        found = graph(lib="mod a; mod c; pub use a::B;", a="mod b; pub use b::*;", a__b="pub struct B;", c="use crate::B;")
        self.assertEqual(found, {"lib.rs": set(), "a.rs": set(), "a/b.rs": set(), "c.rs": {"a/b.rs"}})

    def test_a_parent_and_a_child_that_name_what_the_other_defines_are_a_cycle(self):
        files = {"lib": "pub mod a;", "a__b": "use super::A; pub struct B(A);"}
        one_way = graph(a="mod b; pub use b::B; pub struct A;", **files)
        self.assertEqual(circles(one_way), [])
        both = graph(a="mod b; pub use b::B; pub struct A; fn f(b: B) {}", **files)
        self.assertEqual(circles(both), [["a.rs", "a/b.rs"]])

    def test_a_module_is_imported_by_paths_through_it_not_by_its_name(self):
        files = {"lib": "mod a; mod b;", "b": "use crate::a::A; pub fn f() {}"}
        self.assertEqual(circles(graph(a="use crate::b; pub struct A;", **files)), [])
        self.assertEqual(circles(graph(a="use crate::b; pub struct A; fn g() { b::f() }", **files)), [["a.rs", "b.rs"]])


class Banned(unittest.TestCase):
    def test_what_a_crate_is_built_with_reaches_through_others_and_leaves_out_its_tests(self):
        used = built_with("mesh-net")
        self.assertLessEqual({"mesh-net", "dcf", "tokio", "quinn", "quinn-proto", "rustls"}, used)
        self.assertNotIn("proptest", used)

    def test_features_are_those_of_the_crate_alone(self):
        self.assertIn("mesh-base", built_with("mesh-control"))
        self.assertNotIn("tokio", built_with("mesh-control"))

    def test_each_banned_crate_is_a_fault(self):
        for name in PURE:
            self.assertEqual([*check_banned(name, {name, "bytes", "tokio-util"})], [])
            self.assertEqual(len([*check_banned(name, {name, "tokio", "ort"})]), 2)
        self.assertIn("mesh-kernels", BANNED["mesh-head"])
        self.assertEqual(len([*check_banned("mesh-head", {"tokio", "onig", "mesh-kernels"})]), 2)


class Unused(unittest.TestCase):
    def test_a_crate_is_named_by_a_path_or_a_use_and_not_by_a_variable(self):
        for code in ["use toml;", "use toml::Table;", "fn f() { toml::from() }", "::toml::x", "extern crate toml;", "#[toml::test]"]:
            self.assertTrue(is_named("toml", code), code)
        for code in ["fn f(toml: u8) {}", "x.toml()", "crate::toml::x", "mod toml;"]:
            self.assertFalse(is_named("toml", code), code)
        self.assertTrue(is_named("md-5", "use md5::Md5;"))


class Glossary(unittest.TestCase):
    def test_what_an_entry_names_has_to_exist(self):
        rows = [
            ("`a`", None),
            ("`a` `x::y`, `z`", None),
            ("`a` `x` `y`, measured by `b`", None),
            ("`a` `x::y::Type`, `z` `Other`", None),
            ("`c`", "c"),
            ("`b` `x`", "x"),
            ("`a` `x::z`", "x::z"),
            ("`a` `x::y::Other`", "x::y::Other"),
            ("–", None),
        ]
        head = "| term | lives in |\n|---|---|\n"
        text = head + "\n".join(f"| t | {home} |" for home, _ in rows) + "\n\n| term | meaning |\n|---|---|\n| `d` | `e` |\n"
        with tempfile.TemporaryDirectory() as folder:
            crates = Path(folder)
            for path, code in {"l/a/src/x/y.rs": "pub enum Type {", "l/a/src/z/mod.rs": "trait Other", "l/b/src/lib.rs": ""}.items():
                (crates / path).parent.mkdir(parents=True, exist_ok=True)
                (crates / path).write_text(code)
            found = {number: fault.rpartition(" ")[2] for number, fault in homeless(text, crates)}
        self.assertEqual(found, {number: fault for number, (_, fault) in enumerate(rows, 3) if fault})


if __name__ == "__main__":
    unittest.main()
