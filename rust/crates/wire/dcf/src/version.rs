//! The two versions of DCF that travel in datagrams.

use std::fmt;

use crate::{HEADER_LEN, MAX_DATAGRAM, chunk};

/// The framing of a datagram. Streams carry messages without it.
///
/// A v5.1 datagram is [`Version::BYTE`] and then a v5.0.0 datagram: the 17-byte header and the payload. No
/// message type that travels in datagrams has that number, so the first byte distinguishes the versions. A
/// peer is answered in its own version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Version {
    /// Version 5.0.0: the 17-byte header without a version byte.
    #[default]
    V5_0,
    /// The version byte and the 17-byte header.
    V5_1,
}

impl Version {
    /// First byte of every v5.1 datagram.
    pub const BYTE: u8 = 0x51;

    /// The version of this datagram, by its first byte.
    #[inline]
    #[must_use]
    pub const fn of(datagram: &[u8]) -> Self {
        match datagram {
            [Self::BYTE, ..] => Self::V5_1,
            _ => Self::V5_0,
        }
    }

    /// The version's name in text.
    #[inline]
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::V5_0 => "v5.0.0",
            Self::V5_1 => "v5.1",
        }
    }

    /// The bytes before the 17-byte header.
    #[inline]
    #[must_use]
    pub const fn prefix(self) -> &'static [u8] {
        match self {
            Self::V5_0 => &[],
            Self::V5_1 => &[Self::BYTE],
        }
    }

    /// Bytes before the payload.
    #[inline]
    #[must_use]
    pub const fn header_len(self) -> usize {
        self.prefix().len() + HEADER_LEN
    }

    /// Most bytes of payload that a datagram of this version can carry.
    #[inline]
    #[must_use]
    pub const fn max_payload(self) -> usize {
        MAX_DATAGRAM - self.header_len()
    }

    /// Most bytes of an answer's payload that go in one datagram. Longer answers go as Chunks.
    ///
    /// A v5.0.0 client does not know Chunks, so its answers use all that a datagram can carry. A v5.1 client expects
    /// datagrams that fit one Ethernet frame.
    #[inline]
    #[must_use]
    pub const fn max_answer(self) -> usize {
        match self {
            Self::V5_0 => self.max_payload(),
            Self::V5_1 => 1_454,
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

// A Chunk fits a datagram of either version.
const _: () = assert!(chunk::CHUNK_HEADER_LEN + chunk::MAX_DATA <= Version::V5_1.max_answer());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_byte_tells_the_version() {
        assert_eq!(Version::of(&[0x51, 2]), Version::V5_1);
        assert_eq!(Version::of(&[2, 0x51]), Version::V5_0);
        assert_eq!(Version::of(&[]), Version::V5_0);
    }

    #[test]
    fn a_version_5_1_datagram_is_one_byte_longer() {
        assert_eq!(Version::V5_0.header_len(), 17);
        assert_eq!(Version::V5_1.header_len(), 18);
        assert_eq!(Version::V5_0.max_payload(), 65_490);
        assert_eq!(Version::V5_1.max_payload(), 65_489);
    }
}
