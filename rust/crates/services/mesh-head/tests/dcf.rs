//! DCF over UDP with raw sockets: v5.0.0 clients and workers, repeats, large answers, junk.

mod support;

use std::time::Duration;

use serde_json::json;
use support::{DcfPeer, Fate, Script, TestHead, datagram, eventually, script, truth};
use tokio::net::UdpSocket;

const TASK: u8 = 0x02;
const RESULT: u8 = 0x03;
const ACK: u8 = 0x04;
const CHUNK: u8 = 0x06;
const HEALTH: u8 = 0x08;
const PARTIAL: u8 = 0x23;
const ERROR: u8 = 0xFF;

/// A worker of DCF v5.0.0 or v5.1: heartbeats with its port, Tasks in, Results out from the same socket.
struct OldWorker {
    socket: UdpSocket,
    bus: std::net::SocketAddr,
    /// The bytes before its headers.
    prefix: &'static [u8],
}

impl OldWorker {
    async fn start(head: &TestHead) -> Self {
        Self::of("v5.0.0", head).await
    }

    async fn of(version: &str, head: &TestHead) -> Self {
        let worker = Self::unknown(version, head).await;
        worker.heartbeat(1).await;
        eventually("it is listed", || Self::is_listed(version, head)).await;
        worker
    }

    /// One that has not announced itself yet.
    async fn unknown(version: &str, head: &TestHead) -> Self {
        Self {
            socket: UdpSocket::bind("127.0.0.1:0").await.unwrap(),
            bus: head.address("dcf.workers"),
            prefix: if version == "v5.1" { &[0x51] } else { &[] },
        }
    }

    async fn is_listed(version: &str, head: &TestHead) -> bool {
        let (_, mesh) = head.get("/v1/mesh").await;
        let workers = mesh["workers"].as_array().unwrap();
        workers.iter().any(|worker| worker["kind"] == version)
    }

    async fn heartbeat(&self, count: u32) {
        let port = self.socket.local_addr().unwrap().port().to_string();
        // Those of v5.1 count up.
        let sequence = count * self.prefix.len() as u32;
        self.send(0x01, sequence, port.as_bytes()).await;
    }

    async fn send(&self, kind: u8, sequence: u32, payload: &[u8]) {
        let bytes = [self.prefix, &datagram(kind, sequence, payload)].concat();
        self.socket.send_to(&bytes, self.bus).await.unwrap();
    }

    /// Sequence and payload of the next Task.
    async fn task(&self) -> (u32, Vec<u8>) {
        let mut buffer = vec![0; 65_536];
        let received =
            tokio::time::timeout(Duration::from_secs(10), self.socket.recv_from(&mut buffer)).await;
        let (len, _) = received.expect("a Task within 10 s").unwrap();
        assert_eq!(&buffer[..self.prefix.len()], self.prefix);
        let message = &buffer[self.prefix.len()..len];
        assert_eq!(message[0], TASK);
        (
            u32::from_be_bytes(message[1..5].try_into().unwrap()),
            message[17..].to_vec(),
        )
    }
}

fn admit_old_workers(config: &mut mesh_head::config::Config) {
    config.dcf.legacy_workers = true;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plain_prompt_gets_exactly_one_result() {
    let head = TestHead::start(|_| {}).await;
    let _worker = head.worker("w", Script::default()).await;
    let client = head.dcf().await;
    client.send(TASK, 77, "Wie geht's?".as_bytes()).await;
    assert_eq!(
        client.receive().await,
        (RESULT, 77, truth("Wie geht's?", 8).into_bytes())
    );
    client.nothing_comes().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_json_task_may_be_streamed_and_the_result_has_all_of_it() {
    let head = TestHead::start(|_| {}).await;
    let _worker = head.worker("w", script(Fate::Finish)).await;
    let client = head.dcf().await;
    let task = json!({"prompt": "hi", "max_tokens": 5, "stream": true, "steps": 50, "ack": true});
    client.send(TASK, 1, task.to_string().as_bytes()).await;
    assert_eq!(client.receive().await, (ACK, 1, Vec::new()));
    let mut text = String::new();
    loop {
        let (kind, sequence, payload) = client.receive().await;
        assert_eq!(sequence, 1);
        if kind == RESULT {
            assert_eq!(payload, truth("hi", 5).into_bytes());
            break;
        }
        assert_eq!(kind, PARTIAL);
        assert_eq!(
            u32::from_be_bytes(payload[..4].try_into().unwrap()) as usize,
            text.len()
        );
        text += std::str::from_utf8(&payload[4..]).unwrap();
    }
    assert_eq!(text, truth("hi", 5));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_gets_the_error_that_fits() {
    let head = TestHead::start(|_| {}).await;
    let client = head.dcf().await;
    client.send(TASK, 1, b"hi").await;
    assert_eq!(code(client.receive().await), (1, 5), "no worker");
    let _worker = head.worker("w", Script::default()).await;
    let cases: [(&[u8], u8, &str); 6] = [
        (b"\xff\xfe", 1, "not UTF-8"),
        (b"{\"prompt\":", 1, "begins as JSON"),
        (b"{\"steps\":3}", 1, "neither 'prompt' nor 'messages'"),
        (b"{\"prompt\":\"x\",\"temperature\":9}", 1, "temperature"),
        (b"{\"prompt\":\"x\",\"model\":\"gpt-9\"}", 0x41, "gpt-9"),
        (b"{\"prompt\":\"x\",\"max_tokens\":9999}", 0x42, "context"),
    ];
    for (sequence, (payload, wanted, words)) in (10..).zip(cases) {
        client.send(TASK, sequence, payload).await;
        let answer = client.receive().await;
        let text = String::from_utf8(answer.2[1..].to_vec()).unwrap();
        assert_eq!(code(answer), (sequence, wanted), "{text}");
        assert!(text.contains(words), "{text}");
    }
    client.send(0x7E, 50, b"?").await;
    assert_eq!(code(client.receive().await), (50, 1), "unknown type");
    // Truncated datagrams, and those that are themselves answers, get no answer.
    client.send_raw(&datagram(TASK, 51, b"hello")[..20]).await;
    client.send_raw(b"short").await;
    client.send(ERROR, 52, b"\x01oops").await;
    client.send(RESULT, 53, b"oops").await;
    client.nothing_comes().await;
    client.send(HEALTH, 54, b"").await;
    assert_eq!(client.receive().await, (HEALTH, 54, b"ready".to_vec()));
}

fn code((kind, sequence, payload): (u8, u32, Vec<u8>)) -> (u32, u8) {
    assert_eq!(kind, ERROR);
    (sequence, payload[0])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_clients_with_one_sequence_get_their_own_answers() {
    let head = TestHead::start(|_| {}).await;
    let _worker = head.worker("w", script(Fate::Finish)).await;
    let (one, two) = (head.dcf().await, head.dcf().await);
    one.send(TASK, 7, b"first").await;
    two.send(TASK, 7, b"second").await;
    assert_eq!(
        one.receive().await,
        (RESULT, 7, truth("first", 8).into_bytes())
    );
    assert_eq!(
        two.receive().await,
        (RESULT, 7, truth("second", 8).into_bytes())
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_task_does_not_run_twice() {
    let head = TestHead::start(|_| {}).await;
    let worker = head.worker("w", script(Fate::Finish)).await;
    let client = head.dcf().await;
    for _ in 0..5 {
        client.send(TASK, 9, b"again").await;
    }
    let answer = client.receive().await;
    assert_eq!(answer, (RESULT, 9, truth("again", 8).into_bytes()));
    client.nothing_comes().await;
    client.send(TASK, 9, b"again").await;
    assert_eq!(client.receive().await, answer, "the kept answer");
    assert_eq!(worker.requests(), 1);
    client.send(TASK, 9, b"something else").await;
    assert_eq!(
        client.receive().await,
        (RESULT, 9, truth("something else", 8).into_bytes())
    );
    assert_eq!(worker.requests(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_worker_answers_old_clients() {
    let head = TestHead::start(admit_old_workers).await;
    let worker = OldWorker::start(&head).await;
    eventually("ready", || async { head.get("/ready").await.0 == 200 }).await;
    let (one, two) = (head.dcf().await, head.dcf().await);
    one.send(TASK, 7, b"first").await;
    two.send(TASK, 7, b"second").await;
    let tasks = [worker.task().await, worker.task().await];
    assert_ne!(tasks[0].0, tasks[1].0, "the head has its own sequences");
    let thief = DcfPeer::toward(head.address("dcf.workers")).await;
    thief.send(RESULT, tasks[0].0, b"forged").await;
    for (sequence, payload) in tasks.iter().rev() {
        worker
            .send(RESULT, *sequence, &[b"re: ", payload.as_slice()].concat())
            .await;
    }
    assert_eq!(one.receive().await, (RESULT, 7, b"re: first".to_vec()));
    assert_eq!(two.receive().await, (RESULT, 7, b"re: second".to_vec()));
    // It serves plain tasks and nothing else.
    let (status, error) = head
        .post("/v1/chat/completions", support::chat("why?", 3))
        .await;
    assert_eq!(
        (status, &error["error"]["code"]),
        (503, &json!("no_worker"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_of_an_old_worker_that_falls_silent_runs_elsewhere() {
    let head = TestHead::start(|config| {
        admit_old_workers(config);
        config.worker_timeout = Duration::from_secs(2);
    })
    .await;
    let old = OldWorker::start(&head).await;
    let client = head.dcf().await;
    client.send(TASK, 3, b"hello").await;
    old.task().await;
    let _worker = support::Worker::join(&head, "w", Script::default()).await;
    assert_eq!(
        client.receive().await,
        (RESULT, 3, truth("hello", 8).into_bytes())
    );
    client.nothing_comes().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_answer_of_an_old_worker_puts_no_blame_on_a_mesh_worker() {
    let head = TestHead::start(admit_old_workers).await;
    let fails = Fate::FailsAfter(0, dcf::ErrorCode::INFERENCE_FAILED);
    let bad = head.worker("bad", script(fails)).await;
    let old = OldWorker::start(&head).await;
    let client = head.dcf().await;
    client.send(TASK, 3, b"hello").await;
    let (own, _) = old.task().await;
    assert_eq!(bad.requests(), 1);
    old.send(RESULT, own, b"done").await;
    assert_eq!(client.receive().await, (RESULT, 3, b"done".to_vec()));
    let metrics = || async {
        let answer = head.http.get(head.url("/metrics")).send().await.unwrap();
        answer.text().await.unwrap()
    };
    let counted = "hydramesh_head_requests_total{front=\"Dcf\",outcome=\"Complete\"} 1";
    eventually("the task is counted", || async {
        metrics().await.contains(counted)
    })
    .await;
    let text = metrics().await;
    assert!(
        !text.contains("hydramesh_head_worker_faults_total{"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_that_wait_at_an_old_worker_outlast_the_limit_on_silence_while_it_answers_others() {
    let head = TestHead::start(|config| {
        config.request_timeout = Duration::from_millis(1_500);
        config.dcf.legacy_workers = true;
    })
    .await;
    let worker = OldWorker::start(&head).await;
    eventually("ready", || async { head.get("/ready").await.0 == 200 }).await;
    let client = head.dcf().await;
    for sequence in 0..6 {
        client.send(TASK, sequence, b"one of many").await;
    }
    for _ in 0..6 {
        let (own, _) = worker.task().await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        worker.send(RESULT, own, b"done").await;
        let (kind, _, payload) = client.receive().await;
        assert_eq!((kind, payload), (RESULT, b"done".to_vec()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_asks_after_a_task_hears_that_it_runs_and_what_it_waits_for() {
    const ACK: u8 = 4;
    const HEALTH: u8 = 8;
    let head = TestHead::start(|_| {}).await;
    let slow = Script {
        prefill: Duration::from_secs(3),
        ..Script::default()
    };
    let _worker = head.worker("w", slow).await;
    let client = head.dcf().await;
    client.send(TASK, 5, b"hello").await;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    client.send(HEALTH, 5, b"task").await;
    let (kind, sequence, text) = client.receive().await;
    assert_eq!((kind, sequence), (ACK, 5));
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("1 of 10 tokens"), "{text}");
    // This task does not run.
    client.send(HEALTH, 6, b"task").await;
    assert_eq!(client.receive().await.0, RESULT);
    client.send(HEALTH, 5, b"task").await;
    client.nothing_comes().await;
}

/// Gives the next Task's answer in Chunks, a few at a time.
async fn answer_in_chunks(worker: &OldWorker, answer: impl AsRef<[u8]>) {
    let (own, _) = worker.task().await;
    let answer = bytes::Bytes::copy_from_slice(answer.as_ref());
    let pieces = dcf::chunk::split(own, 0, answer).unwrap();
    for (index, piece) in pieces.enumerate() {
        let piece = [worker.prefix, &piece.encode_datagram()].concat();
        worker.socket.send_to(&piece, worker.bus).await.unwrap();
        if index % 16 == 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_result_of_a_thousand_chunks_reaches_a_client_with_an_ordinary_socket() {
    let head = TestHead::start(admit_old_workers).await;
    let worker = OldWorker::start(&head).await;
    let client = head.dcf().await;
    client.send(TASK, 8, b"tell me everything").await;
    let large: String = (0..200_000).map(|n| format!("{n} ")).collect();
    answer_in_chunks(&worker, &large).await;
    let mut pieces = dcf::chunk::Reassembler::new(dcf::chunk::Limits {
        timeout: Duration::from_secs(60),
        ..Default::default()
    });
    let whole = loop {
        // On a busy machine a Chunk may be lost all the same; a repeat brings it, and runs nothing.
        let next = client.receive_within(Duration::from_secs(1)).await;
        let Some((kind, sequence, payload)) = next else {
            client.send(TASK, 8, b"tell me everything").await;
            continue;
        };
        assert_eq!((kind, sequence), (CHUNK, 8));
        let chunk = dcf::chunk::Chunk::parse(&payload.into()).unwrap();
        if let Some(whole) = pieces.push((), &chunk, std::time::Instant::now()).unwrap() {
            break whole;
        }
    };
    assert_eq!(whole, large.as_bytes());
    // Nothing is left to be sent.
    assert_eq!(
        head.handle.shutdown().await.unwrap(),
        mesh_service::shutdown::Drained::Finished
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_repeated_while_its_chunks_come_gets_them_once_and_afterwards_again() {
    let head = TestHead::start(admit_old_workers).await;
    let worker = OldWorker::start(&head).await;
    let client = head.dcf().await;
    client.send(TASK, 8, b"tell me everything").await;
    let large = "x".repeat(1_000 * dcf::chunk::MAX_DATA);
    answer_in_chunks(&worker, &large).await;
    client.receive().await;
    client.send(TASK, 8, b"tell me everything").await;
    assert!(chunks_until_quiet(&client).await < 1_000);
    client.send(TASK, 8, b"tell me everything").await;
    let again = chunks_until_quiet(&client).await;
    assert!((900..=1_000).contains(&again), "{again}");
    // Another task under the same name ends what is left of the answer to this one.
    client.send(TASK, 8, b"tell me everything").await;
    client.receive().await;
    client.send(TASK, 8, b"enough").await;
    let (own, payload) = worker.task().await;
    assert_eq!(payload, b"enough");
    worker.send(RESULT, own, b"silence").await;
    let mut before = 0;
    while client.receive().await != (RESULT, 8, b"silence".to_vec()) {
        before += 1;
    }
    assert!(before < 900, "{before}");
    client.nothing_comes().await;
}

/// Counts the Chunks that come until none comes for a while.
async fn chunks_until_quiet(client: &DcfPeer) -> usize {
    let mut count = 0;
    while let Some((kind, ..)) = client.receive_within(Duration::from_millis(500)).await {
        assert_eq!(kind, CHUNK);
        count += 1;
    }
    count
}

/// Chunks of one answer that come in v5.1, put together.
async fn receive_new_chunks(client: &DcfPeer, sequence: u32) -> Vec<u8> {
    let mut pieces = dcf::chunk::Reassembler::new(dcf::chunk::Limits::default());
    loop {
        let (kind, of, payload) = client.receive_new().await;
        assert_eq!((kind, of), (CHUNK, sequence));
        assert!(payload.len() <= 1_420);
        let chunk = dcf::chunk::Chunk::parse(&payload.into()).unwrap();
        if let Some(whole) = pieces.push((), &chunk, std::time::Instant::now()).unwrap() {
            return whole.to_vec();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_either_version_are_answered_in_their_own() {
    let head = TestHead::start(|_| {}).await;
    let _worker = head.worker("w", Script::default()).await;
    let client = head.dcf().await;
    client.send_new(HEALTH, 1, b"").await;
    assert_eq!(client.receive_new().await, (HEALTH, 1, b"ready".to_vec()));
    // The same address and sequence in another version is another task.
    client.send_new(TASK, 77, b"new").await;
    let expected = (RESULT, 77, truth("new", 8).into_bytes());
    assert_eq!(client.receive_new().await, expected);
    client.send(TASK, 77, b"new").await;
    assert_eq!(client.receive().await, expected);
    client.send_new(TASK, 77, b"new").await;
    assert_eq!(client.receive_new().await, expected, "the kept answer");
    client.send_new(TASK, 78, b"\xff").await;
    assert_eq!(code(client.receive_new().await), (78, 1));
    // A Task in Chunks.
    let long = "x".repeat(3_000);
    for piece in dcf::chunk::split(79, 0, long.clone().into()).unwrap() {
        client.send_raw(&piece.encode_as(dcf::Version::V5_1)).await;
    }
    assert_eq!(
        client.receive_new().await,
        (RESULT, 79, truth(&long, 8).into_bytes())
    );
    // Unknown versions and truncated datagrams get no answer.
    let mut unknown = [&[0x52], &datagram(TASK, 80, b"hello")[..]].concat();
    client.send_raw(&unknown).await;
    unknown[0] = 0x51;
    client.send_raw(&unknown[..20]).await;
    client.nothing_comes().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_goes_from_a_v5_1_worker_to_clients_of_either_version() {
    let head = TestHead::start(admit_old_workers).await;
    let worker = OldWorker::of("v5.1", &head).await;
    worker.heartbeat(2).await;
    let bus = DcfPeer::toward(head.address("dcf.workers")).await;
    bus.send_new(HEALTH, 3, b"").await;
    assert_eq!(bus.receive_new().await, (HEALTH, 3, Vec::new()));
    let image: Vec<u8> = b"\x89PNG\r\n\x1a\n"
        .iter()
        .copied()
        .chain((0..30_000_u32).map(|n| n as u8))
        .collect();
    let task = br#"{"prompt": "a red fox", "steps": 25, "guidance": 7.5}"#;
    let (old, new) = (head.dcf().await, head.dcf().await);
    new.send_new(TASK, 5, task).await;
    answer_in_chunks(&worker, &image).await;
    assert_eq!(receive_new_chunks(&new, 5).await, image);
    // The repeat of a task that is answered brings the Chunks again, and does not run it again.
    new.send_new(TASK, 5, task).await;
    assert_eq!(receive_new_chunks(&new, 5).await, image);
    old.send(TASK, 5, task).await;
    let (own, payload) = worker.task().await;
    assert_eq!(payload, task, "the payload goes on as it is");
    let datagram = datagram(RESULT, own, b"in another version");
    worker.socket.send_to(&datagram, worker.bus).await.unwrap();
    worker.send(RESULT, own, &image).await;
    assert_eq!(
        old.receive().await,
        (RESULT, 5, image),
        "exactly one datagram"
    );
    old.nothing_comes().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_workers_are_refused_unless_the_operator_admits_them() {
    let everybody = |config: &mut mesh_head::config::Config| {
        config.trusted_networks = vec!["0.0.0.0/0".parse().unwrap()];
    };
    let head = TestHead::start(everybody).await;
    let client = head.dcf().await;
    for version in ["v5.0.0", "v5.1"] {
        let worker = OldWorker::unknown(version, &head).await;
        for count in 1..4 {
            worker.heartbeat(count).await;
        }
        client.send(TASK, 1, b"hello").await;
        assert_eq!(code(client.receive().await), (1, 5), "no worker");
        assert!(!OldWorker::is_listed(version, &head).await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_worker_gets_no_task_that_a_mesh_worker_can_take() {
    let head = TestHead::start(admit_old_workers).await;
    let old = OldWorker::of("v5.1", &head).await;
    let mesh = head.worker("w", Script::default()).await;
    let client = head.dcf().await;
    for sequence in 1..6 {
        client.send_new(TASK, sequence, b"hello").await;
        let expected = (RESULT, sequence, truth("hello", 8).into_bytes());
        assert_eq!(client.receive_new().await, expected);
    }
    assert_eq!(mesh.requests(), 5);
    let mut buffer = [0; 64];
    assert!(
        old.socket.try_recv(&mut buffer).is_err(),
        "it heard of none"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn junk_changes_nothing() {
    let head = TestHead::start(|_| {}).await;
    let _worker = head.worker("w", Script::default()).await;
    let targets = ["dcf.clients", "dcf.workers", "quic"].map(|name| head.address(name));
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut random = fastrand::Rng::with_seed(7);
    let mut next = move || random.u64(..);
    let mut junk = |rounds: usize| {
        for _ in 0..rounds {
            for target in targets {
                let number = next();
                let mut bytes: Vec<u8> = (0..number % 64).map(|_| next() as u8).collect();
                if number & 0x40 != 0 {
                    // Nearly right: a known type and a lying length.
                    bytes = datagram((number >> 8) as u8 % 0x34, number as u32, &bytes);
                    bytes[16] = (number >> 16) as u8;
                    if number & 0x80 != 0 {
                        bytes.insert(0, 0x51);
                    }
                }
                let _ = socket.send_to(&bytes, target);
            }
        }
    };
    junk(20_000);
    let before = mesh_service::metrics::resident_bytes().unwrap();
    junk(60_000);
    let grown = mesh_service::metrics::resident_bytes()
        .unwrap()
        .saturating_sub(before);
    assert!(grown < 32 << 20, "{grown} bytes more");
    let client = head.dcf().await;
    client.send(TASK, 1, b"still there?").await;
    assert_eq!(
        client.receive().await,
        (RESULT, 1, truth("still there?", 8).into_bytes())
    );
    eventually("nothing hangs", || async {
        head.handle.mesh().in_flight() == (0, 0)
    })
    .await;
}
