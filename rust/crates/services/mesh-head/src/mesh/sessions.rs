//! The sessions whose workers seal their heartbeats.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use dcf::Message;
use mesh_control::registry::WorkerId;
use mesh_net::seal::{self, Opener};

/// The keys of sealed heartbeats, by session.
#[derive(Debug, Default)]
pub(crate) struct Sessions(Mutex<HashMap<u64, (WorkerId, Opener)>>);

impl Sessions {
    /// A worker has a session.
    pub(crate) fn open(&self, session: u64, worker: WorkerId, opener: Opener) {
        self.lock().insert(session, (worker, opener));
    }

    /// Its link is over.
    pub(crate) fn close(&self, session: u64) {
        self.lock().remove(&session);
    }

    /// The worker that sealed this message, and the content.
    pub(crate) fn unseal(&self, message: &Message) -> Option<(WorkerId, Bytes)> {
        let session = seal::session(message)?;
        let mut sessions = self.lock();
        let (worker, opener) = sessions.get_mut(&session)?;
        Some((*worker, opener.open(message).ok()?))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, (WorkerId, Opener)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
