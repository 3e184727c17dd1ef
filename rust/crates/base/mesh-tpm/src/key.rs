//! The attestation key: its template at the node, its public part at the head.

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents, UnparsedPublicKey,
};
use sha2::{Digest, Sha256};
use tpm2_protocol::data::{
    Tpm2bEccParameter, TpmAlgId, TpmEccCurve, TpmRh, TpmaObject, TpmsEccParms, TpmsEccPoint,
    TpmsRsaParms, TpmsSchemeHash, TpmtEccScheme, TpmtKdfScheme, TpmtPublic, TpmtRsaScheme,
    TpmtSignature, TpmtSymDefObject, TpmuAsymScheme, TpmuPublicId, TpmuPublicParms, TpmuSignature,
    TpmuSymKeyBits, TpmuSymMode,
};
use tpm2_protocol::{TpmResult, TpmUnmarshal};

/// Algorithm of an attestation key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// ECDSA over P-256 with SHA-256.
    EcdsaP256,
    /// RSASSA-PKCS1-v1_5 with 2048 bits and SHA-256, for TPMs without elliptic curves.
    Rsa2048,
}

impl Algorithm {
    /// Its name, as it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::EcdsaP256 => "ecdsa-p256",
            Self::Rsa2048 => "rsa-2048",
        }
    }
}

/// The template from which a TPM derives the key.
pub(crate) fn template(algorithm: Algorithm) -> TpmResult<TpmtPublic> {
    let scheme = TpmuAsymScheme::Hash(TpmsSchemeHash {
        hash_alg: TpmAlgId::Sha256,
    });
    // Another template under the same seed gives another key: the label keeps this one ours.
    let label = Sha256::digest(LABEL);
    let (object_type, parameters, unique) = match algorithm {
        Algorithm::EcdsaP256 => {
            let parameters = TpmuPublicParms::Ecc(TpmsEccParms {
                symmetric: no_cipher(),
                scheme: TpmtEccScheme {
                    scheme: TpmAlgId::Ecdsa,
                    details: scheme,
                },
                curve_id: TpmEccCurve::NistP256,
                kdf: TpmtKdfScheme::default(),
            });
            let unique = TpmuPublicId::Ecc(TpmsEccPoint {
                x: Tpm2bEccParameter::try_from(&label[..])?,
                y: Tpm2bEccParameter::try_from(&[0; P256_BYTES][..])?,
            });
            (TpmAlgId::Ecc, parameters, unique)
        }
        Algorithm::Rsa2048 => {
            let parameters = TpmuPublicParms::Rsa(TpmsRsaParms {
                symmetric: no_cipher(),
                scheme: TpmtRsaScheme {
                    scheme: TpmAlgId::Rsassa,
                    details: scheme,
                },
                key_bits: RSA_BITS.into(),
                exponent: 0.into(),
            });
            let mut unique = [0; RSA_BYTES];
            unique[..label.len()].copy_from_slice(&label);
            (
                TpmAlgId::Rsa,
                parameters,
                TpmuPublicId::Rsa(unique[..].try_into()?),
            )
        }
    };
    Ok(TpmtPublic {
        object_type,
        name_alg: TpmAlgId::Sha256,
        object_attributes: TpmaObject::from_bits_truncate(ATTRIBUTES),
        auth_policy: Default::default(),
        parameters,
        unique,
    })
}

fn no_cipher() -> TpmtSymDefObject {
    TpmtSymDefObject {
        algorithm: TpmAlgId::Null,
        key_bits: TpmuSymKeyBits::Null,
        mode: TpmuSymMode::Null,
    }
}

/// The public part of an attestation key whose kind and attributes are as they have to be.
pub(crate) struct PublicKey {
    public: TpmtPublic,
    algorithm: Algorithm,
    name: [u8; NAME_BYTES],
}

impl PublicKey {
    /// Reads a TPMT_PUBLIC. The error names the part that is not as it has to be.
    pub(crate) fn read(bytes: &[u8]) -> Result<Self, &'static str> {
        let (public, rest) = TpmtPublic::unmarshal(bytes).map_err(|_| "its encoding")?;
        if !rest.is_empty() {
            return Err("its encoding");
        }
        let algorithm = match public.object_type {
            TpmAlgId::Ecc => Algorithm::EcdsaP256,
            TpmAlgId::Rsa => Algorithm::Rsa2048,
            _ => return Err("its type"),
        };
        let expected = template(algorithm).map_err(|_| "its type")?;
        let bits = public.object_attributes.bits();
        for (attribute, missing) in REQUIRED {
            if bits & attribute != attribute {
                return Err(missing);
            }
        }
        if bits != ATTRIBUTES {
            return Err("its attributes");
        }
        let alike = public.name_alg == expected.name_alg
            && public.auth_policy == expected.auth_policy
            && public.parameters == expected.parameters;
        if !alike {
            return Err("its parameters");
        }
        Ok(Self {
            public,
            algorithm,
            name: name(&[bytes]),
        })
    }

    pub(crate) fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    pub(crate) fn name(&self) -> [u8; NAME_BYTES] {
        self.name
    }

    /// True if this is the qualified name of the key, as a primary key of the endorsement or owner hierarchy.
    pub(crate) fn is_qualified(&self, qualified: &[u8]) -> bool {
        let parents = [TpmRh::Endorsement, TpmRh::Owner];
        parents
            .iter()
            .any(|parent| name(&[&parent.value().to_be_bytes(), &self.name])[..] == *qualified)
    }

    /// True if this TPMT_SIGNATURE is the key's over this message.
    pub(crate) fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        let Ok((signature, [])) = TpmtSignature::unmarshal(signature) else {
            return false;
        };
        match (&self.public.unique, signature.signature) {
            (TpmuPublicId::Ecc(point), TpmuSignature::Ecdsa(signature)) => {
                let mut key = [UNCOMPRESSED; 1 + 2 * P256_BYTES];
                let mut pair = [0; 2 * P256_BYTES];
                let parts = padded(&point.x, &mut key[1..=P256_BYTES])
                    .and(padded(&point.y, &mut key[1 + P256_BYTES..]))
                    .and(padded(&signature.signature_r, &mut pair[..P256_BYTES]))
                    .and(padded(&signature.signature_s, &mut pair[P256_BYTES..]));
                let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, key);
                signature.hash == TpmAlgId::Sha256
                    && parts.is_some()
                    && key.verify(message, &pair).is_ok()
            }
            (TpmuPublicId::Rsa(modulus), TpmuSignature::Rsassa(signature)) => {
                let key = RsaPublicKeyComponents {
                    n: &modulus[..],
                    e: &RSA_EXPONENT[..],
                };
                let parameters = &RSA_PKCS1_2048_8192_SHA256;
                signature.hash == TpmAlgId::Sha256
                    && modulus[..].len() == RSA_BYTES
                    && key.verify(parameters, message, &signature.sig).is_ok()
            }
            _ => false,
        }
    }
}

/// A number with zeros before it. Some TPMs leave them out.
fn padded(number: &[u8], into: &mut [u8]) -> Option<()> {
    let zeros = into.len().checked_sub(number.len())?;
    let (zeros, digits) = into.split_at_mut(zeros);
    zeros.fill(0);
    digits.copy_from_slice(number);
    Some(())
}

/// Name of an entity with SHA-256: the algorithm and the digest.
fn name(parts: &[&[u8]]) -> [u8; NAME_BYTES] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part);
    }
    let mut name = [0; NAME_BYTES];
    name[..2].copy_from_slice(&TpmAlgId::Sha256.value().to_be_bytes());
    name[2..].copy_from_slice(&hash.finalize());
    name
}

pub(crate) const NAME_BYTES: usize = 34;

/// Not bound to another attribute: the key needs no password, and a wrong one locks nothing.
const ATTRIBUTES: u32 = TpmaObject::FIXED_TPM.bits()
    | TpmaObject::FIXED_PARENT.bits()
    | TpmaObject::SENSITIVE_DATA_ORIGIN.bits()
    | TpmaObject::USER_WITH_AUTH.bits()
    | TpmaObject::NO_DA.bits()
    | TpmaObject::RESTRICTED.bits()
    | TpmaObject::SIGN_ENCRYPT.bits();

/// Attributes without which a signature would prove nothing of a TPM.
const REQUIRED: [(u32, &str); 5] = [
    (TpmaObject::FIXED_TPM.bits(), "its attribute fixedTPM"),
    (TpmaObject::FIXED_PARENT.bits(), "its attribute fixedParent"),
    (
        TpmaObject::SENSITIVE_DATA_ORIGIN.bits(),
        "its attribute sensitiveDataOrigin",
    ),
    (TpmaObject::RESTRICTED.bits(), "its attribute restricted"),
    (TpmaObject::SIGN_ENCRYPT.bits(), "its attribute sign"),
];

const LABEL: &[u8] = b"hydramesh attestation key v1";
const P256_BYTES: usize = 32;
/// First byte of a point with both coordinates (SEC 1, section 2.3.3).
const UNCOMPRESSED: u8 = 4;
const RSA_BITS: u16 = 2048;
const RSA_BYTES: usize = 256;
/// The exponent that a template's 0 stands for.
const RSA_EXPONENT: [u8; 3] = [1, 0, 1];
