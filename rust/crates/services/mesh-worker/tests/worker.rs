//! A worker with the real model, against a head that is only its listener, and against raw v5.0.0 datagrams.

#[allow(dead_code, reason = "other tests use more of it")]
mod common;

use std::path::Path;
use std::time::Duration;

use dcf::{ErrorCode, Message, MsgType};
use mesh_net::quic::{Link, MsgStream, timestamp_us};
use mesh_net::seal::Opener;
use mesh_proto::{
    Chat, ChatMessage, Done, Embed, EmbedInput, EmbedText, Embeddings, Generate, GenerateParams,
    Load, Progress, Prompt, RequestPhase, Tokens,
};
use mesh_service::ask;
use mesh_testkit::paths;
use mesh_worker::{Config, Worker, WorkerError, WorkerHandle};
use prost::Message as _;
use tokio::net::UdpSocket;
use tokio::time::timeout;

use common::{Head, PATIENCE};

fn config(state_dir: &Path) -> Config {
    Config {
        state_dir: state_dir.to_owned(),
        models: vec![paths::smollm2().unwrap().display().to_string()],
        ort_library: Some(paths::ort_library().unwrap()),
        threads: 1,
        slots: 2,
        context: 512,
        http: mesh_worker::config::HttpConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            ..Default::default()
        },
        dcf: mesh_worker::config::DcfConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
        },
        ..Config::default()
    }
}

fn joining(state_dir: &Path, head: &Head) -> Config {
    Config {
        head: Some(head.address().to_string()),
        join_token: Some(head.token()),
        ..config(state_dir)
    }
}

fn question(max_tokens: u32) -> Generate {
    let content = "What is gravity?".to_owned();
    Generate {
        request_id: "test".to_owned(),
        prompt: Some(Prompt::Chat(Chat {
            messages: vec![ChatMessage {
                role: "user".to_owned(),
                content,
            }],
            ..Chat::default()
        })),
        params: Some(GenerateParams {
            max_tokens: Some(max_tokens),
            temperature: Some(0.0),
            ..GenerateParams::default()
        }),
        ..Generate::default()
    }
}

async fn ask(link: &Link, generate: &Generate) -> MsgStream {
    let mut stream = link.open().await.unwrap();
    let message = Message::new(
        MsgType::GENERATE,
        5,
        timestamp_us(),
        generate.encode_to_vec(),
    );
    stream.send(message).await.unwrap();
    stream
}

/// Tokens and text of an answer with its end, checked for gaps.
async fn read(
    stream: &mut MsgStream,
    first: u32,
) -> Result<(Vec<u32>, String, Done), (ErrorCode, String)> {
    let (mut tokens, mut text) = (Vec::new(), String::new());
    loop {
        let message = timeout(PATIENCE, stream.recv())
            .await
            .unwrap()
            .unwrap()
            .expect("an end");
        assert_eq!(message.sequence, 5);
        match message.kind {
            MsgType::TOKENS => {
                let new = Tokens::decode(message.payload).unwrap();
                assert_eq!(new.index as usize, first as usize + tokens.len());
                tokens.extend(new.tokens);
                text += &new.text;
            }
            MsgType::DONE => {
                let done = Done::decode(message.payload).unwrap();
                text += &done.text;
                return Ok((tokens, text, done));
            }
            _ => {
                let body = message.error_body().expect("an error");
                return Err((body.code, body.text.into_owned()));
            }
        }
    }
}

async fn worker(config: Config) -> WorkerHandle {
    timeout(PATIENCE, Worker::start(config))
        .await
        .unwrap()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_joins_answers_resumes_cancels_comes_back_and_drains() {
    let head = Head::start().await;
    let state = tempfile::tempdir().unwrap();
    let worker = worker(joining(state.path(), &head)).await;
    let (link, mut control, hello) = head.accept().await;

    // It says what it serves, measured.
    let card = &hello.models[0];
    assert_eq!(card.name, "SmolLM2-135M-Instruct.Q4_1");
    assert_eq!(
        (card.context, card.slots, card.fingerprint.len()),
        (512, 2, 64)
    );
    assert!(card.decode_tps > 0.0 && card.prefill_tps > 0.0);

    // It reports load on the link and sealed over UDP.
    let report = timeout(PATIENCE, control.recv())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(report.kind, MsgType::LOAD);
    let mut buffer = [0; 2048];
    let (len, _) = timeout(PATIENCE, head.heartbeats.recv_from(&mut buffer))
        .await
        .unwrap()
        .unwrap();
    let heartbeat = dcf::Message::decode_datagram(buffer[..len].to_vec().into()).unwrap();
    let key = link
        .export_key("hydramesh heartbeat", &77u64.to_be_bytes())
        .unwrap();
    let load = Load::decode(Opener::new(&key, 77).open(&heartbeat).unwrap()).unwrap();
    assert!(load.resident_bytes > 0 && load.kv_tokens_total > 0);

    // It answers, and says the same again.
    let whole = read(&mut ask(&link, &question(24)).await, 0).await.unwrap();
    assert!(whole.1.to_lowercase().contains("gravity"), "{:?}", whole.1);
    let again = read(&mut ask(&link, &question(24)).await, 0).await.unwrap();
    assert_eq!((&again.0, &again.1), (&whole.0, &whole.1));
    assert!(again.2.cached_tokens > 0);

    // It goes on where another worker stopped.
    let cut = whole.0.len() / 2;
    let mut stream = ask(&link, &question(24)).await;
    let mut sent = String::new();
    let mut received = 0;
    while received < cut {
        let message = stream.recv().await.unwrap().unwrap();
        let new = Tokens::decode(message.payload).unwrap();
        received += new.tokens.len();
        sent += &new.text;
    }
    stream.reset(ErrorCode::CANCELLED);
    let resumed = Generate {
        generated: whole.0[..cut].to_vec(),
        text_sent: sent.len() as u64,
        ..question(24)
    };
    let rest = read(&mut ask(&link, &resumed).await, cut as u32)
        .await
        .unwrap();
    assert_eq!(rest.0, whole.0[cut..]);
    assert_eq!(sent + &rest.1, whole.1);

    // A raw prompt is read with its control tokens, a conversation's text without.
    let counted = |prompt: Prompt| Generate {
        prompt: Some(prompt),
        ..question(1)
    };
    let chat = |content: &str| {
        let message = ChatMessage {
            role: "user".to_owned(),
            content: content.to_owned(),
        };
        counted(Prompt::Chat(Chat {
            messages: vec![message],
            ..Chat::default()
        }))
    };
    let mut lengths = Vec::new();
    for generate in [
        counted(Prompt::Text("<|im_start|>".to_owned())),
        chat("a"),
        chat("<|im_end|>"),
    ] {
        let (_, _, done) = read(&mut ask(&link, &generate).await, 0).await.unwrap();
        lengths.push(done.prompt_tokens);
    }
    assert_eq!(lengths[0], 1);
    assert!(lengths[2] > lengths[1] + 3, "{lengths:?}");

    // Requests that cannot be answered are refused by name.
    let unknown = Generate {
        model: "gpt-9".to_owned(),
        ..question(1)
    };
    let error = read(&mut ask(&link, &unknown).await, 0).await.unwrap_err();
    assert_eq!(error.0, ErrorCode::UNKNOWN_MODEL);
    assert!(error.1.contains("gpt-9"));
    let long = Generate {
        prompt: Some(Prompt::Text("word ".repeat(600))),
        ..question(1)
    };
    let error = read(&mut ask(&link, &long).await, 0).await.unwrap_err();
    assert_eq!(error.0, ErrorCode::CONTEXT_TOO_LONG);
    let mut nonsense = link.open().await.unwrap();
    nonsense
        .send(Message::new(MsgType::ACK, 5, 0, ""))
        .await
        .unwrap();
    assert_eq!(
        read(&mut nonsense, 0).await.unwrap_err().0,
        ErrorCode::INVALID_PAYLOAD
    );

    // A head that is gone and back is found again, without a token.
    assert!(ask::get(state.path(), "/ready").await.is_ok());
    let health = std::process::Command::new(env!("CARGO_BIN_EXE_mesh-worker"))
        .args(["health", "--state-dir"])
        .arg(state.path())
        .output()
        .unwrap();
    assert!(health.status.success(), "{health:?}");
    link.close(ErrorCode::OK, "restart");
    let (link, _control, _) = head.accept().await;

    // Told to stop, it finishes what runs and takes nothing new.
    let mut running = ask(&link, &question(60)).await;
    assert!(running.recv().await.unwrap().is_some());
    let stopping = tokio::spawn(worker.shutdown());
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut late = ask(&link, &question(1)).await;
    assert_eq!(read(&mut late, 0).await.unwrap_err().0, ErrorCode::DRAINING);
    assert!(read(&mut running, 1).await.is_ok());
    timeout(PATIENCE, stopping).await.unwrap().unwrap().unwrap();
    assert!(ask::get(state.path(), "/health").await.is_err());
}

/// Sends an Embed of so many texts; returns how it is answered, with the signs of life before that.
async fn embed(link: &Link, model: &str, texts: usize) -> (Vec<Progress>, Embeddings) {
    let text = "The quick brown fox jumps over the lazy dog and goes on. ".repeat(12);
    let input = EmbedInput {
        text: Some(EmbedText::Text(text)),
    };
    let embed = Embed {
        request_id: format!("{texts} texts"),
        model: model.to_owned(),
        inputs: vec![input; texts],
        progress_ms: 100,
        ..Embed::default()
    };
    let mut stream = link.open().await.unwrap();
    let message = Message::new(MsgType::EMBED, 5, timestamp_us(), embed.encode_to_vec());
    stream.send(message).await.unwrap();
    let mut signs = Vec::new();
    loop {
        let message = timeout(PATIENCE, stream.recv()).await.unwrap();
        let message = message.unwrap().expect("an answer");
        match message.kind {
            MsgType::PROGRESS => signs.push(Progress::decode(message.payload).unwrap()),
            MsgType::EMBEDDINGS => return (signs, Embeddings::decode(message.payload).unwrap()),
            kind => panic!("{kind}: {:?}", message.error_body()),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn texts_that_wait_for_others_show_life_until_they_are_embedded() {
    let head = Head::start().await;
    let state = tempfile::tempdir().unwrap();
    let mut config = joining(state.path(), &head);
    config.models = vec![paths::minilm().unwrap().display().to_string()];
    let starting = worker(config);
    let (worker, (link, _control, hello)) = tokio::join!(starting, head.accept());
    let name = &hello.models[0].name;
    let begun = std::time::Instant::now();
    let (long, second) = tokio::join!(embed(&link, name, 40), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        embed(&link, name, 40).await
    });
    let took = begun.elapsed();
    for (signs, embeddings) in [&long, &second] {
        assert_eq!(embeddings.tokens.len(), 40);
        // One per 100 ms; a machine with other work may send fewer.
        let least = usize::try_from(took.as_millis() / 1000).unwrap().max(1);
        assert!(signs.len() >= least, "{} in {took:?}", signs.len());
        let queued = i32::from(RequestPhase::Queued);
        assert!(signs.iter().any(|sign| sign.phase == queued), "{signs:?}");
    }
    worker.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_v5_head_gets_heartbeats_and_one_result_per_task() {
    let bus = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let state = tempfile::tempdir().unwrap();
    let mut config = config(state.path());
    config.legacy.head = Some(bus.local_addr().unwrap().to_string());
    let worker = worker(config).await;
    let dcf_address = worker.addresses()["dcf"];

    let mut buffer = [0; 2048];
    let (len, source) = timeout(PATIENCE, bus.recv_from(&mut buffer))
        .await
        .unwrap()
        .unwrap();
    let heartbeat = dcf::Message::decode_datagram(buffer[..len].to_vec().into()).unwrap();
    assert_eq!(
        (heartbeat.kind, heartbeat.sequence),
        (MsgType::HEARTBEAT, 0)
    );
    assert_eq!(heartbeat.payload, dcf_address.port().to_string());
    assert_eq!(source, dcf_address);

    let task = |sequence, payload: &'static str| {
        Message::new(MsgType::TASK, sequence, timestamp_us(), payload)
    };
    let greedy =
        r#"{"prompt": "What is gravity?", "max_tokens": 20, "temperature": 0, "steps": 3}"#;
    for (sequence, payload) in [(9, greedy), (10, "{\"steps\": 3}")] {
        let datagram = task(sequence, payload).encode_datagram();
        bus.send_to(&datagram, dcf_address).await.unwrap();
        bus.send_to(&datagram[..10], dcf_address).await.unwrap();
        let answer = loop {
            let (len, _) = timeout(PATIENCE, bus.recv_from(&mut buffer))
                .await
                .unwrap()
                .unwrap();
            let message = dcf::Message::decode_datagram(buffer[..len].to_vec().into()).unwrap();
            if message.kind != MsgType::HEARTBEAT {
                break message;
            }
        };
        assert_eq!(answer.sequence, sequence);
        if sequence == 9 {
            assert_eq!(answer.kind, MsgType::RESULT);
            let text = String::from_utf8_lossy(&answer.payload).to_lowercase();
            assert!(text.contains("gravity"), "{text}");
        } else {
            let error = answer.error_body().unwrap();
            assert_eq!(error.code, ErrorCode::INVALID_PAYLOAD);
        }
    }

    // A client on this machine may speak to the worker itself. (From the head's own address it would be the
    // head.)
    let client = UdpSocket::bind("127.0.0.2:0").await.unwrap();
    let hello = task(3, r#"{"prompt": "Hello", "max_tokens": 4}"#);
    client
        .send_to(&hello.encode_datagram(), dcf_address)
        .await
        .unwrap();
    let (len, _) = timeout(PATIENCE, client.recv_from(&mut buffer))
        .await
        .unwrap()
        .unwrap();
    let answer = dcf::Message::decode_datagram(buffer[..len].to_vec().into()).unwrap();
    assert_eq!((answer.kind, answer.sequence), (MsgType::RESULT, 3));
    worker.shutdown().await.unwrap();
}

async fn start_error(config: Config) -> String {
    match timeout(PATIENCE, Worker::start(config)).await.unwrap() {
        Ok(_) => panic!("it started"),
        Err(error) => error.to_string(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_keeps_a_worker_from_starting_is_one_sentence_with_a_remedy() {
    let head = Head::start().await;
    let dir = tempfile::tempdir().unwrap();
    let base = || joining(dir.path(), &head);

    let missing = Config {
        models: vec!["/nowhere/m.gguf".to_owned()],
        ..base()
    };
    assert!(start_error(missing).await.contains("/nowhere/m.gguf"));

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap();
    let http = mesh_worker::config::HttpConfig {
        listen,
        ..Default::default()
    };
    let error = start_error(Config { http, ..base() }).await;
    assert!(
        error.contains(&listen.to_string()) && error.contains("http.listen"),
        "{error}"
    );

    let fresh = tempfile::tempdir().unwrap();
    let no_token = Config {
        join_token: None,
        state_dir: fresh.path().to_owned(),
        ..base()
    };
    assert!(matches!(
        Worker::start(no_token).await,
        Err(WorkerError::NoToken)
    ));
    let unread = || !fresh.path().join("fingerprints.json").exists();
    assert!(unread(), "no model was read before");
    let state_dir = fresh.path().to_owned();
    let garbled = Config {
        join_token: Some("hydra1.x".to_owned()),
        state_dir,
        ..base()
    };
    assert!(start_error(garbled).await.contains("join_token"));
    assert!(unread(), "no model was read before");

    let elsewhere = Head::start().await;
    let state_dir = fresh.path().to_owned();
    let foreign = Config {
        join_token: Some(elsewhere.token()),
        state_dir,
        ..base()
    };
    assert!(start_error(foreign).await.contains("another mesh"));
    let used = Config {
        state_dir: fresh.path().to_owned(),
        ..base()
    };
    let token: mesh_net::trust::JoinToken = used.join_token.clone().unwrap().parse().unwrap();
    let spent = tempfile::tempdir().unwrap();
    mesh_net::quic::load_or_join(&[head.address()], Some(&token), spent.path(), "thief")
        .await
        .unwrap();
    assert!(start_error(used).await.contains("cannot join"));
    assert!(
        unread(),
        "a refused token is found out before a model is read"
    );
}

/// A small model of random weights.
fn random(path: &Path) {
    use mesh_model::synth::{Shape, Tokens, random_model};
    let shape = Shape::tiny(mesh_model::Architecture::Llama);
    random_model(&shape, mesh_model::GgmlType::Q4_0, Tokens::Bytes, path).unwrap();
}

/// Waits until `/ready` says this, whether or not the worker is ready.
async fn ready_says(state: &Path, words: &[&str]) {
    let mut last = String::new();
    let said = async {
        loop {
            last = match ask::get(state, "/ready").await {
                Ok(body) => body,
                Err(error) => error.to_string(),
            };
            if words.iter().all(|word| last.contains(word)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let said = timeout(PATIENCE, said).await;
    assert!(said.is_ok(), "{words:?} in {last}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_file_is_a_failure_of_its_own_model_until_it_is_replaced() {
    let head = Head::start().await;
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(format!("{name}.gguf"));
    random(&file("good"));
    let whole = std::fs::read(file("good")).unwrap();
    std::fs::write(file("cut"), &whole[..whole.len() - 1000]).unwrap();
    std::fs::create_dir(file("folder")).unwrap();
    let made = std::process::Command::new("mkfifo")
        .arg(file("pipe"))
        .status();
    assert!(made.unwrap().success());
    let names = ["cut", "good", "folder", "pipe", "missing"];
    let state = tempfile::tempdir().unwrap();
    let config = Config {
        models: names.map(|name| file(name).display().to_string()).to_vec(),
        context: 0,
        ..joining(state.path(), &head)
    };
    let worker = worker(config).await;
    let (link, mut control, hello) = head.accept().await;
    let served: Vec<&str> = hello.models.iter().map(|card| &*card.name).collect();
    assert_eq!(served, ["good"]);
    ready_says(
        state.path(),
        &[
            "\"ready\"",
            "cut.gguf",
            "folder.gguf",
            "pipe.gguf",
            "missing.gguf",
        ],
    )
    .await;
    let metrics = ask::get(state.path(), "/metrics").await.unwrap();
    assert!(
        metrics.contains("model_failed") && metrics.contains("cut.gguf"),
        "{metrics}"
    );
    let question = |model: &str| Generate {
        model: model.to_owned(),
        prompt: Some(Prompt::Text("Hi".to_owned())),
        ..question(4)
    };
    read(&mut ask(&link, &question("good")).await, 0)
        .await
        .unwrap();
    let refused = read(&mut ask(&link, &question("cut")).await, 0).await;
    assert_eq!(refused.unwrap_err().0, ErrorCode::UNKNOWN_MODEL);

    // Whole again, it is served, and the head hears so.
    std::fs::write(dir.path().join("part"), &whole).unwrap();
    std::fs::rename(dir.path().join("part"), file("cut")).unwrap();
    loop {
        let message = timeout(PATIENCE, control.recv())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        if message.kind == MsgType::SERVED {
            let served = mesh_proto::Served::decode(message.payload).unwrap();
            assert_eq!(served.models.len(), 2);
            break;
        }
    }
    read(&mut ask(&link, &question("cut")).await, 0)
        .await
        .unwrap();
    // The loaded model lies in memory.
    std::fs::File::options()
        .write(true)
        .open(file("cut"))
        .unwrap()
        .set_len(100)
        .unwrap();
    read(&mut ask(&link, &question("cut")).await, 0)
        .await
        .unwrap();
    worker.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_bad_files_only_a_worker_stays_up_and_says_what_is_wrong() {
    let head = Head::start().await;
    let dir = tempfile::tempdir().unwrap();
    let damaged = dir.path().join("damaged.gguf");
    std::fs::write(&damaged, b"GGUF\x03\0\0\0").unwrap();
    let config = Config {
        models: vec![damaged.display().to_string()],
        ..joining(dir.path(), &head)
    };
    let worker = worker(config).await;
    let (_link, _control, hello) = head.accept().await;
    assert!(hello.models.is_empty());
    ready_says(dir.path(), &["unready", "damaged.gguf", "fetch it again"]).await;
    random(&damaged);
    ready_says(dir.path(), &["\"ready\""]).await;
    worker.shutdown().await.unwrap();
}

/// As a process: which library a process uses is decided once.
#[test]
fn a_missing_library_ends_the_program_with_one_sentence() {
    let state = tempfile::tempdir().unwrap();
    let model = paths::smollm2().unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_mesh-worker"))
        .env_remove("ORT_DYLIB_PATH")
        .args([
            "--http",
            "127.0.0.1:0",
            "--dcf",
            "127.0.0.1:0",
            "--log-level",
            "error",
        ])
        .args(["--set", "legacy.head=127.0.0.1:9", "--set", "threads=1"])
        .arg("--state-dir")
        .arg(state.path())
        .arg("--model")
        .arg(&model)
        .output()
        .unwrap();
    let words = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{words}");
    assert!(words.contains("ORT_DYLIB_PATH"), "{words}");
    assert_eq!(words.lines().count(), 1, "{words}");
}
