//! Sealed sessions: DCF messages between a client and the head, each sealed into a datagram.
//!
//! Both ends derive a key for each direction from the TLS session in which the head admitted the client. A
//! datagram is a [Sealed](MsgType::SEALED) message, see [`crate::seal`]; its plaintext is one whole message
//! of DCF v5.0.0, header and payload, and may have bytes after it. The outer sequence is 0.
//!
//! A session has two clocks, one for each sender: each begins with the time in the sender's message of the
//! handshake and runs by the sender's monotonic clock from there, so that setting a clock disturbs nothing.
//! The outer timestamp is the time of sealing on that clock. A datagram that is more than [`TIME_WINDOW`] off
//! is refused, besides those whose counter was seen.

use std::time::{Duration, Instant};

use bytes::Bytes;
use dcf::{Message, MsgType};

use crate::seal::{OVERHEAD, OpenError, Opener, SealError, Sealer};

/// One end of a session. No socket, no clock.
#[derive(Debug)]
pub struct SealedSession {
    id: u64,
    sealer: Sealer,
    opener: Opener,
    own: SessionClock,
    peer: SessionClock,
}

/// Keys of a session, by the direction of the messages.
#[derive(Clone)]
pub struct SessionKeys {
    /// Seals what the client sends.
    pub client: [u8; 32],
    /// Seals what the head sends.
    pub head: [u8; 32],
}

/// An end of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The client.
    Client,
    /// The head.
    Head,
}

/// Microseconds since the Unix epoch as one sender of a session counts them.
#[derive(Clone, Copy, Debug)]
struct SessionClock {
    began_us: u64,
    began: Instant,
}

impl SessionClock {
    fn at(&self, now: Instant) -> u64 {
        let passed = now.saturating_duration_since(self.began).as_micros();
        let passed = u64::try_from(passed).unwrap_or(u64::MAX);
        self.began_us.saturating_add(passed)
    }
}

impl SealedSession {
    /// The session `id` as this end has it. `began_us` are the times in the client's and the head's message
    /// of the handshake, which was now.
    pub fn new(id: u64, end: End, keys: &SessionKeys, began_us: (u64, u64), now: Instant) -> Self {
        let clock = |began_us| SessionClock {
            began_us,
            began: now,
        };
        let of_client = (&keys.client, clock(began_us.0));
        let of_head = (&keys.head, clock(began_us.1));
        let (own, peer) = match end {
            End::Client => (of_client, of_head),
            End::Head => (of_head, of_client),
        };
        Self {
            id,
            sealer: Sealer::new(own.0, id),
            opener: Opener::new(peer.0, id),
            own: own.1,
            peer: peer.1,
        }
    }

    /// Number of the session.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Seals one message; `least` is the least length of the plaintext, which is filled up with zeros.
    ///
    /// # Errors
    /// [`SealError`] if the message is too long, or the key worn out.
    pub fn seal(
        &mut self,
        message: &Message,
        least: usize,
        now: Instant,
    ) -> Result<Message, SealError> {
        let mut plaintext = message.encode_datagram().to_vec();
        plaintext.resize(plaintext.len().max(least), 0);
        self.sealer
            .seal(MsgType::SEALED, 0, self.own.at(now), &plaintext)
    }

    /// Opens what the other end sealed: a datagram of DCF v5.0.0, which has yet to be decoded.
    ///
    /// # Errors
    /// [`OpenError`] if it is not a fresh message of the other end in this session.
    pub fn open(&mut self, message: &Message, now: Instant) -> Result<Bytes, OpenError> {
        let off = message.timestamp_us.abs_diff(self.peer.at(now));
        if u128::from(off) > TIME_WINDOW.as_micros() {
            let seconds = off / 1_000_000;
            return Err(OpenError::Stale { seconds });
        }
        if message.kind != MsgType::SEALED {
            return Err(OpenError::NotAuthentic);
        }
        self.opener.open(message)
    }
}

/// Distance by which the time in a datagram may be off. A datagram is not under way for longer, and monotonic
/// clocks that differ by 100 millionths are 9 s apart after a day.
pub const TIME_WINDOW: Duration = Duration::from_secs(30);

/// Bytes that sealing adds to an encoded message, the outer header included.
pub const SEALED_OVERHEAD: usize = dcf::HEADER_LEN + OVERHEAD;

/// Most bytes of payload of a message that is sealed into a datagram.
pub const MAX_SEALED_PAYLOAD: usize = dcf::MAX_DATAGRAM - dcf::HEADER_LEN - SEALED_OVERHEAD;

/// Most bytes of payload of an answer in one sealed datagram, which fits an Ethernet frame over IPv6. Longer
/// answers go as Chunks.
pub const MAX_SEALED_ANSWER: usize = 1_380;

/// Bytes of data in a Chunk that is sealed.
pub const SEALED_CHUNK_DATA: usize = MAX_SEALED_ANSWER - dcf::chunk::CHUNK_HEADER_LEN;

const _: () = assert!(MAX_SEALED_ANSWER + dcf::HEADER_LEN + SEALED_OVERHEAD + 48 <= 1_500);

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(now: Instant) -> (SealedSession, SealedSession) {
        let keys = SessionKeys {
            client: [1; 32],
            head: [2; 32],
        };
        let end = |end| SealedSession::new(9, end, &keys, (5_000_000, 70_000_000), now);
        (end(End::Client), end(End::Head))
    }

    fn task() -> Message {
        Message::new(MsgType::TASK, 7, 1, "why?")
    }

    #[test]
    fn a_message_is_opened_once_by_the_other_end() {
        let now = Instant::now();
        let (mut client, mut head) = pair(now);
        let sealed = client.seal(&task(), 64, now).expect("sealed");
        assert_eq!(sealed.encoded_len(), 64 + SEALED_OVERHEAD);
        let inner = head.open(&sealed, now).expect("authentic");
        assert_eq!(Message::decode_datagram(inner).expect("a message"), task());
        assert_eq!(
            head.open(&sealed, now),
            Err(OpenError::Replayed { counter: 0 })
        );
    }

    #[test]
    fn a_message_that_is_sent_back_to_its_sender_is_refused() {
        let now = Instant::now();
        let (mut client, mut head) = pair(now);
        for (from, to) in [(&mut client, 5_000_000), (&mut head, 70_000_000)] {
            let mut sealed = from.seal(&task(), 0, now).expect("sealed");
            assert!(from.open(&sealed, now).is_err());
            // Even if its time fitted the other direction.
            sealed.timestamp_us = 75_000_000 - to;
            assert_eq!(from.open(&sealed, now), Err(OpenError::NotAuthentic));
        }
    }

    #[test]
    fn an_old_message_is_refused_and_a_late_one_is_not() {
        let now = Instant::now();
        let (mut client, mut head) = pair(now);
        let first = client.seal(&task(), 0, now).expect("sealed");
        let second = client.seal(&task(), 0, now).expect("sealed");
        let late = now + TIME_WINDOW;
        head.open(&second, late).expect("late");
        let stale = head.open(&first, late + Duration::from_secs(1));
        assert_eq!(stale, Err(OpenError::Stale { seconds: 31 }));
        let early = client.seal(&task(), 0, late + Duration::from_secs(2));
        let early = head.open(&early.expect("sealed"), now);
        assert!(matches!(early, Err(OpenError::Stale { .. })), "{early:?}");
        // Both clocks go on, however long the session is.
        let day = now + Duration::from_secs(86_400);
        let next = client.seal(&task(), 0, day).expect("sealed");
        head.open(&next, day + Duration::from_secs(9))
            .expect("fresh");
    }

    #[test]
    fn another_type_with_the_seal_of_a_session_is_refused() {
        let now = Instant::now();
        let (mut client, mut head) = pair(now);
        let sealed = client.seal(&task(), 0, now).expect("sealed");
        let other = Message {
            kind: MsgType::SEALED_HEARTBEAT,
            ..sealed
        };
        assert_eq!(head.open(&other, now), Err(OpenError::NotAuthentic));
    }
}
