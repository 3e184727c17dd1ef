//! The statement of two mesh roots that the second takes the place of the first.

use mesh_identity::{IdentityKey, PublicKey};
use mesh_proto::{RootIdentity, RootSuccession, SignedSuccession};
use prost::Message as _;
use rustls::pki_types::CertificateDer;

use super::digest::sha256;
use super::root_identity::verify_root_identity;
use super::succession_error::SuccessionError;

/// A succession of mesh roots. Both have signed it: whoever trusts one of them learns the other, and how long
/// both are accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Succession {
    /// Name of the mesh.
    pub mesh: String,
    /// Certificate of the root whose place is taken.
    pub former: CertificateDer<'static>,
    /// Certificate of the root that takes its place.
    pub next: CertificateDer<'static>,
    /// End of the time in which both are accepted, seconds since the Unix epoch.
    pub until: u64,
}

/// The ML-DSA key of a root, and the claim by which others know it as the root's.
pub(super) struct Signer<'a> {
    pub(super) key: &'a IdentityKey,
    pub(super) claim: &'a RootIdentity,
}

impl Succession {
    /// The statement with the signatures of both roots.
    pub(super) fn sign(&self, former: &Signer<'_>, next: &Signer<'_>) -> SignedSuccession {
        let body = RootSuccession {
            version: VERSION,
            mesh: self.mesh.clone(),
            former: self.former.to_vec(),
            former_key: Some(former.claim.clone()),
            next: self.next.to_vec(),
            next_key: Some(next.claim.clone()),
            until: self.until,
        };
        let body = body.encode_to_vec();
        SignedSuccession {
            former_signature: former.key.sign(CONTEXT, &body),
            next_signature: next.key.sign(CONTEXT, &body),
            body,
        }
    }

    /// Reads a signed succession. It says which roots are related, not that one of them is known.
    ///
    /// # Errors
    /// If it is malformed in any way, or not signed by both roots.
    pub fn verify(signed: &SignedSuccession) -> Result<Self, SuccessionError> {
        let unreadable =
            |reason: &dyn std::fmt::Display| SuccessionError::Encoding(reason.to_string());
        if signed.encoded_len() > LONGEST_SUCCESSION {
            return Err(unreadable(&format!(
                "it has more than {LONGEST_SUCCESSION} bytes"
            )));
        }
        let body = RootSuccession::decode(&signed.body[..]).map_err(|error| unreadable(&error))?;
        if body.version != VERSION {
            let version = body.version;
            return Err(unreadable(&format!(
                "it is of version {version}; update this node"
            )));
        }
        let succession = Self {
            mesh: body.mesh,
            former: CertificateDer::from(body.former),
            next: CertificateDer::from(body.next),
            until: body.until,
        };
        let signatures = [
            (
                "former",
                &succession.former,
                body.former_key,
                &signed.former_signature,
            ),
            (
                "next",
                &succession.next,
                body.next_key,
                &signed.next_signature,
            ),
        ];
        for (name, root, claim, signature) in signatures {
            let key = key_of(root, claim.as_ref());
            let verified = key.is_some_and(|key| key.verifies(CONTEXT, &signed.body, signature));
            if !verified {
                return Err(SuccessionError::Signature(name));
            }
        }
        if succession.former == succession.next {
            return Err(unreadable(&"both roots are the same"));
        }
        Ok(succession)
    }

    /// Digests of both roots, former and next.
    pub fn digests(&self) -> ([u8; 32], [u8; 32]) {
        (sha256(&self.former), sha256(&self.next))
    }
}

fn key_of(root: &CertificateDer<'_>, claim: Option<&RootIdentity>) -> Option<PublicKey> {
    verify_root_identity(root, claim?).ok()
}

/// Maximum bytes of a signed succession; one has some 12,000.
pub const LONGEST_SUCCESSION: usize = 32 << 10;

const VERSION: u32 = 1;
const CONTEXT: &[u8] = b"hydramesh-root-succession-v1";

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::trust::MeshRoot;

    fn signed() -> SignedSuccession {
        let dir = tempfile::tempdir().unwrap();
        let root = MeshRoot::load_or_create(dir.path(), "attic").unwrap();
        let now = SystemTime::now();
        let hour = Duration::from_secs(3600);
        let rotated = root.rotate(dir.path(), now + hour, now).unwrap();
        let signed = rotated.succession(now).unwrap().clone();
        let succession = Succession::verify(&signed).unwrap();
        assert_eq!(succession.digests(), (root.sha256(), rotated.sha256()));
        assert_eq!(succession.mesh, "attic");
        signed
    }

    #[test]
    fn a_changed_succession_is_of_nobody() {
        let signed = signed();
        assert!(signed.encoded_len() < 14_000, "{}", signed.encoded_len());
        for at in (0..signed.body.len()).step_by(97) {
            let mut changed = signed.clone();
            changed.body[at] ^= 4;
            assert!(Succession::verify(&changed).is_err(), "byte {at}");
        }
        let swapped = SignedSuccession {
            former_signature: signed.next_signature.clone(),
            next_signature: signed.former_signature.clone(),
            body: signed.body.clone(),
        };
        let refused = Err(SuccessionError::Signature("former"));
        assert_eq!(Succession::verify(&swapped), refused);
        // One signature is not enough: neither the old root alone nor the new one relates them.
        let half = SignedSuccession {
            next_signature: Vec::new(),
            ..signed.clone()
        };
        let refused = Err(SuccessionError::Signature("next"));
        assert_eq!(Succession::verify(&half), refused);
        let long = SignedSuccession {
            body: vec![0; LONGEST_SUCCESSION],
            ..signed
        };
        assert!(matches!(
            Succession::verify(&long),
            Err(SuccessionError::Encoding(_))
        ));
        assert!(Succession::verify(&SignedSuccession::default()).is_err());
    }
}
