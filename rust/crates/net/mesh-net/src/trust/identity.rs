//! A node's key and certificate.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::SystemTime;

use data_encoding::HEXLOWER;
use mesh_base::sync::lock;
use mesh_identity::{Document, IdentityKey, PublicKey};
use mesh_proto::SignedSuccession;
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::CertificateDer;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::sync::Notify;

use super::admission::{Admission, RenewAsk};
use super::certificate::{Member, from_pem, pem};
use super::certified::{Current, check_document, further_certificates};
use super::clock::MeshClock;
use super::deny::DenyList;
use super::digest::sha256;
use super::error::TrustError;
use super::evidence::EvidenceSource;
use super::identity_keys::{IdentityKeys, papers, read_document, read_signed, write_document};
use super::issued::Issued;
use super::names;
use super::node_key::NodeKey;
use super::root_history;
use super::roots::{Roots, root_hint};
use super::succession::Succession;
use crate::files;

/// A node's key, its certificate and the root of its mesh. Clones share them, so that a renewed certificate is used by
/// every link made afterwards.
#[derive(Clone)]
pub struct NodeIdentity {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    roots: Mutex<Roots>,
    /// Counts changes of `roots`.
    changes_of_roots: AtomicU64,
    /// Wakes whoever renews the certificate.
    renewal_wanted: Notify,
    clock: MeshClock,
    deny_list: DenyList,
    current: Mutex<Current>,
    evidence: OnceLock<EvidenceSource>,
}

/// The keys of a node that is to join, in its state directory.
pub struct Applicant {
    key: Arc<NodeKey>,
    identity: IdentityKeys,
}

impl Applicant {
    /// The keys in `dir`; those that are missing are made. A repeated join uses the same ones.
    ///
    /// # Errors
    /// If one is damaged or cannot be written.
    pub fn open(dir: &Path) -> Result<Self, TrustError> {
        Ok(Self {
            key: Arc::new(NodeKey::load_or_create(dir)?),
            identity: IdentityKeys::load_or_create(dir)?,
        })
    }

    /// As [`open`](Self::open), with a fresh key for the certificate. It is written by [`NodeIdentity::store`].
    ///
    /// # Errors
    /// As there.
    pub fn with_new_key(dir: &Path) -> Result<Self, TrustError> {
        Ok(Self {
            key: Arc::new(NodeKey::generate()?),
            ..Self::open(dir)?
        })
    }

    /// A request (PKCS#10, DER) for a certificate for this key.
    ///
    /// # Errors
    /// If the cryptographic library fails.
    pub fn request(&self) -> Result<Vec<u8>, TrustError> {
        self.key.request()
    }

    /// The public half of the identity key; `None` where none can be written.
    pub fn public_key(&self) -> Option<&PublicKey> {
        Some(self.identity.wanted()?.public())
    }

    pub(crate) fn identity_key(&self) -> Option<&IdentityKey> {
        self.identity.wanted().map(|key| &**key)
    }
}

/// Keys of a certificate that is asked for.
pub(crate) struct Renewal {
    key: Arc<NodeKey>,
    /// The identity in the present certificate, or the node's first one.
    pub(crate) identity: Option<Arc<IdentityKey>>,
    /// The identity that takes its place.
    pub(crate) successor: Option<Arc<IdentityKey>>,
}

impl Renewal {
    /// A request (PKCS#10, DER) for a certificate for this key.
    pub(crate) fn request(&self) -> Result<Vec<u8>, TrustError> {
        self.key.request()
    }
}

/// A node's key, and how others know it.
#[derive(Clone, Debug)]
pub struct Signer {
    /// The node's identity key.
    pub key: Arc<IdentityKey>,
    /// The mesh root's document about it, signed and encoded.
    pub document: Vec<u8>,
    /// The mesh root's ML-DSA key.
    pub root: PublicKey,
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
    pub fn load_with(dir: &Path, deny_list: DenyList) -> Result<Self, TrustError> {
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
        let (intermediate, former) = further_certificates(&certificate);
        let certificate = from_pem(&chain_path, &certificate)?;
        let roots = root_history::load(dir, root)?;
        let member = Member::from_certificate(&certificate)
            .map_err(|error| TrustError::damaged(&chain_path, error))?;
        let mut identity = IdentityKeys::of_member(dir, &member)?;
        let chain: Vec<_> = [certificate].into_iter().chain(intermediate).collect();
        let current = Current::new(Arc::new(key), &chain, &roots, identity.clone());
        let current = current.or_else(|error| {
            // A renewal for another key may have been cut off behind the certificate.
            let next = NodeKey::read(&dir.join(names::NEXT_NODE_KEY))?.ok_or(error)?;
            let current = Current::new(Arc::new(next), &chain, &roots, identity.clone())?;
            NodeKey::settle(dir)?;
            Ok(current)
        });
        let mut current = current.map_err(|error| match error {
            TrustError::Mismatch(reason) => TrustError::MixedUp {
                path: chain_path,
                reason,
            },
            error => error,
        })?;
        identity.settle(dir, &current.member.node_id)?;
        current.identity = identity;
        current.add_former(former, &roots);
        Ok(Self::with(dir, roots, deny_list, current))
    }

    /// Stores the papers that the mesh issued to `applicant`, whose keys are in `dir` already.
    pub fn store(
        dir: &Path,
        applicant: Applicant,
        issued: Issued,
        deny_list: DenyList,
    ) -> Result<Self, TrustError> {
        let Applicant { key, mut identity } = applicant;
        let (chain, root) = match &issued.certificates[..] {
            [chain @ .., root] if (1..=2).contains(&chain.len()) => (chain, root.clone()),
            others => {
                return Err(TrustError::Mismatch(format!(
                    "expected node and root certificate, perhaps an intermediate between them, got {}",
                    others.len()
                )));
            }
        };
        let mut roots = root_history::load(dir, root.clone())?;
        if let Some(signed) = &issued.succession {
            roots.learn(&Succession::verify(signed)?)?;
            root_history::append(dir, &roots, signed)?;
        }
        let mut current = Current::new(key, chain, &roots, identity.clone())?;
        current.add_former(issued.former, &roots);
        let member = &current.member;
        check_document(
            member,
            identity.wanted(),
            &root,
            &issued.document,
            &issued.root,
        )?;
        current.key.write(&dir.join(names::NEXT_NODE_KEY))?;
        // The node's certificate comes last: while it is missing, the node has not joined.
        if !issued.document.is_empty() {
            write_document(dir, &issued.document, &issued.root, &root)?;
        }
        files::replace(
            &dir.join(names::ROOT_CERTIFICATE),
            pem(&root),
            files::PUBLIC,
        )?;
        let path = dir.join(names::NODE_CERTIFICATE);
        files::replace(&path, current.pem(), files::PUBLIC)?;
        NodeKey::settle(dir)?;
        identity.settle(dir, &current.member.node_id)?;
        current.identity = identity;
        Ok(Self::with(dir, roots, deny_list, current))
    }

    fn with(dir: &Path, roots: Roots, deny_list: DenyList, current: Current) -> Self {
        let inner = Inner {
            dir: dir.to_owned(),
            roots: Mutex::new(roots),
            changes_of_roots: AtomicU64::new(0),
            renewal_wanted: Notify::new(),
            clock: MeshClock::default(),
            deny_list,
            current: Mutex::new(current),
            evidence: OnceLock::new(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// The node's id: SHA-256 of its ML-DSA key, lower-case hex.
    pub fn node_id(&self) -> String {
        self.member().node_id.clone()
    }

    /// Contents of the node's certificate.
    pub fn member(&self) -> Arc<Member> {
        self.current().member
    }

    /// The root of the node's mesh: the newest one that it knows.
    pub fn root(&self) -> CertificateDer<'static> {
        lock(&self.inner.roots).current().clone()
    }

    /// SHA-256 of the root's certificate.
    pub fn root_sha256(&self) -> [u8; 32] {
        lock(&self.inner.roots).sha256()
    }

    /// The roots that the node accepts and accepted.
    pub fn roots(&self) -> Roots {
        lock(&self.inner.roots).clone()
    }

    /// SHA-256 of the root before the newest one, while it is accepted.
    pub fn former_root(&self) -> Option<[u8; 32]> {
        let roots = self.roots();
        let former = roots.former(self.inner.clock.now());
        former.map(|former| sha256(&former.root))
    }

    /// A number that changes with the roots.
    pub(crate) fn changes_of_roots(&self) -> u64 {
        self.inner.changes_of_roots.load(Ordering::Acquire)
    }

    /// Takes in the statement that the mesh root has a successor, as the head tells it on an authenticated
    /// link. Both roots are accepted from here on, and a certificate of the new one is asked for. Returns
    /// true if it was news. Blocks on the disk.
    ///
    /// # Errors
    /// If it is not signed by both roots, does not continue this node's root, or cannot be written.
    pub fn learn(&self, signed: &SignedSuccession) -> Result<bool, TrustError> {
        let succession = Succession::verify(signed)?;
        let member = self.member();
        if succession.mesh != member.mesh {
            let reason = format!(
                "the succession of mesh roots is of the mesh {:?}, and this node is of {:?}",
                succession.mesh, member.mesh
            );
            return Err(TrustError::Mismatch(reason));
        }
        let mut roots = lock(&self.inner.roots);
        let mut fresh = roots.clone();
        if !fresh.learn(&succession)? {
            return Ok(false);
        }
        root_history::append(&self.inner.dir, &fresh, signed)?;
        *roots = fresh;
        drop(roots);
        self.inner.changes_of_roots.fetch_add(1, Ordering::Release);
        self.inner.renewal_wanted.notify_one();
        Ok(true)
    }

    /// Drops a former root whose time is over, and the certificate of it. Returns true if there was one.
    ///
    /// # Errors
    /// If the file of the certificate cannot be written; the root is dropped all the same.
    pub fn expire_roots(&self, now: SystemTime) -> Result<bool, TrustError> {
        if !lock(&self.inner.roots).expire(now) {
            return Ok(false);
        }
        self.inner.changes_of_roots.fetch_add(1, Ordering::Release);
        let mut current = lock(&self.inner.current);
        if current.former.take().is_some() {
            let path = self.inner.dir.join(names::NODE_CERTIFICATE);
            files::replace(&path, current.pem(), files::PUBLIC)?;
        }
        Ok(true)
    }

    /// True if the certificate is not of the newest root.
    pub fn is_root_due(&self) -> bool {
        let root = self.root();
        self.current().root != root
    }

    /// Waits until a renewal is wanted at once, because the root has a successor.
    pub(crate) async fn renewal_wanted(&self) {
        self.inner.renewal_wanted.notified().await;
    }

    /// The node's ML-DSA key, if the certificate is bound to it.
    pub fn identity_key(&self) -> Option<Arc<IdentityKey>> {
        let current = self.current();
        let id = &current.member.node_id;
        let key = current.identity.key;
        key.filter(|key| key.node_id().to_string() == *id)
    }

    /// The mesh root's document about this node, with what somebody needs to verify it
    /// ([`read_papers`](super::read_papers)).
    pub fn papers(&self) -> Option<Vec<u8>> {
        papers(&self.inner.dir)
    }

    /// The certificate to show to a peer that accepts the roots with these hints; a peer of an earlier
    /// version names none.
    fn certificate_for(
        &self,
        names_none: bool,
        accepts: impl Fn(&[u8]) -> bool,
    ) -> Arc<CertifiedKey> {
        let current = self.current();
        let roots = self.roots();
        let former = current.former.filter(|_| {
            let former = roots.former(self.inner.clock.now());
            former.is_some_and(|former| former.root != current.root)
        });
        match former {
            Some(former) if names_none => former,
            Some(former)
                if !accepts(&root_hint(&sha256(&current.root)))
                    && former
                        .cert
                        .last()
                        .is_some_and(|root| accepts(&root_hint(&sha256(root)))) =>
            {
                former
            }
            _ => current.certified,
        }
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
        now >= self.renew_at() || now < self.member().not_before || self.is_root_due()
    }

    /// The mesh's time as this node knows it.
    pub fn clock(&self) -> &MeshClock {
        &self.inner.clock
    }

    /// The expelled nodes, to which this node has no links.
    pub fn deny_list(&self) -> &DenyList {
        &self.inner.deny_list
    }

    /// Has evidence of this source go with renewals from now on. The first source counts.
    pub fn set_evidence(&self, source: EvidenceSource) {
        let _ = self.inner.evidence.set(source);
    }

    pub(crate) fn evidence(&self) -> Option<&EvidenceSource> {
        self.inner.evidence.get()
    }

    /// A request (PKCS#10, DER) for a certificate for the same key.
    pub fn request(&self) -> Result<Vec<u8>, TrustError> {
        self.current().key.request()
    }

    /// The public half of the node's identity key; `None` where it has none.
    pub fn public_key(&self) -> Option<PublicKey> {
        let current = self.current();
        Some(current.identity.key.as_ref()?.public().clone())
    }

    /// True if the certificate is not bound to the identity that the node is to have: it is of an earlier version, or the
    /// key was rotated. A renewal mends that.
    pub fn is_identity_due(&self) -> bool {
        let current = self.current();
        let wanted = current.identity.wanted();
        wanted.is_some_and(|key| key.node_id().to_string() != current.member.node_id)
    }

    /// The mesh root's document about this node, as it was stored; `None` if it has none, or it is not of this root.
    pub fn document(&self) -> Option<Document> {
        let roots = self.roots();
        read_document(&self.inner.dir).filter(|document| roots.is_of_mesh(&document.root))
    }

    /// The node's key with the root's document about it, to sign and show elsewhere; `None` if it has no document, or one of
    /// another key or root.
    pub fn signer(&self) -> Option<Signer> {
        let (document, encoded, root) = read_signed(&self.inner.dir)?;
        let key = self.current().identity.key?;
        let fits = document.root == self.root_sha256() && document.key == *key.public();
        fits.then_some(Signer {
            key,
            document: encoded,
            root,
        })
    }

    /// The keys to ask a certificate for: the present ones, or fresh ones if the identity is rotated.
    pub(crate) fn renewal(&self) -> Result<Renewal, TrustError> {
        let Current { key, identity, .. } = self.current();
        Ok(Renewal {
            // Whoever has the old key must not be able to pose as the new identity.
            key: match identity.next {
                Some(_) => Arc::new(NodeKey::generate()?),
                None => key,
            },
            identity: identity.key,
            successor: identity.next,
        })
    }

    /// Takes renewed papers for the same keys into use and into the state directory. They must be of the same mesh and
    /// role.
    pub fn install(&self, issued: Issued) -> Result<(), TrustError> {
        let renewal = Renewal {
            successor: None,
            ..self.renewal()?
        };
        let key = self.current().key;
        self.install_for(Renewal { key, ..renewal }, issued)
    }

    /// Renews the certificate of the node that has the admission itself.
    ///
    /// # Errors
    /// If the admission refuses, or the papers cannot be stored.
    pub fn renew_by(&self, admission: &dyn Admission, now: SystemTime) -> Result<(), TrustError> {
        let (member, request, key) = (self.member(), self.request()?, self.public_key());
        let ask = RenewAsk {
            member: &member,
            request: &request,
            identity: key.as_ref(),
            successor: None,
            root: self.root_sha256(),
            evidence: None,
        };
        let issued = admission.renew(&ask, now);
        self.install(issued.map_err(|refusal| TrustError::Mismatch(refusal.to_string()))?)
    }

    /// As [`install`](Self::install), for the keys of a renewal.
    pub(crate) fn install_for(&self, renewal: Renewal, issued: Issued) -> Result<(), TrustError> {
        let chain = issued.certificates;
        if let Some(signed) = &issued.succession {
            self.learn(signed)?;
        }
        let (roots, mut identity) = (self.roots(), self.current().identity);
        let mut renewed = Current::new(renewal.key.clone(), &chain, &roots, identity.clone())?;
        renewed.add_former(issued.former, &roots);
        let root = renewed.root.clone();
        let (old, new) = (self.member(), &renewed.member);
        let wanted = renewal.successor.as_ref().or(renewal.identity.as_ref());
        check_document(new, wanted, &root, &issued.document, &issued.root)?;
        if old.has_identity() && !new.has_identity() {
            tracing::warn!(
                "the head is of an earlier version: until it is updated, it knows this node by the key of its certificate"
            );
        }
        if (&old.mesh, old.role) != (&new.mesh, new.role) {
            let reason = format!(
                "renewal turned a {} of {} into a {} of {}",
                old.role, old.mesh, new.role, new.mesh
            );
            return Err(TrustError::Mismatch(reason));
        }
        let dir = &self.inner.dir;
        if renewal.successor.is_some() {
            renewal.key.write(&dir.join(names::NEXT_NODE_KEY))?;
        }
        if !issued.document.is_empty() {
            write_document(dir, &issued.document, &issued.root, &root)?;
        }
        // Both keys are there, and the certificate decides which of them counts.
        let path = dir.join(names::NODE_CERTIFICATE);
        files::replace(&path, renewed.pem(), files::PUBLIC)?;
        // The history relates both roots, so the old one is as good until then.
        root_history::follow(dir, &root)?;
        if self.current().root != root {
            tracing::info!(
                root = HEXLOWER.encode(&sha256(&root)),
                "this node has a certificate of the new mesh root"
            );
        }
        if renewal.successor.is_some() {
            NodeKey::settle(dir)?;
        }
        identity.settle(dir, &renewed.member.node_id)?;
        renewed.identity = identity;
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
        // A node of an earlier version gets an identity, and keeps its key.
        let is_same_node = |a: &Member, b: &Member| {
            (&a.mesh, a.role) == (&b.mesh, b.role)
                && (a.node_id == b.node_id || a.key_id == b.key_id)
        };
        if !self.roots().is_of_mesh(&stored.root_sha256())
            || !is_same_node(&old.member, &new.member)
        {
            return Err(TrustError::Mismatch(
                "the identity in the state directory is another node's; restart to use it"
                    .to_owned(),
            ));
        }
        *lock(&self.inner.current) = new;
        Ok(true)
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
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let roots = hello.certificate_authorities().unwrap_or_default();
        let accepts = |hint: &[u8]| roots.iter().any(|root| root.as_ref() == hint);
        Some(self.certificate_for(roots.is_empty(), accepts))
    }
}

impl ResolvesClientCert for NodeIdentity {
    fn resolve(&self, roots: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let accepts = |hint: &[u8]| roots.contains(&hint);
        Some(self.certificate_for(roots.is_empty(), accepts))
    }

    fn has_certs(&self) -> bool {
        true
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

/// The node's key comes first: once it has moved, the others are of the same identity. The certificate comes last: while it is
/// missing, the node has not joined.
const IDENTITY_FILES: [&str; 8] = [
    names::NODE_KEY,
    names::IDENTITY_KEY,
    names::NEXT_IDENTITY_KEY,
    names::IDENTITY_DOCUMENT,
    names::NEXT_NODE_KEY,
    names::ROOT_HISTORY,
    names::ROOT_CERTIFICATE,
    names::NODE_CERTIFICATE,
];

#[cfg(test)]
mod tests;
