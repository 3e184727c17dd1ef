//! One source of pieces: the stream to a worker that has some.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use dcf::{Message, MsgType};
use mesh_net::quic::{Link, MsgStream};
use mesh_proto::{
    BLOCK, ManifestReply, ManifestRequest, NodeAddr, PieceData, PieceRequest, PiecesHello,
    PiecesHere,
};
use mesh_share::{PieceSet, Wanted};
use mesh_store::{Digest, SignedManifest};
use mesh_worker_core::SourceEvent;
use prost::Message as _;
use tokio::sync::mpsc;

use super::context::blocking;
use super::files::ReplicaFiles;
use super::writer::Writer;
use crate::codec::message;
use crate::peers::Peers;

pub(super) enum Order {
    Ask(Wanted),
    Withdraw(u32),
}

/// Gets pieces from the worker in `seat` until the orders or the stream end.
pub(super) async fn run(
    peers: Peers,
    seat: NodeAddr,
    files: Arc<ReplicaFiles>,
    writer: Arc<Writer>,
    orders: mpsc::UnboundedReceiver<Order>,
    news: mpsc::UnboundedSender<(String, SourceEvent)>,
) {
    let node = seat.node_id.clone();
    let tell = |what| {
        let _ = news.send((node.clone(), what));
    };
    let talking = async {
        let (_link, stream) = open(&peers, &seat, &files).await?;
        talk(stream, &files, &writer, orders, &tell).await
    };
    let reason = match talking.await {
        Ok(()) => "no longer needed".to_owned(),
        Err(reason) => reason,
    };
    let refused = reason.starts_with(REFUSES);
    tell(SourceEvent::Gone { reason, refused });
}

async fn open(
    peers: &Peers,
    seat: &NodeAddr,
    files: &ReplicaFiles,
) -> Result<(Link, MsgStream), String> {
    let link = peers.link(seat).await?;
    let mut stream = link.open().await.map_err(|error| error.to_string())?;
    let hello = PiecesHello {
        fingerprint: files.map().fingerprint().to_string(),
    };
    let sent = stream.send(message(MsgType::PIECES_HELLO, &hello)).await;
    sent.map_err(|error| error.to_string())?;
    Ok((link, stream))
}

struct Coming {
    wanted: Wanted,
    data: Vec<u8>,
}

/// Carries out orders and takes in messages until there are no more orders.
async fn talk(
    stream: MsgStream,
    files: &Arc<ReplicaFiles>,
    writer: &Arc<Writer>,
    mut orders: mpsc::UnboundedReceiver<Order>,
    tell: &impl Fn(SourceEvent),
) -> Result<(), String> {
    let (mut send, mut recv) = stream.split();
    let mut owed: HashMap<u32, Wanted> = HashMap::new();
    let mut coming: Option<Coming> = None;
    // Withdrawn ones may be under way; so many are remembered.
    let mut withdrawn: VecDeque<Wanted> = VecDeque::new();
    loop {
        tokio::select! {
            order = orders.recv() => {
                let request = match order {
                    None => {
                        let _ = send.finish();
                        return Ok(());
                    }
                    Some(Order::Ask(wanted)) => {
                        let piece = wanted.piece;
                        owed.insert(piece, wanted);
                        PieceRequest { piece, withdraw: false }
                    }
                    Some(Order::Withdraw(piece)) => {
                        if let Some(wanted) = owed.remove(&piece) {
                            withdrawn.push_back(wanted);
                            withdrawn.truncate(MOST_WITHDRAWN);
                        }
                        PieceRequest { piece, withdraw: true }
                    }
                };
                let sent = send.send(message(MsgType::PIECE_REQUEST, &request)).await;
                sent.map_err(|failure| failure.to_string())?;
            }
            received = recv.recv() => {
                let received = received.map_err(|failure| failure.to_string())?;
                let received = received.ok_or("it ended the stream")?;
                if let Some(error) = received.error_body() {
                    return Err(format!("{REFUSES}: {}", error.text));
                }
                match received.kind {
                    MsgType::PIECES_HERE => {
                        tell(SourceEvent::Has(here(&received, files.map().count())?));
                    }
                    MsgType::PIECE_DATA => {
                        let data = PieceData::decode(received.payload);
                        let data = data.map_err(|_| "a part of a piece that cannot be read")?;
                        if data.refused {
                            owed.remove(&data.piece);
                            coming = None;
                            tell(SourceEvent::Refuses(data.piece));
                            continue;
                        }
                        tell(SourceEvent::Sends);
                        let known = owed.get(&data.piece).cloned();
                        let known = known.or_else(|| {
                            withdrawn.iter().find(|w| w.piece == data.piece).cloned()
                        });
                        let wanted = known.ok_or_else(|| {
                            format!("it sends piece {}, which nobody asked for", data.piece)
                        })?;
                        take_part(&mut coming, wanted, &data)?;
                        let is_whole =
                            |it: &mut Coming| it.data.len() == it.wanted.bytes as usize;
                        if let Some(whole) = coming.take_if(is_whole) {
                            owed.remove(&whole.wanted.piece);
                            let (files, writer) = (files.clone(), writer.clone());
                            let kept = tokio::task::spawn_blocking(move || keep(&files, &writer, whole));
                            match kept.await {
                                Ok(news) => tell(news),
                                Err(error) => tell(SourceEvent::DiskFailed(error.to_string())),
                            }
                        }
                    }
                    other => return Err(format!("a {other} does not belong on this stream")),
                }
            }
        }
    }
}

/// Puts a part to those before it.
fn take_part(coming: &mut Option<Coming>, wanted: Wanted, part: &PieceData) -> Result<(), String> {
    let piece = part.piece;
    // Parts of another piece are in vain now.
    coming.take_if(|coming| coming.wanted.piece != piece);
    let coming = coming.get_or_insert_with(|| Coming {
        // The manifest says how long it is, and no piece is longer than 4 MiB.
        data: Vec::with_capacity(wanted.bytes as usize),
        wanted,
    });
    let end = coming.data.len() + part.data.len();
    if part.offset as usize != coming.data.len()
        || part.data.is_empty()
        || part.data.len() > BLOCK
        || end > coming.wanted.bytes as usize
    {
        return Err(format!("the parts of piece {piece} do not fit together"));
    }
    coming.data.extend_from_slice(&part.data);
    Ok(())
}

/// Compares a piece with the manifest and writes it. Blocks.
fn keep(files: &ReplicaFiles, writer: &Writer, coming: Coming) -> SourceEvent {
    match coming.wanted.verify(&coming.data) {
        Err(bad) => SourceEvent::Bad(bad),
        Ok(verified) => match writer.write(files, verified.piece(), &coming.data) {
            Ok(()) => SourceEvent::Piece(verified),
            Err(error) => SourceEvent::DiskFailed(error),
        },
    }
}

fn here(received: &Message, pieces: u32) -> Result<PieceSet, String> {
    let news = PiecesHere::decode(received.payload.clone()).map_err(|error| error.to_string())?;
    let news = news.pieces.unwrap_or_default();
    if news.of != pieces {
        return Err(format!(
            "it counts {} pieces, and the model has {pieces}",
            news.of
        ));
    }
    PieceSet::from_proto(&news).map_err(|error| error.to_string())
}

/// Gets the manifest with this fingerprint from the worker in `seat`.
pub(super) async fn manifest(
    peers: &Peers,
    seat: &NodeAddr,
    fingerprint: &Digest,
) -> Result<SignedManifest, String> {
    let exchange = async {
        let link = peers.link(seat).await?;
        let mut stream = link.open().await.map_err(|error| error.to_string())?;
        let request = ManifestRequest {
            fingerprint: fingerprint.to_string(),
        };
        let sent = stream
            .send(message(MsgType::MANIFEST_REQUEST, &request))
            .await;
        sent.map_err(|error| error.to_string())?;
        let received = stream.recv().await.map_err(|error| error.to_string())?;
        let received = received.ok_or("it ended the stream")?;
        if let Some(error) = received.error_body() {
            return Err(format!("it refused: {}", error.text));
        }
        if received.kind != MsgType::MANIFEST_REPLY {
            return Err(format!("it answered with a {}", received.kind));
        }
        let _ = stream.finish();
        ManifestReply::decode(received.payload).map_err(|error| error.to_string())
    };
    let reply = tokio::time::timeout(MANIFEST_TIMEOUT, exchange).await;
    let reply = reply.map_err(|_| "no manifest in time")??;
    let fingerprint = *fingerprint;
    // Megabytes of JSON.
    let parse = move || {
        let signed = SignedManifest::parse(&reply.manifest).map_err(|error| error.to_string())?;
        let found = signed.manifest.fingerprint();
        if found != fingerprint {
            return Err(format!(
                "the manifest of {:?} was altered: its fingerprint is {}, not {}",
                signed.manifest.name,
                found.short(),
                fingerprint.short()
            ));
        }
        Ok(signed)
    };
    blocking(parse).await
}

/// Prefix of the reason of a source that has not got the model.
const REFUSES: &str = "it refused";
const MANIFEST_TIMEOUT: Duration = Duration::from_secs(60);
const MOST_WITHDRAWN: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(piece: u32, bytes: u32) -> Wanted {
        Wanted {
            piece,
            bytes,
            sha256: [0; 32],
            urgent: false,
        }
    }

    fn part(piece: u32, offset: u32, bytes: usize) -> PieceData {
        PieceData {
            piece,
            offset,
            data: vec![1; bytes].into(),
            refused: false,
        }
    }

    #[test]
    fn the_parts_of_a_piece_come_in_order_and_are_no_more_than_it_has() {
        let mut coming = None;
        assert!(take_part(&mut coming, wanted(1, 10), &part(1, 0, 6)).is_ok());
        for (bad, why) in [
            (part(1, 0, 4), "a part again"),
            (part(1, 7, 3), "a gap"),
            (part(1, 6, 5), "too much"),
            (part(1, 6, 0), "nothing"),
        ] {
            let error = take_part(&mut coming, wanted(1, 10), &bad);
            assert!(error.is_err(), "{why}");
        }
        assert!(take_part(&mut coming, wanted(1, 10), &part(1, 6, 4)).is_ok());
        assert_eq!(coming.as_ref().map(|coming| coming.data.len()), Some(10));
        // Another piece starts from its beginning.
        assert!(take_part(&mut coming, wanted(2, 10), &part(2, 3, 3)).is_err());
        let block = BLOCK + 1;
        assert!(take_part(&mut coming, wanted(2, 1 << 20), &part(2, 0, block)).is_err());
    }

    #[test]
    fn what_is_here_must_be_of_this_model() {
        let told = |pieces: PieceSet| {
            let here = PiecesHere {
                pieces: Some(pieces.to_proto()),
            };
            message(MsgType::PIECES_HERE, &here)
        };
        assert_eq!(here(&told(PieceSet::all(9)), 9), Ok(PieceSet::all(9)));
        assert!(here(&told(PieceSet::all(10)), 9).is_err());
        let nothing = Message::new(MsgType::PIECES_HERE, 0, 0, Vec::new());
        assert!(here(&nothing, 9).is_err());
    }
}
