//! A task over DCF/UDP: one Task datagram out, Partials while the answer grows if they were asked for, one Result in the end.
//!
//! A datagram may be lost, so the Task is repeated until something comes back; the head knows a repeated Task
//! by address and sequence and does not run it twice. A long answer comes in Chunks. Where some are missing
//! when no more come, the Task is repeated, too: the head then sends the answer again, and earlier Chunks
//! count. A shim that has not seen this address before may send a Challenge first, which is echoed.
//!
//! Tasks are sent in DCF v5.0.0, which every shim and head of ours understands. Where nothing at all comes back, the client
//! finds out by Health whether its peer speaks v5.1 only, and goes on in that version.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use dcf::chunk::{Chunk, ChunkError, Limits, Reassembler};
use dcf::{ErrorCode, Message, MsgType, Version};
use mesh_base::clock::timestamp_us;
use mesh_base::{addresses, listen};
use serde::Serialize;
use serde_json::Value;
use socket2::SockRef;
use tokio::net::UdpSocket;

/// One client socket, toward one shim or head.
#[derive(Debug)]
pub struct DcfClient {
    socket: UdpSocket,
    target: SocketAddr,
    next_sequence: u32,
    /// The version that the peer is known to speak.
    version: Option<Version>,
}

/// The whole answer to one task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Text of the whole answer.
    pub text: String,
    /// From the first Task datagram to the first piece of text.
    pub first_text: Duration,
    /// From the first Task datagram to the end.
    pub total: Duration,
    /// Number of received Partials.
    pub partials: u32,
    /// Task datagrams that were sent beyond the first.
    pub repeats: u32,
}

impl DcfClient {
    /// A socket toward `target` (`host:port`). If the name has several addresses, all are probed, and the
    /// first that answers is used.
    ///
    /// # Errors
    /// If the name does not resolve or no socket can be opened.
    pub async fn connect(target: &str) -> Result<Self, DcfError> {
        let unreachable = |reason: String| DcfError::Unreachable {
            address: target.to_owned(),
            reason,
        };
        let found = addresses::resolve(target)
            .await
            .map_err(|error| unreachable(error.to_string()))?;
        let mut failed = None;
        let mut sockets = Vec::new();
        for address in found {
            match connected(address).await {
                Ok(socket) => sockets.push((address, socket)),
                // A machine without IPv6 has no way to such an address.
                Err(error) => failed = Some(unreachable(error.to_string())),
            }
        }
        let Some((address, socket)) = first_to_answer(sockets).await else {
            let nobody = || unreachable("nothing listens on that UDP port".to_owned());
            return Err(failed.unwrap_or_else(nobody));
        };
        // A long answer comes faster than a busy program reads. The system may grant less.
        let _ = SockRef::from(&socket).set_recv_buffer_size(RECV_BUFFER);
        Ok(Self {
            socket,
            target: address,
            next_sequence: timestamp_us() as u32,
            version: None,
        })
    }

    /// The same client, toward a peer that is known to speak this version.
    #[must_use]
    pub fn speaking(self, version: Version) -> Self {
        Self {
            version: Some(version),
            ..self
        }
    }

    /// The version that the peer is known to speak; `None` before its first message.
    #[must_use]
    pub fn version(&self) -> Option<Version> {
        self.version
    }

    /// Sends `prompt` without a JSON envelope, like a v5.0.0 client, and waits for the answer.
    ///
    /// # Errors
    /// See [`DcfError`].
    pub async fn ask_plain(&mut self, prompt: &str, timeout: Duration) -> Result<Answer, DcfError> {
        let payload = Bytes::copy_from_slice(prompt.as_bytes());
        self.run(payload, timeout, &mut |_| {}, &mut |_| {}).await
    }

    /// Sends a JSON task (`prompt` or `messages`, and parameters); `on_text` sees the answer's text piece by piece, in
    /// order and complete, if the task has `"stream": true`, else at once. `"ack": true` is set here, so that a head which
    /// works on the task says so when the task is repeated. The answer may take as long as it takes: `silence` is how long nothing
    /// at all may come.
    ///
    /// # Errors
    /// See [`DcfError`].
    pub async fn ask(
        &mut self,
        task: &impl Serialize,
        silence: Duration,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<Answer, DcfError> {
        self.ask_and_watch(task, silence, on_text, &mut |_| {})
            .await
    }

    /// As [`DcfClient::ask`]; `on_wait` receives the reason why the task waits, in the head's words.
    ///
    /// # Errors
    /// See [`DcfError`].
    pub async fn ask_and_watch(
        &mut self,
        task: &impl Serialize,
        silence: Duration,
        on_text: &mut dyn FnMut(&str),
        on_wait: &mut dyn FnMut(&str),
    ) -> Result<Answer, DcfError> {
        let task = serde_json::to_value(task).map_err(|error| DcfError::Task(error.to_string()))?;
        let Value::Object(mut task) = task else {
            return Err(DcfError::Task("it is not an object".to_owned()));
        };
        task.insert("ack".to_owned(), true.into());
        let payload = Bytes::from(Value::Object(task).to_string());
        self.run(payload, silence, on_text, on_wait).await
    }

    async fn run(
        &mut self,
        payload: Bytes,
        silence: Duration,
        on_text: &mut dyn FnMut(&str),
        on_wait: &mut dyn FnMut(&str),
    ) -> Result<Answer, DcfError> {
        let mut version = self.version.unwrap_or_default();
        if payload.len() > version.max_payload() {
            return Err(DcfError::TaskTooLong { len: payload.len() });
        }
        let sequence = self.next_sequence;
        self.next_sequence = sequence.wrapping_add(1);
        let task = Message::new(MsgType::TASK, sequence, timestamp_us(), payload);

        let started = Instant::now();
        let mut deadline = started + silence;
        let mut incoming = Incoming::new(sequence, started, silence);
        let mut patience = Patience::new(started);
        let mut repeats = 0;
        let mut buffer = vec![0; dcf::MAX_DATAGRAM];
        self.send(&task, version).await?;
        loop {
            let now = Instant::now();
            if now >= deadline {
                return Err(DcfError::Timeout {
                    address: self.target,
                    waited: silence,
                    received: incoming.text.len(),
                });
            }
            if patience.is_over(now) {
                self.send(&task, version).await?;
                repeats += 1;
                patience.repeated(now);
                self.probe(sequence, repeats).await?;
            }
            let until = tokio::time::Instant::from_std(patience.ends.min(deadline));
            let Ok(received) = tokio::time::timeout_at(until, self.socket.recv(&mut buffer)).await
            else {
                continue;
            };
            let len = match received {
                Ok(len) => len,
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                    return Err(DcfError::Unreachable {
                        address: self.target.to_string(),
                        reason: "nothing listens on that UDP port".to_owned(),
                    });
                }
                Err(error) => return Err(error.into()),
            };
            let received = Message::decode_versioned(Bytes::copy_from_slice(&buffer[..len]));
            let Ok((spoken, message)) = received else {
                continue;
            };
            let first_word = self.version.is_none();
            self.version.get_or_insert(spoken);
            if first_word && spoken != version && task.payload.len() <= spoken.max_payload() {
                // It could not read the messages sent so far.
                version = spoken;
                self.send(&task, version).await?;
            }
            let step = incoming.take(&message, Instant::now(), on_text)?;
            if !matches!(step, Step::Nothing) {
                deadline = Instant::now() + silence;
            }
            match step {
                Step::Nothing => {}
                Step::Waits(what) => {
                    patience.at_work(Instant::now());
                    on_wait(&what);
                }
                Step::Progress => patience.at_work(Instant::now()),
                Step::Piece => patience.arriving(Instant::now()),
                Step::Challenge(reply) => {
                    self.send(&reply, version).await?;
                    self.send(&task, version).await?;
                }
                Step::Done(mut answer) => {
                    answer.repeats = repeats;
                    return Ok(answer);
                }
            }
        }
    }

    /// Asks a peer that has said nothing yet which version it speaks: first in the version that the task went in, so that a
    /// peer of both is not asked to run it twice, and only if that is not answered in the other one.
    async fn probe(&self, sequence: u32, repeats: u32) -> Result<(), DcfError> {
        let version = match (self.version, repeats) {
            (None, 1) => Version::V5_0,
            (None, 2..) => Version::V5_1,
            _ => return Ok(()),
        };
        let health = Message::new(MsgType::HEALTH, sequence, timestamp_us(), Bytes::new());
        self.send(&health, version).await
    }

    async fn send(&self, message: &Message, version: Version) -> Result<(), DcfError> {
        let mut datagram = message.encode_as(version).to_vec();
        // A peer that first verifies our address replies with at most as many bytes as it received. Bytes
        // behind the payload are ignored.
        datagram.resize(datagram.len().max(LEAST_DATAGRAM), 0);
        match self.socket.send(&datagram).await {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                Err(DcfError::Unreachable {
                    address: self.target.to_string(),
                    reason: "nothing listens on that UDP port".to_owned(),
                })
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Bytes of the shortest datagram that is sent: those of a Challenge.
const LEAST_DATAGRAM: usize = 64;

/// Connected, so that the system reports a port without listener, and drops datagrams from other senders.
async fn connected(address: SocketAddr) -> std::io::Result<UdpSocket> {
    let socket = UdpSocket::bind(listen::toward(address)).await?;
    socket.connect(address).await?;
    Ok(socket)
}

/// The first of several sockets whose peer answers; where none does in time, the first whose peer does not refuse: one of DCF
/// v5.0.0 answers no Health. `None`: all refuse.
async fn first_to_answer(
    mut sockets: Vec<(SocketAddr, UdpSocket)>,
) -> Option<(SocketAddr, UdpSocket)> {
    let question = Message::new(MsgType::HEALTH, 0, timestamp_us(), Bytes::new());
    // It is not known yet which version the peer speaks.
    let questions = [Version::V5_0, Version::V5_1].map(|version| question.encode_as(version));
    let deadline = tokio::time::Instant::now() + PROBE_TIME;
    let refused = |result: std::io::Result<usize>| {
        result.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
    };
    let mut asked = 0;
    // One alone is used as it is: its task finds out.
    while sockets.len() > 1 && tokio::time::Instant::now() < deadline {
        let mut answered = None;
        let mut buffer = [0; 64];
        let ask_again = asked % PROBES_BETWEEN == 0;
        let question = &questions[(asked / PROBES_BETWEEN) as usize % questions.len()];
        asked += 1;
        let mut index = 0;
        while index < sockets.len() && answered.is_none() {
            let socket = &sockets[index].1;
            let lost = ask_again && refused(socket.send(question).await);
            let received = socket.try_recv(&mut buffer);
            if received.is_ok() {
                answered = Some(index);
            } else if lost || refused(received) {
                drop(sockets.remove(index));
            } else {
                index += 1;
            }
        }
        if let Some(index) = answered {
            return Some(sockets.swap_remove(index));
        }
        tokio::time::sleep(PROBE_PAUSE).await;
    }
    (!sockets.is_empty()).then(|| sockets.swap_remove(0))
}

/// Errors of a task over DCF/UDP.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DcfError {
    /// The name does not resolve, or the peer refuses datagrams.
    #[error("cannot reach {address} over UDP: {reason}")]
    Unreachable {
        /// Address or name of the peer.
        address: String,
        /// The operating system's error message.
        reason: String,
    },
    /// No answer in time.
    #[error("nothing came from {address} for {waited:?} ({received} bytes of text had come)")]
    Timeout {
        /// Address of the peer.
        address: SocketAddr,
        /// Silence before the client gave up.
        waited: Duration,
        /// Bytes of text that Partials had brought.
        received: usize,
    },
    /// The mesh answered with an Error.
    #[error("{code}: {text}")]
    Refused {
        /// Code of the Error message.
        code: ErrorCode,
        /// Text of the Error message.
        text: String,
    },
    /// More than a datagram holds.
    #[error(
        "the task has {len} bytes, a datagram holds {limit}; use the HTTP API for it",
        limit = dcf::MAX_DATAGRAM_PAYLOAD
    )]
    TaskTooLong {
        /// Bytes of the task.
        len: usize,
    },
    /// The task is not a JSON object.
    #[error("the task cannot be written as a JSON object: {0}")]
    Task(String),
    /// The answer violates the protocol.
    #[error("the answer is broken: {0}")]
    Broken(String),
    /// An I/O error of the socket.
    #[error("UDP socket: {0}")]
    Io(#[from] std::io::Error),
}

/// Timer for repeats of a Task; no socket, no clock.
struct Patience {
    wait: Duration,
    ends: Instant,
}

impl Patience {
    fn new(now: Instant) -> Self {
        Self::of(FIRST_REPEAT, now)
    }

    fn of(wait: Duration, now: Instant) -> Self {
        Self {
            wait,
            ends: now + wait,
        }
    }

    fn is_over(&self, now: Instant) -> bool {
        now >= self.ends
    }

    fn repeated(&mut self, now: Instant) {
        *self = Self::of((self.wait * 2).min(LONGEST_REPEAT), now);
    }

    /// Something works on the Task: no need to ask again soon.
    fn at_work(&mut self, now: Instant) {
        *self = Self::of(LONGEST_REPEAT, now);
    }

    /// The answer is on its way, and its Chunks follow each other closely: when they stop before it is whole, some were
    /// lost.
    fn arriving(&mut self, now: Instant) {
        *self = Self::of(FIRST_REPEAT, now);
    }
}

/// The received part of one answer; no socket, no clock.
struct Incoming {
    sequence: u32,
    started: Instant,
    first_text: Option<Instant>,
    /// Text from the start, without gaps, already given to the caller.
    text: String,
    /// Partials that came before their predecessors.
    early: BTreeMap<usize, String>,
    partials: u32,
    chunks: Reassembler<()>,
}

enum Step {
    Nothing,
    /// The mesh works on it.
    Progress,
    /// The mesh has the task; the reason why it waits.
    Waits(String),
    /// A part of the finished answer.
    Piece,
    Challenge(Message),
    Done(Answer),
}

impl Incoming {
    /// Most Partials kept out of order; a lost one is made up for by the Result anyway.
    const MAX_EARLY: usize = 1_024;

    /// Nothing yet. Chunks count for as long as the answer is waited for.
    fn new(sequence: u32, started: Instant, timeout: Duration) -> Self {
        Self {
            sequence,
            started,
            first_text: None,
            text: String::new(),
            early: BTreeMap::new(),
            partials: 0,
            chunks: Reassembler::new(Limits {
                max_messages: 1,
                max_payload: dcf::chunk::MAX_PAYLOAD,
                max_bytes: 2 * dcf::chunk::MAX_PAYLOAD,
                timeout,
            }),
        }
    }

    fn take(
        &mut self,
        message: &Message,
        now: Instant,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<Step, DcfError> {
        if message.sequence != self.sequence {
            return Ok(Step::Nothing);
        }
        match message.kind {
            MsgType::PARTIAL => {
                let Some(partial) = message.partial_body() else {
                    return Ok(Step::Nothing);
                };
                self.partials += 1;
                if self.early.len() < Self::MAX_EARLY {
                    self.early
                        .insert(partial.offset as usize, partial.text.to_owned());
                }
                self.advance(now, on_text);
                Ok(Step::Progress)
            }
            MsgType::ACK => Ok(match std::str::from_utf8(&message.payload) {
                Ok(what) if !what.is_empty() => Step::Waits(plain(what)),
                _ => Step::Progress,
            }),
            MsgType::CHALLENGE => Ok(Step::Challenge(Message::new(
                MsgType::CHALLENGE_REPLY,
                message.sequence,
                message.timestamp_us,
                message.payload.clone(),
            ))),
            // A v5.0.0 head forwards results with the type of a Task.
            MsgType::RESULT | MsgType::TASK => self.end(&message.payload, now, on_text),
            MsgType::CHUNK => match self.chunk(message, now) {
                // Damaged on its way: it is all to come again.
                Ok(None) | Err(ChunkError::Corrupt { .. }) => Ok(Step::Piece),
                Ok(Some(payload)) => self.end(&payload, now, on_text),
                Err(error) => Err(DcfError::Broken(error.to_string())),
            },
            MsgType::ERROR => {
                let body = message
                    .error_body()
                    .ok_or_else(|| DcfError::Broken("an Error without a code".to_owned()))?;
                Err(DcfError::Refused {
                    code: body.code,
                    text: body.text.into_owned(),
                })
            }
            _ => Ok(Step::Nothing),
        }
    }

    /// The whole payload, if this was the last Chunk missing.
    fn chunk(&mut self, message: &Message, now: Instant) -> Result<Option<Bytes>, ChunkError> {
        let chunk = Chunk::parse(&message.payload)?;
        match self.chunks.push((), &chunk, now) {
            // The Task ran again, for instance at another head, and this is another answer than that which broke off.
            Err(ChunkError::Conflict) => {
                self.chunks.remove(&());
                self.chunks.push((), &chunk, now)
            }
            other => other,
        }
    }

    fn advance(&mut self, now: Instant, on_text: &mut dyn FnMut(&str)) {
        while let Some(entry) = self.early.first_entry() {
            let offset = *entry.key();
            if offset > self.text.len() {
                return;
            }
            let piece = entry.remove();
            // A repeat, or one that overlaps the text so far: only the new part counts.
            if let Some(new) = piece.get(self.text.len() - offset..)
                && !new.is_empty()
            {
                self.give(new, now, on_text);
            }
        }
    }

    fn end(
        &mut self,
        payload: &[u8],
        now: Instant,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<Step, DcfError> {
        let whole = std::str::from_utf8(payload)
            .map_err(|error| DcfError::Broken(format!("the Result is not UTF-8: {error}")))?;
        let Some(rest) = whole.strip_prefix(self.text.as_str()) else {
            return Err(DcfError::Broken(
                "the Result does not begin with the text of its Partials".to_owned(),
            ));
        };
        if !rest.is_empty() {
            self.give(rest, now, on_text);
        }
        Ok(Step::Done(Answer {
            text: std::mem::take(&mut self.text),
            first_text: self.first_text.unwrap_or(now) - self.started,
            total: now - self.started,
            partials: self.partials,
            repeats: 0,
        }))
    }

    fn give(&mut self, new: &str, now: Instant, on_text: &mut dyn FnMut(&str)) {
        self.first_text.get_or_insert(now);
        self.text.push_str(new);
        on_text(new);
    }
}

/// Text of another machine that is to be shown: without anything that steers a terminal, and not long.
fn plain(text: &str) -> String {
    let text = text.chars().filter(|c| !c.is_control());
    text.take(LONGEST_WAIT).collect()
}

/// Most characters of the reason why a task waits.
const LONGEST_WAIT: usize = 120;

/// First wait before a Task is repeated; it doubles up to [`LONGEST_REPEAT`].
const FIRST_REPEAT: Duration = Duration::from_millis(500);
const LONGEST_REPEAT: Duration = Duration::from_secs(5);
const RECV_BUFFER: usize = 4 << 20;

/// Time limit for the answers of several addresses.
const PROBE_TIME: Duration = Duration::from_millis(500);
const PROBE_PAUSE: Duration = Duration::from_millis(5);
/// Looks between two questions.
const PROBES_BETWEEN: u32 = 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn incoming() -> (Incoming, Instant) {
        let now = Instant::now();
        (Incoming::new(7, now, Duration::from_secs(60)), now)
    }

    fn feed(
        incoming: &mut Incoming,
        message: Message,
        seen: &mut String,
    ) -> Result<Step, DcfError> {
        let now = incoming.started + Duration::from_millis(5);
        incoming.take(&message, now, &mut |text| seen.push_str(text))
    }

    fn result(text: &str) -> Message {
        Message::new(MsgType::RESULT, 7, 0, text.to_owned())
    }

    #[test]
    fn partials_in_any_order_and_repeated_give_the_text_once() {
        let (mut incoming, _) = incoming();
        let mut seen = String::new();
        for (offset, text) in [
            (2, "llo"),
            (0, "he"),
            (2, "llo"),
            (9, "lost its turn"),
            (5, " w"),
        ] {
            feed(
                &mut incoming,
                Message::partial(7, 0, offset, text),
                &mut seen,
            )
            .expect("text");
        }
        assert_eq!(seen, "hello w");
        let done = feed(&mut incoming, result("hello world"), &mut seen).expect("an answer");
        assert_eq!(seen, "hello world");
        let Step::Done(answer) = done else {
            panic!("not done")
        };
        assert_eq!((answer.text.as_str(), answer.partials), ("hello world", 5));
    }

    #[test]
    fn a_partial_that_cuts_a_character_of_ours_is_left_out() {
        let (mut incoming, _) = incoming();
        let mut seen = String::new();
        feed(&mut incoming, Message::partial(7, 0, 0, "e"), &mut seen).expect("text");
        feed(&mut incoming, Message::partial(7, 0, 0, "é"), &mut seen).expect("ignored");
        assert_eq!(seen, "e");
    }

    #[test]
    fn answers_to_other_tasks_are_not_ours() {
        let (mut incoming, _) = incoming();
        let other = Message::new(MsgType::RESULT, 8, 0, "no");
        let step = feed(&mut incoming, other, &mut String::new()).expect("ignored");
        assert!(matches!(step, Step::Nothing));
    }

    #[test]
    fn a_result_that_contradicts_its_partials_is_an_error() {
        let (mut incoming, _) = incoming();
        let mut seen = String::new();
        feed(&mut incoming, Message::partial(7, 0, 0, "hel"), &mut seen).expect("text");
        let error = feed(&mut incoming, result("other"), &mut seen).err();
        assert!(matches!(error, Some(DcfError::Broken(_))));
    }

    #[test]
    fn a_long_answer_in_chunks_is_put_together() {
        let (mut incoming, _) = incoming();
        let mut seen = String::new();
        let text = "a long answer ".repeat(10_000);
        let chunks = dcf::chunk::split(7, 0, text.clone().into()).expect("fits");
        let mut last = Step::Nothing;
        for chunk in chunks {
            last = feed(&mut incoming, chunk, &mut seen).expect("a chunk");
        }
        assert!(matches!(last, Step::Done(_)));
        assert_eq!(seen, text);
    }

    #[test]
    fn chunks_of_several_sendings_make_one_answer_however_long_it_takes() {
        let (mut incoming, start) = incoming();
        let mut seen = String::new();
        let text = "a long answer ".repeat(10_000);
        let chunks: Vec<Message> = dcf::chunk::split(7, 0, text.clone().into())
            .expect("fits")
            .collect();
        let mut last = Step::Nothing;
        for (round, seconds) in [(0, 1), (1, 30), (2, 59)] {
            for chunk in chunks.iter().skip(round).step_by(3) {
                let now = start + Duration::from_secs(seconds);
                let step = incoming.take(chunk, now, &mut |text| seen.push_str(text));
                last = step.expect("a chunk");
            }
        }
        assert!(matches!(last, Step::Done(_)));
        assert_eq!(seen, text);
    }

    #[test]
    fn chunks_of_another_answer_take_the_place_of_one_that_broke_off() {
        let (mut incoming, _) = incoming();
        let mut seen = String::new();
        let text = |word: &str| word.repeat(1_000);
        let split = |text: String| dcf::chunk::split(7, 0, text.into()).expect("fits");
        let old = split(text("old")).next().expect("a chunk");
        let step = feed(&mut incoming, old, &mut seen).expect("a chunk");
        assert!(matches!(step, Step::Piece));
        let mut last = Step::Nothing;
        for chunk in split(text("new")) {
            last = feed(&mut incoming, chunk, &mut seen).expect("a chunk");
        }
        assert!(matches!(last, Step::Done(_)));
        assert_eq!(seen, text("new"));
    }

    #[test]
    fn a_task_is_repeated_ever_more_rarely_and_soon_when_an_answer_breaks_off() {
        let start = Instant::now();
        let mut now = start;
        let mut patience = Patience::new(now);
        let mut waits = Vec::new();
        for _ in 0..5 {
            assert!(!patience.is_over(patience.ends - Duration::from_nanos(1)));
            waits.push((patience.ends - now).as_millis());
            now = patience.ends;
            assert!(patience.is_over(now));
            patience.repeated(now);
        }
        assert_eq!(waits, [500, 1_000, 2_000, 4_000, 5_000]);
        patience.at_work(now);
        assert_eq!(patience.ends - now, LONGEST_REPEAT);
        patience.arriving(now);
        assert_eq!(patience.ends - now, FIRST_REPEAT);
    }

    #[test]
    fn a_challenge_is_echoed_with_its_cookie() {
        let (mut incoming, _) = incoming();
        let challenge = Message::new(MsgType::CHALLENGE, 7, 1, vec![1, 2, 3]);
        let step = feed(&mut incoming, challenge, &mut String::new()).expect("a challenge");
        let Step::Challenge(reply) = step else {
            panic!("no reply")
        };
        assert_eq!(reply.kind, MsgType::CHALLENGE_REPLY);
        assert_eq!(&reply.payload[..], [1, 2, 3]);
    }

    #[tokio::test]
    async fn of_several_addresses_the_one_that_answers_is_used() {
        let (silent, there) = (
            UdpSocket::bind("[::1]:0").await.expect("a port"),
            UdpSocket::bind("127.0.0.1:0").await.expect("a port"),
        );
        let closed = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        let gone = closed.local_addr().expect("bound");
        drop(closed);
        let address = |socket: &UdpSocket| socket.local_addr().expect("bound");
        let (silent_at, there_at) = (address(&silent), address(&there));
        let sockets = |all: Vec<SocketAddr>| async move {
            let mut sockets = Vec::new();
            for address in all {
                sockets.push((address, connected(address).await.expect("a socket")));
            }
            sockets
        };
        let answer = tokio::spawn(async move {
            let (_, from) = there.recv_from(&mut [0; 64]).await.expect("a question");
            there.send_to(b"yes", from).await.expect("sent");
        });
        let all = sockets(vec![gone, silent_at, there_at]).await;
        let chosen = first_to_answer(all).await.map(|(address, _)| address);
        assert_eq!(chosen, Some(there_at));
        answer.await.expect("answered");
        // One that cannot answer the question is used if no other is left, and in the end anyway.
        let all = sockets(vec![gone, silent_at]).await;
        let chosen = first_to_answer(all).await.map(|(address, _)| address);
        assert_eq!(chosen, Some(silent_at));
        assert!(
            first_to_answer(sockets(vec![gone, gone]).await)
                .await
                .is_none_or(|(a, _)| a == gone)
        );
    }

    #[tokio::test]
    async fn a_lost_task_is_repeated_with_the_same_sequence() {
        let server = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        let address = server.local_addr().expect("bound").to_string();
        let serve = tokio::spawn(async move {
            let mut buffer = [0; 2048];
            let (len, from) = server.recv_from(&mut buffer).await.expect("first");
            let first = buffer[..len].to_vec();
            let (len, _) = server.recv_from(&mut buffer).await.expect("repeat");
            assert_eq!(first, buffer[..len], "the repeat is the same datagram");
            let task = Message::decode_datagram(first.into()).expect("a task");
            let answer = Message::new(MsgType::RESULT, task.sequence, 0, task.payload);
            server
                .send_to(&answer.encode_datagram(), from)
                .await
                .expect("sent");
        });
        let mut client = DcfClient::connect(&address).await.expect("a socket");
        let answer = client
            .ask_plain("hello", Duration::from_secs(10))
            .await
            .expect("an answer");
        assert_eq!((answer.text.as_str(), answer.repeats), ("hello", 1));
        serve.await.expect("the server");
    }

    /// Answers Health and the Tasks of one version, and hears nothing else.
    async fn peer_of(version: Version) -> (String, tokio::task::JoinHandle<()>) {
        let server = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        let address = server.local_addr().expect("bound").to_string();
        let serve = tokio::spawn(async move {
            let mut buffer = [0; 2048];
            loop {
                let (len, from) = server.recv_from(&mut buffer).await.expect("a datagram");
                let datagram = Bytes::copy_from_slice(&buffer[..len]);
                let Ok((spoken, message)) = Message::decode_versioned(datagram) else {
                    continue;
                };
                if spoken != version {
                    continue;
                }
                let answer = match message.kind {
                    MsgType::TASK => MsgType::RESULT,
                    kind => kind,
                };
                let answer = Message::new(answer, message.sequence, 0, message.payload);
                let _ = server.send_to(&answer.encode_as(version), from).await;
            }
        });
        (address, serve)
    }

    #[tokio::test]
    async fn a_peer_of_v5_1_is_found_out_and_remembered() {
        let (address, serve) = peer_of(Version::V5_1).await;
        let mut client = DcfClient::connect(&address).await.expect("a socket");
        for prompt in ["first", "second"] {
            let answer = client.ask_plain(prompt, Duration::from_secs(30)).await;
            assert_eq!(answer.expect("an answer").text, prompt);
            assert_eq!(client.version(), Some(Version::V5_1));
        }
        let again = DcfClient::connect(&address).await.expect("a socket");
        let mut told = again.speaking(Version::V5_1);
        let answer = told.ask_plain("told", Duration::from_secs(30)).await;
        assert_eq!(answer.expect("an answer").repeats, 0);
        serve.abort();
    }

    #[tokio::test]
    async fn an_answer_may_take_long_while_the_head_says_that_it_works_on_it() {
        let server = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        let address = server.local_addr().expect("bound").to_string();
        let serve = tokio::spawn(async move {
            let mut buffer = [0; 2048];
            let (len, from) = server.recv_from(&mut buffer).await.expect("the task");
            let task = Bytes::copy_from_slice(&buffer[..len]);
            let task = Message::decode_datagram(task).expect("a task");
            for _ in 0..6 {
                tokio::time::sleep(Duration::from_millis(300)).await;
                let ack = Message::new(MsgType::ACK, task.sequence, 0, "for a slot\x1b[2J");
                let _ = server.send_to(&ack.encode_datagram(), from).await;
            }
            let answer = Message::new(MsgType::RESULT, task.sequence, 0, "late");
            let _ = server.send_to(&answer.encode_datagram(), from).await;
            // Then it is gone.
            tokio::time::sleep(Duration::from_secs(30)).await;
        });
        let mut client = DcfClient::connect(&address).await.expect("a socket");
        let silence = Duration::from_millis(1_200);
        let mut waits = Vec::new();
        let task = serde_json::json!({"prompt": "x"});
        let answer = client
            .ask_and_watch(&task, silence, &mut |_| {}, &mut |what| {
                waits.push(what.to_owned())
            })
            .await
            .expect("an answer");
        assert_eq!(answer.text, "late");
        assert!(answer.total > silence, "{:?}", answer.total);
        assert_eq!(waits[0], "for a slot[2J");
        let lost = client.ask(&task, silence, &mut |_| {}).await;
        assert!(matches!(lost, Err(DcfError::Timeout { .. })), "{lost:?}");
        serve.abort();
    }

    #[tokio::test]
    async fn a_task_that_is_not_an_object_is_refused() {
        let server = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        let address = server.local_addr().expect("bound").to_string();
        let mut client = DcfClient::connect(&address).await.expect("a socket");
        let silence = Duration::from_secs(5);
        let error = client.ask(&"a prompt", silence, &mut |_| {}).await;
        assert!(matches!(error, Err(DcfError::Task(_))), "{error:?}");
    }

    #[tokio::test]
    async fn a_port_nobody_listens_on_is_told_at_once() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
        let address = socket.local_addr().expect("bound").to_string();
        drop(socket);
        let mut client = DcfClient::connect(&address).await.expect("a socket");
        let error = client.ask_plain("x", Duration::from_secs(5)).await;
        assert!(
            matches!(error, Err(DcfError::Unreachable { .. })),
            "{error:?}"
        );
    }
}
