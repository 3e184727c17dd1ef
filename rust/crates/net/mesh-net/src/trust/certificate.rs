//! Node certificates: their contents, their text form, and the check that a root issued one.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use data_encoding::HEXLOWER;
use mesh_base::clock;
use mesh_identity::NodeId;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, Error, RootCertStore};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate, X509Name};

use super::digest::sha256;
use super::error::TrustError;

/// A node's role in its mesh; part of its certificate, so that a worker cannot pass for the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Routes requests and admits nodes.
    Head,
    /// Any other node that joined with a token.
    Worker,
}

impl Role {
    /// Name of the role in certificates (subject OU).
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Head => "head",
            Self::Worker => "worker",
        }
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        [Self::Head, Self::Worker]
            .into_iter()
            .find(|role| role.as_str() == text)
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Contents of a node's certificate. They say nothing about whether the certificate is genuine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// SHA-256 of the node's ML-DSA key, lower-case hex. In certificates of nodes without an identity, as earlier versions
    /// got them, that of the certificate's key.
    pub node_id: String,
    /// SHA-256 of the certificate's public key (SubjectPublicKeyInfo, DER), lower-case hex: the node's id for peers of
    /// earlier versions.
    pub key_id: String,
    /// Name of the node, for people; not unique.
    pub name: String,
    /// Role of the node.
    pub role: Role,
    /// Name of its mesh.
    pub mesh: String,
    /// Start of the certificate's validity.
    pub not_before: SystemTime,
    /// End of the certificate's validity.
    pub not_after: SystemTime,
}

impl Member {
    /// Reads a certificate (DER) that a [`MeshRoot`](super::MeshRoot) issued.
    pub fn from_certificate(certificate: &[u8]) -> Result<Self, TrustError> {
        let foreign =
            |reason: String| TrustError::Mismatch(format!("not a node certificate: {reason}"));
        let (_, parsed) =
            X509Certificate::from_der(certificate).map_err(|error| foreign(error.to_string()))?;
        let subject = parsed.subject();
        let role = attribute(X509Name::iter_organizational_unit(subject)).map_err(foreign)?;
        let key_id = HEXLOWER.encode(&sha256(parsed.public_key().raw));
        Ok(Self {
            node_id: named_id(&parsed, NODE_SCHEME)
                .map_err(foreign)?
                .unwrap_or_else(|| key_id.clone()),
            key_id,
            name: attribute(X509Name::iter_common_name(subject)).map_err(foreign)?,
            role: Role::parse(&role).ok_or_else(|| foreign(format!("unknown role `{role}`")))?,
            mesh: attribute(X509Name::iter_organization(subject)).map_err(foreign)?,
            not_before: moment(parsed.validity().not_before),
            not_after: moment(parsed.validity().not_after),
        })
    }

    /// True if the certificate is bound to an ML-DSA identity.
    pub fn has_identity(&self) -> bool {
        self.node_id != self.key_id
    }

    /// The dates of the certificate, for messages.
    pub fn dates(&self) -> String {
        let (from, to) = (clock::utc(self.not_before), clock::utc(self.not_after));
        format!("valid from {from} to {to}")
    }

    /// True if `now` is within the certificate's validity.
    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        (self.not_before..self.not_after).contains(&now)
    }
}

/// The id that a certificate names by a URI of this scheme, as a further name of its subject (RFC 5280, section 4.2.1.6).
pub(super) fn named_id(
    certificate: &X509Certificate<'_>,
    scheme: &str,
) -> Result<Option<String>, String> {
    let names = certificate.subject_alternative_name();
    let Some(names) = names.map_err(|error| error.to_string())? else {
        return Ok(None);
    };
    let ids = names
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => uri.strip_prefix(scheme),
            _ => None,
        });
    let mut ids = ids.map(|id| id.parse::<NodeId>());
    match (ids.next(), ids.next()) {
        (None, _) => Ok(None),
        (Some(id), None) => id
            .map(|id| Some(id.to_string()))
            .map_err(|error| error.to_string()),
        (Some(_), Some(_)) => Err(format!("it names several ids as {scheme}")),
    }
}

/// Begin of the URI with the id of a node.
pub(super) const NODE_SCHEME: &str = "hydramesh:node:";
/// Begin of the URI with the id of an intermediate.
pub(super) const INTERMEDIATE_SCHEME: &str = "hydramesh:intermediate:";
/// Begin of the URI with the id of a mesh root.
pub(super) const ROOT_SCHEME: &str = "hydramesh:root:";

/// The first of these parts of a certificate's subject.
pub(super) fn attribute<'a>(
    mut values: impl Iterator<Item = &'a x509_parser::x509::AttributeTypeAndValue<'a>>,
) -> Result<String, String> {
    let value = values.next().ok_or("a part of the subject is missing")?;
    let text = value.as_str().map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

/// SHA-256 of the public key in a request (PKCS#10, DER), lower-case hex: [`Member::key_id`] of a certificate for it.
pub fn requested_key_id(request: &[u8]) -> Result<String, TrustError> {
    use x509_parser::certification_request::X509CertificationRequest;
    let (_, request) = X509CertificationRequest::from_der(request)
        .map_err(|error| TrustError::Request(error.to_string()))?;
    Ok(HEXLOWER.encode(&sha256(request.certification_request_info.subject_pki.raw)))
}

/// Names go into certificates, logs and metrics: keep them plain.
pub fn check_name(name: &str) -> Result<(), TrustError> {
    let plain = name
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || ".-_".contains(c));
    if plain && (1..=LONGEST_NAME).contains(&name.len()) {
        Ok(())
    } else {
        Err(TrustError::Name(name.chars().take(80).collect()))
    }
}

pub(crate) fn algorithms() -> WebPkiSupportedAlgorithms {
    aws_lc_rs::default_provider().signature_verification_algorithms
}

/// Checks that `root` issued `certificate`, or an intermediate of it among `others` did, whenever that holds.
/// Its dates are for the head to judge ([`super`]), and lie within those of the intermediate; the root's own
/// say nothing, since it is known by its hash.
pub(crate) fn verify_issued_by(
    certificate: &CertificateDer<'_>,
    others: &[CertificateDer<'_>],
    root: &CertificateDer<'_>,
    algorithms: &WebPkiSupportedAlgorithms,
) -> Result<(), Error> {
    let member = Member::from_certificate(certificate)
        .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
    let mut others = others.iter().take(MOST_OTHERS);
    let intermediate = others.find(|other| is_intermediate(other));
    if let Some(intermediate) = intermediate {
        let (_, parsed) = X509Certificate::from_der(intermediate)
            .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        if member.not_after > moment(parsed.validity().not_after) {
            return Err(Error::InvalidCertificate(CertificateError::Expired));
        }
    }
    // webpki wants a date: one at which it holds.
    let begin = member.not_before.duration_since(UNIX_EPOCH);
    let at = UnixTime::since_unix_epoch(begin.unwrap_or_default());
    let intermediates: Vec<CertificateDer<'_>> = intermediate.cloned().into_iter().collect();
    let mut roots = RootCertStore::empty();
    roots.add(root.clone().into_owned())?;
    let parsed = ParsedCertificate::try_from(certificate)?;
    verify_server_cert_signed_by_trust_anchor(&parsed, &roots, &intermediates, at, algorithms.all)
}

/// True if a certificate names itself an intermediate.
pub(super) fn is_intermediate(certificate: &[u8]) -> bool {
    let parsed = X509Certificate::from_der(certificate);
    parsed.is_ok_and(|(_, parsed)| matches!(named_id(&parsed, INTERMEDIATE_SCHEME), Ok(Some(_))))
}

pub(super) fn moment(time: x509_parser::time::ASN1Time) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or_default())
}

/// RFC 7468 text of a certificate.
pub(super) fn pem(certificate: &CertificateDer<'_>) -> String {
    use base64::Engine as _;
    let mut body = base64::engine::general_purpose::STANDARD.encode(certificate);
    for line_end in (64..body.len()).step_by(64).rev() {
        body.insert(line_end, '\n');
    }
    format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n")
}

/// The first certificate in the text of a file.
pub(super) fn from_pem(path: &Path, text: &str) -> Result<CertificateDer<'static>, TrustError> {
    CertificateDer::from_pem_slice(text.as_bytes())
        .map_err(|error| TrustError::damaged(path, error))
}

/// SHA-256 of the certificate in the text of a `root.crt`.
///
/// # Errors
/// If it is not a certificate.
pub fn root_digest(text: &str) -> Result<[u8; 32], TrustError> {
    let certificate = CertificateDer::from_pem_slice(text.as_bytes());
    let certificate = certificate
        .map_err(|error| TrustError::Mismatch(format!("it is not a root.crt: {error}")))?;
    Ok(sha256(&certificate))
}

/// Certificates behind a node's own that are looked at: an intermediate and the root.
const MOST_OTHERS: usize = 2;

/// Maximum length of a name.
pub const LONGEST_NAME: usize = 63;
