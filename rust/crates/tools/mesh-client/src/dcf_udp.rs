//! A task over DCF/UDP: one Task datagram out, Partials while the answer grows if they were asked for, one Result in the end.
//!
//! A datagram may be lost, so the Task is repeated until something comes back; the head knows a repeated Task
//! by address and sequence and does not run it twice. A long answer comes in Chunks. Where some are missing
//! when no more come, the Task is repeated, too: the head then sends the answer again, and earlier Chunks
//! count. A shim that has not seen this address before may send a Challenge first, which is echoed.
//!
//! Tasks are sent in DCF v5.0.0, which every shim and head of ours understands. Where nothing at all comes back, the client
//! finds out by Health whether its peer speaks v5.1 only, and goes on in that version.
//!
//! A client that holds an API key or a curtain token may open a session with a head first
//! ([`DcfClient::sealed`]). Then each of these messages is sealed into a datagram.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use dcf::chunk::{Chunk, ChunkError, Limits, Reassembler};
use dcf::{ErrorCode, Message, MsgType, Version};
use mesh_base::clock::timestamp_us;
use mesh_base::{addresses, listen};
use mesh_net::quic::{SessionError, open_session};
use mesh_net::sealed::{MAX_SEALED_PAYLOAD, SealedSession};
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
    /// The session that seals the datagrams.
    session: Option<SealedSession>,
}

/// A head's QUIC port and what a client needs to open a session there.
#[derive(Clone, Copy)]
pub struct SealedTarget<'a> {
    /// `host:port` of the head's QUIC port.
    pub head: &'a str,
    /// SHA-256 of the mesh root's certificate, by which the head is recognised.
    pub root: &'a [u8; 32],
    /// Text of the API key or curtain token.
    pub credential: &'a str,
    /// Tenant to act for; empty for that of the key or token.
    pub tenant: &'a str,
}

/// The whole answer to one task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Text of the whole answer.
    pub text: String,
    /// The whole answer where it is no text; then `text` is what came before.
    pub file: Option<Bytes>,
    /// From the first Task datagram to the first piece of text.
    pub first_text: Duration,
    /// From the first Task datagram to the end.
    pub total: Duration,
    /// Number of received Partials.
    pub partials: u32,
    /// Task datagrams that were sent beyond the first.
    pub repeats: u32,
}

impl Answer {
    fn text_only(self) -> Result<Self, DcfError> {
        match &self.file {
            None => Ok(self),
            Some(file) => {
                let bytes = file.len();
                Err(DcfError::Broken(format!(
                    "the Result has {bytes} bytes that are not UTF-8"
                )))
            }
        }
    }
}

impl DcfClient {
    /// A socket toward `target` (`host:port`). If the name has several addresses, all are probed, and the
    /// first that answers is used.
    ///
    /// # Errors
    /// If the name does not resolve or no socket can be opened.
    pub async fn connect(target: &str) -> Result<Self, DcfError> {
        let unreachable = |error: io::Error| DcfError::unreachable(target, error);
        let found = addresses::resolve(target).await.map_err(unreachable)?;
        let mut failed = None;
        let mut sockets = Vec::new();
        for address in found {
            match connected(address).await {
                Ok(socket) => sockets.push((address, socket)),
                // A machine without IPv6 has no way to such an address.
                Err(error) => failed = Some(unreachable(error)),
            }
        }
        let Some((address, socket)) = first_to_answer(sockets).await else {
            let nobody = || DcfError::unreachable(target, NO_LISTENER);
            return Err(failed.unwrap_or_else(nobody));
        };
        // A long answer comes faster than a busy program reads. The system may grant less.
        let _ = SockRef::from(&socket).set_recv_buffer_size(RECV_BUFFER);
        Ok(Self {
            socket,
            target: address,
            next_sequence: timestamp_us() as u32,
            version: None,
            session: None,
        })
    }

    /// A socket toward a head with which a session was opened. It ends with the key or token, after a day at
    /// the latest, and when nothing is sent for long; then tasks fail, and another session is needed.
    ///
    /// # Errors
    /// If the head cannot be reached, is of another mesh, or does not accept the key or token.
    pub async fn sealed(target: SealedTarget<'_>) -> Result<Self, DcfError> {
        let unreachable = |error: io::Error| DcfError::unreachable(target.head, error);
        let found = addresses::resolve(target.head).await.map_err(unreachable)?;
        let asked = open_session(&found, target.root, target.credential, target.tenant);
        let (session, terms) = asked.await?;
        let client = Self::connect(&terms.udp.to_string()).await?;
        Ok(Self {
            session: Some(session),
            ..client.speaking(Version::V5_0)
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
        let answer = self.run(payload, timeout, &mut |_| {}, &mut |_| {}).await?;
        answer.text_only()
    }

    /// Sends a JSON task whose answer is a file: an image. `silence` is how long nothing at all may come.
    ///
    /// # Errors
    /// See [`DcfError`].
    pub async fn ask_file(
        &mut self,
        task: &impl Serialize,
        silence: Duration,
    ) -> Result<Bytes, DcfError> {
        let payload = with_acks(task)?;
        let answer = self.run(payload, silence, &mut |_| {}, &mut |_| {}).await?;
        Ok(answer.file.unwrap_or_else(|| answer.text.into()))
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
        let on_wait = &mut |_: &str| {};
        self.ask_and_watch(task, silence, on_text, on_wait).await
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
        let payload = with_acks(task)?;
        let answer = self.run(payload, silence, on_text, on_wait).await?;
        answer.text_only()
    }

    async fn run(
        &mut self,
        payload: Bytes,
        silence: Duration,
        on_text: &mut dyn FnMut(&str),
        on_wait: &mut dyn FnMut(&str),
    ) -> Result<Answer, DcfError> {
        let mut version = self.version.unwrap_or_default();
        let longest = match self.session {
            Some(_) => MAX_SEALED_PAYLOAD,
            None => version.max_payload(),
        };
        if payload.len() > longest {
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
            let len = received.map_err(|error| self.failure(error))?;
            let Some(datagram) = self.opened(Bytes::copy_from_slice(&buffer[..len])) else {
                continue;
            };
            let Ok((spoken, message)) = Message::decode_versioned(datagram) else {
                continue;
            };
            if self.session.is_some() && message.sequence == 0 {
                end_of_session(&message)?;
            }
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
    async fn probe(&mut self, sequence: u32, repeats: u32) -> Result<(), DcfError> {
        let version = match (self.version, repeats) {
            (None, 1) => Version::V5_0,
            (None, 2..) => Version::V5_1,
            _ => return Ok(()),
        };
        let health = Message::new(MsgType::HEALTH, sequence, timestamp_us(), Bytes::new());
        self.send(&health, version).await
    }

    async fn send(&mut self, message: &Message, version: Version) -> Result<(), DcfError> {
        // A peer that first verifies our address replies with at most as many bytes as it received. Bytes
        // behind the payload are ignored.
        let datagram = match &mut self.session {
            Some(session) => {
                let sealed = session.seal(message, LEAST_DATAGRAM, Instant::now());
                let sealed = sealed.map_err(|error| DcfError::Task(error.to_string()))?;
                sealed.encode_datagram().to_vec()
            }
            None => {
                let mut datagram = message.encode_as(version).to_vec();
                datagram.resize(datagram.len().max(LEAST_DATAGRAM), 0);
                datagram
            }
        };
        let sent = self.socket.send(&datagram).await;
        sent.map(drop).map_err(|error| self.failure(error))
    }

    /// The datagram inside a sealed one; plain ones are not looked at in a session.
    fn opened(&mut self, datagram: Bytes) -> Option<Bytes> {
        let Some(session) = &mut self.session else {
            return Some(datagram);
        };
        let message = Message::decode_datagram(datagram).ok()?;
        session.open(&message, Instant::now()).ok()
    }

    fn failure(&self, error: io::Error) -> DcfError {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => DcfError::unreachable(self.target, NO_LISTENER),
            _ => error.into(),
        }
    }
}

/// An Error with sequence 0 ends the session.
fn end_of_session(message: &Message) -> Result<(), DcfError> {
    match message.error_body() {
        Some(error) => Err(DcfError::Refused {
            code: error.code,
            text: error.text.into_owned(),
        }),
        None => Ok(()),
    }
}

const NO_LISTENER: &str = "nothing listens on that UDP port";

/// Bytes of the shortest datagram that is sent: those of a Challenge.
const LEAST_DATAGRAM: usize = 64;

/// Connected, so that the system reports a port without listener, and drops datagrams from other senders.
async fn connected(address: SocketAddr) -> io::Result<UdpSocket> {
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
    let refused = |result: io::Result<usize>| {
        result.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    };
    let mut buffer = [0; 64];
    let mut looks = 0;
    // One alone is used as it is: its task finds out.
    while sockets.len() > 1 && tokio::time::Instant::now() < deadline {
        let ask_again = looks % PROBES_BETWEEN == 0;
        let question = &questions[looks / PROBES_BETWEEN % questions.len()];
        looks += 1;
        for (address, socket) in std::mem::take(&mut sockets) {
            let lost = ask_again && refused(socket.send(question).await);
            let received = socket.try_recv(&mut buffer);
            if received.is_ok() {
                return Some((address, socket));
            }
            if !lost && !refused(received) {
                sockets.push((address, socket));
            }
        }
        tokio::time::sleep(PROBE_PAUSE).await;
    }
    sockets.into_iter().next()
}

/// Errors of a task over DCF/UDP.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum DcfError {
    /// The name does not resolve, or the peer refuses datagrams.
    #[error("cannot reach {address} over UDP: {reason}")]
    Unreachable { address: String, reason: String },
    /// No answer in time.
    #[error("nothing came from {address} for {waited:?} ({received} bytes of text had come)")]
    Timeout {
        address: SocketAddr,
        /// Silence before the client gave up.
        waited: Duration,
        /// Bytes of text that Partials had brought.
        received: usize,
    },
    /// The mesh answered with an Error.
    #[error("{code}: {text}")]
    Refused { code: ErrorCode, text: String },
    /// More than a datagram holds.
    #[error(
        "the task has {len} bytes, a datagram holds {limit}; use the HTTP API for it",
        limit = dcf::MAX_DATAGRAM_PAYLOAD
    )]
    TaskTooLong { len: usize },
    /// The task is not a JSON object.
    #[error("the task cannot be written as a JSON object: {0}")]
    Task(String),
    /// The answer violates the protocol.
    #[error("the answer is broken: {0}")]
    Broken(String),
    /// There is no session.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// An I/O error of the socket.
    #[error("UDP socket: {0}")]
    Io(#[from] io::Error),
}

impl DcfError {
    fn unreachable(address: impl ToString, reason: impl ToString) -> Self {
        Self::Unreachable {
            address: address.to_string(),
            reason: reason.to_string(),
        }
    }
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
        let ends = now + wait;
        Self { wait, ends }
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
                    let offset = partial.offset as usize;
                    self.early.insert(offset, partial.text.to_owned());
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
                let broken = || DcfError::Broken("an Error without a code".to_owned());
                let body = message.error_body().ok_or_else(broken)?;
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
        let Ok(whole) = std::str::from_utf8(payload) else {
            let mut answer = self.answer(now);
            answer.file = Some(Bytes::copy_from_slice(payload));
            return Ok(Step::Done(answer));
        };
        let Some(rest) = whole.strip_prefix(self.text.as_str()) else {
            return Err(DcfError::Broken(
                "the Result does not begin with the text of its Partials".to_owned(),
            ));
        };
        if !rest.is_empty() {
            self.give(rest, now, on_text);
        }
        Ok(Step::Done(self.answer(now)))
    }

    fn answer(&mut self, now: Instant) -> Answer {
        Answer {
            text: std::mem::take(&mut self.text),
            file: None,
            first_text: self.first_text.unwrap_or(now) - self.started,
            total: now - self.started,
            partials: self.partials,
            repeats: 0,
        }
    }

    fn give(&mut self, new: &str, now: Instant, on_text: &mut dyn FnMut(&str)) {
        self.first_text.get_or_insert(now);
        self.text.push_str(new);
        on_text(new);
    }
}

/// The payload of a JSON task that asks for Acks.
fn with_acks(task: &impl Serialize) -> Result<Bytes, DcfError> {
    let task = serde_json::to_value(task).map_err(|error| DcfError::Task(error.to_string()))?;
    let Value::Object(mut task) = task else {
        return Err(DcfError::Task("it is not an object".to_owned()));
    };
    task.insert("ack".to_owned(), true.into());
    Ok(Bytes::from(Value::Object(task).to_string()))
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
const PROBES_BETWEEN: usize = 20;

#[cfg(test)]
mod tests;
