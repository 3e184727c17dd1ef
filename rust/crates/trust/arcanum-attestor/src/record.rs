//! The head's record of a member's evidence, and how a new one changes it.

use serde::{Deserialize, Serialize};

use crate::evidence::{Change, Evidence, Field};
use crate::policy::{EvidencePolicy, OnChange, Reason};

/// The last accepted evidence of a member, and what changed. Times are seconds since the Unix epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EvidenceRecord {
    /// The last evidence that was accepted.
    pub evidence: Evidence,
    /// Time at which it came first.
    pub since: u64,
    /// The node has sent none lately.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub withheld: bool,
    /// Changes that were accepted, the oldest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<PastChange>,
    /// Changes that wait for approval.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held: Option<Held>,
}

/// A change that was accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastChange {
    /// Time at which the head heard of it.
    pub at: u64,
    /// The change.
    #[serde(flatten)]
    pub change: Change,
}

/// Evidence that waits for approval.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The evidence; `None` if the node sends none any more.
    pub evidence: Option<Evidence>,
    /// Time at which it came.
    pub since: u64,
    /// Its differences from the accepted one that need approval.
    pub changes: Vec<Change>,
}

/// The effect of evidence on a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Assessment {
    /// Nothing has changed, or nothing that counts.
    Same,
    /// The first evidence of this node.
    First,
    /// It is accepted, with these changes.
    Changed(Vec<Change>),
    /// The node waits for approval of these changes; true if it did before.
    Held(Vec<Change>, bool),
    /// The node is refused.
    Refused(Vec<Reason>),
    /// The node is expelled because of these changes.
    Expelled(Vec<Change>),
}

impl EvidenceRecord {
    /// Judges evidence of a member by the policy, and takes it into the record if it is accepted.
    pub fn assess(
        record: &mut Option<Box<Self>>,
        evidence: Option<Evidence>,
        policy: &EvidencePolicy,
        now: u64,
    ) -> Assessment {
        let unmet = policy.unmet(evidence.as_ref());
        if !unmet.is_empty() {
            return Assessment::Refused(unmet);
        }
        let Some(known) = record else {
            return Self::begin(record, evidence, now);
        };
        let changes = known.changes_to(evidence.as_ref());
        let watched = match &evidence {
            Some(evidence) => policy.watched_of(&changes, evidence),
            None => changes.clone(),
        };
        // Evidence that comes back is welcome.
        let returns = known.withheld && evidence.is_some();
        if watched.is_empty()
            || (returns && watched.iter().all(|change| change.field == Field::Evidence))
        {
            known.held = None;
            return known.take(evidence, changes, policy.on_change, now);
        }
        match policy.on_change {
            OnChange::Accept | OnChange::Record => {
                known.held = None;
                known.take(evidence, changes, policy.on_change, now)
            }
            OnChange::Approve => known.hold(evidence, watched, now),
            OnChange::Refuse => {
                Assessment::Refused(watched.into_iter().map(Reason::Changed).collect())
            }
            OnChange::Expel => Assessment::Expelled(watched),
        }
    }

    /// Takes the evidence of a node that joins with a token: the operator has admitted it as it is.
    pub fn joined(record: &mut Option<Box<Self>>, evidence: Option<Evidence>, now: u64) {
        match record {
            None => {
                Self::begin(record, evidence, now);
            }
            Some(known) => {
                known.held = None;
                let changes = known.changes_to(evidence.as_ref());
                known.take(evidence, changes, OnChange::Record, now);
            }
        }
    }

    fn begin(record: &mut Option<Box<Self>>, evidence: Option<Evidence>, now: u64) -> Assessment {
        let Some(evidence) = evidence else {
            return Assessment::Same;
        };
        *record = Some(Box::new(Self {
            evidence,
            since: now,
            ..Self::default()
        }));
        Assessment::First
    }

    fn changes_to(&self, later: Option<&Evidence>) -> Vec<Change> {
        let sent = |sent: bool| if sent { "sent" } else { "withheld" }.to_owned();
        let mut changes = Vec::new();
        if self.withheld == later.is_some() {
            changes.push(Change {
                field: Field::Evidence,
                before: sent(!self.withheld),
                after: sent(later.is_some()),
            });
        }
        changes.extend(
            later
                .map(|later| self.evidence.changes_to(later))
                .unwrap_or_default(),
        );
        changes
    }

    fn take(
        &mut self,
        evidence: Option<Evidence>,
        changes: Vec<Change>,
        rule: OnChange,
        now: u64,
    ) -> Assessment {
        self.withheld = evidence.is_none();
        if let Some(evidence) = evidence {
            self.evidence = evidence;
        }
        if changes.is_empty() {
            return Assessment::Same;
        }
        self.since = now;
        if rule == OnChange::Accept {
            return Assessment::Same;
        }
        let past = changes.iter().cloned();
        self.history
            .extend(past.map(|change| PastChange { at: now, change }));
        let surplus = self.history.len().saturating_sub(MOST_CHANGES);
        self.history.drain(..surplus);
        Assessment::Changed(changes)
    }

    fn hold(&mut self, evidence: Option<Evidence>, changes: Vec<Change>, now: u64) -> Assessment {
        let waits = self
            .held
            .as_ref()
            .is_some_and(|held| held.changes == changes);
        let since = self.held.as_ref().filter(|_| waits);
        self.held = Some(Held {
            since: since.map_or(now, |held| held.since),
            evidence,
            changes: changes.clone(),
        });
        Assessment::Held(changes, waits)
    }

    /// Accepts what waits for approval. False if nothing does.
    pub fn approve(&mut self) -> bool {
        let Some(held) = self.held.take() else {
            return false;
        };
        let changes = self.changes_to(held.evidence.as_ref());
        self.take(held.evidence, changes, OnChange::Record, held.since);
        true
    }
}

/// Changes of a member that are remembered.
const MOST_CHANGES: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evidence::tests::{read, said};

    fn with(rule: OnChange) -> EvidencePolicy {
        EvidencePolicy {
            on_change: rule,
            watched: vec![Field::Os, Field::Hardware],
            ..EvidencePolicy::default()
        }
    }

    fn debian(version: &str, kernel: &str) -> Evidence {
        let mut said = said();
        said.os_version = version.into();
        said.kernel = kernel.into();
        read(&said).unwrap()
    }

    type Record = Option<Box<EvidenceRecord>>;

    fn assess(record: &mut Record, evidence: Evidence, rule: OnChange, now: u64) -> Assessment {
        EvidenceRecord::assess(record, Some(evidence), &with(rule), now)
    }

    #[test]
    fn each_rule_has_its_effect_on_a_watched_change_and_none_on_others() {
        for rule in [
            OnChange::Accept,
            OnChange::Record,
            OnChange::Approve,
            OnChange::Refuse,
            OnChange::Expel,
        ] {
            let mut record = None;
            let first = assess(&mut record, debian("12", "6.1"), rule, 1);
            assert_eq!(first, Assessment::First);
            assert_eq!(
                assess(&mut record, debian("12", "6.1"), rule, 2),
                Assessment::Same
            );
            let kernel = assess(&mut record, debian("12", "6.2"), rule, 3);
            let history = record.as_ref().unwrap().history.len();
            match rule {
                OnChange::Accept => assert_eq!((kernel, history), (Assessment::Same, 0)),
                _ => assert!(
                    matches!(kernel, Assessment::Changed(_)) && history == 1,
                    "{rule:?}"
                ),
            }
            let before = record.clone();
            let os = assess(&mut record, debian("13", "6.2"), rule, 4);
            let accepted = record.as_ref().unwrap().evidence.os_version == "13";
            match rule {
                OnChange::Accept => assert!(os == Assessment::Same && accepted),
                OnChange::Record => assert!(matches!(os, Assessment::Changed(_)) && accepted),
                OnChange::Approve => assert!(matches!(os, Assessment::Held(_, false)) && !accepted),
                OnChange::Refuse => {
                    let Assessment::Refused(reasons) = os else {
                        panic!("{os:?}")
                    };
                    let text = reasons[0].to_string();
                    for part in ["os: ", "\"debian 12\"", "\"debian 13\"", "undo"] {
                        assert!(text.contains(part), "{text}");
                    }
                    assert_eq!(record, before);
                }
                OnChange::Expel => assert!(matches!(os, Assessment::Expelled(_)) && !accepted),
            }
        }
    }

    #[test]
    fn an_approval_is_for_the_change_that_was_shown_and_reverting_it_needs_none() {
        let (rule, mut record) = (OnChange::Approve, None);
        assess(&mut record, debian("12", "6.1"), rule, 1);
        assert!(matches!(
            assess(&mut record, debian("13", "6.1"), rule, 2),
            Assessment::Held(_, false)
        ));
        assert!(matches!(
            assess(&mut record, debian("13", "6.1"), rule, 3),
            Assessment::Held(_, true)
        ));
        assert_eq!(record.as_ref().unwrap().held.as_ref().unwrap().since, 2);
        let reverted = assess(&mut record, debian("12", "6.1"), rule, 4);
        assert_eq!(reverted, Assessment::Same);
        assert!(!record.as_mut().unwrap().approve(), "nothing waits");
        assess(&mut record, debian("13", "6.1"), rule, 5);
        assert!(record.as_mut().unwrap().approve());
        let other = assess(&mut record, debian("14", "6.1"), rule, 6);
        assert!(matches!(other, Assessment::Held(_, false)), "{other:?}");
        let approved = assess(&mut record, debian("13", "6.1"), rule, 7);
        assert_eq!(approved, Assessment::Same);
        assert_eq!(record.unwrap().history[0].at, 5);
    }

    #[test]
    fn a_node_that_withholds_its_evidence_has_changed() {
        for (rule, held) in [(OnChange::Record, false), (OnChange::Approve, true)] {
            let mut record = None;
            assess(&mut record, debian("12", "6.1"), rule, 1);
            let assessed = EvidenceRecord::assess(&mut record, None, &with(rule), 2);
            match held {
                true => assert!(matches!(assessed, Assessment::Held(_, false))),
                false => assert!(matches!(assessed, Assessment::Changed(_))),
            }
            let again = EvidenceRecord::assess(&mut record, None, &with(rule), 3);
            match held {
                true => assert!(matches!(again, Assessment::Held(_, true))),
                false => assert_eq!(again, Assessment::Same),
            }
            let back = assess(&mut record, debian("12", "6.1"), rule, 4);
            assert!(!matches!(back, Assessment::Held(..)), "{back:?}");
        }
        // A node of an earlier version never had any.
        let mut record = None;
        let old = EvidenceRecord::assess(&mut record, None, &with(OnChange::Expel), 1);
        assert_eq!((old, record), (Assessment::Same, None));
    }

    #[test]
    fn the_history_is_bounded_and_a_record_survives_its_file() {
        let mut record = None;
        for number in 0..40u64 {
            let kernel = format!("6.{number}");
            assess(&mut record, debian("12", &kernel), OnChange::Record, number);
        }
        let record = record.unwrap();
        assert_eq!(record.history.len(), MOST_CHANGES);
        assert_eq!(record.history[MOST_CHANGES - 1].change.after, "6.39");
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(
            serde_json::from_str::<EvidenceRecord>(&text).unwrap(),
            *record
        );
    }

    #[test]
    fn a_node_that_joins_with_a_token_is_admitted_as_it_is() {
        let mut record = None;
        EvidenceRecord::joined(&mut record, Some(debian("12", "6.1")), 1);
        assess(&mut record, debian("13", "6.1"), OnChange::Approve, 2);
        EvidenceRecord::joined(&mut record, Some(debian("13", "6.1")), 3);
        let same = assess(&mut record, debian("13", "6.1"), OnChange::Approve, 4);
        assert_eq!(same, Assessment::Same);
        assert_eq!(record.unwrap().history.len(), 1);
    }
}
