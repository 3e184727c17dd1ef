//! Colour where a person looks, plain text where a program does; tables; durations and rates.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use mesh_client::http::AnswerPiece;

use crate::args::Color;

/// Styles for standard output and standard error.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terminal {
    color: bool,
}

impl Terminal {
    pub(crate) fn new(color: Color) -> Self {
        let color = match color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => {
                io::stdout().is_terminal()
                    && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
            }
        };
        Self { color }
    }

    pub(crate) fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }

    pub(crate) fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }

    pub(crate) fn green(self, text: &str) -> String {
        self.paint("32", text)
    }

    pub(crate) fn yellow(self, text: &str) -> String {
        self.paint("33", text)
    }

    pub(crate) fn cyan(self, text: &str) -> String {
        self.paint("36", text)
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.color {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

/// Writes text and flushes it, so that an answer is visible while it grows.
pub(crate) fn print_now(text: &str) {
    let mut out = io::stdout().lock();
    // A reader that went away ends the program as println! would.
    if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        panic!("failed printing to stdout: {error}");
    }
}

/// A line on standard error with the reason why an answer waits, if that is a terminal. It is erased when the
/// answer comes.
#[derive(Debug)]
pub(crate) struct WaitLine {
    person: bool,
    shown: bool,
}

impl WaitLine {
    pub(crate) fn new() -> Self {
        Self {
            person: io::stderr().is_terminal(),
            shown: false,
        }
    }

    /// Shows what the answer waits for, as the head describes it.
    pub(crate) fn show(&mut self, what: &str) {
        if self.person {
            self.shown = true;
            eprint!("\r\x1b[K\x1b[2m{what}\x1b[0m");
        }
    }

    pub(crate) fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            eprint!("\r\x1b[K");
        }
    }
}

impl Drop for WaitLine {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Text from other machines: nothing of it may steer a terminal.
pub(crate) fn plain(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

/// Rows under headings, as wide as their widest cell.
pub(crate) fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        let widths = cells.map(|cell| cell.chars().count());
        widths.max().unwrap_or(0).max(headings[column].len())
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded = cells
            .zip(&widths)
            .map(|(cell, &width)| format!("{cell:<width$}"));
        let line = padded.collect::<Vec<_>>().join("  ");
        line.trim_end().to_owned() + "\n"
    };
    let mut text = line(&mut headings.iter().copied());
    for row in rows {
        text += &line(&mut row.iter().map(String::as_str));
    }
    text
}

/// A cell; `-` where there is nothing to show.
pub(crate) fn cell(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".to_owned())
}

/// Lines of a key and its value, the keys as wide as `processor`.
pub(crate) struct Facts {
    terminal: Terminal,
    pub(crate) text: String,
}

impl Facts {
    pub(crate) fn new(terminal: Terminal) -> Self {
        let text = String::new();
        Self { terminal, text }
    }

    pub(crate) fn line(&mut self, key: &str, value: impl Display) {
        let blanks = 11_usize.saturating_sub(key.len());
        let key = self.terminal.dim(key);
        self.text += &format!("{key}{:blanks$}{value}\n", "");
    }
}

/// `340 ms`, `1.25 s`.
pub(crate) fn duration(value: Duration) -> String {
    if value < Duration::from_secs(1) {
        format!("{} ms", value.as_millis())
    } else {
        format!("{:.2} s", value.as_secs_f64())
    }
}

/// A size for people, such as `98.4 MB`.
pub(crate) fn bytes(value: u64) -> String {
    match value {
        0..1_000 => format!("{value} B"),
        1_000..1_000_000 => format!("{:.1} kB", value as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", value as f64 / 1e6),
        _ => format!("{:.2} GB", value as f64 / 1e9),
    }
}

/// Speed and size of an answer, for people.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Stats {
    /// From the request to the first text.
    pub(crate) first_text: Duration,
    /// From the request to the end.
    pub(crate) total: Duration,
    /// Tokens of the answer, where known.
    pub(crate) tokens: Option<u64>,
}

impl Stats {
    /// Tokens per second after the first one; `None` where the tokens are not known or too few.
    pub(crate) fn tokens_per_second(&self) -> Option<f64> {
        let later = self.tokens?.checked_sub(1).filter(|&later| later > 0)?;
        let seconds = self.total.checked_sub(self.first_text)?.as_secs_f64();
        (seconds > 0.0).then(|| later as f64 / seconds)
    }

    /// `first token after 85 ms, 32 tokens at 61.0 per second`.
    pub(crate) fn line(&self) -> String {
        let first = format!("first token after {}", duration(self.first_text));
        match (self.tokens, self.tokens_per_second()) {
            (Some(tokens), Some(rate)) => {
                format!("{first}, {tokens} tokens at {rate:.1} per second")
            }
            (Some(tokens), None) => format!("{first}, {tokens} tokens"),
            _ => format!("{first}, {} in all", duration(self.total)),
        }
    }
}

/// Measures an answer while it streams.
pub(crate) struct Timer {
    started: Instant,
    first_text: Option<Duration>,
    tokens: Option<u64>,
}

impl Timer {
    pub(crate) fn since(started: Instant) -> Self {
        Self {
            started,
            first_text: None,
            tokens: None,
        }
    }

    /// Notes a piece that has just come.
    pub(crate) fn note(&mut self, piece: &AnswerPiece) {
        if !piece.text.is_empty() {
            self.first_text
                .get_or_insert_with(|| self.started.elapsed());
        }
        if let Some(usage) = &piece.usage {
            self.tokens = Some(usage.completion_tokens.into());
        }
    }

    /// The answer's numbers, if it ends now.
    pub(crate) fn stats(&self) -> Stats {
        let total = self.started.elapsed();
        Stats {
            first_text: self.first_text.unwrap_or(total),
            total,
            tokens: self.tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_as_wide_as_its_cells() {
        let rows = vec![
            vec!["a".to_owned(), "long cell".to_owned()],
            vec!["bbbb".to_owned(), "é".to_owned()],
        ];
        assert_eq!(
            table(&["X", "YY"], &rows),
            "X     YY\na     long cell\nbbbb  é\n"
        );
    }

    #[test]
    fn the_first_token_does_not_count_into_the_rate() {
        let stats = Stats {
            first_text: Duration::from_millis(500),
            total: Duration::from_millis(1500),
            tokens: Some(11),
        };
        assert_eq!(
            stats.line(),
            "first token after 500 ms, 11 tokens at 10.0 per second"
        );
        let one = Stats {
            tokens: Some(1),
            ..stats
        };
        assert_eq!(one.tokens_per_second(), None);
    }

    #[test]
    fn colour_is_only_where_it_was_asked_for() {
        assert_eq!(Terminal::new(Color::Never).bold("x"), "x");
        assert_eq!(Terminal::new(Color::Always).bold("x"), "\x1b[1mx\x1b[0m");
    }
}
