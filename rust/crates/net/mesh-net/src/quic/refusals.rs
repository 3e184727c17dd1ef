//! Peers that a listener turned away, for whoever reports attacks.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use mesh_base::sync::lock;

/// A peer that was turned away for a reason that honest peers rarely have.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refused {
    /// An expelled node.
    Expelled {
        /// Its id.
        node_id: String,
        /// Its name.
        name: String,
    },
    /// A peer without a certificate of this mesh.
    Certificate {
        /// Its address; of an IPv6 host its network.
        source: IpAddr,
    },
    /// A peer that began too many handshakes.
    Rate {
        /// Its address; of an IPv6 host its network.
        source: IpAddr,
    },
}

/// The latest refusals of a listener, each once. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Refusals(Arc<Mutex<VecDeque<Refused>>>);

impl Refusals {
    pub(super) fn note(&self, refused: Refused) {
        let mut all = lock(&self.0);
        // A flood does not push out what is waiting.
        if all.len() < MOST && !all.contains(&refused) {
            all.push_back(refused);
        }
    }

    /// The refusals since the last call.
    pub fn take(&self) -> Vec<Refused> {
        lock(&self.0).drain(..).collect()
    }
}

/// Refusals that wait to be taken.
const MOST: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_bounded_and_each_is_noted_once() {
        let refusals = Refusals::default();
        let rate = |n: u32| Refused::Rate {
            source: IpAddr::from(n.to_be_bytes()),
        };
        for _ in 0..2 {
            (0..1000).for_each(|n| refusals.note(rate(n)));
        }
        let taken = refusals.take();
        assert_eq!((taken.len(), &taken[0]), (MOST, &rate(0)));
        assert!(refusals.take().is_empty());
        refusals.note(rate(0));
        assert_eq!(refusals.take(), [rate(0)]);
    }
}
