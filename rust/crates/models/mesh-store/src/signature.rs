//! Signatures over manifests, by the operator's ML-DSA-65 key (FIPS 204).
//!
//! A signature is over the 32 bytes of the manifest's fingerprint, with the context string
//! `hydramesh-model-manifest-v1`. A key is named by its id, the SHA-256 of the public key's 1,952 bytes. Key
//! files are PEM: PKCS#8 holding the seed (RFC 9881), and SubjectPublicKeyInfo.

use std::fmt;
use std::fs::{OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ml_dsa::{Generate, Keypair, MlDsa65};
use pkcs8::{DecodePrivateKey, DecodePublicKey, EncodePrivateKey, EncodePublicKey, LineEnding};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::digest::Digest;
use crate::files;
use crate::manifest::{MAX_MANIFEST, Manifest, ManifestError};

/// Bytes of a signature.
const SIGNATURE_BYTES: usize = 3309;

/// Context of the signature, so that signatures for other purposes do not verify.
const CONTEXT: &[u8] = b"hydramesh-model-manifest-v1";

/// Most signatures that one manifest may carry.
pub const MAX_SIGNATURES: usize = 16;

/// Longest key file that is read.
const MAX_KEY_FILE: u64 = 64 << 10;

/// Errors of signatures and keys.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum SignatureError {
    /// A key file cannot be read or written.
    #[error("cannot {action} the key {}: {source}", path.display())]
    KeyFile {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    /// A secret that others can read.
    #[error("the key {} can be read by others (mode {mode:o}): `chmod 600` it, or make a new one if it may have been seen", path.display())]
    KeyExposed { path: PathBuf, mode: u32 },
    /// The file does not hold a key of this kind.
    #[error("{} holds no ML-DSA-65 {kind} key in PEM: {reason}; `hydramesh models key` makes one", path.display())]
    NotAKey {
        path: PathBuf,
        /// `private` or `public`.
        kind: &'static str,
        reason: String,
    },
    /// Signatures in another form than they should have.
    #[error("the signatures are malformed: {reason}")]
    Malformed { reason: String },
    /// The signature of a trusted key that does not fit the manifest.
    #[error("the signature of key {} does not fit the manifest of {model:?} ({}): the signature or the manifest was altered", key.short(), fingerprint.short())]
    Bad {
        model: String,
        fingerprint: Digest,
        key: Digest,
    },
    /// No signature where one is required.
    #[error("the manifest of {model:?} ({}) has no signature of a trusted key, which this mesh requires (it trusts {trusted}): sign it with `hydramesh models sign`", fingerprint.short())]
    Unsigned {
        model: String,
        fingerprint: Digest,
        /// The keys that would do.
        trusted: String,
    },
    /// Signatures are required, and no key is trusted.
    #[error("signatures are required, but no key is trusted: name the operator's public key, too")]
    NoTrustedKey,
    /// The signed bytes are not a valid manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}

/// The operator's secret. Neither printed nor logged; wiped from memory when dropped.
pub struct SigningKey(ml_dsa::SigningKey<MlDsa65>);

/// The public half of a [`SigningKey`], for checking signatures.
#[derive(Clone)]
pub struct PublicKey {
    key: ml_dsa::VerifyingKey<MlDsa65>,
    id: Digest,
}

/// A signature over a manifest's fingerprint.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signature {
    /// Id of the key.
    pub key: Digest,
    #[serde(with = "hex")]
    bytes: Vec<u8>,
}

/// A manifest with its signatures, possibly none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignedManifest {
    /// Manifest that the signatures are over.
    pub manifest: Manifest,
    /// Signatures, at most one of each key.
    pub signatures: Vec<Signature>,
}

/// Requirements of a mesh on signatures.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    trusted: Vec<PublicKey>,
    require: bool,
}

/// Outcome of a policy's check of an acceptable manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Signed by this trusted key.
    Signed {
        /// Id of the key.
        key: Digest,
    },
    /// Signed, but not by a trusted key.
    Stranger,
    /// Without signatures.
    Unsigned,
}

impl SigningKey {
    /// A new key, of the system's randomness.
    pub fn generate() -> Self {
        SigningKey(ml_dsa::SigningKey::generate())
    }

    /// Reads a key file.
    ///
    /// # Errors
    /// If it cannot be read, others can read it, or it holds no such key.
    pub fn read(path: &Path) -> Result<Self, SignatureError> {
        let pem = Zeroizing::new(read_key(path)?);
        let mode = std::fs::metadata(path).map_err(key_file("read", path))?;
        let mode = mode.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(SignatureError::KeyExposed {
                path: path.into(),
                mode,
            });
        }
        ml_dsa::SigningKey::from_pkcs8_pem(&pem)
            .map(SigningKey)
            .map_err(|error| not_a_key(path, "private", error))
    }

    /// Writes the key to a new file that only its owner can read.
    ///
    /// # Errors
    /// If the file exists or cannot be written.
    pub fn write_new(&self, path: &Path) -> Result<(), SignatureError> {
        let pem = self.0.to_pkcs8_pem(LineEnding::LF);
        let pem = pem.expect("a seed of 32 bytes can be encoded");
        write_new(path, pem.as_bytes(), 0o600)
    }

    /// The public half of this key.
    pub fn public(&self) -> PublicKey {
        PublicKey::new(self.0.verifying_key().clone())
    }

    /// Signs a manifest's fingerprint.
    pub fn sign(&self, manifest: &Manifest) -> Signature {
        let (key, signed) = (self.0.expanded_key(), manifest.fingerprint());
        let signature = key.sign_deterministic(signed.as_bytes(), CONTEXT);
        let signature = signature.expect("the context is short");
        Signature {
            key: self.public().id,
            bytes: signature.encode().to_vec(),
        }
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SigningKey").finish_non_exhaustive()
    }
}

impl PublicKey {
    fn new(key: ml_dsa::VerifyingKey<MlDsa65>) -> Self {
        let id = Digest::of(key.encode());
        PublicKey { key, id }
    }

    /// Reads a file with a public key.
    ///
    /// # Errors
    /// If it cannot be read, or holds no such key.
    pub fn read(path: &Path) -> Result<Self, SignatureError> {
        let pem = read_key(path)?;
        ml_dsa::VerifyingKey::from_public_key_pem(&pem)
            .map(PublicKey::new)
            .map_err(|error| not_a_key(path, "public", error))
    }

    /// Writes the key to a new file that everyone can read.
    ///
    /// # Errors
    /// If the file exists or cannot be written.
    pub fn write_new(&self, path: &Path) -> Result<(), SignatureError> {
        let pem = self.key.to_public_key_pem(LineEnding::LF);
        let pem = pem.expect("a key of fixed length can be encoded");
        write_new(path, pem.as_bytes(), 0o644)
    }

    /// SHA-256 of the key.
    pub fn id(&self) -> Digest {
        self.id
    }

    /// True if `signature` was made with this key for the model with this fingerprint.
    pub fn verifies(&self, fingerprint: &Digest, signature: &Signature) -> bool {
        let signed = fingerprint.as_bytes();
        let decoded = ml_dsa::Signature::<MlDsa65>::try_from(&signature.bytes[..]);
        signature.key == self.id
            && decoded.is_ok_and(|decoded| self.key.verify_with_context(signed, CONTEXT, &decoded))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PublicKey").field(&self.id).finish()
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signature")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

impl SignedManifest {
    /// A manifest without signatures.
    pub fn unsigned(manifest: Manifest) -> Self {
        SignedManifest {
            manifest,
            signatures: Vec::new(),
        }
    }

    /// Adds a signature; an older one of the same key goes.
    pub fn add(&mut self, signature: Signature) {
        self.signatures.retain(|held| held.key != signature.key);
        self.signatures.push(signature);
    }

    /// Encodes it for the network: the manifest's canonical form and the signatures, as JSON without spaces.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("numbers, texts and lists are JSON")
    }

    /// Parses the output of [`SignedManifest::to_bytes`]; the bytes may come from anywhere. The signatures
    /// are not checked; a [`Policy`] does that.
    ///
    /// # Errors
    /// If it is malformed in any way.
    pub fn parse(bytes: &[u8]) -> Result<Self, SignatureError> {
        let limit = MAX_MANIFEST + MAX_SIGNATURES * 3 * SIGNATURE_BYTES;
        if bytes.len() > limit {
            return Err(ManifestError::TooLong { bytes: bytes.len() }.into());
        }
        let signed: SignedManifest = parse_json(bytes)?;
        signed.manifest.check()?;
        check_signatures(&signed.signatures)?;
        if signed.to_bytes() != bytes {
            return Err(ManifestError::NotCanonical.into());
        }
        Ok(signed)
    }

    /// The signatures alone, as the store keeps them.
    pub(crate) fn signatures_to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(&self.signatures).expect("texts are JSON")
    }

    pub(crate) fn parse_signatures(bytes: &[u8]) -> Result<Vec<Signature>, SignatureError> {
        let signatures: Vec<Signature> = parse_json(bytes)?;
        check_signatures(&signatures)?;
        Ok(signatures)
    }
}

fn parse_json<'de, T: Deserialize<'de>>(bytes: &'de [u8]) -> Result<T, SignatureError> {
    serde_json::from_slice(bytes).map_err(|error| SignatureError::Malformed {
        reason: error.to_string(),
    })
}

fn check_signatures(signatures: &[Signature]) -> Result<(), SignatureError> {
    let failed = |reason: &str| {
        let reason = reason.into();
        Err(SignatureError::Malformed { reason })
    };
    if signatures.len() > MAX_SIGNATURES {
        return failed("there are more than 16");
    }
    for (i, signature) in signatures.iter().enumerate() {
        if signature.bytes.len() != SIGNATURE_BYTES {
            return failed("one has another length than ML-DSA-65 gives");
        }
        let mut others = signatures[..i].iter();
        if others.any(|other| other.key == signature.key) {
            return failed("two are of the same key");
        }
    }
    Ok(())
}

impl Policy {
    /// Trusts these keys, and refuses manifests without a signature of one of them if `require` says so.
    ///
    /// # Errors
    /// If signatures are required but no key is trusted.
    pub fn new(trusted: Vec<PublicKey>, require: bool) -> Result<Self, SignatureError> {
        match require && trusted.is_empty() {
            true => Err(SignatureError::NoTrustedKey),
            false => Ok(Policy { trusted, require }),
        }
    }

    /// As [`Policy::new`], with the files of the keys.
    ///
    /// # Errors
    /// As there, and if a file holds no public key.
    pub fn from_files(trusted: &[PathBuf], require: bool) -> Result<Self, SignatureError> {
        let trusted: Result<_, _> = trusted.iter().map(|path| PublicKey::read(path)).collect();
        Self::new(trusted?, require)
    }

    /// True if the policy requires a signature.
    pub fn requires_signature(&self) -> bool {
        self.require
    }

    /// Checks a manifest before anything of it is used. A wrong signature in the name of a trusted key is
    /// refused even where none is required.
    ///
    /// # Errors
    /// If it is refused.
    pub fn check(&self, signed: &SignedManifest) -> Result<Verdict, SignatureError> {
        let fingerprint = signed.manifest.fingerprint();
        let model = || signed.manifest.name.clone();
        let mut verdict = match signed.signatures.is_empty() {
            true => Verdict::Unsigned,
            false => Verdict::Stranger,
        };
        for signature in &signed.signatures {
            let Some(key) = self.trusted.iter().find(|key| key.id == signature.key) else {
                continue;
            };
            if !key.verifies(&fingerprint, signature) {
                return Err(SignatureError::Bad {
                    model: model(),
                    fingerprint,
                    key: key.id,
                });
            }
            verdict = Verdict::Signed { key: key.id };
        }
        if self.require && !matches!(verdict, Verdict::Signed { .. }) {
            let trusted: Vec<String> = self.trusted.iter().map(|key| key.id.short()).collect();
            return Err(SignatureError::Unsigned {
                model: model(),
                fingerprint,
                trusted: trusted.join(", "),
            });
        }
        Ok(verdict)
    }
}

fn key_file(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(std::io::Error) -> SignatureError + use<> {
    let path = path.to_owned();
    move |source| SignatureError::KeyFile {
        action,
        path,
        source,
    }
}

fn read_key(path: &Path) -> Result<String, SignatureError> {
    // It may come through a pipe.
    let bytes = std::fs::File::open(path)
        .and_then(|file| files::read_all(file, MAX_KEY_FILE))
        .map_err(key_file("read", path))?;
    String::from_utf8(bytes).map_err(|_| not_a_key(path, "private or public", "it is no text"))
}

fn not_a_key(path: &Path, kind: &'static str, reason: impl ToString) -> SignatureError {
    SignatureError::NotAKey {
        path: path.into(),
        kind,
        reason: reason.to_string(),
    }
}

fn write_new(path: &Path, contents: &[u8], mode: u32) -> Result<(), SignatureError> {
    let write = || {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(mode);
        let mut file = options.open(path)?;
        // The mode at creation is subject to the umask.
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(contents)?;
        file.sync_all()?;
        files::sync_parent(path)
    };
    write().map_err(key_file("write", path))
}

/// Bytes as hexadecimal digits.
mod hex {
    use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&HEXLOWER.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(d)?;
        let decoded = HEXLOWER_PERMISSIVE.decode(text.as_bytes());
        decoded.map_err(|_| D::Error::custom("a signature is hexadecimal digits"))
    }
}

#[cfg(test)]
mod tests;
