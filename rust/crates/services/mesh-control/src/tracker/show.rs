//! Views of models for operators.

use std::collections::BTreeMap;

use mesh_api::{ModelHolder, ModelSeeker, SharedModel};

use super::{Key, Tracker};

impl Tracker {
    /// Models that workers still wait for, for people.
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

    /// Views of all models that workers hold or seek.
    pub fn view(&self) -> Vec<SharedModel> {
        let mut models: BTreeMap<Key, SharedModel> = BTreeMap::new();
        for (node, entry) in &self.nodes {
            for (fingerprint, held) in &entry.held {
                let model = models
                    .entry(Key::Fingerprint(fingerprint.clone()))
                    .or_insert_with(|| empty(held.names.first(), Some(fingerprint)));
                model.bytes = model.bytes.max(held.bytes);
                model.signed |= held.signed;
                let key = (fingerprint.clone(), node.clone());
                let accusers = self.accused.get(&key).into_iter().flatten();
                model.holders.push(ModelHolder {
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
                model.seekers.push(ModelSeeker {
                    worker: entry.name.clone(),
                    bytes: sought.model.bytes.max(sought.model.origin_bytes),
                    bytes_total: sought.model.bytes_total,
                    error: (!error.is_empty()).then(|| super::shorten(error)),
                });
            }
        }
        for (key, download) in &self.downloads {
            if let Some(model) = models.get_mut(key) {
                model.origin = Some(self.name_of(&download.node));
            }
        }
        models.into_values().collect()
    }
}

fn empty(name: Option<&String>, fingerprint: Option<&String>) -> SharedModel {
    let name = name.or(fingerprint).cloned();
    SharedModel {
        name: name.unwrap_or_default(),
        fingerprint: fingerprint.cloned(),
        ..SharedModel::default()
    }
}
