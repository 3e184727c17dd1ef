//! Turns offers of workers into the input of placement, and its plans into rings.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use arcanum_profiler::{
    Assignment, Candidate, ModelSpec, Plan, PlanError, Policy, place, standby_for,
};
use mesh_proto::{LayerOffer, ModelCard, NodeAddr, RingStage};
use tracing::{info, warn};

use super::node::RingWorker;
use super::ring::{Replica, Ring, Stage, hex};
use super::{Action, Rings};

/// Result of placement for a model.
#[derive(Debug, Clone)]
pub struct Planned {
    /// The plan; its nodes are node ids.
    pub plan: Plan,
    /// Names of all nodes by their ids.
    pub names: BTreeMap<String, String>,
    /// Most tokens of a request.
    pub context: u32,
    /// The model as offered.
    pub card: ModelCard,
    pub(super) spec: ModelSpec,
    pub(super) policy: Policy,
}

/// Reasons for which there is no plan.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum NoPlan {
    /// No worker may hold parts of it.
    #[error(
        "no connected worker may hold layers of {model:?} now{}; name the model under `ring.models` in a worker's \
         configuration", .waiting.as_deref().unwrap_or("")
    )]
    NotOffered {
        /// Name of the model.
        model: String,
        /// Workers that offer it but may not be used at the moment.
        waiting: Option<String>,
    },
    /// Placement found no plan.
    #[error(transparent)]
    Place(#[from] PlanError),
}

/// Everything placement needs to know about one model.
pub(super) struct Outlook {
    pub(super) spec: ModelSpec,
    pub(super) card: ModelCard,
    pub(super) candidates: Vec<Candidate>,
}

/// Two offers of one name are the same model if these are equal: fingerprint, layers, width.
type Weights<'a> = (&'a str, u32, u32);
/// [`standby_for`] or [`arcanum_profiler::replacement_for`].
type Find =
    fn(&ModelSpec, &[Assignment], usize, u64, &[Candidate], &Policy, &[String]) -> Option<String>;
type Holder<'a> = (&'a String, &'a RingWorker, &'a LayerOffer);

impl Rings {
    /// Computes the ring of this model that would be formed now, with the memory of its present ring counted
    /// as free.
    ///
    /// # Errors
    /// [`NoPlan`] says what is missing.
    pub fn plan(&self, model: &str, now: Instant) -> Result<Planned, NoPlan> {
        let own: Vec<u64> = self.live_ring(model).into_iter().collect();
        self.place(model, &own, now)
    }

    /// A plan for a model. The memory of the rings in `freed` counts as free.
    pub(super) fn place(
        &self,
        model: &str,
        freed: &[u64],
        now: Instant,
    ) -> Result<Planned, NoPlan> {
        let outlook = self
            .outlook(model, None, freed, now)
            .ok_or_else(|| self.not_offered(model, now))?;
        let own_limit = match outlook.card.context {
            0 => ASSUMED_CONTEXT,
            limit => limit,
        };
        let fixed = self.settings.context;
        let mut context = match fixed {
            0 => own_limit,
            fixed => fixed.min(own_limit),
        };
        let plan = loop {
            match self.place_with(&outlook, context) {
                Ok(plan) => break plan,
                // A shorter context is better than no ring, unless a certain one is configured.
                Err(PlanError::Memory { .. } | PlanError::Pieces { .. })
                    if fixed == 0 && context > LEAST_CONTEXT =>
                {
                    context = (context / 2).max(LEAST_CONTEXT);
                }
                Err(error) => return Err(error.into()),
            }
        };
        Ok(Planned {
            plan,
            names: self.names(),
            context,
            card: outlook.card,
            policy: self.policy(context),
            spec: outlook.spec,
        })
    }

    /// The best plan for this context. KV memory beyond a quarter of the desired size gives way to standbys:
    /// requests that wait for room are better than a ring that ends with its first loss.
    fn place_with(&self, outlook: &Outlook, context: u32) -> Result<Plan, PlanError> {
        let mut policy = self.policy(context);
        let mut best = place(&outlook.spec, &outlook.candidates, &policy)?;
        let wanted = u64::from(context) * u64::from(policy.slots);
        let least = u64::from(context).max(wanted / 4);
        while self.settings.standbys && uncovered(&best) > 0 {
            let tried = policy.kv_tokens.unwrap_or(best.kv_tokens);
            let fewer = tried.min(best.kv_tokens) / 2;
            if fewer < least {
                break;
            }
            policy.kv_tokens = Some(fewer);
            let plan = place(&outlook.spec, &outlook.candidates, &policy)?;
            if uncovered(&plan) < uncovered(&best) {
                best = plan;
            }
        }
        Ok(best)
    }

    /// Model and candidates. With a `ring`, only workers with its weights count, and the spec is the ring's
    /// own.
    pub(super) fn outlook(
        &self,
        model: &str,
        ring: Option<&Ring>,
        freed: &[u64],
        now: Instant,
    ) -> Option<Outlook> {
        let mut groups: BTreeMap<Weights<'_>, Vec<Holder<'_>>> = BTreeMap::new();
        for (id, node) in &self.nodes {
            if !node.is_usable(model, now) {
                continue;
            }
            let Some((offer, card)) = offered(node, model) else {
                continue;
            };
            // A model that cannot be is no model.
            if ModelSpec::try_from(offer).is_err() {
                continue;
            }
            let same = |ring: &Ring| {
                card.fingerprint == ring.offered.fingerprint
                    && offer.layers == ring.spec.layers
                    && offer.hidden == ring.spec.hidden
            };
            if ring.is_none_or(same) {
                let key = (card.fingerprint.as_str(), offer.layers, offer.hidden);
                groups.entry(key).or_default().push((id, node, offer));
            }
        }
        // Different files under one name: the one that most workers have.
        let (_, group) = groups
            .into_iter()
            .max_by_key(|(key, group)| (group.len(), std::cmp::Reverse(*key)))?;
        // Where weight formats differ in size the largest counts, so that there is room for any worker as
        // standby.
        let spec = match ring {
            Some(ring) => ring.spec.clone(),
            None => ModelSpec::covering(group.iter().map(|(_, _, offer)| *offer)).ok()??,
        };
        let card = offered(group.first()?.1, model)?.1.clone();
        let candidates = group
            .iter()
            .map(|(id, node, offer)| Candidate {
                memory: self.free(id, freed),
                ..Candidate::from_offer(id, &node.name, &node.profile, offer)
            })
            .collect();
        Some(Outlook {
            spec,
            card,
            candidates,
        })
    }

    /// Bytes that a worker has left beside its parts in all rings but those in `freed`.
    pub(super) fn free(&self, node: &str, freed: &[u64]) -> u64 {
        let memory = |node: &RingWorker| {
            let profile = &node.profile;
            profile.memory_available.min(profile.memory_total)
        };
        let has = self.nodes.get(node).map_or(0, memory);
        let others = self.rings.values().filter(|ring| !freed.contains(&ring.id));
        let used = others.map(|ring| ring.bytes_on(node));
        has.saturating_sub(used.fold(0, u64::saturating_add))
    }

    /// Finds a standby for a stage of this ring. `layout` is the ring as it is about to be.
    pub(super) fn find_standby(&self, layout: &Ring, stage: usize, now: Instant) -> Option<String> {
        let mut exclude: Vec<String> = layout.lost.keys().cloned().collect();
        if !self.settings.double_stages {
            exclude.extend(layout.members());
        }
        self.find_worker(layout, stage, exclude, standby_for, now)
    }

    /// Finds a worker for a stage of this ring, other than those to `exclude`.
    pub(super) fn find_worker(
        &self,
        layout: &Ring,
        stage: usize,
        exclude: Vec<String>,
        find: Find,
        now: Instant,
    ) -> Option<String> {
        let outlook = self.outlook(&layout.model, Some(layout), &[layout.id], now)?;
        find(
            &layout.spec,
            &layout.assignments(),
            stage,
            layout.kv_tokens,
            &outlook.candidates,
            &self.policy(layout.context),
            &exclude,
        )
    }

    pub(super) fn policy(&self, context: u32) -> Policy {
        Policy {
            objective: self.settings.objective,
            context,
            slots: self.settings.slots.max(1),
            kv_tokens: None,
            standbys: self.settings.standbys,
            purpose: PURPOSE.to_owned(),
            stages: self.settings.stages,
            half_rows: self.settings.half_rows,
        }
    }

    /// Rings for models that are offered and have none.
    pub(super) fn form_missing(&mut self, now: Instant) {
        for model in self.offered_models() {
            let tried = self.unplanned.get(&model);
            let tried = tried.is_some_and(|(generation, _)| *generation == self.generation);
            if tried || !self.wants_ring(&model) {
                continue;
            }
            match self.place(&model, &[], now) {
                Ok(planned) => {
                    let reason = "workers offer its layers".into();
                    self.form(&model, planned, reason, None, now);
                }
                Err(error) => self.cannot_plan(&model, &error.to_string()),
            }
        }
        let offered = self.offered_models();
        self.unplanned.retain(|model, _| offered.contains(model));
    }

    pub(super) fn cannot_plan(&mut self, model: &str, error: &str) {
        // The lost workers are of more use to a client than the shortage of the rest alone.
        let reason = match self.losses.get(model) {
            Some(loss) => format!("{loss}; {error}"),
            None => error.to_owned(),
        };
        let before = self.unplanned.get(model);
        if before.is_none_or(|(_, before)| *before != reason) {
            warn!(model, reason, "no ring can be made of what workers offer");
        }
        let entry = (self.generation, reason);
        self.unplanned.insert(model.to_owned(), entry);
    }

    /// Makes a ring of a plan and tells its members.
    pub(super) fn form(
        &mut self,
        model: &str,
        planned: Planned,
        reason: String,
        replaces: Option<u64>,
        now: Instant,
    ) {
        self.losses.remove(model);
        let id = self.next_ring;
        self.next_ring += 1;
        let format = |node: &str| {
            let offer = self.nodes.get(node).and_then(|node| offered(node, model));
            offer.map_or_else(String::new, |(offer, _)| offer.format.clone())
        };
        let stages = planned.plan.stages.iter().map(|stage| Stage {
            layers: stage.layers.clone(),
            format: format(&stage.node),
            member: Replica::new(stage.node.clone()),
            standby: stage.standby.clone().map(Replica::new),
        });
        let parts = planned.plan.stages.iter();
        let parts = parts.flat_map(|stage| [Some(&stage.node), stage.standby.as_ref()]);
        let assigned: BTreeSet<&String> = parts.flatten().collect();
        let left_out = planned.plan.left_out.iter();
        let left_out = left_out.filter(|left| !assigned.contains(&left.node));
        let left_out =
            left_out.map(|left| (self.name(&left.node).to_owned(), left.reason.to_string()));
        let ring = Ring {
            id,
            epoch: 1,
            model: model.to_owned(),
            offered: planned.card,
            spec: planned.spec,
            stages: stages.collect(),
            slots: self.settings.slots.max(1),
            context: planned.context,
            kv_tokens: planned.plan.kv_tokens,
            half_rows: self.settings.half_rows,
            reason_of_epoch: "its layers are being loaded".into(),
            served: false,
            reason: reason.clone(),
            epoch_since: now,
            serving_since: None,
            last_loss: None,
            served_by: None,
            lost: BTreeMap::new(),
            doubts: BTreeMap::new(),
            relinked: BTreeMap::new(),
            progressed: now,
            retiring: None,
            running: None,
            replaces,
            moves: BTreeMap::new(),
            recovered: 1,
            standbys_for: Some(self.generation),
            compared: Some(self.generation),
            token_us: planned.plan.token_us,
            tokens_per_second: planned.plan.tokens_per_second,
            left_out: left_out.collect(),
            formed: now,
        };
        self.unplanned.remove(model);
        let layout = ring.layout(|node| self.name(node).to_owned());
        info!(ring = hex(id), model, layout, reason, "ring planned");
        self.rings.insert(id, ring);
        self.broadcast(id, &BTreeSet::new());
    }

    /// Sends a ring to all workers with a part in it, and to `others`, which had one.
    pub(super) fn broadcast(&mut self, id: u64, others: &BTreeSet<String>) {
        let Some(ring) = self.rings.get(&id) else {
            return;
        };
        let message = self.message(ring);
        let mut nodes = ring.nodes();
        nodes.extend(others.iter().cloned());
        for node in nodes {
            self.told_off.remove(&(node.clone(), id));
            if self.is_connected(&node) {
                self.actions.push(Action::Send {
                    node,
                    ring: message.clone(),
                });
            }
        }
    }

    fn message(&self, ring: &Ring) -> mesh_proto::Ring {
        let address = |node: &str| self.nodes.get(node)?.address;
        let parts = ring.parts().map(|part| part.node.as_str());
        let addresses: BTreeMap<&str, SocketAddr> = parts
            .filter_map(|node| Some((node, address(node)?)))
            .collect();
        let all_here = addresses.values().all(|address| address.ip().is_loopback());
        // A worker beside the head is reached over loopback by the head alone; the others know that machine
        // by the address at which they reach the head.
        let elsewhere = ring.parts().filter(|part| {
            let address = addresses.get(part.node.as_str());
            address.is_some_and(|address| !address.ip().is_loopback())
        });
        let mut head_ips = elsewhere.filter_map(|part| self.nodes.get(&part.node)?.head_ip);
        let head_ip = head_ips
            .next()
            .filter(|ip: &IpAddr| !ip.is_loopback() && !ip.is_unspecified());
        let addr_of = |part: &Replica| {
            let seen = addresses.get(part.node.as_str());
            let address = seen.map(|address| match head_ip {
                Some(ip) if !all_here && address.ip().is_loopback() => {
                    SocketAddr::new(ip, address.port())
                }
                _ => *address,
            });
            let node = self.nodes.get(&part.node);
            let others = node.into_iter().flat_map(|node| &node.others);
            let others = others.filter_map(|ip| Some(SocketAddr::new(*ip, address?.port())));
            NodeAddr {
                addresses: others.map(|other| other.to_string()).collect(),
                node_id: part.node.clone(),
                name: self.name(&part.node).to_owned(),
                address: address
                    .map(|address| address.to_string())
                    .unwrap_or_default(),
            }
        };
        let stages = ring.stages.iter().map(|stage| RingStage {
            layer_start: stage.layers.start,
            layer_end: stage.layers.end,
            member: Some(addr_of(&stage.member)),
            standby: stage.standby.as_ref().map(addr_of),
            format: stage.format.clone(),
        });
        mesh_proto::Ring {
            ring: ring.id,
            epoch: ring.epoch,
            model: ring.model.clone(),
            fingerprint: ring.offered.fingerprint.clone(),
            stages: stages.collect(),
            slots: ring.slots,
            context: ring.context,
            kv_tokens: ring.kv_tokens,
            half_rows: ring.half_rows,
            reason: ring.reason.clone(),
        }
    }

    fn not_offered(&self, model: &str, now: Instant) -> NoPlan {
        let waits = |node: &&RingWorker| node.connected && node.offers.contains_key(model);
        let waiting = self.nodes.values().filter(waits).map(|node| {
            let why = match () {
                () if node.is_draining() => "is drained",
                () if node.whole.contains(model) => "serves it whole",
                () if node.suspicion.holds(now) => "did not answer and is left alone for a while",
                () => "failed to hold its part and is left alone for a while",
            };
            format!("{} {why}", node.name)
        });
        let waiting: Vec<String> = waiting.collect();
        NoPlan::NotOffered {
            model: model.to_owned(),
            waiting: (!waiting.is_empty()).then(|| format!(" ({})", waiting.join(", "))),
        }
    }

    pub(super) fn names(&self) -> BTreeMap<String, String> {
        let name = |(id, node): (&String, &RingWorker)| (id.clone(), node.name.clone());
        self.nodes.iter().map(name).collect()
    }
}

/// Number of stages without a standby.
fn uncovered(plan: &Plan) -> usize {
    let uncovered = plan.stages.iter().filter(|stage| stage.standby.is_none());
    uncovered.count()
}

fn offered<'a>(node: &'a RingWorker, model: &str) -> Option<(&'a LayerOffer, &'a ModelCard)> {
    let offer = node.offers.get(model)?;
    Some((offer, offer.card.as_ref()?))
}

/// Purpose of rings, as `reserved_for` names it.
const PURPOSE: &str = "chat";
/// Context of a model that does not say.
const ASSUMED_CONTEXT: u32 = 4096;
/// The context is not shortened below this for want of memory.
const LEAST_CONTEXT: u32 = 2048;
