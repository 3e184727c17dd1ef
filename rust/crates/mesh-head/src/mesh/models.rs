//! Models within the mesh: tells workers where to get what they seek, as [`crate::core::tracker`] decides.

use std::net::SocketAddr;
use std::time::Instant;

use dcf::{Message, MsgType};
use mesh_proto::{Models, Served};
use prost::Message as _;
use tracing::{info, warn};

use super::{Mesh, State, timestamp_us};
use crate::core::registry::{Worker, WorkerId};
use crate::core::tracker::{Action, Note, TrackedModel};

impl Mesh {
    /// A worker says what it holds and seeks.
    pub fn models_said(&self, id: WorkerId, models: Models) {
        let now = Instant::now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(worker) = state.placement.registry.get(id) else {
            return;
        };
        let Some(node) = worker.node_id() else {
            return;
        };
        // One in quarantine gives nobody a model.
        if state.placement.registry.is_out(node, now) {
            return;
        }
        // It listens where it comes from.
        let port = u16::try_from(models.port).ok().filter(|port| *port != 0);
        let address = port.map(|port| SocketAddr::new(worker.address.ip(), port));
        state.tracker.said(node, address, models, now);
        self.turn(state, now);
    }

    /// A worker serves other models whole than before.
    pub fn served(&self, id: WorkerId, served: Served) {
        let now = Instant::now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let whole: Vec<String> = served.models.iter().map(|card| card.name.clone()).collect();
        state.placement.registry.serves(id, served.models, now);
        if let Some(node) = state.placement.registry.get(id).and_then(Worker::node_id) {
            state.rings.serves_whole(node, whole);
        }
        self.turn(state, now);
    }

    /// The models that workers hold or seek.
    pub fn tracked_models(&self) -> Vec<TrackedModel> {
        self.lock().tracker.view()
    }

    /// Lets the tracker decide, and does it.
    pub(super) fn turn_models(&self, state: &mut State, now: Instant) {
        for action in state.tracker.poll(now) {
            match action {
                Action::Tell { node, sources } => {
                    let worker = state.placement.registry.of_node(&node);
                    if let Some(id) = worker.map(|worker| worker.id) {
                        let order = Message::new(
                            MsgType::SOURCES,
                            0,
                            timestamp_us(),
                            sources.encode_to_vec(),
                        );
                        self.order(state, id, &node, order, now);
                    }
                }
                Action::Note(note) => self.note_model(note),
            }
        }
    }

    fn note_model(&self, note: Note) {
        match note {
            Note::Errand {
                model,
                worker,
                instead: None,
            } => info!(
                model,
                worker, "one worker gets the model from outside the mesh"
            ),
            Note::Errand {
                model,
                worker,
                instead: Some(why),
            } => warn!(
                model,
                worker, why, "another worker gets the model from outside the mesh"
            ),
            Note::Failed {
                model,
                worker,
                reason,
            } => warn!(
                model,
                worker, reason, "the worker could not get the model from outside the mesh"
            ),
            Note::Bad {
                model,
                accused,
                accuser,
                reason,
            } => {
                warn!(
                    model,
                    worker = accused,
                    accuser,
                    reason,
                    "worker reported: it sent something else than the model's manifest says"
                );
                self.metrics.bad_source(&accused);
            }
        }
    }
}
