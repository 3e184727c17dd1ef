//! Rebalancing: a ring that a fresh plan would beat clearly is replaced by a better one.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use arcanum_profiler::{Objective, Plan, evaluate};

use super::plan::Planned;
use super::ring::{Replica, Ring};
use super::{Prospect, Rings};

/// A ring against a fresh plan for its model.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// Name of the model.
    pub model: String,
    /// Layout of the ring, in one line.
    pub old: String,
    /// Microseconds per token of the ring, as estimated now.
    pub old_token_us: f64,
    /// Tokens per second that it could give.
    pub old_tokens_per_second: f64,
    /// The fresh plan to compare with.
    pub new: Plan,
    /// Names of nodes by their ids.
    pub names: BTreeMap<String, String>,
    /// Part of the cost that the fresh plan saves; negative where it costs more.
    pub gain: f64,
    /// The change that was made or would be made.
    pub verdict: String,
}

enum Remedy {
    Nothing,
    /// Single stages move to other workers while the ring serves.
    Move(Box<Ring>),
    /// A new ring while the old one serves, perhaps without its standbys.
    Beside(Box<Planned>, bool),
    /// The old ring ends first.
    Instead(Box<Planned>),
}

impl Rings {
    /// Compares the rings of a model, or of all, with fresh plans, and replaces those that are clearly worse.
    ///
    /// # Errors
    /// Why a named model has no ring to compare.
    pub fn rebalance(
        &mut self,
        model: Option<&str>,
        dry_run: bool,
        now: Instant,
    ) -> Result<Vec<Comparison>, String> {
        let mut compared = Vec::new();
        let ids: Vec<u64> = match model {
            Some(model) => {
                let missing = || match self.prospects().get(model) {
                    Some(Prospect::Impossible(reason)) => reason.clone(),
                    _ => format!("no ring serves {model:?}; GET /v1/mesh lists the rings"),
                };
                vec![self.live_ring(model).ok_or_else(missing)?]
            }
            None => self.rings.keys().copied().collect(),
        };
        for id in ids {
            match self.compare(id, now) {
                Ok((comparison, remedy)) => {
                    compared.push(comparison);
                    if !dry_run {
                        self.apply(id, remedy, now);
                    }
                }
                Err(reason) if model.is_some() => return Err(reason),
                Err(_) => {}
            }
        }
        Ok(compared)
    }

    /// Compares the rings that were not compared since the mesh changed.
    pub(super) fn rebalance_all(&mut self, now: Instant) {
        let paused = |at: Instant| now.saturating_duration_since(at) < PAUSE;
        if self.last_rebalance.is_some_and(paused) {
            return;
        }
        // After a loss the mesh is left alone for a while: the lost worker may come back, and running
        // requests have had their pause.
        let shaken = |at: Instant| now.saturating_duration_since(at) < SETTLED;
        let due = |ring: &Ring| {
            ring.compared != Some(self.generation)
                && ring.serving_since.is_some()
                && !ring.last_loss.is_some_and(shaken)
        };
        let due = self.rings.values().filter(|ring| due(ring));
        let ids: Vec<u64> = due.map(|ring| ring.id).collect();
        for id in ids {
            if let Some(ring) = self.rings.get_mut(&id) {
                ring.compared = Some(self.generation);
            }
            if let Ok((_, remedy)) = self.compare(id, now)
                && !matches!(remedy, Remedy::Nothing)
            {
                self.apply(id, remedy, now);
                return;
            }
        }
    }

    fn compare(&self, id: u64, now: Instant) -> Result<(Comparison, Remedy), String> {
        let ring = self.rings.get(&id).ok_or("there is no such ring")?;
        let model = ring.model.clone();
        if ring.retiring.is_some() {
            return Err(format!("the ring of {model:?} is on its way out"));
        }
        let settled = |ring: &Ring| ring.lost.is_empty() && ring.serving_since.is_some();
        if !settled(ring) {
            let why = ring.hindrance();
            return Err(format!(
                "the ring of {model:?} does not serve at the moment: {why}"
            ));
        }
        if !ring.moves.is_empty() {
            let text = format!("stages of the ring of {model:?} are moving already");
            return Err(text);
        }
        if self.rings.values().any(|other| other.replaces == Some(id)) {
            let text = format!("a better ring of {model:?} is being formed already");
            return Err(text);
        }
        let fresh = self.place(&model, &[id], now);
        let fresh = fresh.map_err(|error| error.to_string())?;
        let outlook = self.outlook(&model, Some(ring), &[id], now);
        let candidates = outlook
            .ok_or("its members may not be used at the moment")?
            .candidates;
        let speed = evaluate(&ring.spec, &ring.assignments(), &candidates, &fresh.policy);
        let (token_us, per_second) =
            speed.ok_or("a member of the ring did not say how fast it is")?;
        let gain = self.gain((token_us, per_second), &fresh.plan);
        let names = |node: &str| self.name(node).to_owned();
        let (verdict, remedy) = self.judge(ring, (token_us, per_second), gain, fresh.clone(), now);
        let comparison = Comparison {
            model,
            old: ring.layout(names),
            old_token_us: token_us,
            old_tokens_per_second: per_second,
            new: fresh.plan,
            names: fresh.names,
            gain,
            verdict,
        };
        Ok((comparison, remedy))
    }

    fn judge(
        &self,
        ring: &Ring,
        old: (f64, f64),
        gain: f64,
        fresh: Planned,
        now: Instant,
    ) -> (String, Remedy) {
        let margin = self.settings.margin;
        if gain <= margin || gain.is_nan() {
            let verdict = format!(
                "nothing: a gain of {:.0} % is not above ring.margin = {margin}",
                gain * 100.0
            );
            return (verdict, Remedy::Nothing);
        }
        if let Some(next) = self.moves(ring, &fresh) {
            let verdict = "its stages move to faster workers while it serves";
            return (verdict.into(), Remedy::Move(Box::new(next)));
        }
        // A worker knows requests by their model: one driver cannot serve both rings.
        let fits = |beside: &Planned| {
            let driver = beside.plan.stages.last().map(|stage| stage.node.as_str());
            self.gain(old, &beside.plan) > margin
                && driver.is_some_and(|driver| driver != ring.driver())
        };
        let beside = self.place(&ring.model, &[], now).ok().filter(fits);
        // A while without standbys is better than a while without the model.
        let beside = beside.map(|planned| (planned, false)).or_else(|| {
            let mut bare = self.clone();
            let stages = &mut bare.rings.get_mut(&ring.id)?.stages;
            stages.iter_mut().for_each(|stage| stage.standby = None);
            let planned = bare.place(&ring.model, &[], now).ok().filter(fits)?;
            Some((planned, true))
        });
        let verdict = match beside {
            Some((_, true)) => {
                "the new ring is formed beside the old one, which gives its standbys up for that and goes on until it serves"
            }
            Some((_, false)) => {
                "the new ring is formed beside the old one, which goes on until it serves"
            }
            None => "the old ring ends, then the new one is formed: requests wait for it",
        };
        let remedy = match beside {
            Some((beside, bare)) => Remedy::Beside(Box::new(beside), bare),
            None => Remedy::Instead(Box::new(fresh)),
        };
        (verdict.into(), remedy)
    }

    fn apply(&mut self, id: u64, remedy: Remedy, now: Instant) {
        let Some(ring) = self.rings.get(&id) else {
            return;
        };
        let model = ring.model.clone();
        let faster = "it is faster than the ring so far";
        match remedy {
            Remedy::Nothing => return,
            Remedy::Move(mut next) => {
                let before = ring.nodes();
                next.reason = "stages are to move to faster workers".into();
                next.log_standbys(&next.layout(|node| self.name(node).to_owned()));
                self.rings.insert(id, *next);
                self.broadcast(id, &before);
            }
            Remedy::Beside(planned, bare) => {
                if bare {
                    self.give_up_standbys(id);
                }
                self.form(&model, *planned, faster.into(), Some(id), now);
            }
            Remedy::Instead(planned) => {
                self.dissolve(id, "moved: a faster ring is formed in its place".into());
                self.form(&model, *planned, faster.into(), None, now);
            }
        }
        self.last_rebalance = Some(now);
    }

    /// If a plan cuts the model as the ring does and only gives some stages to other workers, returns the
    /// ring with those workers as standbys, which then take over. `None` where that is not so, or memory does
    /// not allow it.
    fn moves(&self, ring: &Ring, fresh: &Planned) -> Option<Ring> {
        let planned = &fresh.plan.stages;
        let cut = planned.iter().map(|stage| &stage.layers);
        if !cut.eq(ring.stages.iter().map(|stage| &stage.layers)) {
            return None;
        }
        let mut next = ring.clone();
        for (index, planned) in planned.iter().enumerate() {
            if planned.node != ring.stages[index].member.node {
                next.moves.insert(index, planned.node.clone());
            }
        }
        if next.moves.values().any(|node| ring.has_member(node)) {
            return None;
        }
        let wanted: BTreeSet<String> = next.moves.values().cloned().collect();
        for (index, stage) in next.stages.iter_mut().enumerate() {
            let better = next.moves.get(&index);
            let standby = stage.standby.as_ref().map(|part| &part.node);
            if better.is_some() && better != standby {
                stage.standby = better.cloned().map(Replica::new);
                stage.member.state.lag_rows = 0;
            } else if better.is_none() && standby.is_some_and(|node| wanted.contains(node)) {
                // Its memory is needed for the stage that it takes over.
                stage.standby = None;
            }
        }
        let fits = |node: &String| self.free(node, &[ring.id]) >= next.bytes_on(node);
        let all_fit = next.moves.values().all(fits);
        (!next.moves.is_empty() && all_fit).then_some(next)
    }

    /// Frees the memory of a ring's standbys; running requests are not disturbed.
    fn give_up_standbys(&mut self, id: u64) {
        let Some(ring) = self.rings.get_mut(&id) else {
            return;
        };
        let before = ring.nodes();
        for stage in &mut ring.stages {
            stage.standby = None;
        }
        ring.reason = "its standbys make room for a faster ring".into();
        self.broadcast(id, &before);
    }

    /// Fraction of the ring's cost that the plan saves.
    fn gain(&self, (token_us, per_second): (f64, f64), plan: &Plan) -> f64 {
        match self.settings.objective {
            Objective::Latency => 1.0 - plan.token_us / token_us,
            Objective::Throughput => 1.0 - per_second / plan.tokens_per_second,
        }
    }

    /// Ends rings that were replaced and have nothing left to do.
    pub(super) fn retire(&mut self, now: Instant) {
        let limit = self.settings.retire_limit;
        let over = |ring: &Ring| {
            ring.retiring.is_some_and(|since| {
                ring.running == Some(0) || now.saturating_duration_since(since) >= limit
            })
        };
        let over = self.rings.values().filter(|ring| over(ring));
        let ids: Vec<u64> = over.map(|ring| ring.id).collect();
        for id in ids {
            self.dissolve(id, "moved: a faster ring serves in its place".into());
        }
    }
}

/// Least time between two replacements.
const PAUSE: Duration = Duration::from_secs(60);

/// Time for which a ring that recovered from a loss serves before it is changed for speed alone.
const SETTLED: Duration = Duration::from_secs(30);
