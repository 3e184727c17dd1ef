//! What clients send.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use dcf::{DecodeError, ErrorCode, HEADER_LEN, Header, MsgType};

use super::{
    Bridge, Drain, FromClient, Reply,
    cookie::COOKIE_LEN,
    limiter::Verdict,
    retain::Chain,
    tasks::{State, Task, TaskId},
    wire::{chunk_position, set_sequence},
};
use crate::{
    config::Admit,
    stats::{Counter, Drops},
};

impl Bridge {
    pub(super) fn route_client(
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
            deadline: now + self.patience(),
            retained: Chain::EMPTY,
            complete: true,
            chunked_answer: false,
            asked: false,
        })
    }

    /// How long a head may say nothing of a task before it is asked, and after that again.
    pub(super) fn patience(&self) -> Duration {
        self.config.request_timeout / 2
    }

    /// The client asks for an answer again that was given already.
    fn reopen(&mut self, now: Instant, id: TaskId) {
        self.tasks.set_state(id, State::Open, now + self.patience());
        let head = self.heads.current();
        let task = self.tasks.get_mut(id);
        (task.head, task.epoch) = (head, self.heads.epoch(head));
        (task.complete, task.chunked_answer, task.asked) = (true, false, false);
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

const NO_HEAD: &str = "no head is reachable; ask again in a moment";
/// How long a source counts as verified.
const VERIFIED_FOR: Duration = Duration::from_secs(600);
