//! Keys of a trail: ML-DSA-44 for checkpoints, SLH-DSA-SHA2-128f for the roots of epochs.

use std::fmt;

use data_encoding::{BASE64, HEXLOWER};
use mesh_base::random;
use ml_dsa::{B32, Keypair, MlDsa44};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use slh_dsa::Sha2_128f;
use zeroize::{Zeroize, Zeroizing};

/// Kinds of keys that sign notes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// ML-DSA-44 cosignatures of C2SP's tlog-cosignature, signature type 0x06.
    MlDsa44,
    /// SLH-DSA-SHA2-128f over the text of a note, with the context `hydramesh audit epoch`. C2SP assigns no
    /// type, so it is 0xff with a name.
    SlhDsa,
}

impl KeyKind {
    /// The type as it goes into key ids and verifier keys.
    fn prefix(self) -> &'static [u8] {
        match self {
            Self::MlDsa44 => &[0x06],
            Self::SlhDsa => b"\xffhydramesh-slh-dsa-sha2-128f",
        }
    }

    fn key_bytes(self) -> usize {
        match self {
            Self::MlDsa44 => 1312,
            Self::SlhDsa => 32,
        }
    }
}

/// A public key under the name with which it signs: a verifier key of C2SP's signed notes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vkey {
    name: String,
    kind: KeyKind,
    key: Vec<u8>,
}

/// A text that is not a verifier key of a known kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{shown:?} is not a verifier key (NAME+ID+KEY) of ML-DSA-44 or SLH-DSA-SHA2-128f: {reason}"
)]
pub struct VkeyError {
    shown: String,
    reason: &'static str,
}

impl Vkey {
    /// A key under this name.
    ///
    /// # Panics
    /// If the name does not satisfy [`is_key_name`], or the key has another length than its kind.
    pub fn new(name: &str, kind: KeyKind, key: &[u8]) -> Self {
        assert!(is_key_name(name), "{name:?}");
        assert_eq!(key.len(), kind.key_bytes());
        Self {
            name: name.to_owned(),
            kind,
            key: key.to_vec(),
        }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The kind.
    pub fn kind(&self) -> KeyKind {
        self.kind
    }

    /// The first four bytes of SHA-256 over name, type and key.
    pub fn id(&self) -> [u8; 4] {
        let mut hasher = Sha256::new();
        hasher.update(&self.name);
        hasher.update(b"\n");
        hasher.update(self.kind.prefix());
        hasher.update(&self.key);
        let hash: [u8; 32] = hasher.finalize().into();
        [hash[0], hash[1], hash[2], hash[3]]
    }

    /// Reads `NAME+ID+KEY`.
    ///
    /// # Errors
    /// If it is not such a key, or of an unknown kind.
    pub fn parse(text: &str) -> Result<Self, VkeyError> {
        let failed = |reason| VkeyError {
            shown: text.chars().take(60).collect(),
            reason,
        };
        let mut parts = text.splitn(3, '+');
        let (Some(name), Some(id), Some(key)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(failed("it has no three parts"));
        };
        if !is_key_name(name) {
            return Err(failed("its name is empty, too long or has spaces"));
        }
        let bytes = BASE64.decode(key.as_bytes());
        let bytes = bytes.map_err(|_| failed("its key is not base64"))?;
        let mut kinds = [KeyKind::MlDsa44, KeyKind::SlhDsa].into_iter();
        let kind = kinds.find(|kind| {
            bytes.starts_with(kind.prefix())
                && bytes.len() == kind.prefix().len() + kind.key_bytes()
        });
        let kind = kind.ok_or_else(|| failed("its type or length is unknown"))?;
        let found = Self::new(name, kind, &bytes[kind.prefix().len()..]);
        if id != HEXLOWER.encode(&found.id()) {
            return Err(failed("its id is not that of its name and key"));
        }
        Ok(found)
    }

    /// True if `signature`, as it stands in a note behind the key's id, was made with this key over the
    /// message.
    pub(crate) fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        match self.kind {
            KeyKind::MlDsa44 => verify_ml_dsa(&self.key, message, signature),
            KeyKind::SlhDsa => verify_slh_dsa(&self.key, message, signature),
        }
    }
}

impl fmt::Display for Vkey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = [self.kind.prefix(), &self.key].concat();
        let id = HEXLOWER.encode(&self.id());
        write!(f, "{}+{id}+{}", self.name, BASE64.encode(&key))
    }
}

fn verify_ml_dsa(key: &[u8], message: &[u8], signature: &[u8]) -> bool {
    let key = ml_dsa::EncodedVerifyingKey::<MlDsa44>::try_from(key);
    let signature = ml_dsa::Signature::<MlDsa44>::try_from(signature);
    let (Ok(key), Ok(signature)) = (key, signature) else {
        return false;
    };
    ml_dsa::VerifyingKey::decode(&key).verify_with_context(message, &[], &signature)
}

fn verify_slh_dsa(key: &[u8], message: &[u8], signature: &[u8]) -> bool {
    let key = slh_dsa::VerifyingKey::<Sha2_128f>::try_from(key);
    let signature = slh_dsa::Signature::<Sha2_128f>::try_from(signature);
    let (Ok(key), Ok(signature)) = (key, signature) else {
        return false;
    };
    let verified = key.try_verify_with_context(message, EPOCH_CONTEXT, &signature);
    verified.is_ok()
}

/// True for names under which keys may sign: 1 to 255 bytes without spaces, control characters and plus.
pub fn is_key_name(name: &str) -> bool {
    let plain = |c: char| !c.is_whitespace() && !c.is_control() && c != '+';
    (1..=255).contains(&name.len()) && name.chars().all(plain)
}

/// The secret keys of a node's trails. Neither printed nor logged; wiped from memory when dropped.
pub struct TrailKeys {
    seeds: Seeds,
    log: Box<ml_dsa::SigningKey<MlDsa44>>,
    epochs: slh_dsa::SigningKey<Sha2_128f>,
}

/// Contents of the file with the keys.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Seeds {
    /// 32 bytes, in hexadecimal digits.
    ml_dsa_44: String,
    /// 16 bytes each of SK.seed, SK.prf and PK.seed.
    slh_dsa_sha2_128f: String,
}

impl Drop for Seeds {
    fn drop(&mut self) {
        self.ml_dsa_44.zeroize();
        self.slh_dsa_sha2_128f.zeroize();
    }
}

/// A file that holds no keys of a trail.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("it does not hold the keys of an audit trail: {0}")]
pub struct KeysError(String);

impl fmt::Debug for TrailKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrailKeys").finish_non_exhaustive()
    }
}

impl TrailKeys {
    /// New keys, of the system's randomness.
    pub fn generate() -> Self {
        let log = Zeroizing::new(random::bytes::<32>());
        let epochs = Zeroizing::new(random::bytes::<48>());
        Self::from_seeds(&log, &epochs)
    }

    /// The keys of these seeds (FIPS 204, algorithm 6; FIPS 205, algorithm 18).
    pub fn from_seeds(log: &[u8; 32], epochs: &[u8; 48]) -> Self {
        let parts = (&epochs[..16], &epochs[16..32], &epochs[32..]);
        Self {
            seeds: Seeds {
                ml_dsa_44: HEXLOWER.encode(log),
                slh_dsa_sha2_128f: HEXLOWER.encode(epochs),
            },
            log: Box::new(ml_dsa::SigningKey::from_seed(&B32::from(*log))),
            epochs: slh_dsa::SigningKey::slh_keygen_internal(parts.0, parts.1, parts.2),
        }
    }

    /// Reads keys as [`to_text`](Self::to_text) writes them.
    ///
    /// # Errors
    /// If the text holds none.
    pub fn from_text(text: &str) -> Result<Self, KeysError> {
        let seeds: Seeds =
            serde_json::from_str(text).map_err(|error| KeysError(error.to_string()))?;
        let log = secret::<32>(&seeds.ml_dsa_44)?;
        let epochs = secret::<48>(&seeds.slh_dsa_sha2_128f)?;
        Ok(Self::from_seeds(&log, &epochs))
    }

    /// The secrets as text.
    pub fn to_text(&self) -> Zeroizing<String> {
        let text = serde_json::to_string(&self.seeds).expect("two strings are JSON");
        Zeroizing::new(text + "\n")
    }

    /// The key that signs checkpoints, under this name.
    pub fn log_vkey(&self, name: &str) -> Vkey {
        Vkey::new(name, KeyKind::MlDsa44, &self.log.verifying_key().encode())
    }

    /// The key that signs the roots of epochs, under this name.
    pub fn epoch_vkey(&self, name: &str) -> Vkey {
        let key = slh_dsa::signature::Keypair::verifying_key(&self.epochs);
        Vkey::new(name, KeyKind::SlhDsa, &key.to_bytes())
    }

    /// Signs with ML-DSA-44 without a context, hedged (FIPS 204, algorithm 2): 2,420 bytes.
    pub(crate) fn sign_ml_dsa(&self, message: &[u8]) -> Vec<u8> {
        let random = Zeroizing::new(random::bytes::<32>());
        let key = self.log.expanded_key();
        let signature = key.sign_internal(&[&[0, 0], message], &B32::from(*random));
        signature.encode().to_vec()
    }

    /// Signs with SLH-DSA-SHA2-128f, hedged (FIPS 205, algorithm 22): 17,088 bytes.
    pub(crate) fn sign_slh_dsa(&self, message: &[u8]) -> Vec<u8> {
        let random = random::bytes::<16>();
        let signed = self
            .epochs
            .try_sign_with_context(message, EPOCH_CONTEXT, Some(&random));
        signed.expect("the context is short").to_vec()
    }
}

fn secret<const N: usize>(text: &str) -> Result<Zeroizing<[u8; N]>, KeysError> {
    let bytes = HEXLOWER.decode(text.as_bytes()).map(Zeroizing::new);
    let bytes = bytes.map_err(|error| KeysError(error.to_string()))?;
    let fixed = <[u8; N]>::try_from(&bytes[..]);
    fixed
        .map(Zeroizing::new)
        .map_err(|_| KeysError(format!("a key of {} bytes instead of {N}", bytes.len())))
}

/// The long-lived identity of the node that keeps the trail: an ML-DSA-65 key.
pub trait Identity {
    /// The public key, 1,952 bytes.
    fn public_key(&self) -> Vec<u8>;
    /// Signs a message under a context (FIPS 204, algorithm 2): 3,309 bytes.
    fn sign(&self, context: &'static [u8], message: &[u8]) -> Vec<u8>;
    /// The mesh root's document about this identity, which is kept beside the keys that it endorses. The
    /// trail does not look into it.
    fn document(&self) -> Option<Vec<u8>> {
        None
    }
}

/// Id of the node with this public key: its SHA-256.
pub fn node_id(public_key: &[u8]) -> [u8; 32] {
    Sha256::digest(public_key).into()
}

/// The public keys of a trail, as its file `keys` has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PublicKeys {
    log: String,
    epochs: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    identity: Option<Endorsement>,
}

/// An identity's statement that these keys are its trail's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Endorsement {
    /// ML-DSA-65, in base64.
    key: String,
    /// Over both verifier keys, each with a line end, under the context `hydramesh audit keys`.
    signature: String,
}

impl PublicKeys {
    /// The keys for a trail of this origin, endorsed by the node's identity if it has one.
    pub fn new(keys: &TrailKeys, origin: &str, identity: Option<&dyn Identity>) -> Self {
        let log = keys.log_vkey(origin).to_string();
        let epochs = keys.epoch_vkey(origin).to_string();
        let message = format!("{log}\n{epochs}\n");
        let identity = identity.map(|identity| Endorsement {
            key: BASE64.encode(&identity.public_key()),
            signature: BASE64.encode(&identity.sign(KEYS_CONTEXT, message.as_bytes())),
        });
        Self {
            log,
            epochs,
            identity,
        }
    }

    /// Contents of the file: one line of JSON.
    pub fn to_text(&self) -> String {
        serde_json::to_string(self).expect("strings are JSON") + "\n"
    }

    /// Reads the file, and checks the endorsement.
    ///
    /// # Errors
    /// A description of what is wrong with it.
    pub fn read(text: &str) -> Result<Self, String> {
        let read: Self = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if read.to_text() != text {
            return Err("it is not written as it is by this program".to_owned());
        }
        for key in [&read.log, &read.epochs] {
            Vkey::parse(key).map_err(|error| error.to_string())?;
        }
        if read.log().kind != KeyKind::MlDsa44 || read.epochs().kind != KeyKind::SlhDsa {
            return Err("a key is of the wrong kind".to_owned());
        }
        if read.log().name != read.epochs().name {
            return Err("its two keys have different names".to_owned());
        }
        if read.identity.is_some() && read.identity_key().is_none() {
            return Err("the identity's signature does not hold".to_owned());
        }
        Ok(read)
    }

    /// Key of checkpoints.
    pub fn log(&self) -> Vkey {
        Vkey::parse(&self.log).expect("it was read before")
    }

    /// Key of the roots of epochs.
    pub fn epochs(&self) -> Vkey {
        Vkey::parse(&self.epochs).expect("it was read before")
    }

    /// Public key of the identity that endorsed these keys, if its signature holds: ML-DSA-65, 1,952 bytes.
    pub fn identity_key(&self) -> Option<Vec<u8>> {
        let identity = self.identity.as_ref()?;
        let key = BASE64.decode(identity.key.as_bytes()).ok()?;
        let signature = BASE64.decode(identity.signature.as_bytes()).ok()?;
        let message = format!("{}\n{}\n", self.log, self.epochs);
        let encoded = ml_dsa::EncodedVerifyingKey::<ml_dsa::MlDsa65>::try_from(&key[..]).ok()?;
        let signature = ml_dsa::Signature::<ml_dsa::MlDsa65>::try_from(&signature[..]).ok()?;
        let verifier = ml_dsa::VerifyingKey::decode(&encoded);
        let holds = verifier.verify_with_context(message.as_bytes(), KEYS_CONTEXT, &signature);
        holds.then_some(key)
    }
}

const EPOCH_CONTEXT: &[u8] = b"hydramesh audit epoch";
const KEYS_CONTEXT: &[u8] = b"hydramesh audit keys";

#[cfg(test)]
mod tests {
    use ml_dsa::MlDsa65;

    use super::*;

    struct Node(ml_dsa::SigningKey<MlDsa65>);

    impl Identity for Node {
        fn public_key(&self) -> Vec<u8> {
            self.0.verifying_key().encode().to_vec()
        }

        fn sign(&self, context: &'static [u8], message: &[u8]) -> Vec<u8> {
            let signed = self.0.expanded_key().sign_deterministic(message, context);
            signed.unwrap().encode().to_vec()
        }
    }

    #[test]
    fn keys_survive_their_text_and_show_no_secret() {
        let keys = TrailKeys::from_seeds(&[7; 32], &[9; 48]);
        let text = keys.to_text();
        let again = TrailKeys::from_text(&text).unwrap();
        assert_eq!(again.log_vkey("a/b"), keys.log_vkey("a/b"));
        assert_eq!(again.epoch_vkey("a/b"), keys.epoch_vkey("a/b"));
        assert_eq!(format!("{keys:?}"), "TrailKeys { .. }");
        for junk in ["", "{}", &text.replace("07", "0"), &text.replace('0', "g")] {
            assert!(TrailKeys::from_text(junk).is_err(), "{junk:?}");
        }
    }

    #[test]
    fn a_verifier_key_is_bound_to_its_name() {
        let keys = TrailKeys::from_seeds(&[7; 32], &[9; 48]);
        for key in [keys.log_vkey("mesh/audit"), keys.epoch_vkey("mesh/audit")] {
            let text = key.to_string();
            assert_eq!(Vkey::parse(&text), Ok(key));
            assert!(Vkey::parse(&text.replace("mesh", "nest")).is_err());
            assert!(Vkey::parse(&text[..text.len() - 4]).is_err());
        }
        // The key of C2SP's example of a note; its kind is not one of a trail.
        let ed25519 = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW";
        assert!(Vkey::parse(ed25519).is_err());
        for junk in ["", "a", "a+b", "a+b+c", "a b+00000000+AAAA"] {
            assert!(Vkey::parse(junk).is_err(), "{junk:?}");
        }
    }

    #[test]
    fn an_identity_vouches_for_the_keys() {
        let keys = TrailKeys::from_seeds(&[7; 32], &[9; 48]);
        let node = Node(ml_dsa::SigningKey::from_seed(&B32::from([1; 32])));
        let public = PublicKeys::new(&keys, "mesh/audit", Some(&node));
        let text = public.to_text();
        let read = PublicKeys::read(&text).unwrap();
        assert_eq!(read.identity_key(), Some(node.public_key()));
        let other = PublicKeys::new(&keys, "mesh/other", Some(&node));
        let swapped = PublicKeys {
            identity: other.identity,
            ..public
        };
        assert!(PublicKeys::read(&swapped.to_text()).is_err());
        let plain = PublicKeys::new(&keys, "mesh/audit", None);
        assert_eq!(
            PublicKeys::read(&plain.to_text()).unwrap().identity_key(),
            None
        );
        assert!(PublicKeys::read(&text.replace(',', ", ")).is_err());
    }
}
