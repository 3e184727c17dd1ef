//! Text in messages and records.

/// At most [`LONGEST_VALUE`] characters of a text.
pub(crate) fn cut(text: &str) -> String {
    text.chars().take(LONGEST_VALUE).collect()
}

/// Maximum characters of a value in a record.
const LONGEST_VALUE: usize = 160;
