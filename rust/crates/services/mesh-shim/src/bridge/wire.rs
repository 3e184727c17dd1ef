//! The few bytes that the bridge reads and writes itself.

use dcf::{
    DecodeError, ErrorCode, HEADER_LEN, Header, MsgType, Version,
    chunk::{self, CHUNK_HEADER_LEN},
};

/// The fields before the payload of a datagram.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    /// Its framing, and the version in which its sender is answered.
    pub(super) version: Version,
    pub(super) header: Header,
}

impl Frame {
    pub(super) fn decode(datagram: &[u8]) -> Result<Self, DecodeError> {
        let (version, header) = Header::decode_datagram(datagram)?;
        Ok(Self { version, header })
    }

    /// Sequence and timestamp, which an answer repeats.
    pub(super) fn names(&self) -> (u32, u64) {
        (self.header.sequence, self.header.timestamp_us)
    }

    pub(super) fn kind(&self) -> MsgType {
        self.header.kind()
    }

    /// Length of the datagram in bytes, without any bytes behind the message.
    pub(super) fn datagram_len(&self) -> usize {
        self.version.header_len() + self.payload_len()
    }

    pub(super) fn payload_len(&self) -> usize {
        self.header.payload_len as usize
    }

    /// The payload in the datagram that this frame was read from.
    pub(super) fn payload<'a>(&self, datagram: &'a [u8]) -> &'a [u8] {
        &datagram[self.version.header_len()..self.datagram_len()]
    }

    /// The header and the payload, without what the version puts before them.
    pub(super) fn message<'a>(&self, datagram: &'a mut [u8]) -> &'a mut [u8] {
        &mut datagram[self.version.prefix().len()..]
    }
}

/// Index and total of a Chunk, `None` if they make no sense.
pub(super) fn chunk_position(payload: &[u8]) -> Option<(u16, u16)> {
    let [t0, t1, i0, i1, ..] = *payload.first_chunk::<CHUNK_HEADER_LEN>()?;
    let (total, index) = (u16::from_be_bytes([t0, t1]), u16::from_be_bytes([i0, i1]));
    (index < total && payload.len() <= CHUNK_HEADER_LEN + chunk::MAX_DATA).then_some((index, total))
}

pub(super) fn is_last_chunk(payload: &[u8]) -> bool {
    chunk_position(payload).is_some_and(|(index, total)| index + 1 == total)
}

/// Changes the sequence of a message that begins with its header.
pub(super) fn set_sequence(message: &mut [u8], sequence: u32) {
    message[1..5].copy_from_slice(&sequence.to_be_bytes());
}

/// Changes the payload's length of a message that begins with its header.
pub(super) fn set_payload_len(message: &mut [u8], len: usize) {
    message[13..HEADER_LEN].copy_from_slice(&(len as u32).to_be_bytes());
}

/// Writes a datagram; returns its length.
pub(super) fn write_message(
    buffer: &mut [u8],
    (version, kind): (Version, MsgType),
    (sequence, timestamp_us): (u32, u64),
    payload: &[&[u8]],
) -> usize {
    let payload_len = payload.iter().map(|part| part.len() as u32).sum();
    let header = Header {
        msg_type: kind.0,
        sequence,
        timestamp_us,
        payload_len,
    };
    let header = header.encode();
    let mut len = 0;
    for part in [version.prefix(), &header].iter().chain(payload) {
        buffer[len..][..part.len()].copy_from_slice(part);
        len += part.len();
    }
    len
}

pub(super) fn write_error(
    buffer: &mut [u8],
    version: Version,
    names: (u32, u64),
    code: ErrorCode,
    text: &str,
) -> usize {
    let payload = [&[code.0], text.as_bytes()];
    let kind = (version, MsgType::ERROR);
    write_message(buffer, kind, names, &payload)
}
