//! Identity documents: the mesh root's signed statements about its nodes.

use mesh_proto::{IdentityDocument, SignedIdentity};
use prost::Message as _;

use crate::key::{ALGORITHM, IdentityKey, NodeId, PublicKey};

/// The mesh root's statement that a node with this key is a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The node's key; its id follows from it.
    pub key: PublicKey,
    /// Name of the node in its mesh.
    pub name: String,
    /// Role of the node, as certificates name it.
    pub role: String,
    /// Name of the mesh.
    pub mesh: String,
    /// SHA-256 of the mesh root's certificate.
    pub root: [u8; 32],
    /// Start of the validity, seconds since the Unix epoch.
    pub not_before: u64,
    /// End of the validity, seconds since the Unix epoch.
    pub not_after: u64,
}

/// Reasons for not accepting a document.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DocumentError {
    /// It is too long to be one.
    #[error("it has {0} bytes, and a document has at most {LONGEST_DOCUMENT}")]
    Length(usize),
    /// The bytes around the signed part cannot be read.
    #[error("it cannot be read: {0}")]
    Encoding(String),
    /// The signature is not the mesh root's.
    #[error(
        "its signature is not that of the mesh root {0}: it was altered, or is of another mesh"
    )]
    Signature(NodeId),
    /// The root has signed a document that this version does not understand.
    #[error(
        "the mesh root has signed a document that this version cannot use: {0}; update this node"
    )]
    Content(String),
}

impl Document {
    /// Id of the node.
    pub fn node_id(&self) -> NodeId {
        self.key.node_id()
    }

    /// The document with the signature of the mesh root's ML-DSA key.
    pub fn sign(&self, root: &IdentityKey) -> Vec<u8> {
        let body = IdentityDocument {
            version: VERSION,
            algorithm: ALGORITHM,
            public_key: self.key.as_bytes().to_vec(),
            name: self.name.clone(),
            role: self.role.clone(),
            mesh: self.mesh.clone(),
            root: self.root.to_vec(),
            not_before: self.not_before,
            not_after: self.not_after,
        };
        let body = body.encode_to_vec();
        let signature = root.sign(CONTEXT, &body);
        SignedIdentity { body, signature }.encode_to_vec()
    }

    /// Reads the output of [`sign`](Self::sign). Nothing behind the signature is parsed before it is verified. The
    /// validity is the caller's to judge.
    ///
    /// # Errors
    /// [`DocumentError`] if it is malformed in any way, or not signed by `root`.
    pub fn verify(bytes: &[u8], root: &PublicKey) -> Result<Self, DocumentError> {
        if bytes.len() > LONGEST_DOCUMENT {
            return Err(DocumentError::Length(bytes.len()));
        }
        let signed = SignedIdentity::decode(bytes)
            .map_err(|error| DocumentError::Encoding(error.to_string()))?;
        if !root.verifies(CONTEXT, &signed.body, &signed.signature) {
            return Err(DocumentError::Signature(root.node_id()));
        }
        let unfit = |reason: String| DocumentError::Content(reason);
        let body =
            IdentityDocument::decode(&signed.body[..]).map_err(|error| unfit(error.to_string()))?;
        if (body.version, body.algorithm) != (VERSION, ALGORITHM) {
            let (version, algorithm) = (body.version, body.algorithm);
            return Err(unfit(format!("version {version}, algorithm {algorithm}")));
        }
        let root = body.root.len();
        Ok(Self {
            key: PublicKey::from_bytes(&body.public_key)
                .map_err(|error| unfit(error.to_string()))?,
            name: body.name,
            role: body.role,
            mesh: body.mesh,
            root: body
                .root
                .try_into()
                .map_err(|_| unfit(format!("the digest of the root has {root} bytes")))?,
            not_before: body.not_before,
            not_after: body.not_after,
        })
    }

    /// True if `now`, seconds since the Unix epoch, is within the validity.
    pub fn is_valid_at(&self, now: u64) -> bool {
        (self.not_before..self.not_after).contains(&now)
    }
}

/// Maximum bytes of a signed document; one has some 5,500.
pub const LONGEST_DOCUMENT: usize = 16 << 10;

const VERSION: u32 = 1;
const CONTEXT: &[u8] = b"hydramesh-identity-document-v1";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn document() -> Document {
        Document {
            key: IdentityKey::from_seed(&[3; 32]).public().clone(),
            name: "attic".to_owned(),
            role: "worker".to_owned(),
            mesh: "home".to_owned(),
            root: [4; 32],
            not_before: 100,
            not_after: 200,
        }
    }

    #[test]
    fn a_document_says_what_the_root_signed() {
        let root = IdentityKey::generate();
        let bytes = document().sign(&root);
        assert!(bytes.len() < 6000, "{}", bytes.len());
        assert_eq!(Document::verify(&bytes, root.public()), Ok(document()));
        assert!(!document().is_valid_at(99) && document().is_valid_at(100));
        assert!(document().is_valid_at(199) && !document().is_valid_at(200));
        let stranger = IdentityKey::generate();
        let refused = Document::verify(&bytes, stranger.public());
        assert_eq!(refused, Err(DocumentError::Signature(stranger.node_id())));
        let long = vec![0; LONGEST_DOCUMENT + 1];
        let refused = Document::verify(&long, root.public());
        assert_eq!(refused, Err(DocumentError::Length(long.len())));
    }

    #[test]
    fn a_signed_document_of_a_later_version_is_told_of() {
        let root = IdentityKey::generate();
        let later = IdentityDocument {
            version: 2,
            ..Default::default()
        }
        .encode_to_vec();
        let signature = root.sign(CONTEXT, &later);
        let bytes = SignedIdentity {
            body: later,
            signature,
        }
        .encode_to_vec();
        let error = Document::verify(&bytes, root.public()).unwrap_err();
        assert!(error.to_string().contains("update this node"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn a_changed_document_never_verifies_as_another_one(at: prop::sample::Index, bit in 0..8u8) {
            let root = IdentityKey::from_seed(&[5; 32]);
            let mut bytes = document().sign(&root);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(Document::verify(&bytes, root.public()).is_err());
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let root = IdentityKey::from_seed(&[5; 32]);
            prop_assert!(Document::verify(&bytes, root.public()).is_err());
        }
    }
}
