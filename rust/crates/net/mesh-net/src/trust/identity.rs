//! A node's key and certificate.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use mesh_base::sync::lock;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::certificate::{Member, algorithms, from_pem, pem, verify_issued_by};
use super::clock::MeshClock;
use super::deny::DenyList;
use super::digest::sha256;
use super::error::TrustError;
use super::names;
use crate::files;

/// A node's key, its certificate and the root of its mesh. Clones share them, so that a renewed certificate is used by
/// every link made afterwards.
#[derive(Clone)]
pub struct NodeIdentity {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    key: NodeKey,
    root: CertificateDer<'static>,
    clock: MeshClock,
    deny_list: DenyList,
    current: Mutex<Current>,
}

#[derive(Clone)]
struct Current {
    certified: Arc<CertifiedKey>,
    member: Arc<Member>,
}

impl NodeIdentity {
    /// Reads the identity in a state directory.
    ///
    /// # Errors
    /// [`TrustError::NoIdentity`] if the node has not joined; another one, which names the file, if its files are not whole.
    pub fn load(dir: &Path) -> Result<Self, TrustError> {
        Self::load_with(dir, DenyList::open(dir)?)
    }

    /// As [`load`](Self::load), with a list of expelled nodes that is open already.
    pub(super) fn load_with(dir: &Path, deny_list: DenyList) -> Result<Self, TrustError> {
        let root_path = dir.join(names::ROOT_CERTIFICATE);
        let chain_path = dir.join(names::NODE_CERTIFICATE);
        let key_path = dir.join(names::NODE_KEY);
        let (root, certificate) = (files::read(&root_path)?, files::read(&chain_path)?);
        let key = NodeKey::load(dir)?;
        let (root, certificate, key) = match (root, certificate, key) {
            (Some(root), Some(certificate), Some(key)) => (root, certificate, key),
            (_, Some(_), None) => return Err(TrustError::missing(&key_path, &chain_path)),
            (None, Some(_), Some(_)) => return Err(TrustError::missing(&root_path, &chain_path)),
            (Some(_), None, Some(_)) => return Err(TrustError::missing(&chain_path, &key_path)),
            // A key alone is that of a join which broke off.
            (_, None, _) => {
                return Err(TrustError::NoIdentity {
                    dir: dir.to_owned(),
                });
            }
        };
        let root = from_pem(&root_path, &root)?;
        let certificate = from_pem(&chain_path, &certificate)?;
        Member::from_certificate(&certificate)
            .map_err(|error| TrustError::damaged(&chain_path, error))?;
        Self::assemble(dir, key, certificate, root, deny_list).map_err(|error| match error {
            TrustError::Mismatch(reason) => TrustError::MixedUp {
                path: chain_path,
                reason,
            },
            error => error,
        })
    }

    /// Stores the certificates that the mesh issued for `key`; the key is in `dir` already.
    pub(crate) fn store(
        dir: &Path,
        key: NodeKey,
        chain: Vec<CertificateDer<'static>>,
        deny_list: DenyList,
    ) -> Result<Self, TrustError> {
        let [certificate, root] = <[_; 2]>::try_from(chain).map_err(|chain| {
            TrustError::Mismatch(format!(
                "expected node and root certificate, got {}",
                chain.len()
            ))
        })?;
        let identity = Self::assemble(dir, key, certificate, root, deny_list)?;
        // The node's certificate comes last: while it is missing, the node has not joined.
        let root_path = dir.join(names::ROOT_CERTIFICATE);
        files::replace(&root_path, pem(identity.root()), files::PUBLIC)?;
        identity.persist(&identity.current().certified.cert[0])?;
        Ok(identity)
    }

    fn assemble(
        dir: &Path,
        key: NodeKey,
        certificate: CertificateDer<'static>,
        root: CertificateDer<'static>,
        deny_list: DenyList,
    ) -> Result<Self, TrustError> {
        let current = Mutex::new(Current::new(&key, certificate, &root)?);
        Ok(Self {
            inner: Arc::new(Inner {
                dir: dir.to_owned(),
                key,
                root,
                clock: MeshClock::default(),
                deny_list,
                current,
            }),
        })
    }

    /// The node's id: SHA-256 of its public key, lower-case hex.
    pub fn node_id(&self) -> String {
        self.member().node_id.clone()
    }

    /// Contents of the node's certificate.
    pub fn member(&self) -> Arc<Member> {
        self.current().member
    }

    /// The root of the node's mesh.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.inner.root
    }

    /// SHA-256 of the root's certificate.
    pub fn root_sha256(&self) -> [u8; 32] {
        sha256(&self.inner.root)
    }

    /// Time at which to renew the certificate: two thirds of its life.
    pub fn renew_at(&self) -> SystemTime {
        let member = self.member();
        let life = member.not_after.duration_since(member.not_before);
        member.not_before + life.unwrap_or_default() * 2 / 3
    }

    /// True if the certificate should be renewed: most of its life is over, or it begins after `now`, because
    /// the issuer's clock was wrong then.
    pub fn is_renewal_due(&self, now: SystemTime) -> bool {
        now >= self.renew_at() || now < self.member().not_before
    }

    /// The mesh's time as this node knows it.
    pub fn clock(&self) -> &MeshClock {
        &self.inner.clock
    }

    /// The expelled nodes, to which this node has no links.
    pub fn deny_list(&self) -> &DenyList {
        &self.inner.deny_list
    }

    /// A request (PKCS#10, DER) for a certificate for the same key.
    pub fn request(&self) -> Result<Vec<u8>, TrustError> {
        self.inner.key.request()
    }

    /// Takes a renewed certificate into use and into the state directory. It must be for this node's key, of the same
    /// mesh and role.
    pub fn install(&self, chain: Vec<CertificateDer<'static>>) -> Result<(), TrustError> {
        let none = || TrustError::Mismatch("no certificate was issued".to_owned());
        let certificate = chain.into_iter().next().ok_or_else(none)?;
        let renewed = Current::new(&self.inner.key, certificate, &self.inner.root)?;
        let (old, new) = (self.member(), &renewed.member);
        if (&old.mesh, old.role) != (&new.mesh, new.role) {
            let reason = format!(
                "renewal turned a {} of {} into a {} of {}",
                old.role, old.mesh, new.role, new.mesh
            );
            return Err(TrustError::Mismatch(reason));
        }
        self.persist(&renewed.certified.cert[0])?;
        *lock(&self.inner.current) = renewed;
        Ok(())
    }

    /// Loads the certificate in the state directory, if it differs from the one in use. It must be for this
    /// node's key, of the same root, mesh and role; other changes need a restart. True if it differed.
    pub fn reload(&self) -> Result<bool, TrustError> {
        let stored = Self::load_with(&self.inner.dir, self.inner.deny_list.clone())?;
        let (old, new) = (self.current(), stored.current());
        if old.certified.cert[0] == new.certified.cert[0] {
            return Ok(false);
        }
        let is_same_node =
            |a: &Member, b: &Member| (&a.node_id, &a.mesh, a.role) == (&b.node_id, &b.mesh, b.role);
        if self.root() != stored.root() || !is_same_node(&old.member, &new.member) {
            return Err(TrustError::Mismatch(
                "the identity in the state directory is another node's; restart to use it"
                    .to_owned(),
            ));
        }
        *lock(&self.inner.current) = new;
        Ok(true)
    }

    fn persist(&self, certificate: &CertificateDer<'_>) -> Result<(), TrustError> {
        let path = self.inner.dir.join(names::NODE_CERTIFICATE);
        files::replace(&path, pem(certificate), files::PUBLIC)
    }

    fn current(&self) -> Current {
        lock(&self.inner.current).clone()
    }
}

impl fmt::Debug for NodeIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeIdentity")
            .field("member", &self.member())
            .finish_non_exhaustive()
    }
}

impl ResolvesServerCert for NodeIdentity {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current().certified)
    }
}

impl ResolvesClientCert for NodeIdentity {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current().certified)
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl Current {
    fn new(
        key: &NodeKey,
        certificate: CertificateDer<'static>,
        root: &CertificateDer<'static>,
    ) -> Result<Self, TrustError> {
        let member = Member::from_certificate(&certificate)?;
        verify_issued_by(&certificate, root, &algorithms())
            .map_err(|error| TrustError::Mismatch(error.to_string()))?;
        let private = PrivateKeyDer::Pkcs8(key.pair.serialize_der().into());
        let signer = rustls::crypto::aws_lc_rs::sign::any_supported_type(&private)?;
        // The root travels along: a joining node checks it against its token.
        let certified = CertifiedKey::new(vec![certificate, root.clone()], signer);
        certified
            .keys_match()
            .map_err(|_| TrustError::Mismatch("it is for another key than node.key".to_owned()))?;
        Ok(Self {
            certified: Arc::new(certified),
            member: Arc::new(member),
        })
    }
}

/// Sets the identity in a state directory aside, so that the node can join anew with a token, as another one. Returns the
/// folder that the old files are in now; `None` if there was no identity.
///
/// # Errors
/// If a file cannot be moved.
pub fn set_aside(dir: &Path) -> Result<Option<PathBuf>, TrustError> {
    if !IDENTITY_FILES.iter().any(|name| dir.join(name).exists()) {
        return Ok(None);
    }
    let free = (1..)
        .map(|number| dir.join(format!("old-identity-{number}")))
        .find(|folder| !folder.exists());
    let folder = free.expect("some number is free");
    files::create_private_dir(&folder)?;
    move_identity(dir, &folder)?;
    Ok(Some(folder))
}

/// Moves the existing files of an identity to another folder of the same disk.
pub(crate) fn move_identity(from: &Path, to: &Path) -> Result<(), TrustError> {
    for name in IDENTITY_FILES {
        let (from, to) = (from.join(name), to.join(name));
        match std::fs::rename(&from, &to) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            moved => moved.map_err(|error| TrustError::io("move", &from, error))?,
        }
    }
    Ok(())
}

/// The certificate comes last: while it is missing, the node has not joined.
const IDENTITY_FILES: [&str; 3] = [
    names::NODE_KEY,
    names::ROOT_CERTIFICATE,
    names::NODE_CERTIFICATE,
];

/// A node's private key. It never leaves the state directory.
pub(crate) struct NodeKey {
    pair: KeyPair,
}

impl NodeKey {
    /// The key in `dir`; created if there is none. A repeated join must use the same key.
    pub(crate) fn load_or_create(dir: &Path) -> Result<Self, TrustError> {
        if let Some(key) = Self::load(dir)? {
            return Ok(key);
        }
        files::create_private_dir(dir)?;
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let path = dir.join(names::NODE_KEY);
        files::replace(&path, pair.serialize_pem(), files::PRIVATE)?;
        Ok(Self { pair })
    }

    pub(crate) fn load(dir: &Path) -> Result<Option<Self>, TrustError> {
        let path = dir.join(names::NODE_KEY);
        let Some(pem) = files::read(&path)? else {
            return Ok(None);
        };
        let pair = KeyPair::from_pem(&pem).map_err(|error| TrustError::damaged(&path, error))?;
        Ok(Some(Self { pair }))
    }

    /// A request (PKCS#10, DER) for a certificate for this key.
    pub(crate) fn request(&self) -> Result<Vec<u8>, TrustError> {
        // The root ignores everything but the key.
        let request = CertificateParams::default().serialize_request(&self.pair)?;
        Ok(request.der().to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trust::{Admission, Authority, Validity};

    #[test]
    fn a_certificate_that_was_replaced_on_disk_is_taken_into_use_if_it_is_this_nodes() {
        let now = SystemTime::now();
        let dir = tempfile::tempdir().expect("a folder");
        let authority = Authority::open(dir.path(), "test", Validity::default()).expect("a root");
        let identity = authority
            .head_identity(dir.path(), "head", now)
            .expect("an identity");
        assert!(!identity.reload().expect("nothing new"));

        // Somebody else renews it: another process, or an operator.
        let other = NodeIdentity::load(dir.path()).expect("the same identity");
        let request = other.request().expect("a request");
        let chain = authority
            .renew(&other.member(), &request, now)
            .expect("a certificate");
        other.install(chain).expect("stored");
        let in_use = identity.current().certified.cert[0].clone();
        assert!(identity.reload().expect("the new one"));
        assert_ne!(identity.current().certified.cert[0], in_use);
        assert_eq!(identity.member().not_after, other.member().not_after);

        let elsewhere = tempfile::tempdir().expect("a folder");
        let stranger = Authority::open(elsewhere.path(), "test", Validity::default())
            .expect("a root")
            .head_identity(elsewhere.path(), "head", now);
        stranger.expect("an identity");
        for file in [
            names::ROOT_CERTIFICATE,
            names::NODE_CERTIFICATE,
            names::NODE_KEY,
        ] {
            std::fs::copy(elsewhere.path().join(file), dir.path().join(file)).expect("copied");
        }
        let error = identity.reload().expect_err("another node's");
        assert!(error.to_string().contains("restart"), "{error}");
        assert_eq!(identity.member().node_id, other.member().node_id);
    }
}
