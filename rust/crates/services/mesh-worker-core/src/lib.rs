//! The worker's decisions as one plain state machine: no socket, no clock, no task, no file.
//!
//! [`Core`] knows everything that this worker holds, wants, offers, deploys and serves. Events and the current
//! time go in, steps come out; `mesh-worker` carries them out. So every failure case is an ordinary unit test
//! with simulated time. Its parts are fields, for the events of one of them; events that concern several are
//! methods of the core. The page on the architecture says what each part decides.
//!
//! How to drive it: after an event, and at the time that the last [`SearchStep::Wait`],
//! [`DownloadStep::Wait`], [`LoadStep::Wait`] or [`RingStep::Wait`] named, call the `poll` of what the event
//! was about until it says to wait again. Carry each step out before the next call; those whose doc says so
//! report a result.

#![forbid(unsafe_code)]

pub mod catalogue;
pub mod deployment;
pub mod deployments;
pub mod download;
pub mod head;
mod knowledge;
pub mod loads;
pub mod names;
pub mod offers;
pub mod piece_map;
pub mod replica;
mod report;
pub mod rules;
pub mod search;
#[cfg(test)]
mod testing;
pub mod vouch;

use std::time::{Duration, Instant};

use mesh_proto::{ModelCard, Ring, Sources};

pub use self::catalogue::{Catalogue, Found};
pub use self::deployment::{Deployment, LoadedPart, RingStep, StreamEnd};
pub use self::deployments::{Deployments, Ordered};
pub use self::download::{DownloadStep, SourceEvent};
pub use self::head::{HeadLink, Lease, Refusal};
pub use self::loads::{
    Failure, LoadError, LoadId, LoadOrder, LoadStep, Loads, LocalModel, Location, Readiness, Sight,
    Stamp,
};
pub use self::offers::Offers;
pub use self::piece_map::PieceMap;
pub use self::replica::Replica;
pub use self::rules::Rules;
pub use self::search::SearchStep;
pub use self::vouch::{Doubt, HubAnswer, Vouched};

/// All decisions of one worker. `S` is a stream that another worker opened.
pub struct Core<S> {
    /// Replicas of models, searches and downloads.
    pub catalogue: Catalogue,
    /// Models to load and to serve.
    pub loads: Loads,
    /// Models to hold parts of.
    pub offers: Offers,
    /// Rings with parts here.
    pub deployments: Deployments<S>,
    /// The link to the head.
    pub head: HeadLink,
}

impl<S> Core<S> {
    /// A worker that holds these replicas and does nothing yet.
    pub fn new(catalogue: Catalogue) -> Self {
        Core {
            catalogue,
            loads: Loads::default(),
            offers: Offers::default(),
            deployments: Deployments::default(),
            head: HeadLink::default(),
        }
    }

    /// The worker has an identity, and others reach it at `port`.
    pub fn connected(&mut self, node_id: &str, port: u16) {
        self.catalogue.connected(node_id.to_owned(), port);
        self.deployments.identify(node_id.to_owned());
    }

    /// The link to the head is up, and the head has heard that these models are served.
    pub fn head_linked(&mut self, cards: Vec<ModelCard>) -> Lease {
        // The end of the lease before may not have been noticed.
        self.deployments.head_lost();
        self.offers.head_linked();
        self.head.up(cards)
    }

    /// There is no link to the head, or no longer one: what it deployed ends. Returns the pause before the next
    /// attempt; `random` goes from 0 to 1.
    pub fn head_lost(&mut self, refusal: Option<Refusal>, now: Instant, random: f64) -> Duration {
        self.deployments.head_lost();
        self.head.down(refusal, now, random)
    }

    /// The head names the members of a ring, or none if it ends. An order of another lease is not carried out.
    pub fn deploy(&mut self, lease: Lease, ring: Ring, now: Instant) -> Ordered {
        if !self.head.holds(lease) {
            return Ordered::Refused;
        }
        let offered = self.offers.has(&ring.model, &ring.fingerprint);
        self.deployments.order(ring, offered, now)
    }

    /// The head names the sources of the models that are sought. What it says in another lease does not count.
    pub fn sources_told(&mut self, lease: Lease, sources: Sources) {
        if self.head.holds(lease) {
            self.catalogue.sources_told(sources);
        }
    }
}

#[cfg(test)]
mod tests;
