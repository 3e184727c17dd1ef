//! Gives other workers manifests and pieces.

use std::sync::Arc;
use std::time::Duration;

use dcf::{ErrorCode, Message, MsgType};
use mesh_net::quic::{MsgStream, SendHalf, StreamFailure, timestamp_us};
use mesh_proto::{
    BLOCK, ManifestReply, ManifestRequest, PieceData, PieceRequest, PiecesHello, PiecesHere,
};
use prost::Message as _;

use super::context::{Models, blocking};
use super::files::ReplicaFiles;
use crate::codec::message;

/// True if a stream that begins with this message is for this module.
pub(crate) fn is_ours(kind: MsgType) -> bool {
    matches!(kind, MsgType::MANIFEST_REQUEST | MsgType::PIECES_HELLO)
}

/// Serves a stream that the worker `node_id` opened, of which `first` was the first message.
pub(crate) async fn serve(models: Arc<Models>, node_id: String, first: Message, stream: MsgStream) {
    let serving = serve_one(models.clone(), first, stream);
    let served = models.takers.hold(node_id, serving);
    if served.await.is_err() {
        tracing::debug!("a worker's stream was given up for another");
    }
}

async fn serve_one(models: Arc<Models>, first: Message, mut stream: MsgStream) {
    let served = match first.kind {
        MsgType::MANIFEST_REQUEST => manifest(&models, first, &mut stream).await,
        _ => return pieces(&models, first, stream).await,
    };
    if let Err(failure) = served {
        tracing::debug!(%failure, "a manifest was not sent");
    }
}

async fn manifest(
    models: &Models,
    first: Message,
    stream: &mut MsgStream,
) -> Result<(), StreamFailure> {
    let asked = ManifestRequest::decode(first.payload).unwrap_or_default();
    let reply = match shared(models, &asked.fingerprint) {
        Some(files) => message(
            MsgType::MANIFEST_REPLY,
            &ManifestReply {
                manifest: files.map().signed().to_bytes().into(),
                signatures: bytes::Bytes::new(),
            },
        ),
        None => unknown(&asked.fingerprint),
    };
    match tokio::time::timeout(STUCK, stream.send(reply)).await {
        Ok(sent) => sent?,
        Err(_) => {
            tracing::debug!("a worker takes nothing of the manifest that it asked for");
            return Ok(());
        }
    }
    stream.finish()?;
    // Both halves end by themselves once the other side has read the answer.
    let _ = tokio::time::timeout(GOODBYE, stream.recv()).await;
    Ok(())
}

/// Reports the pieces here, and again when there are more; sends the pieces that are asked for, one after
/// another.
async fn pieces(models: &Models, first: Message, mut stream: MsgStream) {
    let hello = PiecesHello::decode(first.payload).unwrap_or_default();
    let Some(files) = shared(models, &hello.fingerprint) else {
        let _ = stream.send(unknown(&hello.fingerprint)).await;
        let _ = stream.finish();
        let _ = tokio::time::timeout(GOODBYE, stream.recv()).await;
        return;
    };
    let (mut send, mut recv) = stream.split();
    let mut look = tokio::time::interval(NEWS);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut queue = std::collections::VecDeque::new();
    let mut told = None;
    loop {
        let busy = !queue.is_empty();
        tokio::select! {
            biased;
            received = recv.recv() => match received {
                Ok(Some(asked)) if asked.kind == MsgType::PIECE_REQUEST => {
                    let Ok(asked) = PieceRequest::decode(asked.payload) else { return };
                    queue.retain(|piece| *piece != asked.piece);
                    if !asked.withdraw {
                        if queue.len() >= MOST_QUEUED {
                            tracing::debug!("a worker asks for too many pieces at once");
                            return;
                        }
                        queue.push_back(asked.piece);
                    }
                }
                // It has all that it wanted, or is gone.
                _ => return,
            },
            _ = look.tick() => {
                let here = files.here();
                if told.as_ref() != Some(&here) {
                    let news = PiecesHere { pieces: Some(here.to_proto()) };
                    if send.send(message(MsgType::PIECES_HERE, &news)).await.is_err() {
                        return;
                    }
                    told = Some(here);
                }
            }
            () = std::future::ready(()), if busy => {
                if let Some(piece) = queue.pop_front()
                    && !piece_out(models, &files, piece, &mut send).await.unwrap_or(false)
                {
                    return;
                }
            }
        }
    }
}

/// Sends a piece, or the message that it is not here. Returns false if the other side takes nothing of it.
async fn piece_out(
    models: &Models,
    files: &Arc<ReplicaFiles>,
    piece: u32,
    send: &mut SendHalf,
) -> Result<bool, StreamFailure> {
    let read = {
        // Few at once: many disks are slow at doing many things, and a piece takes memory.
        let _turn = models.reading.acquire().await;
        let files = files.clone();
        blocking(move || files.read(piece)).await
    };
    let read = read.inspect_err(|error| {
        tracing::warn!(model = files.map().manifest().name, piece, %error, "piece not sent");
    });
    let Ok(Some(data)) = read else {
        let refusal = PieceData {
            piece,
            refused: true,
            ..PieceData::default()
        };
        send.send(message(MsgType::PIECE_DATA, &refusal)).await?;
        return Ok(true);
    };
    models.counters.sent.inc_by(data.len() as u64);
    for offset in (0..data.len()).step_by(BLOCK) {
        let end = (offset + BLOCK).min(data.len());
        let block = PieceData {
            piece,
            offset: offset as u32,
            data: data.slice(offset..end),
            refused: false,
        };
        let sent = send.send(message(MsgType::PIECE_DATA, &block));
        match tokio::time::timeout(STUCK, sent).await {
            Ok(sent) => sent?,
            Err(_) => {
                tracing::debug!(
                    piece,
                    "a worker takes nothing of the piece that it asked for"
                );
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// The files of the replica with this fingerprint, if others may have it.
fn shared(models: &Models, fingerprint: &str) -> Option<Arc<ReplicaFiles>> {
    models.files_of(|catalogue| catalogue.shared(fingerprint))
}

fn unknown(fingerprint: &str) -> Message {
    let shown: String = fingerprint.chars().take(64).collect();
    let text = format!("no model {shown:?} here");
    Message::error(0, timestamp_us(), ErrorCode::UNKNOWN_MODEL, &text)
}

/// Pieces that one stream may have asked for and not got.
const MOST_QUEUED: usize = 256;
/// Least interval between reports of new pieces to other workers.
const NEWS: Duration = Duration::from_millis(100);
/// Time for which a worker may take none of the pieces that it asked for: a block is a quarter of a megabyte.
const STUCK: Duration = Duration::from_secs(60);
const GOODBYE: Duration = Duration::from_secs(5);
