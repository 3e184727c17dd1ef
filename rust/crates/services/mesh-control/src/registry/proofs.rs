//! The head's questions to workers, and the effects of their answers.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use mesh_proto::ModelKind;

use super::Registry;
use super::served::{ServedModel, ring_of_subject, short};
use super::worker::{Worker, WorkerId};
use crate::spotcheck::{CheckState, CheckVerdict, Question, Sample, Schedule, Weights};

/// A proof that a worker has to give.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// Model name.
    pub model: String,
    /// The ring that it drives.
    pub ring: Option<u64>,
    /// Output of the model: text or vectors.
    pub kind: ModelKind,
    /// Length of its vectors.
    pub dimensions: u32,
    /// The question to ask.
    pub question: Question,
}

/// A node was found out, or is suspected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// It is in quarantine for this time.
    Quarantined {
        /// Node id; the driver's if it is a ring.
        node: String,
        /// Name of the node.
        name: String,
        /// The ring that is given up.
        ring: Option<u64>,
        /// Length of the quarantine.
        length: Duration,
        /// Evidence against it, for people.
        reason: String,
    },
    /// Two workers differ and no third can decide between them.
    Disputed {
        /// Both of them, and which one is held back.
        text: String,
    },
    /// The one that was held back agrees now.
    Settled {
        /// Name of the node.
        name: String,
    },
}

impl Registry {
    /// The proofs that this worker has to give now. `seed` makes questions that cannot be known in advance.
    /// Models that are `under_way` are being asked.
    pub fn proofs_due(
        &mut self,
        id: WorkerId,
        under_way: &BTreeSet<String>,
        seed: u64,
        now: Instant,
    ) -> Vec<Proof> {
        let Some(worker) = self.workers.get(&id) else {
            return Vec::new();
        };
        let Some(node) = worker.node_id() else {
            return Vec::new();
        };
        if self.is_out(node, now) {
            return Vec::new();
        }
        let idle = worker.active() == 0;
        let due = |model: &&ServedModel| {
            if under_way.contains(&model.card.name) {
                return false;
            }
            let old = |at| now.saturating_duration_since(at) >= self.check_interval;
            let stale = model.last_success.is_none_or(old);
            let subject = model.subject(node);
            // One that it is not kept for is shown to answer, and no more.
            let checked = worker.is_for(model.card.kind())
                && self.checks.is_due(&model.weights(), &subject, now);
            let wanted = model.may_be_asked(now)
                && match model.proven {
                    true => checked || (stale && idle),
                    false => true,
                };
            // For a ring the token goes through every stage. Its driver answers until the ring has moved
            // away.
            (!worker.draining || model.ring.is_some()) && wanted
        };
        let due: Vec<&ServedModel> = worker.models.iter().filter(due).collect();
        let proofs = due.into_iter().map(|model| {
            let (weights, subject) = (model.weights(), model.subject(node));
            Proof {
                model: model.card.name.clone(),
                ring: model.ring,
                kind: model.card.kind(),
                dimensions: model.card.dimensions,
                question: self.checks.question(&weights, &subject, seed, now),
            }
        });
        proofs.collect()
    }

    /// A worker answered a question with this, or did not answer what was asked at `asked`.
    pub fn proved(
        &mut self,
        id: WorkerId,
        proof: &Proof,
        sample: Option<Sample>,
        asked: Instant,
        seed: u64,
        now: Instant,
    ) -> Vec<Finding> {
        let Some(worker) = self.workers.get_mut(&id) else {
            return Vec::new();
        };
        worker.probed(&proof.model, sample.is_some(), asked, now);
        let Some(node) = worker.node_id().map(str::to_owned) else {
            return Vec::new();
        };
        let meant = |model: &&ServedModel| model.card.name == proof.model;
        let Some(model) = worker.models.iter().find(meant) else {
            return Vec::new();
        };
        let (weights, subject) = (model.weights(), model.subject(&node));
        let Some(sample) = sample else {
            self.checks.gave_none(&weights, &subject);
            return Vec::new();
        };
        let peers = self.peers(&weights, now);
        let peers: Vec<&str> = peers.iter().map(String::as_str).collect();
        let answer = (proof.question.round, sample);
        // Checks cost a hundredth of a slow worker's time at most.
        let took = now.saturating_duration_since(asked);
        let every = self.check_interval.max(took.saturating_mul(100));
        let schedule = Schedule { every, seed };
        let checks = &mut self.checks;
        let verdicts = checks.answered(&weights, &subject, answer, &peers, schedule, now);
        self.findings(&weights, verdicts, now)
    }

    /// Compares answers whose comparators are gone or late. To be called now and then.
    pub fn look_at_checks(&mut self, seed: u64, now: Instant) -> Vec<Finding> {
        let mut findings = Vec::new();
        for weights in self.checks.waiting() {
            let peers = self.peers(&weights, now);
            let peers: Vec<&str> = peers.iter().map(String::as_str).collect();
            let every = self.check_interval;
            let schedule = Schedule { every, seed };
            let verdicts = self.checks.look_again(&weights, &peers, schedule, now);
            findings.extend(self.findings(&weights, verdicts, now));
        }
        findings
    }

    /// Draws the consequences of verdicts.
    fn findings(
        &mut self,
        weights: &Weights,
        verdicts: Vec<CheckVerdict>,
        now: Instant,
    ) -> Vec<Finding> {
        let verdicts = verdicts.into_iter();
        let found = verdicts.map(|verdict| self.found(weights, verdict, now));
        let findings = found.collect();
        self.refresh_all(now);
        findings
    }

    /// A worker declines a question because it is full or drains. Says whether that is excused, see [`ServedModel::declined`].
    pub fn declined(&mut self, id: WorkerId, model: &str, now: Instant) -> bool {
        let limit = self.trial;
        let worker = self.workers.get_mut(&id);
        let meant = worker.and_then(|worker| worker.model_mut(model));
        meant.is_none_or(|served| served.declined(limit, now))
    }

    /// Descriptions of the workers that differ from one another without a majority, and of the models whose
    /// name stands for other weights.
    pub fn disagreements(&self, now: Instant) -> Vec<String> {
        let mut texts: Vec<String> = self.disputes.values().cloned().collect();
        for quarantined in self.reputation.view(now) {
            texts.push(format!(
                "worker `{}` is in quarantine for another {:.0} s: {}; find out what it runs, and expel it, or readmit it when it is mended",
                quarantined.name, quarantined.seconds_left, quarantined.reason
            ));
        }
        for worker in self.iter() {
            for model in &worker.models {
                let (name, weights) = (&model.card.name, &model.card.fingerprint);
                let used = self.weights_of(name);
                if let Some(used) = used.filter(|_| weights.is_empty()) {
                    texts.push(format!(
                        "worker `{}` does not say which weights it serves under the name {name:?}, and gets no requests for it while others \
                         serve those in use ({}); update it",
                        worker.name,
                        short(used)
                    ));
                } else if let Some(used) = used.filter(|used| used != weights) {
                    texts.push(format!(
                        "worker `{}` serves other weights under the name {name:?} ({}) than those in use ({}), and gets no requests for \
                         it; give its model another name, or stop the workers with the others",
                        worker.name,
                        short(weights),
                        short(used)
                    ));
                }
            }
        }
        texts
    }

    /// Those that answer with these weights now, the senior ones first.
    fn peers(&self, weights: &Weights, now: Instant) -> Vec<String> {
        let mut peers: Vec<(Option<Instant>, WorkerId, String)> = Vec::new();
        for worker in self.iter() {
            let Some(node) = worker.node_id() else {
                continue;
            };
            if self.is_out(node, now) {
                continue;
            }
            let same = worker.models.iter().filter(|model| {
                let is_asked = !worker.draining || model.ring.is_some();
                let (name, fingerprint) = (&model.card.name, &model.card.fingerprint);
                model.proven && is_asked && (name, fingerprint) == (&weights.0, &weights.1)
            });
            for model in same {
                let since = match model.ring {
                    Some(ring) => self.proven_rings.get(&ring).copied(),
                    None => self.reputation.serves_since(node),
                };
                peers.push((since, worker.id, model.subject(node)));
            }
        }
        // Those that never served come last.
        peers.sort_by_key(|(since, id, _)| (since.is_none(), *since, *id));
        peers.into_iter().map(|(_, _, subject)| subject).collect()
    }

    fn found(&mut self, weights: &Weights, verdict: CheckVerdict, now: Instant) -> Finding {
        let named = |this: &Self, subject: &str| {
            let found = this.iter().find(|worker| {
                let node = worker.node_id().unwrap_or_default();
                worker.models.iter().any(|m| m.subject(node) == *subject)
            });
            let name = found.map(|worker| worker.name.clone());
            (
                found.and_then(Worker::node_id).map(str::to_owned),
                name.unwrap_or_else(|| short(subject).to_owned()),
            )
        };
        match verdict {
            CheckVerdict::Outvoted { subject, by } => {
                let (node, name) = named(self, &subject);
                let others: Vec<String> = by.iter().map(|other| named(self, other).1).collect();
                let reason = format!(
                    "its answers for {:?} differ from those of {}",
                    weights.0,
                    others.join(", ")
                );
                let ring = ring_of_subject(&subject);
                let length = match ring {
                    // Any of its members may be the cause.
                    Some(_) => Duration::ZERO,
                    None => self.reputation.quarantine(&subject, &name, &reason, now),
                };
                self.checks.forget(&subject);
                self.disputes.remove(&subject);
                Finding::Quarantined {
                    node: node.unwrap_or(subject),
                    name,
                    ring,
                    length,
                    reason,
                }
            }
            CheckVerdict::Disputed { senior, junior } => {
                let (one, two) = (named(self, &senior).1, named(self, &junior).1);
                let text = format!(
                    "workers `{one}` and `{two}` give different answers for {:?} though both claim the same weights, and no third one can say \
                     which is right: `{one}`, which serves longer, goes on, and `{two}` gets no requests; add a worker with that model, or \
                     remove the wrong one",
                    weights.0
                );
                if self.disputes.len() < DISPUTES {
                    self.disputes.insert(junior, text.clone());
                }
                Finding::Disputed { text }
            }
            CheckVerdict::Settled { subject } => {
                self.disputes.remove(&subject);
                let (_, name) = named(self, &subject);
                Finding::Settled { name }
            }
        }
    }

    /// Copies the check states of the models of one worker from the spot checks.
    pub(super) fn refresh(&mut self, id: WorkerId, now: Instant) {
        let (checks, reputation) = (&self.checks, &mut self.reputation);
        let Some(worker) = self.workers.get_mut(&id) else {
            return;
        };
        let Some(node) = worker.node_id().map(str::to_owned) else {
            return;
        };
        for model in &mut worker.models {
            let subject = model.subject(&node);
            let known = checks.check_state(&model.weights(), &subject, now);
            model.check_state = match model.ring {
                // Of a ring that answered before, under whichever driver.
                Some(_) if known == CheckState::New && model.proven => CheckState::Cleared,
                _ => known,
            };
            if model.proven && model.check_state == CheckState::Cleared {
                match model.ring {
                    None => reputation.proven(&node, now),
                    Some(ring) => {
                        self.proven_rings.entry(ring).or_insert(now);
                    }
                }
            }
        }
    }

    pub(super) fn refresh_all(&mut self, now: Instant) {
        let ids: Vec<WorkerId> = self.workers.keys().copied().collect();
        for id in ids {
            self.refresh(id, now);
        }
    }
}

const DISPUTES: usize = 64;
