//! A message: header and payload.

use bytes::{BufMut, Bytes, BytesMut};

use crate::{ErrorBody, ErrorCode, HEADER_LEN, Header, MsgType, Version};

/// Most bytes that one UDP datagram over IPv4 carries.
pub const MAX_DATAGRAM: usize = 65_507;

/// Most bytes of payload in one v5.0.0 datagram; more can only go as Chunks. See [`Version::max_payload`].
pub const MAX_DATAGRAM_PAYLOAD: usize = MAX_DATAGRAM - HEADER_LEN;

/// A DCF message: the header's fields and the payload, without framing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Message type, the first byte of the header.
    pub kind: MsgType,
    /// Chosen by the client, echoed in every answer.
    pub sequence: u32,
    /// Microseconds since the Unix epoch.
    pub timestamp_us: u64,
    /// The payload, with contents that depend on `kind`.
    pub payload: Bytes,
}

impl Message {
    /// A message of these parts.
    pub fn new(kind: MsgType, sequence: u32, timestamp_us: u64, payload: impl Into<Bytes>) -> Self {
        Self {
            kind,
            sequence,
            timestamp_us,
            payload: payload.into(),
        }
    }

    /// An Error message: `code`, then `text`.
    #[must_use]
    pub fn error(sequence: u32, timestamp_us: u64, code: ErrorCode, text: &str) -> Self {
        let payload = [&[code.0], text.as_bytes()].concat();
        Self::new(MsgType::ERROR, sequence, timestamp_us, payload)
    }

    /// Parses the payload of an Error message; `None` for other types, or if the code is missing.
    #[must_use]
    pub fn error_body(&self) -> Option<ErrorBody<'_>> {
        match self.kind {
            MsgType::ERROR => ErrorBody::parse(&self.payload),
            _ => None,
        }
    }

    /// Creates a Partial message with `text` at byte `offset` of the answer.
    #[must_use]
    pub fn partial(sequence: u32, timestamp_us: u64, offset: u32, text: &str) -> Self {
        let payload = [&offset.to_be_bytes(), text.as_bytes()].concat();
        Self::new(MsgType::PARTIAL, sequence, timestamp_us, payload)
    }

    /// Parses the payload of a Partial message; `None` for other types, if it is shorter than the offset, or
    /// not UTF-8.
    #[must_use]
    pub fn partial_body(&self) -> Option<PartialBody<'_>> {
        if self.kind != MsgType::PARTIAL {
            return None;
        }
        let (offset, text) = self.payload.split_first_chunk::<4>()?;
        Some(PartialBody {
            offset: u32::from_be_bytes(*offset),
            text: std::str::from_utf8(text).ok()?,
        })
    }

    /// The header that goes before the payload.
    ///
    /// # Panics
    /// If the payload has 4 GiB or more, which no carrier takes.
    #[must_use]
    pub fn header(&self) -> Header {
        Header {
            msg_type: self.kind.0,
            sequence: self.sequence,
            timestamp_us: self.timestamp_us,
            payload_len: u32::try_from(self.payload.len())
                .expect("a payload is shorter than 4 GiB"),
        }
    }

    /// Bytes of the encoded message.
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        HEADER_LEN + self.payload.len()
    }

    /// True if an answer goes to a client of this version as one datagram rather than as Chunks.
    #[must_use]
    pub fn is_single_answer(&self, version: Version) -> bool {
        self.payload.len() <= version.max_answer()
    }

    /// The message as one v5.0.0 datagram. Ask [`Message::is_single_answer`] first if its length is unknown.
    ///
    /// # Panics
    /// If the payload has 4 GiB or more.
    #[must_use]
    pub fn encode_datagram(&self) -> Bytes {
        self.encode_as(Version::V5_0)
    }

    /// The message as one datagram of this version. It has to fit [`Version::max_payload`].
    ///
    /// # Panics
    /// If the payload has 4 GiB or more.
    #[must_use]
    pub fn encode_as(&self, version: Version) -> Bytes {
        let mut datagram = BytesMut::with_capacity(version.prefix().len() + self.encoded_len());
        datagram.put_slice(version.prefix());
        self.encode_into(&mut datagram);
        datagram.freeze()
    }

    /// Appends the encoded message to `buffer`.
    ///
    /// # Panics
    /// If the payload has 4 GiB or more.
    pub fn encode_into(&self, buffer: &mut BytesMut) {
        buffer.reserve(self.encoded_len());
        buffer.put_slice(&self.header().encode());
        buffer.put_slice(&self.payload);
    }

    /// Reads the one message of a datagram of either version; the payload is a view into it. Bytes after `payload_len`
    /// are ignored.
    ///
    /// # Errors
    /// [`DecodeError`] if the datagram is shorter than its header says, or its type does not travel in datagrams.
    pub fn decode_datagram(datagram: Bytes) -> Result<Self, DecodeError> {
        Self::decode_versioned(datagram).map(|(_, message)| message)
    }

    /// Like [`Message::decode_datagram`], with the version in which to answer.
    ///
    /// # Errors
    /// As there.
    pub fn decode_versioned(datagram: Bytes) -> Result<(Version, Self), DecodeError> {
        let (version, header) = Header::decode_datagram(&datagram)?;
        let start = version.header_len();
        let payload = datagram.slice(start..start + header.payload_len as usize);
        Ok((version, Self::from_parts(header, payload)))
    }

    pub(crate) fn from_parts(header: Header, payload: Bytes) -> Self {
        Self {
            kind: header.kind(),
            sequence: header.sequence,
            timestamp_us: header.timestamp_us,
            payload,
        }
    }
}

/// The payload of a Partial message: u32 offset, then UTF-8 text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartialBody<'a> {
    /// Position of `text` in the whole answer, in bytes.
    pub offset: u32,
    /// A piece of the answer, whole characters only.
    pub text: &'a str,
}

/// Errors of reading a message from a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The datagram is shorter than a header.
    #[error(
        "{len} bytes are shorter than the {HEADER_LEN}-byte DCF header; is the sender speaking DCF?"
    )]
    ShortHeader {
        /// Length of the datagram in bytes.
        len: usize,
    },
    /// The payload is shorter than the header's `payload_len`.
    #[error(
        "the DCF header announces {payload_len} bytes of payload, {present} follow it; the datagram was cut or its length is wrong"
    )]
    Truncated {
        /// Payload length that the header announces, in bytes.
        payload_len: u32,
        /// Bytes after the header.
        present: usize,
    },
    /// A type that does not travel in datagrams, or that this version does not know.
    #[error(
        "DCF message type {0:#04x} is not known in datagrams; the sender may be of a newer version"
    )]
    UnknownType(u8),
    /// A version byte that is not 0x51, before what would be a v5.1 message.
    #[error(
        "the datagram begins with {0:#04x} where DCF v5.1 has 0x51; its sender speaks a version that is not known here"
    )]
    OtherVersion(u8),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoding_does_not_copy_the_payload() {
        let datagram = Message::new(MsgType::TASK, 1, 2, "hello").encode_datagram();
        let message = Message::decode_datagram(datagram.clone()).unwrap();
        assert_eq!(message.payload.as_ptr(), datagram[HEADER_LEN..].as_ptr());
    }

    #[test]
    fn the_largest_datagram_payload_fits_and_one_more_does_not() {
        let mut message = Message::new(MsgType::RESULT, 1, 2, vec![0; MAX_DATAGRAM_PAYLOAD]);
        assert!(message.is_single_answer(Version::V5_0));
        assert_eq!(message.encode_datagram().len(), MAX_DATAGRAM);
        message.payload = vec![0; MAX_DATAGRAM_PAYLOAD + 1].into();
        assert!(!message.is_single_answer(Version::V5_0));
    }

    #[test]
    fn partials_carry_offset_and_text() {
        let message = Message::partial(3, 0, 70_000, "é!");
        assert_eq!(
            message.partial_body(),
            Some(PartialBody {
                offset: 70_000,
                text: "é!"
            })
        );
    }

    #[test]
    fn a_partial_with_half_a_character_has_no_body() {
        let mut message = Message::partial(3, 0, 0, "é");
        message.payload.truncate(5);
        assert_eq!(message.partial_body(), None);
        message.payload.truncate(3);
        assert_eq!(message.partial_body(), None);
    }

    #[test]
    fn only_errors_have_an_error_body() {
        let message = Message::error(9, 0, ErrorCode::NO_WORKERS, "no workers available");
        let body = message.error_body().unwrap();
        assert_eq!(
            (body.code, &*body.text),
            (ErrorCode::NO_WORKERS, "no workers available")
        );
        assert_eq!(
            Message {
                kind: MsgType::RESULT,
                ..message
            }
            .error_body(),
            None
        );
    }
}
