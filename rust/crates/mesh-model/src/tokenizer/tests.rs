//! The tokenizer against small vocabularies made here. Real ones are in `tests/golden_vocabs.rs`.

use super::*;
