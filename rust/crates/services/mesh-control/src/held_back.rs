//! Messages of nodes in quarantine about models and rings. A worker sends them once, so they are kept and
//! applied when the quarantine is over.

use std::collections::BTreeMap;

use mesh_proto::{Models, Offer};

use super::registry::WorkerId;

/// The latest messages of each worker in quarantine.
#[derive(Debug, Clone, Default)]
pub struct HeldBack(BTreeMap<WorkerId, HeldMessages>);

/// The latest messages of one worker.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HeldMessages {
    /// Parts of rings that it may hold.
    pub offer: Option<Offer>,
    /// Models that it holds and seeks.
    pub models: Option<Models>,
}

impl HeldBack {
    /// Keeps an offer in place of an earlier one.
    pub fn offered(&mut self, id: WorkerId, offer: Offer) {
        self.0.entry(id).or_default().offer = Some(offer);
    }

    /// Keeps models in place of earlier ones.
    pub fn said(&mut self, id: WorkerId, models: Models) {
        self.0.entry(id).or_default().models = Some(models);
    }

    /// Takes out the messages of the workers that are no longer in quarantine. `is_out` returns `None` for a
    /// worker that left: its messages are dropped.
    pub fn take(
        &mut self,
        is_out: impl Fn(WorkerId) -> Option<bool>,
    ) -> Vec<(WorkerId, HeldMessages)> {
        let mut free = Vec::new();
        self.0.retain(|id, words| match is_out(*id) {
            Some(true) => true,
            Some(false) => {
                free.push((*id, std::mem::take(words)));
                false
            }
            None => false,
        });
        free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_in_quarantine_counts_afterwards() {
        let (one, two, three) = (WorkerId(1), WorkerId(2), WorkerId(3));
        let models = |port| Models {
            port,
            ..Default::default()
        };
        let mut held = HeldBack::default();
        for id in [one, two, three] {
            held.said(id, models(1));
            held.offered(id, Offer::default());
        }
        held.said(two, models(2));
        assert!(held.take(|_| Some(true)).is_empty());
        // The second one is free, the third one has left.
        let is_out = |id| (id != three).then_some(id == one);
        let words = HeldMessages {
            offer: Some(Offer::default()),
            models: Some(models(2)),
        };
        assert_eq!(held.take(is_out), [(two, words)]);
        assert_eq!(held.take(|_| Some(false)).len(), 1);
    }
}
