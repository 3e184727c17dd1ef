//! Models within the mesh: sends workers the sources of the models that they seek, as
//! [`mesh_control::tracker`] decides.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Instant;

use dcf::MsgType;
use mesh_api::{NameConflict, Pin, SharedModel};
use mesh_control::registry::WorkerId;
use mesh_control::tracker::{Action, PinError, advice};
use mesh_proto::{Models, Served};
use tracing::{error, info};

use super::state::{Mesh, State, message};

impl Mesh {
    pub(crate) fn models_said(&self, id: WorkerId, models: Models) {
        self.change(|state, now| {
            let registry = &state.placement.registry;
            let Some((worker, node)) = registry.get(id).and_then(|w| Some((w, w.node_id()?)))
            else {
                return;
            };
            // A worker in quarantine gives no other worker a model until that is over.
            if registry.is_out(node, now) {
                return state.held_back.said(id, models);
            }
            // It listens where it comes from.
            let port = u16::try_from(models.port).ok().filter(|port| *port != 0);
            let address = port.map(|port| SocketAddr::new(worker.address.ip(), port));
            state.tracker.said(node, address, models, now);
        });
    }

    /// A worker serves other models whole than before.
    pub(crate) fn served(&self, id: WorkerId, served: Served) {
        let cards = served.all_models();
        let whole = cards.iter().map(|card| card.name.clone()).collect();
        self.change(|state, now| {
            self.note_models(state, id, cards.iter().map(|card| card.name.as_str()));
            state.placement.registry.serves(id, cards, now);
            if let Some(node) = state.placement.registry.node_of(id) {
                state.rings.serves_whole(node, whole);
            }
            self.note_mixed(state);
        });
    }

    /// Records the models that a worker serves whole.
    fn note_models<'a>(&self, state: &State, id: WorkerId, models: impl Iterator<Item = &'a str>) {
        if let Some(worker) = state.placement.registry.get(id) {
            let node = worker.node_id().unwrap_or_default();
            self.audit.models(node, &worker.name, "serves", models);
        }
    }

    pub(crate) fn tracked_models(&self) -> Vec<SharedModel> {
        self.lock().tracker.view()
    }

    pub(crate) fn pins(&self) -> Vec<Pin> {
        self.lock().tracker.pins().list().cloned().collect()
    }

    /// Pins a name for an operator; without a fingerprint, removes its pin, and the next model that is
    /// fetched under it keeps the name.
    ///
    /// # Errors
    /// [`PinError`] says why the pin is refused.
    pub(crate) fn decide_pin(&self, name: &str, fingerprint: Option<&str>) -> Result<(), PinError> {
        self.change(|state, _| match fingerprint {
            Some(fingerprint) => state.tracker.pin(name, fingerprint),
            None => state.tracker.unpin(name),
        })?;
        let decision = fingerprint.map_or("unpinned", |_| "pinned");
        self.audit.models(
            "",
            "",
            decision,
            [name, fingerprint.unwrap_or_default()].into_iter(),
        );
        info!(
            name,
            fingerprint, "an operator decided what a model's name means"
        );
        Ok(())
    }

    /// Names that several models claim: of models that workers pass on, and of those that they serve.
    pub(super) fn name_conflicts(&self, state: &State) -> Vec<NameConflict> {
        let mut conflicts = state.tracker.conflicts();
        let known = |name: &str| {
            let mut known = conflicts.iter();
            known.any(|known| known.name.eq_ignore_ascii_case(name))
        };
        let served = served_conflicts(state).into_iter();
        let served: Vec<NameConflict> = served.filter(|one| !known(&one.name)).collect();
        conflicts.extend(served);
        conflicts
    }

    /// Tells of names under which workers began to serve different models.
    pub(super) fn note_mixed(&self, state: &mut State) {
        let conflicts = served_conflicts(state);
        let fresh = conflicts
            .iter()
            .filter(|one| !state.mixed.contains(&one.name));
        for conflict in fresh {
            error!(model = conflict.name, "{}", advice(conflict));
            self.metrics.name_conflicts_found.inc();
        }
        state.mixed = conflicts.into_iter().map(|one| one.name).collect();
    }

    /// Names that several models claim, for operators.
    pub(crate) fn alarms(&self) -> Vec<NameConflict> {
        self.name_conflicts(&self.lock())
    }

    /// Lets the tracker decide, and does it.
    pub(super) fn turn_models(&self, state: &mut State, now: Instant) {
        for action in state.tracker.poll(now) {
            match action {
                Action::Tell { node, sources } => {
                    let worker = state.placement.registry.of_node(&node);
                    if let Some(id) = worker.map(|worker| worker.id) {
                        self.order(state, id, message(MsgType::SOURCES, 0, &sources), now);
                    }
                }
                Action::KeepPins => self.pins_file.keep(state.tracker.pins()),
            }
        }
        self.metrics.tracked(&state.tracker.take_counts());
    }
}

/// Names under which workers serve different models.
fn served_conflicts(state: &State) -> Vec<NameConflict> {
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
    let owned = |(fingerprint, workers): (&str, _)| (fingerprint.to_owned(), workers);
    let conflicts = mixed.map(|(name, claims)| NameConflict {
        name: name.to_owned(),
        claims: claims.into_iter().map(owned).collect(),
        served: true,
        ..NameConflict::default()
    });
    conflicts.take(MOST_TOLD).collect()
}

const MOST_TOLD: usize = 64;
