//! The head's opinion of the nodes of its mesh: which failed, which gave wrong answers, and how long that
//! keeps them from getting requests.
//!
//! Records are kept by node id, so a node that connects again meets its own past. Time comes in as an
//! argument. There are two reasons to leave a node out:
//! - it is *paused* for one model after repeated faults: the pause doubles with every fault and shrinks with
//!   every complete answer;
//! - it is in *quarantine* because its answers differ from those of the others: one minute, then four times
//!   as long with every repeat, unless an operator readmits it.
//!
//! Nodes that are expelled have no links: `mesh_net::trust::DenyList`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mesh_api::Quarantine as QuarantineView;

/// The records of all nodes.
#[derive(Debug, Clone, Default)]
pub struct Reputation {
    nodes: BTreeMap<String, Record>,
}

/// A quarantine: the node gets no requests because its answers differed from those of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quarantine<'a> {
    /// Time at which it ends.
    pub until: Instant,
    /// Evidence against the node.
    pub reason: &'a str,
}

#[derive(Debug, Clone, Default)]
struct Record {
    name: String,
    /// By model.
    faults: BTreeMap<String, Faults>,
    quarantine: Option<(Instant, String)>,
    quarantines: u32,
    /// Time at which it first answered the head's question rightly, as far as anybody could tell.
    serves_since: Option<Instant>,
    /// Time of the last event.
    touched: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Faults {
    count: u32,
    last: Instant,
    paused_until: Instant,
}

impl Reputation {
    /// A node failed an attempt with this model that began at `began`, and the fault is its own. Attempts
    /// that were under way when it last failed count as the same fault. Returns the pause if it counts.
    pub fn at_fault(
        &mut self,
        node: &str,
        model: &str,
        began: Instant,
        now: Instant,
    ) -> Option<Duration> {
        let record = self.record(node, now)?;
        if !record.faults.contains_key(model) && record.faults.len() >= MODELS_PER_NODE {
            record.faults.pop_first();
        }
        let faults = record.faults.entry(model.to_owned()).or_insert(Faults {
            count: 0,
            last: now,
            paused_until: now,
        });
        if faults.count > 0 && began <= faults.last {
            return None;
        }
        if now.saturating_duration_since(faults.last) >= FORGOTTEN {
            faults.count = 0;
        }
        faults.count = faults.count.saturating_add(1);
        faults.last = now;
        let pause = pause_after(faults.count);
        faults.paused_until = now + pause;
        Some(pause)
    }

    /// A node gave a complete answer to a client.
    pub fn answered(&mut self, node: &str, model: &str) {
        let record = self.nodes.get_mut(node);
        if let Some(faults) = record.and_then(|record| record.faults.get_mut(model)) {
            faults.count = faults.count.saturating_sub(1);
        }
    }

    /// End of a node's pause with this model, if it has one.
    pub(crate) fn paused_until(&self, node: &str, model: &str, now: Instant) -> Option<Instant> {
        let until = self.nodes.get(node)?.faults.get(model)?.paused_until;
        (now < until).then_some(until)
    }

    /// Time of the fault that a pause is for.
    pub(crate) fn paused_since(&self, node: &str, model: &str) -> Option<Instant> {
        Some(self.nodes.get(node)?.faults.get(model)?.last)
    }

    /// Puts a node into quarantine, four times as long as the last time. Returns for how long.
    pub fn quarantine(&mut self, node: &str, name: &str, reason: &str, now: Instant) -> Duration {
        let Some(record) = self.record(node, now) else {
            return Duration::ZERO;
        };
        name.clone_into(&mut record.name);
        let times = record.quarantines.min(8);
        record.quarantines = record.quarantines.saturating_add(1);
        record.serves_since = None;
        let length = QUARANTINE
            .saturating_mul(1 << (2 * times))
            .min(LONGEST_QUARANTINE);
        record.quarantine = Some((now + length, reason.to_owned()));
        length
    }

    /// Takes a node's quarantine and faults back.
    pub fn readmit(&mut self, node: &str) {
        self.nodes.remove(node);
    }

    /// A node has another id from now on, and meets its own past under it.
    pub fn renamed(&mut self, old: &str, new: &str) {
        if let Some(record) = self.nodes.remove(old) {
            self.nodes.entry(new.to_owned()).or_insert(record);
        }
    }

    /// The quarantine of this node, if it is in one.
    pub fn quarantined(&self, node: &str, now: Instant) -> Option<Quarantine<'_>> {
        let (until, reason) = self.nodes.get(node)?.quarantine.as_ref()?;
        let until = *until;
        (now < until).then_some(Quarantine { until, reason })
    }

    /// The node answered rightly, as far as anybody could tell. The first time decides its seniority.
    pub fn proven(&mut self, node: &str, now: Instant) {
        if let Some(record) = self.record(node, now) {
            record.serves_since.get_or_insert(now);
        }
    }

    /// Time since which a node serves, in this head's life.
    pub fn serves_since(&self, node: &str) -> Option<Instant> {
        self.nodes.get(node)?.serves_since
    }

    /// Views of all nodes in quarantine.
    pub fn view(&self, now: Instant) -> Vec<QuarantineView> {
        let views = self.nodes.iter().filter_map(|(node, record)| {
            let (until, reason) = record.quarantine.as_ref()?;
            (now < *until).then(|| QuarantineView {
                node_id: node.clone(),
                name: record.name.clone(),
                reason: reason.clone(),
                seconds_left: (*until - now).as_secs_f64(),
                times: record.quarantines,
            })
        });
        views.collect()
    }

    /// The record of a node. Where there are too many, the oldest that says least makes room; `None` if all
    /// of them matter.
    fn record(&mut self, node: &str, now: Instant) -> Option<&mut Record> {
        if !self.nodes.contains_key(node) && self.nodes.len() >= NODES {
            let weighs = |record: &Record| record.quarantines > 0;
            let oldest = self.nodes.iter().filter(|(_, record)| !weighs(record));
            let oldest = oldest.min_by_key(|(_, record)| record.touched)?.0.clone();
            self.nodes.remove(&oldest);
        }
        let record = self.nodes.entry(node.to_owned()).or_default();
        record.touched = Some(now);
        Some(record)
    }
}

/// The first fault may be bad luck: then a fresh proof is enough.
fn pause_after(faults: u32) -> Duration {
    match faults.checked_sub(2) {
        None => Duration::ZERO,
        Some(doublings) => FIRST_PAUSE
            .saturating_mul(1 << doublings.min(16))
            .min(LONGEST_PAUSE),
    }
}

const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);
/// Faults older than this do not add up.
const FORGOTTEN: Duration = Duration::from_secs(1200);
const QUARANTINE: Duration = Duration::from_secs(60);
const LONGEST_QUARANTINE: Duration = Duration::from_secs(24 * 3600);
const MODELS_PER_NODE: usize = 64;
const NODES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn pauses_grow_with_every_fault_and_complete_answers_shorten_them() {
        let mut now = Instant::now();
        let mut reputation = Reputation::default();
        let mut pauses = Vec::new();
        for _ in 0..5 {
            pauses.push(reputation.at_fault("a", "m", now, now).unwrap().as_secs());
            now += SECOND;
        }
        assert_eq!(pauses, [0, 2, 4, 8, 16]);
        assert!(reputation.paused_until("a", "m", now).is_some());
        assert!(reputation.paused_until("a", "other", now).is_none());
        for _ in 0..4 {
            reputation.answered("a", "m");
        }
        assert_eq!(reputation.at_fault("a", "m", now, now), Some(2 * SECOND));
        for _ in 0..50 {
            now += SECOND;
            reputation.at_fault("a", "m", now, now);
        }
        now += SECOND;
        assert_eq!(reputation.at_fault("a", "m", now, now), Some(LONGEST_PAUSE));
        now += FORGOTTEN;
        assert_eq!(
            reputation.at_fault("a", "m", now, now),
            Some(Duration::ZERO),
            "old faults are forgotten"
        );
    }

    #[test]
    fn a_quarantine_follows_a_node_to_its_new_id() {
        let now = Instant::now();
        let mut reputation = Reputation::default();
        reputation.quarantine("a", "attic", "lies", now);
        reputation.renamed("a", "b");
        reputation.renamed("c", "d");
        assert!(reputation.quarantined("a", now).is_none());
        assert!(reputation.quarantined("b", now).is_some());
        assert!(reputation.quarantined("d", now).is_none());
    }

    #[test]
    fn requests_that_ran_together_are_one_fault() {
        let start = Instant::now();
        let mut reputation = Reputation::default();
        let failed = start + SECOND;
        let counted = (0..10).filter_map(|_| reputation.at_fault("a", "m", start, failed));
        assert_eq!(counted.count(), 1);
        let later = failed + SECOND;
        assert_eq!(
            reputation.at_fault("a", "m", later, later),
            Some(FIRST_PAUSE)
        );
    }

    #[test]
    fn a_quarantine_ends_and_the_next_one_is_longer() {
        let start = Instant::now();
        let mut reputation = Reputation::default();
        assert_eq!(reputation.quarantined("a", start), None);
        let first = reputation.quarantine("a", "attic", "it lies", start);
        let found = reputation.quarantined("a", start).unwrap();
        assert_eq!(found.reason, "it lies");
        assert_eq!(reputation.view(start)[0].name, "attic");
        assert_eq!(reputation.quarantined("a", start + first), None);
        let second = reputation.quarantine("a", "attic", "it lies", start + first);
        assert_eq!(second, 4 * first);
        for _ in 0..20 {
            reputation.quarantine("a", "attic", "it lies", start);
        }
        assert_eq!(
            reputation.quarantine("a", "attic", "it lies", start),
            LONGEST_QUARANTINE
        );
    }

    #[test]
    fn many_nodes_do_not_push_out_those_in_quarantine() {
        let start = Instant::now();
        let mut reputation = Reputation::default();
        reputation.quarantine("liar", "liar", "it lies", start);
        for number in 0..2 * NODES {
            reputation.proven(&format!("n{number}"), start + SECOND);
        }
        assert_eq!(reputation.nodes.len(), NODES);
        assert!(reputation.quarantined("liar", start).is_some());
    }
}
