//! One link: claims in COSE_Sign1.

use coset::cbor::{self, Value};
use coset::iana::Algorithm;
use coset::{CoseSign1, CoseSign1Builder, Header, HeaderBuilder, TaggedCborSerializable as _};
use mesh_identity::{IdentityKey, PublicKey};
use sha2::{Digest, Sha256};

use crate::claims::{Claims, ClaimsError};

/// A signed link of a token. Its signature may or may not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) claims: Claims,
    signature: Vec<u8>,
}

/// Reasons for which bytes are not a link.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// It is signed with another algorithm.
    #[error(
        "it is signed with {0}, and this program knows ML-DSA-65 (COSE algorithm -49); update this program"
    )]
    Algorithm(String),
    /// It is not COSE_Sign1 around claims.
    #[error("it is not a CWT in COSE_Sign1")]
    Encoding,
    /// Its claims are not allowed.
    #[error(transparent)]
    Claims(#[from] ClaimsError),
    /// It says the same as a token, in another encoding than this program's.
    #[error("its encoding is not canonical")]
    NotCanonical,
}

impl Link {
    pub(crate) fn sign(claims: Claims, key: &IdentityKey) -> Self {
        let unsigned = cose(&claims, Vec::new());
        let signature = key.sign(CONTEXT, &unsigned.tbs_data(AAD));
        Self { claims, signature }
    }

    /// Reads a link. Each has one encoding only.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, LinkError> {
        known_algorithm(bytes)?;
        let cose = CoseSign1::from_tagged_slice(bytes).map_err(|_| LinkError::Encoding)?;
        let payload = cose.payload.ok_or(LinkError::Encoding)?;
        let link = Self {
            claims: Claims::decode(&payload)?,
            signature: cose.signature,
        };
        if link.encode() != bytes {
            return Err(LinkError::NotCanonical);
        }
        Ok(link)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let cose = cose(&self.claims, self.signature.clone());
        cose.to_tagged_vec().expect("a link can be encoded")
    }

    pub(crate) fn digest(&self) -> [u8; 32] {
        Sha256::digest(self.encode()).into()
    }

    pub(crate) fn is_signed_by(&self, key: &PublicKey) -> bool {
        let signed = cose(&self.claims, Vec::new()).tbs_data(AAD);
        key.verifies(CONTEXT, &signed, &self.signature)
    }
}

fn cose(claims: &Claims, signature: Vec<u8>) -> CoseSign1 {
    CoseSign1Builder::new()
        .protected(header())
        .payload(claims.encode())
        .signature(signature)
        .build()
}

fn header() -> Header {
    HeaderBuilder::new()
        .algorithm(Algorithm::ML_DSA_65)
        .value(TYPE_LABEL, Value::Text(TYPE.to_owned()))
        .build()
}

/// Refuses other algorithms by name, also those that the library does not know.
fn known_algorithm(bytes: &[u8]) -> Result<(), LinkError> {
    let read =
        |bytes: &[u8]| cbor::de::from_reader::<Value, _>(bytes).map_err(|_| LinkError::Encoding);
    let Value::Tag(_, inner) = read(bytes)? else {
        return Err(LinkError::Encoding);
    };
    let protected = inner.as_array().and_then(|parts| parts.first()?.as_bytes());
    let header = read(protected.ok_or(LinkError::Encoding)?)?;
    let header = header.as_map().ok_or(LinkError::Encoding)?;
    let algorithm = header
        .iter()
        .find(|(label, _)| *label == Value::from(ALGORITHM_LABEL));
    let (_, algorithm) =
        algorithm.ok_or_else(|| LinkError::Algorithm("no named algorithm".to_owned()))?;
    let number = algorithm.as_integer().map(i128::from);
    match number {
        Some(number) if number == i128::from(Algorithm::ML_DSA_65 as i64) => Ok(()),
        Some(number) => Err(LinkError::Algorithm(named(number))),
        None => Err(LinkError::Algorithm(
            "an algorithm of a private name".to_owned(),
        )),
    }
}

fn named(number: i128) -> String {
    let known = i64::try_from(number)
        .ok()
        .and_then(<Algorithm as coset::iana::EnumI64>::from_i64);
    match known {
        Some(known) => {
            let name = format!("{known:?}").replace('_', "-");
            format!("{name} (COSE algorithm {number})")
        }
        None => format!("the unknown COSE algorithm {number}"),
    }
}

/// RFC 9964 leaves the context of ML-DSA empty. No other statement of this project does.
const CONTEXT: &[u8] = b"";
const AAD: &[u8] = b"";
const ALGORITHM_LABEL: i64 = 1;
/// RFC 9596: the type keeps a token from being taken for another CWT.
const TYPE_LABEL: i64 = 16;
const TYPE: &str = "application/hydra-cap+cwt";
