//! Handling of datagrams from clients.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use dcf::{DecodeError, ErrorCode, MsgType, Version};
use mesh_service::cookie::COOKIE_LEN;

use super::{
    Bridge, Drain, FromClient, Reply,
    limiter::RateDecision,
    retain::Chain,
    tasks::{Task, TaskId, TaskState},
    wire::{Frame, chunk_position, set_sequence},
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
        let frame = match check_client_datagram(&stats.drops, client, datagram) {
            Ok(frame) => frame,
            Err(reason) => {
                reason.count();
                if std::ptr::eq(reason, &stats.drops.other_version) {
                    self.warn_of_version(now, client, datagram);
                }
                return FromClient::Drop;
            }
        };
        if let RateDecision::Limited { tell } = self.limiter.check(client.ip(), now) {
            stats.drops.rate_limited.count();
            if tell && (self.config.knows(client.ip()) || self.is_verified(client, now)) {
                let text = "too many datagrams from your address; slow down";
                return reply.error(&frame, ErrorCode::RATE_LIMITED, text);
            }
            return FromClient::Drop;
        }
        if !self.config.knows(client.ip())
            && let Some(outcome) = self.admit(now, client, &frame, datagram, reply)
        {
            return outcome;
        }
        let datagram = &mut datagram[..frame.datagram_len()];
        match frame.kind() {
            MsgType::TASK | MsgType::CHUNK => self.on_task(now, client, &frame, datagram, reply),
            MsgType::HEALTH if self.heads.reachable(now) => {
                reply.answer(&frame, MsgType::HEALTH, &[])
            }
            MsgType::HEALTH => reply.error(&frame, ErrorCode::NO_WORKERS, NO_HEAD),
            MsgType::CHALLENGE_REPLY => reply.answer(&frame, MsgType::ACK, &[]),
            _ => self.on_follow_up(client, &frame, datagram),
        }
    }

    /// Names a version that is not known here, at most once a minute.
    fn warn_of_version(&mut self, now: Instant, client: SocketAddr, datagram: &[u8]) {
        if self.warned.is_none_or(|at| now >= at + WARN_EVERY) {
            self.warned = Some(now);
            let version = datagram.first().copied().unwrap_or_default();
            tracing::warn!(source = %client, "datagrams that begin with {version:#04x} are dropped: DCF v5.0.0 and v5.1 (0x51) are understood, and the client seems to speak another version");
        }
    }

    /// Handles a datagram of a source whose address is not trusted; `None` if it has verified its address and
    /// is served like a trusted one.
    fn admit(
        &mut self,
        now: Instant,
        client: SocketAddr,
        frame: &Frame,
        datagram: &[u8],
        reply: &mut Reply,
    ) -> Option<FromClient> {
        let drops = &self.stats.drops;
        if self.config.admit == Admit::Trusted && !self.config.trusts(client.ip()) {
            drops.untrusted.count();
            return Some(FromClient::Drop);
        }
        if frame.kind() == MsgType::CHALLENGE_REPLY {
            let cookie = frame.payload(datagram);
            if !self.cookies.check(cookie, client, now - self.started) {
                drops.bad_cookie.count();
                return Some(FromClient::Drop);
            }
            self.stats.traffic.verified.count();
            *self.verified.get_or_insert(client, now, now) = now;
            return Some(reply.answer(frame, MsgType::ACK, &[]));
        }
        if self.is_verified(client, now) {
            return None;
        }
        // Never more bytes out than came in.
        if datagram.len() < frame.version.header_len() + COOKIE_LEN {
            self.stats.drops.unverified.count();
            return Some(FromClient::Drop);
        }
        self.stats.traffic.challenges.count();
        let cookie = self.cookies.make(client, now - self.started);
        Some(reply.answer(frame, MsgType::CHALLENGE, &cookie))
    }

    fn is_verified(&mut self, client: SocketAddr, now: Instant) -> bool {
        let verified = self.verified.get(&client, now);
        verified.is_some_and(|since| now < *since + VERIFIED_FOR)
            && (self.config.admit == Admit::Verified || self.config.trusts(client.ip()))
    }

    fn on_task(
        &mut self,
        now: Instant,
        client: SocketAddr,
        frame: &Frame,
        datagram: &mut [u8],
        reply: &mut Reply,
    ) -> FromClient {
        let drops = &self.stats.drops;
        let sequence = frame.header.sequence;
        let known = self.tasks.find(client, frame.version, sequence);
        if known.is_none() && self.drain != Drain::Serving {
            drops.draining.count();
            let text = "the shim is shutting down; ask again in a moment";
            return reply.error(frame, ErrorCode::DRAINING, text);
        }
        if !self.heads.reachable(now) {
            drops.no_head.count();
            return reply.error(frame, ErrorCode::NO_WORKERS, NO_HEAD);
        }
        let current = self.heads.current();
        let upstream = self.heads.speaks(current, now).version_for(frame.version);
        if frame.payload_len() > upstream.max_payload() {
            drops.untranslated.count();
            let text = "the task is too long for a datagram of DCF v5.1";
            return reply.error(frame, ErrorCode::INVALID_PAYLOAD, text);
        }
        let Some(id) = known.or_else(|| self.open(now, client, frame, upstream)) else {
            self.stats.drops.table_full.count();
            let text = "the shim has no room for more tasks; ask again in a moment";
            return reply.error(frame, ErrorCode::WORKER_BUSY, text);
        };
        if self.tasks.state(id) == TaskState::Answered {
            self.reopen(now, id);
        }
        if frame.kind() == MsgType::TASK {
            let traffic = &self.stats.traffic;
            match known {
                Some(_) => traffic.repeats.count(),
                None => traffic.tasks.count(),
            }
        }
        let message = frame.message(datagram);
        set_sequence(message, self.tasks.upstream_sequence(id));
        let task = self.tasks.get_mut(id);
        // A repeated Task is retained already; every Chunk is a part of its own.
        let is_new = frame.kind() == MsgType::CHUNK || task.retained.len() == 0;
        if is_new && !self.arena.append(&mut task.retained, message) {
            task.complete = false;
        }
        if frame.kind() == MsgType::TASK {
            // A head that has the task in one version takes it for another task in the other.
            let same_head = task.head == current;
            if !same_head || !self.heads.speaks(current, now).may_include(task.upstream) {
                task.upstream = upstream;
            }
            (task.head, task.epoch) = (current, self.heads.epoch(current));
        }
        FromClient::Forward {
            head: task.head,
            len: datagram.len(),
            version: task.upstream,
        }
    }

    fn open(
        &mut self,
        now: Instant,
        client: SocketAddr,
        frame: &Frame,
        upstream: Version,
    ) -> Option<TaskId> {
        let head = self.heads.current();
        self.tasks.open(Task {
            client,
            version: frame.version,
            sequence: frame.header.sequence,
            timestamp_us: frame.header.timestamp_us,
            head,
            upstream,
            epoch: self.heads.epoch(head),
            deadline: now + self.patience(),
            retained: Chain::EMPTY,
            complete: true,
            chunked_answer: false,
            asked: false,
            paced: now,
        })
    }

    /// Time for which a head may say nothing of a task before it is asked, and between further questions.
    pub(super) fn patience(&self) -> Duration {
        self.config.request_timeout / 2
    }

    /// The client asks for an answer again that was given already.
    fn reopen(&mut self, now: Instant, id: TaskId) {
        let deadline = now + self.patience();
        self.tasks.set_state(id, TaskState::Open, deadline);
        let head = self.heads.current();
        let task = self.tasks.get_mut(id);
        if task.head != head {
            task.upstream = self.heads.speaks(head, now).version_for(task.version);
        }
        (task.head, task.epoch) = (head, self.heads.epoch(head));
        (task.complete, task.chunked_answer, task.asked) = (true, false, false);
    }

    /// Ack, Nack and ChunkAck are about a task that is known, or about nothing.
    fn on_follow_up(
        &mut self,
        client: SocketAddr,
        frame: &Frame,
        datagram: &mut [u8],
    ) -> FromClient {
        let sequence = frame.header.sequence;
        let Some(id) = self.tasks.find(client, frame.version, sequence) else {
            self.stats.drops.no_task.count();
            return FromClient::Drop;
        };
        set_sequence(frame.message(datagram), self.tasks.upstream_sequence(id));
        let task = self.tasks.get(id);
        FromClient::Forward {
            head: task.head,
            len: datagram.len(),
            version: task.upstream,
        }
    }
}

/// The frame if the datagram is a message that clients send, else the drop to count.
fn check_client_datagram<'a>(
    drops: &'a Drops,
    client: SocketAddr,
    datagram: &[u8],
) -> Result<Frame, &'a Counter> {
    let frame = Frame::decode(datagram).map_err(|error| match error {
        DecodeError::ShortHeader { .. } => &drops.short_header,
        DecodeError::Truncated { .. } => &drops.truncated,
        DecodeError::UnknownType(_) => &drops.unknown_type,
        DecodeError::OtherVersion(_) => &drops.other_version,
    })?;
    if client.port() == 0 {
        return Err(&drops.bad_source);
    }
    match frame.kind() {
        MsgType::TASK
        | MsgType::ACK
        | MsgType::NACK
        | MsgType::CHUNK_ACK
        | MsgType::HEALTH
        | MsgType::CHALLENGE_REPLY => Ok(frame),
        MsgType::CHUNK if chunk_position(frame.payload(datagram)).is_some() => Ok(frame),
        MsgType::CHUNK => Err(&drops.bad_chunk),
        _ => Err(&drops.unexpected_type),
    }
}

const NO_HEAD: &str = "no head is reachable; ask again in a moment";
/// Time for which a source counts as verified.
const VERIFIED_FOR: Duration = Duration::from_secs(600);
/// Interval at which a source of an unknown version is named in the log.
const WARN_EVERY: Duration = Duration::from_secs(60);
