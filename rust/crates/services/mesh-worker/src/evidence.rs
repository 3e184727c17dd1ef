//! What this node states about itself to the head.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mesh_machine::evidence::collect;
use mesh_net::trust::EvidenceSource;
use mesh_proto::{Evidence, ModelCard, ServedFingerprint};
use mesh_tpm::{DEVICE, Quoter};
use prost::Message as _;

use crate::config::TpmChoice;
use crate::lock::lock;

/// The evidence of this node: that of its machine as it was at the start, and the models that it serves.
pub(crate) struct NodeEvidence {
    machine: Evidence,
    tpm: Option<Arc<Quoter>>,
    told: Mutex<Told>,
}

struct Told {
    models: Vec<ServedFingerprint>,
    at: Instant,
}

impl NodeEvidence {
    /// Reads the machine, and opens its TPM. Blocks on both.
    pub(crate) fn collect(tpm: &TpmChoice) -> Self {
        Self {
            machine: collect(Path::new("/"), env!("CARGO_PKG_VERSION")),
            tpm: open(tpm).map(Arc::new),
            told: Mutex::new(Told {
                models: Vec::new(),
                at: Instant::now(),
            }),
        }
    }

    /// The source for requests to the head, with the models that it was told of last.
    pub(crate) fn source(self: &Arc<Self>) -> EvidenceSource {
        let own = self.clone();
        let source = EvidenceSource::new(move || {
            let models = lock(&own.told).models.clone();
            let evidence = Evidence {
                models,
                ..own.machine.clone()
            };
            evidence.encode_to_vec()
        });
        match self.tpm.clone() {
            Some(tpm) => source.with_quotes(move |digest| {
                let quoted = tpm.quote(digest);
                quoted
                    .inspect_err(|error| {
                        tracing::warn!(%error, "the evidence goes without a quote of the TPM");
                    })
                    .ok()
            }),
            None => source,
        }
    }

    /// The head is told of these models now.
    pub(crate) fn serves(&self, cards: &[ModelCard], now: Instant) {
        *lock(&self.told) = Told {
            models: models(cards),
            at: now,
        };
    }

    /// True if the head should hear that other models are served now. It counts as told then.
    pub(crate) fn is_due(&self, cards: &[ModelCard], now: Instant) -> bool {
        let mut told = lock(&self.told);
        let rested = now.saturating_duration_since(told.at) >= INTERVAL;
        if !rested || told.models == models(cards) {
            return false;
        }
        *told = Told {
            models: models(cards),
            at: now,
        };
        true
    }
}

/// The TPM, if there is one that can quote.
fn open(choice: &TpmChoice) -> Option<Quoter> {
    let path = match choice {
        TpmChoice::Off => return None,
        // Most machines of some age have none.
        TpmChoice::Auto if !Path::new(DEVICE).exists() => return None,
        TpmChoice::Auto => Path::new(DEVICE),
        TpmChoice::At(path) => path,
    };
    match Quoter::open(path) {
        Ok(quoter) => {
            let key = quoter.description();
            tracing::info!(tpm = %path.display(), key, "this machine's TPM vouches for its evidence");
            Some(quoter)
        }
        // Only a user in the right group may use the TPM, and nobody asked for it.
        Err(error) if *choice == TpmChoice::Auto => {
            tracing::info!(%error, "the evidence goes without quotes of a TPM");
            None
        }
        Err(error) => {
            tracing::warn!(%error, "the evidence goes without quotes of a TPM");
            None
        }
    }
}

fn models(cards: &[ModelCard]) -> Vec<ServedFingerprint> {
    let mut models: Vec<ServedFingerprint> = cards
        .iter()
        .filter(|card| card.name.len() <= LONGEST_NAME && !card.name.contains(char::is_control))
        .map(|card| ServedFingerprint {
            name: card.name.clone(),
            fingerprint: card.fingerprint.clone(),
        })
        .collect();
    models.sort_unstable_by(|a, b| (&a.name, &a.fingerprint).cmp(&(&b.name, &b.fingerprint)));
    models.truncate(MOST_MODELS);
    models
}

/// Pause between two reports on a link. The head takes one in a second.
const INTERVAL: Duration = Duration::from_secs(5);
/// Maximum number of models and bytes of a name that heads take.
const MOST_MODELS: usize = 32;
const LONGEST_NAME: usize = 255;

#[cfg(test)]
mod tests {
    use super::*;

    fn card(name: &str) -> ModelCard {
        ModelCard {
            name: name.to_owned(),
            fingerprint: "ab".repeat(32),
            ..ModelCard::default()
        }
    }

    #[test]
    fn other_models_are_reported_after_a_pause_and_the_same_ones_are_not() {
        let evidence = Arc::new(NodeEvidence::collect(&TpmChoice::Off));
        let now = Instant::now();
        evidence.serves(&[card("b"), card("a")], now);
        let later = now + INTERVAL;
        assert!(
            !evidence.is_due(&[card("a"), card("b")], later),
            "in any order"
        );
        assert!(!evidence.is_due(&[card("a")], now));
        assert!(evidence.is_due(&[card("a"), card("\u{1b}")], later));
        assert!(!evidence.is_due(&[card("a")], later + INTERVAL));
        let sent = Evidence::decode(&evidence.source().collect()[..]).unwrap();
        assert_eq!(sent.models.len(), 1);
        assert_eq!(sent.version, env!("CARGO_PKG_VERSION"));
        let many: Vec<ModelCard> = (0..100).map(|number| card(&number.to_string())).collect();
        evidence.serves(&many, later);
        let sent = Evidence::decode(&evidence.source().collect()[..]).unwrap();
        assert_eq!(sent.models.len(), MOST_MODELS);
    }
}
