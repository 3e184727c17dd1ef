//! Room for connections that are not links yet. Each kind of them has its own, so that none can take another's.
//!
//! A newcomer always gets in, and whoever has waited longest of the source that has the most is given up for it
//! ([`Places`]). Honest peers are here for a few round trips; what stays for longer is what goes.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mesh_base::places::Places;
use tokio::sync::oneshot;

/// The rooms of one listener.
#[derive(Clone)]
pub(super) struct Rooms {
    /// Handshakes of addresses from which no link has come lately.
    pub(super) strangers: Room<IpAddr>,
    /// Handshakes of addresses that have or had a link.
    pub(super) known: Room<IpAddr>,
    /// Nodes without a certificate, which want to join. The first request is awaited here.
    pub(super) joining: Room<IpAddr>,
    /// The same whose request has come. It is decided and answered here.
    pub(super) answering: Room<IpAddr>,
    /// Nodes with a certificate, by their id, which want another one.
    pub(super) renewing: Room<String>,
    /// Nodes with a certificate, by their id, on their way to becoming a link.
    pub(super) entering: Room<String>,
    addresses: Arc<Mutex<Known>>,
}

impl Rooms {
    pub(super) fn new() -> Self {
        Self {
            strangers: Room::new(256, 128),
            known: Room::new(256, 128),
            joining: Room::new(64, 32),
            answering: Room::new(64, 32),
            renewing: Room::new(64, 4),
            entering: Room::new(256, 16),
            addresses: Arc::default(),
        }
    }

    /// The room for a handshake of this source.
    pub(super) fn for_handshake(&self, source: IpAddr) -> &Room<IpAddr> {
        match lock(&self.addresses).0.contains_key(&source) {
            true => &self.known,
            false => &self.strangers,
        }
    }

    /// A link came from this source.
    pub(super) fn came_in(&self, source: IpAddr, now: Instant) {
        lock(&self.addresses).note(source, now);
    }
}

/// Sources of links, the latest [`MOST_KNOWN`] of them.
#[derive(Default)]
struct Known(HashMap<IpAddr, Instant>);

impl Known {
    fn note(&mut self, source: IpAddr, now: Instant) {
        self.0.insert(source, now);
        if self.0.len() > MOST_KNOWN {
            let oldest = self.0.iter().min_by_key(|&(_, &at)| at);
            if let Some(oldest) = oldest.map(|(&source, _)| source) {
                self.0.remove(&oldest);
            }
        }
    }
}

/// A bounded number of connections at one step.
pub(super) struct Room<K>(Arc<Mutex<Places<K, oneshot::Sender<()>>>>);

/// The place was given up for somebody else.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct GivenUp;

impl<K: Clone + Eq + Hash> Room<K> {
    fn new(total: usize, per_source: usize) -> Self {
        Self(Arc::new(Mutex::new(Places::new(total, per_source))))
    }

    /// Does `work` for as long as it has its place.
    pub(super) async fn hold<T>(
        &self,
        source: K,
        work: impl Future<Output = T>,
    ) -> Result<T, GivenUp> {
        let (place, given_up) = oneshot::channel();
        let (id, other) = lock(&self.0).enter(source, place);
        // Ends the other's wait.
        drop(other);
        let _leaves = Leaves { room: self, id };
        tokio::select! {
            done = work => Ok(done),
            _ = given_up => Err(GivenUp),
        }
    }
}

impl<K> Clone for Room<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

struct Leaves<'a, K: Clone + Eq + Hash> {
    room: &'a Room<K>,
    id: u64,
}

impl<K: Clone + Eq + Hash> Drop for Leaves<'_, K> {
    fn drop(&mut self) {
        lock(&self.room.0).leave(self.id);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const MOST_KNOWN: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_stays_long_goes_first_and_others_notice_nothing() {
        let room: Room<u8> = Room::new(2, 2);
        let stay = |source| {
            let room = room.clone();
            tokio::spawn(async move { room.hold(source, std::future::pending::<()>()).await })
        };
        let (first, second) = (stay(1), stay(1));
        tokio::task::yield_now().await;
        let third = stay(2);
        assert_eq!(first.await.expect("no panic"), Err(GivenUp));
        assert!(!second.is_finished() && !third.is_finished());
        assert_eq!(room.hold(3, async { 7 }).await, Ok(7));
        second.abort();
        third.abort();
        let _ = (second.await, third.await);
        assert!(lock(&room.0).is_empty());
    }

    #[test]
    fn addresses_of_links_have_a_room_of_their_own_and_are_forgotten_in_their_order() {
        let rooms = Rooms::new();
        let address = |n: u32| IpAddr::from(n.to_be_bytes());
        let start = Instant::now();
        let is_known = |n| Arc::ptr_eq(&rooms.for_handshake(address(n)).0, &rooms.known.0);
        for n in 0..2000 {
            assert!(!is_known(n));
            rooms.came_in(address(n), start + std::time::Duration::from_secs(n.into()));
            assert!(is_known(n));
        }
        assert!(!is_known(0) && is_known(1999));
        assert_eq!(lock(&rooms.addresses).0.len(), MOST_KNOWN);
    }
}
