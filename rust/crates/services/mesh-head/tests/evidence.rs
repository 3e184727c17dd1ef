//! Evidence of nodes: requirements, changes, and evidence that is not the node's own.

mod support;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use arcanum_attestor::{OnChange, SystemRule};
use dcf::{ErrorCode, Message, MsgType};
use mesh_head::Config;
use mesh_net::quic::{self, Connector, JoinError, Link, LinkConfig, MsgStream, report_evidence};
use mesh_net::trust::{
    AWAITING_APPROVAL, EVIDENCE_REFUSED, EXPELLED, EvidenceSource, JoinToken, Newcomer,
    NodeIdentity, Role,
};
use mesh_proto::{Evidence, Hello, PROTOCOL_VERSION, SignedEvidence, TpmQuote};
use mesh_testkit::Swtpm;
use mesh_tpm::Quoter;
use prost::Message as _;
use serde_json::{Value, json};
use support::{TestHead, eventually};
use tempfile::TempDir;

/// A node that states what it is told to.
struct Node {
    says: Arc<Mutex<Evidence>>,
    identity: NodeIdentity,
    _dir: TempDir,
}

/// A node on its link.
struct Linked {
    link: Link,
    control: MsgStream,
    _connector: Connector,
}

fn debian(version: &str) -> Evidence {
    Evidence {
        form: 1,
        version: "0.1.0".into(),
        kernel: "6.12.30".into(),
        os: "debian".into(),
        os_version: version.into(),
        architecture: "x86_64".into(),
        processor: "Old CPU".into(),
        threads: 4,
        memory_mib: 8000,
        boot: "b1".into(),
        ..Evidence::default()
    }
}

fn source(says: &Arc<Mutex<Evidence>>) -> EvidenceSource {
    let says = says.clone();
    EvidenceSource::new(move || says.lock().unwrap().encode_to_vec())
}

async fn join(
    head: &TestHead,
    token: &JoinToken,
    says: &Arc<Mutex<Evidence>>,
    dir: &TempDir,
) -> Result<NodeIdentity, JoinError> {
    join_with(head, token, &source(says), dir).await
}

async fn join_with(
    head: &TestHead,
    token: &JoinToken,
    evidence: &EvidenceSource,
    dir: &TempDir,
) -> Result<NodeIdentity, JoinError> {
    let node = Newcomer {
        name: "attic",
        evidence: Some(evidence),
    };
    quic::join(&[head.address("quic")], token, dir.path(), node).await
}

/// A TPM that another one can take the place of. It gives the quotes in `replayed` first.
#[derive(Clone, Default)]
struct Chip {
    quoter: Arc<Mutex<Option<Quoter>>>,
    given: Arc<Mutex<Vec<TpmQuote>>>,
    replayed: Arc<Mutex<Vec<TpmQuote>>>,
}

impl Chip {
    fn insert(&self, tpm: &Swtpm) {
        *self.quoter.lock().unwrap() = Some(Quoter::open(&tpm.socket()).unwrap());
    }

    fn remove(&self) {
        *self.quoter.lock().unwrap() = None;
    }

    fn source(&self, says: &Arc<Mutex<Evidence>>) -> EvidenceSource {
        let chip = self.clone();
        source(says).with_quotes(move |digest| {
            if let Some(replayed) = chip.replayed.lock().unwrap().pop() {
                return Some(replayed);
            }
            let quoter = chip.quoter.lock().unwrap();
            let quote = quoter.as_ref()?.quote(digest).unwrap();
            chip.given.lock().unwrap().push(quote.clone());
            Some(quote)
        })
    }
}

impl Node {
    async fn join(head: &TestHead, says: Evidence) -> Self {
        let (says, dir) = (Arc::new(Mutex::new(says)), tempfile::tempdir().unwrap());
        let evidence = source(&says);
        Self::join_with(head, says, evidence, dir).await
    }

    async fn join_with(
        head: &TestHead,
        says: Arc<Mutex<Evidence>>,
        evidence: EvidenceSource,
        dir: TempDir,
    ) -> Self {
        let token = head.token().await;
        let identity = join_with(head, &token, &evidence, &dir).await.unwrap();
        identity.set_evidence(evidence);
        Self {
            says,
            identity,
            _dir: dir,
        }
    }

    /// Connects, and sends this evidence, or its own. The error is the head's.
    async fn connect(
        &self,
        head: &TestHead,
        other: Option<SignedEvidence>,
    ) -> Result<Linked, (ErrorCode, String)> {
        let (address, config) = (head.address("quic"), LinkConfig::default());
        let connector = Connector::toward(address, self.identity.clone(), config).unwrap();
        let link = connector.connect(address, Role::Head).await.unwrap();
        let mut control = link.open().await.unwrap();
        let own = report_evidence(&link, &self.identity).await.unwrap();
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            evidence: other.or(own),
            ..Hello::default()
        };
        let hello = Message::new(MsgType::HELLO, 0, 0, hello.encode_to_vec());
        control.send(hello).await.unwrap();
        let answer = control.recv().await.unwrap().unwrap();
        match answer.error_body() {
            Some(error) => Err((error.code, error.text.into_owned())),
            None => Ok(Linked {
                link,
                control,
                _connector: connector,
            }),
        }
    }

    /// Reports its evidence on a link that is up.
    async fn report(&self, linked: &mut Linked) -> SignedEvidence {
        let signed = report_evidence(&linked.link, &self.identity)
            .await
            .unwrap()
            .unwrap();
        linked.send(&signed).await;
        signed
    }

    fn change(&self, change: impl FnOnce(&mut Evidence)) {
        change(&mut self.says.lock().unwrap());
    }
}

impl Linked {
    async fn send(&mut self, signed: &SignedEvidence) {
        let message = Message::new(MsgType::EVIDENCE, 0, 0, signed.encode_to_vec());
        self.control.send(message).await.unwrap();
    }

    async fn refused(self) -> (ErrorCode, String) {
        let closed = tokio::time::timeout(Duration::from_secs(5), self.link.closed()).await;
        match closed.expect("closed in time") {
            quic::Closed::ByPeer { code, text } => (code, text),
            other => panic!("{other:?}"),
        }
    }
}

async fn start(change: impl FnOnce(&mut mesh_head::config::EvidenceConfig)) -> TestHead {
    TestHead::start(|config: &mut Config| change(&mut config.trust.evidence)).await
}

async fn admin(head: &TestHead, path: &str, body: Option<Value>) -> (u16, Value) {
    let request = match body {
        Some(body) => head.http.post(head.url(path)).body(body.to_string()),
        None => head.http.get(head.url(path)),
    };
    let answer = request.bearer_auth(head.admin_key()).send().await.unwrap();
    let status = answer.status().as_u16();
    (status, answer.json().await.unwrap_or_default())
}

async fn shown(head: &TestHead) -> Value {
    let (_, list) = admin(head, "/v1/mesh/nodes", None).await;
    let mut nodes = list["nodes"].as_array().unwrap().iter();
    nodes
        .find(|node| node["name"] == "attic")
        .cloned()
        .unwrap_or_default()
}

async fn counted(head: &TestHead, decision: &str) -> bool {
    let metrics = head.http.get(head.url("/metrics")).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    metrics.contains(&format!(
        "hydramesh_head_evidence_total{{decision=\"{decision}\"}} "
    ))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn evidence_is_kept_and_its_changes_are_shown_counted_and_in_the_trail() {
    let head = start(|_| {}).await;
    let node = Node::join(&head, debian("12")).await;
    let said = &shown(&head).await["evidence"];
    assert_eq!(
        (&said["os"], &said["threads"]),
        (&json!("debian"), &json!(4))
    );
    node.change(|says| says.kernel = "6.18.1".into());
    let mut linked = node.connect(&head, None).await.unwrap();
    node.change(|says| {
        says.models.push(mesh_proto::ServedFingerprint {
            name: "qwen".into(),
            fingerprint: "ab".repeat(32),
        });
    });
    node.report(&mut linked).await;
    eventually("both changes are there", || async {
        let changes = shown(&head).await["evidence"]["changes"].clone();
        changes.as_array().is_some_and(|changes| changes.len() == 2)
    })
    .await;
    let said = shown(&head).await["evidence"].clone();
    assert_eq!(said["changes"][0]["field"], "kernel");
    assert_eq!(said["changes"][0]["before"], "6.12.30");
    assert_eq!(said["models"][0]["name"], "qwen");
    quic::renew(&[head.address("quic")], &node.identity)
        .await
        .unwrap();
    eventually("it is counted", || async {
        counted(&head, "changed").await && counted(&head, "first").await
    })
    .await;
    let TestHead { handle, dir, .. } = head;
    handle.shutdown().await.unwrap();
    let trail = dir.path().join("audit").join("master");
    let archive = mesh_audit::archive::Archive::open(&trail).unwrap();
    let mut decisions = Vec::new();
    let read = archive.entries(0, |_, entry| {
        let (text, _) = mesh_audit::record::split(entry).unwrap();
        let record: Value = serde_json::from_slice(text).unwrap();
        if record["kind"] == "evidence" {
            decisions.push((record["decision"].clone(), record["texts"].to_string()));
        }
        true
    });
    read.unwrap();
    let words: Vec<&str> = decisions
        .iter()
        .map(|(word, _)| word.as_str().unwrap())
        .collect();
    assert_eq!(words, ["first", "changed", "changed"]);
    assert!(decisions[1].1.contains("6.18.1"), "{decisions:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_node_waits_until_an_operator_approves_what_was_shown() {
    let head = start(|evidence| evidence.on_change = OnChange::Approve).await;
    let node = Node::join(&head, debian("12")).await;
    let mut linked = node.connect(&head, None).await.unwrap();
    node.change(|says| says.os_version = "13".into());
    node.report(&mut linked).await;
    let (code, text) = linked.refused().await;
    assert_eq!(code, AWAITING_APPROVAL, "{text}");
    for _ in 0..2 {
        let (code, text) = node.connect(&head, None).await.err().unwrap();
        assert_eq!(code, AWAITING_APPROVAL);
        for part in ["os: from \"debian 12\" to \"debian 13\"", "nodes approve"] {
            assert!(text.contains(part), "{text}");
        }
    }
    let error = quic::renew(&[head.address("quic")], &node.identity).await;
    assert!(error.is_err_and(|error| error.is_transient()));
    let waiting = shown(&head).await;
    assert_eq!(waiting["state"], "pending");
    assert_eq!(waiting["evidence"]["waiting"][0]["after"], "debian 13");
    let (status, answer) = admin(
        &head,
        "/v1/mesh/nodes/approve",
        Some(json!({ "node": "attic" })),
    )
    .await;
    assert_eq!(status, 200, "{answer}");
    node.change(|says| says.os_version = "14".into());
    assert!(node.connect(&head, None).await.is_err(), "another change");
    node.change(|says| says.os_version = "13".into());
    let linked = node.connect(&head, None).await.expect("as approved");
    drop(linked);
    // Nothing at all is a change, too.
    let unsigned = node.identity.clone();
    let bare = Node {
        says: node.says.clone(),
        identity: NodeIdentity::load(node._dir.path()).unwrap(),
        _dir: tempfile::tempdir().unwrap(),
    };
    assert_eq!(bare.identity.node_id(), unsigned.node_id());
    let (code, text) = bare.connect(&head, None).await.err().unwrap();
    assert_eq!(code, AWAITING_APPROVAL, "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_required_is_told_to_the_node_and_costs_it_no_token() {
    let head = start(|evidence| {
        evidence.min_version = Some("0.1.0".to_owned());
        evidence.os = vec!["nixos".to_owned()];
        evidence.system = SystemRule::Listed;
        evidence.systems =
            vec!["/nix/store/1x5yixv9dljwz8bjzmyjxd0dnzi9pxqc-nixos-system-attic-26.05".to_owned()];
    })
    .await;
    let token = head.token().await;
    let dir = tempfile::tempdir().unwrap();
    let says = Arc::new(Mutex::new(debian("12")));
    let error = join(&head, &token, &says, &dir).await.unwrap_err();
    assert!(!error.is_transient(), "{error:?}");
    let text = error.to_string();
    for part in [
        "os: \"debian\"",
        "nixos",
        "system: ",
        "trust.evidence.systems",
    ] {
        assert!(text.contains(part), "{text}");
    }
    let bare = quic::join(&[head.address("quic")], &token, dir.path(), "attic").await;
    assert!(bare.unwrap_err().to_string().contains("sends none"));
    says.lock().unwrap().kernel = "x\u{1b}[2J".into();
    let hostile = join(&head, &token, &says, &dir).await.unwrap_err();
    assert!(hostile.to_string().contains("`kernel`"), "{hostile}");
    *says.lock().unwrap() = Evidence {
        os: "nixos".into(),
        system: Some(mesh_proto::NixSystem {
            path: "/nix/store/1x5yixv9dljwz8bjzmyjxd0dnzi9pxqc-nixos-system-attic-26.05".into(),
            ..Default::default()
        }),
        ..debian("26.05")
    };
    join(&head, &token, &says, &dir)
        .await
        .expect("the token is unused");
    eventually("it is counted", || counted(&head, "refused")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_can_refuse_or_expel_a_node() {
    for (rule, code) in [
        (OnChange::Refuse, EVIDENCE_REFUSED),
        (OnChange::Expel, EXPELLED),
    ] {
        let head = start(|evidence| evidence.on_change = rule).await;
        let node = Node::join(&head, debian("12")).await;
        let mut linked = node.connect(&head, None).await.unwrap();
        node.change(|says| says.memory_mib = 64_000);
        node.report(&mut linked).await;
        let (closed, text) = linked.refused().await;
        assert_eq!(closed, code, "{text}");
        node.change(|says| says.memory_mib = 8_000);
        match rule {
            OnChange::Refuse => {
                node.connect(&head, None).await.expect("as it was");
            }
            _ => assert_eq!(shown(&head).await["state"], "expelled"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn evidence_of_another_node_of_another_session_or_altered_is_refused() {
    let head = start(|_| {}).await;
    let node = Node::join(&head, debian("12")).await;
    let mut linked = node.connect(&head, None).await.unwrap();
    let genuine = node.report(&mut linked).await;
    let other = Node::join(&head, debian("12")).await;
    for (node, what) in [(&other, "another node's"), (&node, "another session's")] {
        let (code, text) = node
            .connect(&head, Some(genuine.clone()))
            .await
            .err()
            .unwrap();
        assert_eq!(code, ErrorCode::INVALID_PAYLOAD, "{what}");
        assert!(text.contains("evidence refused"), "{what}: {text}");
    }
    let unsigned = SignedEvidence {
        proof: None,
        ..genuine.clone()
    };
    let (_, text) = node.connect(&head, Some(unsigned)).await.err().unwrap();
    assert!(text.contains("not signed"), "{text}");
    let long = SignedEvidence {
        body: vec![0; 100_000],
        ..genuine.clone()
    };
    let (_, text) = node.connect(&head, Some(long)).await.err().unwrap();
    assert!(text.contains("100000 bytes"), "{text}");
    // On the link that it was signed for: as it is, and altered.
    linked.send(&genuine).await;
    let mut altered = genuine;
    altered.body[3] ^= 1;
    linked.send(&altered).await;
    let (code, text) = linked.refused().await;
    assert_eq!(code, ErrorCode::INVALID_PAYLOAD, "{text}");
    assert_eq!(shown(&head).await["evidence"]["version"], "0.1.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tpm_is_pinned_at_first_sight_and_its_quotes_count_for_their_session_alone() {
    let test = "a_tpm_is_pinned_at_first_sight_and_its_quotes_count_for_their_session_alone";
    let (Some(tpm), Some(other)) = (Swtpm::start(test), Swtpm::start(test)) else {
        return;
    };
    let head = start(|evidence| {
        evidence.tpm = true;
        evidence.on_change = OnChange::Approve;
    })
    .await;
    let (chip, dir) = (Chip::default(), tempfile::tempdir().unwrap());
    let says = Arc::new(Mutex::new(debian("12")));
    let without = join(&head, &head.token().await, &says, &dir).await;
    let text = without.unwrap_err().to_string();
    assert!(text.contains("tpm: no quote"), "{text}");
    chip.insert(&tpm);
    let node = Node::join_with(&head, says.clone(), chip.source(&says), dir).await;
    let known = shown(&head).await["evidence"]["tpm"].clone();
    assert_eq!(known["manufacturer"], "IBM");
    assert_eq!(known["pcrs"][4]["index"], 4);
    let linked = node.connect(&head, None).await.unwrap();
    quic::renew(&[head.address("quic")], &node.identity)
        .await
        .unwrap();
    drop(linked);

    // Another system was started: it is recorded.
    chip.remove();
    tpm.extend(4, [9; 32]);
    chip.insert(&tpm);
    let linked = node.connect(&head, None).await.unwrap();
    let changes = shown(&head).await["evidence"]["changes"].clone();
    assert_eq!(changes.as_array().unwrap().len(), 1, "{changes}");
    assert_eq!(changes[0]["field"], "pcrs");
    assert_eq!(changes[0]["before"], "4=000000000000");
    drop(linked);

    let old = chip.given.lock().unwrap()[0].clone();
    chip.replayed.lock().unwrap().push(old);
    let (code, text) = node.connect(&head, None).await.err().unwrap();
    assert_eq!(code, EVIDENCE_REFUSED);
    assert!(text.contains("another request or session"), "{text}");

    // Another TPM, and none.
    chip.remove();
    chip.insert(&other);
    let (code, text) = node.connect(&head, None).await.err().unwrap();
    assert_eq!(code, AWAITING_APPROVAL, "{text}");
    assert!(text.contains("tpm: from \"IBM ecdsa-p256 000b"), "{text}");
    chip.remove();
    let (code, text) = node.connect(&head, None).await.err().unwrap();
    assert_eq!(code, EVIDENCE_REFUSED, "{text}");
    chip.insert(&tpm);
    node.connect(&head, None).await.expect("the pinned one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_registers_have_other_values_than_those_allowed_is_refused() {
    let test = "a_node_whose_registers_have_other_values_than_those_allowed_is_refused";
    let Some(tpm) = Swtpm::start(test) else {
        return;
    };
    let head = start(|evidence| {
        let allowed = vec!["0".repeat(64)];
        evidence.pcrs = [("7".to_owned(), allowed)].into();
    })
    .await;
    let (chip, dir) = (Chip::default(), tempfile::tempdir().unwrap());
    let says = Arc::new(Mutex::new(debian("12")));
    chip.insert(&tpm);
    let node = Node::join_with(&head, says.clone(), chip.source(&says), dir).await;
    node.connect(&head, None).await.unwrap();
    chip.remove();
    tpm.extend(7, [9; 32]);
    chip.insert(&tpm);
    let (code, text) = node.connect(&head, None).await.err().unwrap();
    assert_eq!(code, EVIDENCE_REFUSED);
    for part in ["register 7 is ", "trust.evidence.pcrs"] {
        assert!(text.contains(part), "{text}");
    }
}
