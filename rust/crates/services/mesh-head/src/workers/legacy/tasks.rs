//! A worker of DCF v5.0.0 or v5.1 as a [`Connection`]: a Task goes out under the head's own sequence, and one
//! Result comes back to the request that waits for it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use dcf::{ErrorCode, Message, MsgType, Version};
use futures::future::BoxFuture;
use mesh_control::request::Failure;
use mesh_net::udp::BatchSocket;
use tokio::sync::oneshot;

use crate::locks::lock;
use crate::mesh::connection::{AttemptStream, Connection, FromWorker, WorkerRequest};
use crate::mesh::timestamp_us;
use crate::workers::requests::error_of;

/// A worker without an identity, as it is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct LegacyWorker {
    /// The address at which it takes tasks.
    pub address: SocketAddr,
    pub version: Version,
}

/// The tasks that these workers have now.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u32,
    pending: HashMap<u32, Pending>,
    /// Time of the last answer of each worker.
    answered: HashMap<SocketAddr, Instant>,
}

#[derive(Debug)]
struct Pending {
    worker: LegacyWorker,
    reply: oneshot::Sender<Message>,
}

/// One task with a worker; dropping it gives the task up.
#[derive(Debug)]
pub(super) struct PendingTask {
    tasks: Arc<Tasks>,
    /// The sequence to send the task with.
    pub sequence: u32,
    /// Gets the worker's answer; fails when the worker is gone.
    pub reply: oneshot::Receiver<Message>,
}

impl Tasks {
    pub(super) fn open(self: &Arc<Self>, worker: LegacyWorker) -> PendingTask {
        let (sender, reply) = oneshot::channel();
        let mut inner = lock(&self.inner);
        // Tasks live for minutes at most, so the search is short even after four billion of them.
        let sequence = loop {
            let candidate = inner.next;
            inner.next = inner.next.wrapping_add(1);
            if !inner.pending.contains_key(&candidate) {
                break candidate;
            }
        };
        let pending = Pending {
            worker,
            reply: sender,
        };
        inner.pending.insert(sequence, pending);
        PendingTask {
            tasks: self.clone(),
            sequence,
            reply,
        }
    }

    /// A worker's answer came; false if no task waits for it, or if it came from another worker. An answer in
    /// another version than the task belongs to another task.
    pub(super) fn deliver(&self, source: LegacyWorker, message: Message) -> bool {
        let mut inner = lock(&self.inner);
        let pending = inner.pending.get(&message.sequence);
        if pending.is_none_or(|pending| pending.worker != source) {
            return false;
        }
        let pending = inner.pending.remove(&message.sequence);
        inner.answered.insert(source.address, Instant::now());
        drop(inner);
        pending.is_some_and(|pending| pending.reply.send(message).is_ok())
    }

    /// Returns true if a task with this sequence is with that worker.
    pub(super) fn awaits(&self, source: LegacyWorker, sequence: u32) -> bool {
        let pending = &lock(&self.inner).pending;
        let task = pending.get(&sequence);
        task.is_some_and(|pending| pending.worker == source)
    }

    /// Time of the last answer of this worker to a task.
    pub(super) fn last_answer(&self, worker: SocketAddr) -> Option<Instant> {
        lock(&self.inner).answered.get(&worker).copied()
    }

    /// A worker is gone: its tasks fail.
    pub(super) fn abandon(&self, worker: SocketAddr) {
        let mut inner = lock(&self.inner);
        inner.answered.remove(&worker);
        let pending = &mut inner.pending;
        pending.retain(|_, pending| pending.worker.address != worker);
    }
}

impl Drop for PendingTask {
    fn drop(&mut self) {
        lock(&self.tasks.inner).pending.remove(&self.sequence);
    }
}

/// A worker at an address of its own. It has no connection in any other sense: only the lack of heartbeats
/// says that it is gone.
#[derive(Debug)]
pub(super) struct LegacyConnection {
    pub(super) worker: LegacyWorker,
    /// The bus's own socket, to which Results come.
    pub(super) socket: Arc<BatchSocket>,
    pub(super) tasks: Arc<Tasks>,
}

impl Connection for LegacyConnection {
    fn open(
        &self,
        request: WorkerRequest,
    ) -> BoxFuture<'_, Result<Box<dyn AttemptStream>, Failure>> {
        Box::pin(async move {
            let pending = self.tasks.open(self.worker);
            let payload = request.plain.unwrap_or_default();
            let task = Message::new(MsgType::TASK, pending.sequence, timestamp_us(), payload);
            let datagram = task.encode_as(self.worker.version);
            let sent = self.socket.send_to(&datagram, self.worker.address).await;
            sent.map_err(|error| Failure::Lost(error.to_string()))?;
            Ok(Box::new(pending) as Box<dyn AttemptStream>)
        })
    }

    fn close(&self, _: ErrorCode, _: &str) {
        self.tasks.abandon(self.worker.address);
    }

    fn last_answer(&self) -> Option<Instant> {
        self.tasks.last_answer(self.worker.address)
    }
}

impl AttemptStream for PendingTask {
    fn receive(&mut self) -> BoxFuture<'_, Result<FromWorker, Failure>> {
        Box::pin(async move {
            let Ok(message) = (&mut self.reply).await else {
                return Err(Failure::Lost("the worker is gone".into()));
            };
            if message.kind != MsgType::RESULT {
                return Err(error_of(&message));
            }
            if message.payload.len() > MOST_WHOLE {
                let text = format!("its Result has {} bytes", message.payload.len());
                return Err(Failure::Nonsense(text));
            }
            Ok(FromWorker::Whole(message.payload))
        })
    }
}

/// Bytes of a whole answer.
const MOST_WHOLE: usize = 8 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(port: u16) -> LegacyWorker {
        LegacyWorker {
            address: SocketAddr::from(([127, 0, 0, 1], port)),
            version: Version::V5_0,
        }
    }

    #[test]
    fn an_answer_reaches_the_task_with_its_sequence_and_no_other() {
        let tasks = Arc::new(Tasks::default());
        let mut one = tasks.open(worker(1));
        let mut two = tasks.open(worker(1));
        assert_ne!(one.sequence, two.sequence);
        let answer = |sequence| Message::new(MsgType::RESULT, sequence, 0, "x");
        assert!(
            !tasks.deliver(worker(2), answer(two.sequence)),
            "from a stranger"
        );
        let newer = LegacyWorker {
            version: Version::V5_1,
            ..worker(1)
        };
        assert!(
            !tasks.deliver(newer, answer(two.sequence)),
            "in another version"
        );
        assert!(tasks.deliver(worker(1), answer(two.sequence)));
        assert!(!tasks.deliver(worker(1), answer(two.sequence)), "twice");
        assert_eq!(two.reply.try_recv().unwrap().sequence, two.sequence);
        assert!(one.reply.try_recv().is_err());
    }

    #[test]
    fn tasks_of_a_worker_that_is_gone_fail_and_others_do_not() {
        let tasks = Arc::new(Tasks::default());
        let mut gone = tasks.open(worker(1));
        let mut stays = tasks.open(worker(2));
        tasks.abandon(worker(1).address);
        assert_eq!(
            gone.reply.try_recv(),
            Err(oneshot::error::TryRecvError::Closed)
        );
        assert_eq!(
            stays.reply.try_recv(),
            Err(oneshot::error::TryRecvError::Empty)
        );
        drop((gone, stays));
        assert!(lock(&tasks.inner).pending.is_empty());
    }
}
