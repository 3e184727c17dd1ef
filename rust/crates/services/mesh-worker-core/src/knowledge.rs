//! What this worker knows of models: searches and downloads decide by it, and add to it.

use std::collections::{BTreeMap, BTreeSet};

use mesh_proto::{ModelSources, NodeAddr};
use mesh_store::Digest;

use crate::replica::Replica;
use crate::report::Report;
use crate::rules::Rules;

#[derive(Default)]
pub(crate) struct Knowledge {
    pub(crate) rules: Rules,
    pub(crate) replicas: BTreeMap<Digest, Replica>,
    /// Models whose files contradict their manifests.
    pub(crate) false_manifests: BTreeSet<Digest>,
    /// Sources of models from the head, by name, and the number of its answers so far.
    pub(crate) told: BTreeMap<String, ModelSources>,
    pub(crate) told_version: u64,
    /// Workers on the LAN.
    pub(crate) lan: Vec<NodeAddr>,
    /// This worker, and the port at which others reach it; `None` while none can be reached.
    pub(crate) own: Option<(String, u16)>,
    pub(crate) report: Report,
}

impl Knowledge {
    /// True if this worker is the one that gets the model `name` from outside the mesh.
    pub(crate) fn is_given(&self, name: &str) -> bool {
        let told = self.told.get(name);
        let given = self.rules.decides_alone() || told.is_some_and(|told| told.origin);
        given && self.report.may_download(name)
    }
}
