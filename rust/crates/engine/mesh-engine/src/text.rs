//! From tokens to the text of an answer: whole characters, up to a stop text, nothing twice.
//!
//! The text depends on the tokens alone, not on how they arrive. That is what lets an answer go on elsewhere: the tokens
//! so far are pushed again, and the first `text_sent` bytes of the result are left out.

use mesh_model::TextStream;

use crate::request::RequestError;

/// Converts the tokens of one answer to text, incrementally.
#[derive(Debug)]
pub struct TextPipeline {
    characters: TextStream,
    stops: StopFilter,
    /// Bytes still to leave out because the client has them.
    to_skip: u64,
    ready: String,
}

impl TextPipeline {
    /// A pipeline for an answer that begins with `echo`, ends before any of `stops`, and of which the client already has
    /// the first `text_sent` bytes.
    pub fn new(stops: Vec<String>, echo: &str, text_sent: u64) -> Self {
        let mut pipeline = TextPipeline {
            characters: TextStream::default(),
            stops: StopFilter {
                stops,
                ..StopFilter::default()
            },
            to_skip: text_sent,
            ready: String::new(),
        };
        pipeline.emit(echo);
        pipeline
    }

    /// Takes in the bytes of the next token without looking for stop texts.
    pub fn push_unfiltered(&mut self, bytes: &[u8]) {
        let text = self.characters.push(bytes);
        self.emit(&text);
    }

    /// Takes in the bytes of the next token. Returns whether a stop text is complete: then the answer ends before it.
    pub fn push(&mut self, bytes: &[u8]) -> bool {
        let text = self.characters.push(bytes);
        self.filter(&text)
    }

    /// Ends the answer: held-back text is now certain.
    pub fn finish(&mut self) {
        let text = self.characters.finish();
        if !self.filter(&text) {
            let held = self.stops.release();
            self.emit(&held);
        }
    }

    /// The text that became certain since the last call.
    pub fn take(&mut self) -> String {
        std::mem::take(&mut self.ready)
    }

    fn filter(&mut self, text: &str) -> bool {
        let mut certain = String::new();
        let stopped = self.stops.push(text, &mut certain);
        self.emit(&certain);
        stopped
    }

    fn emit(&mut self, text: &str) {
        let mut skip = usize::try_from(self.to_skip).map_or(text.len(), |n| n.min(text.len()));
        self.to_skip -= skip as u64;
        // A sender that counted half a character gets the next whole one.
        while !text.is_char_boundary(skip) {
            skip += 1;
        }
        self.ready.push_str(&text[skip..]);
    }
}

/// Checks the number and length of stop texts. Text is held back for at most the length of the longest.
pub fn validate_stops(stops: &[String]) -> Result<(), RequestError> {
    let invalid = |value: String, range| RequestError::InvalidParameter {
        name: "stop",
        value,
        range,
    };
    if stops.len() > MAX_STOPS {
        let count = format!("{} texts", stops.len());
        return Err(invalid(count, "at most 16 texts"));
    }
    let mut lengths = stops.iter().map(String::len);
    if let Some(bytes) = lengths.find(|n| !(1..=MAX_STOP_BYTES).contains(n)) {
        let length = format!("{bytes} bytes long");
        return Err(invalid(length, "1 to 1024 bytes long"));
    }
    Ok(())
}

/// Passes text on up to the first stop text; holds back an end that may still become one.
///
/// Of several stop texts the one that is complete first counts, and of those complete at once the longest, so that the
/// result does not depend on how the text is cut into pieces.
#[derive(Debug, Default)]
struct StopFilter {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopFilter {
    /// Appends the text that is now certain to `certain`; returns whether a stop text is complete.
    fn push(&mut self, text: &str, certain: &mut String) -> bool {
        if self.stopped {
            return true;
        }
        if self.stops.is_empty() {
            certain.push_str(text);
            return false;
        }
        self.held.push_str(text);
        if let Some(start) = self.first_stop() {
            certain.push_str(&self.held[..start]);
            self.held.clear();
            self.stopped = true;
            return true;
        }
        let open = self.stops.iter().map(|stop| open_prefix(&self.held, stop));
        let keep_from = self.held.len() - open.max().unwrap_or(0);
        certain.push_str(&self.held[..keep_from]);
        self.held.drain(..keep_from);
        false
    }

    fn release(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Offset of the stop text that completes first.
    fn first_stop(&self) -> Option<usize> {
        let found = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start))
        });
        found.min().map(|(_, start)| start)
    }
}

/// Length of the longest end of `text` with which `stop` begins.
fn open_prefix(text: &str, stop: &str) -> usize {
    // The whole of it would have been found, and none of it always fits.
    let mut lengths = stop.char_indices().map(|(i, _)| i).rev();
    lengths.find(|&n| text.ends_with(&stop[..n])).unwrap_or(0)
}

/// Most stop texts of a request.
pub const MAX_STOPS: usize = 16;

/// Most bytes of a stop text.
pub const MAX_STOP_BYTES: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stops(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|&s| s.to_owned()).collect()
    }

    #[test]
    fn an_end_that_may_become_a_stop_text_is_held_until_it_cannot() {
        let mut text = TextPipeline::new(stops(&["\nUser:"]), "", 0);
        assert!(!text.push(b"Hello\nUs"));
        assert_eq!(text.take(), "Hello");
        assert!(!text.push(b"age:"));
        assert_eq!(text.take(), "\nUsage:");
        assert!(!text.push(b" bye\n"));
        assert_eq!(text.take(), " bye");
        assert!(text.push(b"User: again"));
        text.finish();
        assert_eq!(text.take(), "");
    }

    #[test]
    fn text_held_at_the_end_of_the_answer_is_part_of_it() {
        let mut text = TextPipeline::new(stops(&["END"]), "", 0);
        assert!(!text.push(b"The EN"));
        assert_eq!(text.take(), "The ");
        text.finish();
        assert_eq!(text.take(), "EN");
    }

    #[test]
    fn text_before_the_least_length_holds_no_stop_text() {
        let mut text = TextPipeline::new(stops(&["ab"]), "", 0);
        text.push_unfiltered(b"xab");
        assert_eq!(text.take(), "xab");
        assert!(text.push(b"yab"));
        assert_eq!(text.take(), "y");
    }

    #[test]
    fn a_character_in_pieces_comes_out_whole() {
        let mut text = TextPipeline::new(stops(&["é!"]), "", 0);
        assert!(!text.push(&[0xc3]));
        assert_eq!(text.take(), "");
        assert!(!text.push(&[0xa9]));
        assert_eq!(text.take(), "");
        assert!(!text.push(b"?"));
        assert_eq!(text.take(), "é?");
    }

    #[test]
    fn of_two_stop_texts_the_one_complete_first_counts() {
        let mut text = TextPipeline::new(stops(&["abcd", "bc"]), "", 0);
        assert!(text.push(b"xabcd"));
        assert_eq!(text.take(), "xa");
    }

    #[test]
    fn the_echo_comes_first_and_may_contain_a_stop_text() {
        let mut text = TextPipeline::new(stops(&["."]), "Once. ", 0);
        assert!(text.push(b"And. Again"));
        assert_eq!(text.take(), "Once. And");
    }

    #[test]
    fn a_count_that_ends_inside_a_character_is_rounded_up() {
        let mut text = TextPipeline::new(Vec::new(), "", 2);
        assert!(!text.push("aéb".as_bytes()));
        assert_eq!(text.take(), "b");
    }

    #[test]
    fn stop_texts_out_of_bounds_are_named() {
        let error = validate_stops(&stops(&["ok", ""])).unwrap_err();
        assert_eq!(
            error.to_string(),
            "stop is 0 bytes long, but must be 1 to 1024 bytes long"
        );
        assert!(validate_stops(&vec!["x".to_owned(); 17]).is_err());
        assert!(validate_stops(&["y".repeat(1025)]).is_err());
        assert!(validate_stops(&["y".repeat(1024)]).is_ok());
    }

    /// Text up to the stop text that is complete first, by looking at every prefix.
    fn reference(text: &str, stops: &[String]) -> (String, bool) {
        for end in (0..=text.len()).filter(|&i| text.is_char_boundary(i)) {
            let ending = stops.iter().filter(|s| text[..end].ends_with(s.as_str()));
            if let Some(longest) = ending.map(String::len).max() {
                return (text[..end - longest].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    proptest! {
        #[test]
        fn the_pieces_of_a_text_do_not_matter(
            text in "[abé]{0,40}",
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            cuts in prop::collection::vec(0usize..80, 0..20),
            resume_at in 0usize..20,
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(text.len())).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|w| &text.as_bytes()[w[0]..w[1]]).collect();
            let (expected, expected_stop) = reference(&text, &stops);

            let mut pipeline = TextPipeline::new(stops.clone(), "", 0);
            let (mut out, mut before) = (String::new(), String::new());
            let mut stopped = false;
            for (i, piece) in pieces.iter().enumerate() {
                if i == resume_at {
                    before = out.clone();
                }
                stopped = pipeline.push(piece);
                out += &pipeline.take();
                prop_assert!(expected.starts_with(&out), "{out:?} is not a prefix of {expected:?}");
                if stopped {
                    break;
                }
            }
            pipeline.finish();
            out += &pipeline.take();
            prop_assert_eq!(&out, &expected);
            prop_assert_eq!(stopped, expected_stop);

            // Elsewhere, with the same tokens, the rest is the rest.
            let mut resumed = TextPipeline::new(stops, "", before.len() as u64);
            for piece in &pieces {
                if resumed.push(piece) {
                    break;
                }
            }
            resumed.finish();
            prop_assert_eq!(before + &resumed.take(), expected);
        }
    }
}
