//! A head without the root's keys, over real links.

use std::time::{Duration, SystemTime};

use arcanum_attestor::Attestor;
use mesh_net::quic::{ConnectError, Connector, JoinError, LinkConfig, Listener, join, renew};
use mesh_net::trust::{
    NodeIdentity, Role, TrustError, Validity, install_intermediate, read_papers,
    request_intermediate, sign_intermediate,
};
use tempfile::TempDir;

use crate::common::{HOUR, LOOPBACK, TestHead, TestWorker, state_file};

const DAY: Duration = Duration::from_secs(24 * 3600);

impl TestHead {
    /// The head after its root's keys were moved elsewhere, and the folder where they are now.
    async fn without_root_key(self, life: Duration) -> (Self, TempDir) {
        let (offline, now) = (tempfile::tempdir().expect("a folder"), SystemTime::now());
        let key = state_file(&offline, "root.key");
        std::fs::copy(state_file(&self.dir, "root.key"), &key).expect("copied");
        let request = request_intermediate(self.dir.path()).expect("requested");
        let signed = sign_intermediate(&key, &request, life, now).expect("signed");
        install_intermediate(self.dir.path(), &signed, now).expect("installed");
        std::fs::remove_file(state_file(&self.dir, "root.key")).expect("removed");
        (self.restart().await, offline)
    }
}

async fn links(a: &TestWorker, b: &NodeIdentity) -> Result<(), ConnectError> {
    let config = LinkConfig::default();
    let listener = Listener::bind(LOOPBACK, b.clone(), None, config.clone()).expect("listens");
    let address = listener.local_addr().expect("bound");
    let connector = Connector::bind(LOOPBACK, a.identity.clone(), config).expect("binds");
    // Nobody is accepted where the handshake fails.
    tokio::select! {
        near = connector.connect(address, Role::Worker) => near.map(drop),
        never = async {
            let _far = listener.accept().await;
            std::future::pending::<std::convert::Infallible>().await
        } => match never {},
    }
}

/// Certificates in a node.crt.
fn chain(worker: &TestWorker) -> usize {
    let text = std::fs::read_to_string(state_file(&worker.dir, "node.crt")).expect("read");
    text.matches("BEGIN CERTIFICATE").count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_without_the_roots_keys_admits_renews_and_its_workers_link() {
    let head = TestHead::start("attic");
    let (root, old_token) = (head.authority.root().sha256(), head.token());
    let before = head.worker("before").await;
    let (head, _offline) = head.without_root_key(DAY).await;
    let issuer = head.authority.root();
    assert_eq!(issuer.sha256(), root, "tokens pin the same root");
    assert!(issuer.intermediate_until().is_some());

    let dir = tempfile::tempdir().expect("a folder");
    let identity = join(&[head.address], &old_token, dir.path(), "fresh").await;
    let fresh = TestWorker {
        identity: identity.expect("joins"),
        dir,
    };
    assert_eq!((chain(&before), chain(&fresh)), (1, 2));
    let life = fresh.identity.member().not_after;
    assert!(
        life <= SystemTime::now() + DAY,
        "no longer than the intermediate"
    );
    head.link(&fresh, LinkConfig::default()).await;
    head.link(&before, LinkConfig::default()).await;
    // Certificates of the root and of its intermediate, both ways.
    links(&before, &fresh.identity).await.expect("links");
    links(&fresh, &before.identity).await.expect("links");

    renew(&head.address_list, &before.identity)
        .await
        .expect("renewed");
    renew(&head.address_list, &fresh.identity)
        .await
        .expect("renewed");
    assert_eq!(chain(&before), 2);
    links(&before, &fresh.identity).await.expect("links");
    for worker in [&before, &fresh] {
        let papers = read_papers(&worker.identity.papers().expect("papers")).expect("signed");
        assert_eq!((papers.root, &*papers.mesh), (root, "attic"));
        let signer = worker.identity.signer().expect("a document");
        assert_eq!(&signer.root, issuer.identity());
        let loaded = NodeIdentity::load(worker.dir.path()).expect("loads");
        assert_eq!(loaded.node_id(), worker.identity.node_id());
        links(worker, &loaded).await.expect("links");
    }
    let rotated = head
        .authority
        .rotate_root(SystemTime::now() + HOUR, SystemTime::now());
    let text = rotated
        .expect_err("not without the root's keys")
        .to_string();
    assert!(text.contains("root.key"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_intermediate_that_has_ended_issues_nothing_and_another_one_goes_on() {
    let head = TestHead::start("attic");
    let (head, offline) = head.without_root_key(Duration::from_secs(4)).await;
    let worker = head.worker("laptop").await;
    let end = head.authority.root().intermediate_until().expect("one");
    while mesh_base::clock::unix_seconds(SystemTime::now()) <= end {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let late = join(&[head.address], &head.token(), dir.path(), "late").await;
    let text = late.expect_err("refused").to_string();
    for part in ["ended on", "hydramesh root intermediate request"] {
        assert!(text.contains(part), "{text}");
    }
    let config = LinkConfig::default();
    let connector = Connector::bind(LOOPBACK, worker.identity.clone(), config).expect("binds");
    let refused = connector.connect(head.address, Role::Head).await;
    let text = refused.expect_err("its certificate ended, too").to_string();
    assert!(text.contains("valid from"), "{text}");

    let home = head.stop();
    let again = Attestor::open(home.path(), "attic", Validity::default()).expect("opens");
    let error = again.head_identity(home.path(), "head", SystemTime::now());
    assert!(
        matches!(error, Err(TrustError::IntermediateEnded { .. })),
        "{error:?}"
    );

    let now = SystemTime::now();
    let request = request_intermediate(home.path()).expect("requested");
    let signed = sign_intermediate(&state_file(&offline, "root.key"), &request, DAY, now);
    install_intermediate(home.path(), &signed.expect("signed"), now).expect("installed");
    let head = TestHead::open(home, "attic", Validity::default());
    renew(&head.address_list, &worker.identity)
        .await
        .expect("renewed");
    head.link(&worker, LinkConfig::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_intermediate_of_another_root_or_altered_is_nobody() {
    let (head, _offline) = TestHead::start("attic").without_root_key(DAY).await;
    let (other, _theirs) = TestHead::start("attic").without_root_key(DAY).await;
    let (worker, stranger) = (head.worker("a").await, other.worker("b").await);
    let refused = links(&worker, &stranger.identity).await;
    assert!(
        matches!(refused, Err(ConnectError::PeerNotTrusted { .. })),
        "{refused:?}"
    );
    let dir = tempfile::tempdir().expect("a folder");
    let foreign = join(&[other.address], &head.token(), dir.path(), "c").await;
    assert!(
        matches!(foreign, Err(JoinError::ForeignMesh { .. })),
        "{foreign:?}"
    );
    // The intermediate of the other root behind one's own certificate.
    let files = [&worker, &stranger].map(|worker| state_file(&worker.dir, "node.crt"));
    let [own, theirs] = files
        .each_ref()
        .map(|file| std::fs::read_to_string(file).expect("read"));
    let split = |text: &str| text.rfind("-----BEGIN").expect("two");
    let mixed = format!("{}{}", &own[..split(&own)], &theirs[split(&theirs)..]);
    std::fs::write(&files[0], mixed).expect("written");
    let error = NodeIdentity::load(worker.dir.path()).expect_err("refused");
    assert!(error.to_string().contains("node.crt"), "{error}");
    std::fs::write(&files[0], &own[..split(&own)]).expect("written");
    NodeIdentity::load(worker.dir.path()).expect_err("the intermediate is missing");
    std::fs::write(&files[0], own).expect("written");
    NodeIdentity::load(worker.dir.path()).expect("as it was");

    let path = state_file(&head.dir, "intermediate.key");
    let good = std::fs::read_to_string(&path).expect("read");
    let foreign = std::fs::read_to_string(state_file(&other.dir, "intermediate.key"));
    let home = head.stop();
    let open = |text: &str| {
        std::fs::write(&path, text).expect("written");
        Attestor::open(home.path(), "attic", Validity::default()).map(drop)
    };
    assert!(matches!(
        open(&foreign.expect("read")),
        Err(TrustError::MixedUp { .. })
    ));
    let cut = good.replace("-----BEGIN HYDRAMESH", "-----BEGIN");
    assert!(matches!(open(&cut), Err(TrustError::Damaged { .. })));
    open(&good).expect("as it was");
}
