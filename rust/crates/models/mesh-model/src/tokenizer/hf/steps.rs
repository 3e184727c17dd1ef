//! Normalizers and pre-tokenizers: the steps from a text to words, which are then merged to tokens.
//!
//! They give the results of the steps of the same names in the `tokenizers` crate. That crate runs patterns
//! with Oniguruma, whose Rust binding panics where a pattern gives up; here `fancy-regex` runs them, and
//! giving up is an error.

use std::borrow::Cow;
use std::ops::Range;

use fancy_regex::Regex;
use serde_json::Value;
use tokenizers::NormalizedString;

use crate::tokenizer::error::{TokenizerError, malformed, unsupported};
use crate::tokenizer::limit::Limit;
use crate::tokenizer::notation::byte_char;
use crate::tokenizer::pre::GPT2;

/// More steps than any tokenizer has.
const MAX_STEPS: usize = 32;
const MAX_PATTERN: usize = 1 << 14;
/// A replacement is a character or a few.
const MAX_CONTENT: usize = 64;

#[derive(Debug)]
pub(super) enum Normalizer {
    Unicode(UnicodeForm),
    Lowercase,
    Prepend(String),
    Replace(Pattern, String),
    Strip { left: bool, right: bool },
}

/// A Unicode normalization form.
#[derive(Debug, Clone, Copy)]
pub(super) enum UnicodeForm {
    Nfc,
    Nfd,
    Nfkc,
    Nfkd,
}

#[derive(Debug)]
pub(super) enum PreTokenizerStep {
    Split(Pattern, Behavior, bool),
    /// Digits one by one, or together.
    Digits(bool),
    /// Bytes as printable characters; first a space, and a cut into words.
    ByteLevel {
        space: bool,
        words: Option<Regex>,
    },
    Metaspace {
        mark: char,
        prepend: Prepend,
        split: bool,
    },
}

/// Pattern to search for.
#[derive(Debug)]
pub(super) enum Pattern {
    Text(String),
    Regex(Box<Regex>),
}

/// Treatment of matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Behavior {
    Removed,
    Isolated,
    MergedWithPrevious,
    MergedWithNext,
    Contiguous,
}

/// Texts that get a mark in front, if they do not begin with one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prepend {
    Always,
    First,
    Never,
}

/// Changes of a normalizer to the bytes of a text, apart from insertions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Changes {
    Nothing,
    /// A text in ASCII stays as it is.
    BeyondAscii,
    Anything,
}

/// Runs the normalizers one after the other.
pub(super) fn normalize<'t>(
    steps: &[Normalizer],
    text: &'t str,
) -> Result<Cow<'t, str>, TokenizerError> {
    // No real tokenizer makes text much longer.
    let limit = 16 * text.len() + 1024;
    let mut out = Cow::Borrowed(text);
    for step in steps {
        if let Some(next) = step.run(&out, limit)? {
            out = Cow::Owned(next);
        }
        if out.len() > limit {
            return Err(too_long());
        }
    }
    Ok(out)
}

fn too_long() -> TokenizerError {
    TokenizerError::Encode {
        reason: "the tokenizer's normalizers make it longer than any real ones do".into(),
    }
}

impl Normalizer {
    /// Changes to a text's bytes. Marks for spaces do not count as a change: tokens with marks are known to
    /// cover spaces.
    pub(super) fn changes(&self) -> Changes {
        match self {
            Normalizer::Prepend(_) => Changes::Nothing,
            Normalizer::Replace(Pattern::Text(from), to) if from == " " && to == "\u{2581}" => {
                Changes::Nothing
            }
            Normalizer::Unicode(_) => Changes::BeyondAscii,
            Normalizer::Lowercase | Normalizer::Replace(..) | Normalizer::Strip { .. } => {
                Changes::Anything
            }
        }
    }

    /// The text after this step; `None` if it stays as it is.
    fn run(&self, text: &str, limit: usize) -> Result<Option<String>, TokenizerError> {
        match self {
            // ASCII is the same in every form.
            Normalizer::Unicode(_) if text.is_ascii() => Ok(None),
            Normalizer::Unicode(form) => {
                let mut out = String::with_capacity(text.len());
                for part in parts(text) {
                    let mut normalized = NormalizedString::from(part);
                    match form {
                        UnicodeForm::Nfc => normalized.nfc(),
                        UnicodeForm::Nfd => normalized.nfd(),
                        UnicodeForm::Nfkc => normalized.nfkc(),
                        UnicodeForm::Nfkd => normalized.nfkd(),
                    };
                    out.push_str(normalized.get());
                    if out.len() > limit {
                        return Err(too_long());
                    }
                }
                Ok(Some(out))
            }
            Normalizer::Lowercase => Ok(Some(text.to_lowercase())),
            Normalizer::Prepend(_) if text.is_empty() => Ok(None),
            Normalizer::Prepend(prefix) => Ok(Some(format!("{prefix}{text}"))),
            Normalizer::Replace(pattern, content) => {
                let mut out = String::with_capacity(text.len() + 16);
                let mut end = 0;
                for found in pattern.find(text)? {
                    out.push_str(&text[end..found.start]);
                    out.push_str(content);
                    end = found.end;
                    if out.len() > limit {
                        return Err(too_long());
                    }
                }
                out.push_str(&text[end..]);
                Ok(Some(out))
            }
            Normalizer::Strip { left, right } => {
                let text = if *left { text.trim_start() } else { text };
                let text = if *right { text.trim_end() } else { text };
                Ok(Some(text.to_owned()))
            }
        }
    }
}

/// Cuts a text into parts that are normalized as they are in the whole: the `tokenizers` crate takes some 50
/// bytes for each byte of what it normalizes at once.
fn parts(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let mut cuts = rest.char_indices().skip_while(|(at, _)| *at < PART);
        // A run of combining marks of this length is not text; it is cut anywhere.
        let cut = cuts.find(|&(at, c)| begins_anew(c) || at >= 4 * PART);
        let (part, behind) = rest.split_at(cut.map_or(rest.len(), |(at, _)| at));
        rest = behind;
        Some(part)
    })
}

/// True if `c` never composes with the character before it. Most characters of usual texts do not.
fn begins_anew(c: char) -> bool {
    matches!(c,
        '\0'..='\x7f'
        | '\u{391}'..='\u{3c9}'
        | '\u{410}'..='\u{44f}'
        | '\u{621}'..='\u{64a}'
        | '\u{2010}'..='\u{2027}'
        | '\u{3041}'..='\u{3096}'
        | '\u{30a1}'..='\u{30fa}'
        | '\u{4e00}'..='\u{9fff}'
        | '\u{ac00}'..='\u{d7a3}'
        | '\u{1f300}'..='\u{1f64f}'
    )
}

/// Bytes that are normalized at once, at least.
const PART: usize = 16 << 10;

/// Cuts a text into words in the tokens' notation. `begins` is true at the beginning of the whole text.
pub(super) fn split<'t>(
    steps: &[PreTokenizerStep],
    text: &'t str,
    begins: bool,
    limit: Limit,
) -> Result<Vec<Cow<'t, str>>, TokenizerError> {
    let mut words = vec![Cow::Borrowed(text)];
    // Every word becomes a token at least, unless words are taken out.
    let counted = !steps.iter().any(PreTokenizerStep::drops);
    for step in steps {
        let mut next = Vec::with_capacity(words.len());
        for (i, word) in words.into_iter().enumerate() {
            step.run(word, begins && i == 0, &mut next)?;
            if counted && next.len() > limit.0 {
                return Err(TokenizerError::TooLong { most: limit.0 });
            }
        }
        words = next;
    }
    words.retain(|word| !word.is_empty());
    Ok(words)
}

impl PreTokenizerStep {
    /// True if the step removes parts of the text.
    pub(super) fn drops(&self) -> bool {
        matches!(self, PreTokenizerStep::Split(_, Behavior::Removed, _))
    }

    fn run<'t>(
        &self,
        word: Cow<'t, str>,
        first: bool,
        out: &mut Vec<Cow<'t, str>>,
    ) -> Result<(), TokenizerError> {
        match self {
            PreTokenizerStep::Split(pattern, behavior, invert) => {
                let found = pattern.find(&word)?;
                cut(word, found, *behavior, *invert, out);
            }
            PreTokenizerStep::Digits(one_by_one) => {
                let digits = |(at, c): (usize, char)| c.is_numeric().then(|| at..at + c.len_utf8());
                let found = word.char_indices().filter_map(digits).collect();
                let behavior = match one_by_one {
                    true => Behavior::Isolated,
                    false => Behavior::Contiguous,
                };
                cut(word, found, behavior, false, out);
            }
            PreTokenizerStep::ByteLevel { space, words } => {
                let word = match *space && !word.starts_with(' ') {
                    true => Cow::Owned(format!(" {word}")),
                    false => word,
                };
                let mut pieces = Vec::new();
                match words {
                    Some(pattern) => {
                        let found = find(pattern, &word)?;
                        cut(word, found, Behavior::Isolated, false, &mut pieces);
                    }
                    None => pieces.push(word),
                }
                let spell = |piece: Cow<'_, str>| piece.bytes().map(byte_char).collect();
                out.extend(pieces.into_iter().map(|piece| Cow::Owned(spell(piece))));
            }
            PreTokenizerStep::Metaspace {
                mark,
                prepend,
                split,
            } => {
                let mut marked: String = word
                    .chars()
                    .map(|c| if c == ' ' { *mark } else { c })
                    .collect();
                let wanted = match prepend {
                    Prepend::Always => true,
                    Prepend::First => first,
                    Prepend::Never => false,
                };
                if wanted && !marked.starts_with(*mark) {
                    marked.insert(0, *mark);
                }
                match split {
                    true => {
                        let marks = marked.match_indices(*mark);
                        let found = marks.map(|(at, text)| at..at + text.len()).collect();
                        cut(
                            Cow::Owned(marked),
                            found,
                            Behavior::MergedWithNext,
                            false,
                            out,
                        );
                    }
                    false => out.push(Cow::Owned(marked)),
                }
            }
        }
        Ok(())
    }
}

impl Pattern {
    /// All places where it is found, in order.
    fn find(&self, text: &str) -> Result<Vec<Range<usize>>, TokenizerError> {
        match self {
            Pattern::Text(wanted) => {
                let found = text.match_indices(&**wanted);
                Ok(found.map(|(at, text)| at..at + text.len()).collect())
            }
            Pattern::Regex(regex) => find(regex, text),
        }
    }

    fn read(value: Option<&Value>) -> Result<Self, TokenizerError> {
        let text = |key: &str| {
            value
                .and_then(|value| value.get(key))
                .and_then(Value::as_str)
        };
        match (text("String"), text("Regex")) {
            (Some(text), None) if !text.is_empty() && text.len() <= MAX_PATTERN => {
                Ok(Pattern::Text(text.to_owned()))
            }
            (None, Some(pattern)) if pattern.len() <= MAX_PATTERN => match Regex::new(pattern) {
                Ok(regex) => Ok(Pattern::Regex(Box::new(regex))),
                Err(error) => Err(malformed(format!(
                    "the pattern {pattern:?} is invalid: {error}"
                ))),
            },
            _ => Err(malformed(format!(
                "a pattern must be a String or Regex of 1 to {MAX_PATTERN} bytes"
            ))),
        }
    }
}

fn find(pattern: &Regex, text: &str) -> Result<Vec<Range<usize>>, TokenizerError> {
    let mut found = Vec::new();
    for one in pattern.find_iter(text) {
        let one = one.map_err(|error| TokenizerError::Encode {
            reason: error.to_string(),
        })?;
        if !one.range().is_empty() {
            found.push(one.range());
        }
    }
    Ok(found)
}

/// Cuts `word` at the matches in it.
fn cut<'t>(
    word: Cow<'t, str>,
    found: Vec<Range<usize>>,
    behavior: Behavior,
    invert: bool,
    out: &mut Vec<Cow<'t, str>>,
) {
    let pieces = pieces(word.len(), found, behavior, invert);
    match word {
        Cow::Borrowed(text) => out.extend(pieces.map(|range| Cow::Borrowed(&text[range]))),
        Cow::Owned(text) => out.extend(pieces.map(|range| Cow::Owned(text[range].to_owned()))),
    }
}

fn pieces(
    len: usize,
    found: Vec<Range<usize>>,
    behavior: Behavior,
    invert: bool,
) -> impl Iterator<Item = Range<usize>> {
    let mut all: Vec<(Range<usize>, bool)> = Vec::with_capacity(2 * found.len() + 1);
    let mut end = 0;
    for range in found {
        if range.start > end {
            all.push((end..range.start, invert));
        }
        end = range.end;
        all.push((range, !invert));
    }
    if end < len {
        all.push((end..len, invert));
    }
    let mut out: Vec<Range<usize>> = Vec::with_capacity(all.len());
    let mut before = false;
    match behavior {
        Behavior::Isolated => out.extend(all.into_iter().map(|(range, _)| range)),
        Behavior::Removed => {
            let kept = all.into_iter().filter(|(_, matched)| !matched);
            out.extend(kept.map(|(range, _)| range));
        }
        Behavior::Contiguous => {
            for (i, (range, matched)) in all.into_iter().enumerate() {
                match out.last_mut().filter(|_| i > 0 && matched == before) {
                    Some(last) => last.end = range.end,
                    None => out.push(range),
                }
                before = matched;
            }
        }
        Behavior::MergedWithPrevious => {
            for (range, matched) in all {
                match out.last_mut().filter(|_| matched && !before) {
                    Some(last) => last.end = range.end,
                    None => out.push(range),
                }
                before = matched;
            }
        }
        Behavior::MergedWithNext => {
            for (range, matched) in all.into_iter().rev() {
                match out.last_mut().filter(|_| matched && !before) {
                    Some(last) => last.start = range.start,
                    None => out.push(range),
                }
                before = matched;
            }
            out.reverse();
        }
    }
    out.into_iter()
}

/// The normalizers that `normalizer` lists.
pub(super) fn normalizers(part: Option<&Value>) -> Result<Vec<Normalizer>, TokenizerError> {
    let mut steps = Vec::new();
    for one in sequence(part, "normalizers")? {
        let content = |key: &str| match one.get(key).and_then(Value::as_str) {
            Some(text) if text.len() <= MAX_CONTENT => Ok(text.to_owned()),
            _ => Err(malformed(format!(
                "a normalizer's {key} must be text of at most {MAX_CONTENT} bytes"
            ))),
        };
        steps.push(match kind(one) {
            "NFC" => Normalizer::Unicode(UnicodeForm::Nfc),
            "NFD" => Normalizer::Unicode(UnicodeForm::Nfd),
            "NFKC" => Normalizer::Unicode(UnicodeForm::Nfkc),
            "NFKD" => Normalizer::Unicode(UnicodeForm::Nfkd),
            "Lowercase" => Normalizer::Lowercase,
            "Prepend" => Normalizer::Prepend(content("prepend")?),
            "Replace" => {
                Normalizer::Replace(Pattern::read(one.get("pattern"))?, content("content")?)
            }
            "Strip" => Normalizer::Strip {
                left: flag(one, "strip_left", true),
                right: flag(one, "strip_right", true),
            },
            other => return Err(unsupported(format!("the normalizer {other:?}"))),
        });
    }
    Ok(steps)
}

/// The pre-tokenizers that `pre_tokenizer` lists.
pub(super) fn pre_tokenizers(
    part: Option<&Value>,
) -> Result<Vec<PreTokenizerStep>, TokenizerError> {
    let mut steps = Vec::new();
    for one in sequence(part, "pretokenizers")? {
        steps.push(match kind(one) {
            "Split" => PreTokenizerStep::Split(
                Pattern::read(one.get("pattern"))?,
                behavior(one)?,
                flag(one, "invert", false),
            ),
            "Digits" => PreTokenizerStep::Digits(flag(one, "individual_digits", false)),
            "ByteLevel" => PreTokenizerStep::ByteLevel {
                space: flag(one, "add_prefix_space", true),
                words: flag(one, "use_regex", true)
                    .then(|| Regex::new(GPT2).expect("the pattern is our own")),
            },
            "Metaspace" => metaspace(one)?,
            other => return Err(unsupported(format!("the pre-tokenizer {other:?}"))),
        });
    }
    Ok(steps)
}

fn metaspace(one: &Value) -> Result<PreTokenizerStep, TokenizerError> {
    let text = |key: &str| one.get(key).and_then(Value::as_str);
    let mark = text("replacement").unwrap_or("\u{2581}");
    let mut chars = mark.chars();
    let (Some(mark), None) = (chars.next(), chars.next()) else {
        return Err(malformed(format!(
            "Metaspace's replacement {mark:?} must be one character"
        )));
    };
    let prepend = match text("prepend_scheme") {
        Some("always") => Prepend::Always,
        Some("first") => Prepend::First,
        Some("never") => Prepend::Never,
        Some(other) => return Err(unsupported(format!("Metaspace's prepend_scheme {other:?}"))),
        None if flag(one, "add_prefix_space", true) => Prepend::Always,
        None => Prepend::Never,
    };
    Ok(PreTokenizerStep::Metaspace {
        mark,
        prepend,
        split: flag(one, "split", true),
    })
}

fn behavior(one: &Value) -> Result<Behavior, TokenizerError> {
    Ok(match one.get("behavior").and_then(Value::as_str) {
        Some("Removed") => Behavior::Removed,
        Some("Isolated") => Behavior::Isolated,
        Some("MergedWithPrevious") => Behavior::MergedWithPrevious,
        Some("MergedWithNext") => Behavior::MergedWithNext,
        Some("Contiguous") => Behavior::Contiguous,
        other => {
            return Err(malformed(format!(
                "the behavior {other:?} of a Split is unknown"
            )));
        }
    })
}

fn kind(one: &Value) -> &str {
    one.get("type").and_then(Value::as_str).unwrap_or("")
}

fn flag(one: &Value, key: &str, default: bool) -> bool {
    one.get(key).and_then(Value::as_bool).unwrap_or(default)
}

/// The steps of a part: itself, or what its sequences hold under `key`.
fn sequence<'a>(part: Option<&'a Value>, key: &str) -> Result<Vec<&'a Value>, TokenizerError> {
    let mut steps = Vec::new();
    let mut open: Vec<&Value> = part.into_iter().collect();
    while let Some(one) = open.pop() {
        if kind(one) != "Sequence" {
            steps.push(one);
        } else if let Some(inner) = one.get(key).and_then(Value::as_array) {
            open.extend(inner.iter().rev());
        } else {
            return Err(malformed(format!("a Sequence has no {key}")));
        }
        if steps.len() + open.len() > MAX_STEPS {
            return Err(malformed(format!("there are over {MAX_STEPS} {key}")));
        }
    }
    Ok(steps)
}
