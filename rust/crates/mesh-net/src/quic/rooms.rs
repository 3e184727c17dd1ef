//! Room for connections that are not links yet. Each kind of them has its own, so that none can take another's.
//!
//! A newcomer always gets in, and whoever has waited longest of the source that has the most is given up for it
//! ([`mesh_base::places`]). Honest peers are here for a few round trips; what stays for longer is what goes.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mesh_base::places::Room;

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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const MOST_KNOWN: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_links_have_a_room_of_their_own_and_are_forgotten_in_their_order() {
        let rooms = Rooms::new();
        let address = |n: u32| IpAddr::from(n.to_be_bytes());
        let start = Instant::now();
        let is_known = |n| rooms.for_handshake(address(n)).is(&rooms.known);
        for n in 0..2000 {
            assert!(!is_known(n));
            rooms.came_in(address(n), start + std::time::Duration::from_secs(n.into()));
            assert!(is_known(n));
        }
        assert!(!is_known(0) && is_known(1999));
        assert_eq!(lock(&rooms.addresses).0.len(), MOST_KNOWN);
    }
}
