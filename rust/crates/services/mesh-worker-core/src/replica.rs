//! This worker's copy of a model: its names, and the pieces of it that are here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_proto::{HeldModel, SoughtModel};
use mesh_share::PieceSet;
use mesh_store::{Digest, Named};

use crate::names::is_hub_name;
use crate::piece_map::PieceMap;

/// This worker's copy of a model, whole or in part.
#[derive(Debug)]
pub struct Replica {
    map: Arc<PieceMap>,
    pub(crate) here: PieceSet,
    /// Names besides the manifest's own, each vouched for.
    names: Vec<String>,
    /// Names that another worker once gave it, not vouched for.
    hearsay: Vec<String>,
    /// False while its name is being vouched for: until then only its download knows it.
    pub(crate) listed: bool,
}

impl Replica {
    /// A model of which these pieces are here.
    pub fn new(map: Arc<PieceMap>, here: PieceSet) -> Self {
        Replica {
            map,
            here,
            names: Vec::new(),
            hearsay: Vec::new(),
            listed: true,
        }
    }

    /// Adds the names that the store has for it. For names of the hub another worker's word does not count:
    /// the name waits until it is vouched for.
    pub fn with_names<'a>(mut self, names: impl IntoIterator<Item = &'a Named>) -> Self {
        for named in names {
            if named.is_hearsay() && is_hub_name(&named.name) {
                self.hearsay.push(named.name.clone());
            } else {
                self.add_name(&named.name);
            }
        }
        self
    }

    /// Its manifest, and the numbers of its pieces.
    pub fn map(&self) -> &Arc<PieceMap> {
        &self.map
    }

    /// Digest of its manifest.
    pub fn fingerprint(&self) -> Digest {
        self.map.fingerprint()
    }

    /// The pieces that are here.
    pub fn here(&self) -> &PieceSet {
        &self.here
    }

    /// The subset of these pieces that is missing.
    pub fn missing(&self, pieces: &PieceSet) -> PieceSet {
        let mut missing = pieces.clone();
        missing.subtract(&self.here);
        missing
    }

    pub(crate) fn add_name(&mut self, name: &str) {
        if !self.names.iter().any(|known| known == name) {
            self.names.push(name.to_owned());
        }
    }

    /// True if another worker once called it so and the name is not vouched for.
    pub(crate) fn is_said_to_be(&self, name: &str) -> bool {
        let mut said = self.hearsay.iter();
        said.any(|said| said.eq_ignore_ascii_case(name))
    }

    /// Name under which to look it up at the head: one that is vouched for, else its fingerprint. A manifest
    /// may call itself as it likes.
    pub(crate) fn title(&self) -> String {
        let first = self.names.first().cloned();
        first.unwrap_or_else(|| self.fingerprint().to_string())
    }

    /// Its name on the hub, if that is known.
    pub fn hub_name(&self) -> Option<&str> {
        let mut names = self.names.iter().map(String::as_str);
        names.find(|name| is_hub_name(name))
    }

    pub(crate) fn is_called(&self, name: &str) -> bool {
        let own = self.own_name();
        own.is_some_and(|own| own.eq_ignore_ascii_case(name)) || self.is_named(name)
    }

    /// True if it goes by this name in the store, or `name` is its fingerprint. The manifest's own name does
    /// not count.
    pub(crate) fn is_named(&self, name: &str) -> bool {
        let mut names = self.names.iter();
        names.any(|known| known.eq_ignore_ascii_case(name))
            || self.fingerprint().to_string() == name
    }

    /// True if it has any name in the store.
    pub(crate) fn has_names(&self) -> bool {
        !self.names.is_empty()
    }

    /// The manifest's own name, where that counts: not if all its other names are another worker's word.
    pub(crate) fn own_name(&self) -> Option<&str> {
        let is_hearsay = self.names.is_empty() && !self.hearsay.is_empty();
        self.map.plain_name().filter(|_| !is_hearsay)
    }

    /// Description for the head; `keeps_name` is true if it still goes by the manifest's own name.
    pub fn to_proto(&self, keeps_name: bool) -> HeldModel {
        let mut names = self.names.clone();
        let own = self.own_name().filter(|_| keeps_name);
        if let Some(own) = own.filter(|own| !names.iter().any(|name| name == own)) {
            names.insert(0, own.to_owned());
        }
        HeldModel {
            fingerprint: self.fingerprint().to_string(),
            names,
            bytes: self.map.manifest().bytes(),
            pieces: Some(self.here.to_proto()),
            signed: !self.map.signed().signatures.is_empty(),
        }
    }
}

/// The replica that goes by `name`. The store's names count before the manifest's, and present models before
/// replaced ones.
pub(crate) fn called<'a>(
    name: &str,
    replicas: impl Iterator<Item = &'a Replica>,
) -> Option<&'a Replica> {
    let called = replicas.filter(|replica| replica.listed && replica.is_called(name));
    called.max_by_key(|replica| {
        let is_here = !replica.here().is_empty();
        (replica.is_named(name), is_here, replica.has_names())
    })
}

/// Replicas to report to the head: those with pieces here, and those that are being fetched. Where several
/// have the same own name and the store has names for some of them, only these keep the own name: the others
/// were replaced.
pub(crate) fn reported(
    replicas: &BTreeMap<Digest, Replica>,
    sought: &BTreeMap<String, SoughtModel>,
) -> Vec<HeldModel> {
    let fetched: BTreeSet<&str> = sought.values().map(|s| s.fingerprint.as_str()).collect();
    let is_here = |replica: &&Replica| {
        let fingerprint = replica.fingerprint().to_string();
        replica.listed && (!replica.here().is_empty() || fetched.contains(&*fingerprint))
    };
    let here: Vec<&Replica> = replicas.values().filter(is_here).collect();
    let named = here.iter().filter(|replica| replica.has_names());
    let named: BTreeSet<&str> = named.filter_map(|replica| replica.own_name()).collect();
    let models = here.iter().map(|replica| {
        let replaced = replica.own_name().is_some_and(|own| named.contains(own));
        replica.to_proto(replica.has_names() || !replaced)
    });
    models.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{map, named};

    const HUB: &str = "org/m-GGUF:Q8_0";

    fn replica(called: &str, names: &[Named]) -> Replica {
        let map = map(called, 1);
        Replica::new(map.clone(), map.all()).with_names(names)
    }

    #[test]
    fn a_hub_name_that_another_worker_gave_does_not_count() {
        let model = replica("m", &[named(HUB, Some("worker liar"), None)]);
        assert!(!model.is_called(HUB) && !model.is_called("m"));
        assert!(model.is_said_to_be(HUB));
        assert!(model.to_proto(true).names.is_empty());
        assert_eq!(model.hub_name(), None);
        // What this machine got from the hub itself, and any vouched model, is.
        for vouched in [
            named(HUB, Some("worker a"), Some("the hub")),
            named(HUB, Some("http://hub/org/m/tree/0"), None),
        ] {
            let model = replica("m", &[vouched]);
            assert!(model.is_called(HUB) && model.is_called("m"));
            assert_eq!(model.hub_name(), Some(HUB));
        }
    }

    #[test]
    fn a_manifest_gives_itself_no_name_of_the_hubs() {
        let model = replica("org/other", &[named("mine", None, None)]);
        assert!(!model.is_called("org/other") && model.is_called("mine"));
        assert_eq!(model.map().served_as("mine"), "mine");
        assert_eq!(model.to_proto(true).names, ["mine"]);
        assert_eq!(replica("plain", &[]).map().served_as("org/plain"), "plain");
    }

    #[test]
    fn of_replicas_with_one_own_name_those_keep_it_that_the_store_names() {
        let (old, new) = (map("m", 1), map("m", 2));
        let mut replicas = BTreeMap::new();
        for (map, names) in [(&old, &[][..]), (&new, &[named(HUB, None, None)])] {
            let replica = Replica::new(map.clone(), map.all()).with_names(names);
            replicas.insert(map.fingerprint(), replica);
        }
        let told = reported(&replicas, &BTreeMap::new());
        let names = |map: &PieceMap| {
            let fingerprint = map.fingerprint().to_string();
            let told = told.iter().find(|told| told.fingerprint == fingerprint);
            told.unwrap().names.clone()
        };
        assert_eq!(names(&old), [] as [String; 0]);
        assert_eq!(names(&new), ["m", HUB]);
        let found = called("m", replicas.values()).unwrap();
        assert_eq!(found.fingerprint(), new.fingerprint());
    }

    #[test]
    fn a_replica_without_pieces_is_reported_only_while_it_is_fetched() {
        let map = map("m", 3);
        let none = Replica::new(map.clone(), PieceSet::none(map.count()));
        let replicas = BTreeMap::from([(map.fingerprint(), none)]);
        assert!(reported(&replicas, &BTreeMap::new()).is_empty());
        let sought = SoughtModel {
            fingerprint: map.fingerprint().to_string(),
            ..SoughtModel::default()
        };
        let sought = BTreeMap::from([("m".to_owned(), sought)]);
        assert_eq!(reported(&replicas, &sought).len(), 1);
    }

    #[test]
    fn pieces_come_and_go() {
        let map = map("m", 3);
        let mut model = Replica::new(map.clone(), PieceSet::none(3));
        model.here.insert(1);
        assert_eq!(model.missing(&map.all()).iter().collect::<Vec<_>>(), [0, 2]);
        model.here.remove(1);
        assert_eq!(model.missing(&map.all()).len(), 3);
        assert_eq!(model.map().bytes_of(&map.all()), map.manifest().bytes());
        assert_eq!(map.id(3), None);
        assert_eq!(
            map.number(mesh_store::PieceId { file: 9, piece: 0 }),
            u32::MAX
        );
    }
}
