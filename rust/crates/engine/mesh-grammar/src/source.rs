//! The forms in which a request can describe its answer.

use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};

use crate::error::GrammarError;
use crate::gbnf;

/// A description of the answers that are allowed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Source {
    /// Any JSON object.
    JsonObject,
    /// JSON that a JSON Schema describes.
    JsonSchema(String),
    /// A grammar in Lark's syntax, with the rule `start`, as `llguidance` extends it.
    Lark(String),
    /// A regular expression in the syntax of the crate `regex`, for the whole answer.
    Regex(String),
    /// A grammar in llama.cpp's GBNF, with the rule `root`.
    Gbnf(String),
}

impl Source {
    /// Most bytes of a description.
    pub const MOST_BYTES: usize = 256 << 10;

    /// Most parentheses, brackets or braces that may be open at once in a grammar or regular expression.
    /// Quoted ones count.
    pub const MOST_DEPTH: usize = 200;

    /// Most lines of a grammar in Lark's syntax, and with them rules that name each other.
    pub const MOST_LINES: usize = 1000;

    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Source::JsonObject | Source::JsonSchema(_) => "schema",
            Source::Lark(_) | Source::Gbnf(_) => "grammar",
            Source::Regex(_) => "regular expression",
        }
    }

    pub(crate) fn text(&self) -> &str {
        match self {
            Source::JsonObject => "",
            Source::JsonSchema(text)
            | Source::Lark(text)
            | Source::Regex(text)
            | Source::Gbnf(text) => text,
        }
    }

    pub(crate) fn grammar(&self) -> Result<TopLevelGrammar, GrammarError> {
        let bytes = self.text().len();
        if bytes > Self::MOST_BYTES {
            return Err(GrammarError::TooLong {
                kind: self.kind(),
                bytes,
                most: Self::MOST_BYTES,
            });
        }
        if let Source::Lark(text) = self
            && text.lines().count() > Self::MOST_LINES
        {
            return Err(GrammarError::TooManyLines {
                most: Self::MOST_LINES,
            });
        }
        if !matches!(self, Source::JsonSchema(_)) && depth(self.text()) > Self::MOST_DEPTH {
            return Err(GrammarError::TooDeep {
                kind: self.kind(),
                most: Self::MOST_DEPTH,
            });
        }
        Ok(match self {
            Source::JsonObject => {
                TopLevelGrammar::from_json_schema(with_short_blanks(json!({"type": "object"})))
            }
            Source::JsonSchema(text) => {
                let schema: Value = serde_json::from_str(text)
                    .map_err(|error| GrammarError::NotJson(error.to_string()))?;
                TopLevelGrammar::from_json_schema(with_short_blanks(schema))
            }
            Source::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
            Source::Regex(text) => TopLevelGrammar::from_regex(text),
            Source::Gbnf(text) => TopLevelGrammar::from_lark(gbnf::to_lark(text)?),
        })
    }
}

/// The most parentheses, brackets and braces that are open at once.
fn depth(text: &str) -> usize {
    let mut open = 0usize;
    let mut most = 0;
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => open += 1,
            b')' | b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        most = most.max(open);
    }
    most
}

/// The schema with llguidance's option that bounds white space, unless it has options of its own. A small
/// model that begins an indentation would otherwise go on with it to the limit of its answer.
fn with_short_blanks(mut schema: Value) -> Value {
    if let Value::Object(keywords) = &mut schema {
        let options = json!({"whitespace_pattern": "( |\\n[ \\t]{0,32})"});
        keywords.entry("x-guidance").or_insert(options);
    }
    schema
}
