//! Spot checks: workers that serve the same weights are asked the same question, and their answers are
//! compared.
//!
//! A question is greedy and a few tokens long. All workers that are due, and one or two of long standing
//! beside them, answer it: that is a *round*. A newcomer serves only when its answer agrees with theirs, or
//! when there is no other worker to compare it with.
//!
//! **Honest machines differ in rounding.** Kernels of different CPUs and GPUs sum in other orders, so logits
//! differ a little and two nearly equal tokens may change places. So tokens are compared up to the first
//! difference only, and that difference counts if either side gives the other's token a much smaller
//! probability than its own ([`MARGIN`]). What a worker says about its own alternatives is no excuse for it:
//! the other side must say the same. A difference must show in two rounds with different questions.
//!
//! **Who is right?** The majority of those that answered. Where there are only two opinions and no third, the
//! one that serves longer goes on, the other one is held back, and both are named ([`CheckVerdict::Disputed`]); a
//! third worker decides as soon as there is one.

mod question;
mod sample;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

pub use question::is_question;
use question::question_of;
pub use sample::{ALTERNATIVES, Position, Sample};

/// The weights that a group of workers has in common: name and fingerprint of a model.
pub type Weights = (String, String);

/// A question for a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Number of its round.
    pub round: u64,
    /// Text of the question.
    pub text: String,
}

/// State of a worker with these weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CheckState {
    /// It was not compared yet, and another worker may be there to compare it with.
    #[default]
    New,
    /// It agrees with the others, or is alone.
    Cleared,
    /// Its last answer differs from that of others.
    Held,
}

/// Result of a comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckVerdict {
    /// Its answers differ from those of the majority, in two rounds.
    Outvoted {
        /// The subject that was outvoted.
        subject: String,
        /// The subjects of the majority.
        by: Vec<String>,
    },
    /// Two differ and no third can decide: the junior one is held back.
    Disputed {
        /// Serves longer, and goes on.
        senior: String,
        /// The subject that is held back.
        junior: String,
    },
    /// A dispute is over.
    Settled {
        /// The one that was held back.
        subject: String,
    },
}

/// Timing and seed of the checks that follow an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Schedule {
    /// Time between two checks of one worker in the long run.
    pub every: Duration,
    /// The next question is made from it.
    pub seed: u64,
}

/// The state machine: see the module's page.
#[derive(Debug, Clone, Default)]
pub(crate) struct SpotChecks {
    groups: BTreeMap<Weights, CheckGroup>,
    rounds: u64,
}

#[derive(Debug, Clone, Default)]
struct CheckGroup {
    round: Option<Round>,
    subjects: BTreeMap<String, CheckSubject>,
}

#[derive(Debug, Clone)]
struct Round {
    number: u64,
    since: Instant,
    text: String,
    answers: BTreeMap<String, Sample>,
    /// Subjects whose answers the round waits for.
    wanted: BTreeSet<String>,
    settled: bool,
}

#[derive(Debug, Clone, Default)]
struct CheckSubject {
    check_state: CheckState,
    since: Option<Instant>,
    /// Rounds in which it agreed.
    agreed: u32,
    /// Rounds in which it was outvoted, since it last agreed.
    outvoted: u32,
    /// Rounds in which it disagreed with a senior while no third answered, since it last agreed.
    disputed: u32,
    /// Time of its next check.
    due: Option<Instant>,
    seen: Option<Instant>,
}

impl SpotChecks {
    /// Returns true if this one should answer a question now, though it is known to answer.
    pub(crate) fn is_due(&self, weights: &Weights, subject: &str, now: Instant) -> bool {
        let Some(group) = self.groups.get(weights) else {
            return true;
        };
        let running = group.round.as_ref().filter(|round| !round.settled);
        let has_answered =
            |subject: &str| running.is_some_and(|round| round.answers.contains_key(subject));
        let wanted = running.is_some_and(|round| round.wanted.contains(subject));
        let wanted = wanted && !has_answered(subject);
        let known = group.subjects.get(subject);
        // Another question would begin another round, and the answers that this one waits for would always
        // come too late.
        if let Some(round) = running.filter(|_| has_answered(subject)) {
            let mut missing = round.wanted.iter().filter(|other| !has_answered(other));
            let of_standing = |other: &String| {
                let other = group.subjects.get(other);
                other.is_some_and(|other| other.check_state == CheckState::Cleared)
            };
            let patience = if missing.any(of_standing) {
                ROUND_LIFE
            } else {
                SETTLE_AFTER
            };
            if now.saturating_duration_since(round.since) < patience {
                return false;
            }
        }
        wanted || known.is_none_or(|known| known.due.is_none_or(|due| now >= due))
    }

    /// The next question for this one: that of the running round, or a new one made from `seed`.
    pub(crate) fn question(
        &mut self,
        weights: &Weights,
        subject: &str,
        seed: u64,
        now: Instant,
    ) -> Question {
        if !self.groups.contains_key(weights) && self.groups.len() >= GROUPS {
            self.groups.pop_first();
        }
        let group = self.groups.entry(weights.clone()).or_default();
        let usable = |round: &&mut Round| {
            now.saturating_duration_since(round.since) < ROUND_LIFE
                && (!round.answers.contains_key(subject))
                && (!round.settled || !group.subjects.contains_key(subject))
        };
        if let Some(round) = group.round.as_mut().filter(usable) {
            round.wanted.insert(subject.to_owned());
            round.settled = false;
            return round.question();
        }
        self.rounds += 1;
        let round = group.round.insert(Round::new(self.rounds, seed, now));
        round.wanted.insert(subject.to_owned());
        round.question()
    }

    /// An answer came. `peers` are all others that answer now with these weights, the senior ones first.
    pub(crate) fn answered(
        &mut self,
        weights: &Weights,
        subject: &str,
        (number, sample): (u64, Sample),
        peers: &[&str],
        schedule: Schedule,
        now: Instant,
    ) -> Vec<CheckVerdict> {
        let Some(group) = self.groups.get_mut(weights) else {
            return Vec::new();
        };
        group.entry(subject, now);
        let Some(round) = group.round.as_mut().filter(|round| round.number == number) else {
            // A question of an earlier round: it answers, and is compared another time.
            return Vec::new();
        };
        round.answers.insert(subject.to_owned(), sample);
        let check_state = |peer: &str| group.subjects.get(peer).map(|known| known.check_state);
        let others = || peers.iter().filter(|peer| **peer != subject);
        let cleared = others().filter(|peer| check_state(peer) == Some(CheckState::Cleared));
        let held = others().filter(|peer| check_state(peer) == Some(CheckState::Held));
        let wanted = cleared.take(COMPARATORS).chain(held.take(COMPARATORS));
        round.wanted.extend(wanted.map(|peer| (*peer).to_owned()));
        self.settle(weights, subject, peers, schedule, now)
    }

    /// Weights whose running round has answers and waits for more.
    pub(crate) fn waiting(&self) -> Vec<Weights> {
        let waits = |group: &CheckGroup| {
            let round = group.round.as_ref();
            round.is_some_and(|round| !round.settled && !round.answers.is_empty())
        };
        let groups = self.groups.iter().filter(|(_, group)| waits(group));
        groups.map(|(weights, _)| weights.clone()).collect()
    }

    /// Looks again at a round that waits: those that it waits for may be gone, or late. `peers` are all that answer now with these
    /// weights, the senior ones first.
    pub(crate) fn look_again(
        &mut self,
        weights: &Weights,
        peers: &[&str],
        schedule: Schedule,
        now: Instant,
    ) -> Vec<CheckVerdict> {
        let round = self.groups.get(weights).and_then(|g| g.round.as_ref());
        let answered = round.filter(|round| !round.settled).and_then(|round| {
            let mut answers = round.answers.keys();
            answers.find(|subject| peers.contains(&subject.as_str()))
        });
        match answered.cloned() {
            Some(subject) => self.settle(weights, &subject, peers, schedule, now),
            None => Vec::new(),
        }
    }

    /// This one gave no answer to the running question: the others do not wait for it.
    pub(crate) fn gave_none(&mut self, weights: &Weights, subject: &str) {
        if let Some(group) = self.groups.get_mut(weights) {
            if let Some(round) = &mut group.round {
                round.wanted.remove(subject);
            }
            if let Some(known) = group.subjects.get_mut(subject) {
                known.due = None;
            }
        }
    }

    /// State of a subject. One that waits in vain for another to compare with is cleared, though only after a
    /// longer wait where others exist: they may be busy, and a liar may wait for just that.
    pub(crate) fn check_state(&self, weights: &Weights, subject: &str, now: Instant) -> CheckState {
        let group = self.groups.get(weights);
        let Some(known) = group.and_then(|group| group.subjects.get(subject)) else {
            return CheckState::New;
        };
        let comparable = |(name, other): (&String, &CheckSubject)| {
            let lately = |seen| now.saturating_duration_since(seen) < SEEN_LATELY;
            name != subject
                && other.check_state == CheckState::Cleared
                && other.seen.is_some_and(lately)
        };
        let others = group.is_some_and(|group| group.subjects.iter().any(comparable));
        let wait = if others { BUSY_WAIT } else { COMPARE_WAIT };
        let waited = known
            .since
            .is_some_and(|since| now.saturating_duration_since(since) >= wait);
        match known.check_state {
            CheckState::New if waited => CheckState::Cleared,
            check_state => check_state,
        }
    }

    /// Forgets its checks with any weights: it is in quarantine, and starts again as a newcomer afterwards.
    pub(crate) fn forget(&mut self, subject: &str) {
        for group in self.groups.values_mut() {
            group.subjects.remove(subject);
            if let Some(round) = &mut group.round {
                round.wanted.remove(subject);
                round.answers.remove(subject);
            }
        }
    }

    /// Compares the answers of the running round, if those that it needs are there.
    fn settle(
        &mut self,
        weights: &Weights,
        newest: &str,
        peers: &[&str],
        Schedule { every, seed }: Schedule,
        now: Instant,
    ) -> Vec<CheckVerdict> {
        let Some(group) = self.groups.get_mut(weights) else {
            return Vec::new();
        };
        let Some(round) = &mut group.round else {
            return Vec::new();
        };
        let here = |subject: &str| subject == newest || peers.contains(&subject);
        let lacks = |subject: &String| here(subject) && !round.answers.contains_key(subject);
        let missing = round.wanted.iter().any(lacks);
        let late = now.saturating_duration_since(round.since) >= SETTLE_AFTER;
        if missing && !(late && round.answers.len() > 1) {
            return Vec::new();
        }
        let is_cleared = |subject: &str| {
            let known = group.subjects.get(subject);
            known.is_some_and(|known| known.check_state == CheckState::Cleared)
        };
        // Newcomers do not vouch for each other while those of long standing have yet to answer.
        let awaited = peers.iter().any(|peer| is_cleared(peer));
        let has_come = |subject: &String| here(subject) && is_cleared(subject);
        if missing && awaited && !round.answers.keys().any(has_come) {
            return Vec::new();
        }
        // The senior ones first; the newest may be among them.
        let rank = |subject: &str| {
            let place = peers.iter().position(|peer| *peer == subject);
            place.unwrap_or(peers.len())
        };
        let voters = round.answers.keys().filter(|subject| here(subject));
        let mut voters: Vec<String> = voters.cloned().collect();
        voters.sort_by_key(|subject| rank(subject));
        round.settled = true;
        let side_of = |one: &String| -> Vec<String> {
            let agrees =
                |two: &&String| one == *two || round.answers[one].agrees(&round.answers[*two]);
            voters.iter().filter(agrees).cloned().collect()
        };
        // The largest side, on a draw that of the most senior. Before all have answered, those of long
        // standing count for more.
        let weight = |side: &[String]| {
            let senior = side.iter().filter(|voter| is_cleared(voter)).count();
            (if missing { senior } else { 0 }, side.len())
        };
        let mut best: Vec<String> = Vec::new();
        for voter in &voters {
            let side = side_of(voter);
            if weight(&side) > weight(&best) {
                best = side;
            }
        }
        let majority = 2 * best.len() > voters.len();
        let mut verdicts = Vec::new();
        let mut again = false;
        for voter in &voters {
            let agrees = best.contains(voter);
            let subject = group.subjects.entry(voter.clone()).or_default();
            if agrees {
                if subject.check_state == CheckState::Held && subject.disputed >= ROUNDS {
                    verdicts.push(CheckVerdict::Settled {
                        subject: voter.clone(),
                    });
                }
                subject.agreed(voter, every, now);
                continue;
            }
            subject.check_state = CheckState::Held;
            if majority {
                subject.outvoted += 1;
                if subject.outvoted >= ROUNDS {
                    verdicts.push(CheckVerdict::Outvoted {
                        subject: voter.clone(),
                        by: best.clone(),
                    });
                }
                again |= subject.outvoted < ROUNDS;
            } else {
                subject.disputed += 1;
                if subject.disputed == ROUNDS {
                    verdicts.push(CheckVerdict::Disputed {
                        senior: best.first().cloned().unwrap_or_default(),
                        junior: voter.clone(),
                    });
                }
                again |= subject.disputed < ROUNDS;
            }
            subject.due = Some(now + RECHECK.min(every));
        }
        if again {
            // Another question, to the same ones, at once.
            self.rounds += 1;
            let mut fresh = Round::new(self.rounds, seed, now);
            fresh.wanted = voters.into_iter().collect();
            group.round = Some(fresh);
        }
        verdicts
    }
}

impl CheckGroup {
    fn entry(&mut self, subject: &str, now: Instant) -> &mut CheckSubject {
        if !self.subjects.contains_key(subject) && self.subjects.len() >= SUBJECTS {
            let oldest = self.subjects.iter().min_by_key(|(_, known)| known.seen);
            if let Some(oldest) = oldest.map(|(oldest, _)| oldest.clone()) {
                self.subjects.remove(&oldest);
            }
        }
        let known = self.subjects.entry(subject.to_owned()).or_default();
        known.seen = Some(now);
        known.since.get_or_insert(now);
        known
    }
}

impl CheckSubject {
    fn agreed(&mut self, name: &str, every: Duration, now: Instant) {
        self.check_state = CheckState::Cleared;
        (self.outvoted, self.disputed) = (0, 0);
        let wait = FIRST_CHECK
            .saturating_mul(1 << self.agreed.min(20))
            .min(every);
        self.agreed = self.agreed.saturating_add(1);
        // Spread, so that workers that joined together are not all asked together.
        let part = u32::from(
            name.bytes()
                .fold(0_u8, |sum, byte| sum.wrapping_mul(31) ^ byte),
        );
        self.due = Some(now + wait - wait * part / 1024);
    }
}

impl Round {
    fn new(number: u64, seed: u64, now: Instant) -> Self {
        Self {
            number,
            since: now,
            text: question_of(seed),
            answers: BTreeMap::new(),
            wanted: BTreeSet::new(),
            settled: false,
        }
    }

    fn question(&self) -> Question {
        Question {
            round: self.number,
            text: self.text.clone(),
        }
    }
}

/// Tokens of an answer that is compared.
pub const TOKENS: u32 = 8;
/// Rounds that must show a difference.
const ROUNDS: u32 = 2;
/// Workers of good standing that answer the same question as the one that is checked.
const COMPARATORS: usize = 2;
/// Time for which a question is asked.
const ROUND_LIFE: Duration = Duration::from_secs(120);
/// Time after which those whose answers are missing are not waited for.
const SETTLE_AFTER: Duration = Duration::from_secs(10);
/// Time that a newcomer waits to be compared.
const COMPARE_WAIT: Duration = Duration::from_secs(20);
/// The same where other workers serve and have been too busy to answer.
const BUSY_WAIT: Duration = Duration::from_secs(180);
/// Maximum age of the last answer of such a one.
const SEEN_LATELY: Duration = Duration::from_secs(1800);
/// Time to the second check of a newcomer; it doubles from then on.
const FIRST_CHECK: Duration = Duration::from_secs(5);
/// Time after which one that is held back is asked again.
const RECHECK: Duration = Duration::from_secs(15);
const SUBJECTS: usize = 1024;
const GROUPS: usize = 1024;
