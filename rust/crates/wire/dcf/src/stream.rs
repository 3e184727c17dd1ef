//! Messages back to back on a stream.

use bytes::{Bytes, BytesMut};
use tokio_util::codec::{Decoder, Encoder};

use crate::{HEADER_LEN, Header, Message};

/// The limit on one message's payload unless configured otherwise.
pub const DEFAULT_MAX_PAYLOAD: usize = 64 << 20;

/// Frames messages on a byte stream, for `tokio_util::codec::{FramedRead, FramedWrite}` and for plain buffers.
///
/// Unlike a datagram, a stream lets unknown types of the internal range (0x10–0x7F) through: their length is
/// as sound as any other's, and a receiver that ignores them can talk to a newer sender. An unassigned type
/// outside that range means that the bytes are not a DCF stream, or that the two sides lost step, and is an
/// error.
///
/// Errors are final. The decoder leaves the bytes where they are and repeats the error, so callers cannot
/// continue by mistake.
#[derive(Clone, Copy, Debug)]
pub struct StreamCodec {
    max_payload: usize,
}

impl StreamCodec {
    /// A codec that takes payloads of at most `max_payload` bytes, in both directions.
    #[must_use]
    pub const fn new(max_payload: usize) -> Self {
        Self { max_payload }
    }

    /// Maximum payload length in bytes.
    #[must_use]
    pub const fn max_payload(&self) -> usize {
        self.max_payload
    }

    fn check(&self, header: &Header) -> Result<(), StreamError> {
        let kind = header.kind();
        if !kind.is_assigned() && !kind.is_internal() {
            return Err(StreamError::UnknownType(kind.0));
        }
        if header.payload_len as usize > self.max_payload {
            return Err(StreamError::TooLarge {
                kind: kind.0,
                len: header.payload_len as usize,
                limit: self.max_payload,
            });
        }
        Ok(())
    }
}

impl Default for StreamCodec {
    fn default() -> Self {
        Self::new(DEFAULT_MAX_PAYLOAD)
    }
}

impl Decoder for StreamCodec {
    type Item = Message;
    type Error = StreamError;

    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<Message>, StreamError> {
        let Ok(header) = Header::decode(src) else {
            return Ok(None);
        };
        self.check(&header)?;
        let end = HEADER_LEN + header.payload_len as usize;
        if src.len() < end {
            // The buffer grows with the bytes that arrive, never to the length in the header.
            src.reserve((end - src.len()).min(READ_AHEAD));
            return Ok(None);
        }
        let frame: Bytes = src.split_to(end).freeze();
        Ok(Some(Message::from_parts(header, frame.slice(HEADER_LEN..))))
    }

    fn decode_eof(&mut self, src: &mut BytesMut) -> Result<Option<Message>, StreamError> {
        match self.decode(src)? {
            Some(message) => Ok(Some(message)),
            None if src.is_empty() => Ok(None),
            None => Err(StreamError::Cut { present: src.len() }),
        }
    }
}

impl Encoder<&Message> for StreamCodec {
    type Error = StreamError;

    fn encode(&mut self, message: &Message, dst: &mut BytesMut) -> Result<(), StreamError> {
        let len = message.payload.len();
        if len > self.max_payload || u32::try_from(len).is_err() {
            return Err(StreamError::TooLarge {
                kind: message.kind.0,
                len,
                limit: self.max_payload,
            });
        }
        message.encode_into(dst);
        Ok(())
    }
}

impl Encoder<Message> for StreamCodec {
    type Error = StreamError;

    fn encode(&mut self, message: Message, dst: &mut BytesMut) -> Result<(), StreamError> {
        self.encode(&message, dst)
    }
}

/// Errors that end a stream of messages.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// More than the receiver takes (or, when encoding, more than this side sends).
    #[error(
        "a DCF message of type {kind:#04x} has {len} bytes of payload, the limit is {limit}; the stream is closed"
    )]
    TooLarge {
        /// Type of the message.
        kind: u8,
        /// Payload length in bytes.
        len: usize,
        /// Maximum payload length in bytes.
        limit: usize,
    },
    /// Not a DCF stream.
    #[error(
        "type {0:#04x} on a stream is no DCF message; the peer speaks something else or lost step, the stream is closed"
    )]
    UnknownType(u8),
    /// The stream ended in the middle of a message.
    #[error("the stream ended {present} bytes into a DCF message; the peer broke off")]
    Cut {
        /// Bytes of the unfinished message.
        present: usize,
    },
    /// The underlying stream failed.
    #[error("the stream failed: {0}")]
    Io(#[from] std::io::Error),
}

/// Maximum bytes that the decoder reserves beyond those that arrived.
const READ_AHEAD: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MsgType;

    fn encoded(messages: &[Message]) -> BytesMut {
        let mut buffer = BytesMut::new();
        for message in messages {
            StreamCodec::default().encode(message, &mut buffer).unwrap();
        }
        buffer
    }

    #[test]
    fn bytes_after_a_message_begin_the_next() {
        let messages = [
            Message::new(MsgType::HELLO, 1, 2, "a"),
            Message::new(MsgType::TOKENS, 2, 3, ""),
            Message::new(MsgType::DONE, 3, 4, "bc"),
        ];
        let mut buffer = encoded(&messages);
        let mut codec = StreamCodec::default();
        for message in messages {
            assert_eq!(codec.decode(&mut buffer).unwrap(), Some(message));
        }
        assert!(codec.decode_eof(&mut buffer).unwrap().is_none());
    }

    #[test]
    fn a_claim_of_sixty_megabytes_allocates_little() {
        let header = Header {
            msg_type: MsgType::TASK.0,
            sequence: 0,
            timestamp_us: 0,
            payload_len: 60 << 20,
        };
        let mut buffer = BytesMut::from(&header.encode()[..]);
        assert!(
            StreamCodec::default()
                .decode(&mut buffer)
                .unwrap()
                .is_none()
        );
        assert!(
            buffer.capacity() < 256 << 10,
            "{} bytes allocated",
            buffer.capacity()
        );
    }

    #[test]
    fn one_byte_over_the_limit_is_an_error_that_stays() {
        let mut buffer = encoded(&[Message::new(MsgType::TASK, 1, 2, vec![0; 9])]);
        let mut codec = StreamCodec::new(8);
        for _ in 0..2 {
            assert!(matches!(
                codec.decode(&mut buffer),
                Err(StreamError::TooLarge {
                    len: 9,
                    limit: 8,
                    ..
                })
            ));
        }
        let mut out = BytesMut::new();
        assert!(matches!(
            codec.encode(Message::new(MsgType::TASK, 1, 2, vec![0; 9]), &mut out),
            Err(StreamError::TooLarge { .. })
        ));
        assert!(out.is_empty());
    }

    #[test]
    fn newer_internal_types_pass_and_foreign_ones_do_not() {
        let mut codec = StreamCodec::default();
        let newer = Message::new(MsgType(0x7E), 1, 2, "x");
        assert_eq!(
            codec
                .decode(&mut encoded(std::slice::from_ref(&newer)))
                .unwrap(),
            Some(newer)
        );
        let mut http = BytesMut::from(&b"\x80ET / HTTP/1.1\r\n\r\n"[..]);
        assert!(matches!(
            codec.decode(&mut http),
            Err(StreamError::UnknownType(0x80))
        ));
    }

    #[test]
    fn a_stream_that_ends_inside_a_message_says_so() {
        let mut buffer = encoded(&[Message::new(MsgType::RESULT, 1, 2, "hello")]);
        buffer.truncate(20);
        assert!(matches!(
            StreamCodec::default().decode_eof(&mut buffer),
            Err(StreamError::Cut { present: 20 })
        ));
    }
}
