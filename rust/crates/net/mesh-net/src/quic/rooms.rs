//! Places for connections that are not links yet. Each kind has its own, so that no kind can take another's.
//!
//! A newcomer always gets a place. If there is no free one, the source with the most places loses its oldest
//! ([`mesh_base::places`]). Honest peers need a few round trips; longer ones are evicted.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use mesh_base::places::Room;
use mesh_base::sync::lock;
use mesh_base::token_bucket::TokenBucket;

/// The rooms of one listener.
#[derive(Clone)]
pub(super) struct Rooms {
    /// Handshakes of addresses without a recent link.
    pub(super) strangers: Room<IpAddr>,
    /// Handshakes of addresses that have or had a link.
    pub(super) known: Room<IpAddr>,
    /// Nodes without a certificate, which want to join. The first request is awaited here.
    pub(super) joining: Room<IpAddr>,
    /// Nodes that want to join and have sent their request, which is decided and answered here.
    pub(super) answering: Room<IpAddr>,
    /// Clients that ask for a session.
    pub(super) clients: Room<IpAddr>,
    /// Nodes with a certificate, by their id, which want another one.
    pub(super) renewing: Room<String>,
    /// Nodes with a certificate, by their id, on their way to becoming a link.
    pub(super) entering: Room<String>,
    /// Sources of links, the latest [`MOST_KNOWN`] of them.
    addresses: Arc<Mutex<HashMap<IpAddr, Instant>>>,
    limiter: Arc<Mutex<HandshakeLimiter>>,
}

impl Rooms {
    pub(super) fn new() -> Self {
        Self {
            // An unfinished handshake takes some 30 kB.
            strangers: Room::new(128, 64),
            known: Room::new(256, 128),
            joining: Room::new(64, 32),
            answering: Room::new(64, 32),
            clients: Room::new(64, 16),
            renewing: Room::new(64, 4),
            entering: Room::new(256, 16),
            addresses: Arc::default(),
            limiter: Arc::default(),
        }
    }

    /// The room for a handshake of this source.
    pub(super) fn for_handshake(&self, source: IpAddr) -> &Room<IpAddr> {
        match self.is_known(source) {
            true => &self.known,
            false => &self.strangers,
        }
    }

    /// True if the source may begin a handshake now. Each takes a millisecond of processor time; refused
    /// peers try again.
    pub(super) fn may_begin(&self, source: IpAddr, now: Instant) -> bool {
        let share = if self.is_known(source) { 4.0 } else { 1.0 };
        // A peer on this machine shares its processor anyway.
        source.is_loopback() || lock(&self.limiter).take(source, share, now)
    }

    fn is_known(&self, source: IpAddr) -> bool {
        lock(&self.addresses).contains_key(&source)
    }

    /// Records a link from this source.
    pub(super) fn came_in(&self, source: IpAddr, now: Instant) {
        let mut known = lock(&self.addresses);
        known.insert(source, now);
        if known.len() > MOST_KNOWN {
            let oldest = known.iter().min_by_key(|&(_, &at)| at);
            let (&oldest, _) = oldest.expect("there are some");
            known.remove(&oldest);
        }
    }
}

/// Limit on the handshakes of each source: a bucket of [`BURST`], filled by [`PER_SECOND`].
#[derive(Default)]
struct HandshakeLimiter(HashMap<IpAddr, TokenBucket>);

impl HandshakeLimiter {
    /// `share` times as much for this source.
    fn take(&mut self, source: IpAddr, share: f64, now: Instant) -> bool {
        if self.0.len() >= MOST_KNOWN && !self.0.contains_key(&source) {
            self.0
                .retain(|_, bucket| !bucket.is_full(PER_SECOND, BURST, now));
            // So many sources at once are held back by the rooms alone.
            if self.0.len() >= MOST_KNOWN {
                return true;
            }
        }
        let (per_second, burst) = (PER_SECOND * share, BURST * share);
        let full = || TokenBucket::full(burst, now);
        let bucket = self.0.entry(source).or_insert_with(full);
        bucket.take(per_second, burst, now)
    }
}

const MOST_KNOWN: usize = 1024;
const BURST: f64 = 64.0;
const PER_SECOND: f64 = 20.0;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_source_begins_so_many_handshakes_a_second_and_one_with_links_more() {
        let rooms = Rooms::new();
        let address = |n: u32| IpAddr::from(n.to_be_bytes());
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let begun = |source, now| (0..1000).filter(|_| rooms.may_begin(source, now)).count();
        assert_eq!(begun(address(1), at(0)), 64);
        assert_eq!(begun(address(1), at(1)), 20);
        assert_eq!(begun(address(2), at(1)), 64);
        rooms.came_in(address(3), at(0));
        assert_eq!(
            (begun(address(3), at(0)), begun(address(3), at(1))),
            (256, 80)
        );
        assert_eq!(begun(IpAddr::from([127, 0, 0, 1]), at(0)), 1000);
        for n in 10..5000 {
            assert!(rooms.may_begin(address(n), at(2)));
        }
        assert!(lock(&rooms.limiter).0.len() <= MOST_KNOWN);
    }

    #[test]
    fn addresses_of_links_have_a_room_of_their_own_and_are_forgotten_in_their_order() {
        let rooms = Rooms::new();
        let address = |n: u32| IpAddr::from(n.to_be_bytes());
        let start = Instant::now();
        let is_known = |n| rooms.for_handshake(address(n)).is(&rooms.known);
        for n in 0..2000 {
            assert!(!is_known(n));
            rooms.came_in(address(n), start + Duration::from_secs(n.into()));
            assert!(is_known(n));
        }
        assert!(!is_known(0) && is_known(1999));
        assert_eq!(lock(&rooms.addresses).len(), MOST_KNOWN);
    }
}
