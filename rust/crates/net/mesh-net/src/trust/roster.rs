//! The nodes that have joined a mesh: names in use, and nodes that can be expelled while they are not
//! connected.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use mesh_base::clock::unix_seconds;
use serde::{Deserialize, Serialize};

use super::certificate::{LONGEST_NAME, Member};
use super::deny::{DenyList, Expulsion};
use super::error::TrustError;
use super::names;
use super::store::TokenRecord;
use crate::files;

/// The members of a mesh by node id, persisted in `members.json`. Expelled ones stay here, so that they are known when they are
/// readmitted.
#[derive(Debug)]
pub(super) struct Roster {
    path: PathBuf,
    kept: MembersFile,
}

/// The head's record of a member. Times are seconds since the Unix epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownMember {
    /// The name in its certificate.
    pub name: String,
    /// Time at which it joined or was first seen.
    pub since: u64,
    /// The end of its certificate.
    pub until: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct MembersFile {
    members: BTreeMap<String, KnownMember>,
    /// There is a list of expelled nodes: if its file is gone, it was lost.
    #[serde(default)]
    has_deny_list: bool,
}

impl Roster {
    /// Reads the roster in a state directory. Without a file it begins with those who used a token that is remembered; others
    /// are noted when they connect.
    pub(super) fn open(
        dir: &Path,
        used: &[TokenRecord],
        life: Duration,
    ) -> Result<Self, TrustError> {
        let path = dir.join(names::MEMBERS);
        let kept = files::read_json(&path)?.unwrap_or_else(|| MembersFile {
            members: joined_with(used, life),
            has_deny_list: false,
        });
        let deny_list = dir.join(names::EXPELLED);
        if kept.has_deny_list && !deny_list.exists() {
            return Err(TrustError::missing(&deny_list, &path));
        }
        Ok(Self { path, kept })
    }

    /// The name that a joining node gets: the one that it asks for, with a number if another node has that. Names of nodes
    /// that are expelled are free.
    pub(super) fn assign(&self, node_id: &str, wanted: &str, expelled: &DenyList) -> String {
        let is_taken = |name: &str| self.other_of(name, node_id, expelled).is_some();
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
    pub(super) fn other_of(
        &self,
        name: &str,
        node_id: &str,
        expelled: &DenyList,
    ) -> Option<&String> {
        let mut members = self.members().iter();
        let other = members.find(|(id, member)| {
            *id != node_id && member.name.eq_ignore_ascii_case(name) && !expelled.contains(id)
        });
        other.map(|(id, _)| id)
    }

    /// Records that this node is a member with this certificate. If the roster cannot be written, a warning
    /// is logged: the mesh works without it.
    pub(super) fn note(&mut self, member: &Member, now: SystemTime) {
        let until = unix_seconds(member.not_after);
        let known = self.members().get(&member.node_id);
        if known.is_some_and(|known| known.name == member.name && known.until == until) {
            return;
        }
        let since = known.map_or_else(|| unix_seconds(now), |known| known.since);
        let entry = KnownMember {
            name: member.name.clone(),
            since,
            until,
        };
        self.insert(member.node_id.clone(), entry);
    }

    fn insert(&mut self, node_id: String, entry: KnownMember) {
        let members = &mut self.kept.members;
        members.insert(node_id, entry);
        while members.len() > MOST_MEMBERS {
            let oldest = members.iter().min_by_key(|(_, known)| known.until);
            let oldest = oldest.expect("there are some").0.clone();
            members.remove(&oldest);
        }
        self.save();
    }

    /// A node is on the list of expelled nodes: from now on that list is missed when it is gone.
    pub(super) fn expelled(&mut self) {
        if !self.kept.has_deny_list {
            self.kept.has_deny_list = true;
            self.save();
        }
    }

    /// A node is on the list no more, and has its name again. `life` is that of certificates.
    pub(super) fn readmitted(&mut self, node_id: &str, expulsion: &Expulsion, life: Duration) {
        // Earlier versions forgot who was expelled.
        if !self.members().contains_key(node_id) && !expulsion.name.is_empty() {
            let entry = KnownMember {
                name: expulsion.name.clone(),
                since: expulsion.since,
                until: expulsion.since.saturating_add(life.as_secs()),
            };
            self.insert(node_id.to_owned(), entry);
        }
    }

    /// All members by node id, those that are expelled among them.
    pub(super) fn members(&self) -> &BTreeMap<String, KnownMember> {
        &self.kept.members
    }

    fn save(&self) {
        if let Err(error) = files::write_json(&self.path, &self.kept) {
            tracing::warn!(%error, "the members of the mesh are not written down");
        }
    }
}

/// Members that joined with these tokens. Their certificates have been renewed since or have ended; `life` is
/// the minimum.
fn joined_with(tokens: &[TokenRecord], life: Duration) -> BTreeMap<String, KnownMember> {
    let used = tokens.iter().filter_map(|token| token.used.as_ref());
    let members = used.map(|used| {
        let member = KnownMember {
            name: used.node_name.clone(),
            since: used.at,
            until: used.at.saturating_add(life.as_secs()),
        };
        (used.node_id.clone(), member)
    });
    members.collect()
}

/// Members that are remembered. Beyond, those whose certificates ended first are forgotten.
const MOST_MEMBERS: usize = 4096;

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::trust::Role;

    const LIFE: Duration = Duration::from_secs(30);

    fn member(node_id: &str, name: &str, until: u64) -> Member {
        Member {
            node_id: node_id.to_owned(),
            name: name.to_owned(),
            role: Role::Worker,
            mesh: "test".to_owned(),
            not_before: UNIX_EPOCH,
            not_after: UNIX_EPOCH + Duration::from_secs(until),
        }
    }

    #[test]
    fn no_two_nodes_get_one_name() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut roster = Roster::open(dir.path(), &[], LIFE).expect("empty");
        let deny_list = DenyList::open(dir.path()).expect("empty");
        let now = UNIX_EPOCH + Duration::from_secs(5);
        roster.note(&member("aa", "attic", 9), now);
        assert_eq!(roster.assign("aa", "attic", &deny_list), "attic", "its own");
        assert_eq!(roster.assign("bb", "Attic", &deny_list), "Attic-2");
        roster.note(&member("bb", "attic-2", 9), now);
        assert_eq!(roster.assign("cc", "attic", &deny_list), "attic-3");
        let long = "x".repeat(LONGEST_NAME);
        roster.note(&member("dd", &long, 9), now);
        let numbered = roster.assign("ee", &long, &deny_list);
        assert_eq!(numbered.len(), LONGEST_NAME);
        assert!(numbered.ends_with("x-2"), "{numbered}");
        let mut roster = Roster::open(dir.path(), &[], LIFE).expect("read again");
        assert_eq!(roster.assign("cc", "attic", &deny_list), "attic-3");
        deny_list.expel("aa", "attic", "", now).expect("kept");
        roster.expelled();
        assert_eq!(roster.assign("cc", "attic", &deny_list), "attic");
        assert_eq!(roster.members()["bb"].since, 5);
        // From now on the list of expelled nodes is missed when it is gone.
        std::fs::remove_file(dir.path().join(names::EXPELLED)).expect("removed");
        let error = Roster::open(dir.path(), &[], LIFE)
            .expect_err("lost")
            .to_string();
        assert!(error.contains("expelled.json is missing"), "{error}");
    }

    #[test]
    fn the_roster_is_bounded_and_forgets_who_left_first() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut roster = Roster::open(dir.path(), &[], LIFE).expect("empty");
        let deny_list = DenyList::open(dir.path()).expect("empty");
        for number in 0..MOST_MEMBERS as u64 {
            let known = KnownMember {
                name: format!("n{number}"),
                since: 0,
                until: 10 + number,
            };
            roster.kept.members.insert(format!("{number:064x}"), known);
        }
        roster.note(&member("aa", "attic", 99_999), UNIX_EPOCH);
        assert_eq!(roster.members().len(), MOST_MEMBERS);
        assert!(roster.members().contains_key("aa"));
        assert_eq!(
            roster.assign("bb", "n0", &deny_list),
            "n0",
            "the oldest is forgotten"
        );
        assert_eq!(roster.assign("bb", "n1", &deny_list), "n1-2");
    }
}
