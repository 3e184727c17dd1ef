//! ML-DSA identities over real links: at join, at renewal, rotated, and of nodes of earlier versions.

use std::time::{Duration, SystemTime};

use crate::common::{HOUR, LOOPBACK, TestHead, TestWorker};
use arcanum_attestor::{Approval, TokenSpec};
use mesh_net::quic::{
    Closed, ConnectError, Connector, JoinError, LinkConfig, Listener, connect, join, renew,
};
use mesh_net::trust::{
    self, AWAITING_APPROVAL, Applicant, DenyList, EXPELLED, MeshRoot, NodeIdentity, Role, Subject,
    Validity, identity_ids, rotate_identity,
};

#[tokio::test]
async fn the_identity_outlives_certificates_and_is_shown_to_the_peers() {
    let head = TestHead::start("attic");
    let worker = head.worker("laptop").await;
    let id = identity_ids(worker.dir.path()).expect("ids").key;
    assert_eq!(worker.identity.node_id(), id.expect("a key").to_string());
    let (near, far) = head.link(&worker, LinkConfig::default()).await;
    assert_eq!(far.node_id(), worker.identity.node_id());
    assert!(far.peer().has_identity() && near.peer().has_identity());
    let known = &head.authority.members()[far.node_id()];
    assert_eq!((&*known.name, &*known.algorithm), ("laptop", "ml-dsa-65"));
    renew(&[head.address], &worker.identity)
        .await
        .expect("renews");
    assert_eq!(worker.identity.node_id(), id.expect("a key").to_string());
    let document = worker.identity.document().expect("a document");
    assert_eq!(document.node_id(), id.expect("a key"));
    assert_eq!(document.role, "worker");
    // A node whose certificates are lost is the same one with a new token.
    for file in ["node.crt", "node.key"] {
        std::fs::remove_file(worker.dir.path().join(file)).expect("removed");
    }
    let again = join(&[head.address], &head.token(), worker.dir.path(), "laptop").await;
    let again = again.expect("joins");
    assert_eq!(again.node_id(), worker.identity.node_id());
    assert_eq!(again.member().name, "laptop");
    assert_ne!(again.member().key_id, worker.identity.member().key_id);
}

/// A node as earlier versions joined: its certificate names no identity.
fn earlier_node(head: &TestHead, name: &str) -> TestWorker {
    let dir = tempfile::tempdir().expect("temporary directory");
    let root = MeshRoot::load_or_create(head.dir.path(), "attic").expect("the head's root");
    let applicant = Applicant::open(dir.path()).expect("keys");
    let request = applicant.request().expect("a request");
    let subject = Subject {
        request: &request,
        name,
        role: Role::Worker,
        identity: None,
    };
    let issued = root
        .issue(&subject, &Validity::default(), SystemTime::now())
        .expect("issued");
    let deny_list = DenyList::open(dir.path()).expect("empty");
    let identity = NodeIdentity::store(dir.path(), applicant, issued, deny_list).expect("stored");
    TestWorker { dir, identity }
}

#[tokio::test]
async fn a_node_of_an_earlier_version_gets_its_identity_signed_and_stays_the_same_member() {
    let head = TestHead::start("attic");
    let worker = earlier_node(&head, "laptop");
    let (_near, far) = head.link(&worker, LinkConfig::default()).await;
    let old = far.node_id().to_owned();
    assert!(!far.peer().has_identity());
    renew(&[head.address], &worker.identity)
        .await
        .expect("renews");
    let (_near, far) = head.link(&worker, LinkConfig::default()).await;
    assert!(far.peer().has_identity());
    assert_eq!(far.peer().key_id, old);
    let members = head.authority.members();
    assert_eq!(members.len(), 1, "{members:?}");
    let known = &members[far.node_id()];
    assert_eq!((&*known.name, &known.former), ("laptop", &vec![old]));
}

#[tokio::test]
async fn an_expelled_node_of_an_earlier_version_does_not_come_back_with_an_identity() {
    let head = TestHead::start("attic");
    let worker = earlier_node(&head, "laptop");
    head.link(&worker, LinkConfig::default()).await;
    head.authority
        .expel(
            &worker.identity.node_id(),
            "laptop",
            "sold",
            SystemTime::now(),
        )
        .expect("kept");
    let error = renew(&[head.address], &worker.identity)
        .await
        .expect_err("expelled");
    assert!(error.is_expulsion(), "{error:?}");
    let error = join(&[head.address], &head.token(), worker.dir.path(), "laptop")
        .await
        .expect_err("expelled");
    assert!(error.is_expulsion(), "{error:?}");
}

#[tokio::test]
async fn a_lost_identity_key_is_not_replaced_by_another() {
    let head = TestHead::start("attic");
    let worker = head.worker("laptop").await;
    let path = worker.dir.path().join("identity.key");
    std::fs::remove_file(&path).expect("removed");
    let error = NodeIdentity::load(worker.dir.path())
        .expect_err("lost")
        .to_string();
    assert!(
        error.contains("identity.key is missing") && error.contains("new-identity"),
        "{error}"
    );
    assert!(!path.exists());
    let other = head.worker("tower").await;
    std::fs::copy(other.dir.path().join("identity.key"), &path).expect("copied");
    let error = NodeIdentity::load(worker.dir.path())
        .expect_err("another's")
        .to_string();
    assert!(error.contains("bound to the identity"), "{error}");
}

#[tokio::test]
async fn a_rotated_identity_takes_the_place_of_the_old_one_everywhere() {
    let head = TestHead::start("attic");
    let (worker, other) = (head.worker("laptop").await, head.worker("tower").await);
    // What a thief has.
    let stolen = tempfile::tempdir().expect("temporary directory");
    for file in ["identity.key", "node.key", "node.crt", "root.crt"] {
        let from = worker.dir.path().join(file);
        std::fs::copy(from, stolen.path().join(file)).expect("copied");
    }
    let (near, far) = head.link(&worker, LinkConfig::default()).await;
    let (old, next) = rotate_identity(worker.dir.path()).expect("a new key");
    let fresh = NodeIdentity::load(worker.dir.path()).expect("loads");
    assert!(fresh.is_identity_due() && fresh.node_id() == old.to_string());
    renew(&[head.address], &fresh).await.expect("renews");
    assert_eq!(fresh.node_id(), next.to_string());
    assert!(!fresh.is_identity_due());
    let member = fresh.member();
    assert_eq!(member.name, "laptop");
    assert_ne!(member.key_id, worker.identity.member().key_id);
    // Links of the old identity end, and the new one gets its own.
    assert_eq!(far.close_reason(), Some(Closed::ByUs));
    let closed = tokio::time::timeout(HOUR, near.closed())
        .await
        .expect("ends");
    let Closed::ByPeer { code, text } = closed else {
        panic!("{closed:?}");
    };
    assert_eq!(code, EXPELLED);
    assert!(
        text.contains(&next.to_string()) && text.contains("rotated"),
        "{text}"
    );
    let again = NodeIdentity::load(worker.dir.path()).expect("loads");
    assert_eq!(again.node_id(), next.to_string());
    let (near, _far) = tokio::join!(connect(head.address, &again), head.listener.accept());
    near.expect("connects");
    let members = head.authority.members();
    let known = &members[&next.to_string()];
    assert_eq!(
        (&*known.name, &known.former),
        ("laptop", &vec![old.to_string()])
    );
    assert_eq!(members.len(), 2);

    // The thief is out at the head, and at workers that know the head's list.
    let thief = NodeIdentity::load(stolen.path()).expect("loads");
    let error = connect(head.address, &thief).await.expect_err("out");
    assert!(
        matches!(error, ConnectError::Refused { code: EXPELLED, .. }),
        "{error:?}"
    );
    let error = renew(&[head.address], &thief).await.expect_err("out");
    assert!(error.is_expulsion(), "{error:?}");
    let list = other.identity.deny_list();
    list.replace(head.authority.deny_list().list());
    let listener = Listener::bind(
        LOOPBACK,
        other.identity.clone(),
        None,
        LinkConfig::default(),
    );
    let listener = listener.expect("binds");
    let address = listener.local_addr().expect("address");
    let thief = Connector::bind(LOOPBACK, thief, LinkConfig::default()).expect("binds");
    let error = thief.connect(address, Role::Worker).await.expect_err("out");
    assert!(
        matches!(error, ConnectError::Refused { code: EXPELLED, .. }),
        "{error:?}"
    );
    let rightful = Connector::bind(LOOPBACK, again, LinkConfig::default()).expect("binds");
    let (near, _far) = tokio::join!(rightful.connect(address, Role::Worker), listener.accept());
    near.expect("connects");
}

#[tokio::test]
async fn a_rotation_whose_answer_was_lost_is_repeated() {
    let head = TestHead::start("attic");
    let worker = head.worker("laptop").await;
    let (_, next) = rotate_identity(worker.dir.path()).expect("a new key");
    let before = tempfile::tempdir().expect("temporary directory");
    for file in [
        "identity.key",
        "identity.key.next",
        "node.key",
        "node.crt",
        "root.crt",
    ] {
        let from = worker.dir.path().join(file);
        std::fs::copy(from, before.path().join(file)).expect("copied");
    }
    let first = NodeIdentity::load(worker.dir.path()).expect("loads");
    renew(&[head.address], &first).await.expect("renews");
    let head = head.restart().await;
    let again = NodeIdentity::load(before.path()).expect("loads");
    renew(&[head.address], &again).await.expect("renews again");
    assert_eq!(again.node_id(), next.to_string());
    let (near, _far) = tokio::join!(connect(head.address, &again), head.listener.accept());
    near.expect("connects");
}

#[tokio::test]
async fn a_head_rotates_its_identity_at_its_start() {
    let head = TestHead::start("attic");
    let worker = head.worker("laptop").await;
    let (old, next) = rotate_identity(head.dir.path()).expect("a new key");
    let head = head.restart().await;
    let (near, _far) = head.link(&worker, LinkConfig::default()).await;
    assert_eq!(near.node_id(), next.to_string());
    assert!(head.authority.deny_list().contains(&old.to_string()));
    let head = head.restart().await;
    let (near, _far) = head.link(&worker, LinkConfig::default()).await;
    assert_eq!(near.node_id(), next.to_string());
}

#[tokio::test]
async fn a_token_that_two_nodes_use_at_once_admits_one_of_them() {
    let head = TestHead::start("attic");
    for (nodes, count) in [(1, 6), (3, 6)] {
        let spec = TokenSpec {
            nodes,
            ..TokenSpec::once(HOUR, "")
        };
        let token = head
            .authority
            .issue_token(&spec, SystemTime::now())
            .expect("token");
        let address = [head.address];
        let dirs: Vec<_> = (0..count)
            .map(|_| tempfile::tempdir().expect("dir"))
            .collect();
        let attempts = dirs
            .iter()
            .map(|dir| join(&address, &token, dir.path(), "laptop"));
        let results = futures::future::join_all(attempts).await;
        let (joined, refused): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
        assert_eq!(joined.len(), nodes as usize);
        for result in refused {
            let error = result.expect_err("refused");
            let used = matches!(
                error,
                JoinError::Refused {
                    code: trust::TOKEN_USED,
                    ..
                }
            );
            assert!(used, "{error:?}");
        }
    }
    assert_eq!(head.authority.members().len(), 4);
}

#[tokio::test]
async fn with_manual_approval_a_node_waits_and_joins_once_it_is_approved() {
    let head = TestHead::start_with("attic", Approval::Manual);
    let token = head.token();
    let dirs = [(); 2].map(|()| tempfile::tempdir().expect("temporary directory"));
    let try_join = |at: usize| join(&head.address_list, &token, dirs[at].path(), "laptop");
    for _ in 0..2 {
        let error = try_join(0).await.expect_err("waits");
        let waits = matches!(
            &error,
            JoinError::Refused {
                code: AWAITING_APPROVAL,
                ..
            }
        );
        assert!(waits && error.is_transient(), "{error:?}");
        assert!(
            error.to_string().contains("hydramesh nodes approve"),
            "{error}"
        );
    }
    let error = try_join(1).await.expect_err("the token is taken");
    assert!(!error.is_transient(), "{error:?}");
    let pending = head.authority.pending();
    assert_eq!(pending.len(), 1);
    let (id, waiting) = pending.first_key_value().expect("one");
    let own = identity_ids(dirs[0].path())
        .expect("ids")
        .key
        .expect("a key");
    assert_eq!((id, &*waiting.name), (&own.to_string(), "laptop"));
    assert!(head.authority.members().is_empty());

    // Neither the wait nor the approval is lost with the head's process.
    let dir = head.stop();
    let head = TestHead::open_with(dir, "attic", Validity::default(), Approval::Manual);
    head.authority.approve(id).expect("approved");
    let head = TestHead::open_with(head.stop(), "attic", Validity::default(), Approval::Manual);
    let joined = join(&[head.address], &token, dirs[0].path(), "laptop").await;
    assert_eq!(joined.expect("joins").node_id(), *id);
    assert!(head.authority.pending().is_empty());
    assert!(head.authority.approve(id).is_err());
}

#[tokio::test]
async fn a_node_that_waits_and_is_revoked_stays_out() {
    let head = TestHead::start_with("attic", Approval::Manual);
    let token = head.token();
    let dir = tempfile::tempdir().expect("temporary directory");
    join(&[head.address], &token, dir.path(), "laptop")
        .await
        .expect_err("waits");
    let id = identity_ids(dir.path()).expect("ids").key.expect("a key");
    head.authority
        .expel(
            &id.to_string(),
            "laptop",
            "unknown machine",
            SystemTime::now(),
        )
        .expect("kept");
    assert!(head.authority.pending().is_empty());
    let error = join(&[head.address], &token, dir.path(), "laptop")
        .await
        .expect_err("out");
    assert!(error.is_expulsion(), "{error:?}");
}

/// Days pass while the machine sleeps; the certificate ends. It renews by the head's clock.
#[tokio::test]
async fn a_node_that_was_suspended_until_its_certificate_ended_renews_with_its_identity() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let short = Validity {
        life: Duration::from_secs(1),
        renewal_grace: HOUR,
    };
    let head = TestHead::open(dir, "attic", short);
    let worker = head.worker("laptop").await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let head = TestHead::open(head.stop(), "attic", Validity::default());
    let error = connect(head.address, &worker.identity)
        .await
        .expect_err("ended");
    assert!(error.to_string().contains("has to be renewed"), "{error}");
    let id = worker.identity.node_id();
    renew(&[head.address], &worker.identity)
        .await
        .expect("renews");
    assert_eq!(worker.identity.node_id(), id);
    head.link(&worker, LinkConfig::default()).await;
}
