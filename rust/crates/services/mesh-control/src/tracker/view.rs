//! The models of a mesh for people.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Key, Tracker};

/// A model that workers hold or seek.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrackedModel {
    /// What it goes by.
    pub name: String,
    /// SHA-256 of its manifest; absent while nobody has one.
    pub fingerprint: Option<String>,
    /// Bytes of its files; 0 while they are unknown.
    pub bytes: u64,
    /// Whether its manifest is signed.
    pub signed: bool,
    /// Who has pieces of it.
    pub holders: Vec<HolderView>,
    /// Who seeks pieces of it.
    pub seekers: Vec<SeekerView>,
    /// Who gets it from outside the mesh.
    pub origin: Option<String>,
}

/// A worker with pieces of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HolderView {
    /// Name of the worker.
    pub worker: String,
    /// Pieces that it has.
    pub pieces: u32,
    /// Pieces of the model.
    pub of: u32,
    /// Workers that say it sent them bad pieces.
    pub accused_by: Vec<String>,
}

/// A worker that seeks pieces of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SeekerView {
    /// Name of the worker.
    pub worker: String,
    /// Bytes of what it needs that it has.
    pub bytes: u64,
    /// Bytes that it needs; 0 while they are unknown.
    pub bytes_total: u64,
    /// Why it could not get the model from outside the mesh, if it tried.
    pub error: Option<String>,
}

impl Tracker {
    /// What workers still wait for, in words.
    pub fn under_way(&self) -> Vec<String> {
        let mut texts = Vec::new();
        for entry in self.nodes.values() {
            for sought in &entry.sought {
                let model = &sought.model;
                let bytes = model.bytes.max(model.origin_bytes);
                let mut text = format!("{} lacks {}: it has {bytes}", entry.name, model.name);
                if model.bytes_total > 0 {
                    text += &format!(" of {}", model.bytes_total);
                }
                text += " bytes";
                if !model.origin_error.is_empty() {
                    text += &format!(" ({})", super::shorten(&model.origin_error));
                }
                texts.push(text);
            }
        }
        texts
    }

    /// All models that workers hold or seek.
    pub fn view(&self) -> Vec<TrackedModel> {
        let mut models: BTreeMap<Key, TrackedModel> = BTreeMap::new();
        for (node, entry) in &self.nodes {
            for (fingerprint, held) in &entry.held {
                let model = models
                    .entry(Key::Fingerprint(fingerprint.clone()))
                    .or_insert_with(|| empty(held.names.first(), Some(fingerprint)));
                model.bytes = model.bytes.max(held.bytes);
                model.signed |= held.signed;
                let key = (fingerprint.clone(), node.clone());
                let accusers = self.accused.get(&key).into_iter().flatten();
                model.holders.push(HolderView {
                    worker: entry.name.clone(),
                    pieces: held.pieces.len(),
                    of: held.pieces.pieces(),
                    accused_by: accusers.map(|node| self.name_of(node)).collect(),
                });
            }
        }
        for entry in self.nodes.values() {
            for sought in &entry.sought {
                let key = self.key(&sought.model);
                let fingerprint = match &key {
                    Key::Fingerprint(fingerprint) => Some(fingerprint),
                    Key::Name(_) => None,
                };
                let model = models
                    .entry(key.clone())
                    .or_insert_with(|| empty(Some(&sought.model.name), fingerprint));
                let error = &sought.model.origin_error;
                model.seekers.push(SeekerView {
                    worker: entry.name.clone(),
                    bytes: sought.model.bytes.max(sought.model.origin_bytes),
                    bytes_total: sought.model.bytes_total,
                    error: (!error.is_empty()).then(|| super::shorten(error)),
                });
            }
        }
        for (key, errand) in &self.errands {
            if let Some(model) = models.get_mut(key) {
                model.origin = Some(self.name_of(&errand.node));
            }
        }
        models.into_values().collect()
    }
}

fn empty(name: Option<&String>, fingerprint: Option<&String>) -> TrackedModel {
    let name = name.or(fingerprint).cloned();
    TrackedModel {
        name: name.unwrap_or_default(),
        fingerprint: fingerprint.cloned(),
        bytes: 0,
        signed: false,
        holders: Vec::new(),
        seekers: Vec::new(),
        origin: None,
    }
}
