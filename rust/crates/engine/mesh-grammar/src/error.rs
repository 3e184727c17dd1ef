//! Errors of grammars.

use crate::gbnf::GbnfError;

/// Reasons for which no answer can follow a grammar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum GrammarError {
    /// The model's vocabulary cannot be constrained.
    #[error("answers of this model cannot follow a grammar: {reason}")]
    Vocabulary { reason: String },
    /// The text is longer than [`MOST_BYTES`](crate::Source::MOST_BYTES).
    #[error("the {kind} has {bytes} bytes, and {most} are allowed; shorten it")]
    TooLong {
        kind: &'static str,
        bytes: usize,
        most: usize,
    },
    /// It is nested deeper than [`MOST_DEPTH`](crate::Source::MOST_DEPTH).
    #[error("more than {most} brackets are open at once in the {kind}; nest it less")]
    TooDeep { kind: &'static str, most: usize },
    /// A grammar has more lines than [`MOST_LINES`](crate::Source::MOST_LINES).
    #[error("the grammar has more than {most} lines; join rules")]
    TooManyLines { most: usize },
    /// The schema is not JSON.
    #[error("the schema is not JSON: {0}")]
    NotJson(String),
    /// The grammar is not GBNF.
    #[error("the grammar cannot be read: {0}")]
    Gbnf(#[from] GbnfError),
    /// It asks for a feature that is not supported, has a mistake, or is too complex.
    #[error("the {kind} cannot be used: {reason}")]
    Refused { kind: &'static str, reason: String },
}
