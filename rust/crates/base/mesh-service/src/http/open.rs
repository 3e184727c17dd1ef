//! The connections that are open, and the requests on them that are incomplete.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use mesh_base::sync::lock;
use tokio_util::sync::CancellationToken;

use super::budget::Budget;
use super::table::{Admitted, Bounds, Id, Table};

/// The open connections of one listener. Clones share them.
#[derive(Clone)]
pub(super) struct OpenConnections(Arc<Mutex<Inner>>);

pub(super) struct Inner {
    pub(super) table: Table,
    /// Tokens that end a connection that is evicted for another.
    ends: HashMap<Id, CancellationToken>,
    /// Budget of incomplete requests.
    unfinished: Budget<CancellationToken>,
    /// Budget ids of requests whose heads are incomplete.
    heads: HashMap<Id, u64>,
}

impl OpenConnections {
    pub(super) fn new(bounds: Bounds, unfinished: u64) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            table: Table::new(bounds),
            ends: HashMap::new(),
            unfinished: Budget::new(unfinished),
            heads: HashMap::new(),
        })))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.0)
    }

    pub(super) fn admit(&self, address: SocketAddr) -> (Admitted, CancellationToken) {
        let mut inner = self.lock();
        let admitted = inner.table.open(address.ip(), Instant::now());
        let end = CancellationToken::new();
        inner.ends.insert(admitted.id, end.clone());
        inner.end(admitted.evicted);
        (admitted, end)
    }

    /// Evicts a connection when the system has no room for another.
    pub(super) fn exhausted(&self) {
        let mut inner = self.lock();
        let evicted = inner.table.exhausted();
        inner.end(evicted);
    }

    pub(super) fn closed(&self, id: Id) {
        let mut inner = self.lock();
        inner.table.closed(id);
        inner.ends.remove(&id);
        inner.head_is_over(id);
    }

    /// Records that bytes arrived.
    pub(super) fn heard(&self, id: Id, bytes: u64) {
        let inner = &mut *self.lock();
        inner.table.heard(id, Instant::now());
        let (Some(source), Some(end)) = (inner.table.head_from(id), inner.ends.get(&id)) else {
            return;
        };
        let enter = || inner.unfinished.enter(source, end.clone());
        let place = *inner.heads.entry(id).or_insert_with(enter);
        for end in inner.unfinished.grow(place, bytes) {
            end.cancel();
        }
    }

    /// Records that the head of a request is complete.
    pub(super) fn asked(&self, id: Id, body: bool, streams: bool) {
        let mut inner = self.lock();
        inner.table.asked(id, body, streams, Instant::now());
        inner.head_is_over(id);
    }

    /// Begins a body, which `given_up` ends.
    pub(super) fn unfinished(&self, source: IpAddr, given_up: CancellationToken) -> u64 {
        self.lock().unfinished.enter(source, given_up)
    }

    /// Records that more of a body arrived.
    pub(super) fn grows(&self, place: u64, bytes: u64) {
        for given_up in self.lock().unfinished.grow(place, bytes) {
            given_up.cancel();
        }
    }

    /// Ends a body that is complete or abandoned.
    pub(super) fn finished(&self, place: u64) {
        self.lock().unfinished.leave(place);
    }
}

impl Inner {
    /// Ends a connection that was evicted.
    fn end(&mut self, evicted: Option<Id>) {
        if let Some(end) = evicted.and_then(|id| self.ends.remove(&id)) {
            end.cancel();
        }
    }

    fn head_is_over(&mut self, id: Id) {
        if let Some(place) = self.heads.remove(&id) {
            self.unfinished.leave(place);
        }
    }
}
