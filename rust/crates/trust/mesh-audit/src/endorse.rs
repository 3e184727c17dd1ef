//! The endorsement of a trail's keys by the identity of the node that keeps it.

use std::io;
use std::path::Path;

use mesh_base::files;

use crate::folder::{DOCUMENT, KEYS};
use crate::keys::{Identity, PublicKeys, TrailKeys};
use crate::note::LONGEST_NOTE;
use crate::tiles::read;

/// Has the identity endorse the keys of a trail, unless it has done so. Trails of earlier versions have no
/// endorsement, and a node may have another identity than at the last start.
pub(crate) fn endorse(
    dir: &Path,
    keys: &TrailKeys,
    origin: &str,
    identity: &dyn Identity,
) -> io::Result<()> {
    let path = dir.join(KEYS);
    let present = read(&path, LONGEST_NOTE)?.and_then(|text| String::from_utf8(text).ok());
    let present = present.and_then(|text| PublicKeys::read(&text).ok());
    if present.and_then(|keys| keys.identity_key()) != Some(identity.public_key()) {
        let public = PublicKeys::new(keys, origin, Some(identity)).to_text();
        files::replace(&path, public.as_bytes(), files::PUBLIC)?;
    }
    let Some(document) = identity.document() else {
        return Ok(());
    };
    let path = dir.join(DOCUMENT);
    if read(&path, LONGEST_NOTE)?.as_ref() != Some(&document) {
        files::replace(&path, &document, files::PUBLIC)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mesh_identity::IdentityKey;

    use super::*;
    use crate::archive::Archive;
    use crate::store::{Limits, Store};
    use crate::verify::{Options, verify};

    struct Node(IdentityKey, &'static [u8]);

    impl Identity for Node {
        fn public_key(&self) -> Vec<u8> {
            self.0.public().as_bytes().to_vec()
        }

        fn sign(&self, context: &'static [u8], message: &[u8]) -> Vec<u8> {
            self.0.sign(context, message)
        }

        fn document(&self) -> Option<Vec<u8>> {
            Some(self.1.to_vec())
        }
    }

    #[test]
    fn a_trail_without_an_endorsement_gets_one_and_a_rotated_identity_endorses_it_anew() {
        let dir = tempfile::tempdir().unwrap();
        let keys = Arc::new(TrailKeys::from_seeds(&[7; 32], &[9; 48]));
        let open = |identity: Option<&dyn Identity>| {
            let limits = Limits::default();
            let opened = Store::open(dir.path(), "mesh/audit", keys.clone(), identity, limits, 0);
            opened.unwrap().0.publish(0).unwrap();
            let archive = Archive::open(dir.path()).unwrap();
            let report = verify(&archive, &Options::default()).unwrap();
            assert_eq!(report.findings, []);
            (report.identity, archive.document().unwrap())
        };
        assert_eq!(open(None), (None, None));
        let nodes = [(1, &b"first"[..]), (2, b"second")];
        for (seed, document) in nodes {
            let node = Node(IdentityKey::from_seed(&[seed; 32]), document);
            let endorsed = (Some(node.public_key()), Some(document.to_vec()));
            assert_eq!(open(Some(&node)), endorsed);
            let written = std::fs::metadata(dir.path().join(KEYS)).unwrap().modified();
            assert_eq!(open(Some(&node)), endorsed);
            let after = std::fs::metadata(dir.path().join(KEYS)).unwrap().modified();
            assert_eq!(written.unwrap(), after.unwrap(), "it is not signed again");
            // Whoever opens the trail without the identity keeps its endorsement.
            assert_eq!(open(None), endorsed);
        }
    }
}
