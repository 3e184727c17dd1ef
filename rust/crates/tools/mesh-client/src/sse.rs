//! Server-sent events as the OpenAI API uses them: bytes in, the `data` of each event out.

/// Most bytes of one event, which an image of 2048 by 2048 pixels in base64 fits; a server that sends more without an end is broken.
const MAX_EVENT: usize = 24 << 20;
/// Bytes of a comment that are kept.
const MAX_COMMENT: usize = 256;

/// Cuts a byte stream into events.
#[derive(Debug, Default)]
pub struct SseParser {
    line: Vec<u8>,
    data: Vec<u8>,
    after_cr: bool,
    /// Text of the latest comment.
    comment: Option<String>,
}

/// An event longer than 24 MiB.
#[derive(Debug, thiserror::Error)]
#[error("the server sent an event of more than {MAX_EVENT} bytes without an end")]
pub struct EventTooLong;

impl SseParser {
    /// Takes the next bytes and appends the data of every event they complete to `events`.
    ///
    /// # Errors
    /// If an event exceeds 24 MiB.
    pub fn push(&mut self, bytes: &[u8], events: &mut Vec<String>) -> Result<(), EventTooLong> {
        for &byte in bytes {
            match byte {
                b'\n' if self.after_cr => self.after_cr = false,
                b'\n' | b'\r' => {
                    self.after_cr = byte == b'\r';
                    self.end_line(events);
                }
                _ => {
                    self.after_cr = false;
                    if self.line.len() + self.data.len() >= MAX_EVENT {
                        return Err(EventTooLong);
                    }
                    self.line.push(byte);
                }
            }
        }
        Ok(())
    }

    /// Takes the latest comment; `None` if it was taken before.
    pub fn take_comment(&mut self) -> Option<String> {
        self.comment.take()
    }

    fn end_line(&mut self, events: &mut Vec<String>) {
        if self.line.is_empty() {
            if !self.data.is_empty() {
                self.data.pop();
                events.push(String::from_utf8_lossy(&self.data).into_owned());
                self.data.clear();
            }
        } else if let Some(comment) = self.line.strip_prefix(b":") {
            let comment = &comment[..comment.len().min(MAX_COMMENT)];
            let text = String::from_utf8_lossy(comment);
            // It may be shown at a terminal.
            let text = text.trim().chars().filter(|c| !c.is_control());
            self.comment = Some(text.collect());
        } else if let Some(value) = self.line.strip_prefix(b"data:") {
            self.data
                .extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
            self.data.push(b'\n');
        }
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pieces: &[&[u8]]) -> Vec<String> {
        let mut parser = SseParser::default();
        let mut events = Vec::new();
        for piece in pieces {
            parser.push(piece, &mut events).expect("short events");
        }
        events
    }

    #[test]
    fn events_come_out_however_the_bytes_are_cut() {
        let text = "data: {\"a\":\"é\"}\r\n\r\n: comment\n\nevent: x\ndata:one\ndata: two\n\ndata: [DONE]\n\n";
        let whole = parse(&[text.as_bytes()]);
        assert_eq!(whole, ["{\"a\":\"é\"}", "one\ntwo", "[DONE]"]);
        for cut in 0..text.len() {
            let (left, right) = text.as_bytes().split_at(cut);
            assert_eq!(parse(&[left, right]), whole, "cut at {cut}");
        }
    }

    #[test]
    fn the_latest_comment_is_kept_without_what_steers_a_terminal() {
        let mut parser = SseParser::default();
        let mut events = Vec::new();
        let text = b": one\n\n: two\x1b[2J \n\ndata: x\n\n";
        parser.push(text, &mut events).expect("short events");
        assert_eq!(parser.take_comment().as_deref(), Some("two[2J"));
        assert_eq!((parser.take_comment(), events.len()), (None, 1));
    }

    #[test]
    fn an_event_without_an_end_is_refused_before_it_fills_memory() {
        let mut parser = SseParser::default();
        let block = vec![b'x'; 1 << 20];
        let mut events = Vec::new();
        let refused = (0..32).any(|_| parser.push(&block, &mut events).is_err());
        assert!(refused && events.is_empty());
    }
}
