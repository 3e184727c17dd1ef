//! Nodes that an operator has expelled: the head's list, and its copies at the workers.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::SystemTime;

use mesh_base::clock::{self, unix_seconds};
use mesh_base::sync::lock;
use serde::{Deserialize, Serialize};

use super::certificate::Member;
use super::error::TrustError;
use super::names;
use super::refusal::Refusal;
use crate::files;

/// The expelled nodes, persisted in `expelled.json`. Clones share them. A node on the list gets no link, and loses those that
/// it has.
#[derive(Clone)]
pub struct DenyList(Arc<Inner>);

struct Inner {
    path: PathBuf,
    nodes: Mutex<BTreeMap<String, Expulsion>>,
    version: AtomicU64,
    /// Held while the file is written.
    saving: Mutex<()>,
    /// Links that end when their peer is expelled.
    links: Mutex<Vec<Weak<dyn Expellable>>>,
}

/// A link, which ends when its peer is expelled.
pub(crate) trait Expellable: Send + Sync {
    fn peer(&self) -> &Member;
    fn is_open(&self) -> bool;
    /// Ends the link; the peer gets the refusal.
    fn expel(&self, refusal: &Refusal);
}

/// Name of an expelled node, with time and reason.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expulsion {
    /// Name of the node.
    #[serde(default)]
    pub name: String,
    /// Reason given by the operator; not sent to workers.
    #[serde(default)]
    pub reason: String,
    /// Seconds since the Unix epoch.
    pub since: u64,
    /// The key of its certificate ([`Member::key_id`]), if that is known: peers of earlier versions know the node by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,
    /// The identity that the node has instead, if it rotated its key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaced_by: Option<String>,
}

#[derive(Default, Serialize, Deserialize)]
struct ExpelledFile {
    expelled: BTreeMap<String, Expulsion>,
}

impl DenyList {
    /// Reads the list in a state directory; without a file the list is empty.
    ///
    /// # Errors
    /// If the file cannot be read. It is not replaced: that would readmit all expelled nodes.
    pub fn open(dir: &Path) -> Result<Self, TrustError> {
        let path = dir.join(names::EXPELLED);
        let kept: Option<ExpelledFile> = files::read_json(&path)?;
        Ok(Self(Arc::new(Inner {
            path,
            nodes: Mutex::new(kept.unwrap_or_default().expelled),
            version: AtomicU64::new(0),
            saving: Mutex::default(),
            links: Mutex::default(),
        })))
    }

    /// Expels a node: its links end now, and it gets no more. One that is on the list already stays there with the earlier
    /// reason. Blocks on the disk.
    ///
    /// # Errors
    /// If the list is full; or if it cannot be written, when the node is expelled until this process ends.
    pub fn expel(
        &self,
        node_id: &str,
        name: &str,
        reason: &str,
        now: SystemTime,
    ) -> Result<(), TrustError> {
        let expulsion = Expulsion {
            name: name.to_owned(),
            reason: reason.to_owned(),
            since: unix_seconds(now),
            ..Expulsion::default()
        };
        self.add(node_id, expulsion)
    }

    /// As [`expel`](Self::expel), with all that is to be remembered.
    ///
    /// # Errors
    /// As there.
    pub fn add(&self, node_id: &str, expulsion: Expulsion) -> Result<(), TrustError> {
        let mut nodes = lock(&self.0.nodes);
        if nodes.len() >= MOST_EXPELLED && !nodes.contains_key(node_id) {
            return Err(TrustError::ListFull {
                path: self.0.path.clone(),
                most: MOST_EXPELLED,
            });
        }
        nodes.entry(node_id.to_owned()).or_insert(expulsion);
        drop(nodes);
        self.end_links();
        self.save()
    }

    /// Removes a node from the list and returns its entry; `None` if it was not listed. Blocks on the disk.
    ///
    /// # Errors
    /// If the list cannot be written: then the node stays expelled.
    pub fn readmit(&self, node_id: &str) -> Result<Option<Expulsion>, TrustError> {
        let Some(expulsion) = lock(&self.0.nodes).remove(node_id) else {
            return Ok(None);
        };
        if let Err(error) = self.save() {
            lock(&self.0.nodes).insert(node_id.to_owned(), expulsion);
            return Err(error);
        }
        self.0.version.fetch_add(1, Ordering::Relaxed);
        Ok(Some(expulsion))
    }

    /// Takes over the head's list. Links of nodes that are on it end. [`save`](Self::save) keeps it. True if it is another
    /// one than before.
    pub fn replace(&self, nodes: impl IntoIterator<Item = (String, Expulsion)>) -> bool {
        let fresh = nodes.into_iter().take(MOST_EXPELLED).collect();
        let mut nodes = lock(&self.0.nodes);
        if *nodes == fresh {
            return false;
        }
        *nodes = fresh;
        drop(nodes);
        self.end_links();
        true
    }

    /// Writes the list to its file. Blocks on the disk.
    ///
    /// # Errors
    /// If it cannot be written; the file before is still there then.
    pub fn save(&self) -> Result<(), TrustError> {
        // The later list must not be overtaken by the earlier one.
        let _alone = lock(&self.0.saving);
        let kept = ExpelledFile {
            expelled: lock(&self.0.nodes).clone(),
        };
        files::write_json(&self.0.path, &kept)
    }

    /// The refusal to send to this member, by its identity and by the key of its certificate; `None` if it is not expelled.
    pub fn refusal_of(&self, member: &Member) -> Option<Refusal> {
        self.refusal_of_any(&member.node_id, &member.key_id)
    }

    /// As [`refusal_of`](Self::refusal_of), for a node that has no certificate yet.
    pub fn refusal_of_any(&self, node_id: &str, key_id: &str) -> Option<Refusal> {
        let by_id = self.refusal(node_id).or_else(|| self.refusal(key_id));
        by_id.or_else(|| {
            let nodes = lock(&self.0.nodes);
            let mut keyed = nodes.iter();
            let (id, _) = keyed.find(|(_, node)| node.key_id.as_deref() == Some(key_id))?;
            let id = id.clone();
            drop(nodes);
            self.refusal(&id)
        })
    }

    /// The refusal to send to this node; `None` if it is not expelled.
    pub fn refusal(&self, node_id: &str) -> Option<Refusal> {
        let nodes = lock(&self.0.nodes);
        let expulsion = nodes.get(node_id)?;
        if let Some(successor) = &expulsion.replaced_by {
            return Some(Refusal::Expelled(format!(
                "the identity {node_id} of `{}` was rotated on {}, and the node is {successor} since; if you did not do that, expel it (`hydramesh nodes expel {}`)",
                expulsion.name,
                clock::utc_of(expulsion.since),
                expulsion.name
            )));
        }
        let reason = match expulsion.reason.as_str() {
            "" => String::new(),
            reason => format!(" ({reason})"),
        };
        let name = match expulsion.name.as_str() {
            "" => node_id,
            name => name,
        };
        Some(Refusal::Expelled(format!(
            "`{name}` was expelled from this mesh on {}{reason}; `hydramesh nodes readmit {name}` at the head lets it in again",
            clock::utc_of(expulsion.since)
        )))
    }

    /// The identity that has taken the place of this one, if it was rotated.
    pub fn replaced_by(&self, node_id: &str) -> Option<String> {
        lock(&self.0.nodes).get(node_id)?.replaced_by.clone()
    }

    /// Forgets identities that were rotated before `before`, seconds since the Unix epoch: their certificates have ended.
    /// The next change writes the list.
    pub fn forget_replaced(&self, before: u64) {
        let mut nodes = lock(&self.0.nodes);
        nodes.retain(|_, entry| entry.replaced_by.is_none() || entry.since >= before);
    }

    /// Number of changes of the list in this process.
    pub fn version(&self) -> u64 {
        self.0.version.load(Ordering::Relaxed)
    }

    /// True if this node is expelled.
    pub fn contains(&self, node_id: &str) -> bool {
        lock(&self.0.nodes).contains_key(node_id)
    }

    /// The list, by node id.
    pub fn list(&self) -> BTreeMap<String, Expulsion> {
        lock(&self.0.nodes).clone()
    }

    /// Has this link end as soon as its peer is expelled.
    pub(crate) fn guard(&self, link: &Arc<dyn Expellable>) {
        let mut links = lock(&self.0.links);
        links.retain(|link| link.upgrade().is_some_and(|link| link.is_open()));
        links.push(Arc::downgrade(link));
        drop(links);
        // It may have been expelled while the link was made.
        self.end_link(&**link);
    }

    fn end_links(&self) {
        self.0.version.fetch_add(1, Ordering::Relaxed);
        let links: Vec<_> = lock(&self.0.links)
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        links.iter().for_each(|link| self.end_link(&**link));
    }

    fn end_link(&self, link: &dyn Expellable) {
        if let Some(refusal) = self.refusal_of(link.peer())
            && link.is_open()
        {
            link.expel(&refusal);
        }
    }
}

impl fmt::Debug for DenyList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(lock(&self.0.nodes).iter()).finish()
    }
}

/// Maximum number of nodes on the list. Each entry is for a token that an operator once gave away.
pub const MOST_EXPELLED: usize = 4096;

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_795_910_400)
    }

    #[test]
    fn the_list_is_kept_and_says_who_was_expelled_when_and_why() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("temporary directory");
        let list = DenyList::open(dir.path()).expect("empty");
        list.expel("aa", "attic", "sold", now()).expect("kept");
        list.expel("aa", "attic", "again", now() + Duration::from_secs(9))
            .expect("kept");
        let list = DenyList::open(dir.path()).expect("read again");
        let text = list.refusal("aa").expect("refused").to_string();
        for part in ["`attic`", "2026-11-29", "(sold)", "nodes readmit attic"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        assert!(list.refusal("bb").is_none());
        let mode = std::fs::metadata(dir.path().join(names::EXPELLED)).expect("there");
        assert_eq!(mode.permissions().mode() & 0o777, 0o600);
        assert_eq!(list.readmit("bb").expect("nothing to do"), None);
        list.readmit("aa").expect("kept").expect("it was there");
        let list = DenyList::open(dir.path()).expect("read again");
        assert!(!list.contains("aa"));
    }

    #[test]
    fn a_damaged_list_is_named_and_not_replaced() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join(names::EXPELLED);
        for damaged in ["", "{", "{\"expelled\": []}"] {
            std::fs::write(&path, damaged).expect("written");
            let error = DenyList::open(dir.path()).expect_err("damaged").to_string();
            assert!(error.contains("expelled.json is damaged"), "{error}");
            assert_eq!(std::fs::read_to_string(&path).expect("there"), damaged);
        }
    }

    #[test]
    fn the_list_is_bounded() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let list = DenyList::open(dir.path()).expect("empty");
        let entry = |number: usize| {
            let expulsion = Expulsion {
                ..Expulsion::default()
            };
            (format!("{number:064x}"), expulsion)
        };
        assert!(list.replace((0..2 * MOST_EXPELLED).map(entry)));
        assert!(!list.replace((0..MOST_EXPELLED).map(entry)));
        let error = list.expel("ff", "", "", now()).expect_err("full");
        assert!(error.to_string().contains("readmit"), "{error}");
        assert_eq!(list.list().len(), MOST_EXPELLED);
    }
}
