//! What the bridge does, without sockets and without a clock.
//!
//! [`Bridge`] is given datagrams and the time and says where each goes. It changes sequences in place, so the caller can
//! send the very buffer it received into. All memory is allocated when the bridge is made.
//!
//! A task goes through like this: the client's address and sequence open a slot in the task table; the slot's own
//! sequence replaces the client's and the datagram goes to the current head; an answer with that sequence finds the slot,
//! gets the client's sequence back and goes to the client's address. The slot then lingers, so that a repeated task has
//! the same sequence toward the head again and the head can tell that it is a repeat.

mod cookie;
mod heads;
mod limiter;
mod retain;
mod table;
mod tasks;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use dcf::{
    DecodeError, ErrorCode, HEADER_LEN, Header, MsgType,
    chunk::{self, CHUNK_HEADER_LEN},
};

pub use cookie::COOKIE_LEN;
pub use heads::HeadState;

use self::{
    cookie::Cookies,
    heads::{Heads, Timing},
    limiter::{RateLimiter, Verdict},
    retain::{Arena, Chain},
    table::FixedTable,
    tasks::{State, Task, TaskId, TaskTable},
};
use crate::{
    config::{Admit, Config},
    stats::{Counter, Drops, Stats},
};

/// The state of a shim.
#[derive(Debug)]
pub struct Bridge {
    config: Config,
    tasks: TaskTable,
    arena: Arena,
    heads: Heads,
    limiter: RateLimiter,
    verified: FixedTable<SocketAddr, Instant>,
    cookies: Cookies,
    started: Instant,
    probes_sent: u32,
    resend: Option<Resend>,
    drain: Drain,
    stats: Arc<Stats>,
}

/// What becomes of a client's datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FromClient {
    /// Nothing.
    Drop,
    /// Its first `len` bytes go to a head.
    Forward {
        /// Index of the head.
        head: usize,
        /// Bytes.
        len: usize,
    },
    /// The client gets the [`Reply`].
    Reply,
}

/// What becomes of a head's datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FromHead {
    /// Nothing.
    Drop,
    /// Its first `len` bytes go to a client.
    Deliver {
        /// Its address.
        client: SocketAddr,
        /// Bytes.
        len: usize,
    },
}

/// A datagram that the bridge sends of its own accord.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// To whom.
    pub to: Destination,
    /// Bytes of the buffer that were filled.
    pub len: usize,
}

/// Where a datagram goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// The head of this index.
    Head(usize),
    /// The client at this address.
    Client(SocketAddr),
}

/// Room for one short answer.
#[derive(Clone, Debug)]
pub struct Reply {
    bytes: [u8; REPLY_LEN],
    len: usize,
}

/// What a bridge keeps to itself; chosen at random for each.
#[derive(Clone)]
pub struct Secrets {
    /// Key of the cookies.
    pub cookie_key: [u8; 32],
    /// Where sequences toward the heads begin: they may still know those of an earlier process.
    pub first_generation: u32,
}

/// The open task that is looked at next for being sent again, and where in its datagrams.
#[derive(Clone, Copy, Debug)]
struct Resend {
    task: TaskId,
    offset: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Drain {
    Serving,
    Draining,
    Abandoning,
}

impl Bridge {
    /// A bridge to as many heads as `config` names.
    pub fn new(config: Config, secrets: &Secrets, stats: Arc<Stats>, now: Instant) -> Self {
        let timing = Timing {
            probe_interval: config.probe_interval,
            timeout: config.head_timeout,
        };
        let verified = if config.admit == Admit::Verified {
            VERIFIED_SOURCES
        } else {
            1
        };
        Self {
            tasks: TaskTable::new(config.max_tasks, secrets.first_generation, now),
            arena: Arena::new(usize::try_from(config.retain_bytes).unwrap_or(usize::MAX)),
            heads: Heads::new(config.heads.len(), timing, now),
            limiter: RateLimiter::new(&config.rate_limit),
            verified: FixedTable::new(verified),
            cookies: Cookies::new(&secrets.cookie_key),
            started: now,
            probes_sent: 0,
            resend: None,
            drain: Drain::Serving,
            stats,
            config,
        }
    }

    /// Takes one datagram of a client. An answer of the bridge itself is written to `reply`.
    pub fn on_client(
        &mut self,
        now: Instant,
        client: SocketAddr,
        datagram: &mut [u8],
        reply: &mut Reply,
    ) -> FromClient {
        self.stats.traffic.from_clients.count();
        self.stats.client_bytes_in.add(datagram.len() as u64);
        let outcome = self.route_client(now, client, datagram, reply);
        match outcome {
            FromClient::Drop => {}
            FromClient::Forward { .. } => self.stats.traffic.to_heads.count(),
            FromClient::Reply => {
                self.stats.traffic.replies.count();
                self.stats.client_bytes_out.add(reply.len as u64);
            }
        }
        outcome
    }

    /// Takes one datagram of the head of this index.
    pub fn on_head(&mut self, now: Instant, head: usize, datagram: &mut [u8]) -> FromHead {
        self.stats.traffic.from_heads.count();
        let outcome = self.route_head(now, head, datagram);
        if let FromHead::Deliver { len, .. } = outcome {
            self.stats.traffic.to_clients.count();
            self.stats.client_bytes_out.add(len as u64);
        }
        outcome
    }

    /// The machine of this head said that nobody listens there.
    pub fn on_head_refused(&mut self, now: Instant, head: usize) {
        self.heads.refused(head);
        self.settle_heads(now);
    }

    /// The next datagram that is due by itself (a probe, a task sent again, the end of one that nobody answers), written
    /// to `buffer`, which holds a whole datagram. To be called until `None` after every batch and at [`Bridge::next_wakeup`].
    pub fn poll_transmit(&mut self, now: Instant, buffer: &mut [u8]) -> Option<Transmit> {
        self.settle_heads(now);
        if let Some(head) = self.heads.poll_probe(now) {
            self.probes_sent = self.probes_sent.wrapping_add(1);
            self.stats.traffic.probes.count();
            let len = write_message(buffer, MsgType::HEALTH, self.probes_sent, 0, &[]);
            return Some(Transmit {
                to: Destination::Head(head),
                len,
            });
        }
        self.forget_answered(now);
        self.poll_expired(now, buffer)
            .or_else(|| self.poll_resend(now, buffer))
    }

    /// When [`Bridge::poll_transmit`] next has something to do, if no datagram comes before.
    #[must_use]
    pub fn next_wakeup(&self) -> Instant {
        let oldest = self
            .tasks
            .first(State::Open)
            .map(|id| self.tasks.get(id).deadline);
        oldest.map_or(self.heads.next_wakeup(), |deadline| {
            deadline.min(self.heads.next_wakeup())
        })
    }

    /// From now on takes no new task; those that are open go on.
    pub fn begin_drain(&mut self) {
        self.drain = Drain::Draining;
    }

    /// Gives the open tasks up: [`Bridge::poll_transmit`] then yields an Error for each.
    pub fn abandon(&mut self) {
        self.drain = Drain::Abandoning;
    }

    /// Tasks that a head works on.
    #[must_use]
    pub fn open_tasks(&self) -> usize {
        self.tasks.count(State::Open)
    }

    /// The index of the head that gets the tasks.
    #[must_use]
    pub fn current_head(&self) -> usize {
        self.heads.current()
    }

    /// What is known of a head.
    #[must_use]
    pub fn head_state(&self, head: usize, now: Instant) -> HeadState {
        self.heads.state(head, now)
    }

    /// Brings the gauges among the counters up to date.
    pub fn publish_gauges(&self, now: Instant) {
        let live = (0..self.heads.len())
            .filter(|&head| self.heads.state(head, now) == HeadState::Live)
            .count();
        self.stats.live_heads.set(live as u64);
        self.stats.current_head.set(self.heads.current() as u64);
        self.stats.open_tasks.set(self.open_tasks() as u64);
    }
}

/// Clients.
impl Bridge {
    fn route_client(
        &mut self,
        now: Instant,
        client: SocketAddr,
        datagram: &mut [u8],
        reply: &mut Reply,
    ) -> FromClient {
        let stats = Arc::clone(&self.stats);
        let header = match check_client_datagram(&stats.drops, client, datagram) {
            Ok(header) => header,
            Err(reason) => {
                reason.count();
                return FromClient::Drop;
            }
        };
        let trusted = self.config.trusts(client.ip());
        if let Verdict::Limited { tell } = self.limiter.check(client.ip(), now) {
            stats.drops.rate_limited.count();
            return if tell && (trusted || self.is_verified(client, now)) {
                reply.error(
                    &header,
                    ErrorCode::RATE_LIMITED,
                    "too many datagrams from your address; slow down",
                )
            } else {
                FromClient::Drop
            };
        }
        if !trusted && let Some(outcome) = self.admit(now, client, &header, datagram, reply) {
            return outcome;
        }
        let datagram = &mut datagram[..HEADER_LEN + header.payload_len as usize];
        match header.kind() {
            MsgType::TASK | MsgType::CHUNK => self.on_task(now, client, &header, datagram, reply),
            MsgType::HEALTH if self.heads.reachable(now) => {
                reply.answer(&header, MsgType::HEALTH, &[])
            }
            MsgType::HEALTH => reply.error(&header, ErrorCode::NO_WORKERS, NO_HEAD),
            MsgType::CHALLENGE_REPLY => reply.answer(&header, MsgType::ACK, &[]),
            _ => self.on_follow_up(client, &header, datagram),
        }
    }

    /// What an untrusted source gets; `None` if it has verified its address and is served like a trusted one.
    fn admit(
        &mut self,
        now: Instant,
        client: SocketAddr,
        header: &Header,
        datagram: &[u8],
        reply: &mut Reply,
    ) -> Option<FromClient> {
        let drops = &self.stats.drops;
        if self.config.admit == Admit::Trusted {
            drops.untrusted.count();
            return Some(FromClient::Drop);
        }
        if header.kind() == MsgType::CHALLENGE_REPLY {
            let cookie = &datagram[HEADER_LEN..][..header.payload_len as usize];
            if !self.cookies.check(cookie, client, now - self.started) {
                drops.bad_cookie.count();
                return Some(FromClient::Drop);
            }
            self.stats.traffic.verified.count();
            *self.verified.get_or_insert(client, now, now) = now;
            return Some(reply.answer(header, MsgType::ACK, &[]));
        }
        if self.is_verified(client, now) {
            return None;
        }
        // Never more bytes out than came in.
        if datagram.len() < HEADER_LEN + COOKIE_LEN {
            self.stats.drops.unverified.count();
            return Some(FromClient::Drop);
        }
        self.stats.traffic.challenges.count();
        let cookie = self.cookies.make(client, now - self.started);
        Some(reply.answer(header, MsgType::CHALLENGE, &cookie))
    }

    fn is_verified(&mut self, client: SocketAddr, now: Instant) -> bool {
        self.config.admit == Admit::Verified
            && self
                .verified
                .get(&client, now)
                .is_some_and(|since| now < *since + VERIFIED_FOR)
    }

    fn on_task(
        &mut self,
        now: Instant,
        client: SocketAddr,
        header: &Header,
        datagram: &mut [u8],
        reply: &mut Reply,
    ) -> FromClient {
        let drops = &self.stats.drops;
        let known = self.tasks.find(client, header.sequence);
        if known.is_none() && self.drain != Drain::Serving {
            drops.draining.count();
            return reply.error(
                header,
                ErrorCode::DRAINING,
                "the shim is shutting down; ask again in a moment",
            );
        }
        if !self.heads.reachable(now) {
            drops.no_head.count();
            return reply.error(header, ErrorCode::NO_WORKERS, NO_HEAD);
        }
        let Some(id) = known.or_else(|| self.open(now, client, header)) else {
            self.stats.drops.table_full.count();
            return reply.error(
                header,
                ErrorCode::WORKER_BUSY,
                "the shim has no room for more tasks; ask again in a moment",
            );
        };
        match known {
            Some(id) if self.tasks.state(id) == State::Answered => self.reopen(now, id),
            _ => {}
        }
        if header.kind() == MsgType::TASK {
            let traffic = &self.stats.traffic;
            if known.is_some() {
                traffic.repeats.count()
            } else {
                traffic.tasks.count()
            }
        }

        set_sequence(datagram, self.tasks.upstream_sequence(id));
        let head = self.heads.current();
        let task = self.tasks.get_mut(id);
        // A repeated Task is retained already; every Chunk is a part of its own.
        let is_new = header.kind() == MsgType::CHUNK || task.retained.len() == 0;
        if is_new && !self.arena.append(&mut task.retained, datagram) {
            task.complete = false;
        }
        if header.kind() == MsgType::TASK {
            (task.head, task.epoch) = (head, self.heads.epoch(head));
        }
        FromClient::Forward {
            head: task.head,
            len: datagram.len(),
        }
    }

    fn open(&mut self, now: Instant, client: SocketAddr, header: &Header) -> Option<TaskId> {
        let head = self.heads.current();
        self.tasks.open(Task {
            client,
            sequence: header.sequence,
            timestamp_us: header.timestamp_us,
            head,
            epoch: self.heads.epoch(head),
            deadline: now + self.config.request_timeout,
            retained: Chain::EMPTY,
            complete: true,
            chunked_answer: false,
        })
    }

    /// The client asks for an answer again that was given already.
    fn reopen(&mut self, now: Instant, id: TaskId) {
        self.tasks
            .set_state(id, State::Open, now + self.config.request_timeout);
        let head = self.heads.current();
        let task = self.tasks.get_mut(id);
        (task.head, task.epoch) = (head, self.heads.epoch(head));
        (task.complete, task.chunked_answer) = (true, false);
    }

    /// Ack, Nack and ChunkAck are about a task that is known, or about nothing.
    fn on_follow_up(
        &mut self,
        client: SocketAddr,
        header: &Header,
        datagram: &mut [u8],
    ) -> FromClient {
        let Some(id) = self.tasks.find(client, header.sequence) else {
            self.stats.drops.no_task.count();
            return FromClient::Drop;
        };
        set_sequence(datagram, self.tasks.upstream_sequence(id));
        FromClient::Forward {
            head: self.tasks.get(id).head,
            len: datagram.len(),
        }
    }
}

/// Heads.
impl Bridge {
    fn route_head(&mut self, now: Instant, head: usize, datagram: &mut [u8]) -> FromHead {
        let Ok(header) = Header::decode_checked(datagram) else {
            self.stats.drops.head_malformed.count();
            return FromHead::Drop;
        };
        if self.heads.heard(head, now) {
            self.restart_resend();
        }
        let datagram = &mut datagram[..HEADER_LEN + header.payload_len as usize];
        match header.kind() {
            MsgType::HEALTH => FromHead::Drop,
            // What a v5.0.0 head answers with.
            MsgType::TASK
            | MsgType::RESULT
            | MsgType::ERROR
            | MsgType::PARTIAL
            | MsgType::CHUNK
            | MsgType::ACK
            | MsgType::NACK
            | MsgType::CHUNK_ACK => self.on_answer(now, head, &header, datagram),
            _ => {
                self.stats.drops.head_unexpected.count();
                FromHead::Drop
            }
        }
    }

    fn on_answer(
        &mut self,
        now: Instant,
        head: usize,
        header: &Header,
        datagram: &mut [u8],
    ) -> FromHead {
        let drops = &self.stats.drops;
        let Some(id) = self.tasks.find_upstream(header.sequence) else {
            drops.stale_answer.count();
            return FromHead::Drop;
        };
        let kind = header.kind();
        let payload = &datagram[HEADER_LEN..];
        let open = self.tasks.state(id) == State::Open;
        let task = self.tasks.get(id);
        let late_chunk = kind == MsgType::CHUNK && task.chunked_answer;
        if !open && !late_chunk {
            drops.duplicate_answer.count();
            return FromHead::Drop;
        }
        let is_whole = matches!(kind, MsgType::TASK | MsgType::RESULT | MsgType::ERROR);
        // Any head may bring the answer, but pieces of it come from one head alone: another's need not fit them.
        if head != task.head && !is_whole {
            drops.stale_answer.count();
            return FromHead::Drop;
        }
        if kind == MsgType::ERROR
            && payload.first() == Some(&ErrorCode::DRAINING.0)
            && self.heads.has_alternative(head, now)
        {
            self.leave_to_another(now, head, id);
            return FromHead::Drop;
        }
        let ends = is_whole || (kind == MsgType::CHUNK && is_last_chunk(payload));
        let task = self.tasks.get_mut(id);
        task.chunked_answer |= kind == MsgType::CHUNK;
        set_sequence(datagram, task.sequence);
        if kind == MsgType::TASK {
            datagram[0] = MsgType::RESULT.0;
        }
        let client = task.client;
        if ends && open {
            self.leave_open(id);
            self.tasks
                .set_state(id, State::Answered, now + self.config.answer_linger);
            self.stats.traffic.answers.count();
        }
        FromHead::Deliver {
            client,
            len: datagram.len(),
        }
    }

    /// `head` refused a task because it is shutting down; what it already runs it will still answer.
    fn leave_to_another(&mut self, now: Instant, head: usize, id: TaskId) {
        self.heads.draining(head, now);
        let task = self.tasks.get_mut(id);
        if task.head == head {
            task.epoch = task.epoch.wrapping_sub(1);
            self.restart_resend();
        }
        self.settle_heads(now);
    }

    fn settle_heads(&mut self, now: Instant) {
        if self.heads.find_lost(now) {
            self.restart_resend();
        }
        if self.heads.choose(now) {
            self.stats.traffic.failovers.count();
        }
    }

    fn restart_resend(&mut self) {
        self.resend = self
            .tasks
            .first(State::Open)
            .map(|task| Resend { task, offset: 0 });
    }

    /// Sends the tasks of heads that were lost to the current one.
    fn poll_resend(&mut self, now: Instant, buffer: &mut [u8]) -> Option<Transmit> {
        let head = self.heads.current();
        if self.heads.state(head, now) != HeadState::Live {
            return None;
        }
        while let Some(Resend { task: id, offset }) = self.resend {
            let task = self.tasks.get(id);
            let is_stale = task.epoch != self.heads.epoch(task.head);
            if is_stale && task.complete {
                if let Some(len) = self.arena.datagram(&task.retained, offset, buffer) {
                    self.resend = Some(Resend {
                        task: id,
                        offset: offset + len,
                    });
                    self.tasks.get_mut(id).head = head;
                    // The old epoch must not agree with that of another head by chance before all is sent.
                    self.tasks.get_mut(id).epoch = self.heads.epoch(head).wrapping_sub(1);
                    self.stats.traffic.resent.count();
                    return Some(Transmit {
                        to: Destination::Head(head),
                        len,
                    });
                }
                self.mark_sent(id, head);
            } else if is_stale && task.head == head {
                // It was silent, nobody knows its task by heart, and it may still be at it.
                self.mark_sent(id, head);
            } else if is_stale {
                let text = "the head that had your task was lost; send it again";
                return Some(self.fail(id, ErrorCode::NO_WORKERS, text, buffer));
            }
            self.resend = self.tasks.next(id).map(|task| Resend { task, offset: 0 });
        }
        None
    }

    fn mark_sent(&mut self, id: TaskId, head: usize) {
        let task = self.tasks.get_mut(id);
        (task.head, task.epoch) = (head, self.heads.epoch(head));
        task.chunked_answer = false;
    }

    fn poll_expired(&mut self, now: Instant, buffer: &mut [u8]) -> Option<Transmit> {
        let oldest = self.tasks.first(State::Open)?;
        if self.drain == Drain::Abandoning {
            let text = "the shim is shutting down; send the task again";
            return Some(self.fail(oldest, ErrorCode::DRAINING, text, buffer));
        }
        if self.tasks.get(oldest).deadline > now {
            return None;
        }
        self.stats.drops.timed_out.count();
        Some(self.fail(
            oldest,
            ErrorCode::TIMEOUT,
            "no head answered in time",
            buffer,
        ))
    }

    /// Ends an open task with an Error for its client.
    fn fail(&mut self, id: TaskId, code: ErrorCode, text: &str, buffer: &mut [u8]) -> Transmit {
        let Task {
            client,
            sequence,
            timestamp_us,
            ..
        } = *self.tasks.get(id);
        self.leave_open(id);
        self.tasks.close(id);
        let len = write_error(buffer, sequence, timestamp_us, code, text);
        self.stats.traffic.replies.count();
        self.stats.client_bytes_out.add(len as u64);
        Transmit {
            to: Destination::Client(client),
            len,
        }
    }

    /// What has to happen before a task stops being open.
    fn leave_open(&mut self, id: TaskId) {
        if self.resend.is_some_and(|resend| resend.task == id) {
            self.resend = self.tasks.next(id).map(|task| Resend { task, offset: 0 });
        }
        self.arena.release(&mut self.tasks.get_mut(id).retained);
    }

    fn forget_answered(&mut self, now: Instant) {
        while let Some(oldest) = self.tasks.first(State::Answered)
            && self.tasks.get(oldest).deadline <= now
        {
            self.tasks.close(oldest);
        }
    }
}

impl Reply {
    /// Without an answer in it.
    #[must_use]
    pub const fn empty() -> Self {
        Self {
            bytes: [0; REPLY_LEN],
            len: 0,
        }
    }

    /// The datagram.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn answer(&mut self, to: &Header, kind: MsgType, payload: &[u8]) -> FromClient {
        self.len = write_message(&mut self.bytes, kind, to.sequence, to.timestamp_us, payload);
        FromClient::Reply
    }

    fn error(&mut self, to: &Header, code: ErrorCode, text: &str) -> FromClient {
        self.len = write_error(&mut self.bytes, to.sequence, to.timestamp_us, code, text);
        FromClient::Reply
    }
}

/// The header if the datagram is a message that clients send, else what is to be counted.
fn check_client_datagram<'a>(
    drops: &'a Drops,
    client: SocketAddr,
    datagram: &[u8],
) -> Result<Header, &'a Counter> {
    let header = Header::decode_checked(datagram).map_err(|error| match error {
        DecodeError::ShortHeader { .. } => &drops.short_header,
        DecodeError::Truncated { .. } => &drops.truncated,
        DecodeError::UnknownType(_) => &drops.unknown_type,
    })?;
    if client.port() == 0 {
        return Err(&drops.bad_source);
    }
    let payload = &datagram[HEADER_LEN..][..header.payload_len as usize];
    match header.kind() {
        MsgType::TASK
        | MsgType::ACK
        | MsgType::NACK
        | MsgType::CHUNK_ACK
        | MsgType::HEALTH
        | MsgType::CHALLENGE_REPLY => Ok(header),
        MsgType::CHUNK if chunk_position(payload).is_some() => Ok(header),
        MsgType::CHUNK => Err(&drops.bad_chunk),
        _ => Err(&drops.unexpected_type),
    }
}

/// Index and total of a Chunk, `None` if they make no sense.
fn chunk_position(payload: &[u8]) -> Option<(u16, u16)> {
    let [t0, t1, i0, i1, ..] = *payload.first_chunk::<CHUNK_HEADER_LEN>()?;
    let (total, index) = (u16::from_be_bytes([t0, t1]), u16::from_be_bytes([i0, i1]));
    (index < total && payload.len() <= CHUNK_HEADER_LEN + chunk::MAX_DATA).then_some((index, total))
}

fn is_last_chunk(payload: &[u8]) -> bool {
    chunk_position(payload).is_some_and(|(index, total)| index + 1 == total)
}

fn set_sequence(datagram: &mut [u8], sequence: u32) {
    datagram[1..5].copy_from_slice(&sequence.to_be_bytes());
}

fn write_message(
    buffer: &mut [u8],
    kind: MsgType,
    sequence: u32,
    timestamp_us: u64,
    payload: &[u8],
) -> usize {
    let header = Header {
        msg_type: kind.0,
        sequence,
        timestamp_us,
        payload_len: payload.len() as u32,
    };
    let len = HEADER_LEN + payload.len();
    buffer[..HEADER_LEN].copy_from_slice(&header.encode());
    buffer[HEADER_LEN..len].copy_from_slice(payload);
    len
}

fn write_error(
    buffer: &mut [u8],
    sequence: u32,
    timestamp_us: u64,
    code: ErrorCode,
    text: &str,
) -> usize {
    let header = Header {
        msg_type: MsgType::ERROR.0,
        sequence,
        timestamp_us,
        payload_len: 1 + text.len() as u32,
    };
    let len = HEADER_LEN + 1 + text.len();
    buffer[..HEADER_LEN].copy_from_slice(&header.encode());
    buffer[HEADER_LEN] = code.0;
    buffer[HEADER_LEN + 1..len].copy_from_slice(text.as_bytes());
    len
}

const NO_HEAD: &str = "no head is reachable; ask again in a moment";
/// Holds every answer that the bridge gives by itself.
const REPLY_LEN: usize = 128;
/// Sources outside of the trusted networks that are remembered to have answered a challenge.
const VERIFIED_SOURCES: usize = 16_384;
/// How long they are.
const VERIFIED_FOR: Duration = Duration::from_secs(600);
/// Most tasks that a bridge can be told to hold.
pub(crate) const MAX_TASKS: usize = tasks::MAX_SLOTS;

#[cfg(test)]
mod tests;
