//! The addresses of this machine from which peers are answered.
//!
//! A UDP socket bound to all addresses answers from the address that the routing table prefers, which may
//! differ from the one that the peer used: IPv6 prefers temporary addresses, and a machine may have several
//! interfaces. A peer with a connected socket never sees such an answer. So the last datagram of each peer
//! determines the source of its answers.

use std::net::{IpAddr, SocketAddr};

/// The local addresses that peers sent to. The table has a fixed size: of two peers with the same place the
/// later one is remembered, and the other is answered by the routing table.
#[derive(Debug)]
pub struct Routes {
    places: Box<[Option<(SocketAddr, IpAddr)>]>,
}

impl Routes {
    /// An empty table.
    pub fn new() -> Self {
        Self {
            places: vec![None; PLACES].into(),
        }
    }

    /// A datagram from `peer` came to `local`.
    pub fn note(&mut self, peer: SocketAddr, local: IpAddr) {
        let local = local.to_canonical();
        // A broadcast or multicast address cannot be the source of an answer.
        let broadcast = matches!(local, IpAddr::V4(ip) if ip.is_broadcast());
        if local.is_unspecified() || local.is_multicast() || broadcast {
            return;
        }
        self.places[place(peer)] = Some((peer, local));
    }

    /// The local address that answers to `peer` leave from.
    pub fn get(&self, peer: SocketAddr) -> Option<IpAddr> {
        let (known, local) = self.places[place(peer)]?;
        (known == peer).then_some(local)
    }

    /// Nothing can be sent from there any more. True if there was something to forget.
    pub fn forget(&mut self, peer: SocketAddr) -> bool {
        self.get(peer).is_some() && self.places[place(peer)].take().is_some()
    }
}

impl Default for Routes {
    fn default() -> Self {
        Self::new()
    }
}

/// FNV-1a over address and port.
fn place(peer: SocketAddr) -> usize {
    let octets = match peer.ip() {
        IpAddr::V4(ip) => u128::from(ip.to_bits()),
        IpAddr::V6(ip) => ip.to_bits(),
    };
    let port = peer.port().to_ne_bytes();
    let bytes = octets.to_ne_bytes().into_iter().chain(port);
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    (hash >> 32) as usize % PLACES
}

const PLACES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_answered_from_where_it_asked() {
        let mut routes = Routes::new();
        let peer = |port| SocketAddr::from(([10, 0, 0, 9], port));
        let (one, two) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        assert_eq!(routes.get(peer(1)), None);
        routes.note(peer(1), one);
        routes.note(peer(1), two);
        assert_eq!(routes.get(peer(1)), Some(two));
        for bad in [[224, 0, 0, 1], [255, 255, 255, 255], [0, 0, 0, 0]] {
            routes.note(peer(1), IpAddr::from(bad));
        }
        assert_eq!(routes.get(peer(1)), Some(two));
        assert!(routes.forget(peer(1)) && !routes.forget(peer(1)));
        for port in 1..=u16::MAX {
            routes.note(peer(port), one);
        }
        assert_eq!(routes.get(peer(u16::MAX)), Some(one));
    }
}
