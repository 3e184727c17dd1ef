//! The envelope of a frame: version, mesh, sender, epoch, counter and signature, in front of the content.

use mesh_identity::{ExpandedKey, IdentityKey, NodeId, SIGNATURE_BYTES};

use crate::counts::Refusal;

/// Bytes in front of the signature: version, mesh, sender, epoch, counter.
pub const HEADER_BYTES: usize = 1 + 32 + 32 + 8 + 8;
/// Bytes in front of the content.
pub(crate) const ENVELOPE_BYTES: usize = HEADER_BYTES + SIGNATURE_BYTES;
/// Maximum bytes of a frame.
pub const LONGEST_FRAME: usize = 64 << 10;

const VERSION: u8 = 1;
const CONTEXT: &[u8] = b"hydramesh-gossip-frame-v1";

/// The part of an envelope that is read before the signature is verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) mesh: [u8; 32],
    pub(crate) sender: NodeId,
    /// Start of the sender's process; grows with every start.
    pub(crate) epoch: u64,
    /// Grows with every frame of an epoch.
    pub(crate) counter: u64,
}

impl Header {
    pub(crate) fn read(frame: &[u8]) -> Result<Self, Refusal> {
        if !(ENVELOPE_BYTES..=LONGEST_FRAME).contains(&frame.len()) {
            return Err(Refusal::Length);
        }
        if frame[0] != VERSION {
            return Err(Refusal::Version);
        }
        let array = |at: usize| <[u8; 32]>::try_from(&frame[at..at + 32]).expect("32 bytes");
        let number = |at: usize| {
            u64::from_be_bytes(<[u8; 8]>::try_from(&frame[at..at + 8]).expect("8 bytes"))
        };
        Ok(Self {
            mesh: array(1),
            sender: NodeId::from(array(33)),
            epoch: number(65),
            counter: number(73),
        })
    }

    fn bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = VERSION;
        bytes[1..33].copy_from_slice(&self.mesh);
        bytes[33..65].copy_from_slice(self.sender.as_bytes());
        bytes[65..73].copy_from_slice(&self.epoch.to_be_bytes());
        bytes[73..].copy_from_slice(&self.counter.to_be_bytes());
        bytes
    }

    /// A frame with this header and content.
    pub(crate) fn seal(&self, key: &IdentityKey, content: &[u8]) -> Vec<u8> {
        let header = self.bytes();
        let signature = key.sign(CONTEXT, &[&header[..], content].concat());
        [&header[..], &signature, content].concat()
    }
}

/// The content of a frame whose header was read, if `key` signed both.
pub(crate) fn open<'a>(frame: &'a [u8], key: &ExpandedKey) -> Result<&'a [u8], Refusal> {
    let (header, rest) = frame.split_at(HEADER_BYTES);
    let (signature, content) = rest.split_at(SIGNATURE_BYTES);
    match key.verifies(CONTEXT, &[header, content].concat(), signature) {
        true => Ok(content),
        false => Err(Refusal::Signature),
    }
}

/// The node that a frame claims as its sender; `None` if the bytes are no frame. For a relay, which compares it with the
/// node at the other end of the link.
pub fn sender_of(frame: &[u8]) -> Option<NodeId> {
    Header::read(frame).ok().map(|header| header.sender)
}

/// The counters of a sender that were seen: the greatest, and which of the 64 below it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Window {
    epoch: u64,
    greatest: u64,
    seen: u64,
}

impl Window {
    pub(crate) fn is_fresh(&self, epoch: u64, counter: u64) -> bool {
        if epoch != self.epoch {
            return epoch > self.epoch;
        }
        match counter.checked_sub(self.greatest) {
            Some(0) | None => {
                let back = self.greatest - counter;
                back < 64 && self.seen & (1 << back) == 0
            }
            Some(_) => true,
        }
    }

    /// Notes a counter that is fresh and whose frame was verified.
    pub(crate) fn note(&mut self, epoch: u64, counter: u64) {
        if epoch != self.epoch {
            *self = Self {
                epoch,
                greatest: counter,
                seen: 1,
            };
        } else if counter > self.greatest {
            let ahead = counter - self.greatest;
            self.seen = if ahead < 64 { self.seen << ahead } else { 0 } | 1;
            self.greatest = counter;
        } else {
            self.seen |= 1 << (self.greatest - counter);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> Header {
        Header {
            mesh: [1; 32],
            sender: IdentityKey::from_seed(&[2; 32]).node_id(),
            epoch: 3,
            counter: 4,
        }
    }

    #[test]
    fn a_frame_opens_with_its_senders_key_alone() {
        let key = IdentityKey::from_seed(&[2; 32]);
        let frame = header().seal(&key, b"content");
        assert_eq!(Header::read(&frame), Ok(header()));
        assert_eq!(sender_of(&frame), Some(key.node_id()));
        assert_eq!(open(&frame, &key.public().expand()), Ok(&b"content"[..]));
        let other = IdentityKey::from_seed(&[3; 32]);
        let other = other.public().expand();
        assert_eq!(open(&frame, &other), Err(Refusal::Signature));
        assert_eq!(
            Header::read(&frame[..ENVELOPE_BYTES - 1]),
            Err(Refusal::Length)
        );
        assert_eq!(
            Header::read(&vec![VERSION; LONGEST_FRAME + 1]),
            Err(Refusal::Length)
        );
        let mut later = frame.clone();
        later[0] = 2;
        assert_eq!(Header::read(&later), Err(Refusal::Version));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn a_changed_frame_never_opens(at: prop::sample::Index, bit in 0..8u8) {
            let key = IdentityKey::from_seed(&[2; 32]);
            let public = key.public().expand();
            let mut frame = header().seal(&key, b"some content");
            let at = at.index(frame.len());
            frame[at] ^= 1 << bit;
            let opened = Header::read(&frame).and_then(|_| open(&frame, &public));
            prop_assert!(opened.is_err());
        }
    }

    proptest! {
        #[test]
        fn a_counter_is_fresh_once(counters in proptest::collection::vec((1..3u64, 0..200u64), 0..300)) {
            let mut window = Window::default();
            let mut noted = std::collections::HashSet::new();
            let mut newest = (0, 0);
            for (epoch, counter) in counters {
                let fresh = window.is_fresh(epoch, counter);
                if noted.contains(&(epoch, counter)) || epoch < newest.0 {
                    prop_assert!(!fresh);
                }
                if (epoch, counter) > newest {
                    prop_assert!(fresh);
                }
                if fresh {
                    window.note(epoch, counter);
                    noted.insert((epoch, counter));
                    newest = newest.max((epoch, counter));
                }
            }
        }
    }
}
