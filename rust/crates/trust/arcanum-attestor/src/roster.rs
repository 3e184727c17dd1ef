//! The nodes that have joined a mesh or ask to: names in use, nodes that wait for approval, and nodes that can be expelled
//! while they are not connected.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use mesh_base::clock::unix_seconds;
use mesh_net::trust::{Expulsion, LONGEST_NAME, Member};
use serde::{Deserialize, Serialize};

use crate::evidence::Evidence;
use crate::policy::EvidencePolicy;
use crate::record::{Assessment, EvidenceRecord};
use crate::tokens::TokenRecord;

/// The members of a mesh by node id, and the nodes that wait for approval. Expelled members stay here, so that they are
/// known when they are readmitted. Times come in as arguments; the caller keeps it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roster {
    members: BTreeMap<String, KnownMember>,
    #[serde(default)]
    pending: BTreeMap<String, Pending>,
    /// There is a list of expelled nodes: if its file is gone, it was lost.
    #[serde(default)]
    has_deny_list: bool,
}

/// The head's record of a member. Times are seconds since the Unix epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownMember {
    /// The name in its certificate.
    pub name: String,
    /// Time at which it joined or was first seen.
    pub since: u64,
    /// The end of its certificate.
    pub until: u64,
    /// The key of its certificate ([`Member::key_id`]).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub key_id: String,
    /// Signature algorithm of its identity; empty for a node of an earlier version, which has none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub algorithm: String,
    /// Id of the token that it joined with, if that is known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub token: String,
    /// Ids that the node had before, the oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former: Vec<String>,
    /// Its last evidence, and what changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<Box<EvidenceRecord>>,
}

/// A node that has shown a valid token and waits for approval. Times are seconds since the Unix epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// The name that it asks for.
    pub name: String,
    /// Id of its token.
    pub token: String,
    /// Time of its first request.
    pub since: u64,
    /// An operator has approved it; it becomes a member when it asks again.
    pub approved: bool,
    /// Its evidence, which the approval is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<Box<Evidence>>,
}

impl Roster {
    /// A roster that begins with those who used a token that is remembered; others are noted when they connect. `life` is
    /// that of certificates.
    pub fn of_tokens(used: &[TokenRecord], life: Duration) -> Self {
        let uses = used.iter().flat_map(|token| &token.uses);
        // Their certificates have been renewed since or have ended; this is the minimum.
        let members = uses.map(|used| {
            let member = KnownMember {
                name: used.node_name.clone(),
                since: used.at,
                until: used.at.saturating_add(life.as_secs()),
                ..KnownMember::default()
            };
            (used.node_id.clone(), member)
        });
        Self {
            members: members.collect(),
            ..Self::default()
        }
    }

    /// True if a list of expelled nodes was written once.
    pub fn has_deny_list(&self) -> bool {
        self.has_deny_list
    }

    /// The name that a joining node gets: the one that it asks for, with a number if another node has that. Names of nodes
    /// that are expelled are free.
    pub fn assign(
        &self,
        node_id: &str,
        wanted: &str,
        is_expelled: impl Fn(&str) -> bool,
    ) -> String {
        let is_taken = |name: &str| self.other_of(name, node_id, &is_expelled).is_some();
        if !is_taken(wanted) {
            return wanted.to_owned();
        }
        // Taken names are valid ones, so they are ASCII.
        let numbered = (2..).map(|number| {
            let suffix = format!("-{number}");
            let base = wanted.get(..LONGEST_NAME - suffix.len()).unwrap_or(wanted);
            format!("{base}{suffix}")
        });
        let mut free = numbered.filter(|name| !is_taken(name));
        free.next().expect("a number is free")
    }

    /// Another node than this that has this name, and is not expelled.
    pub fn other_of(
        &self,
        name: &str,
        node_id: &str,
        is_expelled: impl Fn(&str) -> bool,
    ) -> Option<&String> {
        let mut members = self.members.iter();
        let other = members.find(|(id, member)| {
            *id != node_id && member.name.eq_ignore_ascii_case(name) && !is_expelled(id)
        });
        other.map(|(id, _)| id)
    }

    /// Records that this node is a member with this certificate. Returns false if that was known.
    pub fn note(&mut self, member: &Member, now: SystemTime) -> bool {
        let until = unix_seconds(member.not_after);
        let known = self.members.get(&member.node_id).cloned();
        let entry = KnownMember {
            name: member.name.clone(),
            until,
            key_id: member.key_id.clone(),
            algorithm: match member.has_identity() {
                true => mesh_identity::ALGORITHM_NAME.to_owned(),
                false => String::new(),
            },
            ..known.clone().unwrap_or_else(|| KnownMember {
                since: unix_seconds(now),
                ..KnownMember::default()
            })
        };
        if known.is_some_and(|known| known == entry) {
            return false;
        }
        self.insert(member.node_id.clone(), entry);
        true
    }

    /// The member joined with this token.
    pub fn note_token(&mut self, node_id: &str, token: &str) {
        if let Some(member) = self.members.get_mut(node_id) {
            token.clone_into(&mut member.token);
        }
    }

    /// The member joined with a token, with this evidence.
    pub fn note_evidence(&mut self, node_id: &str, evidence: Option<Evidence>, now: u64) {
        if let Some(member) = self.members.get_mut(node_id) {
            EvidenceRecord::joined(&mut member.evidence, evidence, now);
        }
    }

    /// Judges evidence of a member, and keeps it if it is accepted.
    pub fn assess(
        &mut self,
        node_id: &str,
        evidence: Option<Evidence>,
        policy: &EvidencePolicy,
        now: u64,
    ) -> Assessment {
        let mut unknown = None;
        let member = self.members.get_mut(node_id);
        let record = member.map_or(&mut unknown, |member| &mut member.evidence);
        EvidenceRecord::assess(record, evidence, policy, now)
    }

    /// Accepts the change of a member's evidence that waits for approval. Returns its name; `None` if nothing waits.
    pub fn approve_change(&mut self, node_id: &str) -> Option<String> {
        let member = self.members.get_mut(node_id)?;
        let record = member.evidence.as_mut()?;
        record.approve().then(|| member.name.clone())
    }

    /// A member has another id from now on: it got an identity, or rotated its key.
    pub fn renamed(&mut self, old: &str, new: &str) {
        if old == new {
            return;
        }
        if let Some(mut member) = self.members.remove(old) {
            member.former.push(old.to_owned());
            if member.former.len() > MOST_FORMER {
                member.former.remove(0);
            }
            self.members.insert(new.to_owned(), member);
        }
    }

    fn insert(&mut self, node_id: String, entry: KnownMember) {
        let members = &mut self.members;
        members.insert(node_id, entry);
        while members.len() > MOST_MEMBERS {
            let oldest = members.iter().min_by_key(|(_, known)| known.until);
            let oldest = oldest.expect("there are some").0.clone();
            members.remove(&oldest);
        }
    }

    /// A node waits for approval.
    ///
    /// # Errors
    /// If too many do; the text is for the node.
    pub fn wait(&mut self, node_id: &str, pending: Pending) -> Result<(), String> {
        if self.pending.len() >= MOST_PENDING && !self.pending.contains_key(node_id) {
            return Err(format!(
                "{MOST_PENDING} nodes wait for approval, and no more can: `hydramesh nodes list` shows them"
            ));
        }
        self.pending.insert(node_id.to_owned(), pending);
        Ok(())
    }

    /// Approves a node that waits. Returns its entry; `None` if it does not wait.
    pub fn approve(&mut self, node_id: &str) -> Option<&Pending> {
        let pending = self.pending.get_mut(node_id)?;
        pending.approved = true;
        Some(pending)
    }

    /// The node does not wait any more.
    pub fn stop_waiting(&mut self, node_id: &str) -> Option<Pending> {
        self.pending.remove(node_id)
    }

    /// The nodes that wait for approval, by node id.
    pub fn pending(&self) -> &BTreeMap<String, Pending> {
        &self.pending
    }

    /// A node is on the list of expelled nodes: from now on that list is missed when it is gone.
    pub fn expelled(&mut self, node_id: &str) {
        self.has_deny_list = true;
        self.pending.remove(node_id);
    }

    /// A node is on the list no more, and has its name again. `life` is that of certificates.
    pub fn readmitted(&mut self, node_id: &str, expulsion: &Expulsion, life: Duration) {
        // Earlier versions forgot who was expelled.
        if !self.members.contains_key(node_id) && !expulsion.name.is_empty() {
            let entry = KnownMember {
                name: expulsion.name.clone(),
                since: expulsion.since,
                until: expulsion.since.saturating_add(life.as_secs()),
                ..KnownMember::default()
            };
            self.insert(node_id.to_owned(), entry);
        }
    }

    /// All members by node id, those that are expelled among them.
    pub fn members(&self) -> &BTreeMap<String, KnownMember> {
        &self.members
    }
}

/// Members that are remembered. Beyond, those whose certificates ended first are forgotten.
const MOST_MEMBERS: usize = 4096;
/// Nodes that may wait for approval; each has used a token.
const MOST_PENDING: usize = 1024;
/// Former ids of a member that are remembered.
const MOST_FORMER: usize = 8;

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use mesh_net::trust::Role;

    use super::*;

    fn member(node_id: &str, name: &str, until: u64) -> Member {
        Member {
            node_id: node_id.to_owned(),
            key_id: format!("key of {node_id}"),
            name: name.to_owned(),
            role: Role::Worker,
            mesh: "test".to_owned(),
            not_before: UNIX_EPOCH,
            not_after: UNIX_EPOCH + Duration::from_secs(until),
        }
    }

    fn nobody(_: &str) -> bool {
        false
    }

    #[test]
    fn no_two_nodes_get_one_name() {
        let mut roster = Roster::default();
        let now = UNIX_EPOCH + Duration::from_secs(5);
        assert!(roster.note(&member("aa", "attic", 9), now));
        assert!(!roster.note(&member("aa", "attic", 9), now + Duration::from_secs(1)));
        assert_eq!(roster.assign("aa", "attic", nobody), "attic", "its own");
        assert_eq!(roster.assign("bb", "Attic", nobody), "Attic-2");
        roster.note(&member("bb", "attic-2", 9), now);
        assert_eq!(roster.assign("cc", "attic", nobody), "attic-3");
        let long = "x".repeat(LONGEST_NAME);
        roster.note(&member("dd", &long, 9), now);
        let numbered = roster.assign("ee", &long, nobody);
        assert_eq!(numbered.len(), LONGEST_NAME);
        assert!(numbered.ends_with("x-2"), "{numbered}");
        assert_eq!(roster.assign("cc", "attic", |id| id == "aa"), "attic");
        assert_eq!(roster.members()["bb"].since, 5);
    }

    #[test]
    fn a_member_keeps_its_name_and_history_under_another_id() {
        let mut roster = Roster::default();
        roster.note(&member("aa", "attic", 9), UNIX_EPOCH);
        roster.renamed("aa", "bb");
        roster.note(
            &member("bb", "attic", 20),
            UNIX_EPOCH + Duration::from_secs(7),
        );
        assert_eq!(roster.members().len(), 1);
        let known = &roster.members()["bb"];
        assert_eq!((known.since, known.until), (0, 20));
        assert_eq!(known.former, ["aa"]);
        assert_eq!(known.algorithm, "ml-dsa-65");
        for number in 0..20 {
            let (old, new) = (number, number + 1);
            let id = |n: i32| {
                if n == 0 {
                    "bb".to_owned()
                } else {
                    format!("id {n}")
                }
            };
            roster.renamed(&id(old), &id(new));
        }
        assert_eq!(roster.members()["id 20"].former.len(), MOST_FORMER);
    }

    #[test]
    fn the_roster_is_bounded_and_forgets_who_left_first() {
        let mut roster = Roster::default();
        for number in 0..MOST_MEMBERS as u64 {
            let known = KnownMember {
                name: format!("n{number}"),
                until: 10 + number,
                ..KnownMember::default()
            };
            roster.members.insert(format!("{number:064x}"), known);
        }
        roster.note(&member("aa", "attic", 99_999), UNIX_EPOCH);
        assert_eq!(roster.members().len(), MOST_MEMBERS);
        assert!(roster.members().contains_key("aa"));
        assert_eq!(
            roster.assign("bb", "n0", nobody),
            "n0",
            "the oldest is forgotten"
        );
        assert_eq!(roster.assign("bb", "n1", nobody), "n1-2");
        for number in 0..MOST_PENDING {
            let pending = Pending {
                name: "n".to_owned(),
                token: "t".to_owned(),
                since: 0,
                approved: false,
                evidence: None,
            };
            roster.wait(&number.to_string(), pending.clone()).unwrap();
            roster.wait(&number.to_string(), pending).unwrap();
        }
        let one_more = roster.pending()["0"].clone();
        assert!(
            roster
                .wait("more", one_more)
                .unwrap_err()
                .contains("nodes list")
        );
    }

    #[test]
    fn files_of_earlier_versions_are_read() {
        let text = r#"{"members": {"aa": {"name": "attic", "since": 1, "until": 2}}}"#;
        let roster: Roster = serde_json::from_str(text).unwrap();
        assert_eq!(roster.members()["aa"].name, "attic");
        assert!(!roster.has_deny_list() && roster.pending().is_empty());
    }
}
