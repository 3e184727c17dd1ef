//! Templates that are nested deeper, or chained longer, than any real one is.
//!
//! The engine parses and compiles expressions by recursion. It counts brackets and blocks, but no signs,
//! `not`s, filters or operators in a row, nor the `elif`s of one condition: a template of nothing else
//! overflows the stack, which ends the process. So these are counted before anything is parsed, in the
//! engine's own tokens.

use minijinja::machinery::{Token, WhitespaceConfig, tokenize};
use minijinja::syntax::SyntaxConfig;

/// Maximum of operators, opening brackets, dots and similar words in one expression or tag.
const MOST_OPERATORS: usize = 1000;
/// `elif`s of a whole template.
const MOST_ELIFS: usize = 1000;
/// Stack for what these limits allow.
pub(super) const STACK: usize = 64 << 20;

/// Checks that a template can be parsed on a stack of [`STACK`] bytes.
///
/// # Errors
/// If it cannot: in words.
pub(super) fn check(source: &str) -> Result<(), String> {
    let whitespace = WhitespaceConfig::default();
    let (mut operators, mut elifs, mut begins) = (0, 0, false);
    for token in tokenize(source, false, SyntaxConfig, whitespace) {
        // The parser reports the error and stops here, too.
        let Ok((token, span)) = token else {
            return Ok(());
        };
        match token {
            Token::VariableStart | Token::BlockStart => operators = 0,
            Token::Ident("elif") if begins => elifs += 1,
            Token::Ident("not" | "and" | "or" | "if" | "else" | "is" | "in") => operators += 1,
            Token::TemplateData(_)
            | Token::VariableEnd
            | Token::BlockEnd
            | Token::Ident(_)
            | Token::Str(_)
            | Token::String(_)
            | Token::Int(_)
            | Token::Int128(_)
            | Token::Float(_)
            | Token::Comma
            | Token::Colon
            | Token::Assign
            | Token::BracketClose
            | Token::ParenClose
            | Token::BraceClose => {}
            _ => operators += 1,
        }
        begins = matches!(token, Token::BlockStart);
        if operators > MOST_OPERATORS {
            return Err(format!(
                "line {}: an expression of over {MOST_OPERATORS} operators",
                span.start_line
            ));
        }
        if elifs > MOST_ELIFS {
            return Err(format!(
                "line {}: over {MOST_ELIFS} times elif",
                span.start_line
            ));
        }
    }
    Ok(())
}
