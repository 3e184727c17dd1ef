//! AEAD for datagrams between our own nodes, and between the head and clients that hold a key or token.
//!
//! The key comes from a link ([`Link::export_key`](crate::quic::Link::export_key)), one per direction and purpose, so it
//! is fresh for every link. A sealed payload is
//!
//! | bytes | field |
//! |---|---|
//! | 8 | session, big-endian: tells the receiver which key |
//! | 8 | counter, big-endian: the nonce, never used twice |
//! | n | ciphertext |
//! | 16 | tag |
//!
//! sealed with AES-256-GCM. The 17 bytes of the DCF header, the session and the counter are the associated data: nothing
//! of the datagram can be changed. Counters may arrive out of order within [`WINDOW`]; none is accepted twice.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use bytes::Bytes;
use dcf::{Header, Message, MsgType};

/// Seals datagrams of one session in one direction.
#[derive(Debug)]
pub struct Sealer {
    key: LessSafeKey,
    session: u64,
    counter: u64,
}

impl Sealer {
    /// Creates a sealer with a key that has sealed nothing before.
    pub fn new(key: &[u8; 32], session: u64) -> Self {
        Self {
            key: aead_key(key),
            session,
            counter: 0,
        }
    }

    /// Seals `plaintext` as the payload of a message.
    pub fn seal(
        &mut self,
        kind: MsgType,
        sequence: u32,
        timestamp_us: u64,
        plaintext: &[u8],
    ) -> Result<Message, SealError> {
        let counter = self.counter;
        self.counter = counter.checked_add(1).ok_or(SealError::KeyWornOut)?;
        let len = u32::try_from(plaintext.len() + OVERHEAD)
            .map_err(|_| SealError::TooLarge(plaintext.len()))?;
        let mut payload = Vec::with_capacity(len as usize);
        payload.extend_from_slice(&self.session.to_be_bytes());
        payload.extend_from_slice(&counter.to_be_bytes());
        payload.extend_from_slice(plaintext);
        let mut message = Message::new(kind, sequence, timestamp_us, Bytes::new());
        let header = Header {
            payload_len: len,
            ..message.header()
        };
        let aad = associated_data(&header, &payload[..PREFIX]);
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce(counter), Aad::from(aad), &mut payload[PREFIX..])
            .map_err(|_| SealError::TooLarge(plaintext.len()))?;
        payload.extend_from_slice(tag.as_ref());
        message.payload = payload.into();
        Ok(message)
    }
}

/// Opens datagrams of one session in one direction.
#[derive(Debug)]
pub struct Opener {
    key: LessSafeKey,
    session: u64,
    seen: ReplayWindow,
}

impl Opener {
    /// Creates an opener with the key of a [`Sealer`].
    pub fn new(key: &[u8; 32], session: u64) -> Self {
        Self {
            key: aead_key(key),
            session,
            seen: ReplayWindow::default(),
        }
    }

    /// Returns the plaintext of a message, unless it was changed, is of another session, or was opened
    /// before.
    pub fn open(&mut self, message: &Message) -> Result<Bytes, OpenError> {
        let session = session(message).ok_or(OpenError::TooShort {
            len: message.payload.len(),
        })?;
        if session != self.session {
            return Err(OpenError::OtherSession {
                expected: self.session,
                found: session,
            });
        }
        let (prefix, sealed) = message.payload.split_at(PREFIX);
        let counter = prefix.last_chunk().expect("a counter ends the prefix");
        let counter = u64::from_be_bytes(*counter);
        if !self.seen.is_new(counter) {
            return Err(OpenError::Replayed { counter });
        }
        let mut plaintext = sealed.to_vec();
        let aad = associated_data(&message.header(), prefix);
        let len = self
            .key
            .open_in_place(nonce(counter), Aad::from(aad), &mut plaintext)
            .map_err(|_| OpenError::NotAuthentic)?
            .len();
        // Only an authentic counter moves the window.
        self.seen.mark(counter);
        plaintext.truncate(len);
        Ok(plaintext.into())
    }
}

/// The session that a sealed message claims to be of; `None` if it is too short to be one. Use it to find the
/// [`Opener`], and trust it only after that has opened the message.
pub fn session(message: &Message) -> Option<u64> {
    let session = message.payload.first_chunk()?;
    (message.payload.len() >= OVERHEAD).then(|| u64::from_be_bytes(*session))
}

/// Errors of sealing a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// The payload is longer than a header can announce.
    #[error("{0} bytes are too many to seal")]
    TooLarge(usize),
    /// All counters of the key were used.
    #[error("this key has sealed 2^64 messages; make a new link")]
    KeyWornOut,
}

/// Reasons for dropping a sealed message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The payload is shorter than an empty sealed message.
    #[error("{len} bytes are no sealed payload")]
    TooShort {
        /// Length of the payload in bytes.
        len: usize,
    },
    /// Sealed for another link, for example one from before a restart.
    #[error("sealed for session {found:016x}, not {expected:016x}")]
    OtherSession {
        /// Session of this opener.
        expected: u64,
        /// Session in the message.
        found: u64,
    },
    /// The message was opened before, or its counter is too old to tell.
    #[error("counter {counter} came before or is too old")]
    Replayed {
        /// Counter of the message.
        counter: u64,
    },
    /// The message was changed on its way, or sealed with another key.
    #[error("not authentic")]
    NotAuthentic,
    /// It was sealed too long ago, or in the future, by the clock of its session.
    #[error("sealed {seconds} s from now by the session's clock")]
    Stale {
        /// Distance between the time of the message and now.
        seconds: u64,
    },
}

/// Recently seen counters (RFC 4303, section 3.4.3).
#[derive(Debug, Default)]
struct ReplayWindow {
    /// One past the highest counter seen.
    next: u64,
    /// Bit i: counter `next - 1 - i` was seen.
    seen: u128,
}

impl ReplayWindow {
    fn is_new(&self, counter: u64) -> bool {
        match self.next.checked_sub(counter) {
            None | Some(0) => true,
            Some(age) => age <= WINDOW && self.seen & (1 << (age - 1)) == 0,
        }
    }

    fn mark(&mut self, counter: u64) {
        if counter >= self.next {
            let ahead = u32::try_from(counter - self.next + 1).unwrap_or(u32::MAX);
            self.seen = self.seen.unbounded_shl(ahead) | 1;
            // The last counter of all is never sealed, so this does not overflow on authentic messages.
            self.next = counter.saturating_add(1);
        } else {
            self.seen |= 1 << (self.next - counter - 1);
        }
    }
}

fn aead_key(key: &[u8; 32]) -> LessSafeKey {
    let key = UnboundKey::new(&AES_256_GCM, key);
    LessSafeKey::new(key.expect("the key has the algorithm's length"))
}

fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[NONCE_LEN - 8..].copy_from_slice(&counter.to_be_bytes());
    Nonce::assume_unique_for_key(nonce)
}

fn associated_data(header: &Header, prefix: &[u8]) -> [u8; dcf::HEADER_LEN + PREFIX] {
    let mut aad = [0; dcf::HEADER_LEN + PREFIX];
    aad[..dcf::HEADER_LEN].copy_from_slice(&header.encode());
    aad[dcf::HEADER_LEN..].copy_from_slice(prefix);
    aad
}

/// Maximum distance of a counter behind the newest.
pub const WINDOW: u64 = 128;

/// Bytes that sealing adds to a payload.
pub const OVERHEAD: usize = PREFIX + TAG;

const PREFIX: usize = 16;
const TAG: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KEY: [u8; 32] = [7; 32];

    fn pair() -> (Sealer, Opener) {
        (Sealer::new(&KEY, 42), Opener::new(&KEY, 42))
    }

    fn seal(sealer: &mut Sealer, text: &[u8]) -> Message {
        sealer
            .seal(MsgType::SEALED_HEARTBEAT, 3, 99, text)
            .expect("sealed")
    }

    #[test]
    fn sealed_text_is_opened_once() {
        let (mut sealer, mut opener) = pair();
        let message = seal(&mut sealer, b"load");
        assert_eq!(message.payload.len(), 4 + OVERHEAD);
        assert_eq!(session(&message), Some(42));
        assert_eq!(opener.open(&message).expect("authentic"), "load");
        assert_eq!(
            opener.open(&message),
            Err(OpenError::Replayed { counter: 0 })
        );
    }

    #[test]
    fn other_sessions_other_keys_and_short_payloads_are_refused() {
        let (mut sealer, _) = pair();
        let message = seal(&mut sealer, b"load");
        let other = OpenError::OtherSession {
            expected: 43,
            found: 42,
        };
        assert_eq!(Opener::new(&KEY, 43).open(&message), Err(other));
        assert_eq!(
            Opener::new(&[8; 32], 42).open(&message),
            Err(OpenError::NotAuthentic)
        );
        for len in 0..OVERHEAD {
            let short = Message {
                payload: message.payload.slice(..len),
                ..message.clone()
            };
            assert_eq!(
                Opener::new(&KEY, 42).open(&short),
                Err(OpenError::TooShort { len })
            );
        }
    }

    #[test]
    fn the_header_is_covered() {
        let (mut sealer, mut opener) = pair();
        let message = seal(&mut sealer, b"load");
        for changed in [
            Message {
                kind: MsgType::LOAD,
                ..message.clone()
            },
            Message {
                sequence: 4,
                ..message.clone()
            },
            Message {
                timestamp_us: 98,
                ..message.clone()
            },
        ] {
            assert_eq!(opener.open(&changed), Err(OpenError::NotAuthentic));
        }
        opener
            .open(&message)
            .expect("forgeries do not move the window");
    }

    #[test]
    fn messages_may_overtake_each_other_within_the_window() {
        let (mut sealer, mut opener) = pair();
        let messages: Vec<_> = (0..=WINDOW + 1).map(|_| seal(&mut sealer, b"")).collect();
        opener.open(&messages[1]).expect("new");
        opener
            .open(messages.last().expect("there are some"))
            .expect("newest");
        assert_eq!(
            opener.open(&messages[0]),
            Err(OpenError::Replayed { counter: 0 }),
            "too old to tell"
        );
        assert_eq!(
            opener.open(&messages[1]),
            Err(OpenError::Replayed { counter: 1 })
        );
        for message in messages[2..messages.len() - 1].iter().rev() {
            opener.open(message).expect("late, and new");
        }
    }

    proptest! {
        #[test]
        fn any_payload_round_trips(text: Vec<u8>, sequence: u32, timestamp: u64) {
            let (mut sealer, mut opener) = pair();
            let message = sealer.seal(MsgType::SEALED_HEARTBEAT, sequence, timestamp, &text).expect("sealed");
            let datagram = Message::decode_datagram(message.encode_datagram()).expect("a DCF message");
            prop_assert_eq!(opener.open(&datagram).expect("authentic"), text);
        }

        #[test]
        fn any_flipped_bit_is_noticed(text: Vec<u8>, bit: prop::sample::Index) {
            let (mut sealer, mut opener) = pair();
            let datagram = seal(&mut sealer, &text).encode_datagram();
            let mut bytes = datagram.to_vec();
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            if let Ok(message) = Message::decode_datagram(bytes.into()) {
                prop_assert!(opener.open(&message).is_err());
            }
        }

        #[test]
        fn the_window_agrees_with_a_set(counters in prop::collection::vec(0u64..600, 1..300)) {
            let mut window = ReplayWindow::default();
            let mut seen = std::collections::HashSet::new();
            let mut highest = 0;
            for counter in counters {
                let fresh = !seen.contains(&counter) && counter + WINDOW > highest;
                prop_assert_eq!(window.is_new(counter), fresh, "counter {}", counter);
                if fresh {
                    window.mark(counter);
                    seen.insert(counter);
                    highest = highest.max(counter);
                }
            }
        }
    }
}
