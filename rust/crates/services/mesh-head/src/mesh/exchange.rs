//! Tasks on their way through workers of DCF v5.0.0 and v5.1: from the head's own sequence back to the
//! request that waits for the answer.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use dcf::{Message, Version};
use mesh_net::udp::BatchSocket;
use tokio::sync::oneshot;

/// A worker without an identity, as it is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LegacyWorker {
    /// The address at which it takes tasks.
    pub address: SocketAddr,
    /// The version of DCF that it speaks.
    pub version: Version,
}

/// The tasks that such workers have now.
#[derive(Debug, Default)]
pub(crate) struct Exchange {
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
pub(crate) struct LegacyTask<'a> {
    exchange: &'a Exchange,
    /// The sequence to send the task with.
    pub sequence: u32,
    /// Gets the worker's answer; fails when the worker is gone.
    pub reply: oneshot::Receiver<Message>,
}

impl Exchange {
    /// A task for this worker.
    pub(crate) fn open(&self, worker: LegacyWorker) -> LegacyTask<'_> {
        let (sender, reply) = oneshot::channel();
        let mut inner = self.lock();
        // Tasks live for minutes at most, so the search is short even after four billion of them.
        let sequence = loop {
            let candidate = inner.next;
            inner.next = inner.next.wrapping_add(1);
            if !inner.pending.contains_key(&candidate) {
                break candidate;
            }
        };
        inner.pending.insert(
            sequence,
            Pending {
                worker,
                reply: sender,
            },
        );
        LegacyTask {
            exchange: self,
            sequence,
            reply,
        }
    }

    /// A worker's answer came; false if no task waits for it, or if it came from another worker. An answer in
    /// another version than the task belongs to another task.
    pub(crate) fn deliver(&self, source: LegacyWorker, message: Message) -> bool {
        let mut inner = self.lock();
        if inner
            .pending
            .get(&message.sequence)
            .is_none_or(|pending| pending.worker != source)
        {
            return false;
        }
        let pending = inner.pending.remove(&message.sequence);
        inner.answered.insert(source.address, Instant::now());
        drop(inner);
        pending.is_some_and(|pending| pending.reply.send(message).is_ok())
    }

    /// Returns true if a task with this sequence is with that worker.
    pub(crate) fn awaits(&self, source: LegacyWorker, sequence: u32) -> bool {
        self.lock()
            .pending
            .get(&sequence)
            .is_some_and(|pending| pending.worker == source)
    }

    /// Time of the last answer of this worker to a task.
    pub(crate) fn last_answer(&self, worker: SocketAddr) -> Option<Instant> {
        self.lock().answered.get(&worker).copied()
    }

    /// A worker is gone: its tasks fail.
    pub(crate) fn abandon(&self, worker: SocketAddr) {
        let mut inner = self.lock();
        inner.answered.remove(&worker);
        inner
            .pending
            .retain(|_, pending| pending.worker.address != worker);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for LegacyTask<'_> {
    fn drop(&mut self) {
        self.exchange.lock().pending.remove(&self.sequence);
    }
}

/// Sends Tasks to workers without an identity, from the socket that their Results come to.
#[derive(Debug, Clone)]
pub(crate) struct BusSender(Arc<BatchSocket>);

impl BusSender {
    /// A sender on the bus's own socket.
    pub(crate) fn new(socket: Arc<BatchSocket>) -> Self {
        Self(socket)
    }

    /// Sends one message in the worker's version.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) async fn send(&self, message: &Message, worker: LegacyWorker) -> io::Result<()> {
        let datagram = message.encode_as(worker.version);
        self.0.send_to(&datagram, worker.address).await
    }
}

#[cfg(test)]
mod tests {
    use dcf::MsgType;

    use super::*;

    fn worker(port: u16) -> LegacyWorker {
        LegacyWorker {
            address: SocketAddr::from(([127, 0, 0, 1], port)),
            version: Version::V5_0,
        }
    }

    #[test]
    fn an_answer_reaches_the_task_with_its_sequence_and_no_other() {
        let exchange = Exchange::default();
        let mut one = exchange.open(worker(1));
        let mut two = exchange.open(worker(1));
        assert_ne!(one.sequence, two.sequence);
        let answer = |sequence| Message::new(MsgType::RESULT, sequence, 0, "x");
        assert!(
            !exchange.deliver(worker(2), answer(two.sequence)),
            "from a stranger"
        );
        let newer = LegacyWorker {
            version: Version::V5_1,
            ..worker(1)
        };
        assert!(
            !exchange.deliver(newer, answer(two.sequence)),
            "in another version"
        );
        assert!(exchange.deliver(worker(1), answer(two.sequence)));
        assert!(!exchange.deliver(worker(1), answer(two.sequence)), "twice");
        assert_eq!(two.reply.try_recv().unwrap().sequence, two.sequence);
        assert!(one.reply.try_recv().is_err());
    }

    #[test]
    fn tasks_of_a_worker_that_is_gone_fail_and_others_do_not() {
        let exchange = Exchange::default();
        let mut gone = exchange.open(worker(1));
        let mut stays = exchange.open(worker(2));
        exchange.abandon(worker(1).address);
        assert_eq!(
            gone.reply.try_recv(),
            Err(oneshot::error::TryRecvError::Closed)
        );
        assert_eq!(
            stays.reply.try_recv(),
            Err(oneshot::error::TryRecvError::Empty)
        );
        drop((gone, stays));
        assert!(exchange.lock().pending.is_empty());
    }
}
