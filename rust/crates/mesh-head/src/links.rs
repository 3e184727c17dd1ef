//! Workers on their QUIC links: Hello and Welcome, load reports, and the proof that a token comes back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use dcf::{ErrorCode, Message, MsgType};
use mesh_net::quic::{Link, Listener, MsgStream, StreamFailure};
use mesh_net::seal::Opener;
use mesh_net::trust::Role;
use mesh_proto::{Generate, GenerateParams, Hello, Load, PROTOCOL_VERSION, Prompt, Welcome};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use crate::core::registry::WorkerId;
use crate::ids;
use crate::mesh::{Mesh, timestamp_us};

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
}

impl LinkError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Role(_) => ErrorCode::UNAUTHORIZED,
            Self::Silent => ErrorCode::TIMEOUT,
            Self::NoHello(_) => ErrorCode::INVALID_PAYLOAD,
            Self::Version(_) => ErrorCode::VERSION_MISMATCH,
            Self::Stream(_) | Self::Key(_) => ErrorCode::INTERNAL,
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
    let (mut control, hello) = timeout(HELLO_TIMEOUT, receive_hello(link))
        .await
        .map_err(|_| LinkError::Silent)??;
    if hello.protocol != PROTOCOL_VERSION {
        return Err(LinkError::Version(hello.protocol));
    }
    let session = ids::unique();
    let key = link
        .export_key(HEARTBEAT_LABEL, &session.to_be_bytes())
        .map_err(|error| LinkError::Key(error.to_string()))?;
    let welcome = Welcome {
        mesh: mesh.config.mesh_name.clone(),
        heartbeat_seconds: HEARTBEAT.as_secs_f32(),
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
    info!(worker = hello.node_name, node = link.node_id(), address = %link.remote_addr(), ?models, "worker joined");
    let (sender, orders) = mpsc::channel(ORDERS);
    let id = mesh.join(link, hello, sender);
    mesh.sessions.open(session, id, Opener::new(&key, session));
    let prober = tokio::spawn(prove(mesh.clone(), id, link.clone()));
    let reason = match follow_control(mesh, id, control, orders).await {
        Ok(()) => "the control stream ended".to_owned(),
        Err(error) => error.to_string(),
    };
    prober.abort();
    mesh.sessions.close(session);
    mesh.leave(id);
    // Without its control stream a worker can say nothing any more.
    link.close(ErrorCode::OK, "the control stream ended");
    Ok(reason)
}

async fn receive_hello(link: &Link) -> Result<(MsgStream, Hello), LinkError> {
    let mut control = link.accept().await?;
    let message = control.recv().await?.ok_or(LinkError::Silent)?;
    if message.kind != MsgType::HELLO {
        return Err(LinkError::NoHello(message.kind));
    }
    let hello = Hello::decode(message.payload).map_err(|_| LinkError::NoHello(MsgType::HELLO))?;
    Ok((control, hello))
}

async fn follow_control(
    mesh: &Mesh,
    id: WorkerId,
    control: MsgStream,
    mut orders: mpsc::Receiver<Message>,
) -> Result<(), StreamFailure> {
    let (mut send, mut recv) = control.split();
    loop {
        tokio::select! {
            received = recv.recv() => {
                let Some(message) = received? else { return Ok(()) };
                match message.kind {
                    MsgType::LOAD => match Load::decode(message.payload) {
                        Ok(load) => mesh.report(id, load),
                        Err(error) => debug!(%error, "load report cannot be read"),
                    },
                    // A newer worker may say more than this head understands.
                    other => debug!(kind = %other, "unexpected on a control stream"),
                }
            }
            order = orders.recv() => match order {
                Some(message) => send.send(message).await?,
                // The entry was replaced or pruned.
                None => return Ok(()),
            },
        }
    }
}

/// Keeps the proof fresh that this worker answers: asks for one token when it joins, after a failure, and when it has
/// been idle for long.
async fn prove(mesh: Arc<Mesh>, id: WorkerId, link: Link) {
    loop {
        if let Some(models) = models_to_prove(&mesh, id) {
            let mut proven = true;
            for model in &models {
                match timeout(mesh.config.first_token_limit, one_token(&link, model)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(reason)) => {
                        proven = false;
                        info!(
                            worker = link.node_name(),
                            model, reason, "no token came back"
                        );
                    }
                    Err(_) => {
                        proven = false;
                        warn!(
                            worker = link.node_name(),
                            model, "no token came back in time"
                        );
                    }
                }
            }
            mesh.with_worker(id, |worker| {
                // A real answer meanwhile is a proof, too.
                worker.proven |= proven;
                if proven {
                    worker.last_success = Some(Instant::now());
                }
            });
            mesh.keep_house();
        }
        tokio::time::sleep(PROOF_PAUSE).await;
    }
}

fn models_to_prove(mesh: &Mesh, id: WorkerId) -> Option<Vec<String>> {
    mesh.with_registry(|registry| {
        let worker = registry.get(id)?;
        let stale = worker
            .last_success
            .is_none_or(|at| at.elapsed() >= mesh.config.quic.probe_interval);
        let idle = worker.active() == 0;
        if worker.draining || worker.models.is_empty() || (worker.proven && !(stale && idle)) {
            return None;
        }
        Some(
            worker
                .models
                .iter()
                .map(|model| model.card.name.clone())
                .collect(),
        )
    })
}

async fn one_token(link: &Link, model: &str) -> Result<(), String> {
    let params = GenerateParams {
        max_tokens: Some(1),
        temperature: Some(0.0),
        seed: Some(0),
        ..Default::default()
    };
    let generate = Generate {
        request_id: ids::fresh("probe"),
        model: model.to_owned(),
        prompt: Some(Prompt::Text("Hello".into())),
        params: Some(params),
        ..Default::default()
    };
    let mut stream = link.open().await.map_err(|error| error.to_string())?;
    let message = Message::new(
        MsgType::GENERATE,
        0,
        timestamp_us(),
        Bytes::from(generate.encode_to_vec()),
    );
    stream
        .send(message)
        .await
        .map_err(|error| error.to_string())?;
    loop {
        let message = stream.recv().await.map_err(|error| error.to_string())?;
        match message {
            Some(message) if message.kind == MsgType::DONE => {
                let _ = stream.finish();
                return Ok(());
            }
            Some(message) if message.kind == MsgType::TOKENS => {}
            Some(message) => {
                return Err(message.error_body().map_or_else(
                    || format!("it answered with {}", message.kind),
                    |body| format!("{}: {}", body.code, body.text),
                ));
            }
            None => return Err("it ended the stream".into()),
        }
    }
}

/// What the key of a session's heartbeats is exported for; the context is the session, big-endian.
pub const HEARTBEAT_LABEL: &str = "hydramesh heartbeat";

const HEARTBEAT: Duration = Duration::from_secs(2);
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
const PROOF_PAUSE: Duration = Duration::from_secs(1);
const ORDERS: usize = 8;
