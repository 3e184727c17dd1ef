//! Consequences of the proofs that workers give, and of the faults that clients' requests show.

use std::collections::BTreeSet;
use std::time::Instant;

use dcf::ErrorCode;
use mesh_control::placement::Placed;
use mesh_control::registry::WorkerId;
use mesh_control::registry::proofs::{Finding, Proof};
use mesh_control::spotcheck::Sample;

use super::state::{Mesh, State};
use crate::ids;

impl Mesh {
    /// The proofs that a worker has to give now, besides those of the models that are being asked.
    pub(crate) fn proofs_due(&self, id: WorkerId, under_way: &BTreeSet<String>) -> Vec<Proof> {
        let mut state = self.lock();
        let registry = &mut state.placement.registry;
        registry.proofs_due(id, under_way, ids::unique(), Instant::now())
    }

    /// A worker answered the head's question with this, or gave no answer to what was asked at `asked`.
    pub(crate) fn proved(
        &self,
        id: WorkerId,
        proof: &Proof,
        sample: Option<Sample>,
        asked: Instant,
    ) {
        self.change(|state, now| {
            let registry = &mut state.placement.registry;
            for finding in registry.proved(id, proof, sample, asked, ids::unique(), now) {
                self.follow_finding(state, finding, now);
            }
        });
    }

    /// A worker declines the head's question. Returns true if that is excused.
    pub(crate) fn declined(&self, id: WorkerId, model: &str) -> bool {
        let mut state = self.lock();
        let registry = &mut state.placement.registry;
        registry.declined(id, model, Instant::now())
    }

    pub(super) fn follow_finding(&self, state: &mut State, finding: Finding, now: Instant) {
        match finding {
            Finding::Disputed { text } => {
                tracing::warn!(model_answers = "differ", "{text}");
            }
            Finding::Settled { name } => {
                tracing::info!(
                    worker = name,
                    "the worker's answers agree with those of others again"
                );
            }
            Finding::Quarantined {
                node,
                name,
                ring: Some(ring),
                reason,
                ..
            } => {
                tracing::warn!(driver = name, node, ring, reason, "ring given up");
                self.metrics.quarantined(&name);
                state.rings.distrust(ring, &reason, now);
            }
            Finding::Quarantined {
                node,
                name,
                ring: None,
                length,
                reason,
            } => {
                tracing::warn!(
                    worker = name,
                    node,
                    seconds = length.as_secs(),
                    reason,
                    "worker in quarantine: it gets no requests and holds no part of a ring"
                );
                self.metrics.quarantined(&name);
                state.rings.quarantine(&node, &reason, length, now);
                let worker = state.placement.registry.of_node(&node);
                // Requests that it answers now should be answered by another worker.
                if let Some(peer) = worker.and_then(|worker| state.peers.get(&worker.id)) {
                    let text = format!("in quarantine: {reason}");
                    peer.link.close(ErrorCode::CANCELLED, &text);
                }
            }
        }
    }

    /// An attempt that began at `began` failed, and that was this worker's own fault.
    pub(crate) fn at_fault(&self, key: &str, name: &str, model: &str, began: Instant) {
        let now = Instant::now();
        let pause = self.lock().placement.at_fault(key, model, began, now);
        let Some(pause) = pause else { return };
        self.metrics.at_fault(name);
        if !pause.is_zero() {
            tracing::warn!(
                worker = name,
                model,
                pause_seconds = pause.as_secs(),
                "the worker failed again and gets no requests for a while"
            );
        }
    }

    /// A worker rejected a request that this one answers.
    pub(crate) fn contradicted(&self, worker: WorkerId, by: &Placed, text: &str) {
        let now = Instant::now();
        let mut state = self.lock();
        let registry = &mut state.placement.registry;
        let Some(wrong) = registry.get_mut(worker) else {
            return;
        };
        wrong.failed += 1;
        let has_identity = wrong.has_identity();
        let (key, name) = (wrong.key(), wrong.name.clone());
        // The faults of a worker without an identity count for no model in particular.
        let model = if has_identity { by.model.as_str() } else { "" };
        let pause = state.placement.at_fault(&key, model, now, now);
        drop(state);
        tracing::warn!(
            worker = name,
            by = by.name,
            said = text,
            pause_seconds = pause.map(|pause| pause.as_secs()),
            "the worker rejected a request that another one answers"
        );
        self.metrics.at_fault(&name);
    }
}
