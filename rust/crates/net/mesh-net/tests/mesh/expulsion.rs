//! Nodes that an operator has expelled, and identities whose files are not whole.

use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::common::{HOUR, LOOPBACK, TestHead, TestWorker};
use mesh_net::quic::{
    Closed, ConnectError, Connector, JoinError, Link, LinkConfig, Listener, Refused, connect, join,
    load_or_join, renew,
};
use mesh_net::trust::{EXPELLED, Expulsion, NodeIdentity, Role, TrustError};

fn expel(head: &TestHead, worker: &TestWorker) {
    let member = worker.identity.member();
    head.authority
        .expel(&member.node_id, &member.name, "sold", SystemTime::now())
        .expect("kept");
}

async fn closed(link: &Link) -> Closed {
    tokio::time::timeout(Duration::from_secs(5), link.closed())
        .await
        .expect("the link ends")
}

fn is_refused(error: &ConnectError) -> bool {
    matches!(error, ConnectError::Refused { code, text, .. }
        if *code == EXPELLED && text.contains("sold") && text.contains("nodes readmit"))
}

#[tokio::test]
async fn an_expelled_node_loses_its_link_and_gets_neither_link_nor_certificate() {
    let head = TestHead::start("attic");
    let (worker, other) = (head.worker("laptop").await, head.worker("tower").await);
    let (near, far) = head.link(&worker, LinkConfig::default()).await;
    let (kept, _far) = head.link(&other, LinkConfig::default()).await;
    expel(&head, &worker);
    assert_eq!(far.close_reason(), Some(Closed::ByUs));
    let Closed::ByPeer { code, text } = closed(&near).await else {
        panic!("not closed by the head");
    };
    assert_eq!(code, EXPELLED);
    assert!(text.contains("`laptop` was expelled"), "{text}");
    assert_eq!(kept.close_reason(), None);

    // Also by a head that has started again.
    let head = head.restart().await;
    let error = connect(head.address, &worker.identity)
        .await
        .expect_err("expelled");
    assert!(is_refused(&error), "{error:?}");
    let error = renew(&[head.address], &worker.identity)
        .await
        .expect_err("expelled");
    assert!(error.is_expulsion() && !error.is_transient(), "{error:?}");
    // A new token does not help the same node, and is not used up.
    let token = head.token();
    let error = join(&[head.address], &token, worker.dir.path(), "laptop")
        .await
        .expect_err("expelled");
    assert!(error.is_expulsion(), "{error:?}");

    head.authority
        .readmit(&worker.identity.node_id())
        .expect("kept")
        .expect("it was expelled");
    head.link(&worker, LinkConfig::default()).await;
    join(&[head.address], &token, worker.dir.path(), "laptop")
        .await
        .expect("the token is unused");
}

#[tokio::test]
async fn workers_that_know_the_list_neither_call_an_expelled_node_nor_answer_it() {
    let head = TestHead::start("attic");
    let (worker, rogue) = (head.worker("laptop").await, head.worker("rogue").await);
    let listener = |identity: &NodeIdentity| {
        Listener::bind(LOOPBACK, identity.clone(), None, LinkConfig::default()).expect("binds")
    };
    let (ours, theirs) = (listener(&worker.identity), listener(&rogue.identity));
    let connector = |identity: &NodeIdentity| {
        Connector::bind(LOOPBACK, identity.clone(), LinkConfig::default()).expect("binds")
    };
    let (calls, called) = (connector(&worker.identity), connector(&rogue.identity));
    let their_address = theirs.local_addr().expect("address");
    let our_address = ours.local_addr().expect("address");
    let (out, _held) = tokio::join!(calls.connect(their_address, Role::Worker), theirs.accept());
    let (_held_too, into) = tokio::join!(called.connect(our_address, Role::Worker), ours.accept());
    let (out, into) = (out.expect("connects"), into.expect("accepted"));

    let expulsion = Expulsion {
        name: "rogue".to_owned(),
        since: 1_795_910_400,
        ..Expulsion::default()
    };
    let list = worker.identity.deny_list();
    assert!(list.replace([(rogue.identity.node_id(), expulsion)]));
    for link in [out, into] {
        assert_eq!(link.close_reason(), Some(Closed::ByUs));
    }
    let error = calls
        .connect(their_address, Role::Worker)
        .await
        .expect_err("not called");
    assert!(matches!(error, ConnectError::Expelled { .. }), "{error:?}");
    let error = called
        .connect(our_address, Role::Worker)
        .await
        .expect_err("refused");
    assert!(
        matches!(error, ConnectError::Refused { code, .. } if code == EXPELLED),
        "{error:?}"
    );
    let refused = Refused::Expelled {
        node_id: rogue.identity.node_id(),
        name: "rogue".to_owned(),
    };
    assert_eq!(ours.refusals().take(), [refused]);

    // The list is there after a restart, too.
    list.save().expect("kept");
    let again = NodeIdentity::load(worker.dir.path()).expect("loads");
    assert!(again.deny_list().contains(&rogue.identity.node_id()));
    assert!(again.deny_list().replace([]));
    let calls = connector(&again);
    let (link, _far) = tokio::join!(calls.connect(their_address, Role::Worker), theirs.accept());
    link.expect("it is readmitted");
}

#[tokio::test]
async fn names_are_given_by_the_head_and_no_two_nodes_have_one() {
    let head = TestHead::start("attic");
    let (first, second) = (head.worker("laptop").await, head.worker("LAPTOP").await);
    assert_eq!(first.identity.member().name, "laptop");
    assert_eq!(second.identity.member().name, "LAPTOP-2");
    let head = head.restart().await;
    let third = head.worker("laptop").await;
    assert_eq!(third.identity.member().name, "laptop-3");
    // The same node keeps its name, or takes another that it asks for with a new token.
    let again = join(&[head.address], &head.token(), first.dir.path(), "laptop").await;
    assert_eq!(again.expect("joins").member().name, "laptop");
    let renamed = join(&[head.address], &head.token(), first.dir.path(), "tower").await;
    let renamed = renamed.expect("joins").member();
    assert_eq!(
        (&*renamed.name, &renamed.node_id),
        ("tower", &first.identity.node_id())
    );
    assert_eq!(head.authority.members()[&renamed.node_id].name, "tower");
}

/// History of a worker's state directory.
fn break_file(dir: &Path, file: &str, damage: Option<&str>) {
    match damage {
        Some(text) => std::fs::write(dir.join(file), text).expect("written"),
        None => std::fs::remove_file(dir.join(file)).expect("removed"),
    }
}

#[tokio::test]
async fn incomplete_identities_are_refused_by_name_and_a_new_token_mends_them() {
    for (file, damage, same_node) in [
        ("node.crt", None, true),
        ("node.crt", Some("junk"), true),
        ("node.crt", Some(""), true),
        ("root.crt", None, true),
        ("root.crt", Some("junk"), true),
        ("node.key", None, false),
        ("node.key", Some("junk"), false),
    ] {
        let head = TestHead::start("attic");
        let used = head.token();
        let dir = tempfile::tempdir().expect("temporary directory");
        let before = join(&[head.address], &used, dir.path(), "laptop")
            .await
            .expect("joins");
        break_file(dir.path(), file, damage);
        let listed = || {
            let entries = std::fs::read_dir(dir.path()).expect("listed");
            let mut files: Vec<_> = entries
                .map(|entry| entry.expect("entry").path())
                .filter(|path| path.is_file())
                .map(|path| (path.clone(), std::fs::read(path).expect("read")))
                .collect();
            files.sort();
            files
        };
        let broken = listed();
        let error = load_or_join(&[head.address], None, dir.path(), "laptop")
            .await
            .expect_err("not whole")
            .to_string();
        assert!(error.contains(file), "{file}: {error}");
        assert!(error.contains("backup"), "{file}: {error}");

        // The token that the configuration still names was used long ago: everything stays as it is.
        let stranger = tempfile::tempdir().expect("temporary directory");
        let spent = head.token();
        join(&[head.address], &spent, stranger.path(), "other")
            .await
            .expect("joins");
        let error = load_or_join(&[head.address], Some(&spent), dir.path(), "laptop")
            .await
            .expect_err("used");
        assert!(matches!(error, JoinError::Unusable { .. }), "{error:?}");
        let error = error.to_string();
        assert!(
            error.contains(file) && error.contains("used by `other`"),
            "{file}: {error}"
        );
        assert_eq!(listed(), broken, "{file}");

        let mended = load_or_join(&[head.address], Some(&head.token()), dir.path(), "laptop")
            .await
            .expect("joins again");
        assert_eq!(mended.node_id() == before.node_id(), same_node, "{file}");
        let aside = dir.path().join("old-identity-1");
        assert_eq!(aside.is_dir(), !same_node, "{file}");
        let loaded = NodeIdentity::load(dir.path()).expect("whole");
        assert_eq!(loaded.node_id(), mended.node_id());
        let (near, _far) = tokio::join!(connect(head.address, &loaded), head.listener.accept());
        near.expect("connects");
    }
}

#[tokio::test]
async fn a_change_of_identity_that_was_cut_off_is_ended_at_the_next_start() {
    let head = TestHead::start("attic");
    // Cut off before each of the files was moved.
    for moved in 0..=4 {
        let worker = head.worker("old").await;
        let dir = worker.dir.path();
        let new = head.worker("new").await;
        let joining = dir.join("joining");
        std::fs::create_dir(&joining).expect("created");
        if moved > 0 {
            mesh_net::trust::set_aside(dir).expect("moved");
        }
        let names = ["node.key", "identity.key", "root.crt", "node.crt"];
        for (index, name) in names.into_iter().enumerate() {
            let to = match index < moved {
                true => dir.join(name),
                false => joining.join(name),
            };
            std::fs::copy(new.dir.path().join(name), to).expect("copied");
        }
        mesh_net::quic::settle(dir).expect("settled");
        let loaded = NodeIdentity::load(dir).expect("whole");
        assert_eq!(loaded.node_id(), new.identity.node_id(), "{moved}");
        assert!(!joining.exists());
        assert!(dir.join("old-identity-1/node.key").exists());
    }
    // A key that no head has admitted is kept as long as it may be needed.
    let worker = head.worker("other").await;
    let joining = worker.dir.path().join("joining");
    std::fs::create_dir(&joining).expect("created");
    std::fs::write(joining.join("node.key"), "x").expect("written");
    let key = worker.dir.path().join("node.key");
    let text = std::fs::read(&key).expect("there");
    std::fs::remove_file(&key).expect("removed");
    mesh_net::quic::settle(worker.dir.path()).expect("nothing to do");
    assert!(joining.exists());
    std::fs::write(&key, text).expect("restored from a backup");
    mesh_net::quic::settle(worker.dir.path()).expect("removed");
    assert!(!joining.exists());
}

#[tokio::test]
async fn files_of_two_meshes_are_told_apart_and_a_token_decides() {
    let (attic, cellar) = (TestHead::start("attic"), TestHead::start("cellar"));
    let worker = attic.worker("laptop").await;
    let other = cellar.worker("laptop").await;
    std::fs::copy(
        other.dir.path().join("root.crt"),
        worker.dir.path().join("root.crt"),
    )
    .expect("copied");
    let error = NodeIdentity::load(worker.dir.path()).expect_err("mixed up");
    assert!(matches!(error, TrustError::MixedUp { .. }), "{error:?}");
    assert!(error.to_string().contains("node.crt"), "{error}");
    // One for either mesh.
    for head in [&attic, &cellar, &attic] {
        let joined = load_or_join(
            &[head.address],
            Some(&head.token()),
            worker.dir.path(),
            "laptop",
        )
        .await
        .expect("joins");
        assert_eq!(joined.root_sha256(), head.authority.root().sha256());
        assert_eq!(joined.node_id(), worker.identity.node_id());
    }
}

#[tokio::test]
async fn a_head_whose_files_are_not_whole_does_not_begin_another_mesh() {
    for (file, damage, starts) in [
        // Derived from what is there.
        ("root.crt", None, true),
        ("node.crt", None, true),
        ("node.crt", Some("junk"), true),
        ("members.json", None, true),
        ("tokens.json", None, true),
        // Lost.
        ("root.key", None, false),
        ("root.key", Some("junk"), false),
        ("root.crt", Some("junk"), false),
        ("node.key", None, false),
        ("node.key", Some("junk"), false),
        ("identity.key", None, false),
        ("identity.key", Some("junk"), false),
        ("tokens.json", Some("junk"), false),
        ("members.json", Some("junk"), false),
        ("expelled.json", Some("junk"), false),
        ("expelled.json", None, false),
    ] {
        let head = TestHead::start("attic");
        let (worker, other) = (head.worker("laptop").await, head.worker("sold").await);
        expel(&head, &other);
        let root = head.authority.root().sha256();
        let dir = head.stop();
        break_file(dir.path(), file, damage);
        let opened = arcanum_attestor::Attestor::open(dir.path(), "attic", Default::default())
            .and_then(|authority| {
                authority.head_identity(dir.path(), "head", SystemTime::now())?;
                Ok(authority.root().sha256())
            });
        match opened {
            Ok(found) => {
                assert!(starts, "{file}: {damage:?}");
                assert_eq!(found, root, "{file}");
                let head = TestHead::open(dir, "attic", Default::default());
                head.link(&worker, LinkConfig::default()).await;
            }
            Err(error) => {
                assert!(!starts, "{file}: {error}");
                assert!(error.to_string().contains(file), "{file}: {error}");
                let text = std::fs::read_to_string(dir.path().join(file));
                assert_eq!(text.ok().as_deref(), damage, "{file} is left alone");
            }
        }
    }
}

#[tokio::test]
async fn a_certificate_that_ended_too_long_ago_needs_a_new_token_and_the_node_stays_the_same() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let validity = mesh_net::trust::Validity {
        life: Duration::from_secs(1),
        renewal_grace: Duration::ZERO,
    };
    let head = TestHead::open(dir, "attic", validity);
    let worker = head.worker("laptop").await;
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let dir = head.stop();
    let head = TestHead::open(
        dir,
        "attic",
        mesh_net::trust::Validity {
            life: HOUR,
            renewal_grace: Duration::ZERO,
        },
    );
    let error = connect(head.address, &worker.identity)
        .await
        .expect_err("ended");
    assert!(error.to_string().contains("renewed"), "{error}");
    let error = renew(&[head.address], &worker.identity)
        .await
        .expect_err("too late");
    assert!(error.to_string().contains("new token"), "{error}");
    mesh_net::quic::join_again(&[head.address], &head.token(), worker.dir.path(), "laptop")
        .await
        .expect("joins again");
    assert!(worker.identity.reload().expect("its own"));
    head.link(&worker, LinkConfig::default()).await;

    // An expelled one stays out, whatever its certificate and its token are.
    expel(&head, &worker);
    let error =
        mesh_net::quic::join_again(&[head.address], &head.token(), worker.dir.path(), "laptop")
            .await
            .expect_err("expelled");
    assert!(error.is_expulsion(), "{error:?}");
}
