//! Text of clients in a conversation is data: it must not become a control token.
//!
//! A template mixes its own text, which names control tokens, with the client's. Tokenised as one text, a
//! message that holds `<|im_end|>` would end its turn and could forge the next one. So before a conversation
//! is rendered, every name of a control token in it is broken by a *mark*, a private-use character that
//! stands nowhere in the conversation, behind the name's first character. Templates may trim, cut, compare
//! and repeat text; the mark travels with it. Behind the template the marks are taken out again, and their
//! places are barriers that no special token spans ([`crate::Tokenizer::encode_prompt`]). Ordinary tokens are
//! not touched by a barrier.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::conversation::RenderRequest;
use super::error::ChatError;
use crate::tokenizer::Rendered;

/// Texts that must not be read as control tokens in the messages of clients.
#[derive(Debug, Clone, Default)]
pub(super) struct Guard {
    /// Names of control tokens, or beginnings that all names with them have in common.
    names: BTreeSet<Box<str>>,
    /// Their first bytes, each with the lengths of the names that begin with it: there may be thousands of
    /// names.
    lengths: BTreeMap<u8, BTreeSet<usize>>,
}

/// Beginnings that only control tokens have. They are broken everywhere, so that a template cannot assemble a
/// name from parts of a message.
const OPENINGS: [&str; 2] = ["<|", "<\u{ff5c}"];

/// Names that templates look for in earlier answers, in which they stand by right.
const OF_ANSWERS: [&str; 10] = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_calls>",
    "</tool_calls>",
    "<tool_response>",
    "</tool_response>",
    "[THINK]",
    "[/THINK]",
];

impl Guard {
    pub(super) fn new<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let mut set: BTreeSet<Box<str>> = BTreeSet::new();
        for name in names {
            let opening = OPENINGS.iter().find(|opening| name.starts_with(*opening));
            match opening {
                Some(opening) => set.insert(Box::from(*opening)),
                // A single character cannot be broken.
                None if name.chars().nth(1).is_some() => set.insert(name.into()),
                None => false,
            };
        }
        let mut lengths: BTreeMap<u8, BTreeSet<usize>> = BTreeMap::new();
        for name in &set {
            let first = lengths.entry(name.as_bytes()[0]).or_default();
            first.insert(name.len());
        }
        Guard {
            names: set,
            lengths,
        }
    }

    /// Breaks the names in a conversation; gives the mark if there were any.
    ///
    /// # Errors
    /// If there are names and no mark is left to break them with.
    pub(super) fn mark(&self, request: &mut RenderRequest) -> Result<Option<char>, ChatError> {
        if !self.stands_in(request) {
            return Ok(None);
        }
        let mark = unused(request, MARKS)?;
        each_text(request, &mut |role, text| {
            *text = self.broken(text, mark, role == "assistant");
        });
        Ok(Some(mark))
    }

    fn stands_in(&self, request: &mut RenderRequest) -> bool {
        let mut found = false;
        each_text(request, &mut |_, text| {
            found |= (0..text.len()).any(|at| self.name_at(text, at).is_some());
        });
        found
    }

    /// The text with `mark` behind the first character of every name.
    fn broken(&self, text: &str, mark: char, answer: bool) -> String {
        let mut out = String::with_capacity(text.len() + 16);
        for (at, c) in text.char_indices() {
            out.push(c);
            let name = self.name_at(text, at);
            if name.is_some_and(|name| !(answer && OF_ANSWERS.contains(&name))) {
                out.push(mark);
            }
        }
        out
    }

    /// The name of a control token at byte `at`, if there is one.
    fn name_at<'t>(&self, text: &'t str, at: usize) -> Option<&'t str> {
        let lengths = self.lengths.get(text.as_bytes().get(at)?)?;
        lengths
            .iter()
            .filter_map(|len| text.get(at..at + len))
            .find(|name| self.names.contains(*name))
    }
}

/// A character of `range` that no text of the conversation holds.
///
/// # Errors
/// If they hold all of them: that is a quarter of a megabyte of nothing else.
pub(super) fn unused(
    request: &mut RenderRequest,
    range: RangeInclusive<char>,
) -> Result<char, ChatError> {
    let mut used = BTreeSet::new();
    each_text(request, &mut |_, text| {
        used.extend(text.chars().filter(|c| range.contains(c)));
    });
    let found = range.clone().find(|c| !used.contains(c));
    found.ok_or_else(|| ChatError::Refused {
        message: format!(
            "it uses every private-use character from U+{:X} to U+{:X}: leave out one of them",
            u32::from(*range.start()),
            u32::from(*range.end())
        ),
    })
}

/// Removes the marks from a template's output.
pub(super) fn unmark(text: String, mark: Option<char>) -> Rendered {
    let Some(mark) = mark.filter(|mark| text.contains(*mark)) else {
        return Rendered {
            text,
            barriers: Vec::new(),
        };
    };
    let mut out = String::with_capacity(text.len());
    let mut barriers = Vec::new();
    for part in text.split(mark) {
        out.push_str(part);
        barriers.push(out.len());
    }
    // The last part is followed by no barrier.
    barriers.pop();
    Rendered {
        text: out,
        barriers,
    }
}

/// Visits every text that a client wrote, with the role of the message that it is in.
fn each_text(request: &mut RenderRequest, visit: &mut impl FnMut(&str, &mut String)) {
    for message in &mut request.messages {
        // The name of a role is the client's, too.
        let role = message.role.clone();
        visit(&role, &mut message.role);
        visit(&role, &mut message.content);
    }
    each_entry("", &mut request.kwargs, visit);
}

/// The names in an object are the client's as its values are: templates write both.
fn each_entry(role: &str, map: &mut Map<String, Value>, visit: &mut impl FnMut(&str, &mut String)) {
    let entries = std::mem::take(map).into_iter();
    *map = entries
        .map(|(mut name, mut value)| {
            visit(role, &mut name);
            each_value(role, &mut value, visit);
            (name, value)
        })
        .collect();
}

fn each_value(role: &str, value: &mut Value, visit: &mut impl FnMut(&str, &mut String)) {
    match value {
        Value::String(text) => visit(role, text),
        Value::Array(list) => list
            .iter_mut()
            .for_each(|value| each_value(role, value, visit)),
        Value::Object(map) => each_entry(role, map, visit),
        _ => {}
    }
}

/// The last two planes are for private use. What [`super::functions`] writes as JSON leaves them as they are.
pub(super) const MARKS: RangeInclusive<char> = '\u{100000}'..='\u{10fffd}';
/// Characters that mark the end of a message that is to be continued.
pub(super) const SENTINELS: RangeInclusive<char> = '\u{f0000}'..='\u{ffffd}';
