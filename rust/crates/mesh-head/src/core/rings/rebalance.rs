//! Rebalancing: a ring that a fresh plan would beat clearly is replaced by a better one.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use arcanum_profiler::{Objective, Plan, evaluate};

use super::plan::Planned;
use super::ring::Ring;
use super::{Prospect, Rings};

/// A ring against a fresh plan for its model.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// Model name.
    pub model: String,
    /// Layout of the ring, in words.
    pub old: String,
    /// Microseconds per token of the ring, as estimated now.
    pub old_token_us: f64,
    /// Tokens per second that it could give.
    pub old_tokens_per_second: f64,
    /// The fresh plan.
    pub new: Plan,
    /// Names of nodes by their ids.
    pub names: BTreeMap<String, String>,
    /// Part of the cost that the fresh plan saves; negative where it costs more.
    pub gain: f64,
    /// What was done, or would be.
    pub verdict: String,
}

/// What to do about a comparison.
enum Remedy {
    Nothing,
    /// A new ring while the old one serves.
    Beside(Box<Planned>),
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
                let id =
                    self.live_ring(model)
                        .ok_or_else(|| match self.prospects().get(model) {
                            Some(Prospect::Impossible(reason)) => reason.clone(),
                            _ => format!("no ring serves {model:?}; GET /v1/mesh lists the rings"),
                        })?;
                vec![id]
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

    /// What is due by itself: rings that were not compared since the mesh changed.
    pub(super) fn rebalance_all(&mut self, now: Instant) {
        let paused = |at: Instant| now.saturating_duration_since(at) < PAUSE;
        if self.last_rebalance.is_some_and(paused) {
            return;
        }
        let due =
            |ring: &Ring| ring.compared != Some(self.generation) && ring.serving_since.is_some();
        let ids: Vec<u64> = self
            .rings
            .iter()
            .filter(|(_, ring)| due(ring))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            let generation = self.generation;
            if let Some(ring) = self.rings.get_mut(&id) {
                ring.compared = Some(generation);
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
            return Err(format!(
                "the ring of {model:?} does not serve at the moment: {}",
                ring.reason_of_change
            ));
        }
        if self.rings.values().any(|other| other.replaces == Some(id)) {
            return Err(format!(
                "a better ring of {model:?} is being formed already"
            ));
        }
        let fresh = self
            .place(&model, &[id], now)
            .map_err(|error| error.to_string())?;
        let outlook = self
            .outlook(&model, Some(ring), &[id], now)
            .ok_or("its members may not be used at the moment")?;
        let (token_us, per_second) = evaluate(
            &ring.spec,
            &ring.assignments(),
            &outlook.candidates,
            &fresh.policy,
        )
        .ok_or("a member of the ring did not say how fast it is")?;
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
                "nothing: a gain of {:.0} % is not above sharding.margin = {margin}",
                gain * 100.0
            );
            return (verdict, Remedy::Nothing);
        }
        // A worker knows requests by their model: one driver cannot serve both rings.
        let beside = self.place(&ring.model, &[], now).ok().filter(|beside| {
            let driver = beside.plan.stages.last().map(|stage| stage.node.as_str());
            self.gain(old, &beside.plan) > margin
                && driver.is_some_and(|driver| driver != ring.driver())
        });
        match beside {
            Some(beside) => (
                "the new ring is formed beside the old one, which goes on until it serves".into(),
                Remedy::Beside(Box::new(beside)),
            ),
            None => (
                "the old ring ends, then the new one is formed: requests wait for it".into(),
                Remedy::Instead(Box::new(fresh)),
            ),
        }
    }

    fn apply(&mut self, id: u64, remedy: Remedy, now: Instant) {
        let Some(ring) = self.rings.get(&id) else {
            return;
        };
        let model = ring.model.clone();
        match remedy {
            Remedy::Nothing => return,
            Remedy::Beside(planned) => {
                self.form(
                    &model,
                    *planned,
                    "it is faster than the ring so far".into(),
                    Some(id),
                    now,
                );
            }
            Remedy::Instead(planned) => {
                self.dissolve(id, "moved: a faster ring is formed in its place".into());
                self.form(
                    &model,
                    *planned,
                    "it is faster than the ring so far".into(),
                    None,
                    now,
                );
            }
        }
        self.last_rebalance = Some(now);
    }

    /// Which part of the ring's cost the plan saves.
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
        let ids: Vec<u64> = self
            .rings
            .iter()
            .filter(|(_, ring)| over(ring))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            self.dissolve(id, "moved: a faster ring serves in its place".into());
        }
    }
}

/// Least time between two replacements.
const PAUSE: Duration = Duration::from_secs(60);
