//! Handling of answers from heads, and of heads that do not answer.

use std::time::{Duration, Instant};

use dcf::{ErrorCode, MsgType};

use super::{
    Bridge, Destination, Drain, Echo, FromHead, Resend, Transmit,
    heads::HeadState,
    tasks::{TaskId, TaskState},
    versions::{Address, Translation, answer_type},
    wire::{Frame, is_last_chunk, set_payload_len, set_sequence, write_error, write_message},
};

impl Bridge {
    pub(super) fn route_head(
        &mut self,
        now: Instant,
        head: usize,
        datagram: &mut [u8],
    ) -> FromHead {
        let Ok(mut frame) = Frame::decode(datagram) else {
            self.stats.drops.head_malformed.count();
            return FromHead::Drop;
        };
        frame.header.msg_type = answer_type(frame.kind()).0;
        if self.heads.heard(head, frame.version, now) {
            self.restart_resend();
        }
        let datagram = &mut datagram[..frame.datagram_len()];
        match frame.kind() {
            MsgType::HEALTH => FromHead::Drop,
            MsgType::CHALLENGE => {
                self.on_challenge(head, &frame, datagram);
                FromHead::Drop
            }
            MsgType::RESULT
            | MsgType::ERROR
            | MsgType::PARTIAL
            | MsgType::CHUNK
            | MsgType::ACK
            | MsgType::NACK
            | MsgType::CHUNK_ACK => self.on_answer(now, head, &frame, datagram),
            _ => {
                self.stats.drops.head_unexpected.count();
                FromHead::Drop
            }
        }
    }

    /// A head does not know this address yet, or no longer: shows it that its datagrams arrive here, and
    /// sends the task again that was challenged. A head that goes on challenging gets it no faster for that.
    fn on_challenge(&mut self, head: usize, frame: &Frame, datagram: &[u8]) {
        let Ok(cookie) = frame.payload(datagram).try_into() else {
            return self.stats.drops.head_unexpected.count();
        };
        let sequence = frame.header.sequence;
        self.echo = Some(Echo {
            head,
            version: frame.version,
            sequence,
            cookie,
        });
        // A probe was challenged, if no task was.
        if let Some(id) = self.tasks.find_upstream(sequence)
            && self.tasks.state(id) == TaskState::Open
            && self.tasks.get(id).head == head
        {
            self.tasks.get_mut(id).epoch = self.heads.epoch(head).wrapping_sub(1);
            self.restart_resend();
        }
    }

    fn on_answer(
        &mut self,
        now: Instant,
        head: usize,
        frame: &Frame,
        datagram: &mut [u8],
    ) -> FromHead {
        let drops = &self.stats.drops;
        let Some(id) = self.tasks.find_upstream(frame.header.sequence) else {
            drops.stale_answer.count();
            return FromHead::Drop;
        };
        let kind = frame.kind();
        let payload = frame.payload(datagram);
        let open = self.tasks.state(id) == TaskState::Open;
        let task = self.tasks.get(id);
        let late_chunk = kind == MsgType::CHUNK && task.chunked_answer;
        if !open && !late_chunk {
            drops.duplicate_answer.count();
            return FromHead::Drop;
        }
        let is_whole = matches!(kind, MsgType::RESULT | MsgType::ERROR);
        // Any head may bring the answer, but pieces of it come from one head alone: another's need not fit
        // them.
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
        let was_asked = task.asked;
        if open && head == task.head {
            self.lives(now, id);
            if kind == MsgType::ACK && was_asked {
                // The client did not ask.
                return FromHead::Drop;
            }
        }
        if frame.version != self.tasks.get(id).version
            && let Some(outcome) = self.translate(now, id, frame, datagram)
        {
            return outcome;
        }
        let payload = frame.payload(datagram);
        let ends = is_whole || (kind == MsgType::CHUNK && is_last_chunk(payload));
        let task = self.tasks.get_mut(id);
        task.chunked_answer |= kind == MsgType::CHUNK;
        let (client, version) = (task.client, task.version);
        let message = frame.message(datagram);
        set_sequence(message, task.sequence);
        message[0] = kind.0;
        let mut len = datagram.len();
        if kind == MsgType::ERROR && frame.payload_len() > version.max_answer() {
            // The first part of its text is better than none.
            len = frame.version.header_len()
                + text_boundary(frame.payload(datagram), version.max_answer());
            set_payload_len(frame.message(datagram), len - frame.version.header_len());
        }
        if ends && open {
            self.answered(now, id);
        }
        FromHead::Deliver {
            client,
            len,
            version,
        }
    }

    /// The head of an open task said something of it: it works on it.
    fn lives(&mut self, now: Instant, id: TaskId) {
        self.tasks.get_mut(id).asked = false;
        self.wait_on(now, id);
    }

    /// Gives the head of an open task more time.
    fn wait_on(&mut self, now: Instant, id: TaskId) {
        // The list of open tasks is in the order of their deadlines, and this one moves to its end.
        self.skip_resend(id);
        let deadline = now + self.patience();
        self.tasks.set_state(id, TaskState::Open, deadline);
    }

    /// Brings a datagram of a head into the form of a client of the other version. `None` if only its frame
    /// differs.
    fn translate(
        &mut self,
        now: Instant,
        id: TaskId,
        frame: &Frame,
        datagram: &[u8],
    ) -> Option<FromHead> {
        let upstream = self.tasks.upstream_sequence(id);
        let task = self.tasks.get(id);
        let to = Address {
            client: task.client,
            version: task.version,
            sequence: task.sequence,
            timestamp_us: frame.header.timestamp_us,
        };
        let message = (frame.kind(), frame.payload(datagram));
        let chunked = task.chunked_answer;
        let translator = &mut self.translator;
        match translator.translate(to, upstream, message, chunked, now) {
            Translation::Reframed => return None,
            Translation::Incomplete => {}
            Translation::Queued => self.answered(now, id),
            Translation::Malformed => self.stats.drops.head_malformed.count(),
            // The client asks again, and so the head does not have to run the task again.
            Translation::Impossible => self.stats.drops.untranslated.count(),
        }
        Some(FromHead::Drop)
    }

    fn answered(&mut self, now: Instant, id: TaskId) {
        self.leave_open(id);
        let deadline = now + self.config.answer_linger;
        self.tasks.set_state(id, TaskState::Answered, deadline);
        self.stats.traffic.answers.count();
    }

    /// `head` refused a task because it is shutting down; it will still answer its running tasks.
    fn leave_to_another(&mut self, now: Instant, head: usize, id: TaskId) {
        self.heads.draining(head, now);
        let task = self.tasks.get_mut(id);
        if task.head == head {
            task.epoch = task.epoch.wrapping_sub(1);
            self.restart_resend();
        }
        self.settle_heads(now);
    }

    pub(super) fn settle_heads(&mut self, now: Instant) {
        if self.heads.find_lost(now) {
            self.restart_resend();
        }
        if self.heads.choose(now) {
            self.stats.traffic.failovers.count();
        }
    }

    fn restart_resend(&mut self) {
        self.resend = self.tasks.first(TaskState::Open).map(Resend::of);
    }

    /// Sends the tasks of heads that were lost to the current one.
    pub(super) fn poll_resend(&mut self, now: Instant, buffer: &mut [u8]) -> Option<Transmit> {
        if self.resend_at.is_some_and(|due| due <= now) {
            self.resend_at = None;
            self.restart_resend();
        }
        let head = self.heads.current();
        if self.heads.state(head, now) != HeadState::Live {
            return None;
        }
        while let Some(Resend { task: id, offset }) = self.resend {
            let task = self.tasks.get(id);
            let is_stale = task.epoch != self.heads.epoch(task.head);
            if is_stale && task.head == head && offset == 0 && task.paced > now {
                let due = self.resend_at.map_or(task.paced, |at| at.min(task.paced));
                self.resend_at = Some(due);
            } else if is_stale && task.complete {
                let upstream = self.heads.speaks(head, now).version_for(task.version);
                let (prefix, message) = buffer.split_at_mut(upstream.prefix().len());
                if let Some(len) = self.arena.datagram(&task.retained, offset, message) {
                    prefix.copy_from_slice(upstream.prefix());
                    self.resend = Some(Resend {
                        task: id,
                        offset: offset + len,
                    });
                    let len = prefix.len() + len;
                    let task = self.tasks.get_mut(id);
                    (task.paced, task.upstream) = (now + CHALLENGE_PACE, upstream);
                    task.head = head;
                    // The old epoch must not agree with that of another head by chance before all is sent.
                    task.epoch = self.heads.epoch(head).wrapping_sub(1);
                    self.stats.traffic.resent.count();
                    let to = Destination::Head(head);
                    return Some(Transmit { to, len });
                }
                self.mark_sent(id, head);
            } else if is_stale && task.head == head {
                // It was silent, so it may have forgotten its task, or may still be at it.
                self.mark_sent(id, head);
            } else if is_stale {
                let text = "the head that had your task was lost; send it again";
                return Some(self.fail(id, ErrorCode::NO_WORKERS, text, buffer));
            }
            self.skip_resend(id);
        }
        None
    }

    /// Goes on with the next task if this one is looked at for being sent again.
    fn skip_resend(&mut self, id: TaskId) {
        if self.resend.is_some_and(|resend| resend.task == id) {
            self.resend = self.tasks.next(id).map(Resend::of);
        }
    }

    fn mark_sent(&mut self, id: TaskId, head: usize) {
        let task = self.tasks.get_mut(id);
        (task.head, task.epoch) = (head, self.heads.epoch(head));
        task.chunked_answer = false;
    }

    pub(super) fn poll_expired(&mut self, now: Instant, buffer: &mut [u8]) -> Option<Transmit> {
        let oldest = self.tasks.first(TaskState::Open)?;
        if self.drain == Drain::Abandoning {
            let text = "the shim is shutting down; send the task again";
            return Some(self.fail(oldest, ErrorCode::DRAINING, text, buffer));
        }
        if self.tasks.get(oldest).deadline > now {
            return None;
        }
        let task = self.tasks.get(oldest);
        let (head, asked, version) = (task.head, task.asked, task.upstream);
        if !asked {
            // It may be slow, or busy with others. A head of an older version takes this for a question after
            // itself.
            self.tasks.get_mut(oldest).asked = true;
            self.wait_on(now, oldest);
            let sequence = self.tasks.upstream_sequence(oldest);
            let kind = (version, MsgType::HEALTH);
            let len = write_message(buffer, kind, (sequence, 0), &[ASK_AFTER_TASK]);
            let to = Destination::Head(head);
            return Some(Transmit { to, len });
        }
        self.stats.drops.timed_out.count();
        let text = "the head said nothing of this task for too long";
        Some(self.fail(oldest, ErrorCode::TIMEOUT, text, buffer))
    }

    /// Ends an open task with an Error for its client.
    fn fail(&mut self, id: TaskId, code: ErrorCode, text: &str, buffer: &mut [u8]) -> Transmit {
        let task = self.tasks.get(id);
        let names = (task.sequence, task.timestamp_us);
        let len = write_error(buffer, task.version, names, code, text);
        let to = Destination::Client(task.client);
        self.leave_open(id);
        self.tasks.close(id);
        self.stats.traffic.replies.count();
        self.stats.client_bytes_out.add(len as u64);
        Transmit { to, len }
    }

    /// Cleans up when a task stops being open.
    fn leave_open(&mut self, id: TaskId) {
        self.skip_resend(id);
        self.translator.forget(self.tasks.upstream_sequence(id));
        self.arena.release(&mut self.tasks.get_mut(id).retained);
    }

    pub(super) fn forget_answered(&mut self, now: Instant) {
        while let Some(oldest) = self.tasks.first(TaskState::Answered)
            && self.tasks.get(oldest).deadline <= now
        {
            self.tasks.close(oldest);
        }
    }
}

/// Least time between two sendings of a challenged task. Longer than most round trips: datagrams sent before
/// a head got the echo are challenged, too.
const CHALLENGE_PACE: Duration = Duration::from_millis(200);

/// Payload of a Health that asks whether the task with its sequence runs; a head that works on it answers
/// with an Ack.
const ASK_AFTER_TASK: &[u8] = b"task";

/// The longest part of an Error's payload (a code, then UTF-8) within `limit` bytes that ends with a whole
/// character.
fn text_boundary(payload: &[u8], limit: usize) -> usize {
    (1..=limit.min(payload.len()))
        .rev()
        .find(|&at| payload.get(at).is_none_or(|byte| byte & 0xC0 != 0x80))
        .unwrap_or(0)
}
