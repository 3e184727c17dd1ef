//! Pins of model names: set by an operator, or by the worker that gets a model first.

use std::collections::BTreeMap;

use mesh_api::Pin;

use super::pins::{MOST_PINS, PinError, Pins, is_fingerprint, is_name, key};
use super::{Tracker, rejects};

impl Tracker {
    /// All pins of this mesh.
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// Pins a name for an operator.
    ///
    /// # Errors
    /// If the name or the fingerprint is invalid, or there is no room.
    pub fn pin(&mut self, name: &str, fingerprint: &str) -> Result<(), PinError> {
        if !is_name(name) {
            return Err(PinError::Name(shortened(name)));
        }
        if !is_fingerprint(fingerprint) {
            return Err(PinError::Fingerprint(shortened(fingerprint)));
        }
        let Pins(pins) = &mut self.pins;
        if pins.len() >= MOST_PINS && !pins.contains_key(&key(name)) {
            return Err(PinError::TooMany);
        }
        let pin = Pin {
            name: name.to_owned(),
            fingerprint: fingerprint.to_owned(),
            operator: true,
            ..Pin::default()
        };
        pins.insert(key(name), pin);
        self.pins_changed();
        Ok(())
    }

    /// Removes a pin for an operator: the next model that is fetched under the name keeps it.
    ///
    /// # Errors
    /// If it is not pinned.
    pub fn unpin(&mut self, name: &str) -> Result<(), PinError> {
        let released = self.pins.0.remove(&key(name));
        released.ok_or_else(|| PinError::Unknown(shortened(name)))?;
        self.pins_changed();
        Ok(())
    }

    fn pins_changed(&mut self) {
        self.changed = true;
        self.actions.push(super::Action::KeepPins);
    }

    /// Pins names under which a model is being downloaded, or was downloaded by the worker with the download.
    pub(super) fn settle_pins(&mut self) {
        let mut first = Vec::new();
        for (node, entry) in &self.nodes {
            for sought in &entry.sought {
                let model = &sought.model;
                if !model.fingerprint.is_empty() || self.pins.get(&model.name).is_some() {
                    continue;
                }
                let claims = self.claims(&model.name);
                if let [(fingerprint, holder)] = claims[..]
                    && !rejects(model, fingerprint)
                {
                    let worker = self.name_of(holder);
                    first.push(Pin {
                        name: model.name.clone(),
                        fingerprint: fingerprint.to_owned(),
                        worker,
                        operator: false,
                        node: node.clone(),
                        holder: holder.to_owned(),
                    });
                }
            }
        }
        let mut news = false;
        for pin in first {
            news |= self.pins.first(pin);
        }
        if news {
            self.actions.push(super::Action::KeepPins);
        }
    }

    /// The model that a worker got on the download for a name keeps it.
    pub(super) fn pin_downloads(&mut self, node: &str) {
        let Some(entry) = self.nodes.get(node) else {
            return;
        };
        let mut news = false;
        for (key, _) in self.downloads.iter().filter(|(_, one)| one.node == node) {
            let super::Key::Name(name) = key else {
                continue;
            };
            let found = entry.held.iter().find(|(_, held)| held.is_called(name));
            if let Some((fingerprint, _)) = found {
                news |= self.pins.first(Pin {
                    name: name.clone(),
                    fingerprint: fingerprint.clone(),
                    worker: entry.name.clone(),
                    operator: false,
                    node: node.to_owned(),
                    holder: node.to_owned(),
                });
            }
        }
        if news {
            self.actions.push(super::Action::KeepPins);
        }
    }

    /// Models that workers hold by this name, each with the id of one that does.
    fn claims(&self, name: &str) -> Vec<(&str, &str)> {
        let mut claims: BTreeMap<&str, &str> = BTreeMap::new();
        for (id, node) in &self.nodes {
            let held = node.held.iter().filter(|_| node.address.is_some());
            for (fingerprint, _) in held.filter(|(_, held)| held.is_called(name)) {
                claims.entry(fingerprint).or_insert(id);
            }
        }
        claims.into_iter().collect()
    }
}

/// The beginning of a text that a client sent.
fn shortened(text: &str) -> String {
    text.chars().take(100).collect()
}
