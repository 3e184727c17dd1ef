//! The files of a node's ML-DSA identity: its key, a key that is to take its place, and the mesh root's document about it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_identity::{Document, IdentityKey, KeyFileError, NodeId, PublicKey};
use mesh_proto::{RootIdentity, StoredIdentity};
use prost::Message as _;
use rustls::pki_types::CertificateDer;

use super::certificate::{Member, from_pem};
use super::digest::sha256;
use super::error::TrustError;
use super::names;
use super::root_identity::verify_root_identity;
use crate::files;

/// The identity keys of a node.
#[derive(Clone, Debug, Default)]
pub(super) struct IdentityKeys {
    /// `None` where none could be written: the node goes on without an identity.
    pub(super) key: Option<Arc<IdentityKey>>,
    /// The key that takes its place with the next certificate.
    pub(super) next: Option<Arc<IdentityKey>>,
}

impl IdentityKeys {
    /// The keys of a state directory; makes one at the first start.
    pub(super) fn load_or_create(dir: &Path) -> Result<Self, TrustError> {
        if let Some(credential) = credential() {
            return Ok(Self {
                key: IdentityKey::load(&credential)?.map(Arc::new),
                next: None,
            });
        }
        let key = match IdentityKey::load_or_create(&dir.join(names::IDENTITY_KEY)) {
            Ok(key) => Some(Arc::new(key)),
            // A node of an earlier version, whose directory is read-only or full, works as before.
            Err(
                error @ KeyFileError::Io {
                    action: "write", ..
                },
            ) => {
                tracing::warn!(%error, "this node has no ML-DSA identity");
                None
            }
            Err(error) => return Err(error.into()),
        };
        let next = IdentityKey::load(&dir.join(names::NEXT_IDENTITY_KEY))?;
        Ok(Self {
            key,
            next: next.map(Arc::new),
        })
    }

    /// The keys of a node with this certificate. A key is made for one of an earlier version only: another identity than
    /// that of the certificate is of no use.
    pub(super) fn of_member(dir: &Path, member: &Member) -> Result<Self, TrustError> {
        let path = credential().unwrap_or_else(|| dir.join(names::IDENTITY_KEY));
        if !member.has_identity() {
            return Self::load_or_create(dir);
        }
        if !path.exists() {
            let certificate = dir.join(names::NODE_CERTIFICATE);
            return Err(TrustError::missing(&path, &certificate));
        }
        let keys = Self::load_or_create(dir)?;
        let all = keys.key.iter().chain(&keys.next);
        if all
            .map(|key| key.node_id().to_string())
            .all(|id| id != member.node_id)
        {
            return Err(TrustError::MixedUp {
                path,
                reason: format!(
                    "the certificate is bound to the identity {}",
                    member.node_id
                ),
            });
        }
        Ok(keys)
    }

    /// The key that the node's next certificate is bound to.
    pub(super) fn wanted(&self) -> Option<&Arc<IdentityKey>> {
        self.next.as_ref().or(self.key.as_ref())
    }

    /// The node has a certificate for this identity: if it is that of the next key, that is the node's key from now on.
    pub(super) fn settle(&mut self, dir: &Path, node_id: &str) -> Result<(), TrustError> {
        let Some(next) = &self.next else {
            return Ok(());
        };
        if next.node_id().to_string() != node_id {
            return Ok(());
        }
        let (from, to) = (
            dir.join(names::NEXT_IDENTITY_KEY),
            dir.join(names::IDENTITY_KEY),
        );
        std::fs::rename(&from, &to).map_err(|error| TrustError::io("move", &from, error))?;
        self.key = self.next.take();
        Ok(())
    }
}

/// Path of the identity key that systemd handed to this unit, if it did.
fn credential() -> Option<PathBuf> {
    names::credential(names::IDENTITY_CREDENTIAL)
}

/// Ids of the identity in a state directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdentityIds {
    /// The node's id; `None` before its first start.
    pub key: Option<NodeId>,
    /// Id of the key that takes its place when the node starts again.
    pub next: Option<NodeId>,
}

/// The identity keys in a state directory.
///
/// # Errors
/// If a key file cannot be read or is damaged.
pub fn identity_ids(dir: &Path) -> Result<IdentityIds, TrustError> {
    let id = |path: &Path| -> Result<_, TrustError> {
        let key = IdentityKey::load(path)?;
        Ok(key.map(|key| key.node_id()))
    };
    Ok(match credential() {
        Some(credential) => IdentityIds {
            key: id(&credential)?,
            next: None,
        },
        None => IdentityIds {
            key: id(&dir.join(names::IDENTITY_KEY))?,
            next: id(&dir.join(names::NEXT_IDENTITY_KEY))?,
        },
    })
}

/// Makes a new identity key, which takes the place of the present one at the next start. Repeated before that start, it
/// keeps the key that it made first. Returns the old and the new id.
///
/// # Errors
/// If the node has no identity key in this directory, or a file cannot be written.
pub fn rotate_identity(dir: &Path) -> Result<(NodeId, NodeId), TrustError> {
    let path = dir.join(names::IDENTITY_KEY);
    let old = IdentityKey::load(&path)?.ok_or_else(|| {
        TrustError::NotRotated(format!(
            "missing identity key {}: a node makes one at its first start; if systemd hands it over as a credential (`{}`), replace that file and give the node a new token",
            path.display(),
            names::IDENTITY_CREDENTIAL
        ))
    })?;
    let next_path = dir.join(names::NEXT_IDENTITY_KEY);
    let next = IdentityKey::load_or_create(&next_path)?;
    // An administrator may do this for the user that the node runs as.
    let owner = std::fs::metadata(&path).and_then(|owner| {
        std::os::unix::fs::chown(&next_path, Some(owner.uid()), Some(owner.gid()))
    });
    owner.map_err(|error| TrustError::io("change the owner of", &next_path, error))?;
    Ok((old.node_id(), next.node_id()))
}

/// Keeps the mesh root's document about this node, and the key that signed it.
pub(super) fn write_document(
    dir: &Path,
    identity: &[u8],
    root: &RootIdentity,
    certificate: &CertificateDer<'_>,
) -> Result<(), TrustError> {
    let stored = StoredIdentity {
        identity: identity.to_vec(),
        root: Some(root.clone()),
        certificate: certificate.to_vec(),
    };
    let path = dir.join(names::IDENTITY_DOCUMENT);
    files::replace(&path, stored.encode_to_vec(), files::PRIVATE)
}

/// The document in a state directory, if it is whole.
pub(super) fn read_document(dir: &Path) -> Option<Document> {
    read_signed(dir).map(|(document, ..)| document)
}

/// The same with its encoding and the root's key.
pub(super) fn read_signed(dir: &Path) -> Option<(Document, Vec<u8>, PublicKey)> {
    let stored = StoredIdentity::decode(&*papers(dir)?).ok()?;
    let root = CertificateDer::from(stored.certificate);
    let signer = verify_root_identity(&root, &stored.root?).ok()?;
    let document = Document::verify(&stored.identity, &signer).ok()?;
    (document.root == sha256(&root)).then_some((document, stored.identity, signer))
}

/// The document in a state directory with the root that signed it.
pub(super) fn papers(dir: &Path) -> Option<Vec<u8>> {
    let path = dir.join(names::IDENTITY_DOCUMENT);
    if std::fs::metadata(&path).ok()?.len() > LONGEST_PAPERS as u64 {
        return None;
    }
    let bytes = std::fs::read(&path).ok()?;
    let stored = StoredIdentity::decode(&bytes[..]).ok()?;
    if !stored.certificate.is_empty() {
        return Some(bytes);
    }
    // Files of earlier versions are of the root beside them.
    let path = dir.join(names::ROOT_CERTIFICATE);
    let root = from_pem(&path, &files::read(&path).ok()??).ok()?;
    let whole = StoredIdentity {
        certificate: root.to_vec(),
        ..stored
    };
    Some(whole.encode_to_vec())
}

/// Reads a file `identity.doc`: the document about a node, verified against the mesh root in the file. The
/// document names the digest of that root; whether it is the right one, and the dates, are the caller's to
/// judge.
///
/// # Errors
/// If it is malformed, names no root, or is not signed by it.
pub fn read_papers(bytes: &[u8]) -> Result<Document, TrustError> {
    let unfit = |reason: String| TrustError::Mismatch(format!("the identity document: {reason}"));
    if bytes.len() > LONGEST_PAPERS {
        return Err(unfit(format!("it has more than {LONGEST_PAPERS} bytes")));
    }
    let stored = StoredIdentity::decode(bytes).map_err(|error| unfit(error.to_string()))?;
    if stored.certificate.is_empty() {
        return Err(unfit(
            "it is of an earlier version and does not hold the mesh root".to_owned(),
        ));
    }
    let root = CertificateDer::from(stored.certificate);
    let signer = verify_root_identity(&root, &stored.root.unwrap_or_default())?;
    let document =
        Document::verify(&stored.identity, &signer).map_err(|error| unfit(error.to_string()))?;
    match document.root == sha256(&root) {
        true => Ok(document),
        false => Err(unfit("it names another mesh root".to_owned())),
    }
}

const LONGEST_PAPERS: usize = 2 * mesh_identity::LONGEST_DOCUMENT;
