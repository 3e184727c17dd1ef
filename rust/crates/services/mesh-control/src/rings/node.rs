//! A worker that may hold parts of models, as the head knows it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use mesh_proto::{LayerOffer, NodeProfile, Offer};

/// A worker as ring planning knows it.
#[derive(Debug, Clone, Default)]
pub(super) struct RingWorker {
    /// Name a person knows it by.
    pub(super) name: String,
    pub(super) connected: bool,
    /// Time at which the head last heard anything on its link; `None` if that is not known.
    pub(super) heard: Option<Instant>,
    /// Address for other workers; `None` before its first offer.
    pub(super) address: Option<SocketAddr>,
    /// Other addresses of its machine, as it says.
    pub(super) others: Vec<IpAddr>,
    /// The head's own address on the way to it.
    pub(super) head_ip: Option<IpAddr>,
    pub(super) profile: NodeProfile,
    /// By model name.
    pub(super) offers: BTreeMap<String, LayerOffer>,
    pub(super) whole: BTreeSet<String>,
    /// An operator drains it.
    pub(super) asked_to_drain: bool,
    /// It drains by itself.
    pub(super) said_draining: bool,
    /// It was lost, or did not answer.
    pub(super) suspicion: Suspicion,
    /// Models of which it could not hold a part.
    pub(super) unfit: BTreeMap<String, Suspicion>,
    /// Time since which its link is down.
    pub(super) gone_since: Option<Instant>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Suspicion {
    /// Not before then.
    pub(super) until: Option<Instant>,
    pub(super) reason: String,
    times: u32,
    raised: Option<Instant>,
}

impl RingWorker {
    /// Takes an offer in. True means that plans may come out differently because of it.
    pub(super) fn take_offer(&mut self, address: SocketAddr, offer: Offer) -> bool {
        let profile = offer.profile.unwrap_or_default();
        let mut offers = BTreeMap::new();
        for offer in offer.models.into_iter().take(MODELS_PER_NODE) {
            let name = offer.card.as_ref().map(|card| card.name.clone());
            if let Some(name) = name.filter(|name| !name.is_empty() && name.len() <= NAME_BYTES) {
                offers.insert(name, plausible(offer));
            }
        }
        let same_models = self.offers.len() == offers.len()
            && self.offers.iter().zip(&offers).all(|((_, old), (_, new))| {
                fingerprint(old) == fingerprint(new)
                    && old.layers == new.layers
                    && old.layer_bytes == new.layer_bytes
                    && close(f64::from(old.decode_us), f64::from(new.decode_us))
            });
        let same_memory = close(
            self.profile.memory_available as f64,
            profile.memory_available as f64,
        );
        let same_purposes = self.profile.reserved_for == profile.reserved_for;
        let news = !same_models || !same_memory || !same_purposes || self.address != Some(address);
        self.address = Some(address);
        self.profile = profile;
        self.offers = offers;
        news
    }

    /// Its link is down: its reports no longer hold, but its suspicions remain.
    pub(super) fn disconnect(&mut self, now: Instant) {
        self.connected = false;
        self.heard = None;
        self.gone_since = Some(now);
        self.offers.clear();
        self.whole.clear();
        self.said_draining = false;
    }

    /// Returns true if it should hold no parts.
    pub(super) fn is_draining(&self) -> bool {
        self.asked_to_drain || self.said_draining
    }

    /// Returns true if it may be given a part of this model.
    pub(super) fn is_usable(&self, model: &str, now: Instant) -> bool {
        self.connected
            && !self.is_draining()
            && !self.suspicion.holds(now)
            && !self.unfit.get(model).is_some_and(|unfit| unfit.holds(now))
            && !self.whole.contains(model)
            && self.address.is_some()
            && self.offers.contains_key(model)
    }

    /// Ends suspicions whose time is over. True if there was one.
    pub(super) fn settle(&mut self, now: Instant) -> bool {
        let all = self.unfit.values_mut().chain([&mut self.suspicion]);
        all.filter_map(|suspicion| suspicion.settle(now).then_some(()))
            .count()
            > 0
    }

    /// Time at which a suspicion ends.
    pub(super) fn next_timer(&self) -> Option<Instant> {
        let all = self.unfit.values().chain([&self.suspicion]);
        all.filter_map(|suspicion| suspicion.until).min()
    }

    /// True if it has been gone so long that it can be forgotten. A drained worker stays drained.
    pub(super) fn is_forgotten(&self, now: Instant) -> bool {
        let long_ago = |since: Instant| now.saturating_duration_since(since) >= LONGEST_PAUSE * 2;
        !self.asked_to_drain && self.gone_since.is_some_and(long_ago)
    }
}

impl Suspicion {
    /// Leaves it alone for a pause that doubles with every repeat.
    pub(super) fn raise(&mut self, pause: Duration, reason: &str, now: Instant) {
        self.count(now);
        self.pause(pause, self.times - 1, reason, now);
    }

    /// The first death of a process says nothing: it may have been updated. Repeats do.
    pub(super) fn left_with_a_part(&mut self, pause: Duration, reason: &str, now: Instant) {
        self.count(now);
        if let Some(doublings) = self.times.checked_sub(2) {
            self.pause(pause, doublings, reason, now);
        }
    }

    pub(super) fn holds(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    fn settle(&mut self, now: Instant) -> bool {
        let over = self.until.is_some_and(|until| now >= until);
        if over {
            self.until = None;
        }
        over
    }

    fn count(&mut self, now: Instant) {
        let good = |raised: Instant| now.saturating_duration_since(raised) >= LONGEST_PAUSE * 2;
        if self.raised.is_some_and(good) {
            self.times = 0;
        }
        self.raised = Some(now);
        self.times = self.times.saturating_add(1);
    }

    fn pause(&mut self, pause: Duration, doublings: u32, reason: &str, now: Instant) {
        let pause = pause
            .saturating_mul(1 << doublings.min(16))
            .min(LONGEST_PAUSE);
        self.until = Some(now + pause);
        reason.clone_into(&mut self.reason);
    }
}

/// An offer with times that a machine can have: no memory is read faster than [`FASTEST_MEMORY`], and a layer
/// is read for every token. One that claims more would get all layers.
fn plausible(mut offer: LayerOffer) -> LayerOffer {
    let least = |bytes: u64| (bytes as f64 / FASTEST_MEMORY * 1e6) as f32;
    // Unknown values stay unknown: such a node gets nothing.
    if offer.decode_us > 0.0 {
        offer.decode_us = offer.decode_us.max(least(offer.layer_bytes));
    }
    if offer.logits_us > 0.0 {
        offer.logits_us = offer.logits_us.max(least(offer.last_bytes));
    }
    offer
}

fn fingerprint(offer: &LayerOffer) -> &str {
    offer.card.as_ref().map_or("", |card| &card.fingerprint)
}

/// Within a tenth of each other, or both senseless: measurements vary.
fn close(old: f64, new: f64) -> bool {
    old == new || (old - new).abs() <= old.abs() * 0.1 || (old.is_nan() && new.is_nan())
}

const NAME_BYTES: usize = 256;
/// Bytes per second: ten times the memory bandwidth of discarded machines, and that of the fastest
/// accelerators.
const FASTEST_MEMORY: f64 = 8e12;
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

pub(super) const MODELS_PER_NODE: usize = 64;
