//! The state of one answer under a grammar.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use llguidance::Matcher;
use mesh_engine::{Allowed, Constraint, ConstraintError, TokenSet};

use crate::ahead::Ahead;
use crate::grammars::text;

/// An answer that follows a grammar.
pub(crate) struct Answer {
    parser: Parser,
    /// The tokens that may come next, once they are known.
    next: Option<Next>,
    ahead: Arc<Ahead>,
}

enum Parser {
    Here(Box<Matcher>),
    /// It finds the next tokens on the other thread.
    Away(Receiver<(Box<Matcher>, Found)>),
    /// The other thread panicked with it.
    Lost,
}

enum Next {
    Tokens(TokenSet),
    End,
}

type Found = Result<Next, ConstraintError>;

impl Answer {
    pub(crate) fn new(matcher: Matcher, ahead: Arc<Ahead>) -> Self {
        Answer {
            parser: Parser::Here(Box::new(matcher)),
            next: None,
            ahead,
        }
    }

    /// Waits for the parser if it is away, and keeps what it found.
    fn parser(&mut self) -> Result<&mut Matcher, ConstraintError> {
        if let Parser::Away(receiver) = &self.parser {
            let (parser, found) = match receiver.recv() {
                Ok((matcher, found)) => (Parser::Here(matcher), found.map(Some)),
                Err(_) => (Parser::Lost, Ok(None)),
            };
            self.parser = parser;
            self.next = found?;
        }
        match &mut self.parser {
            Parser::Here(matcher) => Ok(matcher),
            Parser::Away(_) | Parser::Lost => Err(ConstraintError("its parser failed".to_owned())),
        }
    }
}

impl Constraint for Answer {
    fn prepare(&mut self) {
        if self.next.is_some() {
            return;
        }
        match std::mem::replace(&mut self.parser, Parser::Lost) {
            Parser::Here(mut matcher) => {
                self.parser = Parser::Away(self.ahead.run(move || {
                    let found = find(&mut matcher);
                    (matcher, found)
                }));
            }
            other => self.parser = other,
        }
    }

    fn allowed(&mut self) -> Result<Allowed<'_>, ConstraintError> {
        self.parser()?;
        if self.next.is_none() {
            let found = find(self.parser()?)?;
            self.next = Some(found);
        }
        Ok(match &self.next {
            Some(Next::Tokens(set)) => Allowed::Tokens(set),
            Some(Next::End) | None => Allowed::End,
        })
    }

    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        let result = self.parser()?.consume_token(token);
        self.next = None;
        result.map_err(|error| ConstraintError(text(&error)))
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Answer")
    }
}

fn find(matcher: &mut Matcher) -> Found {
    if matcher.is_stopped() && !matcher.is_error() {
        return Ok(Next::End);
    }
    match matcher.compute_mask() {
        Ok(mask) => Ok(Next::Tokens(TokenSet::from_words(mask.as_slice().to_vec()))),
        Err(error) => Err(ConstraintError(text(&error))),
    }
}
