//! Joining a mesh, and refusals to join.

use std::time::{Duration, SystemTime};

use crate::common::{HOUR, LOOPBACK, TestHead};
use dcf::ErrorCode;
use mesh_net::quic::{
    ConnectError, Connector, JoinError, LinkConfig, connect, join, load_or_join, renew,
};
use mesh_net::trust::{self, JoinToken, NodeIdentity, Role, TrustError, Validity};

#[tokio::test]
async fn a_node_with_a_token_joins_and_both_sides_know_each_other() {
    let head = TestHead::start("attic");
    let worker = head.worker("laptop").await;
    let (near, far) = head.link(&worker, LinkConfig::default()).await;
    assert_eq!(
        (near.node_name(), near.role(), &*near.peer().mesh),
        ("head", Role::Head, "attic")
    );
    assert_eq!(
        (far.node_name(), far.role(), &*far.peer().mesh),
        ("laptop", Role::Worker, "attic")
    );
    assert_eq!(far.node_id(), worker.identity.node_id());
    assert_eq!(far.node_id().len(), 64);
    assert_ne!(near.node_id(), far.node_id());
}

#[tokio::test]
async fn the_identity_survives_restarts_of_both_sides_and_needs_no_second_token() {
    let head = TestHead::start("attic");
    let token = head.token();
    let worker = head.worker("laptop").await;
    let head = head.restart().await;
    let again = load_or_join(&[head.address], Some(&token), worker.dir.path(), "laptop")
        .await
        .expect("loads");
    assert_eq!(again.node_id(), worker.identity.node_id());
    let (near, _far) = tokio::join!(connect(head.address, &again), head.listener.accept());
    near.expect("connects");
    assert!(
        head.authority
            .token_records()
            .iter()
            .any(|record| record.id == token.id() && record.uses.is_empty())
    );
}

#[tokio::test]
async fn private_keys_are_readable_by_their_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let head = TestHead::start("attic");
    let worker = head.worker("laptop").await;
    let keys = [
        (&head.dir, "root.key"),
        (&head.dir, "node.key"),
        (&head.dir, "tokens.json"),
        (&worker.dir, "node.key"),
    ];
    for (dir, name) in keys {
        let metadata = std::fs::metadata(crate::common::state_file(dir, name)).expect(name);
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600, "{name}");
    }
}

#[tokio::test]
async fn a_used_token_is_refused_also_after_the_head_restarts() {
    let mut head = TestHead::start("attic");
    let token = head.token();
    let first = tempfile::tempdir().expect("temporary directory");
    join(&[head.address], &token, first.path(), "first")
        .await
        .expect("joins");
    for _ in 0..2 {
        let second = tempfile::tempdir().expect("temporary directory");
        let error = join(&[head.address], &token, second.path(), "second")
            .await
            .expect_err("used");
        assert!(
            matches!(
                error,
                JoinError::Refused {
                    code: trust::TOKEN_USED,
                    ..
                }
            ),
            "{error:?}"
        );
        assert!(error.to_string().contains("used by `first`"), "{error}");
        assert!(!error.is_transient());
        assert!(matches!(
            NodeIdentity::load(second.path()),
            Err(TrustError::NoIdentity { .. })
        ));
        head = head.restart().await;
    }
}

#[tokio::test]
async fn an_expired_token_is_refused() {
    let head = TestHead::start("attic");
    let yesterday = SystemTime::now() - 24 * HOUR;
    let token = head
        .authority
        .create_token(HOUR, "", yesterday)
        .expect("token");
    let dir = tempfile::tempdir().expect("temporary directory");
    let error = join(&[head.address], &token, dir.path(), "late")
        .await
        .expect_err("expired");
    assert!(
        matches!(
            error,
            JoinError::Refused {
                code: trust::TOKEN_EXPIRED,
                ..
            }
        ),
        "{error:?}"
    );
    assert!(error.to_string().contains("expired"), "{error}");
}

#[tokio::test]
async fn an_unknown_or_withdrawn_token_is_refused() {
    let head = TestHead::start("attic");
    let made_up = JoinToken::generate(head.authority.root().sha256());
    let withdrawn = head.token();
    head.authority
        .revoke_token(&withdrawn.id(), SystemTime::now())
        .expect("withdrawn");
    for token in [made_up, withdrawn] {
        let dir = tempfile::tempdir().expect("temporary directory");
        let error = join(&[head.address], &token, dir.path(), "guess")
            .await
            .expect_err("unknown");
        assert!(
            matches!(
                error,
                JoinError::Refused {
                    code: trust::TOKEN_UNKNOWN,
                    ..
                }
            ),
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn a_token_of_another_mesh_is_refused_before_its_secret_leaves_the_node() {
    let (attic, cellar) = (TestHead::start("attic"), TestHead::start("cellar"));
    let token = cellar.token();
    let dir = tempfile::tempdir().expect("temporary directory");
    let error = join(&[attic.address], &token, dir.path(), "lost")
        .await
        .expect_err("foreign");
    let JoinError::ForeignMesh {
        pinned, presented, ..
    } = &error
    else {
        panic!("{error:?}")
    };
    assert_eq!(*pinned, cellar.authority.root().sha256());
    assert_eq!(*presented, Some(attic.authority.root().sha256()));
    assert!(error.to_string().contains("another mesh"), "{error}");
    join(&[cellar.address], &token, dir.path(), "lost")
        .await
        .expect("still good at its own mesh");
}

#[tokio::test]
async fn a_bad_node_name_costs_no_token() {
    let head = TestHead::start("attic");
    let token = head.token();
    let dir = tempfile::tempdir().expect("temporary directory");
    let error = join(&[head.address], &token, dir.path(), "not a name")
        .await
        .expect_err("bad name");
    assert!(
        matches!(
            &error,
            JoinError::Refused {
                code: ErrorCode::INVALID_PAYLOAD,
                ..
            }
        ),
        "{error:?}"
    );
    assert!(error.to_string().contains("not a name"), "{error}");
    join(&[head.address], &token, dir.path(), "a-name")
        .await
        .expect("the token is unused");
}

#[tokio::test]
async fn a_node_without_certificate_has_no_identity_to_connect_with() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let error = NodeIdentity::load(dir.path())
        .expect_err("nothing there")
        .to_string();
    assert!(
        error.contains("has not joined") && error.contains("hydramesh token create"),
        "{error}"
    );
    let error = load_or_join(&[LOOPBACK], None, dir.path(), "n")
        .await
        .expect_err("no token")
        .to_string();
    assert!(error.contains("has not joined"), "{error}");
}

#[tokio::test]
async fn certificates_of_another_mesh_connect_to_nobody() {
    let (attic, cellar) = (TestHead::start("attic"), TestHead::start("cellar"));
    let stranger = cellar.worker("stranger").await;
    let error = connect(attic.address, &stranger.identity)
        .await
        .expect_err("foreign");
    assert!(
        matches!(error, ConnectError::PeerNotTrusted { .. }),
        "{error:?}"
    );
    let accepted = tokio::time::timeout(Duration::from_millis(200), attic.listener.accept()).await;
    assert!(
        accepted.is_err(),
        "the head must not have accepted anything"
    );
}

#[tokio::test]
async fn a_worker_cannot_pass_for_the_head() {
    let head = TestHead::start("attic");
    let (impostor, victim) = (head.worker("impostor").await, head.worker("victim").await);
    let listener =
        mesh_net::quic::Listener::bind(LOOPBACK, impostor.identity, None, LinkConfig::default())
            .expect("binds");
    let address = listener.local_addr().expect("address");
    let error = connect(address, &victim.identity)
        .await
        .expect_err("not a head");
    assert!(
        matches!(
            error,
            ConnectError::WrongRole {
                found: Role::Worker,
                ..
            }
        ),
        "{error:?}"
    );
    let dir = tempfile::tempdir().expect("temporary directory");
    let error = join(&[address], &head.token(), dir.path(), "new")
        .await
        .expect_err("not a head");
    assert!(
        matches!(error, JoinError::Connect(ConnectError::WrongRole { .. })),
        "{error:?}"
    );
    // Between workers the same certificates are good.
    let connector =
        Connector::bind(LOOPBACK, victim.identity, LinkConfig::default()).expect("connector");
    let (near, _far) = tokio::join!(connector.connect(address, Role::Worker), listener.accept());
    assert_eq!(near.expect("connects").node_name(), "impostor");
}

#[tokio::test]
async fn a_renewed_certificate_replaces_the_old_one_and_keeps_the_node() {
    let head = TestHead::start("attic");
    let worker = head.worker("laptop").await;
    let before = worker.identity.member();
    tokio::time::sleep(Duration::from_millis(1100)).await; // certificates count in seconds
    renew(&[head.address], &worker.identity)
        .await
        .expect("renews");
    let after = worker.identity.member();
    assert!(after.not_after > before.not_after);
    assert_eq!(
        (&after.node_id, &after.name, after.role),
        (&before.node_id, &before.name, before.role)
    );
    let reloaded = NodeIdentity::load(worker.dir.path()).expect("loads");
    assert_eq!(reloaded.member(), after);
    let (near, _far) = tokio::join!(connect(head.address, &reloaded), head.listener.accept());
    near.expect("connects");
}

#[tokio::test]
async fn an_ended_certificate_makes_no_link_but_can_be_renewed_within_the_grace() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let short = Validity {
        life: Duration::from_secs(1),
        renewal_grace: HOUR,
    };
    let head = TestHead::open(dir, "attic", short);
    let worker = head.worker("laptop").await;
    assert!(worker.identity.renew_at() <= SystemTime::now());
    tokio::time::sleep(Duration::from_millis(1500)).await;
    // A head whose own certificate holds, over the same root.
    let dir = head.stop();
    let head = TestHead::open(dir, "attic", Validity::default());
    let error = connect(head.address, &worker.identity)
        .await
        .expect_err("ended");
    assert!(error.to_string().contains("has to be renewed"), "{error}");
    renew(&[head.address], &worker.identity)
        .await
        .expect("renews");
    let (near, _far) = tokio::join!(
        connect(head.address, &worker.identity),
        head.listener.accept()
    );
    near.expect("connects");
}

#[tokio::test]
async fn nobody_at_the_address_is_said_so() {
    let closed = std::net::UdpSocket::bind(LOOPBACK)
        .expect("bind")
        .local_addr()
        .expect("address");
    let dir = tempfile::tempdir().expect("temporary directory");
    let error = join(&[closed], &JoinToken::generate([0; 32]), dir.path(), "n")
        .await
        .expect_err("nobody");
    assert!(error.is_transient(), "{error:?}");
    assert!(error.to_string().contains("no answer from"), "{error}");
}
