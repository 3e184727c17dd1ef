//! An answer on the screen while it arrives, and the stream it comes from.

use std::time::{Duration, Instant};

use mesh_api::ChatCompletionRequest;
use mesh_client::http::HttpClient;

use crate::failure::Failure;
use crate::output::{Stats, Terminal, Timer, print_now};

const INDENT: &str = "    ";
const WIDTH: usize = 88;

/// A whole streamed answer.
pub(super) struct Streamed {
    pub(super) text: String,
    pub(super) stats: Stats,
    /// Arrival time of each piece of text.
    pub(super) arrivals: Vec<Instant>,
}

impl Streamed {
    /// The longest time between two pieces of text, of which the second came after `since`, where that is given.
    pub(super) fn longest_wait(&self, since: Option<Instant>) -> Duration {
        let counts = |pair: &&[Instant]| since.is_none_or(|since| pair[1] > since);
        let waits = self.arrivals.windows(2).filter(counts);
        waits
            .map(|pair| pair[1] - pair[0])
            .max()
            .unwrap_or_default()
    }
}

/// Asks over HTTP; `on_text` sees each piece as it comes.
pub(super) async fn stream(
    client: &HttpClient,
    request: &ChatCompletionRequest,
    mut on_text: impl AsyncFnMut(&str) -> Result<(), Failure>,
) -> Result<Streamed, Failure> {
    let mut timer = Timer::since(Instant::now());
    let mut stream = client.stream(request.clone()).await?;
    let mut text = String::new();
    let mut arrivals = Vec::new();
    while let Some(piece) = stream.next().await? {
        timer.note(&piece);
        if !piece.text.is_empty() {
            arrivals.push(Instant::now());
            text += &piece.text;
            on_text(&piece.text).await?;
        }
    }
    Ok(Streamed {
        text,
        stats: timer.stats(),
        arrivals,
    })
}

/// Prints an answer piece by piece, indented, broken between words.
pub(super) struct AnswerPrinter {
    terminal: Terminal,
    wrap: Wrap,
}

impl AnswerPrinter {
    pub(super) fn new(terminal: Terminal) -> Self {
        Self {
            terminal,
            wrap: Wrap::default(),
        }
    }

    pub(super) fn push(&mut self, text: &str) {
        print_now(&self.wrap.push(text));
    }

    /// Words that are not the answer's, within it.
    pub(super) fn remark(&mut self, text: &str) {
        let word = self.wrap.end_word();
        let remark = self.wrap.word(text);
        print_now(&(word + &remark.replace(text, &self.terminal.yellow(text))));
    }

    pub(super) fn finish(&mut self) {
        print_now(&(self.wrap.end_word() + "\n"));
    }
}

/// Breaks a growing text into lines; a word is given out when its end is known.
#[derive(Debug, Default)]
struct Wrap {
    column: usize,
    word: String,
}

impl Wrap {
    fn push(&mut self, text: &str) -> String {
        let mut out = String::new();
        for c in text.chars() {
            match c {
                '\n' => {
                    out += &self.end_word();
                    // Empty lines at the beginning would only be a gap.
                    if self.column > 0 {
                        out.push('\n');
                        self.column = 0;
                    }
                }
                c if c.is_whitespace() => out += &self.end_word(),
                c => self.word.push(c),
            }
        }
        out
    }

    fn end_word(&mut self) -> String {
        let word = std::mem::take(&mut self.word);
        match word.is_empty() {
            true => word,
            false => self.word(&word),
        }
    }

    fn word(&mut self, word: &str) -> String {
        let width = word.chars().count();
        let lead = if self.column == 0 {
            INDENT
        } else if self.column + 1 + width > WIDTH {
            self.column = 0;
            "\n    "
        } else {
            self.column += 1;
            " "
        };
        self.column += width;
        lead.to_owned() + word
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_wait_counts_from_the_piece_before_an_event() {
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        let streamed = Streamed {
            text: String::new(),
            stats: Stats {
                first_text: Duration::ZERO,
                total: Duration::ZERO,
                tokens: None,
            },
            arrivals: vec![at(0), at(90), at(100), at(150), at(160)],
        };
        assert_eq!(streamed.longest_wait(None), Duration::from_millis(90));
        assert_eq!(
            streamed.longest_wait(Some(at(120))),
            Duration::from_millis(50)
        );
        assert_eq!(streamed.longest_wait(Some(at(160))), Duration::ZERO);
    }

    #[test]
    fn a_growing_text_is_broken_between_words() {
        let mut wrap = Wrap::default();
        let mut out = String::new();
        for piece in ["\n", "One tw", "o\n\nthree ", "x"] {
            out += &wrap.push(piece);
        }
        out += &wrap.end_word();
        assert_eq!(out, "    One two\n    three x");

        let long = "word ".repeat(40);
        let mut wrap = Wrap::default();
        let out = wrap.push(&long);
        assert!(out.lines().count() > 1);
        assert!(out.lines().all(|line| line.len() <= INDENT.len() + WIDTH));
        assert_eq!(out.split_whitespace().count(), 40);
    }
}
