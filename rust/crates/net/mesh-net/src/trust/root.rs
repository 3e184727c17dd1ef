//! The root of a mesh, which issues its certificates.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use data_encoding::HEXLOWER;
use mesh_base::clock::{LAST_SECOND, unix_seconds};
use mesh_base::random;
use mesh_identity::{Document, IdentityKey, KeyError, NodeId, PublicKey};
use mesh_proto::RootIdentity;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, SanType, SerialNumber, SigningKey, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use x509_parser::prelude::{FromDer, X509Certificate, X509Name};
use zeroize::Zeroizing;

use super::certificate::{
    NODE_SCHEME, ROOT_SCHEME, Role, attribute, check_name, from_pem, named_id, pem,
};
use super::digest::sha256;
use super::error::TrustError;
use super::names;
use super::root_identity::{verify_root_identity, voucher_text};
use crate::files;

/// Validity periods of node certificates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// Validity of a certificate from its issue.
    pub life: Duration,
    /// Period after a certificate's end in which it may still be exchanged for a new one (and nothing else).
    pub renewal_grace: Duration,
}

impl Default for Validity {
    fn default() -> Self {
        Self {
            life: 7 * DAY,
            renewal_grace: 30 * DAY,
        }
    }
}

/// The certificate authority of one mesh. Lives in the head's state directory.
#[derive(Debug)]
pub struct MeshRoot {
    certificate: CertificateDer<'static>,
    mesh: String,
    issuer: Issuer<'static, KeyPair>,
    identity: IdentityKey,
    claim: RootIdentity,
}

/// A node that a certificate is issued to.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// PKCS#10 request, DER: its key is certified, and its signature proves that the asker holds it.
    pub request: &'a [u8],
    /// Name of the node.
    pub name: &'a str,
    /// Role of the node.
    pub role: Role,
    /// The node's identity, whose possession it has proven; `None` for nodes of earlier versions.
    pub identity: Option<&'a PublicKey>,
}

/// A node's papers.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The node's certificate, then the root's.
    pub certificates: Vec<CertificateDer<'static>>,
    /// The node's identity document ([`mesh_identity::Document`]), signed; empty for a node without an identity.
    pub document: Vec<u8>,
    /// The root's ML-DSA key, which signed the document.
    pub root: RootIdentity,
}

impl MeshRoot {
    /// Reads the root in `dir`, or creates one for a mesh of this name if there are no files of a mesh. An
    /// existing root keeps its name.
    ///
    /// # Errors
    /// If its files are not whole. A root is never made anew beside what is left of another one: tokens and certificates
    /// of all workers pin the old one.
    pub fn load_or_create(dir: &Path, mesh: &str) -> Result<Self, TrustError> {
        let key_path = dir.join(names::ROOT_KEY);
        let certificate_path = dir.join(names::ROOT_CERTIFICATE);
        match (files::read(&key_path)?, files::read(&certificate_path)?) {
            (Some(key), Some(certificate)) => {
                let certificate = from_pem(&certificate_path, &certificate)?;
                Self::read(&key_path, &key, certificate, &certificate_path)
            }
            // The certificate cannot be made anew: it would be another one than that which tokens and workers pin. Keys of
            // this version have a copy of it.
            (Some(key), None) => {
                let certificate = from_pem(&key_path, &key)
                    .map_err(|_| TrustError::missing(&certificate_path, &key_path))?;
                let root = Self::read(&key_path, &key, certificate, &key_path)?;
                files::replace(&certificate_path, pem(&root.certificate), files::PUBLIC)?;
                tracing::warn!(
                    path = %certificate_path.display(),
                    root = HEXLOWER.encode(&root.sha256()),
                    "the mesh root's certificate was missing; it is restored from the copy in root.key"
                );
                Ok(root)
            }
            (None, Some(_)) => Err(TrustError::missing(&key_path, &certificate_path)),
            (None, None) => {
                let others = [
                    names::NODE_KEY,
                    names::NODE_CERTIFICATE,
                    names::TOKENS,
                    names::MEMBERS,
                    names::EXPELLED,
                ];
                let mut others = others.iter().map(|name| dir.join(name));
                match others.find(|path| path.exists()) {
                    Some(other) => Err(TrustError::missing(&key_path, &other)),
                    None => Self::create(dir, mesh),
                }
            }
        }
    }

    /// A root with this key. `origin` is the file that the certificate comes from.
    fn read(
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
        let text = key_file(&pair, &pem(&certificate), &identity);
        let root = Self::assemble(certificate, pair, identity);
        let root = root.map_err(|reason| TrustError::damaged(origin, reason))?;
        if is_new {
            files::replace(key_path, text.as_bytes(), files::PRIVATE)?;
            tracing::info!(
                id = %root.identity.node_id(),
                "the mesh root has an ML-DSA key now; root.key holds it, too: back it up again"
            );
        }
        Ok(root)
    }

    fn create(dir: &Path, mesh: &str) -> Result<Self, TrustError> {
        check_name(mesh)?;
        files::create_private_dir(dir)?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = distinguished_name(&format!("root of {mesh}"), "root", mesh);
        params.serial_number = Some(serial_number());
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2120, 1, 1);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        // Tokens pin the certificate, and thereby the ML-DSA key.
        let identity = IdentityKey::generate();
        params.subject_alt_names = vec![uri(ROOT_SCHEME, &identity.node_id())?];
        let certificate = params.self_signed(&key)?;
        let text = key_file(&key, &certificate.pem(), &identity);
        files::replace(&dir.join(names::ROOT_KEY), text.as_bytes(), files::PRIVATE)?;
        let certificate_path = dir.join(names::ROOT_CERTIFICATE);
        files::replace(&certificate_path, certificate.pem(), files::PUBLIC)?;
        tracing::info!(
            mesh,
            root = HEXLOWER.encode(&sha256(certificate.der())),
            "made a new mesh root"
        );
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
        let issuer =
            Issuer::from_ca_cert_der(&certificate, key).map_err(|error| error.to_string())?;
        Ok(Self {
            certificate,
            mesh,
            issuer,
            identity,
            claim,
        })
    }

    /// The public half of the root's ML-DSA key.
    pub fn identity(&self) -> &PublicKey {
        self.identity.public()
    }

    /// Name of the mesh.
    pub fn mesh(&self) -> &str {
        &self.mesh
    }

    /// The root's self-signed certificate, DER.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// SHA-256 of the root's certificate: what join tokens pin.
    pub fn sha256(&self) -> [u8; 32] {
        sha256(&self.certificate)
    }

    /// A signed document about a key that belongs to no node: that this mesh has given it this role.
    pub fn endorse(&self, key: &PublicKey, role: &str, now: SystemTime) -> Vec<u8> {
        let document = Document {
            key: key.clone(),
            name: role.to_owned(),
            role: role.to_owned(),
            mesh: self.mesh.clone(),
            root: self.sha256(),
            not_before: unix_seconds(now - DAY),
            not_after: unix_seconds(now + ENDORSED_FOR),
        };
        document.sign(&self.identity)
    }

    /// Issues a certificate for the key in the subject's request, and a document about its identity.
    ///
    /// Only the key is taken from the request; all other contents come from the arguments. The validity
    /// begins a day before `now`, because reclaimed machines have poor clocks. The document is valid for as long as the
    /// certificate may be renewed.
    pub fn issue(
        &self,
        subject: &Subject<'_>,
        validity: &Validity,
        now: SystemTime,
    ) -> Result<Issued, TrustError> {
        let (name, role, life) = (subject.name, subject.role, validity.life);
        check_name(name)?;
        let request = CertificateSigningRequestDer::from(subject.request);
        let mut request = CertificateSigningRequestParams::from_der(&request)
            .map_err(|error| TrustError::Request(error.to_string()))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = distinguished_name(name, role.as_str(), &self.mesh);
        params.serial_number = Some(serial_number());
        // X.509 has no dates before 1970 for webpki, and none after 9999 at all (RFC 5280, section 4.1.2.5).
        params.not_before = (now - DAY).clamp(UNIX_EPOCH, last_date() - DAY).into();
        params.not_after = (now + life).clamp(UNIX_EPOCH + DAY, last_date()).into();
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
        let (begin, end) = (now - DAY, now + life + validity.renewal_grace);
        request.params = params;
        let certificate = request.signed_by(&self.issuer)?;
        let document = subject.identity.map(|key| Document {
            key: key.clone(),
            name: name.to_owned(),
            role: role.as_str().to_owned(),
            mesh: self.mesh.clone(),
            root: self.sha256(),
            not_before: unix_seconds(begin),
            not_after: unix_seconds(end),
        });
        let document = document.map(|document| document.sign(&self.identity));
        Ok(Issued {
            certificates: vec![certificate.der().clone(), self.certificate.clone()],
            document: document.unwrap_or_default(),
            root: self.claim.clone(),
        })
    }
}

/// Time for which an endorsement holds; the head makes one at each start.
const ENDORSED_FOR: Duration = Duration::from_secs(400 * 24 * 3600);

/// The text of `root.key`: the certificate's key, a copy of the certificate for the day on which that is lost, and for a
/// first start that is cut off here, and the ML-DSA key. Earlier versions read the first block only.
fn key_file(key: &KeyPair, certificate: &str, identity: &IdentityKey) -> Zeroizing<String> {
    let key = Zeroizing::new(key.serialize_pem());
    Zeroizing::new([key.as_str(), certificate, identity.to_pem().as_str()].concat())
}

/// The ML-DSA key in the text of `root.key`; `None` in files of earlier versions.
fn identity_in(text: &str) -> Option<Result<IdentityKey, KeyError>> {
    let (at, _) = text.match_indices("-----BEGIN PRIVATE KEY-----").nth(1)?;
    Some(IdentityKey::from_pem(&text[at..]))
}

/// True if a root's certificate names the root's ML-DSA key.
fn names_identity(certificate: &CertificateDer<'_>) -> bool {
    let parsed = X509Certificate::from_der(certificate);
    parsed.is_ok_and(|(_, parsed)| matches!(named_id(&parsed, ROOT_SCHEME), Ok(Some(_))))
}

fn uri(scheme: &str, id: &NodeId) -> Result<SanType, TrustError> {
    Ok(SanType::URI(format!("{scheme}{id}").try_into()?))
}

fn distinguished_name(common: &str, unit: &str, organization: &str) -> DistinguishedName {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trust::certificate::{Member, requested_key_id};

    fn request(key: &KeyPair) -> Vec<u8> {
        CertificateParams::default()
            .serialize_request(key)
            .expect("request")
            .der()
            .to_vec()
    }

    #[test]
    fn the_root_is_made_once_and_its_key_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("temporary directory");
        let state = dir.path().join("head");
        let first = MeshRoot::load_or_create(&state, "attic").expect("created");
        let second = MeshRoot::load_or_create(&state, "other").expect("loaded");
        assert_eq!(first.sha256(), second.sha256());
        assert_eq!(second.mesh(), "attic");
        let mode = |name| {
            std::fs::metadata(state.join(name))
                .expect("there")
                .permissions()
                .mode()
                & 0o777
        };
        assert_eq!(mode(names::ROOT_KEY), 0o600);
        assert_eq!(mode(names::ROOT_CERTIFICATE), 0o644);
    }

    #[test]
    fn damaged_and_mixed_up_roots_are_refused() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        MeshRoot::load_or_create(&a, "a").expect("created");
        MeshRoot::load_or_create(&b, "b").expect("created");
        std::fs::copy(b.join(names::ROOT_KEY), a.join(names::ROOT_KEY)).expect("copied");
        let error = MeshRoot::load_or_create(&a, "a")
            .expect_err("mixed up")
            .to_string();
        assert!(error.contains("do not belong together"), "{error}");
        std::fs::write(b.join(names::ROOT_CERTIFICATE), "junk").expect("written");
        let error = MeshRoot::load_or_create(&b, "b")
            .expect_err("damaged")
            .to_string();
        assert!(error.contains("root.crt is damaged"), "{error}");
        std::fs::remove_file(a.join(names::ROOT_KEY)).expect("removed");
        assert!(
            MeshRoot::load_or_create(&a, "a").is_err(),
            "a lost key must not be replaced silently"
        );
    }

    #[test]
    fn a_lost_root_certificate_is_restored_as_it_was_or_not_at_all() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let made = MeshRoot::load_or_create(dir.path(), "a").expect("created");
        let (key, certificate) = (
            dir.path().join(names::ROOT_KEY),
            dir.path().join(names::ROOT_CERTIFICATE),
        );
        let (key_text, certificate_text) = (
            std::fs::read_to_string(&key).expect("there"),
            std::fs::read_to_string(&certificate).expect("there"),
        );
        std::fs::remove_file(&certificate).expect("removed");
        let restored = MeshRoot::load_or_create(dir.path(), "a").expect("restored");
        assert_eq!(restored.sha256(), made.sha256(), "tokens pin it");
        let again = MeshRoot::load_or_create(dir.path(), "a").expect("loaded");
        assert_eq!(again.sha256(), made.sha256());

        // A key of an earlier version has no copy of the certificate.
        let old = KeyPair::from_pem(&key_text).expect("a key").serialize_pem();
        std::fs::write(&key, &old).expect("written");
        std::fs::write(&certificate, certificate_text).expect("written");
        let error = MeshRoot::load_or_create(dir.path(), "a")
            .expect_err("half of the key is missing")
            .to_string();
        assert!(
            error.contains("root.key is damaged: the ML-DSA key"),
            "{error}"
        );
        std::fs::remove_file(&certificate).expect("removed");
        let error = MeshRoot::load_or_create(dir.path(), "a")
            .expect_err("refused")
            .to_string();
        for part in ["root.crt is missing", "root.key is there", "of any worker"] {
            assert!(error.contains(part), "{part} is not in {error}");
        }
        assert!(!certificate.exists(), "nothing is made");
        assert_eq!(std::fs::read_to_string(&key).expect("there"), old);
    }

    #[test]
    fn no_root_is_made_beside_what_is_left_of_a_mesh() {
        for left in [
            names::NODE_KEY,
            names::NODE_CERTIFICATE,
            names::TOKENS,
            names::MEMBERS,
            names::EXPELLED,
        ] {
            let dir = tempfile::tempdir().expect("temporary directory");
            std::fs::write(dir.path().join(left), "x").expect("written");
            let error = MeshRoot::load_or_create(dir.path(), "a")
                .expect_err("refused")
                .to_string();
            assert!(
                error.contains("root.key is missing") && error.contains(left),
                "{error}"
            );
            let files = std::fs::read_dir(dir.path()).expect("listed").count();
            assert_eq!(files, 1, "nothing is made");
        }
        let dir = tempfile::tempdir().expect("temporary directory");
        std::fs::write(dir.path().join(names::ROOT_KEY), "").expect("written");
        let error = MeshRoot::load_or_create(dir.path(), "a").expect_err("refused");
        assert!(error.to_string().contains("root."), "{error}");
    }

    #[test]
    fn certificates_say_what_the_root_decides() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let root = MeshRoot::load_or_create(dir.path(), "attic").expect("created");
        let key = KeyPair::generate().expect("key");
        let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let identity = IdentityKey::generate();
        let request = request(&key);
        let subject = Subject {
            request: &request,
            name: "laptop-7",
            role: Role::Worker,
            identity: Some(identity.public()),
        };
        let issued = root
            .issue(&subject, &Validity::default(), now)
            .expect("issued");
        assert_eq!(issued.certificates[1], *root.certificate());
        let signer = verify_root_identity(root.certificate(), &issued.root).expect("the root's");
        let document = Document::verify(&issued.document, &signer).expect("signed");
        assert_eq!(document.key, *identity.public());
        assert!(document.is_valid_at(unix_seconds(now + 36 * DAY)));
        let member = Member::from_certificate(&issued.certificates[0]).expect("readable");
        let expected = Member {
            node_id: identity.node_id().to_string(),
            key_id: requested_key_id(&request).expect("readable"),
            name: "laptop-7".into(),
            role: Role::Worker,
            mesh: "attic".into(),
            not_before: now - DAY,
            not_after: now + 7 * DAY,
        };
        assert_eq!(member, expected);
        assert!(
            member.is_valid_at(now)
                && !member.is_valid_at(now + 7 * DAY)
                && !member.is_valid_at(now - 2 * DAY)
        );
    }

    #[test]
    fn hostile_requests_and_names_are_refused() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let root = MeshRoot::load_or_create(dir.path(), "attic").expect("created");
        let good = request(&KeyPair::generate().expect("key"));
        let now = SystemTime::now();
        let issue = |request: &[u8], name: &str| {
            let subject = Subject {
                request,
                name,
                role: Role::Worker,
                identity: None,
            };
            root.issue(&subject, &Validity::default(), now)
        };
        for name in ["", "a b", "a\n", "ä", &"x".repeat(64)] {
            assert!(
                matches!(issue(&good, name), Err(TrustError::Name(_))),
                "{name:?}"
            );
        }
        for cut in 0..good.len() {
            assert!(issue(&good[..cut], "n").is_err(), "cut at {cut}");
        }
        for at in 0..good.len() {
            let mut flipped = good.clone();
            flipped[at] ^= 1;
            // The signature covers the request; a flip elsewhere is either refused or changes nothing we use.
            let _ = issue(&flipped, "n");
        }
        let last = good.len() - 1;
        let mut forged = good;
        forged[last] ^= 1;
        assert!(matches!(issue(&forged, "n"), Err(TrustError::Request(_))));
    }

    #[test]
    fn a_root_of_an_earlier_version_gets_an_ml_dsa_key_that_its_certificate_vouches_for() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("key");
        let mut params = CertificateParams::default();
        params.distinguished_name = distinguished_name("root of attic", "root", "attic");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let certificate = params.self_signed(&key).expect("signed");
        let key_path = dir.path().join(names::ROOT_KEY);
        std::fs::write(&key_path, key.serialize_pem()).expect("written");
        let path = dir.path().join(names::ROOT_CERTIFICATE);
        std::fs::write(&path, certificate.pem()).expect("written");

        let root = MeshRoot::load_or_create(dir.path(), "attic").expect("loads");
        assert_eq!(root.sha256(), sha256(certificate.der()), "tokens pin it");
        let verified = verify_root_identity(root.certificate(), &root.claim);
        assert_eq!(&verified.expect("vouched for"), root.identity());
        let again = MeshRoot::load_or_create(dir.path(), "attic").expect("loads");
        assert_eq!(again.identity(), root.identity());
        // Earlier versions read the first key of the file.
        let text = std::fs::read_to_string(&key_path).expect("there");
        let first = KeyPair::from_pem(&text).expect("a key");
        assert_eq!(first.serialize_der(), key.serialize_der());

        let mut forged = root.claim.clone();
        forged.public_key = IdentityKey::generate().public().as_bytes().to_vec();
        assert!(verify_root_identity(root.certificate(), &forged).is_err());
        let unsigned = RootIdentity {
            voucher: Vec::new(),
            ..root.claim.clone()
        };
        assert!(verify_root_identity(root.certificate(), &unsigned).is_err());
    }
}
