//! A member of a mesh that says it has a model and sends something else.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use dcf::{Message, MsgType};
use mesh_net::quic::{self, Link, LinkConfig, Listener, MsgStream, timestamp_us};
use mesh_proto::{
    BLOCK, HeldModel, Hello, Load, ManifestReply, Models, PROTOCOL_VERSION, PieceData,
    PieceRequest, Pieces, PiecesHere,
};
use mesh_store::{Manifest, SignedManifest};
use mesh_testkit::Mesh;
use prost::Message as _;
use tokio::task::JoinSet;

/// The manifest, names and pieces that a [`Liar`] offers.
#[derive(Debug)]
pub struct FalseOffer {
    /// The manifest that it gives.
    pub manifest: Manifest,
    /// Names that it claims for the model.
    pub names: Vec<String>,
    /// A folder with the files that it sends pieces of; zeros without one.
    pub files: Option<std::path::PathBuf>,
}

/// A lying member of the mesh; dropping it stops it.
#[derive(Debug)]
pub struct Liar {
    sent: Arc<AtomicU64>,
    _tasks: JoinSet<()>,
    _state: tempfile::TempDir,
}

impl Liar {
    /// Joins the mesh as `name`, saying that it has all of the model with this manifest. Its pieces differ in one byte each.
    ///
    /// # Errors
    /// If the mesh does not take it in.
    pub async fn join(mesh: &Mesh, name: &str, manifest: Manifest) -> Result<Self> {
        let lie = FalseOffer {
            names: vec![manifest.name.clone()],
            manifest,
            files: None,
        };
        Self::join_with(mesh, name, lie).await
    }

    /// Joins the mesh as `name` with this lie.
    ///
    /// # Errors
    /// If the mesh does not take it in.
    pub async fn join_with(mesh: &Mesh, name: &str, lie: FalseOffer) -> Result<Self> {
        let manifest = &lie.manifest;
        let state = tempfile::tempdir()?;
        let head = mesh.head.address("quic")?;
        let token = mesh.join_token().await?;
        let token = token.parse().map_err(|error| anyhow::anyhow!("{error}"))?;
        let identity = quic::join(&[head], &token, Path::new(state.path()), name).await?;
        let loopback = "127.0.0.1:0".parse()?;
        let listener = Listener::bind(loopback, identity.clone(), None, LinkConfig::default())?;
        let port = listener.local_addr()?.port();
        let connector = quic::Connector::toward(head, identity, LinkConfig::default())?;
        let link = connector.connect(head, mesh_net::trust::Role::Head).await?;
        let mut control = link.open().await?;
        let hello = Hello {
            node_name: name.to_owned(),
            version: "0".to_owned(),
            protocol: PROTOCOL_VERSION,
            ..Hello::default()
        };
        control.send(message(MsgType::HELLO, &hello)).await?;
        let answer = control.recv().await?.context("no answer to Hello")?;
        if answer.kind != MsgType::WELCOME {
            bail!("the head answered Hello with a {}", answer.kind);
        }
        let pieces = manifest.pieces().count() as u32;
        let held = HeldModel {
            fingerprint: manifest.fingerprint().to_string(),
            names: lie.names.clone(),
            bytes: manifest.bytes(),
            pieces: Some(all(pieces)),
            signed: false,
        };
        let models = Models {
            port: port.into(),
            held: vec![held],
            ..Models::default()
        };
        control.send(message(MsgType::MODELS, &models)).await?;
        let sent = Arc::new(AtomicU64::new(0));
        let mut tasks = JoinSet::new();
        tasks.spawn(stay(link, control));
        tasks.spawn(serve(listener, Arc::new(lie), sent.clone()));
        Ok(Liar {
            sent,
            _tasks: tasks,
            _state: state,
        })
    }

    /// Bytes of pieces that it has sent.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

async fn stay(link: Link, mut control: MsgStream) {
    loop {
        tokio::select! {
            received = control.recv() => if !matches!(received, Ok(Some(_))) {
                return;
            },
            () = tokio::time::sleep(Duration::from_secs(1)) => {
                let alive = message(MsgType::LOAD, &Load::default());
                if link.close_reason().is_some() || control.send(alive).await.is_err() {
                    return;
                }
            }
        }
    }
}

async fn serve(listener: Listener, lie: Arc<FalseOffer>, sent: Arc<AtomicU64>) {
    let mut tasks = JoinSet::new();
    while let Some(link) = listener.accept().await {
        let (lie, sent) = (lie.clone(), sent.clone());
        tasks.spawn(async move {
            let mut streams = JoinSet::new();
            while let Ok(stream) = link.accept().await {
                let (lie, sent) = (lie.clone(), sent.clone());
                streams.spawn(async move {
                    // It ends when the other side has had enough.
                    let _ = answer(stream, &lie, &sent).await;
                });
            }
        });
    }
}

async fn answer(mut stream: MsgStream, lie: &FalseOffer, sent: &AtomicU64) -> Result<()> {
    let manifest = &lie.manifest;
    while let Some(asked) = stream.recv().await? {
        match asked.kind {
            MsgType::MANIFEST_REQUEST => {
                let signed = SignedManifest::unsigned(manifest.clone());
                let reply = ManifestReply {
                    manifest: signed.to_bytes().into(),
                    ..ManifestReply::default()
                };
                stream
                    .send(message(MsgType::MANIFEST_REPLY, &reply))
                    .await?;
            }
            MsgType::PIECES_HELLO => {
                let here = PiecesHere {
                    pieces: Some(all(manifest.pieces().count() as u32)),
                };
                stream.send(message(MsgType::PIECES_HERE, &here)).await?;
            }
            MsgType::PIECE_REQUEST => {
                let asked = PieceRequest::decode(asked.payload)?;
                let id = manifest.pieces().nth(asked.piece as usize);
                let found = id.and_then(|id| manifest.piece(id));
                let (file, described) = found.context("no such piece")?;
                // Zeros: of the right length, and no piece of a model.
                let mut data = vec![0; described.bytes as usize];
                if let Some(folder) = &lie.files {
                    let file = std::fs::File::open(folder.join(&file.path))?;
                    std::os::unix::fs::FileExt::read_exact_at(&file, &mut data, described.offset)?;
                }
                for (index, block) in data.chunks(BLOCK).enumerate() {
                    let part = PieceData {
                        piece: asked.piece,
                        offset: (index * BLOCK) as u32,
                        data: block.to_vec().into(),
                        refused: false,
                    };
                    stream.send(message(MsgType::PIECE_DATA, &part)).await?;
                    sent.fetch_add(block.len() as u64, Ordering::Relaxed);
                }
            }
            other => bail!("a {other}"),
        }
    }
    Ok(())
}

fn all(of: u32) -> Pieces {
    Pieces {
        of,
        all: true,
        ..Pieces::default()
    }
}

fn message(kind: MsgType, body: &impl prost::Message) -> Message {
    Message::new(kind, 0, timestamp_us(), body.encode_to_vec())
}
