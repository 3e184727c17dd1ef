//! The file of the successions that a node knows.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use mesh_proto::{RootHistory, SignedSuccession};
use prost::Message as _;
use rustls::pki_types::CertificateDer;

use super::certificate::{from_pem, pem};
use super::error::TrustError;
use super::names;
use super::roots::Roots;
use super::succession::{LONGEST_SUCCESSION, Succession};
use crate::files;

/// The roots of a node whose state directory names this one.
///
/// # Errors
/// If the file is damaged.
pub(super) fn load(dir: &Path, root: CertificateDer<'static>) -> Result<Roots, TrustError> {
    let path = dir.join(names::ROOT_HISTORY);
    let damaged = |error: &dyn std::fmt::Display| TrustError::damaged(&path, error.to_string());
    let mut roots: Option<Roots> = None;
    for signed in read(&path)?.successions {
        let succession = Succession::verify(&signed).map_err(|error| damaged(&error))?;
        let roots = roots.get_or_insert_with(|| Roots::of(succession.former.clone()));
        roots.learn(&succession).map_err(|error| damaged(&error))?;
    }
    let digest = super::digest::sha256(&root);
    Ok(match roots {
        Some(roots) if roots.is_of_mesh(&digest) => roots,
        // The history of another mesh, to which the node belonged before.
        _ => Roots::of(root),
    })
}

/// Adds a succession that `roots` continues with. A history of another mesh is replaced.
///
/// # Errors
/// If the file cannot be read or written.
pub(super) fn append(
    dir: &Path,
    roots: &Roots,
    signed: &SignedSuccession,
) -> Result<(), TrustError> {
    let path = dir.join(names::ROOT_HISTORY);
    let mut history = read(&path)?;
    let last = history.successions.last().map(Succession::verify);
    let continues = last.and_then(Result::ok).is_some_and(|last| {
        let (former, next) = last.digests();
        roots.is_of_mesh(&former) && roots.is_of_mesh(&next)
    });
    if !continues {
        history.successions.clear();
    }
    let is_same = |known: &SignedSuccession| known.body == signed.body;
    if !history.successions.iter().any(is_same) {
        history.successions.push(signed.clone());
    }
    let excess = history.successions.len().saturating_sub(MOST_SUCCESSIONS);
    history.successions.drain(..excess);
    files::replace(&path, history.encode_to_vec(), files::PRIVATE)
}

/// Writes the certificate of the newest root, unless it is there.
///
/// # Errors
/// If the file cannot be read or written.
pub(super) fn follow(dir: &Path, root: &CertificateDer<'_>) -> Result<(), TrustError> {
    let path = dir.join(names::ROOT_CERTIFICATE);
    let present = files::read(&path)?.and_then(|text| from_pem(&path, &text).ok());
    match present {
        Some(present) if present == *root => Ok(()),
        _ => files::replace(&path, pem(root), files::PUBLIC),
    }
}

fn read(path: &Path) -> Result<RootHistory, TrustError> {
    let failed = |source| TrustError::io("read", path, source);
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(RootHistory::default()),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    file.take(MOST_BYTES)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    RootHistory::decode(&bytes[..]).map_err(|error| TrustError::damaged(path, error))
}

/// Rotations that a node remembers.
const MOST_SUCCESSIONS: usize = 16;
const MOST_BYTES: u64 = ((MOST_SUCCESSIONS + 1) * (LONGEST_SUCCESSION + 16)) as u64;
