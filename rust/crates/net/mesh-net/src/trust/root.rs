//! The root of a mesh, which issues its certificates.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use data_encoding::HEXLOWER;
use mesh_base::clock::{self, unix_seconds};
use mesh_identity::{Document, PublicKey};
use mesh_proto::SignedSuccession;
use rustls::pki_types::CertificateDer;
use zeroize::Zeroizing;

use super::certificate::{check_name, from_pem, pem};
use super::digest::sha256;
use super::error::TrustError;
use super::intermediate;
use super::issued::{Issued, Subject, Validity};
use super::names;
use super::root_history;
use super::root_keys::{FORMER, RootKeys, former_part, identity_in};
use super::succession::Succession;
use crate::files;

/// The certificate authority of one mesh. Lives in the head's state directory. While it is rotated, it issues
/// certificates of the former root as well.
#[derive(Clone, Debug)]
pub struct MeshRoot {
    keys: Arc<RootKeys>,
    former: Option<FormerRoot>,
    /// The keys are in a file that the head cannot change.
    sealed: bool,
}

/// A root that this one replaces.
#[derive(Clone, Debug)]
struct FormerRoot {
    keys: Arc<RootKeys>,
    /// It is accepted before this time, seconds since the Unix epoch.
    until: u64,
    statement: SignedSuccession,
}

impl MeshRoot {
    /// Reads the root in `dir`, or creates one for a mesh of this name if there are no files of a mesh. An
    /// existing root keeps its name. Keys that systemd hands over (credential `root-key`) go before `root.key`.
    ///
    /// # Errors
    /// If its files are not whole. A root is never made anew beside what is left of another one: tokens and certificates
    /// of all workers pin the old one.
    pub fn load_or_create(dir: &Path, mesh: &str) -> Result<Self, TrustError> {
        let key_path = dir.join(names::ROOT_KEY);
        if let Some(path) = names::credential(names::ROOT_CREDENTIAL) {
            return Self::sealed(dir, &path);
        }
        // Keys of the root that are here go before those of an intermediate.
        if !key_path.exists()
            && let Some(keys) = intermediate::load(dir)?
        {
            return Ok(Self::of(keys));
        }
        Self::open(dir, mesh, key_path)
    }

    /// End of the intermediate by which this head issues, seconds since the Unix epoch; `None` where it has
    /// the root's keys.
    pub fn intermediate_until(&self) -> Option<u64> {
        let delegated = self.keys.delegated.as_ref();
        delegated.map(|delegated| delegated.said.not_after)
    }

    /// Refuses to go on with an intermediate that has ended.
    ///
    /// # Errors
    /// [`TrustError::IntermediateEnded`] names the remedy.
    pub fn check(&self, now: SystemTime) -> Result<(), TrustError> {
        self.keys.check(now)
    }

    /// The root whose keys are in a file that the head can only read.
    fn sealed(dir: &Path, key_path: &Path) -> Result<Self, TrustError> {
        let text = files::read(key_path)?
            .map(Zeroizing::new)
            .unwrap_or_default();
        if identity_in(&text).is_none() {
            let reason = "it does not hold both keys of a mesh root: seal the root.key of a head that has started with this version";
            return Err(TrustError::damaged(key_path, reason));
        }
        if dir.join(names::ROOT_KEY).exists() {
            tracing::warn!(
                path = %dir.join(names::ROOT_KEY).display(),
                "the root's keys come from a systemd credential, and lie in the state directory, too: remove that file once it is backed up"
            );
        }
        // There is a key, so no root is made.
        let root = Self::open(dir, "", key_path.to_owned())?;
        Ok(Self {
            sealed: true,
            ..root
        })
    }

    fn open(dir: &Path, mesh: &str, key_path: PathBuf) -> Result<Self, TrustError> {
        let certificate_path = dir.join(names::ROOT_CERTIFICATE);
        match (files::read(&key_path)?, files::read(&certificate_path)?) {
            (Some(key), Some(certificate)) => {
                let certificate = from_pem(&certificate_path, &certificate)?;
                // A rotation begins with `root.key`, and the certificate follows.
                let former = former_part(&key).map(|(_, former)| from_pem(&key_path, former));
                let certificate = match former.transpose()? {
                    Some(former) if former == certificate => from_pem(&key_path, &key)?,
                    _ => certificate,
                };
                Self::read(&key_path, &key, certificate, &certificate_path)
            }
            // The certificate cannot be made anew: it would be another one than that which tokens and workers pin. Keys of
            // this version have a copy of it.
            (Some(key), None) => {
                let certificate = from_pem(&key_path, &key)
                    .map_err(|_| TrustError::missing(&certificate_path, &key_path))?;
                let root = Self::read(&key_path, &key, certificate, &key_path)?;
                files::replace(&certificate_path, pem(root.certificate()), files::PUBLIC)?;
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
        let Some((until, former)) = former_part(key) else {
            let keys = RootKeys::read(key_path, key, certificate, origin)?;
            return Ok(Self::of(keys));
        };
        let until = until.parse().map_err(|_| {
            let reason = "the end of the former root's time in it cannot be read";
            TrustError::damaged(key_path, reason)
        })?;
        let current = key.split(FORMER).next().unwrap_or_default();
        let keys = RootKeys::read(key_path, current, certificate, origin)?;
        if identity_in(former).is_none() {
            let reason = "the former root in it has no ML-DSA key";
            return Err(TrustError::damaged(key_path, reason));
        }
        let certificate = from_pem(key_path, former)?;
        let former = RootKeys::read(key_path, former, certificate, key_path)?;
        Ok(Self::succeeding(keys, Arc::new(former), until))
    }

    fn of(keys: RootKeys) -> Self {
        Self {
            keys: Arc::new(keys),
            former: None,
            sealed: false,
        }
    }

    fn succeeding(keys: RootKeys, former: Arc<RootKeys>, until: u64) -> Self {
        let succession = Succession {
            mesh: keys.mesh.clone(),
            former: former.certificate.clone(),
            next: keys.certificate.clone(),
            until,
        };
        let statement = succession.sign(&former.signer(), &keys.signer());
        Self {
            keys: Arc::new(keys),
            former: Some(FormerRoot {
                keys: former,
                until,
                statement,
            }),
            sealed: false,
        }
    }

    fn create(dir: &Path, mesh: &str) -> Result<Self, TrustError> {
        check_name(mesh)?;
        files::create_private_dir(dir)?;
        let root = Self::of(RootKeys::generate(mesh)?);
        root.write(dir)?;
        let certificate_path = dir.join(names::ROOT_CERTIFICATE);
        files::replace(&certificate_path, pem(root.certificate()), files::PUBLIC)?;
        tracing::info!(
            mesh,
            root = HEXLOWER.encode(&root.sha256()),
            "made a new mesh root"
        );
        Ok(root)
    }

    /// Writes `root.key`, with the former root if there is one.
    fn write(&self, dir: &Path) -> Result<(), TrustError> {
        // Read by `former_part`; other programs skip text between the blocks (RFC 7468, section 2).
        let former = self.former.as_ref().map(|former| {
            let heading = format!("{FORMER}{}:\n", former.until);
            Zeroizing::new([&heading, former.keys.text.as_str()].concat())
        });
        let former = former.as_ref().map_or("", |former| former.as_str());
        let text = Zeroizing::new([self.keys.text.as_str(), former].concat());
        files::replace(&dir.join(names::ROOT_KEY), text.as_bytes(), files::PRIVATE)
    }

    /// Makes a root that takes the place of this one; both are accepted until then. `root.key` has both from
    /// here on, so the rotation is whole or did not happen, and the head's own files follow
    /// ([`NodeIdentity::learn`](super::NodeIdentity::learn)).
    ///
    /// # Errors
    /// If a rotation is under way, or the file cannot be written.
    pub fn rotate(
        &self,
        dir: &Path,
        until: SystemTime,
        now: SystemTime,
    ) -> Result<Self, TrustError> {
        if let Some((former, until)) = self.former(now) {
            return Err(TrustError::NotRotated(format!(
                "the mesh root takes the place of {}… until {}, and is not rotated again before",
                &HEXLOWER.encode(&former)[..16],
                clock::utc_of(until)
            )));
        }
        if let Some(until) = self.intermediate_until() {
            return Err(TrustError::NotRotated(format!(
                "the root's keys are not here: the head issues by an intermediate until {}. Put root.key from where it is kept into {}, \
                 restart the head, rotate the root, and make a new intermediate when the overlap is over",
                clock::utc_of(until),
                dir.display()
            )));
        }
        if self.sealed {
            return Err(TrustError::NotRotated(format!(
                "the root's keys are the systemd credential `{}`, which the head cannot change: put root.key from a backup into {}, \
                 start the head without the credential, rotate the root, and seal the new root.key when the overlap is over",
                names::ROOT_CREDENTIAL,
                dir.display()
            )));
        }
        let next = RootKeys::generate(self.mesh())?;
        let rotated = Self::succeeding(next, self.keys.clone(), unix_seconds(until));
        rotated.write(dir)?;
        Ok(rotated)
    }

    /// The root without the former one, if the time of that is over: its keys are gone from `root.key`.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn without_former(&self, dir: &Path, now: SystemTime) -> Result<Option<Self>, TrustError> {
        if self.former.is_none() || self.former(now).is_some() {
            return Ok(None);
        }
        let alone = Self {
            keys: self.keys.clone(),
            former: None,
            sealed: self.sealed,
        };
        if !self.sealed {
            alone.write(dir)?;
        }
        Ok(Some(alone))
    }

    /// Relates the roots in the head's state directory, where a rotation was cut off behind `root.key`. Call
    /// it before the head's identity is loaded.
    ///
    /// # Errors
    /// If a file there is damaged or cannot be written.
    pub fn settle(&self, dir: &Path) -> Result<(), TrustError> {
        let Some(former) = &self.former else {
            return Ok(());
        };
        let path = dir.join(names::ROOT_CERTIFICATE);
        let Some(text) = files::read(&path)? else {
            return Ok(());
        };
        let mut roots = root_history::load(dir, from_pem(&path, &text)?)?;
        if roots.learn(&Succession::verify(&former.statement)?)? {
            root_history::append(dir, &roots, &former.statement)?;
        }
        root_history::follow(dir, self.certificate())
    }

    /// Digest of the former root's certificate, and the end of its time in seconds since the Unix epoch, if
    /// it is accepted at `now`.
    pub fn former(&self, now: SystemTime) -> Option<([u8; 32], u64)> {
        let former = self.former_keys(now)?;
        Some((sha256(&former.keys.certificate), former.until))
    }

    /// The statement of both roots while they are accepted.
    pub fn succession(&self, now: SystemTime) -> Option<&SignedSuccession> {
        self.former_keys(now).map(|former| &former.statement)
    }

    fn former_keys(&self, now: SystemTime) -> Option<&FormerRoot> {
        let former = self.former.as_ref();
        former.filter(|former| unix_seconds(now) < former.until)
    }

    /// The public half of the root's ML-DSA key.
    pub fn identity(&self) -> &PublicKey {
        self.keys.public()
    }

    /// Name of the mesh.
    pub fn mesh(&self) -> &str {
        &self.keys.mesh
    }

    /// The root's self-signed certificate, DER.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.keys.certificate
    }

    /// SHA-256 of the root's certificate: what join tokens pin.
    pub fn sha256(&self) -> [u8; 32] {
        sha256(&self.keys.certificate)
    }

    /// A signed document about a key that belongs to no node: that this mesh has given it this role.
    pub fn endorse(&self, key: &PublicKey, role: &str, now: SystemTime) -> Vec<u8> {
        let document = Document {
            key: key.clone(),
            name: role.to_owned(),
            role: role.to_owned(),
            mesh: self.mesh().to_owned(),
            root: self.sha256(),
            not_before: unix_seconds(now - DAY),
            not_after: unix_seconds(now + ENDORSED_FOR),
        };
        self.keys.sign(document)
    }

    /// Issues a certificate for the key in the subject's request, and a document about its identity.
    ///
    /// # Errors
    /// As [`issue_under`](Self::issue_under).
    pub fn issue(
        &self,
        subject: &Subject<'_>,
        validity: &Validity,
        now: SystemTime,
    ) -> Result<Issued, TrustError> {
        self.issue_under(&self.sha256(), subject, validity, now)
    }

    /// As [`issue`](Self::issue), by the root with this digest: this one, or the former one while it is
    /// accepted. Whoever asks for this one gets a certificate of the former one besides.
    ///
    /// # Errors
    /// [`TrustError::RootReplaced`] if it is another root; if the request or name is invalid.
    pub fn issue_under(
        &self,
        root: &[u8; 32],
        subject: &Subject<'_>,
        validity: &Validity,
        now: SystemTime,
    ) -> Result<Issued, TrustError> {
        let former = self.former_keys(now);
        let keys = match former {
            _ if *root == self.sha256() => &self.keys,
            Some(former) if *root == sha256(&former.keys.certificate) => &former.keys,
            _ => {
                return Err(TrustError::RootReplaced {
                    named: HEXLOWER.encode(root),
                    current: HEXLOWER.encode(&self.sha256()),
                });
            }
        };
        let mut issued = keys.issue(subject, validity, now)?;
        issued.succession = former.map(|former| former.statement.clone());
        if let Some(former) = former.filter(|_| Arc::ptr_eq(keys, &self.keys)) {
            issued.former = Some(former.keys.certify(subject, validity, now)?);
        }
        Ok(issued)
    }
}

/// Time for which an endorsement holds; the head makes one at each start.
const ENDORSED_FOR: Duration = Duration::from_secs(400 * 24 * 3600);

const DAY: Duration = Duration::from_secs(24 * 3600);

#[cfg(test)]
mod tests;
