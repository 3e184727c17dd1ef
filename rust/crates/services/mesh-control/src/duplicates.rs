//! Nodes whose identity two machines have: a state directory was copied, for example with an SD card.
//!
//! The shell finds that out, by asking the older link whether it still answers; this remembers it for as long
//! as it goes on.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// A machine that uses the identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Address of the machine.
    pub address: SocketAddr,
    /// Its host name; empty if it did not say.
    pub host: String,
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.host.as_str() {
            "" => write!(f, "{}", self.address.ip()),
            host => write!(f, "{host} at {}", self.address.ip()),
        }
    }
}

/// An identity that two machines have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Duplicate {
    /// Name of the worker.
    pub worker: String,
    /// The machine that is connected.
    pub kept: Machine,
    /// The one that was refused last.
    pub refused: Machine,
    /// Number of refusals.
    pub times: u64,
    last: Instant,
}

impl Duplicate {
    /// Advice to the operator.
    pub fn advice(&self) -> String {
        format!(
            "worker `{}` runs on two machines with the same identity: {} is connected, {} is refused. Its state directory was \
             copied: on one of them run `mesh-worker new-identity` and restart it with a new token (`hydramesh token create`)",
            self.worker, self.kept, self.refused
        )
    }
}

/// Duplicates by node id. Only members of the mesh get here, so the map never has more entries than the mesh
/// has members.
#[derive(Debug, Clone, Default)]
pub struct Duplicates(BTreeMap<String, Duplicate>);

impl Duplicates {
    /// A second machine was refused. True if that is news.
    pub fn refused(
        &mut self,
        node: &str,
        worker: &str,
        kept: Machine,
        refused: Machine,
        now: Instant,
    ) -> bool {
        self.settle(now);
        let known = self.0.get(node);
        let news = known.is_none_or(|known| known.refused.address.ip() != refused.address.ip());
        let duplicate = Duplicate {
            worker: worker.to_owned(),
            kept,
            refused,
            times: known.map_or(0, |known| known.times) + 1,
            last: now,
        };
        self.0.insert(node.to_owned(), duplicate);
        news
    }

    /// Advice about a node, if it is one of them.
    pub fn advice(&self, node: &str) -> Option<String> {
        self.0.get(node).map(Duplicate::advice)
    }

    /// Recent duplicates, by node.
    pub fn view(&mut self, now: Instant) -> Vec<Duplicate> {
        self.settle(now);
        self.0.values().cloned().collect()
    }

    fn settle(&mut self, now: Instant) {
        self.0
            .retain(|_, duplicate| now.saturating_duration_since(duplicate.last) < MEMORY);
    }
}

/// A refused worker asks again within five minutes; one that does not was mended.
const MEMORY: Duration = Duration::from_secs(660);

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(last: u8, host: &str) -> Machine {
        Machine {
            address: SocketAddr::from(([10, 0, 0, last], 40_000)),
            host: host.into(),
        }
    }

    #[test]
    fn a_duplicate_is_named_once_and_forgotten_when_it_no_longer_asks() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut duplicates = Duplicates::default();
        let mut refuse = |seconds, last| {
            let (kept, refused) = (machine(1, "attic"), machine(last, ""));
            duplicates.refused("aa", "pi", kept, refused, at(seconds))
        };
        assert!(refuse(0, 2));
        assert!(!refuse(300, 2), "the same one again");
        assert!(refuse(301, 3), "a third machine");
        let view = duplicates.view(at(302));
        assert_eq!((view.len(), view[0].times), (1, 3));
        let advice = view[0].advice();
        for part in [
            "`pi`",
            "attic at 10.0.0.1",
            "10.0.0.3 is refused",
            "mesh-worker new-identity",
        ] {
            assert!(advice.contains(part), "{part} is not in {advice}");
        }
        assert!(duplicates.view(at(301) + MEMORY).is_empty());
    }
}
