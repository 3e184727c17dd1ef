//! What the configuration allows.

use mesh_store::Policy;

/// What the configuration says about models that come from elsewhere.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    /// There is a store.
    pub store: bool,
    /// Get models from other workers, and give them the models here (`store.peers`).
    pub peers: bool,
    /// Get models from the hub that no worker has (`store.hub`).
    pub hub: bool,
    /// The worker belongs to a head.
    pub has_head: bool,
    /// Requirements on signatures.
    pub policy: Policy,
}

impl Rules {
    /// True if other workers may fetch from here and this worker from them.
    pub fn is_sharing(&self) -> bool {
        self.store && self.peers
    }

    /// True if no head gives this worker the download of a model: it has none, or may not take from others.
    pub(crate) fn decides_alone(&self) -> bool {
        !self.has_head || !self.peers
    }
}
