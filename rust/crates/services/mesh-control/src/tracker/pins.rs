//! Pins of model names in this mesh: the first model fetched under a name keeps the name until an operator
//! decides otherwise.
//!
//! A worker that reaches the hub, or has the operator's signature, needs no pin. For all others only the pin
//! stands between a name and the next worker that claims it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use mesh_api::{NameConflict, Pin};

/// Pins by name, in lower case. Each node may have made a limited number of them by asking. If the holder of
/// one replaces the model, and no other worker has the old one, the name goes with it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pins(pub(super) BTreeMap<String, Pin>);

/// Advice to the operator about a name that several models claim.
pub fn advice(conflict: &NameConflict) -> String {
    let claims = conflict.claims.iter().map(|(fingerprint, workers)| {
        // For models that are served, the worker reports it.
        let short: String = fingerprint.chars().take(12).collect();
        match workers[..] {
            [] => format!("{short} (nobody now)"),
            _ => format!("{short} ({})", workers.join(", ")),
        }
    });
    let claims: Vec<String> = claims.collect();
    let mut text = format!(
        "model name `{}` is {} {} different models: {}",
        conflict.name,
        if conflict.served {
            "served for"
        } else {
            "claimed for"
        },
        conflict.claims.len().max(2),
        claims.join(", ")
    );
    if !conflict.refused_by.is_empty() {
        text += &format!(
            "; {} found that the hub has another one",
            conflict.refused_by.join(", ")
        );
    }
    text += match conflict.decided {
        _ if conflict.served => {
            "; requests go to the one that was served first: stop the others, or give their models another name (a pin decides what \
             workers get under a name, not what they serve)"
        }
        true => "; an operator pinned one of them: look at the workers that have another",
        false => {
            "; find out which one is right and pin it with `hydramesh models pins set NAME FINGERPRINT`, or remove the wrong one from its \
             worker's store"
        }
    };
    // Names that workers gave are in it.
    text.replace(char::is_control, " ")
}

/// Known conflicts, by name in lower case.
#[derive(Debug, Clone, Default)]
pub(super) struct Conflicts {
    /// Conflicts that are reported.
    pub(super) told: BTreeMap<String, NameConflict>,
    /// All names that no operator has decided about.
    pub(super) disputed: BTreeSet<String>,
    /// Recent log entries by name: their time, and the nodes that were involved.
    pub(super) noted: BTreeMap<String, (Instant, BTreeSet<String>)>,
}

impl Pins {
    /// The pins from the file; invalid ones are left out.
    pub fn of(pins: impl IntoIterator<Item = Pin>) -> Self {
        let sound = |pin: &Pin| is_name(&pin.name) && is_fingerprint(&pin.fingerprint);
        let pins = pins.into_iter().filter(sound).take(MOST_PINS);
        Pins(pins.map(|pin| (key(&pin.name), pin)).collect())
    }

    /// Pins in the order of their names.
    pub fn list(&self) -> impl Iterator<Item = &Pin> {
        self.0.values()
    }

    /// The pin of `name`.
    pub fn get(&self, name: &str) -> Option<&Pin> {
        self.0.get(&key(name))
    }

    /// Pins a name, unless it is pinned, or there are too many pins. Returns true if it was pinned now.
    pub(super) fn first(&mut self, pin: Pin) -> bool {
        let of_node = self.0.values().filter(|known| known.node == pin.node);
        let room = self.0.len() < MOST_PINS && of_node.count() < MOST_OF_NODE;
        let news = room && !self.0.contains_key(&key(&pin.name));
        if news {
            self.0.insert(key(&pin.name), pin);
        }
        news
    }
}

/// Reasons for which a pin cannot be set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PinError {
    /// The name is not valid.
    #[error("invalid model name {0:?}: use 1 to 512 bytes without control characters")]
    Name(String),
    /// The fingerprint is not valid.
    #[error(
        "invalid fingerprint {0:?}: use 64 digits from 0 to 9 and a to f; `hydramesh models show` tells a model's"
    )]
    Fingerprint(String),
    /// There are as many pins as fit.
    #[error(
        "there are {MOST_PINS} pins already: release some with `hydramesh models pins release NAME`"
    )]
    TooMany,
    /// The name is not pinned.
    #[error("the name {0:?} is not pinned: `hydramesh models pins list` shows those that are")]
    Unknown(String),
}

/// Names are equal whatever their case.
pub(super) fn key(name: &str) -> String {
    name.to_ascii_lowercase()
}

/// Pins in all, and those that one node may have made by asking.
pub(super) const MOST_PINS: usize = 4096;
const MOST_OF_NODE: usize = 256;

pub(super) fn is_fingerprint(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

pub(super) fn is_name(text: &str) -> bool {
    !text.is_empty() && text.len() <= NAME_BYTES && !text.chars().any(char::is_control)
}

const NAME_BYTES: usize = 512;
