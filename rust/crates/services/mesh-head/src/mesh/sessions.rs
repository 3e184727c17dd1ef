//! The sessions whose workers seal their heartbeats.

use std::collections::HashMap;
use std::sync::Mutex;

use bytes::Bytes;
use dcf::Message;
use mesh_control::registry::WorkerId;
use mesh_net::seal::{self, Opener};

use crate::locks::lock;
/// The keys of sealed heartbeats, by session.
#[derive(Debug, Default)]
pub(crate) struct Sessions(Mutex<HashMap<u64, (WorkerId, Opener)>>);

impl Sessions {
    pub(crate) fn open(&self, session: u64, worker: WorkerId, opener: Opener) {
        lock(&self.0).insert(session, (worker, opener));
    }

    pub(crate) fn close(&self, session: u64) {
        lock(&self.0).remove(&session);
    }

    /// The worker that sealed this message, and the content.
    pub(crate) fn unseal(&self, message: &Message) -> Option<(WorkerId, Bytes)> {
        let session = seal::session(message)?;
        let mut sessions = lock(&self.0);
        let (worker, opener) = sessions.get_mut(&session)?;
        Some((*worker, opener.open(message).ok()?))
    }
}
