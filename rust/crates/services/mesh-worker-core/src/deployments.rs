//! The rings that this worker has parts of, and the streams that other members open for them.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use mesh_proto::{ModelCard, PartState, Ring, RingHello};

use crate::deployment::{Deployment, RingStep};

/// The deployments of this worker, by numbers that are not used again. `S` is a stream of another member.
pub struct Deployments<S> {
    node_id: String,
    all: BTreeMap<u64, Deployment<S>>,
    next: u64,
    /// Streams for rings that the head may be about to name.
    strays: VecDeque<Stray<S>>,
    /// Time at which a part here last computed something.
    active: Option<Instant>,
}

/// Time until which a stream waits, its hello, the node that opened it, and the stream.
type Stray<S> = (Instant, RingHello, String, S);

impl<S> Default for Deployments<S> {
    fn default() -> Self {
        Deployments {
            node_id: String::new(),
            all: BTreeMap::new(),
            next: 0,
            strays: VecDeque::new(),
            active: None,
        }
    }
}

/// What an order of the head comes to.
#[derive(Debug, PartialEq, Eq)]
pub enum Ordered {
    /// A deployment with this number begins: [`Deployments::poll`] says what to do.
    Begins(u64),
    /// The deployment goes on, or ends.
    Known,
    /// It is not carried out.
    Refused,
}

impl<S> Deployments<S> {
    /// This worker's id, before anything is deployed.
    pub fn identify(&mut self, node_id: String) {
        self.node_id = node_id;
    }

    /// The head names the members of a ring, or none if it ends. `offered` is whether its model is offered here.
    pub(crate) fn order(&mut self, ring: Ring, offered: bool, now: Instant) -> Ordered {
        let id = ring.ring;
        if let Some(deployment) = self.of_ring(id) {
            if ring.stages.is_empty() {
                deployment.end(&ring.reason);
            } else if !deployment.order(ring) {
                let reason = format!("moved: {}", deployment.ring().reason);
                deployment.end(&reason);
            }
            self.deliver(id, now);
            return Ordered::Known;
        }
        if ring.stages.is_empty() {
            return Ordered::Refused;
        }
        let model = ring.model.clone();
        if self.node_id.is_empty() {
            tracing::error!(model, "a ring for a worker that offers nothing");
            return Ordered::Refused;
        }
        if !offered {
            tracing::error!(model, "the head wants a model that is not here");
            return Ordered::Refused;
        }
        let mut deployment = Deployment::new(id, &self.node_id);
        if !deployment.order(ring) {
            deployment.end("moved: this worker has no part in it");
        }
        let number = self.next;
        self.next += 1;
        self.all.insert(number, deployment);
        self.deliver(id, now);
        Ordered::Begins(number)
    }

    /// The present deployment of a ring.
    fn of_ring(&mut self, ring: u64) -> Option<&mut Deployment<S>> {
        let mut all = self.all.values_mut();
        all.find(|deployment| deployment.id == ring && !deployment.is_ended())
    }

    /// What the head deployed ends.
    pub(crate) fn head_lost(&mut self) {
        for deployment in self.all.values_mut() {
            deployment.end("moved: the link to the head is lost");
        }
    }

    /// Another member opened a stream, for a ring that the head may be about to name. Streams that are returned
    /// lead nowhere.
    #[must_use]
    pub fn stream_came(
        &mut self,
        hello: RingHello,
        peer: String,
        stream: S,
        now: Instant,
    ) -> Vec<S> {
        let mut refused = self.expire_strays(now);
        match self.of_ring(hello.ring) {
            Some(deployment) => deployment.stream_came(hello, peer, stream),
            None => {
                let of_peer = |stray: &Stray<S>| stray.2 == peer;
                if self.strays.iter().filter(|stray| of_peer(stray)).count() >= MOST_STRAYS_OF_ONE {
                    let oldest = self.strays.iter().position(of_peer);
                    let oldest = oldest.and_then(|oldest| self.strays.remove(oldest));
                    refused.extend(oldest.map(|(.., stream)| stream));
                }
                let until = now + STRAY_PATIENCE;
                self.strays.push_back((until, hello, peer, stream));
            }
        }
        while self.strays.len() > MOST_STRAYS {
            let oldest = self.strays.pop_front();
            refused.extend(oldest.map(|(.., stream)| stream));
        }
        refused
    }

    /// True if streams wait for rings that the head has not named.
    pub fn has_strays(&self) -> bool {
        !self.strays.is_empty()
    }

    /// Streams for rings that the head did not name in time.
    #[must_use]
    pub fn expire_strays(&mut self, now: Instant) -> Vec<S> {
        let mut expired = Vec::new();
        while let Some((.., stream)) = self.strays.pop_front_if(|(until, ..)| *until <= now) {
            expired.push(stream);
        }
        expired
    }

    /// Hands the streams that came too early to the deployment of their ring.
    fn deliver(&mut self, ring: u64, now: Instant) {
        let strays = std::mem::take(&mut self.strays);
        for (until, hello, peer, stream) in strays {
            match self.of_ring(ring) {
                Some(deployment) if hello.ring == ring && until > now => {
                    deployment.stream_came(hello, peer, stream);
                }
                _ => self.strays.push_back((until, hello, peer, stream)),
            }
        }
    }

    /// The next step of a deployment, see [`Deployment::poll`], and the ring as the head last named it.
    pub fn poll(
        &mut self,
        number: u64,
        now: Instant,
        measured: impl Fn(u32) -> PartState,
        card: impl FnOnce() -> Option<ModelCard>,
    ) -> (RingStep<S>, Ring) {
        let Some(deployment) = self.all.get_mut(&number) else {
            return (RingStep::End, Ring::default());
        };
        let step = deployment.poll(now, measured, card);
        let ring = deployment.ring().clone();
        if matches!(step, RingStep::End) {
            self.all.remove(&number);
        }
        (step, ring)
    }

    /// The deployment with this number, for its events.
    pub fn get(&mut self, number: u64) -> Option<&mut Deployment<S>> {
        self.all.get_mut(&number)
    }

    /// A part here has computed something.
    pub fn active(&mut self, now: Instant) {
        self.active = Some(now);
    }

    /// True if no part here has computed anything for a while.
    pub fn is_idle(&self, now: Instant) -> bool {
        self.active.is_none_or(|at| now >= at + IDLE)
    }

    /// Rings with others that have a part here.
    pub fn shared(&self) -> usize {
        let all = self.all.values();
        all.filter(|deployment| !deployment.is_ended() && !deployment.is_alone())
            .count()
    }

    /// True if this worker, which drains since `begun`, may leave: no ring with others has a part here any
    /// more, or these rings have had no requests for a while; for an idle ring a leave is no worse than a
    /// handover.
    pub fn may_leave(&self, begun: Instant, now: Instant) -> bool {
        self.shared() == 0 || (self.is_idle(now) && now >= begun + IDLE)
    }
}

/// Time without requests after which rings count as idle.
const IDLE: Duration = Duration::from_secs(3);

/// Time for which a stream waits for the head to name its ring.
pub const STRAY_PATIENCE: Duration = Duration::from_secs(10);

/// Streams that wait for rings at once.
const MOST_STRAYS: usize = 256;

/// Those of one member: it cannot push out the streams of others by itself.
const MOST_STRAYS_OF_ONE: usize = 32;

#[cfg(test)]
mod tests;
