//! Answers that follow a JSON Schema, a grammar or a regular expression.
//!
//! [`Grammars`] belongs to a model: it has the bytes of the model's tokens as a trie, and compiles a
//! [`Source`] to a [`mesh_engine::Grammar`]. The work behind it, an Earley parser over a lexer of
//! regular-expression derivatives and the walk through the trie, is the library `llguidance`'s. This crate
//! bounds it, gives its errors the names of the API's fields, translates llama.cpp's GBNF ([`gbnf`]), and
//! computes masks on a thread of its own beside the engine's step.

#![forbid(unsafe_code)]

mod ahead;
mod answer;
mod error;
pub mod gbnf;
mod grammars;
mod source;

pub use error::GrammarError;
pub use grammars::Grammars;
pub use source::Source;
