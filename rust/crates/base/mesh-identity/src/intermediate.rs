//! Intermediates: keys that sign identity documents for a mesh root whose own keys are kept elsewhere.

use mesh_proto::{IntermediateStatement, SignedIntermediate};
use prost::Message as _;

use crate::document::DocumentError;
use crate::key::{ALGORITHM, IdentityKey, PublicKey};

/// The mesh root's statement that documents by this key are as good as its own, for a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Intermediate {
    /// The intermediate's key.
    pub key: PublicKey,
    /// Name of the mesh.
    pub mesh: String,
    /// SHA-256 of the mesh root's certificate.
    pub root: [u8; 32],
    /// Start of the validity, seconds since the Unix epoch. No document begins earlier.
    pub not_before: u64,
    /// End of the validity, seconds since the Unix epoch. No document ends later.
    pub not_after: u64,
}

impl Intermediate {
    /// The statement with the signature of the mesh root's ML-DSA key.
    pub fn sign(&self, root: &IdentityKey) -> SignedIntermediate {
        let body = IntermediateStatement {
            version: VERSION,
            algorithm: ALGORITHM,
            public_key: self.key.as_bytes().to_vec(),
            mesh: self.mesh.clone(),
            root: self.root.to_vec(),
            not_before: self.not_before,
            not_after: self.not_after,
        };
        let body = body.encode_to_vec();
        SignedIntermediate {
            signature: root.sign(CONTEXT, &body),
            body,
        }
    }

    /// Reads the output of [`sign`](Self::sign). The validity is the caller's to judge.
    ///
    /// # Errors
    /// If it is malformed in any way, or not signed by `root`.
    pub fn verify(signed: &SignedIntermediate, root: &PublicKey) -> Result<Self, DocumentError> {
        if !root.verifies(CONTEXT, &signed.body, &signed.signature) {
            return Err(DocumentError::Intermediate(root.node_id()));
        }
        let unfit = |reason: String| DocumentError::Content(reason);
        let body = IntermediateStatement::decode(&signed.body[..])
            .map_err(|error| unfit(error.to_string()))?;
        if (body.version, body.algorithm) != (VERSION, ALGORITHM) {
            let (version, algorithm) = (body.version, body.algorithm);
            return Err(unfit(format!(
                "intermediate of version {version}, algorithm {algorithm}"
            )));
        }
        Ok(Self {
            key: PublicKey::from_bytes(&body.public_key)
                .map_err(|error| unfit(error.to_string()))?,
            mesh: body.mesh,
            root: (body.root.try_into())
                .map_err(|_| unfit("the digest of the root has not 32 bytes".to_owned()))?,
            not_before: body.not_before,
            not_after: body.not_after,
        })
    }
}

const VERSION: u32 = 1;
const CONTEXT: &[u8] = b"hydramesh-intermediate-v1";
