use std::time::Duration;

use super::*;
use crate::trust::{MeshRoot, Role, Subject, Validity};

fn root(dir: &Path) -> MeshRoot {
    MeshRoot::load_or_create(dir, "test").expect("a root")
}

fn issued(root: &MeshRoot, request: &[u8], key: Option<&PublicKey>) -> Issued {
    let subject = Subject {
        request,
        name: "laptop",
        role: Role::Worker,
        identity: key,
    };
    root.issue(&subject, &Validity::default(), SystemTime::now())
        .expect("issued")
}

/// A node that has joined; `with_identity` as this version does.
fn node(root: &MeshRoot, dir: &Path, with_identity: bool) -> NodeIdentity {
    let applicant = Applicant::open(dir).expect("keys");
    let key = applicant.public_key().cloned();
    let request = applicant.request().expect("a request");
    let issued = issued(root, &request, key.as_ref().filter(|_| with_identity));
    let deny_list = DenyList::open(dir).expect("empty");
    NodeIdentity::store(dir, applicant, issued, deny_list).expect("stored")
}

#[test]
fn a_certificate_that_was_replaced_on_disk_is_taken_into_use_if_it_is_this_nodes() {
    let dirs = [(); 3].map(|()| tempfile::tempdir().expect("a folder"));
    let [at_head, dir, elsewhere] = dirs.each_ref().map(tempfile::TempDir::path);
    let root = root(at_head);
    let identity = node(&root, dir, true);
    assert!(!identity.reload().expect("nothing new"));

    // Somebody else renews it: another process, or an operator.
    std::thread::sleep(Duration::from_millis(1100)); // certificates count in seconds
    let other = NodeIdentity::load(dir).expect("the same identity");
    let request = other.request().expect("a request");
    other
        .install(issued(&root, &request, other.public_key().as_ref()))
        .expect("stored");
    let in_use = identity.current().certified.cert[0].clone();
    assert!(identity.reload().expect("the new one"));
    assert_ne!(identity.current().certified.cert[0], in_use);
    assert_eq!(identity.member().not_after, other.member().not_after);

    node(&root, elsewhere, true);
    for file in [
        names::ROOT_CERTIFICATE,
        names::NODE_CERTIFICATE,
        names::NODE_KEY,
        names::IDENTITY_KEY,
    ] {
        std::fs::copy(elsewhere.join(file), dir.join(file)).expect("copied");
    }
    let error = identity.reload().expect_err("another node's");
    assert!(error.to_string().contains("restart"), "{error}");
    assert_eq!(identity.member().node_id, other.member().node_id);
}

#[test]
fn a_certificate_is_bound_to_the_identity_and_the_document_says_the_same() {
    let dirs = [(); 2].map(|()| tempfile::tempdir().expect("a folder"));
    let [at_head, dir] = dirs.each_ref().map(tempfile::TempDir::path);
    let root = root(at_head);
    let identity = node(&root, dir, true);
    let member = identity.member();
    let id = identity.public_key().expect("a key").node_id().to_string();
    assert_eq!((&member.node_id, member.has_identity()), (&id, true));
    assert!(!identity.is_identity_due());
    let again = NodeIdentity::load(dir).expect("loads");
    assert_eq!(again.member(), member);
    let document = again.document().expect("a document");
    assert_eq!(document.node_id().to_string(), id);
    assert_eq!((&*document.name, &*document.role), ("laptop", "worker"));
    assert_eq!(document.root, root.sha256());

    // Papers that do not fit each other, or are another's, are not taken.
    let request = identity.request().expect("a request");
    let (own, other) = (identity.public_key(), IdentityKey::generate());
    let of_other = issued(&root, &request, Some(other.public()));
    let mut mixed = issued(&root, &request, own.as_ref());
    mixed.document = of_other.document.clone();
    let mut without = issued(&root, &request, own.as_ref());
    without.document.clear();
    let mut foreign = issued(&root, &request, own.as_ref());
    foreign.root.public_key = other.public().as_bytes().to_vec();
    for papers in [of_other, mixed, without, foreign] {
        let refused = identity.install(papers);
        assert!(
            matches!(refused, Err(TrustError::Mismatch(_))),
            "{refused:?}"
        );
    }
    assert_eq!(NodeIdentity::load(dir).expect("as before").member(), member);
}

#[test]
fn a_node_of_an_earlier_version_is_known_by_its_certificate_until_it_renews() {
    let dirs = [(); 2].map(|()| tempfile::tempdir().expect("a folder"));
    let [at_head, dir] = dirs.each_ref().map(tempfile::TempDir::path);
    let root = root(at_head);
    let identity = node(&root, dir, false);
    std::fs::remove_file(dir.join(names::IDENTITY_KEY)).expect("as before");
    let identity = NodeIdentity::load(dir).unwrap_or(identity);
    let before = identity.member();
    assert!(!before.has_identity() && identity.is_identity_due());
    assert!(identity.document().is_none());
    let request = identity.request().expect("a request");
    // A head of an earlier version renews as ever.
    identity
        .install(issued(&root, &request, None))
        .expect("stored");
    assert!(identity.is_identity_due());
    identity
        .install(issued(&root, &request, identity.public_key().as_ref()))
        .expect("stored");
    let after = identity.member();
    assert_eq!(after.key_id, before.node_id);
    assert!(after.has_identity() && !identity.is_identity_due());
}

#[test]
fn a_renewal_for_another_key_that_was_cut_off_anywhere_leaves_a_whole_identity() {
    for files_written in 0..4 {
        let dirs = [(); 2].map(|()| tempfile::tempdir().expect("a folder"));
        let [at_head, dir] = dirs.each_ref().map(tempfile::TempDir::path);
        let root = root(at_head);
        let old = node(&root, dir, true).node_id();
        let (was, next) = crate::trust::rotate_identity(dir).expect("a new key");
        assert_eq!(was.to_string(), old);
        let again = crate::trust::rotate_identity(dir).expect("the same key");
        assert_eq!(again, (was, next));
        let identity = NodeIdentity::load(dir).expect("loads");
        assert!(identity.is_identity_due());
        let renewal = identity.renewal().expect("keys");
        let request = renewal.request().expect("a request");
        let successor = renewal.successor.clone().expect("a successor");
        let papers = issued(&root, &request, Some(successor.public()));
        match files_written {
            0 => {}
            1 => renewal
                .key
                .write(&dir.join(names::NEXT_NODE_KEY))
                .expect("written"),
            2 => {
                renewal
                    .key
                    .write(&dir.join(names::NEXT_NODE_KEY))
                    .expect("written");
                let path = dir.join(names::NODE_CERTIFICATE);
                files::replace(&path, pem(&papers.certificates[0]), files::PUBLIC)
                    .expect("written");
            }
            _ => identity.install_for(renewal, papers).expect("stored"),
        }
        let loaded = NodeIdentity::load(dir).expect("whole");
        let done = files_written >= 2;
        let expected = if done { next.to_string() } else { old };
        assert_eq!(loaded.node_id(), expected, "after {files_written} files");
        assert_eq!(loaded.is_identity_due(), !done);
        assert_eq!(dir.join(names::NEXT_IDENTITY_KEY).exists(), !done);
    }
}
