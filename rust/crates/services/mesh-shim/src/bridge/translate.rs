//! Answers that change their form between a head of one version and a client of the other.
//!
//! Most datagrams only get or lose the version byte. An answer that a head of the older version sends in one
//! datagram and that is too long for one of the newer is cut into Chunks here. Chunks of a head of the newer
//! version are put together for a client of the older, which knows none, as long as the answer fits one
//! datagram.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    time::{Duration, Instant},
};

use bytes::Bytes;
use dcf::{
    Message, MsgType, Version,
    chunk::{self, Chunk, Limits, Reassembler, Split},
};

use super::versions::MOST_WHOLE;

/// Answers that wait to be sent in another form, and pieces of those that are not complete. Bounded in
/// memory.
#[derive(Debug)]
pub(super) struct Translator {
    outgoing: VecDeque<Outgoing>,
    outgoing_bytes: usize,
    /// By the sequence toward the head.
    pieces: Reassembler<u32>,
}

#[derive(Debug)]
struct Outgoing {
    client: SocketAddr,
    version: Version,
    what: Form,
    bytes: usize,
}

#[derive(Debug)]
enum Form {
    Whole(Option<Message>),
    Pieces(Split),
}

/// The receiver of an answer, and the fields of its header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Address {
    pub(super) client: SocketAddr,
    pub(super) version: Version,
    pub(super) sequence: u32,
    pub(super) timestamp_us: u64,
}

impl Translator {
    pub(super) fn new() -> Self {
        Self {
            outgoing: VecDeque::new(),
            outgoing_bytes: 0,
            pieces: Reassembler::new(LIMITS),
        }
    }

    /// Queues a Result in the form that its client takes; false without room for it.
    pub(super) fn answer(&mut self, to: Address, payload: Bytes) -> bool {
        let bytes = payload.len();
        if self.outgoing_bytes + bytes > OUTGOING_BYTES {
            return false;
        }
        let what = if bytes <= to.version.max_answer() {
            let result = Message::new(MsgType::RESULT, to.sequence, to.timestamp_us, payload);
            Form::Whole(Some(result))
        } else {
            match chunk::split(to.sequence, to.timestamp_us, payload) {
                Ok(pieces) => Form::Pieces(pieces),
                Err(_) => return false,
            }
        };
        self.outgoing_bytes += bytes;
        self.outgoing.push_back(Outgoing {
            client: to.client,
            version: to.version,
            what,
            bytes,
        });
        true
    }

    /// Takes a Chunk for a client that knows none; the whole answer if it was the last one missing.
    pub(super) fn piece(&mut self, upstream: u32, payload: &[u8], now: Instant) -> Option<Bytes> {
        let chunk = Chunk::parse(&Bytes::copy_from_slice(payload)).ok()?;
        match self.pieces.push(upstream, &chunk, now) {
            Ok(whole) => whole,
            // The head ran the task again, and this is another answer than the one that broke off.
            Err(chunk::ChunkError::Conflict) => {
                self.pieces.remove(&upstream);
                self.pieces.push(upstream, &chunk, now).ok().flatten()
            }
            Err(_) => None,
        }
    }

    /// Forgets the pieces of a task that is over.
    pub(super) fn forget(&mut self, upstream: u32) {
        if !self.pieces.is_empty() {
            self.pieces.remove(&upstream);
        }
    }

    /// Drops answers that did not become complete in time.
    pub(super) fn expire(&mut self, now: Instant) {
        if !self.pieces.is_empty() {
            self.pieces.expire(now);
        }
    }

    /// The next datagram that is due, written to `buffer`: its client and its length.
    pub(super) fn poll(&mut self, buffer: &mut [u8]) -> Option<(SocketAddr, usize)> {
        while let Some(first) = self.outgoing.front_mut() {
            let next = match &mut first.what {
                Form::Whole(message) => message.take(),
                Form::Pieces(pieces) => pieces.next(),
            };
            let Some(message) = next else {
                self.outgoing_bytes -= first.bytes;
                self.outgoing.pop_front();
                continue;
            };
            let len = super::wire::write_message(
                buffer,
                (first.version, message.kind),
                message.sequence,
                message.timestamp_us,
                &message.payload,
            );
            return Some((first.client, len));
        }
        None
    }
}

/// True if an answer of so many Chunks may fit one datagram. Longer ones pass as the Chunks that they are.
pub(super) fn may_fit_one(total: u16) -> bool {
    (usize::from(total) - 1) * chunk::MAX_DATA < MOST_WHOLE
}

/// Each piece is for an open task, and at most 66 KB long.
const LIMITS: Limits = Limits {
    max_messages: 256,
    max_payload: 64 << 10 | 1_400,
    max_bytes: 8 << 20,
    timeout: Duration::from_secs(60),
};
/// Bytes of answers that wait to be sent in another form.
const OUTGOING_BYTES: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn to(version: Version) -> Address {
        Address {
            client: SocketAddr::from(([127, 0, 0, 1], 1)),
            version,
            sequence: 7,
            timestamp_us: 9,
        }
    }

    #[test]
    fn the_limit_of_one_datagram_is_a_limit_of_chunks() {
        assert!(may_fit_one(47) && !may_fit_one(48));
        const { assert!(47 * chunk::MAX_DATA <= LIMITS.max_payload) };
    }

    #[test]
    fn what_waits_is_bounded_and_sent_in_order() {
        let mut translator = Translator::new();
        let mut buffer = vec![0; 1 << 16];
        let payload = Bytes::from(vec![b'x'; 60_000]);
        let queued = (0..200)
            .filter(|_| translator.answer(to(Version::V5_1), payload.clone()))
            .count();
        assert_eq!(queued, OUTGOING_BYTES / 60_000);
        let mut sent = 0;
        while let Some((_, len)) = translator.poll(&mut buffer) {
            assert!(len <= Version::V5_1.header_len() + Version::V5_1.max_answer());
            sent += 1;
        }
        assert_eq!(sent, queued * 60_000usize.div_ceil(chunk::MAX_DATA));
        assert_eq!(translator.outgoing_bytes, 0);
        assert!(translator.answer(to(Version::V5_1), payload));
    }
}
