//! A head in this process, and workers that speak the real protocol over real links and answer by a script.

#![allow(dead_code, unused_imports)] // Each test file uses its part of it.

mod dcf_peer;
mod images;
pub(crate) mod ring;
mod tokens;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use dcf::{ErrorCode, Message, MsgType};
use mesh_control::spotcheck;
use mesh_head::{Config, Head, HeadHandle};
use mesh_net::quic::{self, Connector, Link, LinkConfig, MsgStream};
use mesh_net::seal::Sealer;
use mesh_net::trust::{JoinToken, NodeIdentity, Role};
use mesh_proto::{
    Done, Embed, EmbedInput, EmbedText, Embeddings, FinishReason, Generate, Hello, ImageCard,
    ImageData, ImageStep, ImageTask, Load, ModelCard, ModelKind, ModelSpeed, PROTOCOL_VERSION,
    Progress, Prompt, REQUEST_REVISION, RequestPhase, TokenLogprob, Tokens, Welcome,
};
use prost::Message as _;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::UdpSocket;
use tokio::task::AbortHandle;

pub(crate) use self::dcf_peer::{DcfPeer, datagram};
pub(crate) use self::images::undisturbed;
use self::images::{first_state, next_state, png_of};
pub(crate) use self::tokens::{issue, issued, send, trail};

pub(crate) const MODEL: &str = "tiny";
pub(crate) const VECTORS: &str = "tiny-vectors";
pub(crate) const PICTURES: &str = "tiny-pictures";
pub(crate) const FINGERPRINT: &str =
    "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// A head on free loopback ports.
pub(crate) struct TestHead {
    pub(crate) handle: HeadHandle,
    pub(crate) dir: TempDir,
    pub(crate) http: reqwest::Client,
}

impl TestHead {
    pub(crate) async fn start(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config {
            state_dir: dir.path().to_owned(),
            ..Config::default()
        };
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        (
            config.http.listen,
            config.dcf.clients,
            config.dcf.workers,
            config.quic.listen,
        ) = (any, any, any, any);
        config.rejoin_grace = Duration::from_secs(3);
        config.drain_limit = Duration::from_secs(5);
        change(&mut config);
        let handle = Head::start(config).await.unwrap();
        Self {
            handle,
            dir,
            http: reqwest::Client::new(),
        }
    }

    /// The address of a listener as this machine reaches it.
    pub(crate) fn address(&self, name: &str) -> SocketAddr {
        let bound = self.handle.addresses()[name];
        match bound.ip().is_unspecified() {
            true => ([127, 0, 0, 1], bound.port()).into(),
            false => bound,
        }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address("http"))
    }

    pub(crate) fn admin_key(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("admin.key"))
            .unwrap()
            .trim()
            .to_owned()
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, Value) {
        let answer = self.http.get(self.url(path)).send().await.unwrap();
        (
            answer.status().as_u16(),
            answer.json().await.unwrap_or_default(),
        )
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        let answer = self
            .http
            .post(self.url(path))
            .body(body.to_string())
            .send()
            .await
            .unwrap();
        (
            answer.status().as_u16(),
            answer.json().await.unwrap_or_default(),
        )
    }

    /// The data of all server-sent events of an answer.
    pub(crate) async fn stream(&self, path: &str, body: Value) -> Vec<String> {
        let answer = self
            .http
            .post(self.url(path))
            .body(body.to_string())
            .send()
            .await
            .unwrap();
        assert_eq!(answer.status(), 200);
        assert!(
            answer.headers()["content-type"]
                .to_str()
                .unwrap()
                .starts_with("text/event-stream")
        );
        let text = answer.text().await.unwrap();
        text.split("\n\n")
            .filter_map(|event| event.strip_prefix("data: "))
            .map(str::to_owned)
            .collect()
    }

    pub(crate) async fn token(&self) -> JoinToken {
        let request = self
            .http
            .post(self.url("/v1/mesh/tokens"))
            .bearer_auth(self.admin_key());
        let answer: Value = request.send().await.unwrap().json().await.unwrap();
        answer["token"].as_str().unwrap().parse().unwrap()
    }

    /// A worker that has joined and of which a token came back.
    pub(crate) async fn worker(&self, name: &str, script: Script) -> Worker {
        let worker = Worker::join(self, name, script).await;
        self.until_ready(name).await;
        worker
    }

    pub(crate) async fn until_ready(&self, name: &str) {
        eventually("the worker is ready", || async {
            let request = self.http.get(self.url("/v1/mesh"));
            let request = request.bearer_auth(self.admin_key());
            let mesh: Value = request.send().await.unwrap().json().await.unwrap();
            mesh["workers"]
                .as_array()
                .unwrap()
                .iter()
                .any(|worker| worker["name"] == name && worker["state"] == "ready")
        })
        .await;
    }

    pub(crate) async fn dcf(&self) -> DcfPeer {
        DcfPeer::toward(self.address("dcf.clients")).await
    }
}

/// Behaviour of a worker on requests.
#[derive(Debug, Clone)]
pub(crate) struct Script {
    pub(crate) pace: Duration,
    pub(crate) slots: u32,
    /// Decode speed it claims.
    pub(crate) decode_tps: f32,
    pub(crate) fate: Fate,
    /// It works on as many requests as it has slots; the others wait there.
    pub(crate) queues: bool,
    /// It is of a version that does not say what a request waits for.
    pub(crate) old: bool,
    /// Time that a prompt takes.
    pub(crate) prefill: Duration,
    /// Of its requests' fields.
    pub(crate) revision: u32,
    /// It embeds as well, after as much time as a prompt takes, in which it says that the texts wait.
    pub(crate) embeds: bool,
    /// It makes images as well, each step of which takes `pace`.
    pub(crate) draws: bool,
    /// Other tokens than the model's.
    pub(crate) lies: bool,
}

/// End of a worker's answers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fate {
    Finish,
    /// Closes its link after so many tokens.
    DiesAfter(u32),
    /// Keeps its link and says nothing after so many tokens.
    SilentAfter(u32),
    /// Answers with this error after so many tokens.
    FailsAfter(u32, ErrorCode),
    /// Goes on after the last token that was asked for.
    Endless,
    /// Sends megabytes of text with its first token.
    Huge,
    /// Says that the request lives, thousands of times.
    Floods,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            pace: Duration::ZERO,
            slots: 4,
            decode_tps: 100.0,
            fate: Fate::Finish,
            queues: false,
            old: false,
            prefill: Duration::ZERO,
            revision: REQUEST_REVISION,
            embeds: false,
            draws: false,
            lies: false,
        }
    }
}

pub(crate) fn script(fate: Fate) -> Script {
    Script {
        pace: Duration::from_millis(5),
        fate,
        ..Script::default()
    }
}

/// A worker in this process.
pub(crate) struct Worker {
    link: Link,
    connector: Connector,
    identity: NodeIdentity,
    _dir: Arc<TempDir>,
    pub(crate) seen: Arc<Seen>,
    serving: AbortHandle,
}

/// Events at a worker, probes left out.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) requests: AtomicUsize,
    pub(crate) cancelled: AtomicUsize,
    pub(crate) generates: Mutex<Vec<Generate>>,
    pub(crate) images: Mutex<Vec<ImageTask>>,
    /// Pixels that came with images.
    pub(crate) pixels: Mutex<Vec<Vec<u8>>>,
    /// One is held by each request that is worked on.
    slots: OnceLock<tokio::sync::Semaphore>,
    /// Requests that wait for it.
    waiting: AtomicUsize,
    tokens: AtomicUsize,
}

impl Worker {
    pub(crate) async fn join(head: &TestHead, name: &str, script: Script) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let token = head.token().await;
        let identity = quic::join(&[head.address("quic")], &token, dir.path(), name)
            .await
            .unwrap();
        Self::connect(head.address("quic"), identity, Arc::new(dir), name, script).await
    }

    async fn connect(
        head: SocketAddr,
        identity: NodeIdentity,
        dir: Arc<TempDir>,
        name: &str,
        script: Script,
    ) -> Self {
        let connector = Connector::toward(head, identity.clone(), LinkConfig::default()).unwrap();
        let link = connector.connect(head, Role::Head).await.unwrap();
        let mut control = link.open().await.unwrap();
        let card = ModelCard {
            name: MODEL.into(),
            architecture: "llama".into(),
            fingerprint: FINGERPRINT.into(),
            context: 2048,
            slots: script.slots,
            decode_tps: script.decode_tps,
            prefill_tps: 1000.0,
            backend: "cuda".into(),
            split: Some(mesh_proto::DeviceSplit {
                device_layers: 20,
                cpu_layers: 8,
                ..Default::default()
            }),
            ..Default::default()
        };
        let mut models = vec![card];
        if script.embeds {
            models.push(ModelCard {
                name: VECTORS.into(),
                kind: ModelKind::Embed.into(),
                dimensions: 4,
                ..models[0].clone()
            });
        }
        let mut image_models = Vec::new();
        if script.draws {
            image_models.push(ModelCard {
                name: PICTURES.into(),
                kind: ModelKind::Image.into(),
                image: Some(ImageCard {
                    width: 128,
                    height: 64,
                    steps: 6,
                    guidance: 3.0,
                    sampler: "euler".into(),
                    most_pixels: 1 << 20,
                    ..ImageCard::default()
                }),
                ..models[0].clone()
            });
        }
        let hello = Hello {
            node_name: name.into(),
            version: "test".into(),
            models,
            image_models,
            protocol: PROTOCOL_VERSION,
            reserved_for: Vec::new(),
            request_revision: script.revision,
            ..Default::default()
        };
        control
            .send(Message::new(MsgType::HELLO, 0, 0, hello.encode_to_vec()))
            .await
            .unwrap();
        let welcome = control.recv().await.unwrap().unwrap();
        let welcome = Welcome::decode(welcome.payload).unwrap();
        let seen = Arc::new(Seen::default());
        let serving = tokio::spawn(serve(link.clone(), control, welcome, script, seen.clone()))
            .abort_handle();
        Self {
            link,
            connector,
            identity,
            _dir: dir,
            seen,
            serving,
        }
    }

    /// The same node again, on a new link.
    pub(crate) async fn come_back(&self, head: &TestHead, name: &str, script: Script) -> Self {
        self.serving.abort();
        Self::connect(
            head.address("quic"),
            self.identity.clone(),
            self._dir.clone(),
            name,
            script,
        )
        .await
    }

    pub(crate) async fn die(&self) {
        self.serving.abort();
        self.connector.shutdown(ErrorCode::INTERNAL, "died").await;
    }

    pub(crate) fn requests(&self) -> usize {
        self.seen.requests.load(Ordering::SeqCst)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.serving.abort();
        self.link.close(ErrorCode::OK, "test over");
    }
}

async fn serve(
    link: Link,
    mut control: MsgStream,
    welcome: Welcome,
    script: Script,
    seen: Arc<Seen>,
) {
    let key = link
        .export_key("hydramesh heartbeat", &welcome.session.to_be_bytes())
        .unwrap();
    let mut sealer = Sealer::new(&key, welcome.session);
    let target = SocketAddr::new(
        link.remote_addr().ip(),
        u16::try_from(welcome.heartbeat_port).unwrap(),
    );
    let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut beats = tokio::time::interval(Duration::from_secs_f32(welcome.heartbeat_seconds));
    loop {
        tokio::select! {
            accepted = link.accept() => match accepted {
                Ok(stream) => {
                    tokio::spawn(answer(link.clone(), stream, script.clone(), seen.clone()));
                }
                Err(_) => return,
            },
            order = control.recv() => match order {
                Ok(Some(order)) if order.kind == MsgType::DRAIN => {
                    let load = Load { draining: true, ..Default::default() };
                    let _ = control.send(Message::new(MsgType::LOAD, 0, 0, load.encode_to_vec())).await;
                }
                Ok(Some(_)) => {}
                _ => return,
            },
            _ = beats.tick() => {
                let speed = ModelSpeed {
                    name: MODEL.to_owned(),
                    decode_tps: 100.0 + seen.tokens.load(Ordering::SeqCst) as f32 / 100.0,
                    ..Default::default()
                };
                let load = Load {
                    resident_bytes: 1234,
                    queued: u32::try_from(seen.waiting.load(Ordering::SeqCst)).unwrap(),
                    speeds: if script.queues { vec![speed] } else { Vec::new() },
                    ..Default::default()
                };
                let sealed = sealer.seal(MsgType::SEALED_HEARTBEAT, 0, 0, &load.encode_to_vec()).unwrap();
                udp.send_to(&sealed.encode_datagram(), target).await.unwrap();
            }
        }
    }
}

pub(crate) async fn answer(link: Link, mut stream: MsgStream, script: Script, seen: Arc<Seen>) {
    let Ok(Some(message)) = stream.recv().await else {
        return;
    };
    if message.kind == MsgType::EMBED {
        return embed(stream, message, &script, &seen).await;
    }
    if message.kind == MsgType::IMAGE_TASK {
        return draw(&link, stream, message, &script, &seen).await;
    }
    let generate = Generate::decode(message.payload).unwrap();
    // The head's own questions look like a client's; only here are their words known.
    let is_probe = spotcheck::is_question(&question(&generate));
    if !is_probe {
        seen.requests.fetch_add(1, Ordering::SeqCst);
        seen.generates.lock().unwrap().push(generate.clone());
    }
    let fate = if is_probe { Fate::Finish } else { script.fate };
    let (mut send, mut recv) = stream.split();
    let cancelled = async {
        // The head never finishes before Done.
        let _ = recv.recv().await;
    };
    let speak = async {
        let total = generate
            .params
            .as_ref()
            .and_then(|params| params.max_tokens)
            .unwrap_or(8);
        let wants_logprobs = generate
            .params
            .as_ref()
            .is_some_and(|params| params.logprobs.is_some());
        let mut question = question(&generate);
        if script.lies {
            question += " (a lie)";
        }
        let total = match fate {
            Fate::Endless => u32::MAX,
            _ => total,
        };
        let done = generate.generated.len() as u32;
        let mut sent = generate.text_sent as usize;
        if total > 2000 && fate != Fate::Endless {
            let error = Message::error(
                0,
                0,
                ErrorCode::CONTEXT_TOO_LONG,
                "2001 tokens do not fit the context of 2000",
            );
            send.send(error).await.unwrap();
            return finish(send).await;
        }
        let signs = (!script.old && generate.progress_ms > 0)
            .then(|| Duration::from_millis(u64::from(generate.progress_ms)));
        let _turn = if script.queues {
            seen.waiting.fetch_add(1, Ordering::SeqCst);
            let waiting = Waiting(&seen.waiting);
            let permits = script.slots as usize;
            let slots = seen
                .slots
                .get_or_init(|| tokio::sync::Semaphore::new(permits));
            let turn = slots.acquire();
            let turn = meanwhile(&mut send, signs, RequestPhase::Queued, turn).await;
            drop(waiting);
            Some(turn)
        } else {
            None
        };
        if !is_probe {
            let prefill = tokio::time::sleep(script.prefill);
            meanwhile(&mut send, signs, RequestPhase::Prefilling, prefill).await;
        }
        // As fast as it claims to be, while it is watched.
        let pace = match is_probe {
            true => Duration::from_secs_f32(1.0 / script.decode_tps.max(1.0)),
            false => script.pace,
        };
        for index in done..total {
            tokio::time::sleep(pace).await;
            seen.tokens.fetch_add(1, Ordering::SeqCst);
            match fate {
                Fate::DiesAfter(limit) if index - done >= limit => {
                    link.close(ErrorCode::INTERNAL, "died");
                    return;
                }
                Fate::SilentAfter(limit) if index - done >= limit => {
                    return std::future::pending().await;
                }
                Fate::FailsAfter(limit, code) if index - done >= limit => {
                    send.send(Message::error(0, 0, code, "as scripted"))
                        .await
                        .unwrap();
                    return finish(send).await;
                }
                _ => {}
            }
            if fate == Fate::Floods {
                let body = Progress::default().encode_to_vec();
                for _ in 0..20_000 {
                    let sign = Message::new(MsgType::PROGRESS, 0, 0, body.clone());
                    if send.send(sign).await.is_err() {
                        return;
                    }
                }
            }
            let mut text = text_after(&question, index + 1).split_off(sent);
            sent += text.len();
            if fate == Fate::Huge {
                text = "x".repeat(200_000);
            }
            let token = token(&question, index);
            let logprob = TokenLogprob {
                token,
                bytes: text.clone().into(),
                logprob: -0.5,
                top: Vec::new(),
            };
            let logprobs = if wants_logprobs {
                vec![logprob]
            } else {
                Vec::new()
            };
            let tokens = Tokens {
                index,
                tokens: vec![token],
                text,
                logprobs,
            };
            if send
                .send(Message::new(MsgType::TOKENS, 0, 0, tokens.encode_to_vec()))
                .await
                .is_err()
            {
                return;
            }
        }
        let done = Done {
            finish: FinishReason::Length.into(),
            prompt_tokens: 10,
            completion_tokens: total,
            cached_tokens: 4,
            ..Default::default()
        };
        if send
            .send(Message::new(MsgType::DONE, 0, 0, done.encode_to_vec()))
            .await
            .is_ok()
        {
            finish(send).await;
        }
    };
    tokio::select! {
        () = speak => {}
        () = cancelled => {
            if !is_probe {
                seen.cancelled.fetch_add(1, Ordering::SeqCst);
            }
        }
    }
}

async fn embed(stream: MsgStream, message: Message, script: &Script, seen: &Seen) {
    let embed = Embed::decode(message.payload).unwrap();
    let (mut send, _recv) = stream.split();
    let is_question = |input: &EmbedInput| match &input.text {
        Some(EmbedText::Text(text)) => spotcheck::is_question(text),
        _ => false,
    };
    let is_probe = embed.inputs.iter().any(is_question);
    if !is_probe {
        seen.requests.fetch_add(1, Ordering::SeqCst);
        let signs = (!script.old && embed.progress_ms > 0)
            .then(|| Duration::from_millis(u64::from(embed.progress_ms)));
        let waits = tokio::time::sleep(script.prefill);
        meanwhile(&mut send, signs, RequestPhase::Queued, waits).await;
        if let Fate::FailsAfter(_, code) = script.fate {
            let failed = Message::error(0, 0, code, "it fails");
            if send.send(failed).await.is_ok() {
                finish(send).await;
            }
            return;
        }
    }
    let texts = embed.inputs.len();
    let one: Vec<u8> = [1.0f32, 0.0, 0.0, 0.0]
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    let embeddings = Embeddings {
        dimensions: 4,
        vectors: one.repeat(texts).into(),
        tokens: vec![3; texts],
        ..Default::default()
    };
    let message = Message::new(MsgType::EMBEDDINGS, 0, 0, embeddings.encode_to_vec());
    if send.send(message).await.is_ok() {
        finish(send).await;
    }
}

/// Makes an image of which each step depends on the state after the one before it.
async fn draw(link: &Link, stream: MsgStream, message: Message, script: &Script, seen: &Seen) {
    let task = ImageTask::decode(message.payload).unwrap();
    let is_probe = spotcheck::is_question(&task.prompt);
    let fate = if is_probe { Fate::Finish } else { script.fate };
    if !is_probe {
        seen.requests.fetch_add(1, Ordering::SeqCst);
        seen.images.lock().unwrap().push(task.clone());
    }
    let (mut send, mut recv) = stream.split();
    let mut pixels = Vec::new();
    while pixels.len() < task.upload_bytes() {
        let Ok(Some(message)) = recv.recv().await else {
            return;
        };
        let part = ImageData::decode(message.payload).unwrap();
        assert_eq!(part.offset as usize, pixels.len());
        assert!(part.data.len() <= mesh_proto::IMAGE_PART);
        pixels.extend_from_slice(&part.data);
    }
    if !is_probe {
        seen.pixels.lock().unwrap().push(pixels);
    }
    let cancelled = async {
        let _ = recv.recv().await;
    };
    let steps = async {
        let resumed = task.resume.as_ref();
        let done = resumed.map_or(0, |step| step.step);
        let mut state = resumed.map_or_else(|| first_state(&task), |step| step.state.to_vec());
        let last = match fate {
            Fate::Endless => task.steps + 1,
            _ => task.steps,
        };
        for step in done + 1..=last {
            match fate {
                Fate::DiesAfter(limit) if step - done > limit => {
                    link.close(ErrorCode::INTERNAL, "died");
                    return;
                }
                Fate::SilentAfter(limit) if step - done > limit => {
                    return std::future::pending().await;
                }
                Fate::FailsAfter(limit, code) if step - done > limit => {
                    let error = Message::error(0, 0, code, "as scripted");
                    send.send(error).await.unwrap();
                    return finish(send).await;
                }
                _ => {}
            }
            if !is_probe {
                tokio::time::sleep(script.pace).await;
            }
            state = next_state(&state, step);
            let sent = match fate {
                Fate::Huge => vec![1; 10 << 20],
                _ => state.clone(),
            };
            let body = ImageStep {
                step,
                steps: task.steps,
                state: sent.into(),
                preview: match mesh_proto::preview_is_due(step, task.steps, task.previews) {
                    true => {
                        vec![step as u8; mesh_proto::preview_bytes(task.width, task.height)].into()
                    }
                    false => Default::default(),
                },
            };
            let message = Message::new(MsgType::IMAGE_STEP, 0, 0, body.encode_to_vec());
            if send.send(message).await.is_err() {
                return;
            }
        }
        let file = png_of(&state, task.width, task.height);
        for part in ImageData::parts(file.into()) {
            let message = Message::new(MsgType::IMAGE_DATA, 0, 0, part.encode_to_vec());
            if send.send(message).await.is_err() {
                return;
            }
        }
        finish(send).await;
    };
    tokio::select! {
        () = steps => {}
        () = cancelled => {
            if !is_probe {
                seen.cancelled.fetch_add(1, Ordering::SeqCst);
            }
        }
    }
}

/// Counts a request that waits, until it is dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Waits for `what` and says meanwhile that the request lives.
async fn meanwhile<T>(
    send: &mut quic::SendHalf,
    every: Option<Duration>,
    phase: RequestPhase,
    what: impl Future<Output = T>,
) -> T {
    let mut what = std::pin::pin!(what);
    let every = every.unwrap_or(Duration::from_secs(3600));
    loop {
        if let Ok(outcome) = tokio::time::timeout(every, &mut what).await {
            return outcome;
        }
        let progress = Progress {
            phase: phase.into(),
            position: 1,
            prompt_tokens: 10,
            prompt_done: u32::from(phase == RequestPhase::Prefilling),
            ..Default::default()
        };
        let body = progress.encode_to_vec();
        let _ = send.send(Message::new(MsgType::PROGRESS, 0, 0, body)).await;
    }
}

async fn finish(mut send: quic::SendHalf) {
    let _ = send.finish();
    send.stopped().await;
}

fn question(generate: &Generate) -> String {
    match generate.prompt.as_ref().unwrap() {
        Prompt::Text(text) => text.clone(),
        Prompt::Chat(chat) => chat.messages.last().unwrap().content.clone(),
        Prompt::Tokens(list) => format!("{:?}", list.tokens),
    }
}

/// Every question has its own answer, so that a mix-up shows.
fn token(question: &str, index: u32) -> u32 {
    question.bytes().fold(index, |hash, byte| {
        hash.wrapping_mul(31).wrapping_add(u32::from(byte))
    }) % 32_000
}

fn text_after(question: &str, tokens: u32) -> String {
    (0..tokens)
        .map(|index| format!("{}é ", token(question, index)))
        .collect()
}

/// The answer of any worker to this question, with so many tokens.
pub(crate) fn truth(question: &str, tokens: u32) -> String {
    text_after(question, tokens)
}

pub(crate) fn chat(question: &str, tokens: u32) -> Value {
    json!({"model": MODEL, "messages": [{"role": "user", "content": question}], "max_tokens": tokens})
}

pub(crate) fn streamed(mut body: Value) -> Value {
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    body
}

/// The text of a streamed chat, after the checks that every stream must pass.
pub(crate) fn streamed_text(events: &[String]) -> String {
    assert_eq!(events.last().unwrap(), "[DONE]");
    let chunks: Vec<Value> = events[..events.len() - 1]
        .iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let reasons: Vec<&Value> = chunks
        .iter()
        .map(|chunk| &chunk["choices"][0]["finish_reason"])
        .filter(|reason| reason.is_string())
        .collect();
    assert_eq!(reasons.len(), 1);
    chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect()
}

pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, mut check: impl FnMut() -> F) {
    let started = std::time::Instant::now();
    while !check().await {
        assert!(started.elapsed() < Duration::from_secs(15), "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
