//! A worker that joined with a real token and lies: about one thing, by the lie's name, and in nothing else.
//!
//! It speaks the mesh's own protocol over real QUIC, claims to serve a model that others serve, and connects
//! again whenever the head ends its link. [`Rogue::seen`] lists the requests that reached it.

mod answers;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use dcf::{Message, MsgType};
use mesh_net::quic::{self, Connector, LinkConfig, MsgStream, timestamp_us};
use mesh_net::trust::{NodeIdentity, Role};
use mesh_proto::{
    Hello, LayerOffer, Load, ModelCard, ModelKind, ModelSpeed, Models, Offer, PROTOCOL_VERSION,
    REQUEST_REVISION, RingState, Served,
};
use mesh_testkit::Mesh;
use tokio::task::{JoinHandle, JoinSet};

use answers::Answerer;

/// The lie of a rogue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum)]
pub enum Lie {
    /// Claims a million tokens a second, and answers with a text of its own.
    Fast,
    /// Never answers, not even the head's probe.
    Mute,
    /// Calls every request invalid.
    Invalid,
    /// Goes on behind `max_tokens`, for ever.
    Endless,
    /// One token with megabytes of text and of log probabilities.
    Huge,
    /// Other tokens than the model's, at a usual speed.
    Wrong,
    /// The model's tokens for whatever looks like the head's probe, other ones for clients.
    Sly,
    /// Says in its Hello that it is another worker.
    Name,
    /// Claims more slots than there are numbers.
    Slots,
    /// Is always idle, as it says, and answers after seconds.
    Queue,
    /// Claims a context of four thousand million tokens.
    Context,
    /// Claims boundless KV memory, and uses more than it has.
    Memory,
    /// Bodies that are not protobuf.
    Malformed,
    /// A token every two seconds.
    Slow,
    /// Says its first tokens again and again.
    Replay,
    /// Also sends answers for requests that it never got.
    Unasked,
    /// Vectors of another length than the model's.
    Dimensions,
    /// Serves rings that there are not, and blames other workers for their silence.
    Ring,
    /// Thousands of reports a second on its control stream.
    Chatter,
}

impl Lie {
    /// The name that it goes by on the command line.
    pub fn name(self) -> String {
        self.to_possible_value()
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default()
    }

    /// True if answers with this lie are the model's own.
    pub fn answers_right(self) -> bool {
        use Lie::{Chatter, Context, Dimensions, Memory, Name, Queue, Ring, Slots, Slow, Unasked};
        matches!(
            self,
            Name | Slots | Queue | Context | Memory | Slow | Unasked | Dimensions | Ring | Chatter
        )
    }

    /// True if the rogue needs a model of its own, so that it lies about nothing else.
    fn needs_model(self) -> bool {
        self.answers_right() || matches!(self, Lie::Sly | Lie::Replay)
    }
}

/// The model that a rogue claims to serve.
#[derive(Debug, Clone)]
pub struct ClaimedModel {
    /// Name of the model.
    pub model: String,
    /// Fingerprint of the model, so that the rogue counts as a replica.
    pub fingerprint: String,
    /// Kind of the model: chat or embeddings.
    pub kind: ModelKind,
    /// Length of its vectors, if it makes embeddings.
    pub dimensions: u32,
    /// Context that it claims, in tokens.
    pub context: u32,
}

impl ClaimedModel {
    /// The claim of a mesh's first worker that serves `kind`.
    ///
    /// # Errors
    /// If no worker serves a model of that kind.
    pub fn like_others(registry: &mesh_api::Mesh, kind: ModelKind) -> Result<Self> {
        let wanted = match kind {
            ModelKind::Chat => "chat",
            ModelKind::Embed => "embed",
            ModelKind::Image => "image",
        };
        let mut models = registry.workers.iter().flat_map(|worker| &worker.models);
        let model = models
            .find(|model| model.kind == wanted)
            .with_context(|| format!("nobody serves a {wanted} model: {registry:?}"))?;
        Ok(Self {
            model: model.name.clone(),
            fingerprint: model.fingerprint.clone(),
            kind,
            dimensions: 384,
            context: model.context,
        })
    }
}

/// A request that reached a rogue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceivedRequest {
    /// Time of arrival.
    pub at: Instant,
    /// Id of the request.
    pub request: String,
    /// The last message, or the prompt.
    pub question: String,
}

impl ReceivedRequest {
    /// True if the request is the head's probe, as far as a worker can tell.
    pub fn looks_like_a_probe(&self) -> bool {
        self.request.starts_with("probe")
    }
}

/// A rogue in a mesh. Dropping it ends it.
#[derive(Debug)]
pub struct Rogue {
    /// The name in its certificate.
    pub name: String,
    /// The id in its certificate.
    pub node_id: String,
    shared: Arc<RogueState>,
    task: JoinHandle<()>,
    _state: tempfile::TempDir,
}

#[derive(Debug)]
struct RogueState {
    lie: Lie,
    name: String,
    claim: ClaimedModel,
    seen: Mutex<Vec<ReceivedRequest>>,
    ends: Mutex<Vec<String>>,
    told: fn(&RogueEvent),
}

impl RogueState {
    fn note_end(&self, reason: String) {
        let mut ends = lock(&self.ends);
        if ends.len() < 1_000 {
            ends.push(reason);
        }
    }
}

/// A log entry of a rogue.
#[derive(Debug, Clone)]
pub enum RogueEvent {
    /// The head took it in.
    Welcomed,
    /// A request reached it.
    Asked(ReceivedRequest),
    /// Its link ended or could not be established, with the reason.
    Ended(String),
}

impl Rogue {
    /// Joins `mesh` as `name`, claiming to serve the model of its other workers.
    ///
    /// # Errors
    /// If the mesh gives no certificate.
    pub async fn join(mesh: &Mesh, name: &str, lie: Lie) -> Result<Self> {
        let kind = match lie {
            Lie::Dimensions => ModelKind::Embed,
            _ => ModelKind::Chat,
        };
        let claim = ClaimedModel::like_others(&mesh.registry().await?, kind)?;
        let token = mesh.join_token().await?;
        Self::join_at(mesh.head.address("quic")?, &token, name, lie, claim, |_| ()).await
    }

    /// Joins the mesh of the head at `head`; `told` receives its events.
    ///
    /// # Errors
    /// If the mesh gives no certificate.
    pub async fn join_at(
        head: SocketAddr,
        token: &str,
        name: &str,
        lie: Lie,
        claim: ClaimedModel,
        told: fn(&RogueEvent),
    ) -> Result<Self> {
        let state = tempfile::tempdir()?;
        let token = token
            .parse()
            .map_err(|error| anyhow::anyhow!("the token: {error}"))?;
        let identity = quic::join(&[head], &token, state.path(), name).await?;
        let answerer = Arc::new(Answerer::new(lie, lie.needs_model())?);
        let node_id = identity.node_id().to_owned();
        let shared = Arc::new(RogueState {
            lie,
            name: name.to_owned(),
            claim,
            seen: Mutex::default(),
            ends: Mutex::default(),
            told,
        });
        let task = tokio::spawn(live(shared.clone(), head, identity, answerer));
        Ok(Self {
            name: name.to_owned(),
            node_id,
            shared,
            task,
            _state: state,
        })
    }

    /// All requests that reached it so far.
    pub fn seen(&self) -> Vec<ReceivedRequest> {
        lock(&self.shared.seen).clone()
    }

    /// Reasons why its links ended or could not be established.
    pub fn ends(&self) -> Vec<String> {
        lock(&self.shared.ends).clone()
    }
}

impl Drop for Rogue {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Connects, lies, and connects again.
async fn live(
    shared: Arc<RogueState>,
    head: SocketAddr,
    identity: NodeIdentity,
    answerer: Arc<Answerer>,
) {
    loop {
        let reason = match link(&shared, head, &identity, &answerer).await {
            Ok(()) => "the link ended".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        (shared.told)(&RogueEvent::Ended(reason.clone()));
        shared.note_end(reason);
        tokio::time::sleep(PAUSE).await;
    }
}

async fn link(
    shared: &Arc<RogueState>,
    head: SocketAddr,
    identity: &NodeIdentity,
    answerer: &Arc<Answerer>,
) -> Result<()> {
    let connector = Connector::toward(head, identity.clone(), LinkConfig::default())?;
    let link = connector.connect(head, Role::Head).await?;
    let mut control = link.open().await?;
    control
        .send(message(MsgType::HELLO, &hello(shared)))
        .await?;
    let answer = control.recv().await?.context("no answer to Hello")?;
    if answer.kind != MsgType::WELCOME {
        bail!("the head answered Hello with {answer:?}");
    }
    (shared.told)(&RogueEvent::Welcomed);
    let mut requests = JoinSet::new();
    requests.spawn(report(shared.clone(), control));
    if shared.lie == Lie::Unasked {
        requests.spawn(answers::unasked(link.clone()));
    }
    while let Ok(stream) = link.accept().await {
        let (shared, answerer) = (shared.clone(), answerer.clone());
        requests.spawn(async move {
            // It ends when the head has had enough.
            let _ = request(&shared, &answerer, stream).await;
        });
    }
    match link.close_reason() {
        Some(reason) => bail!("closed: {reason:?}"),
        None => Ok(()),
    }
}

async fn request(shared: &RogueState, answerer: &Answerer, mut stream: MsgStream) -> Result<()> {
    let first = stream.recv().await?.context("no request")?;
    let (request, question) = answers::what_is_asked(&first)?;
    let seen = ReceivedRequest {
        at: Instant::now(),
        request,
        question,
    };
    (shared.told)(&RogueEvent::Asked(seen.clone()));
    let probe = seen.looks_like_a_probe();
    lock(&shared.seen).push(seen);
    answerer.answer(first, probe, &shared.claim, stream).await
}

fn hello(shared: &RogueState) -> Hello {
    let mut hello = Hello {
        node_name: shared.name.clone(),
        version: "0".to_owned(),
        protocol: PROTOCOL_VERSION,
        request_revision: REQUEST_REVISION,
        models: vec![card(shared)],
        ..Hello::default()
    };
    if shared.lie == Lie::Name {
        "worker-1".clone_into(&mut hello.node_name);
    }
    hello
}

fn card(shared: &RogueState) -> ModelCard {
    let claim = &shared.claim;
    let mut card = ModelCard {
        name: claim.model.clone(),
        architecture: "llama".to_owned(),
        fingerprint: claim.fingerprint.clone(),
        context: claim.context,
        slots: 8,
        decode_tps: 50.0,
        prefill_tps: 200.0,
        file_bytes: 98 << 20,
        quantization: "Q4_1".to_owned(),
        layer_start: 0,
        layer_end: 30,
        kind: claim.kind.into(),
        dimensions: claim.dimensions,
        ..ModelCard::default()
    };
    match shared.lie {
        Lie::Fast => (card.decode_tps, card.prefill_tps) = (1e6, 1e6),
        Lie::Slots => card.slots = u32::MAX,
        Lie::Context => card.context = u32::MAX,
        _ => {}
    }
    card
}

fn load(shared: &RogueState) -> Load {
    let card = card(shared);
    let speed = ModelSpeed {
        name: card.name,
        decode_tps: card.decode_tps,
        prefill_tps: card.prefill_tps,
        queued: Some(0),
    };
    let mut load = Load {
        kv_tokens_total: 16_384,
        speeds: vec![speed],
        resident_bytes: 200 << 20,
        ..Load::default()
    };
    if shared.lie == Lie::Memory {
        load.kv_tokens_total = u64::MAX / 2;
        load.kv_tokens_used = u64::MAX;
        load.resident_bytes = u64::MAX;
        load.prefill_backlog = u64::MAX;
    }
    load
}

/// Keeps the head informed, in the lie's way.
async fn report(shared: Arc<RogueState>, mut control: MsgStream) {
    if shared.lie == Lie::Malformed {
        // Fields that do not end, and a length of all bits.
        let garbage = [0xFF; 64];
        for kind in [
            MsgType::LOAD,
            MsgType::OFFER,
            MsgType::RING_STATE,
            MsgType::MODELS,
        ] {
            let bad = Message::new(kind, 0, timestamp_us(), garbage.to_vec());
            if control.send(bad).await.is_err() {
                return;
            }
        }
    }
    let pause = match shared.lie {
        Lie::Chatter => Duration::from_millis(10),
        _ => Duration::from_secs(1),
    };
    loop {
        tokio::select! {
            received = control.recv() => if !matches!(received, Ok(Some(_))) {
                return;
            },
            () = tokio::time::sleep(pause) => {
                let mut said = vec![message(MsgType::LOAD, &load(&shared))];
                match shared.lie {
                    Lie::Chatter => said.extend(chatter(&shared)),
                    Lie::Ring => said.extend(rings()),
                    _ => {}
                }
                for message in said {
                    if control.send(message).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

/// A hundred reports of all kinds, none of them small.
fn chatter(shared: &RogueState) -> Vec<Message> {
    let served = Served {
        models: vec![card(shared); 32],
        ..Served::default()
    };
    let offer = Offer {
        ring_port: 1,
        models: vec![
            LayerOffer {
                card: Some(card(shared)),
                layers: u32::MAX,
                hidden: u32::MAX,
                layer_bytes: u64::MAX,
                decode_us: f32::NAN,
                prefill_us: -1.0,
                ..LayerOffer::default()
            };
            32
        ],
        ..Offer::default()
    };
    let kinds = [
        message(MsgType::SERVED, &served),
        message(MsgType::OFFER, &offer),
        message(MsgType::MODELS, &Models::default()),
        message(MsgType::LOAD, &load(shared)),
    ];
    kinds.iter().cycle().take(100).cloned().collect()
}

/// States of rings that there are not.
fn rings() -> Vec<Message> {
    let state = |ring: u64| RingState {
        ring,
        epoch: u32::MAX,
        serving: true,
        suspects: (0..64).map(|node| format!("{node:064x}")).collect(),
        severed: (0..64).map(|node| format!("{node:064x}")).collect(),
        ..RingState::default()
    };
    (0..8)
        .map(|ring| message(MsgType::RING_STATE, &state(ring)))
        .collect()
}

fn message(kind: MsgType, body: &impl prost::Message) -> Message {
    Message::new(kind, 0, timestamp_us(), body.encode_to_vec())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Pause between two links.
const PAUSE: Duration = Duration::from_secs(1);
