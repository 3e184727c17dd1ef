//! The key of a node's certificate.

use std::path::Path;

use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use zeroize::Zeroizing;

use super::error::TrustError;
use super::names;
use crate::files;

/// A node's private key. It never leaves the state directory.
pub(crate) struct NodeKey {
    pub(super) pair: KeyPair,
}

impl NodeKey {
    /// The key in `dir`; created if there is none. A repeated join must use the same key.
    pub(crate) fn load_or_create(dir: &Path) -> Result<Self, TrustError> {
        if let Some(key) = Self::load(dir)? {
            return Ok(key);
        }
        files::create_private_dir(dir)?;
        let key = Self::generate()?;
        key.write(&dir.join(names::NODE_KEY))?;
        Ok(key)
    }

    pub(super) fn generate() -> Result<Self, TrustError> {
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        Ok(Self { pair })
    }

    pub(super) fn write(&self, path: &Path) -> Result<(), TrustError> {
        let text = Zeroizing::new(self.pair.serialize_pem());
        files::replace(path, text.as_bytes(), files::PRIVATE)
    }

    /// Puts the next key into the place of the present one.
    pub(super) fn settle(dir: &Path) -> Result<(), TrustError> {
        let (from, to) = (dir.join(names::NEXT_NODE_KEY), dir.join(names::NODE_KEY));
        std::fs::rename(&from, &to).map_err(|error| TrustError::io("move", &from, error))
    }

    pub(crate) fn load(dir: &Path) -> Result<Option<Self>, TrustError> {
        Self::read(&dir.join(names::NODE_KEY))
    }

    pub(super) fn read(path: &Path) -> Result<Option<Self>, TrustError> {
        let Some(pem) = files::read(path)?.map(Zeroizing::new) else {
            return Ok(None);
        };
        let pair = KeyPair::from_pem(&pem).map_err(|error| TrustError::damaged(path, error))?;
        Ok(Some(Self { pair }))
    }

    /// A request (PKCS#10, DER) for a certificate for this key.
    pub(crate) fn request(&self) -> Result<Vec<u8>, TrustError> {
        // The root ignores everything but the key.
        let request = CertificateParams::default().serialize_request(&self.pair)?;
        Ok(request.der().to_vec())
    }
}
