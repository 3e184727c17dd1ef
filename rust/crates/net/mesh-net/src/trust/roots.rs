//! The mesh roots that a node accepts, as a state machine: successions and the time go in.

use std::time::SystemTime;

use data_encoding::HEXLOWER;
use mesh_base::clock::unix_seconds;
use rustls::pki_types::CertificateDer;

use super::digest::sha256;
use super::succession::Succession;
use super::succession_error::SuccessionError;

/// The mesh root, and while it takes the place of another one, that one as well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    current: CertificateDer<'static>,
    former: Option<Former>,
    /// Digests of all earlier roots: tokens that pin one are of this mesh.
    replaced: Vec<[u8; 32]>,
}

/// A root that another one replaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Former {
    /// Its certificate.
    pub root: CertificateDer<'static>,
    /// It is accepted before this time, seconds since the Unix epoch.
    pub until: u64,
}

impl Roots {
    /// One root.
    pub fn of(root: CertificateDer<'static>) -> Self {
        Self {
            current: root,
            former: None,
            replaced: Vec::new(),
        }
    }

    /// The newest root.
    pub fn current(&self) -> &CertificateDer<'static> {
        &self.current
    }

    /// SHA-256 of the newest root.
    pub fn sha256(&self) -> [u8; 32] {
        sha256(&self.current)
    }

    /// The root before it, if it is accepted at `now`.
    pub fn former(&self, now: SystemTime) -> Option<&Former> {
        let former = self.former.as_ref();
        former.filter(|former| unix_seconds(now) < former.until)
    }

    /// The roots that are accepted at `now`, the newest first.
    pub fn accepted(&self, now: SystemTime) -> impl Iterator<Item = &CertificateDer<'static>> {
        let former = self.former(now).map(|former| &former.root);
        std::iter::once(&self.current).chain(former)
    }

    /// The roots that were accepted once, the newest first: a certificate in a file may be of each.
    pub(crate) fn known(&self) -> impl Iterator<Item = &CertificateDer<'static>> {
        let former = self.former.as_ref().map(|former| &former.root);
        std::iter::once(&self.current).chain(former)
    }

    /// Digests of the mesh's roots, the newest first, then those that it has replaced.
    pub fn digests(&self) -> Vec<[u8; 32]> {
        let mut digests = vec![self.sha256()];
        digests.extend(self.replaced.iter().rev());
        digests
    }

    /// True if a root with this digest is the mesh's or was once.
    pub fn is_of_mesh(&self, root: &[u8; 32]) -> bool {
        self.sha256() == *root || self.replaced.contains(root)
    }

    /// The accepted root that a request for a certificate names. Nodes of earlier versions name none: they
    /// know the former root while there is one.
    pub fn named(&self, digest: &[u8], now: SystemTime) -> Option<[u8; 32]> {
        let mut accepted = self.accepted(now).map(|root| sha256(root));
        match digest.is_empty() {
            true => accepted.last(),
            false => accepted.find(|root| root[..] == *digest),
        }
    }

    /// Takes in a succession. Returns true if something changed: the node has a newer root, or accepts a
    /// former one.
    ///
    /// # Errors
    /// [`SuccessionError::Unrelated`] if it does not continue the node's root.
    pub fn learn(&mut self, succession: &Succession) -> Result<bool, SuccessionError> {
        let former = Former {
            root: succession.former.clone(),
            until: succession.until,
        };
        let is_known = succession.next == self.current;
        if is_known && self.former.as_ref() == Some(&former) {
            return Ok(false);
        }
        if !is_known && succession.former != self.current {
            let (former, next) = succession.digests();
            return Err(SuccessionError::Unrelated {
                former: HEXLOWER.encode(&former),
                next: HEXLOWER.encode(&next),
                known: HEXLOWER.encode(&self.sha256()),
            });
        }
        let digest = sha256(&former.root);
        if !self.replaced.contains(&digest) {
            self.replaced.push(digest);
        }
        self.former = Some(former);
        self.current = succession.next.clone();
        Ok(true)
    }

    /// Forgets a former root whose time is over. Returns true if there was one.
    pub fn expire(&mut self, now: SystemTime) -> bool {
        let is_over = self.former.is_some() && self.former(now).is_none();
        if is_over {
            self.former = None;
        }
        is_over
    }
}

/// The distinguished name by which a peer tells in a handshake that it accepts a root (RFC 8446, section
/// 4.2.4), DER: the roots themselves have like names.
pub(crate) fn root_hint(root: &[u8; 32]) -> Vec<u8> {
    let name = format!("hydramesh root {}", HEXLOWER.encode(root));
    // CommonName (2.5.4.3), UTF8String.
    let mut der = vec![0x06, 3, 0x55, 4, 3, 0x0c];
    der.push(u8::try_from(name.len()).expect("79 bytes"));
    der.extend_from_slice(name.as_bytes());
    // SEQUENCE OF SET OF SEQUENCE; all lengths are below 128.
    for tag in [0x30, 0x31, 0x30] {
        der.splice(0..0, [tag, u8::try_from(der.len()).expect("90 bytes")]);
    }
    der
}

#[cfg(test)]
mod tests;
