//! Tokens to text as they come, in whole characters.

/// Joins the bytes of tokens to text, in whole characters only.
///
/// One character may be spread over several tokens. [`TextStream::push`] gives all text that is complete and
/// keeps the rest until more bytes come or [`TextStream::finish`] is called. Bytes that are no UTF-8 become
/// U+FFFD: all text given, put together, is what [`String::from_utf8_lossy`] makes of all bytes put together,
/// however they were cut.
#[derive(Debug, Clone, Default)]
pub struct TextStream {
    /// The beginning of a character: at most three bytes.
    pending: Vec<u8>,
}

impl TextStream {
    /// An empty stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends the next token's bytes and returns the text that is complete now.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let complete = self.pending.len() - incomplete_tail(&self.pending);
        let text = String::from_utf8_lossy(&self.pending[..complete]).into_owned();
        self.pending.drain(..complete);
        text
    }

    /// Ends the stream: the bytes of an incomplete character become U+FFFD.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }

    /// True if the bytes so far end inside a character.
    pub fn is_mid_character(&self) -> bool {
        !self.pending.is_empty()
    }
}

/// Length of the tail of `bytes` that could still become a character.
fn incomplete_tail(bytes: &[u8]) -> usize {
    match bytes.utf8_chunks().last() {
        // `Utf8Error::error_len` is what knows the difference between a wrong and an unfinished sequence.
        Some(chunk) => match std::str::from_utf8(chunk.invalid()) {
            Err(error) if error.error_len().is_none() => chunk.invalid().len(),
            _ => 0,
        },
        None => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stream<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> String {
        let mut stream = TextStream::new();
        let mut text: String = pieces.into_iter().map(|piece| stream.push(piece)).collect();
        text += &stream.finish();
        text
    }

    #[test]
    fn a_character_comes_out_whole_with_its_last_byte() {
        let mut stream = TextStream::new();
        let face = "🦀".as_bytes();
        assert_eq!(stream.push(b"a"), "a");
        for byte in &face[..3] {
            assert_eq!(stream.push(&[*byte]), "");
            assert!(stream.is_mid_character());
        }
        assert_eq!(stream.push(&face[3..]), "🦀");
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn an_unfinished_character_is_replaced_at_the_end() {
        assert_eq!(stream([&b"x\xf0\x9f"[..]]), "x\u{fffd}");
    }

    #[test]
    fn a_wrong_byte_is_replaced_as_soon_as_it_is_known_to_be_wrong() {
        let mut stream = TextStream::new();
        assert_eq!(stream.push(&[0xff]), "\u{fffd}");
        assert_eq!(stream.push(&[0xe2, 0x82]), "");
        assert_eq!(stream.push(b"a"), "\u{fffd}a");
    }

    /// Bytes in which pieces of real characters are common.
    fn text_like() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            any::<u8>().prop_map(|b| vec![b]),
            any::<char>().prop_map(|c| c.to_string().into_bytes()),
            (any::<char>(), 1usize..4).prop_map(|(c, n)| {
                let bytes = c.to_string().into_bytes();
                bytes[..n.min(bytes.len())].to_vec()
            }),
        ];
        proptest::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_text_of_the_whole(bytes in text_like(), cuts in proptest::collection::vec(1usize..6, 0..80)) {
            let mut pieces = Vec::new();
            let mut rest = &bytes[..];
            for cut in cuts {
                let (piece, tail) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = tail;
            }
            pieces.push(rest);
            prop_assert_eq!(stream(pieces), String::from_utf8_lossy(&bytes));
        }
    }
}
