//! Rotation of the mesh root, over real links.

use std::time::{Duration, SystemTime};

use arcanum_attestor::Attestor;
use mesh_net::quic::{ConnectError, Connector, LinkConfig, Listener, join, keep_renewed, renew};
use mesh_net::trust::{DenyList, MeshRoot, NodeIdentity, Role, Validity};

use crate::common::{HOUR, LOOPBACK, TestHead, TestWorker, state_file};

impl TestHead {
    /// Rotates the root as the head does, for so long.
    fn rotate(&self, own: &NodeIdentity, overlap: Duration) -> MeshRoot {
        let now = SystemTime::now();
        let rotated = self
            .authority
            .rotate_root(now + overlap, now)
            .expect("rotated");
        own.learn(rotated.succession(now).expect("under way"))
            .expect("learnt");
        own.renew_by(&*self.authority, now).expect("renewed");
        rotated
    }

    /// A head whose identity the test has, too.
    fn with_identity(mesh: &str) -> (Self, NodeIdentity) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let authority = Attestor::open(dir.path(), mesh, Validity::default()).expect("authority");
        let authority = std::sync::Arc::new(authority);
        let identity = authority.head_identity(dir.path(), "head", SystemTime::now());
        let identity = identity.expect("identity");
        let admission = Some(authority.clone() as std::sync::Arc<_>);
        let config = LinkConfig::default();
        let listener = Listener::bind(LOOPBACK, identity.clone(), admission, config);
        let listener = listener.expect("listener");
        let address = listener.local_addr().expect("address");
        let head = Self {
            dir,
            authority,
            listener,
            address,
            address_list: [address],
        };
        (head, identity)
    }
}

/// Waits until the time of the former root is over.
async fn until_over(root: &MeshRoot) {
    while root.former(SystemTime::now()).is_some() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn learn(worker: &TestWorker, root: &MeshRoot) {
    let signed = root.succession(SystemTime::now()).expect("under way");
    assert!(worker.identity.learn(signed).expect("accepted"));
}

async fn connects(head: &TestHead, worker: &NodeIdentity) -> Result<(), ConnectError> {
    let connector = Connector::bind(LOOPBACK, worker.clone(), LinkConfig::default())?;
    connector.connect(head.address, Role::Head).await.map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_goes_on_through_a_rotation_and_the_former_root_is_refused_after_it() {
    let (head, own) = TestHead::with_identity("attic");
    let old_token = head.token();
    let [worker, late, away] = [
        head.worker("a").await,
        head.worker("b").await,
        head.worker("c").await,
    ];
    let (near, far) = head.link(&worker, LinkConfig::default()).await;
    let node = worker.identity.node_id();

    let first = own.root_sha256();
    let root = head.rotate(&own, Duration::from_secs(4));
    assert_ne!(root.sha256(), first);
    assert_eq!(own.root_sha256(), root.sha256());
    // The head tells it on its link, and the worker renews at once.
    learn(&worker, &root);
    let renewing = tokio::spawn(keep_renewed(head.address, worker.identity.clone()));
    let renewed = async {
        while worker.identity.is_root_due() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(2), renewed)
        .await
        .expect("at once");
    renewing.abort();
    assert_eq!(worker.identity.node_id(), node);
    assert!(
        near.close_reason().is_none() && far.close_reason().is_none(),
        "the link lives on"
    );
    connects(&head, &worker.identity)
        .await
        .expect("a certificate of the new root");

    // A worker that has not heard of it yet, and one with a token of before.
    connects(&head, &late.identity)
        .await
        .expect("the former root is accepted");
    let dir = tempfile::tempdir().expect("temporary directory");
    let with_old_token = join(&[head.address], &old_token, dir.path(), "d")
        .await
        .expect("joins");
    assert!(
        with_old_token.is_root_due(),
        "it has learnt of the new root, and renews"
    );
    renew(&[head.address], &with_old_token)
        .await
        .expect("renewed");
    // New tokens pin the new root.
    let token = head.token();
    assert_eq!(*token.root_sha256(), root.sha256());
    let fresh = head.worker("e").await;
    assert!(!fresh.identity.is_root_due());

    // Workers reach each other, whichever of the roots they know.
    for (listening, dialling) in [
        (&late.identity, &fresh.identity),
        (&worker.identity, &late.identity),
    ] {
        let config = LinkConfig::default();
        let listener =
            Listener::bind(LOOPBACK, listening.clone(), None, config.clone()).expect("listens");
        let to = listener.local_addr().expect("address");
        let connector = Connector::bind(LOOPBACK, dialling.clone(), config).expect("connector");
        let (linked, _far) = tokio::join!(connector.connect(to, Role::Worker), listener.accept());
        linked.expect("both accept both");
    }

    // The other learns of it in time; the third one is away.
    renew(&[head.address], &late.identity)
        .await
        .expect("by the former root");
    assert!(late.identity.is_root_due());
    renew(&[head.address], &late.identity)
        .await
        .expect("renewed");
    assert!(!late.identity.is_root_due());
    until_over(&root).await;
    assert!(
        head.authority
            .drop_former_root(SystemTime::now())
            .expect("written")
    );
    assert!(own.expire_roots(SystemTime::now()).expect("written"));
    assert!(
        worker
            .identity
            .expire_roots(SystemTime::now())
            .expect("written")
    );
    for node in [
        &worker.identity,
        &late.identity,
        &with_old_token,
        &fresh.identity,
    ] {
        connects(&head, node)
            .await
            .expect("a certificate of the new root");
        assert!(
            node.roots().is_of_mesh(&first),
            "tokens of before are of this mesh"
        );
    }
    let refused = connects(&head, &away.identity)
        .await
        .expect_err("the former root")
        .to_string();
    assert!(refused.contains("join again with a token"), "{refused}");
    let refused = renew(&[head.address], &away.identity)
        .await
        .expect_err("too late")
        .to_string();
    assert!(refused.contains("join again with a token"), "{refused}");
    // It does so, and stays the same node.
    let back = join(&[head.address], &token, away.dir.path(), "c")
        .await
        .expect("joins");
    assert_eq!(back.node_id(), away.identity.node_id());
    connects(&head, &back).await.expect("a member again");
    // What is on disk is what is in use.
    for (node, dir) in [(&worker, worker.dir.path()), (&late, late.dir.path())] {
        let loaded = NodeIdentity::load(dir).expect("whole");
        assert_eq!(loaded.root_sha256(), root.sha256());
        assert_eq!(loaded.node_id(), node.identity.node_id());
        assert!(!loaded.is_root_due());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_that_is_cut_off_at_any_write_is_whole_or_did_not_happen() {
    let (head, own) = TestHead::with_identity("attic");
    let worker = head.worker("a").await;
    let (first, before) = (own.root_sha256(), copy_of(&head.dir));
    let root = head.rotate(&own, HOUR);
    let after = copy_of(&head.dir);
    // The order in which the files are written.
    let written = [
        "root.key",
        "root.history",
        "identity.doc",
        "node.crt",
        "root.crt",
    ];
    for cut in 0..=written.len() {
        let dir = copy_of(&before);
        for name in &written[..cut] {
            std::fs::copy(state_file(&after, name), state_file(&dir, name)).expect("copied");
        }
        let authority = Attestor::open(dir.path(), "attic", Validity::default());
        let authority = authority.unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
        let identity = authority.head_identity(dir.path(), "head", SystemTime::now());
        let identity = identity.unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
        let happened = cut > 0;
        let wanted = if happened { root.sha256() } else { first };
        assert_eq!(authority.root().sha256(), wanted, "cut at {cut}");
        assert_eq!(identity.root_sha256(), wanted, "cut at {cut}");
        assert_eq!(
            authority.root().former(SystemTime::now()).is_some(),
            happened
        );
        assert!(!identity.is_root_due(), "cut at {cut}");
        // The same at a second start, and for those who read the files.
        let again = authority
            .head_identity(dir.path(), "head", SystemTime::now())
            .expect("whole");
        assert_eq!(again.root_sha256(), wanted);
        assert_eq!(
            NodeIdentity::load(dir.path()).expect("whole").root_sha256(),
            wanted
        );
    }
    // The same at a worker, which writes the same files but the root's key.
    let before = copy_of(&worker.dir);
    learn(&worker, &root);
    renew(&[head.address], &worker.identity)
        .await
        .expect("renewed");
    let after = copy_of(&worker.dir);
    for cut in 1..=written.len() {
        let dir = copy_of(&before);
        for name in &written[1..cut] {
            std::fs::copy(state_file(&after, name), state_file(&dir, name)).expect("copied");
        }
        let loaded =
            NodeIdentity::load_with(dir.path(), DenyList::open(dir.path()).expect("empty"));
        let loaded = loaded.unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
        connects(&head, &loaded)
            .await
            .unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
        assert_eq!(
            loaded.root_sha256() == root.sha256(),
            cut > 1,
            "cut at {cut}"
        );
    }
}

#[test]
fn a_root_is_not_rotated_twice_at_a_time_and_its_former_key_goes_with_the_overlap() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let authority = Attestor::open(dir.path(), "attic", Validity::default()).expect("authority");
    let now = SystemTime::now();
    let first = authority.root();
    authority.rotate_root(now + HOUR, now).expect("rotated");
    let refused = authority
        .rotate_root(now + HOUR, now)
        .expect_err("under way")
        .to_string();
    assert!(refused.contains("not rotated again before"), "{refused}");
    let size = || {
        std::fs::metadata(state_file(&dir, "root.key"))
            .expect("there")
            .len()
    };
    let both = size();
    assert!(!authority.drop_former_root(now).expect("not yet"));
    assert!(authority.drop_former_root(now + HOUR).expect("written"));
    assert!(size() < both / 2 + 100, "the former key is gone");
    let second = authority
        .rotate_root(now + 2 * HOUR, now + HOUR)
        .expect("again");
    assert_ne!(second.sha256(), first.sha256());
    let loaded = Attestor::open(dir.path(), "attic", Validity::default());
    // The head's own certificate follows at its start.
    assert_eq!(loaded.expect("whole").root().sha256(), second.sha256());
}

/// A copy of the files in a folder.
fn copy_of(dir: &tempfile::TempDir) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("temporary directory");
    for entry in std::fs::read_dir(dir.path()).expect("listed") {
        let entry = entry.expect("listed");
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).expect("copied");
    }
    copy
}
