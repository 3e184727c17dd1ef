//! What heads answer, and what happens when they do not.

use std::time::Instant;

use dcf::{ErrorCode, HEADER_LEN, Header, MsgType};

use super::{
    Bridge, Destination, Drain, FromHead, Resend, Transmit,
    heads::HeadState,
    tasks::{State, Task, TaskId},
    wire::{is_last_chunk, set_sequence, write_error, write_message},
};

impl Bridge {
    pub(super) fn route_head(
        &mut self,
        now: Instant,
        head: usize,
        datagram: &mut [u8],
    ) -> FromHead {
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
        let was_asked = task.asked;
        if open && head == task.head {
            self.lives(now, id);
            if kind == MsgType::ACK && was_asked {
                // The client did not ask.
                return FromHead::Drop;
            }
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

    /// The head of an open task said something of it: it works on it.
    fn lives(&mut self, now: Instant, id: TaskId) {
        self.tasks.get_mut(id).asked = false;
        self.wait_on(now, id);
    }

    /// Gives the head of an open task more time.
    fn wait_on(&mut self, now: Instant, id: TaskId) {
        // The list of open tasks is in the order of their deadlines, and this one moves to its end.
        if self.resend.is_some_and(|resend| resend.task == id) {
            self.resend = self.tasks.next(id).map(|task| Resend { task, offset: 0 });
        }
        self.tasks.set_state(id, State::Open, now + self.patience());
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

    pub(super) fn settle_heads(&mut self, now: Instant) {
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
    pub(super) fn poll_resend(&mut self, now: Instant, buffer: &mut [u8]) -> Option<Transmit> {
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

    pub(super) fn poll_expired(&mut self, now: Instant, buffer: &mut [u8]) -> Option<Transmit> {
        let oldest = self.tasks.first(State::Open)?;
        if self.drain == Drain::Abandoning {
            let text = "the shim is shutting down; send the task again";
            return Some(self.fail(oldest, ErrorCode::DRAINING, text, buffer));
        }
        if self.tasks.get(oldest).deadline > now {
            return None;
        }
        let task = self.tasks.get(oldest);
        let (head, asked) = (task.head, task.asked);
        if !asked {
            // It may be slow, or busy with others. A head of an older version takes this for a question after itself.
            self.tasks.get_mut(oldest).asked = true;
            self.wait_on(now, oldest);
            let sequence = self.tasks.upstream_sequence(oldest);
            let len = write_message(buffer, MsgType::HEALTH, sequence, 0, ASK_AFTER_TASK);
            return Some(Transmit {
                to: Destination::Head(head),
                len,
            });
        }
        self.stats.drops.timed_out.count();
        Some(self.fail(
            oldest,
            ErrorCode::TIMEOUT,
            "the head said nothing of this task for too long",
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

    pub(super) fn forget_answered(&mut self, now: Instant) {
        while let Some(oldest) = self.tasks.first(State::Answered)
            && self.tasks.get(oldest).deadline <= now
        {
            self.tasks.close(oldest);
        }
    }
}

/// Payload of a Health that asks whether the task with its sequence runs; a head that works on it answers with an Ack.
const ASK_AFTER_TASK: &[u8] = b"task";
