//! The ML-DSA key of a mesh root, and how nodes know it by the root's certificate.

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use mesh_identity::PublicKey;
use mesh_proto::RootIdentity;
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::certificate::{ROOT_SCHEME, named_id};
use super::error::TrustError;

/// The root's ML-DSA key, if it is the one of this certificate: the certificate names its id, or, for roots of earlier
/// versions, the certificate's key has signed it.
pub(crate) fn verify_root_identity(
    certificate: &CertificateDer<'_>,
    claimed: &RootIdentity,
) -> Result<PublicKey, TrustError> {
    let foreign = |reason: &str| TrustError::Mismatch(format!("the root's ML-DSA key: {reason}"));
    let key =
        PublicKey::from_bytes(&claimed.public_key).map_err(|error| foreign(&error.to_string()))?;
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|error| foreign(&error.to_string()))?;
    let named = named_id(&parsed, ROOT_SCHEME).map_err(|error| foreign(&error))?;
    match named {
        Some(id) if id == key.node_id().to_string() => Ok(key),
        Some(_) => Err(foreign(
            "it is not the one that the root's certificate names",
        )),
        None => {
            let signer = &parsed.public_key().subject_public_key.data;
            let signer = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, signer);
            let verified = signer.verify(&voucher_text(&key), &claimed.voucher);
            verified.map_err(|_| foreign("the root's certificate does not vouch for it"))?;
            Ok(key)
        }
    }
}

/// The text that the certificate's key signs.
pub(super) fn voucher_text(key: &PublicKey) -> Vec<u8> {
    [b"hydramesh-root-identity-v1\0", key.as_bytes()].concat()
}
