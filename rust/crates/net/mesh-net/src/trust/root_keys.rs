//! The keys of a mesh root, and the certificates and documents that they sign.

use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mesh_base::clock::{self, LAST_SECOND, unix_seconds};
use mesh_base::random;
use mesh_identity::{Document, IdentityKey, Intermediate, KeyError, NodeId, PublicKey};
use mesh_proto::{RootIdentity, SignedIntermediate};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, SanType, SerialNumber, SigningKey, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use x509_parser::prelude::{FromDer, X509Certificate, X509Name};
use zeroize::Zeroizing;

use super::certificate::{
    INTERMEDIATE_SCHEME, NODE_SCHEME, ROOT_SCHEME, attribute, check_name, named_id, pem,
};
use super::digest::sha256;
use super::error::TrustError;
use super::issued::{Issued, Subject, Validity};
use super::root_identity::{verify_root_identity, voucher_text};
use super::succession::Signer;
use crate::files;

/// The keys of one mesh root, and its certificate.
pub(super) struct RootKeys {
    pub(super) certificate: CertificateDer<'static>,
    pub(super) mesh: String,
    issuer: Issuer<'static, KeyPair>,
    pub(super) identity: IdentityKey,
    pub(super) claim: RootIdentity,
    /// As they are in `root.key`; empty for an intermediate.
    pub(super) text: Zeroizing<String>,
    /// The keys are those of an intermediate.
    pub(super) delegated: Option<Delegated>,
}

/// An intermediate that issues instead of a root.
pub(super) struct Delegated {
    pub(super) certificate: CertificateDer<'static>,
    pub(super) statement: SignedIntermediate,
    pub(super) said: Intermediate,
    /// The root's ML-DSA key.
    pub(super) root: PublicKey,
}

impl Delegated {
    fn times(&self) -> (SystemTime, SystemTime) {
        let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(seconds.min(LAST_SECOND));
        (at(self.said.not_before), at(self.said.not_after))
    }
}

impl fmt::Debug for RootKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RootKeys")
            .field("mesh", &self.mesh)
            .field("id", &self.identity.node_id())
            .finish_non_exhaustive()
    }
}

impl RootKeys {
    /// A root with the keys in this text. `origin` is the file that the certificate comes from.
    pub(super) fn read(
        key_path: &Path,
        key: &str,
        certificate: CertificateDer<'static>,
        origin: &Path,
    ) -> Result<Self, TrustError> {
        let pair = KeyPair::from_pem(key).map_err(|error| TrustError::damaged(key_path, error))?;
        let (identity, is_new) = match identity_in(key) {
            Some(identity) => (
                identity.map_err(|error| TrustError::damaged(key_path, error))?,
                false,
            ),
            None if names_identity(&certificate) => {
                let reason = "the ML-DSA key that the root's certificate names is missing in it";
                return Err(TrustError::damaged(key_path, reason));
            }
            // A root of an earlier version.
            None => (IdentityKey::generate(), true),
        };
        let root = Self::assemble(certificate, pair, identity);
        let root = root.map_err(|reason| TrustError::damaged(origin, reason))?;
        if is_new {
            files::replace(key_path, root.text.as_bytes(), files::PRIVATE)?;
            tracing::info!(
                id = %root.identity.node_id(),
                "the mesh root has an ML-DSA key now; root.key holds it, too: back it up again"
            );
        }
        Ok(root)
    }

    pub(super) fn generate(mesh: &str) -> Result<Self, TrustError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = distinguished_name(&format!("root of {mesh}"), "root", mesh);
        params.serial_number = Some(serial_number());
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2120, 1, 1);
        // One intermediate may follow.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        // Tokens pin the certificate, and thereby the ML-DSA key.
        let identity = IdentityKey::generate();
        params.subject_alt_names = vec![uri(ROOT_SCHEME, &identity.node_id())?];
        let certificate = params.self_signed(&key)?;
        Self::assemble(certificate.der().clone(), key, identity).map_err(TrustError::Crypto)
    }

    fn assemble(
        certificate: CertificateDer<'static>,
        key: KeyPair,
        identity: IdentityKey,
    ) -> Result<Self, String> {
        let (_, parsed) =
            X509Certificate::from_der(&certificate).map_err(|error| error.to_string())?;
        if *parsed.public_key().subject_public_key.data != *rcgen::PublicKeyData::der_bytes(&key) {
            return Err("the root's key and certificate do not belong together".to_owned());
        }
        let mesh = attribute(X509Name::iter_organization(parsed.subject()))?;
        let voucher = match named_id(&parsed, ROOT_SCHEME)? {
            Some(_) => Vec::new(),
            None => key
                .sign(&voucher_text(identity.public()))
                .map_err(|error| error.to_string())?,
        };
        let claim = RootIdentity {
            public_key: identity.public().as_bytes().to_vec(),
            voucher,
        };
        verify_root_identity(&certificate, &claim).map_err(|error| error.to_string())?;
        let text = key_file(&key, &pem(&certificate), &identity);
        let issuer =
            Issuer::from_ca_cert_der(&certificate, key).map_err(|error| error.to_string())?;
        Ok(Self {
            certificate,
            mesh,
            issuer,
            identity,
            claim,
            text,
            delegated: None,
        })
    }

    /// An intermediate of the root with this certificate and claim.
    pub(super) fn delegated(
        root: CertificateDer<'static>,
        claim: RootIdentity,
        pair: KeyPair,
        identity: IdentityKey,
        delegated: Delegated,
    ) -> Result<Self, TrustError> {
        Ok(Self {
            certificate: root,
            mesh: delegated.said.mesh.clone(),
            issuer: Issuer::from_ca_cert_der(&delegated.certificate, pair)?,
            identity,
            claim,
            text: Zeroizing::default(),
            delegated: Some(delegated),
        })
    }

    /// The public half of the root's ML-DSA key.
    pub(super) fn public(&self) -> &PublicKey {
        let delegated = self.delegated.as_ref();
        delegated.map_or(self.identity.public(), |delegated| &delegated.root)
    }

    /// A document with these keys' signature. It ends no later than the intermediate.
    pub(super) fn sign(&self, mut document: Document) -> Vec<u8> {
        let Some(delegated) = &self.delegated else {
            return document.sign(&self.identity);
        };
        let (begin, end) = (delegated.said.not_before, delegated.said.not_after);
        document.not_before = document.not_before.clamp(begin, end);
        document.not_after = document.not_after.clamp(begin, end);
        document.sign_by(&self.identity, Some(delegated.statement.clone()))
    }

    /// Refuses to go on with an intermediate that has ended.
    pub(super) fn check(&self, now: SystemTime) -> Result<(), TrustError> {
        let end = self.delegated.as_ref().map(|known| known.times().1);
        match end.filter(|end| *end <= now) {
            Some(end) => Err(TrustError::IntermediateEnded {
                until: clock::utc(end),
            }),
            None => Ok(()),
        }
    }

    /// A certificate for the key of an intermediate, by this root.
    pub(super) fn certify_intermediate(
        &self,
        csr: &[u8],
        said: &Intermediate,
    ) -> Result<CertificateDer<'static>, TrustError> {
        let csr = CertificateSigningRequestDer::from(csr);
        let mut request = CertificateSigningRequestParams::from_der(&csr)
            .map_err(|error| TrustError::Request(error.to_string()))?;
        let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(seconds.min(LAST_SECOND));
        let mut params = CertificateParams::default();
        let name = format!("intermediate of {}", self.mesh);
        params.distinguished_name = distinguished_name(&name, "intermediate", &self.mesh);
        params.serial_number = Some(serial_number());
        params.not_before = at(said.not_before).into();
        params.not_after = at(said.not_after).into();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.use_authority_key_identifier_extension = true;
        params.subject_alt_names = vec![uri(INTERMEDIATE_SCHEME, &said.key.node_id())?];
        request.params = params;
        Ok(request.signed_by(&self.issuer)?.der().clone())
    }

    pub(super) fn signer(&self) -> Signer<'_> {
        Signer {
            key: &self.identity,
            claim: &self.claim,
        }
    }

    /// A certificate for the key in the subject's request.
    ///
    /// Only the key is taken from the request; all other contents come from the arguments. The validity
    /// begins a day before `now`, because reclaimed machines have poor clocks.
    pub(super) fn certify(
        &self,
        subject: &Subject<'_>,
        validity: &Validity,
        now: SystemTime,
    ) -> Result<CertificateDer<'static>, TrustError> {
        let (name, role, life) = (subject.name, subject.role, validity.life);
        check_name(name)?;
        self.check(now)?;
        let request = CertificateSigningRequestDer::from(subject.request);
        let mut request = CertificateSigningRequestParams::from_der(&request)
            .map_err(|error| TrustError::Request(error.to_string()))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = distinguished_name(name, role.as_str(), &self.mesh);
        params.serial_number = Some(serial_number());
        // X.509 has no dates before 1970 for webpki, and none after 9999 at all (RFC 5280, section 4.1.2.5).
        params.not_before = (now - DAY).clamp(UNIX_EPOCH, last_date() - DAY).into();
        params.not_after = (now + life).clamp(UNIX_EPOCH + DAY, last_date()).into();
        if let Some(delegated) = &self.delegated {
            let (begin, end) = delegated.times();
            params.not_before = params.not_before.max(begin.into());
            params.not_after = params.not_after.min(end.into());
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // Every node both dials and listens.
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        if let Some(key) = subject.identity {
            params.subject_alt_names = vec![uri(NODE_SCHEME, &key.node_id())?];
        }
        request.params = params;
        let certificate = request.signed_by(&self.issuer)?;
        Ok(certificate.der().clone())
    }

    /// A certificate, and a document about the identity, which is valid for as long as the certificate may be
    /// renewed.
    pub(super) fn issue(
        &self,
        subject: &Subject<'_>,
        validity: &Validity,
        now: SystemTime,
    ) -> Result<Issued, TrustError> {
        let certificate = self.certify(subject, validity, now)?;
        let (begin, end) = (now - DAY, now + validity.life + validity.renewal_grace);
        let document = subject.identity.map(|key| Document {
            key: key.clone(),
            name: subject.name.to_owned(),
            role: subject.role.as_str().to_owned(),
            mesh: self.mesh.clone(),
            root: sha256(&self.certificate),
            not_before: unix_seconds(begin),
            not_after: unix_seconds(end),
        });
        let document = document.map(|document| self.sign(document));
        let intermediate = self.delegated.as_ref();
        let intermediate = intermediate.map(|delegated| delegated.certificate.clone());
        let chain = [certificate].into_iter().chain(intermediate);
        Ok(Issued {
            certificates: chain.chain([self.certificate.clone()]).collect(),
            document: document.unwrap_or_default(),
            root: self.claim.clone(),
            former: None,
            succession: None,
        })
    }
}

/// The text of `root.key`: the certificate's key, a copy of the certificate for the day on which that is lost, and for a
/// first start that is cut off here, and the ML-DSA key. Earlier versions read the first block only.
fn key_file(key: &KeyPair, certificate: &str, identity: &IdentityKey) -> Zeroizing<String> {
    let key = Zeroizing::new(key.serialize_pem());
    Zeroizing::new([key.as_str(), certificate, identity.to_pem().as_str()].concat())
}

/// The ML-DSA key in the text of `root.key`; `None` in files of earlier versions.
pub(super) fn identity_in(text: &str) -> Option<Result<IdentityKey, KeyError>> {
    let (at, _) = text.match_indices("-----BEGIN PRIVATE KEY-----").nth(1)?;
    Some(IdentityKey::from_pem(&text[at..]))
}

/// The end of the former root's time, and the former root's keys, in the text of `root.key`.
pub(super) fn former_part(text: &str) -> Option<(&str, &str)> {
    let (_, former) = text.split_once(FORMER)?;
    former.split_once(":\n")
}

/// Before the end of the former root's time, and its keys.
pub(super) const FORMER: &str = "Former root, accepted until ";

/// True if a root's certificate names the root's ML-DSA key.
fn names_identity(certificate: &CertificateDer<'_>) -> bool {
    let parsed = X509Certificate::from_der(certificate);
    parsed.is_ok_and(|(_, parsed)| matches!(named_id(&parsed, ROOT_SCHEME), Ok(Some(_))))
}

fn uri(scheme: &str, id: &NodeId) -> Result<SanType, TrustError> {
    Ok(SanType::URI(format!("{scheme}{id}").try_into()?))
}

pub(super) fn distinguished_name(
    common: &str,
    unit: &str,
    organization: &str,
) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, organization);
    name.push(DnType::OrganizationalUnitName, unit);
    name.push(DnType::CommonName, common);
    name
}

/// 127 random bits: positive as RFC 5280, section 4.1.2.2 wants.
fn serial_number() -> SerialNumber {
    let mut bytes: [u8; 16] = random::bytes();
    bytes[0] &= 0x7f;
    SerialNumber::from_slice(&bytes)
}

const DAY: Duration = Duration::from_secs(24 * 3600);

/// The last one that a certificate can have.
fn last_date() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(LAST_SECOND)
}
