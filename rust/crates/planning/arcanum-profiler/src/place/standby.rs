//! Standbys: the choice of a standby for a stage, and of a replacement for a lost member.

use std::collections::BTreeMap;

use super::check::unusable;
use super::cost::stage_bytes;
use super::evaluate::evaluate;
use super::types::{Assignment, Candidate, ModelSpec, PlannedStage, Policy, Reason, known};

/// Gives the stages of a plan standbys with the memory that is left: as many stages as possible, on nodes without a stage of
/// their own where there are any, spread, the fewest layers on the fullest node. Exact while the search stays within
/// [`MOST_VISITS`], which it does for small meshes; beyond, the best found until then, and the first one found is that
/// of the greedy rule.
pub(super) fn choose(
    model: &ModelSpec,
    stages: &mut [PlannedStage],
    kv_tokens: u64,
    usable: &[&Candidate],
) {
    let bytes = |stage: &PlannedStage| stage_bytes(model, stage.layers.clone(), kv_tokens);
    let mut hosts: Vec<Host> = usable
        .iter()
        .map(|candidate| {
            let own = stages.iter().position(|stage| stage.node == candidate.id);
            Host {
                id: &candidate.id,
                own,
                room: candidate
                    .memory
                    .saturating_sub(own.map_or(0, |own| bytes(&stages[own]))),
                stages: 0,
                layers: 0,
            }
        })
        .collect();
    // `usable` comes in the caller's order.
    hosts.sort_by_key(|host| host.id);
    let mut needs: Vec<Need> = stages
        .iter()
        .enumerate()
        .map(|(stage, planned)| Need {
            stage,
            bytes: bytes(planned),
            layers: planned.layers.len() as u32,
        })
        .collect();
    // The largest first: they are the hardest to place.
    needs.sort_by_key(|need| (std::cmp::Reverse(need.bytes), need.stage));
    let mut search = Search {
        needs: &needs,
        chosen: vec![None; needs.len()],
        best: None,
        visits: 0,
    };
    search.visit(0, &mut hosts);
    let Some((_, chosen)) = search.best else {
        return;
    };
    for (need, host) in needs.iter().zip(chosen) {
        stages[need.stage].standby = host.map(|host: usize| hosts[host].id.to_owned());
    }
}

/// The node that should become the standby of `stages[stage]`, in a ring that runs with `kv_tokens`; `None`
/// if no node has room. Candidates' `memory` is all memory that they may use for this ring: the bytes of
/// `stages` are subtracted here. `exclude` names nodes that must not be taken, such as those just lost.
pub fn standby_for(
    model: &ModelSpec,
    stages: &[Assignment],
    stage: usize,
    kv_tokens: u64,
    candidates: &[Candidate],
    policy: &Policy,
    exclude: &[String],
) -> Option<String> {
    let ring = Ring::new(model, stages, stage, kv_tokens)?;
    let least = candidates
        .iter()
        .filter(|candidate| ring.has_room(candidate, policy, exclude))
        .filter(|candidate| candidate.id != ring.stage.node)
        .min_by(|a, b| {
            let load = |candidate: &Candidate| {
                let holds = ring.holds.get(candidate.id.as_str());
                holds.map_or((false, 0, 0), |holds| {
                    (holds.member, holds.standbys, holds.layers)
                })
            };
            load(a)
                .cmp(&load(b))
                .then_with(|| a.decode_us.total_cmp(&b.decode_us))
                .then_with(|| a.id.cmp(&b.id))
        });
    least.map(|candidate| candidate.id.clone())
}

/// The node that should take over `stages[stage]`, whose member is lost and has no standby: of those with room and without a
/// stage of this ring, the one with which a token is fastest. Memory and `exclude` as in [`standby_for`].
pub fn replacement_for(
    model: &ModelSpec,
    stages: &[Assignment],
    stage: usize,
    kv_tokens: u64,
    candidates: &[Candidate],
    policy: &Policy,
    exclude: &[String],
) -> Option<String> {
    let ring = Ring::new(model, stages, stage, kv_tokens)?;
    let fitting = candidates
        .iter()
        .filter(|candidate| ring.has_room(candidate, policy, exclude))
        .filter(|candidate| {
            let holds = ring.holds.get(candidate.id.as_str());
            candidate.id != ring.stage.node && holds.is_none_or(|holds| !holds.member)
        });
    let time = |candidate: &Candidate| {
        let mut stages = stages.to_vec();
        stages[stage].node.clone_from(&candidate.id);
        // Another member may be gone, too: then its own speed has to do.
        evaluate(model, &stages, candidates, policy).map_or(candidate.decode_us, |(us, _)| us)
    };
    fitting
        .map(|candidate| (time(candidate), &candidate.id))
        .min_by(|(a, a_id), (b, b_id)| a.total_cmp(b).then_with(|| a_id.cmp(b_id)))
        .map(|(_, id)| id.clone())
}

/// A ring as seen from one of its stages.
struct Ring<'a> {
    stage: &'a Assignment,
    /// Bytes that the stage needs.
    needs: u64,
    /// Layers and bytes that each node holds of other stages.
    holds: BTreeMap<&'a str, Holds>,
}

#[derive(Default)]
struct Holds {
    member: bool,
    standbys: u32,
    layers: u64,
    bytes: u64,
}

impl<'a> Ring<'a> {
    fn new(
        model: &ModelSpec,
        stages: &'a [Assignment],
        stage: usize,
        kv_tokens: u64,
    ) -> Option<Self> {
        let mut holds: BTreeMap<&str, Holds> = BTreeMap::new();
        for (_, other) in stages.iter().enumerate().filter(|(at, _)| *at != stage) {
            let bytes = stage_bytes(model, other.layers.clone(), kv_tokens);
            let standby = other.standby.as_deref();
            for (node, member) in [(Some(other.node.as_str()), true), (standby, false)] {
                let Some(node) = node else { continue };
                let held = holds.entry(node).or_default();
                held.member |= member;
                held.standbys += u32::from(!member);
                held.layers += other.layers.len() as u64;
                held.bytes = held.bytes.saturating_add(bytes);
            }
        }
        let stage = stages.get(stage)?;
        Some(Ring {
            needs: stage_bytes(model, stage.layers.clone(), kv_tokens),
            stage,
            holds,
        })
    }

    fn has_room(&self, candidate: &Candidate, policy: &Policy, exclude: &[String]) -> bool {
        let holds = self.holds.get(candidate.id.as_str());
        let held = holds.map_or(0, |holds| holds.bytes);
        let usable = !matches!(
            unusable(candidate, policy, 0),
            Some(Reason::Reserved { .. } | Reason::UnknownSpeed)
        );
        usable
            && known(candidate.decode_us)
            && !exclude.contains(&candidate.id)
            && candidate.memory.saturating_sub(held) >= self.needs
    }
}

/// A node in the search for standbys.
struct Host<'a> {
    id: &'a str,
    /// The stage that it runs.
    own: Option<usize>,
    /// Bytes still free on the node.
    room: u64,
    /// Stages that it stands by for.
    stages: u32,
    /// Number of layers of those stages.
    layers: u32,
}

struct Need {
    stage: usize,
    bytes: u64,
    layers: u32,
}

/// Less is better: stages without standby, standbys on members, most standbys on one node, most layers on one node.
type Score = (u32, u32, u32, u32);

struct Search<'a> {
    needs: &'a [Need],
    chosen: Vec<Option<usize>>,
    best: Option<(Score, Vec<Option<usize>>)>,
    visits: u32,
}

impl Search<'_> {
    fn visit(&mut self, at: usize, hosts: &mut [Host<'_>]) {
        self.visits += 1;
        if self.visits > MOST_VISITS {
            return;
        }
        // Every part of a score only grows on the way down.
        let score = self.score(at, hosts);
        if self.best.as_ref().is_some_and(|(best, _)| score >= *best) {
            return;
        }
        let Some(need) = self.needs.get(at) else {
            self.best = Some((score, self.chosen.clone()));
            return;
        };
        let mut order: Vec<usize> = (0..hosts.len())
            .filter(|&host| hosts[host].own != Some(need.stage) && hosts[host].room >= need.bytes)
            .collect();
        order.sort_by_key(|&host| {
            let Host {
                own,
                stages,
                layers,
                ..
            } = hosts[host];
            (own.is_some(), stages, layers, host)
        });
        for host in order {
            self.chosen[at] = Some(host);
            hosts[host].take(need);
            self.visit(at + 1, hosts);
            hosts[host].give_back(need);
        }
        self.chosen[at] = None;
        self.visit(at + 1, hosts);
    }

    fn score(&self, at: usize, hosts: &[Host<'_>]) -> Score {
        let chosen = &self.chosen[..at];
        let most = |count: fn(&Host<'_>) -> u32| hosts.iter().map(count).max().unwrap_or(0);
        (
            chosen.iter().filter(|host| host.is_none()).count() as u32,
            chosen
                .iter()
                .filter(|host| host.is_some_and(|host| hosts[host].own.is_some()))
                .count() as u32,
            most(|host| host.stages),
            most(|host| host.layers),
        )
    }
}

impl Host<'_> {
    fn take(&mut self, need: &Need) {
        self.room -= need.bytes;
        self.stages += 1;
        self.layers += need.layers;
    }

    fn give_back(&mut self, need: &Need) {
        self.room += need.bytes;
        self.stages -= 1;
        self.layers -= need.layers;
    }
}

/// Partial assignments that are looked at.
const MOST_VISITS: u32 = 200_000;
