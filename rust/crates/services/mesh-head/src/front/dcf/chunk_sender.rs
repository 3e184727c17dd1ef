//! Sends answers that no datagram holds, at the pace of [`mesh_control::outbox`].

use std::sync::{Arc, Mutex};
use std::time::Instant;

use dcf::{Message, chunk};
use mesh_net::udp::{BatchSocket, SendBatch};
use tokio_util::task::TaskTracker;
use tracing::debug;

use mesh_control::dedup::TaskKey;
use mesh_control::outbox::{Added, Limits, Outbox};
use mesh_net::sealed::SEALED_CHUNK_DATA;

use super::reply::queue;
use super::sealed::Sessions;
use crate::locks::lock;

/// Sends Chunks from one socket. While there are any, a task of its own sends them.
#[derive(Debug)]
pub(crate) struct ChunkSender {
    socket: Arc<BatchSocket>,
    sessions: Arc<Sessions>,
    outbox: Mutex<Outbox>,
    running: TaskTracker,
}

impl ChunkSender {
    /// A sender whose work is counted in `running`.
    pub(crate) fn new(
        socket: Arc<BatchSocket>,
        sessions: Arc<Sessions>,
        running: TaskTracker,
    ) -> Arc<Self> {
        Arc::new(Self {
            socket,
            sessions,
            outbox: Mutex::new(Outbox::new(Limits::default())),
            running,
        })
    }

    /// Begins to send an answer, from its beginning also where a part of it is out already. One that there is
    /// no room for is left out: its client gets it when it repeats its Task.
    pub(crate) fn send(self: &Arc<Self>, key: TaskKey, answer: &Message) {
        let client = key.client;
        let size = match key.session {
            Some(_) => SEALED_CHUNK_DATA,
            None => chunk::MAX_DATA,
        };
        let payload = answer.payload.clone();
        let split = chunk::split_into(key.sequence, answer.timestamp_us, payload, size);
        let chunks = match split {
            Ok(chunks) => chunks,
            Err(error) => return debug!(%error, %client, "answer not sent"),
        };
        let now = Instant::now();
        let added = lock(&self.outbox).add(key, chunks, answer.payload.len(), now);
        match added {
            Added::First => {
                let sender = self.clone();
                self.running.spawn(async move { sender.run().await });
            }
            Added::Queued => {}
            Added::Full => debug!(%client, "too many large answers under way, one not sent"),
        }
    }

    /// Like [`ChunkSender::send`], unless the answer is on its way already.
    pub(crate) fn send_again(self: &Arc<Self>, key: TaskKey, answer: &Message) {
        if !lock(&self.outbox).is_sending(key) {
            self.send(key, answer);
        }
    }

    pub(crate) fn stop(&self, key: TaskKey) {
        lock(&self.outbox).remove(key);
    }

    async fn run(&self) {
        let mut batch = SendBatch::new();
        loop {
            let next = lock(&self.outbox).due(Instant::now(), |key, chunk| {
                queue(&mut batch, &self.sessions, key, &chunk);
            });
            if let Err(error) = self.socket.send(&mut batch).await {
                debug!(%error, "chunks not sent");
                batch.clear();
            }
            let Some(next) = next else { return };
            tokio::time::sleep_until(next.into()).await;
        }
    }
}
