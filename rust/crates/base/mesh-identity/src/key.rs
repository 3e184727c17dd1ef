//! Keys, node ids and signatures.

use std::fmt;
use std::str::FromStr;

use data_encoding::HEXLOWER;
use mesh_base::random;
use ml_dsa::{B32, Keypair, MlDsa65};
use pkcs8::{DecodePrivateKey, EncodePrivateKey, LineEnding};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

/// Number of ML-DSA-65 in messages; successors get others.
pub const ALGORITHM: u32 = 1;
/// Name of the algorithm, for people and records.
pub const ALGORITHM_NAME: &str = "ml-dsa-65";
/// Bytes of a public key (FIPS 204, table 2).
pub const PUBLIC_KEY_BYTES: usize = 1952;
/// Bytes of a signature (FIPS 204, table 2).
pub const SIGNATURE_BYTES: usize = 3309;

/// A node's secret key. Neither printed nor logged; wiped from memory when dropped.
pub struct IdentityKey {
    key: Box<ml_dsa::SigningKey<MlDsa65>>,
    public: PublicKey,
}

/// The public half of an [`IdentityKey`].
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    bytes: Box<[u8; PUBLIC_KEY_BYTES]>,
    node_id: NodeId,
}

/// SHA-256 of a public key. Its text is 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId([u8; 32]);

/// A text or bytes that hold no key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The text is not a private key in PEM.
    #[error("it holds no ML-DSA-65 private key (PEM, PKCS#8 with a seed): {0}")]
    Pem(String),
    /// The bytes are not a public key.
    #[error("a public key of ML-DSA-65 has {PUBLIC_KEY_BYTES} bytes, and these are {0}")]
    Length(usize),
}

/// A text that is not a node id.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a node id is 64 hexadecimal digits, and {0:?} is not")]
pub struct NodeIdError(String);

impl IdentityKey {
    /// A new key, of the system's randomness.
    pub fn generate() -> Self {
        let seed = Zeroizing::new(random::bytes());
        Self::from_seed(&seed)
    }

    /// The key of a seed (FIPS 204, algorithm 6).
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self::new(ml_dsa::SigningKey::from_seed(&B32::from(*seed)))
    }

    /// Reads a private key in PEM (PKCS#8 with a seed, RFC 9881); the first block of the text counts.
    ///
    /// # Errors
    /// If it is not such a key.
    pub fn from_pem(text: &str) -> Result<Self, KeyError> {
        let key = ml_dsa::SigningKey::from_pkcs8_pem(text);
        key.map(Self::new)
            .map_err(|error| KeyError::Pem(error.to_string()))
    }

    fn new(key: ml_dsa::SigningKey<MlDsa65>) -> Self {
        let encoded = key.verifying_key().encode();
        let public = PublicKey::from_bytes(&encoded).expect("it has the length of a key");
        Self {
            key: Box::new(key),
            public,
        }
    }

    /// The key in PEM, as [`from_pem`](Self::from_pem) reads it.
    pub fn to_pem(&self) -> Zeroizing<String> {
        let pem = self.key.to_pkcs8_pem(LineEnding::LF);
        pem.expect("a seed of 32 bytes can be encoded")
    }

    /// The public half of this key.
    pub fn public(&self) -> &PublicKey {
        &self.public
    }

    /// Id of the node with this key.
    pub fn node_id(&self) -> NodeId {
        self.public.node_id
    }

    /// Signs a message under a context string of at most 255 bytes (FIPS 204, algorithm 2, hedged).
    pub fn sign(&self, context: &'static [u8], message: &[u8]) -> Vec<u8> {
        let random = Zeroizing::new(random::bytes::<32>());
        let length = u8::try_from(context.len()).expect("contexts are short constants");
        let parts: [&[u8]; 3] = [&[0, length], context, message];
        let key = self.key.expanded_key();
        let signature = key.sign_internal(&parts, &B32::from(*random));
        signature.encode().to_vec()
    }
}

impl fmt::Debug for IdentityKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdentityKey")
            .field("node_id", &self.node_id())
            .finish_non_exhaustive()
    }
}

impl PublicKey {
    /// Reads a public key as FIPS 204 encodes it. Every text of the right length is a key.
    ///
    /// # Errors
    /// If it has another length.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, KeyError> {
        let fixed: [u8; PUBLIC_KEY_BYTES] = bytes
            .try_into()
            .map_err(|_| KeyError::Length(bytes.len()))?;
        Ok(Self {
            node_id: NodeId(Sha256::digest(fixed).into()),
            bytes: Box::new(fixed),
        })
    }

    /// The key as FIPS 204 encodes it.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.as_slice()
    }

    /// Id of the node with this key.
    pub fn node_id(&self) -> NodeId {
        self.node_id
    }

    /// True if `signature` was made with this key for this context and message.
    pub fn verifies(&self, context: &[u8], message: &[u8], signature: &[u8]) -> bool {
        self.expand().verifies(context, message, signature)
    }

    /// The key prepared for many verifications, each of which then takes about half of the time.
    pub fn expand(&self) -> ExpandedKey {
        let encoded = ml_dsa::EncodedVerifyingKey::<MlDsa65>::try_from(self.as_bytes());
        let encoded = encoded.expect("it has the length of a key");
        ExpandedKey(ml_dsa::VerifyingKey::decode(&encoded))
    }
}

/// A [`PublicKey`] with everything that follows from it computed: about 40 kB.
pub struct ExpandedKey(ml_dsa::VerifyingKey<MlDsa65>);

impl ExpandedKey {
    /// As [`PublicKey::verifies`].
    pub fn verifies(&self, context: &[u8], message: &[u8], signature: &[u8]) -> bool {
        let signature = ml_dsa::Signature::<MlDsa65>::try_from(signature);
        signature.is_ok_and(|signature| self.0.verify_with_context(message, context, &signature))
    }
}

impl fmt::Debug for ExpandedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ExpandedKey")
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PublicKey").field(&self.node_id).finish()
    }
}

impl From<[u8; 32]> for NodeId {
    /// The id with this digest, for example from a message. It may be the id of nobody.
    fn from(digest: [u8; 32]) -> Self {
        Self(digest)
    }
}

impl NodeId {
    /// The digest.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for NodeId {
    type Err = NodeIdError;

    fn from_str(text: &str) -> Result<Self, NodeIdError> {
        let failed = || NodeIdError(text.chars().take(80).collect());
        let bytes = HEXLOWER.decode(text.as_bytes()).map_err(|_| failed())?;
        Ok(NodeId(bytes.try_into().map_err(|_| failed())?))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_key_survives_its_text_and_shows_no_secret() {
        let key = IdentityKey::generate();
        let again = IdentityKey::from_pem(&key.to_pem()).unwrap();
        assert_eq!(again.public(), key.public());
        let signature = again.sign(b"test", b"message");
        assert_eq!(signature.len(), SIGNATURE_BYTES);
        assert!(key.public().verifies(b"test", b"message", &signature));
        assert!(!key.public().verifies(b"other", b"message", &signature));
        assert!(!key.public().verifies(b"test", b"messages", &signature));
        let other = IdentityKey::generate();
        assert!(!other.public().verifies(b"test", b"message", &signature));
        assert_ne!(signature, key.sign(b"test", b"message"), "hedged");
        let shown = format!("{key:?}");
        assert!(shown.contains(&key.node_id().to_string()) && shown.len() < 120);
        for junk in [
            "",
            "hello",
            "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        ] {
            assert!(IdentityKey::from_pem(junk).is_err(), "{junk:?}");
        }
    }

    #[test]
    fn a_node_id_is_the_digest_of_the_key() {
        let key = IdentityKey::from_seed(&[7; 32]);
        let id = key.node_id();
        assert_eq!(
            id.as_bytes()[..],
            Sha256::digest(key.public().as_bytes())[..]
        );
        assert_eq!(id.to_string().parse(), Ok(id));
        for junk in ["", "00", &"g".repeat(64), &"0".repeat(66)] {
            assert!(junk.parse::<NodeId>().is_err(), "{junk:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn no_bytes_pass_for_a_signature_or_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4000), fill: u8) {
            let key = IdentityKey::from_seed(&[7; 32]);
            prop_assert!(!key.public().verifies(b"test", b"message", &bytes));
            prop_assert!(!key.public().verifies(b"test", b"message", &[fill; SIGNATURE_BYTES]));
            let read = PublicKey::from_bytes(&bytes);
            prop_assert_eq!(read.is_ok(), bytes.len() == PUBLIC_KEY_BYTES);
        }

        #[test]
        fn any_flipped_bit_of_a_signature_is_noticed(at in 0..SIGNATURE_BYTES * 8) {
            let key = IdentityKey::from_seed(&[7; 32]);
            let mut signature = key.sign(b"test", b"message");
            signature[at / 8] ^= 1 << (at % 8);
            prop_assert!(!key.public().verifies(b"test", b"message", &signature));
        }
    }
}
