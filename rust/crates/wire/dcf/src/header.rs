//! The 17 bytes before every payload.

use crate::{DecodeError, MsgType, Version};

/// Bytes of an encoded [`Header`].
pub const HEADER_LEN: usize = 17;

/// The header of a DCF message; big-endian on the wire.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 1 | `msg_type` |
/// | 1 | 4 | `sequence` |
/// | 5 | 8 | `timestamp_us` |
/// | 13 | 4 | `payload_len` |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Header {
    /// Type of the message; see [`MsgType`]. Any value decodes; callers check whether it is assigned.
    pub msg_type: u8,
    /// Chosen by the client, echoed in every answer.
    pub sequence: u32,
    /// Microseconds since the Unix epoch.
    pub timestamp_us: u64,
    /// Bytes of payload after the header.
    pub payload_len: u32,
}

impl Header {
    /// The type as a [`MsgType`].
    #[inline]
    #[must_use]
    pub const fn kind(&self) -> MsgType {
        MsgType(self.msg_type)
    }

    /// Encodes the header for the wire.
    #[inline]
    #[must_use]
    pub const fn encode(&self) -> [u8; HEADER_LEN] {
        let fields = ((self.sequence as u128) << 96)
            | ((self.timestamp_us as u128) << 32)
            | self.payload_len as u128;
        let mut bytes = [self.msg_type; HEADER_LEN];
        let (_, rest) = bytes.split_at_mut(1);
        rest.copy_from_slice(&fields.to_be_bytes());
        bytes
    }

    /// Reads the header at the start of `bytes`; what follows it is not looked at.
    ///
    /// # Errors
    /// [`DecodeError::ShortHeader`] if there are fewer than [`HEADER_LEN`] bytes.
    #[inline]
    pub const fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let Some([msg_type, fields @ ..]) = bytes.first_chunk::<HEADER_LEN>() else {
            return Err(DecodeError::ShortHeader { len: bytes.len() });
        };
        let fields = u128::from_be_bytes(*fields);
        Ok(Self {
            msg_type: *msg_type,
            sequence: (fields >> 96) as u32,
            timestamp_us: (fields >> 32) as u64,
            payload_len: fields as u32,
        })
    }

    /// Reads version and header of a datagram and checks them against it: a type that travels in datagrams, a payload
    /// that is all there.
    ///
    /// # Errors
    /// The [`DecodeError`] that [`crate::Message::decode_datagram`] would give.
    #[inline]
    pub const fn decode_datagram(datagram: &[u8]) -> Result<(Version, Self), DecodeError> {
        let version = Version::of(datagram);
        let (_, message) = datagram.split_at(version.prefix().len());
        let header = match Self::decode(message) {
            Ok(header) => header,
            Err(error) => return Err(error),
        };
        let is_known = header.kind().is_datagram();
        if !is_known && is_other_version(datagram) {
            return Err(DecodeError::OtherVersion(header.msg_type));
        }
        let present = message.len() - HEADER_LEN;
        if (header.payload_len as usize) > present {
            return Err(DecodeError::Truncated {
                payload_len: header.payload_len,
                present,
            });
        }
        if !is_known {
            return Err(DecodeError::UnknownType(header.msg_type));
        }
        Ok((version, header))
    }
}

/// True if a datagram looks like v5.1 but for its first byte: a known type follows, and the length there
/// fits. It is not read as such; this only serves the message about it.
const fn is_other_version(datagram: &[u8]) -> bool {
    let Some((_, message)) = datagram.split_first() else {
        return false;
    };
    match Header::decode(message) {
        Ok(header) => {
            header.kind().is_datagram() && header.payload_len as usize == message.len() - HEADER_LEN
        }
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_table_says() {
        let header = Header {
            msg_type: 2,
            sequence: 0x0304_0506,
            timestamp_us: 0x0708_090a_0b0c_0d0e,
            payload_len: 0x0f10_1112,
        };
        assert_eq!(
            header.encode(),
            [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
        );
        assert_eq!(Header::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn sixteen_bytes_are_no_header() {
        assert_eq!(
            Header::decode(&[0; 16]),
            Err(DecodeError::ShortHeader { len: 16 })
        );
    }

    #[test]
    fn encoding_is_const() {
        const ACK: [u8; HEADER_LEN] = Header {
            msg_type: 4,
            sequence: 9,
            timestamp_us: 0,
            payload_len: 0,
        }
        .encode();
        assert_eq!(ACK[0..5], [4, 0, 0, 0, 9]);
    }
}
