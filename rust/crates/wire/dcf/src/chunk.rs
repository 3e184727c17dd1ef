//! Payloads too large for one datagram, as Chunk messages.
//!
//! A Chunk's payload is total u16, index u16, the MD5 of the whole payload (16 bytes, a checksum without
//! security), then up to [`MAX_DATA`] bytes. All Chunks of a payload have the sequence of the message they
//! stand for. The direction determines the type of that message: a Task toward a head, a Result toward a
//! client.

mod reassembler;

use bytes::{BufMut, Bytes, BytesMut};
use md5::{Digest, Md5};

pub use reassembler::{Limits, Reassembler, Share};

use crate::{Message, MsgType};

/// Most bytes of data in one Chunk.
pub const MAX_DATA: usize = 1_400;

/// Bytes before the data.
pub const CHUNK_HEADER_LEN: usize = 20;

/// Longest payload that Chunks can carry.
pub const MAX_PAYLOAD: usize = MAX_DATA * u16::MAX as usize;

/// Cuts `payload` into Chunk messages. They are made as the iterator goes, one allocation each.
///
/// # Errors
/// [`ChunkError::TooLarge`] if the payload is longer than [`MAX_PAYLOAD`].
pub fn split(sequence: u32, timestamp_us: u64, payload: Bytes) -> Result<Split, ChunkError> {
    split_into(sequence, timestamp_us, payload, MAX_DATA)
}

/// Like [`split`], with at most `size` bytes of data in each Chunk: from 1 to [`MAX_DATA`].
///
/// # Errors
/// [`ChunkError::TooLarge`] if the payload needs more than 65,535 Chunks.
pub fn split_into(
    sequence: u32,
    timestamp_us: u64,
    payload: Bytes,
    size: usize,
) -> Result<Split, ChunkError> {
    let size = size.clamp(1, MAX_DATA);
    // An empty payload is one Chunk without data.
    let total = payload.len().div_ceil(size).max(1);
    let total = u16::try_from(total).map_err(|_| ChunkError::TooLarge {
        len: payload.len(),
        limit: size * usize::from(u16::MAX),
    })?;
    let md5 = Md5::digest(&payload).into();
    Ok(Split {
        size,
        sequence,
        timestamp_us,
        payload,
        md5,
        total,
        next: 0,
    })
}

/// The Chunk messages of one payload; see [`split`].
#[derive(Clone, Debug)]
pub struct Split {
    sequence: u32,
    timestamp_us: u64,
    payload: Bytes,
    /// Bytes of data in each but the last.
    size: usize,
    md5: [u8; 16],
    total: u16,
    next: u16,
}

impl Iterator for Split {
    type Item = Message;

    fn next(&mut self) -> Option<Message> {
        if self.next == self.total {
            return None;
        }
        let start = usize::from(self.next) * self.size;
        let end = self.payload.len().min(start + self.size);
        let chunk = Chunk {
            total: self.total,
            index: self.next,
            md5: self.md5,
            data: self.payload.slice(start..end),
        };
        self.next += 1;
        Some(Message::new(
            MsgType::CHUNK,
            self.sequence,
            self.timestamp_us,
            chunk.encode(),
        ))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = usize::from(self.total - self.next);
        (left, Some(left))
    }
}

impl ExactSizeIterator for Split {}

/// The payload of one Chunk message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Chunks of the whole payload; at least 1.
    pub total: u16,
    /// Index of this Chunk, from 0.
    pub index: u16,
    /// MD5 of the whole payload.
    pub md5: [u8; 16],
    /// This Chunk's part of it.
    pub data: Bytes,
}

impl Chunk {
    /// Reads the payload of a Chunk message; the data is a view into it.
    ///
    /// # Errors
    /// [`ChunkError`] if the payload is too short or too long, or if the index is not below the total.
    pub fn parse(payload: &Bytes) -> Result<Self, ChunkError> {
        let Some((header, data)) = payload.split_first_chunk::<CHUNK_HEADER_LEN>() else {
            return Err(ChunkError::Short { len: payload.len() });
        };
        if data.len() > MAX_DATA {
            return Err(ChunkError::DataTooLong { len: data.len() });
        }
        let [t0, t1, i0, i1, md5 @ ..] = *header;
        let (total, index) = (u16::from_be_bytes([t0, t1]), u16::from_be_bytes([i0, i1]));
        if index >= total {
            return Err(ChunkError::BadIndex { index, total });
        }
        Ok(Self {
            total,
            index,
            md5,
            data: payload.slice(CHUNK_HEADER_LEN..),
        })
    }

    /// The payload of a Chunk message.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut payload = BytesMut::with_capacity(CHUNK_HEADER_LEN + self.data.len());
        payload.put_u16(self.total);
        payload.put_u16(self.index);
        payload.put_slice(&self.md5);
        payload.put_slice(&self.data);
        payload.freeze()
    }
}

/// Errors of making, reading or reassembling Chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// The payload is shorter than a Chunk header.
    #[error("a Chunk payload of {len} bytes is shorter than its {CHUNK_HEADER_LEN}-byte header")]
    Short {
        /// Length of the payload in bytes.
        len: usize,
    },
    /// More data than a Chunk holds.
    #[error("a Chunk carries {len} bytes of data, the limit is {MAX_DATA}")]
    DataTooLong {
        /// Bytes of data.
        len: usize,
    },
    /// The index is not below the total.
    #[error("Chunk {index} of {total} does not exist; indices run from 0 to total - 1")]
    BadIndex {
        /// Index of the Chunk.
        index: u16,
        /// Number of Chunks that it announces.
        total: u16,
    },
    /// The payload is longer than the limit.
    #[error("a payload of at least {len} bytes is over the limit of {limit} for Chunks")]
    TooLarge {
        /// Bytes seen or announced so far.
        len: usize,
        /// Maximum that is accepted.
        limit: usize,
    },
    /// The receiver has no memory for it now.
    #[error("there is no room for the payload now: send it again in a moment")]
    NoRoom,
    /// Another total or MD5 than the first Chunk of the same message.
    #[error(
        "a Chunk contradicts the earlier ones of its message (another total or MD5); use a new sequence for a new payload"
    )]
    Conflict,
    /// All pieces arrived, but their MD5 differs from the announced one.
    #[error("the {total} Chunks do not have the MD5 they announce; send the payload again")]
    Corrupt {
        /// Number of Chunks of the payload.
        total: u16,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_payload_is_one_chunk() {
        let chunks: Vec<_> = split(1, 2, Bytes::new()).unwrap().collect();
        assert_eq!(chunks.len(), 1);
        let chunk = Chunk::parse(&chunks[0].payload).unwrap();
        assert_eq!((chunk.total, chunk.index, chunk.data.len()), (1, 0, 0));
    }

    #[test]
    fn a_chunk_boundary_makes_no_empty_chunk() {
        assert_eq!(split(1, 2, vec![0; MAX_DATA * 2].into()).unwrap().len(), 2);
        assert_eq!(
            split(1, 2, vec![0; MAX_DATA * 2 + 1].into()).unwrap().len(),
            3
        );
    }

    #[test]
    fn more_than_65535_chunks_are_refused() {
        assert_eq!(
            split(1, 2, vec![0; MAX_PAYLOAD].into()).unwrap().len(),
            usize::from(u16::MAX)
        );
        let error = split(1, 2, vec![0; MAX_PAYLOAD + 1].into()).unwrap_err();
        assert_eq!(
            error,
            ChunkError::TooLarge {
                len: MAX_PAYLOAD + 1,
                limit: MAX_PAYLOAD
            }
        );
    }

    #[test]
    fn malformed_chunk_payloads_are_named() {
        assert_eq!(
            Chunk::parse(&vec![0; 19].into()),
            Err(ChunkError::Short { len: 19 })
        );
        assert_eq!(
            Chunk::parse(&vec![0; 20].into()),
            Err(ChunkError::BadIndex { index: 0, total: 0 })
        );
        let long = Chunk {
            total: 1,
            index: 0,
            md5: [0; 16],
            data: vec![0; MAX_DATA + 1].into(),
        };
        assert_eq!(
            Chunk::parse(&long.encode()),
            Err(ChunkError::DataTooLong { len: MAX_DATA + 1 })
        );
    }
}
