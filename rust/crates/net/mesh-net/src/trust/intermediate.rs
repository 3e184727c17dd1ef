//! A head without the root's keys: it issues by an intermediate, which the root has signed elsewhere.
//!
//! The head makes keys and a request, a program with `root.key` signs it, the head installs the answer. Both
//! travel as text, and neither holds a secret. `intermediate.key` has the keys and the signed papers in one
//! file, so that both are replaced at once.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mesh_base::clock::{self, unix_seconds};
use mesh_identity::{IdentityKey, Intermediate, NodeId, PublicKey};
use mesh_proto::{IntermediatePapers, IntermediateRequest};
use prost::Message;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use super::certificate::{INTERMEDIATE_SCHEME, from_pem, moment, named_id};
use super::digest::sha256;
use super::error::TrustError;
use super::names;
use super::root_identity::verify_root_identity;
use super::root_keys::{Delegated, RootKeys, former_part, identity_in};
use crate::files;

/// Makes keys for an intermediate in the head's state directory, and a request for them. Keys that wait for
/// their papers are used again.
///
/// # Errors
/// If the directory has no `root.crt`, or a file cannot be read or written.
pub fn request_intermediate(dir: &Path) -> Result<String, TrustError> {
    let root = root_certificate(dir)?;
    let path = dir.join(names::NEXT_INTERMEDIATE);
    let keys = match Keys::read(&path)? {
        Some(keys) => keys,
        None => {
            let keys = Keys::generate()?;
            files::replace(&path, keys.text("").as_bytes(), files::PRIVATE)?;
            give_to_owner_of(&dir.join(names::ROOT_CERTIFICATE), &path)?;
            keys
        }
    };
    let csr = CertificateParams::default().serialize_request(&keys.pair)?;
    let (root, csr) = (sha256(&root), csr.der().to_vec());
    let request = IntermediateRequest {
        version: VERSION,
        signature: keys
            .identity
            .sign(REQUEST_CONTEXT, &signed_part(&root, &csr)),
        root: root.to_vec(),
        csr,
        public_key: keys.identity.public().as_bytes().to_vec(),
    };
    Ok(to_text(REQUEST, &request))
}

/// Id of the ML-DSA key in a request, to be compared at both ends. The request is not verified.
///
/// # Errors
/// If it is malformed.
pub fn requested_intermediate(request: &str) -> Result<NodeId, TrustError> {
    let request: IntermediateRequest = from_text(REQUEST, request)?;
    let key = PublicKey::from_bytes(&request.public_key);
    let key = key.map_err(|error| TrustError::Intermediate(error.to_string()))?;
    Ok(key.node_id())
}

/// Signs a request with the keys in a `root.key`. The intermediate is good for so long.
///
/// # Errors
/// If the file does not hold both keys of a root, or the request is malformed or for another root.
pub fn sign_intermediate(
    root_key: &Path,
    request: &str,
    life: Duration,
    now: SystemTime,
) -> Result<String, TrustError> {
    let text = files::read(root_key)?.map(Zeroizing::new);
    let text = text.ok_or_else(|| {
        let missing = std::io::Error::from(std::io::ErrorKind::NotFound);
        TrustError::io("read", root_key, missing)
    })?;
    if identity_in(&text).is_none() {
        let reason = "it does not hold both keys of a mesh root: take the root.key of a head that has started with this version";
        return Err(TrustError::damaged(root_key, reason));
    }
    if former_part(&text).is_some() {
        return Err(TrustError::Intermediate(format!(
            "the root in {} is being rotated: sign with its root.key when the overlap is over, since an intermediate knows one root",
            root_key.display()
        )));
    }
    let root = RootKeys::read(root_key, &text, from_pem(root_key, &text)?, root_key)?;
    let request: IntermediateRequest = from_text(REQUEST, request)?;
    let refused = |reason: String| TrustError::Intermediate(format!("the request {reason}"));
    if request.version != VERSION {
        let version = request.version;
        return Err(refused(format!(
            "is of version {version}: update this program"
        )));
    }
    let digest = sha256(&root.certificate);
    if request.root != digest {
        return Err(refused(format!(
            "is for another mesh root than that of {}: compare `hydramesh root show`",
            root_key.display()
        )));
    }
    let key = PublicKey::from_bytes(&request.public_key);
    let key = key.map_err(|error| refused(error.to_string()))?;
    let signed = signed_part(&digest, &request.csr);
    if !key.verifies(REQUEST_CONTEXT, &signed, &request.signature) {
        return Err(refused("was altered: make another".to_owned()));
    }
    let said = Intermediate {
        key,
        mesh: root.mesh.clone(),
        root: digest,
        // Papers of nodes begin a day before their issue, and clocks differ.
        not_before: unix_seconds(now - 2 * DAY),
        not_after: unix_seconds(now + life),
    };
    let papers = IntermediatePapers {
        certificate: root.certify_intermediate(&request.csr, &said)?.to_vec(),
        statement: Some(said.sign(&root.identity)),
        root: root.certificate.to_vec(),
        root_key: Some(root.claim.clone()),
    };
    Ok(to_text(PAPERS, &papers))
}

/// Puts signed papers into use when the head starts next; the keys are those of the last request. Returns the
/// end of the intermediate, seconds since the Unix epoch.
///
/// # Errors
/// If the papers are malformed, of another root, for other keys, or over; nothing has changed then.
pub fn install_intermediate(dir: &Path, papers: &str, now: SystemTime) -> Result<u64, TrustError> {
    let next = dir.join(names::NEXT_INTERMEDIATE);
    let Some(keys) = Keys::read(&next)? else {
        return Err(TrustError::Intermediate(format!(
            "missing {}: make a request here first (`hydramesh root intermediate request`), and install what was signed for it",
            next.display()
        )));
    };
    let papers: IntermediatePapers = from_text(PAPERS, papers)?;
    let text = keys.text(&to_text(PAPERS, &papers));
    let root = delegate(&root_certificate(dir)?, keys, papers)
        .map_err(|reason| TrustError::Intermediate(format!("the signed intermediate: {reason}")))?;
    root.check(now)?;
    let path = dir.join(names::INTERMEDIATE);
    files::replace(&path, text.as_bytes(), files::PRIVATE)?;
    give_to_owner_of(&dir.join(names::ROOT_CERTIFICATE), &path)?;
    std::fs::remove_file(&next).map_err(|error| TrustError::io("remove", &next, error))?;
    Ok(root
        .delegated
        .map_or(0, |delegated| delegated.said.not_after))
}

/// The intermediate in a head's state directory; `None` if there is none.
pub(super) fn load(dir: &Path) -> Result<Option<RootKeys>, TrustError> {
    let path = dir.join(names::INTERMEDIATE);
    let Some(keys) = Keys::read(&path)? else {
        return Ok(None);
    };
    let text = files::read(&path)?.map(Zeroizing::new).unwrap_or_default();
    let papers = from_text(PAPERS, &text).map_err(|error| TrustError::damaged(&path, error))?;
    let root = delegate(&root_certificate(dir)?, keys, papers);
    let root = root.map_err(|reason| TrustError::MixedUp { path, reason })?;
    let end = root
        .delegated
        .as_ref()
        .map_or(0, |known| known.said.not_after);
    tracing::info!(
        until = clock::utc_of(end),
        "this head issues certificates by an intermediate of the mesh root"
    );
    Ok(Some(root))
}

/// Checks keys and papers against each other and the root.
fn delegate(
    root: &CertificateDer<'static>,
    keys: Keys,
    papers: IntermediatePapers,
) -> Result<RootKeys, String> {
    if papers.root != root[..] {
        return Err("it is of another mesh root than root.crt".to_owned());
    }
    let claim = papers.root_key.unwrap_or_default();
    let root_key = verify_root_identity(root, &claim).map_err(|error| error.to_string())?;
    let statement = papers.statement.unwrap_or_default();
    let said = Intermediate::verify(&statement, &root_key).map_err(|error| error.to_string())?;
    let certificate = CertificateDer::from(papers.certificate);
    check_certificate(&certificate, root, &said)?;
    let (_, parsed) = X509Certificate::from_der(&certificate).map_err(|error| error.to_string())?;
    let certified = &*parsed.public_key().subject_public_key.data;
    let is_ours = said.key == *keys.identity.public()
        && said.root == sha256(root)
        && *certified == *rcgen::PublicKeyData::der_bytes(&keys.pair);
    if !is_ours {
        return Err("it is for other keys than those of the last request here".to_owned());
    }
    let delegated = Delegated {
        certificate,
        statement,
        said,
        root: root_key,
    };
    RootKeys::delegated(root.clone(), claim, keys.pair, keys.identity, delegated)
        .map_err(|error| error.to_string())
}

/// The certificate is the root's, and says the same as the statement.
fn check_certificate(
    certificate: &CertificateDer<'_>,
    root: &CertificateDer<'_>,
    said: &Intermediate,
) -> Result<(), String> {
    let parse = |der| X509Certificate::from_der(der).map_err(|error| error.to_string());
    let ((_, certificate), (_, root)) = (parse(certificate)?, parse(root)?);
    let signer = &root.public_key().subject_public_key.data;
    let signer = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, signer);
    let signature = &certificate.signature_value.data;
    if (signer.verify(certificate.tbs_certificate.as_ref(), signature)).is_err() {
        return Err("its certificate is not signed by the mesh root".to_owned());
    }
    let named = named_id(&certificate, INTERMEDIATE_SCHEME)?;
    let validity = certificate.validity();
    let dates = [validity.not_before, validity.not_after].map(|at| unix_seconds(moment(at)));
    let alike = named == Some(said.key.node_id().to_string())
        && dates == [said.not_before, said.not_after]
        && certificate.is_ca();
    match alike {
        true => Ok(()),
        false => Err("its certificate and the statement about it differ".to_owned()),
    }
}

/// The keys of an intermediate.
struct Keys {
    pair: KeyPair,
    identity: IdentityKey,
}

impl Keys {
    fn generate() -> Result<Self, TrustError> {
        Ok(Self {
            pair: KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?,
            identity: IdentityKey::generate(),
        })
    }

    fn read(path: &Path) -> Result<Option<Self>, TrustError> {
        let Some(text) = files::read(path)?.map(Zeroizing::new) else {
            return Ok(None);
        };
        let pair = KeyPair::from_pem(&text).map_err(|error| TrustError::damaged(path, error))?;
        let identity = identity_in(&text)
            .ok_or_else(|| TrustError::damaged(path, "its ML-DSA key is missing"))?;
        let identity = identity.map_err(|error| TrustError::damaged(path, error))?;
        Ok(Some(Self { pair, identity }))
    }

    /// The text of a file, with the papers between the keys as in `root.key`.
    fn text(&self, papers: &str) -> Zeroizing<String> {
        let pair = Zeroizing::new(self.pair.serialize_pem());
        let identity = self.identity.to_pem();
        Zeroizing::new([pair.as_str(), papers, identity.as_str()].concat())
    }
}

fn root_certificate(dir: &Path) -> Result<CertificateDer<'static>, TrustError> {
    let path = dir.join(names::ROOT_CERTIFICATE);
    match files::read(&path)? {
        Some(text) => from_pem(&path, &text),
        None => Err(TrustError::missing(&path, dir)),
    }
}

/// An administrator may do this for the user that the head runs as.
fn give_to_owner_of(example: &Path, path: &Path) -> Result<(), TrustError> {
    let given = std::fs::metadata(example)
        .and_then(|owner| std::os::unix::fs::chown(path, Some(owner.uid()), Some(owner.gid())));
    given.map_err(|error| TrustError::io("change the owner of", path, error))
}

/// The part of a request that its ML-DSA key signs.
fn signed_part(root: &[u8; 32], csr: &[u8]) -> Vec<u8> {
    [&root[..], csr].concat()
}

/// RFC 7468 text of a message.
fn to_text(label: &str, message: &impl Message) -> String {
    let mut body = STANDARD.encode(message.encode_to_vec());
    for line_end in (64..body.len()).step_by(64).rev() {
        body.insert(line_end, '\n');
    }
    format!("-----BEGIN {label}-----\n{body}\n-----END {label}-----\n")
}

fn from_text<M: Message + Default>(label: &str, text: &str) -> Result<M, TrustError> {
    let (begin, end) = (
        format!("-----BEGIN {label}-----"),
        format!("-----END {label}-----"),
    );
    let body = text
        .split_once(&begin)
        .and_then(|(_, rest)| rest.split_once(&end));
    let unfit = |reason: &str| TrustError::Intermediate(format!("{label}: {reason}"));
    let (body, _) = body.ok_or_else(|| unfit("there is no such block in the text"))?;
    if body.len() > LONGEST_TEXT {
        return Err(unfit("it is too long"));
    }
    let body: String = body.split_whitespace().collect();
    let bytes = STANDARD
        .decode(body)
        .map_err(|error| unfit(&error.to_string()))?;
    M::decode(&bytes[..]).map_err(|error| unfit(&error.to_string()))
}

/// Validity of an intermediate, unless its signer wants another.
pub const INTERMEDIATE_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);

const VERSION: u32 = 1;
const REQUEST: &str = "HYDRAMESH INTERMEDIATE REQUEST";
const PAPERS: &str = "HYDRAMESH INTERMEDIATE";
const REQUEST_CONTEXT: &[u8] = b"hydramesh-intermediate-request-v1";
/// Requests have some 8,000 characters, papers 12,000.
const LONGEST_TEXT: usize = 64 << 10;
const DAY: Duration = Duration::from_secs(24 * 3600);

#[cfg(test)]
mod tests {
    use rustls::{CertificateError, Error};

    use super::super::certificate::{Role, algorithms, verify_issued_by};
    use super::super::issued::{Subject, Validity};
    use super::*;
    use crate::trust::{Applicant, MeshRoot};

    /// The state directory of a head, and its intermediate.
    fn head(life: Duration) -> (tempfile::TempDir, RootKeys) {
        let dir = tempfile::tempdir().unwrap();
        MeshRoot::load_or_create(dir.path(), "attic").unwrap();
        let (now, root_key) = (SystemTime::now(), dir.path().join(names::ROOT_KEY));
        let request = request_intermediate(dir.path()).unwrap();
        let again = request_intermediate(dir.path()).unwrap();
        let ids = [&request, &again].map(|text| requested_intermediate(text).unwrap());
        assert_eq!(ids[0], ids[1], "the same keys wait");
        let papers = sign_intermediate(&root_key, &request, life, now).unwrap();
        install_intermediate(dir.path(), &papers, now).unwrap();
        let keys = load(dir.path()).unwrap().expect("installed");
        (dir, keys)
    }

    #[test]
    fn a_certificate_that_outlives_its_intermediate_is_refused() {
        let (dir, mut keys) = head(2 * DAY);
        let worker = tempfile::tempdir().unwrap();
        let applicant = Applicant::open(worker.path()).unwrap();
        let (request, now) = (applicant.request().unwrap(), SystemTime::now());
        let subject = Subject {
            request: &request,
            name: "laptop",
            role: Role::Worker,
            identity: applicant.public_key(),
        };
        let root = keys.certificate.clone();
        let verdict = |keys: &RootKeys| {
            let issued = keys.issue(&subject, &Validity::default(), now).unwrap();
            let (own, others) = issued.certificates.split_first().unwrap();
            assert_eq!(others.len(), 2);
            assert!(
                verify_issued_by(own, &[], &root, &algorithms()).is_err(),
                "alone"
            );
            verify_issued_by(own, others, &root, &algorithms())
        };
        assert_eq!(verdict(&keys), Ok(()));
        // A thief of the keys says otherwise.
        keys.delegated.as_mut().unwrap().said.not_after += 1;
        let late = Err(Error::InvalidCertificate(CertificateError::Expired));
        assert_eq!(verdict(&keys), late);
        assert!(dir.path().join(names::ROOT_KEY).exists());
    }

    #[test]
    fn papers_count_for_their_root_and_keys_alone_and_no_change_of_them_is_taken() {
        let (dir, _) = head(DAY);
        let (other, _) = head(DAY);
        let (now, root_key) = (SystemTime::now(), dir.path().join(names::ROOT_KEY));
        let request = request_intermediate(dir.path()).unwrap();
        let install = |papers: &str| install_intermediate(dir.path(), papers, now);
        let before = files::read(&dir.path().join(names::INTERMEDIATE)).unwrap();
        let foreign = other.path().join(names::ROOT_KEY);
        let error = sign_intermediate(&foreign, &request, DAY, now).unwrap_err();
        assert!(error.to_string().contains("another mesh root"), "{error}");
        // Signed for the request of another head.
        let theirs = request_intermediate(other.path()).unwrap();
        let theirs = sign_intermediate(&foreign, &theirs, DAY, now).unwrap();
        assert!(
            install(&theirs)
                .unwrap_err()
                .to_string()
                .contains("root.crt")
        );
        let over = sign_intermediate(&root_key, &request, DAY, now - 2 * DAY).unwrap();
        assert!(matches!(
            install(&over),
            Err(TrustError::IntermediateEnded { .. })
        ));
        let good = sign_intermediate(&root_key, &request, DAY, now).unwrap();
        let papers: IntermediatePapers = from_text(PAPERS, &good).unwrap();
        let changes: [fn(&mut IntermediatePapers); 4] = [
            |papers| papers.certificate[300] ^= 1,
            |papers| papers.root[300] ^= 1,
            |papers| papers.statement.as_mut().unwrap().body[20] ^= 1,
            |papers| papers.root_key.as_mut().unwrap().public_key[20] ^= 1,
        ];
        for change in changes {
            let mut papers = papers.clone();
            change(&mut papers);
            let error = install(&to_text(PAPERS, &papers)).unwrap_err();
            assert!(matches!(error, TrustError::Intermediate(_)), "{error}");
        }
        let mut altered: IntermediateRequest = from_text(REQUEST, &request).unwrap();
        altered.csr[60] ^= 1;
        let altered = to_text(REQUEST, &altered);
        let error = sign_intermediate(&root_key, &altered, DAY, now).unwrap_err();
        assert!(error.to_string().contains("was altered"), "{error}");
        for text in [
            "",
            "-----BEGIN HYDRAMESH INTERMEDIATE-----\n=\n-----END HYDRAMESH INTERMEDIATE-----",
        ] {
            assert!(install(text).is_err());
        }
        assert_eq!(
            files::read(&dir.path().join(names::INTERMEDIATE)).unwrap(),
            before
        );
        let rotated = MeshRoot::load_or_create(other.path(), "attic").unwrap();
        rotated.rotate(other.path(), now + DAY, now).unwrap();
        let theirs = request_intermediate(other.path()).unwrap();
        let error = sign_intermediate(&foreign, &theirs, DAY, now).unwrap_err();
        assert!(error.to_string().contains("being rotated"), "{error}");
        install(&good).unwrap();
        let error = install(&good).unwrap_err().to_string();
        assert!(error.contains("root intermediate request"), "{error}");
    }
}
