//! The bridge between clients and heads, without sockets and without a clock.
//!
//! [`Bridge`] is given datagrams and the time and says where each goes. It changes sequences in place, so the
//! caller can send the very buffer it received into. All memory is allocated when the bridge is made.
//!
//! A task goes through like this: the client's address and sequence open a slot in the task table; the slot's
//! own sequence replaces the client's and the datagram goes to the current head; an answer with that sequence
//! finds the slot, gets the client's sequence back and goes to the client's address. The slot then lingers,
//! so that a repeated task has the same sequence toward the head again and the head can tell that it is a
//! repeat.
//!
//! Client and head may speak different versions of DCF. A datagram then gets or loses its first byte when it
//! is sent on; what else differs, and all that is special to v5.0.0, is in `versions`.

mod from_clients;
mod from_heads;
mod heads;
mod limiter;
mod retain;
mod table;
mod tasks;
mod versions;
mod wire;

use std::{net::SocketAddr, sync::Arc, time::Instant};

use dcf::{ErrorCode, MsgType, Version};

pub use heads::HeadState;
pub use mesh_service::cookie::COOKIE_LEN;
use mesh_service::cookie::Cookies;
pub(crate) use tasks::MAX_TASKS;
pub use versions::reframed;

use self::{
    heads::{Heads, Timing},
    limiter::RateLimiter,
    retain::Arena,
    table::FixedTable,
    tasks::{TaskId, TaskState, TaskTable},
    versions::Translator,
    wire::{Frame, write_error, write_message},
};
use crate::{
    config::{Admit, Config},
    stats::Stats,
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
    /// Time at which to look again at tasks that were challenged soon after they had been sent again.
    resend_at: Option<Instant>,
    /// The last challenge of a head, which is echoed.
    echo: Option<Echo>,
    translator: Translator,
    drain: Drain,
    /// Time of the last warning about a source of an unknown version.
    warned: Option<Instant>,
    stats: Arc<Stats>,
}

/// Decision on a client's datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FromClient {
    /// It is dropped.
    Drop,
    /// Its first `len` bytes go to a head.
    Forward {
        /// Index of the head.
        head: usize,
        /// Length in bytes, from the start of the datagram.
        len: usize,
        /// The version in which it gets them; see [`reframed`].
        version: Version,
    },
    /// The client gets the [`Reply`].
    Reply,
}

/// Decision on a head's datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FromHead {
    /// It is dropped.
    Drop,
    /// Its first `len` bytes go to a client.
    Deliver {
        /// Address of the client.
        client: SocketAddr,
        /// Length in bytes, from the start of the datagram.
        len: usize,
        /// The version in which it gets them; see [`reframed`].
        version: Version,
    },
}

/// A head's challenge: the head wants proof that its datagrams arrive here.
#[derive(Debug)]
struct Echo {
    head: usize,
    version: Version,
    sequence: u32,
    cookie: [u8; COOKIE_LEN],
}

/// A datagram that the bridge sends of its own accord.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// Receiver of the datagram.
    pub to: Destination,
    /// Bytes of the buffer that were filled.
    pub len: usize,
}

/// Destination of a datagram.
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

/// Secrets of a bridge; chosen at random for each.
#[derive(Clone)]
pub struct Secrets {
    /// Key of the cookies.
    pub cookie_key: [u8; 32],
    /// First generation of sequences toward the heads, which may still know those of an earlier process.
    pub first_generation: u32,
}

/// The open task that is looked at next for being sent again, and where in its datagrams.
#[derive(Clone, Copy, Debug)]
struct Resend {
    task: TaskId,
    offset: usize,
}

impl Resend {
    fn of(task: TaskId) -> Self {
        Self { task, offset: 0 }
    }
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
        let verified = match config.admit {
            Admit::Verified => VERIFIED_SOURCES,
            Admit::Trusted => 1,
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
            resend_at: None,
            echo: None,
            translator: Translator::new(),
            drain: Drain::Serving,
            warned: None,
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

    /// The machine of this head reported that its port is closed.
    pub fn on_head_refused(&mut self, now: Instant, head: usize) {
        self.heads.refused(head);
        self.settle_heads(now);
    }

    /// The next datagram that is due by itself (a probe, a task sent again, the end of an unanswered task),
    /// written to `buffer`, which holds a whole datagram. To be called until `None` after every batch and at
    /// [`Bridge::next_wakeup`].
    pub fn poll_transmit(&mut self, now: Instant, buffer: &mut [u8]) -> Option<Transmit> {
        self.settle_heads(now);
        if let Some((head, version)) = self.heads.poll_probe(now) {
            self.probes_sent = self.probes_sent.wrapping_add(1);
            self.stats.traffic.probes.count();
            let kind = (version, MsgType::HEALTH);
            // A head that does not know this address yet answers with a cookie, and never with more bytes
            // than came.
            let message = write_message(buffer, kind, (self.probes_sent, 0), &[]);
            let len = message.max(PROBE_LEN).min(buffer.len());
            buffer[message..len].fill(0);
            let to = Destination::Head(head);
            return Some(Transmit { to, len });
        }
        if let Some(echo) = self.echo.take() {
            let kind = (echo.version, MsgType::CHALLENGE_REPLY);
            let len = write_message(buffer, kind, (echo.sequence, 0), &[&echo.cookie]);
            let to = Destination::Head(echo.head);
            return Some(Transmit { to, len });
        }
        self.forget_answered(now);
        self.translator.expire(now);
        if let Some((client, len)) = self.translator.poll(buffer) {
            self.stats.traffic.to_clients.count();
            self.stats.client_bytes_out.add(len as u64);
            let to = Destination::Client(client);
            return Some(Transmit { to, len });
        }
        self.poll_expired(now, buffer)
            .or_else(|| self.poll_resend(now, buffer))
    }

    /// Time at which [`Bridge::poll_transmit`] next has something to do, if no datagram comes before.
    #[must_use]
    pub fn next_wakeup(&self) -> Instant {
        let oldest = self.tasks.first(TaskState::Open);
        let deadline = oldest.map(|id| self.tasks.get(id).deadline);
        let due = [deadline, self.resend_at].into_iter().flatten();
        due.fold(self.heads.next_wakeup(), Instant::min)
    }

    /// Puts the keys of `config` into effect that need no new memory; see [`Bridge::LIVE_KEYS`].
    pub fn reconfigure(&mut self, config: Config) {
        self.config = Config {
            trust_loopback: config.trust_loopback,
            trusted_networks: config.trusted_networks,
            unverified_networks: config.unverified_networks,
            request_timeout: config.request_timeout,
            answer_linger: config.answer_linger,
            ..std::mem::take(&mut self.config)
        };
    }

    /// The keys of the configuration that [`Bridge::reconfigure`] puts into effect.
    pub const LIVE_KEYS: [&str; 5] = [
        "trust_loopback",
        "trusted_networks",
        "unverified_networks",
        "request_timeout",
        "answer_linger",
    ];

    /// Takes no new tasks from now on; open tasks go on.
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
        self.tasks.count(TaskState::Open)
    }

    /// The index of the head that gets the tasks.
    #[must_use]
    pub fn current_head(&self) -> usize {
        self.heads.current()
    }

    /// State of a head, as the bridge knows it.
    #[must_use]
    pub fn head_state(&self, head: usize, now: Instant) -> HeadState {
        self.heads.state(head, now)
    }

    /// Brings the gauges among the counters up to date.
    pub fn publish_gauges(&self, now: Instant) {
        self.stats.live_heads.set(self.heads.live(now) as u64);
        self.stats.current_head.set(self.heads.current() as u64);
        self.stats.open_tasks.set(self.open_tasks() as u64);
    }
}

impl Reply {
    /// A reply without an answer in it.
    #[must_use]
    pub const fn empty() -> Self {
        Self {
            bytes: [0; REPLY_LEN],
            len: 0,
        }
    }

    /// Bytes of the datagram.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn answer(&mut self, to: &Frame, kind: MsgType, payload: &[u8]) -> FromClient {
        let kind = (to.version, kind);
        self.len = write_message(&mut self.bytes, kind, to.names(), &[payload]);
        FromClient::Reply
    }

    fn error(&mut self, to: &Frame, code: ErrorCode, text: &str) -> FromClient {
        self.len = write_error(&mut self.bytes, to.version, to.names(), code, text);
        FromClient::Reply
    }
}

/// Holds every answer that the bridge gives by itself.
const REPLY_LEN: usize = 128;
/// Bytes of a probe: behind its header nothing that means anything.
const PROBE_LEN: usize = 40;
/// Sources outside of the trusted networks that are remembered to have answered a challenge.
const VERIFIED_SOURCES: usize = 16_384;

#[cfg(test)]
mod tests;
