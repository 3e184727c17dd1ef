//! Identity documents: the mesh root's signed statements about its nodes.

use mesh_proto::{IdentityDocument, SignedIdentity, SignedIntermediate};
use prost::Message as _;

use crate::intermediate::Intermediate;
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
    /// The statement about the intermediate that signed is not the mesh root's.
    #[error(
        "the statement about the intermediate that signed it is not that of the mesh root {0}: it was altered, or is of another mesh"
    )]
    Intermediate(NodeId),
    /// The intermediate may not sign this.
    #[error("the intermediate that signed it may not: {0}")]
    Exceeds(&'static str),
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
        self.sign_by(root, None)
    }

    /// The document with the signature of an intermediate, which the root's statement is about.
    pub fn sign_by(&self, key: &IdentityKey, intermediate: Option<SignedIntermediate>) -> Vec<u8> {
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
        SignedIdentity {
            signature: key.sign(CONTEXT, &body),
            body,
            intermediate,
        }
        .encode_to_vec()
    }

    /// Reads the output of [`sign`](Self::sign) and [`sign_by`](Self::sign_by). Nothing behind the signature
    /// is parsed before it is verified. The validity is the caller's to judge.
    ///
    /// # Errors
    /// [`DocumentError`] if it is malformed in any way, or signed neither by `root` nor by an intermediate of
    /// it.
    pub fn verify(bytes: &[u8], root: &PublicKey) -> Result<Self, DocumentError> {
        if bytes.len() > LONGEST_DOCUMENT {
            return Err(DocumentError::Length(bytes.len()));
        }
        let signed = SignedIdentity::decode(bytes)
            .map_err(|error| DocumentError::Encoding(error.to_string()))?;
        let intermediate = signed.intermediate.as_ref();
        let intermediate = intermediate.map(|signed| Intermediate::verify(signed, root));
        let intermediate = intermediate.transpose()?;
        let signer = intermediate.as_ref().map_or(root, |known| &known.key);
        if !signer.verifies(CONTEXT, &signed.body, &signed.signature) {
            return Err(DocumentError::Signature(signer.node_id()));
        }
        let document = Self::read(&signed.body)?;
        match &intermediate {
            Some(intermediate) => document.within(intermediate),
            None => Ok(document),
        }
    }

    /// The document, if the intermediate may sign it.
    fn within(self, intermediate: &Intermediate) -> Result<Self, DocumentError> {
        if (&self.mesh, self.root) != (&intermediate.mesh, intermediate.root) {
            return Err(DocumentError::Exceeds("it is of another mesh"));
        }
        let valid = intermediate.not_before..=intermediate.not_after;
        if !valid.contains(&self.not_before) || !valid.contains(&self.not_after) {
            return Err(DocumentError::Exceeds(
                "the document is valid outside of its own time",
            ));
        }
        Ok(self)
    }

    /// Reads the signed part.
    fn read(body: &[u8]) -> Result<Self, DocumentError> {
        let unfit = |reason: String| DocumentError::Content(reason);
        let body = IdentityDocument::decode(body).map_err(|error| unfit(error.to_string()))?;
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

/// Maximum bytes of a signed document; one has some 5,500, and 5,500 more if an intermediate signed it.
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
            intermediate: None,
        }
        .encode_to_vec();
        let error = Document::verify(&bytes, root.public()).unwrap_err();
        assert!(error.to_string().contains("update this node"), "{error}");
    }

    #[test]
    fn an_intermediate_signs_for_its_root_its_mesh_and_its_time_alone() {
        let (root, key) = (IdentityKey::generate(), IdentityKey::generate());
        let intermediate = Intermediate {
            key: key.public().clone(),
            mesh: "home".to_owned(),
            root: [4; 32],
            not_before: 100,
            not_after: 200,
        };
        let statement = intermediate.sign(&root);
        let known = Intermediate::verify(&statement, root.public());
        assert_eq!(known.as_ref(), Ok(&intermediate));
        let signed = |document: &Document, by: &IdentityKey, statement: &SignedIntermediate| {
            let bytes = document.sign_by(by, Some(statement.clone()));
            assert!(bytes.len() < LONGEST_DOCUMENT, "{}", bytes.len());
            Document::verify(&bytes, root.public())
        };
        assert_eq!(signed(&document(), &key, &statement), Ok(document()));
        type Change = fn(&mut Document);
        let changes: [Change; 4] = [
            |document| document.mesh = "away".to_owned(),
            |document| document.root = [5; 32],
            |document| document.not_before = 99,
            |document| document.not_after = 201,
        ];
        for change in changes {
            let mut other = document();
            change(&mut other);
            let refused = signed(&other, &key, &statement);
            assert!(
                matches!(refused, Err(DocumentError::Exceeds(_))),
                "{refused:?}"
            );
        }
        // Another key than that of the statement, the root's statement altered, and a statement of somebody
        // else.
        let stranger = IdentityKey::generate();
        let refused = signed(&document(), &stranger, &statement);
        assert_eq!(refused, Err(DocumentError::Signature(key.node_id())));
        let mut altered = statement.clone();
        altered.body[10] ^= 1;
        for statement in [altered, intermediate.sign(&stranger)] {
            let refused = signed(&document(), &key, &statement);
            assert_eq!(refused, Err(DocumentError::Intermediate(root.node_id())));
        }
        // An intermediate makes no other one.
        let next = Intermediate {
            key: stranger.public().clone(),
            ..intermediate
        };
        let refused = signed(&document(), &stranger, &next.sign(&key));
        assert_eq!(refused, Err(DocumentError::Intermediate(root.node_id())));
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
