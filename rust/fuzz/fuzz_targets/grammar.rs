//! Any text in any notation is a grammar or an error, and its answers take tokens or end.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mesh_engine::{Allowed, Vocabulary};
use mesh_grammar::{Grammars, Source};

struct Ascii([u8; 128]);

impl Vocabulary for Ascii {
    fn size(&self) -> usize {
        129
    }

    fn text(&self, token: u32) -> &[u8] {
        let token = token as usize;
        self.0.get(token..=token).unwrap_or(&[])
    }

    fn is_end(&self, token: u32) -> bool {
        token == 128
    }
}

static GRAMMARS: LazyLock<Grammars> = LazyLock::new(|| {
    Grammars::new(&Ascii(std::array::from_fn(|i| i as u8))).expect("a vocabulary with an end")
});

fuzz_target!(|input: (u8, String)| {
    let (kind, text) = input;
    let source = match kind % 4 {
        0 => Source::JsonSchema(text),
        1 => Source::Lark(text),
        2 => Source::Regex(text),
        _ => Source::Gbnf(text),
    };
    let Ok(grammar) = GRAMMARS.compile(&source) else {
        return;
    };
    let mut answer = grammar.0.begin();
    for i in 0..16 {
        answer.prepare();
        let token = match answer.allowed() {
            Ok(Allowed::Tokens(set)) => (0..128).rev().filter(|&t| set.contains(t)).nth(i % 3),
            Ok(Allowed::End) | Err(_) => return,
        };
        let Some(token) = token else {
            return;
        };
        if answer.accept(token).is_err() {
            return;
        }
    }
});
