//! Models within the mesh: sends workers the sources of the models that they seek, as
//! [`mesh_control::tracker`] decides.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Instant;

use dcf::{Message, MsgType};
use mesh_control::registry::{Worker, WorkerId};
use mesh_control::tracker::{Action, Conflict, Pin, PinError, TrackedModel};
use mesh_proto::{Models, Served};
use prost::Message as _;
use tracing::{error, info};

use super::state::{Mesh, State, timestamp_us};

impl Mesh {
    /// A worker reports the models that it holds and seeks.
    pub(crate) fn models_said(&self, id: WorkerId, models: Models) {
        let now = Instant::now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(worker) = state.placement.registry.get(id) else {
            return;
        };
        let Some(node) = worker.node_id() else {
            return;
        };
        // A worker in quarantine gives no other worker a model until that is over.
        if state.placement.registry.is_out(node, now) {
            state.held_back.said(id, models);
            return;
        }
        // It listens where it comes from.
        let port = u16::try_from(models.port).ok().filter(|port| *port != 0);
        let address = port.map(|port| SocketAddr::new(worker.address.ip(), port));
        state.tracker.said(node, address, models, now);
        self.turn(state, now);
    }

    /// A worker serves other models whole than before.
    pub(crate) fn served(&self, id: WorkerId, served: Served) {
        let now = Instant::now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let whole: Vec<String> = served.models.iter().map(|card| card.name.clone()).collect();
        state.placement.registry.serves(id, served.models, now);
        if let Some(node) = state.placement.registry.get(id).and_then(Worker::node_id) {
            state.rings.serves_whole(node, whole);
        }
        self.note_mixed(state);
        self.turn(state, now);
    }

    /// The models that workers hold or seek.
    pub(crate) fn tracked_models(&self) -> Vec<TrackedModel> {
        self.lock().tracker.view()
    }

    /// Pins of model names.
    pub(crate) fn pins(&self) -> Vec<Pin> {
        self.lock().tracker.pins().list().cloned().collect()
    }

    /// Pins a name for an operator; without a fingerprint, removes its pin, and the next model that is
    /// fetched under it keeps the name.
    ///
    /// # Errors
    /// [`PinError`] says why the pin is refused.
    pub(crate) fn decide_pin(&self, name: &str, fingerprint: Option<&str>) -> Result<(), PinError> {
        let mut guard = self.lock();
        let state = &mut *guard;
        match fingerprint {
            Some(fingerprint) => state.tracker.pin(name, fingerprint)?,
            None => drop(state.tracker.unpin(name)?),
        }
        info!(
            name,
            fingerprint, "an operator decided what a model's name means"
        );
        self.turn(state, Instant::now());
        Ok(())
    }

    /// Names that several models claim: of models that workers pass on, and of those that they serve.
    pub(super) fn name_conflicts(&self, state: &State) -> Vec<Conflict> {
        let mut conflicts = state.tracker.conflicts();
        let known = |name: &str| {
            let mut known = conflicts.iter();
            known.any(|known| known.name.eq_ignore_ascii_case(name))
        };
        let served = served_conflicts(state).into_iter();
        let served: Vec<Conflict> = served.filter(|one| !known(&one.name)).collect();
        conflicts.extend(served);
        conflicts
    }

    /// Tells of names under which workers began to serve different models.
    pub(super) fn note_mixed(&self, state: &mut State) {
        let conflicts = served_conflicts(state);
        for conflict in conflicts
            .iter()
            .filter(|one| !state.mixed.contains(&one.name))
        {
            error!(model = conflict.name, "{}", conflict.advice());
            self.metrics.name_conflicts_found.inc();
        }
        state.mixed = conflicts
            .into_iter()
            .map(|conflict| conflict.name)
            .collect();
    }

    /// Names that several models claim, for operators.
    pub(crate) fn alarms(&self) -> Vec<Conflict> {
        self.name_conflicts(&self.lock())
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
                Action::KeepPins => self.pins_file.keep(state.tracker.pins()),
            }
        }
        self.metrics.tracked(&state.tracker.take_counts());
    }
}

/// Names under which workers serve different models.
fn served_conflicts(state: &State) -> Vec<Conflict> {
    let mut served: BTreeMap<&str, BTreeMap<&str, Vec<String>>> = BTreeMap::new();
    for worker in state.placement.registry.iter() {
        // Parts of a ring have the ring's model; old workers tell no fingerprint.
        let whole = worker.models.iter().filter(|model| model.ring.is_none());
        for card in whole.map(|model| &model.card) {
            if !card.fingerprint.is_empty() {
                let claims = served.entry(&card.name).or_default();
                let workers = claims.entry(&card.fingerprint).or_default();
                workers.push(worker.name.clone());
            }
        }
    }
    let mixed = served.into_iter().filter(|(_, claims)| claims.len() > 1);
    let conflicts = mixed.map(|(name, claims)| Conflict {
        name: name.to_owned(),
        claims: claims
            .into_iter()
            .map(|(fingerprint, workers)| (fingerprint.to_owned(), workers))
            .collect(),
        pinned: None,
        decided: false,
        refused_by: Vec::new(),
        served: true,
    });
    conflicts.take(MOST_TOLD).collect()
}

/// Conflicts that are told of.
const MOST_TOLD: usize = 64;
