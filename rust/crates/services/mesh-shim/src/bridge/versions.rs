//! The two versions of DCF, and everything that is special to v5.0.0.
//!
//! A head of v5.0.0 answers no probe, may log datagrams of another version, and sends a worker's Result with the
//! type of a Task. [`Spoken`] remembers the versions of each head, and [`Speaks`] chooses one of them.
//!
//! Most datagrams only get or lose the version byte ([`reframed`]). An answer that a v5.0.0 head sends in one
//! datagram and that is too long for one of v5.1 is cut into Chunks ([`Translator`]). Chunks of a v5.1 head are
//! put together for a v5.0.0 client, which knows none, as long as the answer fits one datagram.

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

use super::wire::{chunk_position, write_message};

/// The versions in which a head is probed, in this order.
pub(super) const PROBED: [Version; 2] = [Version::V5_0, Version::V5_1];

/// The type of a head's answer, which v5.0.0 heads send as a Task.
pub(super) fn answer_type(kind: MsgType) -> MsgType {
    match kind {
        MsgType::TASK => MsgType::RESULT,
        other => other,
    }
}

/// Times at which a head last sent a datagram of each version.
#[derive(Clone, Debug, Default)]
pub(super) struct Spoken([Option<Instant>; 2]);

impl Spoken {
    pub(super) fn note(&mut self, version: Version, now: Instant) {
        self.0[version as usize] = Some(now);
    }

    /// The versions that the head speaks, if it is probed every `probe_interval`.
    pub(super) fn at(&self, now: Instant, probe_interval: Duration) -> Speaks {
        let memory = VERSION_MEMORY.max(probe_interval * 3 * SELDOM);
        let is_recent = |at| now < at + memory;
        Speaks(self.0.map(|spoke| spoke.is_some_and(is_recent)))
    }
}

/// The versions that a head speaks, as far as is known.
#[derive(Clone, Copy, Debug)]
pub(super) struct Speaks([bool; 2]);

impl Speaks {
    fn has(self, version: Version) -> bool {
        self.0[version as usize]
    }

    /// The version in which the head is spoken to for a client of version `wanted`: the client's own if the
    /// head speaks it, so that nothing has to be translated. A head of which nothing is known may be one of
    /// v5.0.0, which answers no probes.
    pub(super) fn version_for(self, wanted: Version) -> Version {
        match other(wanted) {
            _ if self.has(wanted) => wanted,
            other if self.has(other) => other,
            _ => Version::V5_0,
        }
    }

    /// True if the head understands this version, as far as is known.
    pub(super) fn may_include(self, version: Version) -> bool {
        self.has(version) || !self.has(other(version))
    }

    /// Each head gets one probe an interval, in a version that it speaks. The other version is tried now and
    /// then only: a head that does not know it may log every such datagram.
    pub(super) fn is_probed(self, version: Version, round: u32) -> bool {
        let [old, new] = PROBED.map(|version| self.has(version));
        let usual = match version {
            Version::V5_0 => old || !new,
            Version::V5_1 => new && !old,
        };
        let seldom = if old || new { SELDOM } else { SELDOM / 2 };
        usual || round.is_multiple_of(seldom)
    }
}

fn other(version: Version) -> Version {
    match version {
        Version::V5_0 => Version::V5_1,
        Version::V5_1 => Version::V5_0,
    }
}

/// The offset at which a received datagram begins if it is sent on in `version`: its first byte, the one
/// behind it, or one byte before it, where [`Version::BYTE`] has to be.
#[must_use]
pub fn reframed(datagram: &[u8], version: Version) -> isize {
    match (Version::of(datagram), version) {
        (Version::V5_0, Version::V5_1) => -1,
        (Version::V5_1, Version::V5_0) => 1,
        _ => 0,
    }
}

/// Answers that wait to be sent in another form, and pieces of those that are not complete. Bounded in
/// memory.
#[derive(Debug)]
pub(super) struct Translator {
    outgoing: VecDeque<QueuedAnswer>,
    outgoing_bytes: usize,
    /// By the sequence toward the head.
    pieces: Reassembler<u32>,
}

#[derive(Debug)]
struct QueuedAnswer {
    client: SocketAddr,
    version: Version,
    form: AnswerForm,
    bytes: usize,
}

/// Outcome for a datagram of a head whose client has the other version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Translation {
    /// Only its frame differs.
    Reframed,
    /// The answer is complete and will be sent in another form.
    Queued,
    /// More pieces of the answer are awaited.
    Incomplete,
    /// A Chunk without a sound header.
    Malformed,
    /// There is no form that the client takes, or no room to wait in.
    Impossible,
}

#[derive(Debug)]
enum AnswerForm {
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

    /// Brings a head's datagram for the task of sequence `upstream` into the form of its client's version.
    /// `chunked`: the client has got Chunks of this answer already.
    pub(super) fn translate(
        &mut self,
        to: Address,
        upstream: u32,
        (kind, payload): (MsgType, &[u8]),
        chunked: bool,
        now: Instant,
    ) -> Translation {
        let is_long = payload.len() > to.version.max_answer();
        let whole = match kind {
            MsgType::CHUNK if to.version == Version::V5_0 => {
                let Some((_, total)) = chunk_position(payload) else {
                    return Translation::Malformed;
                };
                if !may_fit_one(total) || chunked {
                    return Translation::Reframed;
                }
                match self.piece(upstream, payload, now) {
                    Some(whole) => whole,
                    None => return Translation::Incomplete,
                }
            }
            MsgType::RESULT if is_long => Bytes::copy_from_slice(payload),
            MsgType::ERROR => return Translation::Reframed,
            _ if is_long => return Translation::Impossible,
            _ => return Translation::Reframed,
        };
        match self.queue(to, whole) {
            true => Translation::Queued,
            false => Translation::Impossible,
        }
    }

    /// Queues a Result in the form that its client takes; false without room for it.
    fn queue(&mut self, to: Address, payload: Bytes) -> bool {
        let bytes = payload.len();
        if self.outgoing_bytes + bytes > OUTGOING_BYTES {
            return false;
        }
        let form = if bytes <= to.version.max_answer() {
            let result = Message::new(MsgType::RESULT, to.sequence, to.timestamp_us, payload);
            AnswerForm::Whole(Some(result))
        } else {
            match chunk::split(to.sequence, to.timestamp_us, payload) {
                Ok(pieces) => AnswerForm::Pieces(pieces),
                Err(_) => return false,
            }
        };
        self.outgoing_bytes += bytes;
        self.outgoing.push_back(QueuedAnswer {
            client: to.client,
            version: to.version,
            form,
            bytes,
        });
        true
    }

    /// Takes a Chunk for a v5.0.0 client; the whole answer if it was the last one missing.
    fn piece(&mut self, upstream: u32, payload: &[u8], now: Instant) -> Option<Bytes> {
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
            let next = match &mut first.form {
                AnswerForm::Whole(message) => message.take(),
                AnswerForm::Pieces(pieces) => pieces.next(),
            };
            let Some(message) = next else {
                self.outgoing_bytes -= first.bytes;
                self.outgoing.pop_front();
                continue;
            };
            let kind = (first.version, message.kind);
            let names = (message.sequence, message.timestamp_us);
            let len = write_message(buffer, kind, names, &[&message.payload]);
            return Some((first.client, len));
        }
        None
    }
}

/// True if an answer of so many Chunks may fit one v5.0.0 datagram. Longer ones pass as the Chunks that they
/// are.
fn may_fit_one(total: u16) -> bool {
    (usize::from(total) - 1) * chunk::MAX_DATA < Version::V5_0.max_payload()
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
/// Minimum time for which a head is believed to speak a version that it spoke.
const VERSION_MEMORY: Duration = Duration::from_secs(60);
/// Of so many rounds of probes, one asks also in the version that a head is not known to speak.
pub(super) const SELDOM: u32 = 20;

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
            .filter(|_| translator.queue(to(Version::V5_1), payload.clone()))
            .count();
        assert_eq!(queued, OUTGOING_BYTES / 60_000);
        let mut sent = 0;
        while let Some((_, len)) = translator.poll(&mut buffer) {
            assert!(len <= Version::V5_1.header_len() + Version::V5_1.max_answer());
            sent += 1;
        }
        assert_eq!(sent, queued * 60_000usize.div_ceil(chunk::MAX_DATA));
        assert_eq!(translator.outgoing_bytes, 0);
        assert!(translator.queue(to(Version::V5_1), payload));
    }
}
