//! Proofs of possession: a node shows that it holds the key of its identity.

use mesh_proto::IdentityProof;
use sha2::{Digest, Sha256};

use crate::key::{ALGORITHM, IdentityKey, NodeId, PublicKey};

/// The text that a proof signs. All of it is known to both ends of a TLS session, and the session's exported key makes
/// a proof worthless elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct Transcript<'a> {
    /// The request that the proof belongs to.
    pub purpose: Purpose,
    /// Key that only the two ends of the TLS session can compute (RFC 8446, section 7.5).
    pub session: &'a [u8; 32],
    /// SHA-256 of the mesh root's certificate.
    pub root: &'a [u8; 32],
    /// Certificate request (PKCS#10, DER).
    pub request: &'a [u8],
    /// Public part of the join token; empty for a renewal.
    pub token: &'a str,
    /// Name that the node asks for; empty for a renewal.
    pub name: &'a str,
    /// The identity that is to take the place of this one, if the key is rotated.
    pub successor: Option<NodeId>,
    /// Evidence that the proof vouches for: the encoded `mesh_proto::Evidence`. Such a proof is one of its own, beside that of
    /// possession, which older heads expect without evidence.
    pub evidence: Option<&'a [u8]>,
}

/// Requests with a proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A node joins.
    Join,
    /// A member renews its certificate.
    Renew,
    /// A member reports on a link.
    Report,
}

/// Reasons for not accepting a proof.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProofError {
    /// A signature algorithm of a later version.
    #[error(
        "the identity has a key of algorithm {0}, and this version knows ML-DSA-65 ({ALGORITHM}) only; update the head"
    )]
    Algorithm(u32),
    /// The public key is malformed.
    #[error("the identity's public key is malformed: {0}")]
    Key(String),
    /// The signature does not fit.
    #[error(
        "the signature of identity {0} does not fit this connection: the node does not hold that key, or the connection was relayed"
    )]
    Signature(NodeId),
}

impl Transcript<'_> {
    /// Signs the transcript with a node's key.
    pub fn prove(&self, key: &IdentityKey) -> IdentityProof {
        IdentityProof {
            algorithm: ALGORITHM,
            public_key: key.public().as_bytes().to_vec(),
            signature: key.sign(CONTEXT, &self.message(key.node_id())),
        }
    }

    /// The key that a proof shows possession of.
    ///
    /// # Errors
    /// If the proof does not fit this transcript.
    pub fn verify(&self, proof: &IdentityProof) -> Result<PublicKey, ProofError> {
        if proof.algorithm != ALGORITHM {
            return Err(ProofError::Algorithm(proof.algorithm));
        }
        let key = PublicKey::from_bytes(&proof.public_key)
            .map_err(|error| ProofError::Key(error.to_string()))?;
        let message = self.message(key.node_id());
        match key.verifies(CONTEXT, &message, &proof.signature) {
            true => Ok(key),
            false => Err(ProofError::Signature(key.node_id())),
        }
    }

    /// Digest of the text that this node's proof signs. A quote of its TPM has it as its qualifying data.
    pub fn quoted_digest(&self, node: NodeId) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(QUOTE_CONTEXT);
        hash.update(self.message(node));
        hash.finalize().into()
    }

    /// Parts of variable length are hashed, so that no part can reach into the next.
    fn message(&self, node: NodeId) -> Vec<u8> {
        let purpose = match self.purpose {
            Purpose::Join => 1,
            Purpose::Renew => 2,
            Purpose::Report => 3,
        };
        let parts = u8::from(self.successor.is_some()) | u8::from(self.evidence.is_some()) << 1;
        let mut message = vec![purpose, parts];
        message.extend_from_slice(self.session);
        message.extend_from_slice(self.root);
        for part in [self.request, self.token.as_bytes(), self.name.as_bytes()] {
            message.extend_from_slice(&Sha256::digest(part));
        }
        message.extend_from_slice(node.as_bytes());
        message.extend_from_slice(self.successor.as_ref().map_or(&[], |id| &id.as_bytes()[..]));
        if let Some(evidence) = self.evidence {
            message.extend_from_slice(&Sha256::digest(evidence));
        }
        message
    }
}

const CONTEXT: &[u8] = b"hydramesh-identity-proof-v1";
const QUOTE_CONTEXT: &[u8] = b"hydramesh-tpm-quote-v1";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SESSION: [u8; 32] = [1; 32];
    const ROOT: [u8; 32] = [2; 32];

    fn transcript() -> Transcript<'static> {
        Transcript {
            purpose: Purpose::Join,
            session: &SESSION,
            root: &ROOT,
            request: b"request",
            token: "8f0c1a7be2d43956",
            name: "attic",
            successor: None,
            evidence: None,
        }
    }

    #[test]
    fn a_proof_holds_for_its_session_mesh_and_request_alone() {
        let key = IdentityKey::generate();
        let proof = transcript().prove(&key);
        assert_eq!(transcript().verify(&proof).as_ref(), Ok(key.public()));
        let other = IdentityKey::generate().node_id();
        let others = [
            Transcript {
                purpose: Purpose::Renew,
                ..transcript()
            },
            Transcript {
                session: &ROOT,
                ..transcript()
            },
            Transcript {
                root: &SESSION,
                ..transcript()
            },
            Transcript {
                request: b"requests",
                ..transcript()
            },
            Transcript {
                token: "",
                ..transcript()
            },
            Transcript {
                name: "barn",
                ..transcript()
            },
            Transcript {
                token: "8f0c1a7be2d43956a",
                name: "ttic",
                ..transcript()
            },
            Transcript {
                successor: Some(other),
                ..transcript()
            },
            Transcript {
                evidence: Some(b""),
                ..transcript()
            },
            Transcript {
                purpose: Purpose::Report,
                ..transcript()
            },
        ];
        for other in others {
            let refused = other.verify(&proof);
            assert_eq!(
                refused,
                Err(ProofError::Signature(key.node_id())),
                "{other:?}"
            );
        }
        let mut renamed = proof.clone();
        renamed.public_key = IdentityKey::generate().public().as_bytes().to_vec();
        assert!(matches!(
            transcript().verify(&renamed),
            Err(ProofError::Signature(_))
        ));
        let later = IdentityProof {
            algorithm: 2,
            ..proof.clone()
        };
        assert_eq!(transcript().verify(&later), Err(ProofError::Algorithm(2)));
        let short = IdentityProof {
            public_key: vec![0; 32],
            ..proof
        };
        assert!(matches!(
            transcript().verify(&short),
            Err(ProofError::Key(_))
        ));
    }

    #[test]
    fn evidence_is_vouched_for_by_its_node_in_its_session_and_no_byte_of_it_can_change() {
        let key = IdentityKey::generate();
        let evidence = b"kernel 6.12, nixos".to_vec();
        fn vouching(evidence: &[u8]) -> Transcript<'_> {
            Transcript {
                purpose: Purpose::Report,
                evidence: Some(evidence),
                ..transcript()
            }
        }
        let proof = vouching(&evidence).prove(&key);
        assert_eq!(
            vouching(&evidence).verify(&proof).as_ref(),
            Ok(key.public())
        );
        for at in 0..evidence.len() {
            let mut changed = evidence.clone();
            changed[at] ^= 1;
            assert!(vouching(&changed).verify(&proof).is_err(), "byte {at}");
        }
        let elsewhere = Transcript {
            session: &ROOT,
            ..vouching(&evidence)
        };
        assert!(elsewhere.verify(&proof).is_err(), "another session");
        assert!(
            transcript().verify(&proof).is_err(),
            "no proof of possession alone"
        );
        let successor = Transcript {
            successor: Some(key.node_id()),
            evidence: None,
            ..vouching(&evidence)
        };
        assert!(
            successor.verify(&proof).is_err(),
            "a digest does not pass for an id"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn no_change_of_a_proof_verifies(at: prop::sample::Index, bit in 0..8u8, in_key: bool) {
            let key = IdentityKey::from_seed(&[9; 32]);
            let mut proof = transcript().prove(&key);
            let part = if in_key { &mut proof.public_key } else { &mut proof.signature };
            let at = at.index(part.len());
            part[at] ^= 1 << bit;
            prop_assert!(transcript().verify(&proof).is_err());
        }
    }
}
