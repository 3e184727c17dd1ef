//! Workers on their QUIC links: Hello and Welcome, load reports, what they offer to rings and how their parts in them are, and
//! the proof that a token comes back.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use dcf::{ErrorCode, Message, MsgType};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use mesh_net::quic::{Link, Listener, MsgStream, StreamFailure, probe};
use mesh_net::seal::Opener;
use mesh_net::trust::{DUPLICATE_IDENTITY, Role};
use mesh_proto::{
    Chat, ChatMessage, Done, Embed, EmbedInput, EmbedText, Generate, GenerateParams, Hello, Load,
    ModelKind, Models, Offer, PROTOCOL_VERSION, Progress, Prompt, RequestPhase, RingState, Served,
    Tokens, Welcome,
};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use crate::core::registry::{Proof, WorkerId};
use crate::core::request::{Answer, Bounds, Delta, Failure, Step};
use crate::core::spotcheck::{self, Position, Sample};
use crate::drive::{error_of, gets_on, progress_ms};
use crate::embed;
use crate::ids;
use crate::mesh::{Mesh, Standing, timestamp_us};

/// Serves every worker that connects, until the listener is shut down.
pub async fn serve(mesh: Arc<Mesh>, listener: Arc<Listener>, heartbeat_port: u16) {
    while let Some(link) = listener.accept().await {
        let mesh = mesh.clone();
        tokio::spawn(async move {
            let (name, address) = (link.node_name().to_owned(), link.remote_addr());
            match serve_link(&mesh, &link, heartbeat_port).await {
                Ok(reason) => info!(worker = name, %address, reason, "worker left"),
                Err(error) => {
                    warn!(worker = name, %address, %error, "worker not taken in");
                    link.close(error.code(), &error.to_string());
                }
            }
        });
    }
}

/// Why a link does not become a worker.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("a {0} connects here; only workers do")]
    Role(&'static str),
    #[error("no Hello within {} s", HELLO_TIMEOUT.as_secs())]
    Silent,
    #[error("the first message is {0}, not a Hello that can be read")]
    NoHello(MsgType),
    #[error(
        "the worker speaks version {0} of the protocol, this head {PROTOCOL_VERSION}; update the older one"
    )]
    Version(u32),
    #[error(transparent)]
    Stream(#[from] StreamFailure),
    #[error("the session has no key: {0}")]
    Key(String),
    #[error("{0}")]
    Duplicate(String),
    #[error("the worker's earlier process still finishes its answers")]
    StillDraining,
}

impl LinkError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Role(_) => ErrorCode::UNAUTHORIZED,
            Self::Silent => ErrorCode::TIMEOUT,
            Self::NoHello(_) => ErrorCode::INVALID_PAYLOAD,
            Self::Version(_) => ErrorCode::VERSION_MISMATCH,
            Self::Stream(_) | Self::Key(_) => ErrorCode::INTERNAL,
            Self::Duplicate(_) => DUPLICATE_IDENTITY,
            Self::StillDraining => ErrorCode::DRAINING,
        }
    }
}

/// Serves one worker for as long as its control stream lasts, and says why that ended.
async fn serve_link(
    mesh: &Arc<Mesh>,
    link: &Link,
    heartbeat_port: u16,
) -> Result<String, LinkError> {
    if link.role() != Role::Worker {
        return Err(LinkError::Role(link.role().as_str()));
    }
    let (mut control, hello, said_at) = timeout(HELLO_TIMEOUT, receive_hello(link))
        .await
        .map_err(|_| LinkError::Silent)??;
    if hello.protocol != PROTOCOL_VERSION {
        return Err(LinkError::Version(hello.protocol));
    }
    if let Err(refusal) = admit_one(mesh, link, &hello).await {
        let text = refusal.to_string();
        let message = Message::error(0, timestamp_us(), refusal.code(), &text);
        // The words that a worker of any version shows, before the link goes.
        if control.send(message).await.is_ok() && control.finish().is_ok() {
            let _ = timeout(REFUSAL_TIMEOUT, link.closed()).await;
        }
        return Err(refusal);
    }
    let session = ids::unique();
    let key = link
        .export_key(HEARTBEAT_LABEL, &session.to_be_bytes())
        .map_err(|error| LinkError::Key(error.to_string()))?;
    let welcome = Welcome {
        mesh: mesh.config.mesh_name.clone(),
        heartbeat_seconds: heartbeat(mesh.config.worker_timeout).as_secs_f32(),
        heartbeat_port: u32::from(heartbeat_port),
        session,
        version: env!("CARGO_PKG_VERSION").into(),
    };
    control
        .send(Message::new(
            MsgType::WELCOME,
            0,
            timestamp_us(),
            welcome.encode_to_vec(),
        ))
        .await?;

    let models: Vec<&str> = hello
        .models
        .iter()
        .map(|model| model.name.as_str())
        .collect();
    info!(worker = link.node_name(), node = link.node_id(), address = %link.remote_addr(), ?models, "worker joined");
    let (sender, orders) = mpsc::channel(ORDERS);
    let id = mesh.join(link, hello, sender);
    mesh.clock_heard(id, said_at);
    mesh.sessions.open(session, id, Opener::new(&key, session));
    let prober = tokio::spawn(prove(mesh.clone(), id, link.clone()));
    let probed = tokio::spawn(answer_probes(link.clone()));
    let reason = match follow_control(mesh, id, control, orders).await {
        Ok(()) => "the control stream ended".to_owned(),
        Err(error) => error.to_string(),
    };
    prober.abort();
    probed.abort();
    mesh.sessions.close(session);
    mesh.leave(id);
    // Without its control stream a worker can say nothing any more.
    link.close(ErrorCode::OK, "the control stream ended");
    Ok(reason)
}

/// Refuses a worker whose identity another machine uses that is connected and answers. A worker that comes back, after a
/// crash or from another address, finds its earlier link dead or its own.
async fn admit_one(mesh: &Mesh, link: &Link, hello: &Hello) -> Result<(), LinkError> {
    let Some(rival) = mesh.rival(link.node_id(), hello.instance) else {
        return Ok(());
    };
    if !rival.link.answers(RIVAL_TIMEOUT).await {
        return Ok(());
    }
    if rival.draining {
        return Err(LinkError::StillDraining);
    }
    let text = mesh.refused_duplicate(&rival, link.remote_addr(), &hello.host);
    Err(LinkError::Duplicate(text))
}

async fn receive_hello(link: &Link) -> Result<(MsgStream, Hello, u64), LinkError> {
    let mut control = link.accept().await?;
    control.limit(CONTROL_MESSAGE);
    let message = control.recv().await?.ok_or(LinkError::Silent)?;
    if message.kind != MsgType::HELLO || fields_of(&message.payload) > MOST_FIELDS {
        return Err(LinkError::NoHello(message.kind));
    }
    let hello = Hello::decode(message.payload).map_err(|_| LinkError::NoHello(MsgType::HELLO))?;
    Ok((control, hello, message.timestamp_us))
}

async fn follow_control(
    mesh: &Mesh,
    id: WorkerId,
    control: MsgStream,
    mut orders: mpsc::Receiver<Message>,
) -> Result<(), StreamFailure> {
    let (mut send, mut recv) = control.split();
    recv.limit(CONTROL_MESSAGE);
    // What a worker may say in a while; more waits, and in the end the worker itself.
    let mut credit = CONTROL_BURST;
    let mut refill = tokio::time::interval(CONTROL_WINDOW);
    refill.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let first = tokio::time::Instant::now() + CLOCK_INTERVAL;
    let mut clock = tokio::time::interval_at(first, CLOCK_INTERVAL);
    clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = refill.tick() => credit = CONTROL_BURST,
            received = recv.recv(), if credit > 0 => {
                let Some(message) = received? else { return Ok(()) };
                credit -= 1;
                if fields_of(&message.payload) > MOST_FIELDS {
                    debug!(kind = %message.kind, "dropped: it has more parts than such a message can have");
                    continue;
                }
                match message.kind {
                    MsgType::LOAD => match Load::decode(message.payload) {
                        Ok(load) => mesh.report(id, load),
                        Err(error) => debug!(%error, "load report cannot be read"),
                    },
                    MsgType::OFFER => match Offer::decode(message.payload) {
                        Ok(offer) => mesh.offered(id, offer),
                        Err(error) => debug!(%error, "offer cannot be read"),
                    },
                    MsgType::RING_STATE => match RingState::decode(message.payload) {
                        Ok(state) => mesh.ring_state(id, state),
                        Err(error) => debug!(%error, "state of a ring cannot be read"),
                    },
                    MsgType::MODELS => match Models::decode(message.payload) {
                        Ok(models) => mesh.models_said(id, models),
                        Err(error) => debug!(%error, "models of a worker cannot be read"),
                    },
                    MsgType::SERVED => match Served::decode(message.payload) {
                        Ok(served) => mesh.served(id, served),
                        Err(error) => debug!(%error, "what a worker serves cannot be read"),
                    },
                    // A newer worker may say more than this head understands.
                    other => debug!(kind = %other, "unexpected on a control stream"),
                }
            }
            // Its timestamp tells the worker this head's time, by which its certificate is renewed.
            _ = clock.tick() => {
                let message = Message::new(MsgType::HEALTH, 0, timestamp_us(), Bytes::new());
                if let Ok(sent) = timeout(ORDER_TIMEOUT, send.send(message)).await {
                    sent?;
                }
            }
            order = orders.recv() => match order {
                // While it waits here it is not heard either: who lets its orders lie is gone.
                Some(message) => match timeout(ORDER_TIMEOUT, send.send(message)).await {
                    Ok(sent) => sent?,
                    Err(_) => {
                        warn!("worker dropped: it does not take its orders");
                        return Ok(());
                    }
                },
                // The entry was replaced or pruned.
                None => return Ok(()),
            },
        }
    }
}

/// Fields at the top of a protobuf message, counted without reading them: an empty part is two bytes there and hundreds in memory.
fn fields_of(mut body: &[u8]) -> usize {
    let mut fields = 0;
    while let Some((key, rest)) = varint(body) {
        fields += 1;
        body = match key & 7 {
            0 => varint(rest).map(|(_, rest)| rest),
            1 => rest.get(8..),
            2 => varint(rest).and_then(|(length, rest)| rest.get(usize::try_from(length).ok()?..)),
            5 => rest.get(4..),
            _ => None,
        }
        .unwrap_or_default();
    }
    fields
}

fn varint(body: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0;
    for (index, byte) in body.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7F) << (7 * index).min(63);
        if byte & 0x80 == 0 {
            return Some((value, &body[index + 1..]));
        }
    }
    None
}

/// Lets the worker measure its bandwidth to here; nothing else comes on streams of its own. One after the other, so that what a
/// worker sends in vain is bounded.
async fn answer_probes(link: Link) {
    while let Ok(mut stream) = link.accept().await {
        stream.limit(PROBE_MESSAGE);
        let first = match timeout(HELLO_TIMEOUT, stream.recv()).await {
            Ok(Ok(Some(first))) if first.kind == MsgType::PROBE => first,
            _ => {
                stream.reset(ErrorCode::INVALID_PAYLOAD);
                continue;
            }
        };
        if let Err(error) = probe::answer(&first, stream).await {
            debug!(worker = link.node_name(), %error, "probe not answered");
        }
    }
}

/// Keeps the proof fresh that this worker answers, and that its answers are those of the others: asks it a question when it joins,
/// after a failure, when it has been idle for long, and now and then.
async fn prove(mesh: Arc<Mesh>, id: WorkerId, link: Link) {
    // Side by side: one may wait in its model's queue for long.
    let mut running = FuturesUnordered::new();
    let mut under_way = BTreeSet::new();
    while link.close_reason().is_none() {
        for proof in mesh.proofs_due(id, &under_way) {
            under_way.insert(proof.model.clone());
            let (mesh, link) = (&mesh, &link);
            running.push(async move {
                if !prove_model(mesh, id, link, &proof).await {
                    // Whatever the registry makes of that, nobody is asked without end: a link that is closed refuses at once.
                    tokio::time::sleep(PROOF_PAUSE).await;
                }
                proof.model
            });
        }
        tokio::select! {
            Some(model) = running.next(), if !running.is_empty() => {
                under_way.remove(&model);
                mesh.keep_house();
            }
            () = tokio::time::sleep(PROOF_PAUSE) => {}
        }
    }
}

/// Asks the question of a proof. True if it was answered.
async fn prove_model(mesh: &Mesh, id: WorkerId, link: &Link, proof: &Proof) -> bool {
    let mut probe = Probe {
        mesh,
        id,
        proof,
        asked: Instant::now(),
        alive: Instant::now(),
        got_on: Instant::now(),
        told: None,
    };
    let asked = probe.asked;
    let model = proof.model.as_str();
    let proven = match proof.kind {
        ModelKind::Chat => probe.tokens(link).await,
        ModelKind::Embed => probe.one_vector(link).await,
    };
    let sample = match proven {
        Ok(sample) => Some(sample),
        Err(Unproven::Failed(reason) | Unproven::Refused(reason)) => {
            info!(
                worker = link.node_name(),
                model, reason, "no token came back"
            );
            None
        }
        Err(Unproven::Silent) => {
            warn!(
                worker = link.node_name(),
                model, "no token came back in time"
            );
            if let Some(ring) = proof.ring
                && matches!(mesh.standing(id, ring), Standing::Serves(since) if since <= asked)
            {
                mesh.suspect(id, ring, "a token that was asked of it did not come");
            }
            None
        }
        Err(Unproven::Needless) => return false,
        Err(Unproven::Declined(reason)) => {
            if mesh.declined(id, model) {
                debug!(
                    worker = link.node_name(),
                    model, reason, "asked again later"
                );
                return false;
            }
            info!(
                worker = link.node_name(),
                model, reason, "it declines all questions, and no token comes from it"
            );
            None
        }
    };
    let answered = sample.is_some();
    mesh.proved(id, proof, sample, asked);
    answered
}

/// A request that only is to show that a token comes back, and which.
struct Probe<'a> {
    mesh: &'a Mesh,
    id: WorkerId,
    proof: &'a Proof,
    asked: Instant,
    /// Time of the worker's last sign of life.
    alive: Instant,
    /// When the probe was sent, or its last token came.
    got_on: Instant,
    /// When the worker last said what the probe waits for.
    told: Option<Instant>,
}

/// Reasons why a probe brought no proof.
enum Unproven {
    Failed(String),
    /// The worker says that the question is at fault.
    Refused(String),
    /// Neither a token nor a sign of life.
    Silent,
    /// A real answer's token came meanwhile, or the worker is busy with real requests, whose tokens will come.
    Needless,
    /// The worker has no room for it, or drains.
    Declined(String),
}

impl From<Failure> for Unproven {
    fn from(failure: Failure) -> Self {
        Self::Failed(match failure {
            Failure::Error {
                code: code @ (ErrorCode::WORKER_BUSY | ErrorCode::DRAINING),
                text,
            } => return Self::Declined(format!("{code}: {text}")),
            Failure::Error {
                code: code @ ErrorCode::INVALID_PAYLOAD,
                text,
            } => return Self::Refused(format!("{code}: {text}")),
            Failure::Lost(text) | Failure::Died(text) | Failure::Nonsense(text) => text,
            Failure::Error { code, text } => format!("{code}: {text}"),
        })
    }
}

impl From<StreamFailure> for Unproven {
    fn from(failure: StreamFailure) -> Self {
        Self::Failed(failure.to_string())
    }
}

impl Probe<'_> {
    /// A few tokens, with what the worker thinks of others in their place. The question looks like a client's: a worker that knew it for
    /// the head's could answer it alone honestly.
    async fn tokens(&mut self, link: &Link) -> Result<Sample, Unproven> {
        let text = self.proof.question.text.clone();
        let message = ChatMessage {
            role: "user".into(),
            content: text.clone(),
        };
        let chat = Chat {
            messages: vec![message],
            ..Chat::default()
        };
        match self.tokens_after(link, Prompt::Chat(chat)).await {
            // A model whose chat template cannot be used goes on with texts.
            Err(Unproven::Refused(_)) => self.tokens_after(link, Prompt::Text(text)).await,
            answered => answered,
        }
    }

    async fn tokens_after(&mut self, link: &Link, prompt: Prompt) -> Result<Sample, Unproven> {
        let params = GenerateParams {
            max_tokens: Some(spotcheck::TOKENS),
            // A model may have nothing to say to this.
            ignore_eos: true,
            temperature: Some(0.0),
            seed: Some(ids::unique()),
            logprobs: Some(spotcheck::ALTERNATIVES),
            ..Default::default()
        };
        let generate = Generate {
            request_id: ids::fresh("req"),
            model: self.proof.model.clone(),
            prompt: Some(prompt),
            params: Some(params),
            progress_ms: progress_ms(self.mesh),
            ..Default::default()
        };
        let message = Message::new(
            MsgType::GENERATE,
            1,
            timestamp_us(),
            Bytes::from(generate.encode_to_vec()),
        );
        let opening = async {
            let mut stream = link.open().await?;
            stream.send(message).await?;
            Ok::<_, StreamFailure>(stream)
        };
        let mut stream = self.while_alive(opening).await??;
        let bounds = Bounds {
            tokens: spotcheck::TOKENS,
            alternatives: Some(spotcheck::ALTERNATIVES),
            ..Bounds::default()
        };
        stream.limit(bounds.message());
        // Checks what comes as any answer is checked.
        let mut answer = Answer::new(self.mesh.config.request_limits(), self.asked).within(bounds);
        let attempt = answer
            .placed(self.id, Duration::ZERO, Instant::now())
            .attempt;
        let mut positions = Vec::new();
        let (mut first, mut last) = (None, Instant::now());
        let mut after_first = 0;
        loop {
            let received = self.while_alive(stream.recv()).await??;
            let now = Instant::now();
            let Some(message) = received else {
                return Err(Unproven::Failed("it ended the stream".into()));
            };
            let unreadable =
                |kind| Unproven::Failed(format!("it sent a {kind} that cannot be read"));
            let step = match message.kind {
                MsgType::TOKENS => {
                    let tokens =
                        Tokens::decode(message.payload).map_err(|_| unreadable(MsgType::TOKENS))?;
                    if !tokens.tokens.is_empty() {
                        match first {
                            None => first = Some(now),
                            Some(_) => after_first += tokens.tokens.len() as u32,
                        }
                        last = now;
                        (self.alive, self.got_on) = (now, now);
                    }
                    answer.tokens_came(attempt, tokens, now)
                }
                MsgType::DONE => {
                    let done =
                        Done::decode(message.payload).map_err(|_| unreadable(MsgType::DONE))?;
                    answer.done(attempt, done, now)
                }
                MsgType::PROGRESS => {
                    if let Ok(progress) = Progress::decode(message.payload) {
                        self.lives(&progress)?;
                    }
                    answer.idled(attempt, now)
                }
                _ => match message.error_body() {
                    Some(_) => return Err(error_of(&message).into()),
                    None => answer.idled(attempt, now),
                },
            };
            match step {
                Step::Wait => {}
                Step::Emit(delta) => positions.extend(positions_of(&delta)),
                Step::Complete(_) => {
                    let _ = stream.finish();
                    if let Some(first) = first {
                        self.measured(after_first, last - first);
                    }
                    if positions.is_empty() {
                        return Err(Unproven::Failed("its answer is empty".into()));
                    }
                    return Ok(Sample::Text(positions));
                }
                Step::Again(_) | Step::Fail(..) => {
                    stream.reset(ErrorCode::CANCELLED);
                    let text = "it sent what was not asked for";
                    return Err(Unproven::Failed(text.into()));
                }
            }
        }
    }

    fn measured(&self, tokens: u32, took: Duration) {
        if tokens < LEAST_MEASURED {
            return;
        }
        self.mesh.with_worker(self.id, |worker| {
            let batch = worker.assigned.saturating_add(1);
            let mut models = worker.models.iter_mut();
            if let Some(model) = models.find(|model| model.card.name == self.proof.model) {
                model.decoded(tokens, took, batch.min(model.card.slots.max(1)));
            }
        });
    }

    /// The same for an embedding model: one text becomes one vector.
    async fn one_vector(&mut self, link: &Link) -> Result<Sample, Unproven> {
        let embed = Embed {
            request_id: ids::fresh("req"),
            model: self.proof.model.clone(),
            inputs: vec![EmbedInput {
                text: Some(EmbedText::Text(self.proof.question.text.clone())),
            }],
            progress_ms: progress_ms(self.mesh),
            ..Default::default()
        };
        let dimensions = self.proof.dimensions;
        let mut stream = self.while_alive(embed::open(link, embed, 0)).await??;
        stream.limit(embed::bytes_of(1, dimensions));
        loop {
            match self
                .while_alive(embed::next(&mut stream, 1, dimensions))
                .await??
            {
                embed::Said::Vectors(answer) => {
                    let _ = stream.finish();
                    let numbers = answer.vectors.chunks_exact(4);
                    let numbers = numbers.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                    return Ok(Sample::Vector(numbers.collect()));
                }
                embed::Said::Lives(progress) => self.lives(&progress)?,
                embed::Said::Other => {}
            }
        }
    }

    /// The output of `future`, as long as the worker shows life.
    async fn while_alive<T>(&mut self, future: impl Future<Output = T>) -> Result<T, Unproven> {
        let limit = self.mesh.config.first_token_limit;
        let mut future = std::pin::pin!(future);
        loop {
            let due = self.alive + limit;
            if let Ok(outcome) = tokio::time::timeout_at(due.into(), &mut future).await {
                return Ok(outcome);
            }
            let now = Instant::now();
            let seen = self.last_token();
            if seen.is_some_and(|at| at >= self.asked) {
                return Err(Unproven::Needless);
            }
            // An older worker does not say what a request waits for, but its reports say whether requests wait.
            let busy = self.mesh.with_registry(|registry| {
                let worker = registry.get(self.id);
                let proof = self.mesh.config.request_timeout;
                worker.is_some_and(|worker| worker.is_busy(limit, proof, now))
            });
            // One step of a slow machine may take longer. A ring that stands still must be found out, and has others to ask.
            let slow = self.proof.ring.is_none()
                && self
                    .told
                    .is_some_and(|at| now.saturating_duration_since(at) < TOLD);
            if !slow && (self.told.is_some() || !busy) {
                return Err(Unproven::Silent);
            }
            self.alive = now;
            self.is_needed(!slow)?;
        }
    }

    fn lives(&mut self, progress: &Progress) -> Result<(), Unproven> {
        let now = Instant::now();
        self.told = Some(now);
        if let Some(moment) = now.checked_sub(Duration::from_millis(progress.quiet_ms)) {
            self.alive = self.alive.max(moment);
        }
        if gets_on(progress) {
            self.mesh
                .with_worker(self.id, |worker| worker.gave_sign(&self.proof.model, now));
        }
        self.is_needed(progress.phase() == RequestPhase::Queued)
    }

    /// Gives the probe up if it waited for long and real answers prove that tokens come, or if it is `queued` behind them.
    fn is_needed(&self, queued: bool) -> Result<(), Unproven> {
        let limit = self.mesh.config.first_token_limit;
        let waited = self.asked.elapsed();
        if waited < limit {
            return Ok(());
        }
        let proven = self.last_token().is_some_and(|at| at >= self.asked);
        if proven || queued {
            return Err(Unproven::Needless);
        }
        // Signs of life are words only. One token does not take so long.
        if self.got_on.elapsed() >= limit.saturating_mul(SIGNS_FOR) {
            return Err(Unproven::Silent);
        }
        Ok(())
    }

    /// When a token of a real answer of this model last came.
    fn last_token(&self) -> Option<Instant> {
        self.mesh.with_registry(|registry| {
            let worker = registry.get(self.id)?;
            let mut models = worker.models.iter();
            let meant = models.find(|model| model.card.name == self.proof.model);
            meant.and_then(|model| model.last_token())
        })
    }
}

/// The tokens of a piece of an answer, with the alternatives that came with them.
fn positions_of(delta: &Delta) -> Vec<Position> {
    let tokens = delta.tokens.iter().enumerate();
    let positions = tokens.map(|(index, token)| match delta.logprobs.get(index) {
        Some(said) => Position {
            token: *token,
            logprob: said.logprob,
            top: said
                .top
                .iter()
                .map(|top| (top.token, top.logprob))
                .collect(),
        },
        None => Position {
            token: *token,
            logprob: 0.0,
            top: Vec::new(),
        },
    });
    positions.collect()
}

/// What the key of a session's heartbeats is exported for; the context is the session, big-endian.
pub const HEARTBEAT_LABEL: &str = "hydramesh heartbeat";

/// How often a worker is to beat: a few may be lost or late before it is pruned for its silence.
fn heartbeat(worker_timeout: Duration) -> Duration {
    Duration::from_secs(2).min(worker_timeout / 4)
}
/// Interval at which a worker is told this head's time.
const CLOCK_INTERVAL: Duration = Duration::from_secs(10);
/// Time that the connected worker has to show that it lives, when another one comes with its identity.
const RIVAL_TIMEOUT: Duration = Duration::from_secs(1);
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(2);
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Payload bytes of a message on a control stream: the pieces of 64 large models fit.
const CONTROL_MESSAGE: usize = 1 << 20;
/// The same on a stream by which a worker measures its bandwidth.
const PROBE_MESSAGE: usize = 1 << 20;
/// Fields at the top of a message on a control stream.
const MOST_FIELDS: usize = 1024;
/// Messages that are read of a control stream in [`CONTROL_WINDOW`]. A busy worker sends about ten a second.
const CONTROL_BURST: u32 = 100;
const CONTROL_WINDOW: Duration = Duration::from_secs(1);
/// Interval at which it is looked who is to prove itself.
const PROOF_PAUSE: Duration = Duration::from_millis(250);
/// Time for which what a worker says of a probe counts.
const TOLD: Duration = Duration::from_secs(10);
/// Multiples of `first_token_limit` for which signs of life without a token keep a probe going.
const SIGNS_FOR: u32 = 4;
/// Tokens of a probe whose time says something.
const LEAST_MEASURED: u32 = 4;
/// Orders that wait to be sent to a worker. They come with decisions, not with requests.
const ORDERS: usize = 64;
const ORDER_TIMEOUT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_proto::ModelCard;

    #[test]
    fn fields_are_counted_before_they_take_memory() {
        let hello = Hello {
            node_name: "w".into(),
            models: vec![ModelCard::default(); 5],
            protocol: PROTOCOL_VERSION,
            instance: 7,
            ..Default::default()
        };
        assert_eq!(fields_of(&hello.encode_to_vec()), 8);
        // Two bytes each, which would be hundreds.
        let bomb = [0x1A, 0].repeat(100_000);
        assert_eq!(fields_of(&bomb), 100_000);
        for junk in [&[0xFF; 64][..], &[0x0A, 0xFF, 0xFF, 3], &[7, 1, 2], &[]] {
            assert!(fields_of(junk) <= 2, "{junk:?}");
        }
    }
}
