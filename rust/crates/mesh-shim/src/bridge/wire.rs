//! The few bytes that the bridge reads and writes itself.

use dcf::{
    ErrorCode, HEADER_LEN, Header, MsgType,
    chunk::{self, CHUNK_HEADER_LEN},
};

/// Index and total of a Chunk, `None` if they make no sense.
pub(super) fn chunk_position(payload: &[u8]) -> Option<(u16, u16)> {
    let [t0, t1, i0, i1, ..] = *payload.first_chunk::<CHUNK_HEADER_LEN>()?;
    let (total, index) = (u16::from_be_bytes([t0, t1]), u16::from_be_bytes([i0, i1]));
    (index < total && payload.len() <= CHUNK_HEADER_LEN + chunk::MAX_DATA).then_some((index, total))
}

pub(super) fn is_last_chunk(payload: &[u8]) -> bool {
    chunk_position(payload).is_some_and(|(index, total)| index + 1 == total)
}

pub(super) fn set_sequence(datagram: &mut [u8], sequence: u32) {
    datagram[1..5].copy_from_slice(&sequence.to_be_bytes());
}

pub(super) fn write_message(
    buffer: &mut [u8],
    kind: MsgType,
    sequence: u32,
    timestamp_us: u64,
    payload: &[u8],
) -> usize {
    let header = Header {
        msg_type: kind.0,
        sequence,
        timestamp_us,
        payload_len: payload.len() as u32,
    };
    let len = HEADER_LEN + payload.len();
    buffer[..HEADER_LEN].copy_from_slice(&header.encode());
    buffer[HEADER_LEN..len].copy_from_slice(payload);
    len
}

pub(super) fn write_error(
    buffer: &mut [u8],
    sequence: u32,
    timestamp_us: u64,
    code: ErrorCode,
    text: &str,
) -> usize {
    let header = Header {
        msg_type: MsgType::ERROR.0,
        sequence,
        timestamp_us,
        payload_len: 1 + text.len() as u32,
    };
    let len = HEADER_LEN + 1 + text.len();
    buffer[..HEADER_LEN].copy_from_slice(&header.encode());
    buffer[HEADER_LEN] = code.0;
    buffer[HEADER_LEN + 1..len].copy_from_slice(text.as_bytes());
    len
}
