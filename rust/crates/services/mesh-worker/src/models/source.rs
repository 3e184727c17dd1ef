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
use mesh_share::{BadPiece, PieceSet, Verified, Wanted};
use mesh_store::{Digest, SignedManifest};
use prost::Message as _;
use tokio::sync::mpsc;

use super::fetch::Writer;
use super::held::Held;
use super::message;
use crate::rings::Peers;

/// Orders to a source.
pub(super) enum Order {
    Ask(Wanted),
    Withdraw(u32),
}

/// Events of a source.
pub(super) enum News {
    /// It holds these pieces.
    Here(PieceSet),
    /// It is sending: a sign of life.
    Heard,
    /// A piece came, is the manifest's and is written.
    Piece(Verified),
    /// A piece came that is not.
    Bad(BadPiece),
    /// It has not got this piece.
    Refused(u32),
    /// It sends no more, for this reason.
    Gone(String),
    /// This machine cannot write.
    Disk(String),
}

/// Gets pieces from the worker in `seat` until the orders or the stream end.
pub(super) async fn run(
    peers: Peers,
    seat: NodeAddr,
    held: Arc<Held>,
    writer: Arc<Writer>,
    orders: mpsc::UnboundedReceiver<Order>,
    news: mpsc::UnboundedSender<(String, News)>,
) {
    let node = seat.node_id.clone();
    let tell = |what| {
        let _ = news.send((node.clone(), what));
    };
    let reason = match open(&peers, &seat, &held).await {
        Ok((_link, stream)) => talk(stream, &held, &writer, orders, &tell).await,
        Err(reason) => reason,
    };
    tell(News::Gone(reason));
}

async fn open(peers: &Peers, seat: &NodeAddr, held: &Held) -> Result<(Link, MsgStream), String> {
    let link = peers.link(seat).await?;
    let mut stream = link.open().await.map_err(|error| error.to_string())?;
    let hello = PiecesHello {
        fingerprint: held.fingerprint().to_string(),
    };
    stream
        .send(message(MsgType::PIECES_HELLO, &hello))
        .await
        .map_err(|error| error.to_string())?;
    Ok((link, stream))
}

/// A piece on its way.
struct Coming {
    wanted: Wanted,
    data: Vec<u8>,
}

/// Carries out orders and takes in messages; returns the reason for which that ended.
async fn talk(
    stream: MsgStream,
    held: &Arc<Held>,
    writer: &Arc<Writer>,
    mut orders: mpsc::UnboundedReceiver<Order>,
    tell: &impl Fn(News),
) -> String {
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
                        return "no longer needed".to_owned();
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
                if let Err(failure) = send.send(message(MsgType::PIECE_REQUEST, &request)).await {
                    return failure.to_string();
                }
            }
            received = recv.recv() => {
                let received = match received {
                    Ok(Some(received)) => received,
                    Ok(None) => return "it ended the stream".to_owned(),
                    Err(failure) => return failure.to_string(),
                };
                if let Some(error) = received.error_body() {
                    return format!("{REFUSES}: {}", error.text);
                }
                match received.kind {
                    MsgType::PIECES_HERE => match here(&received, held.pieces()) {
                        Ok(pieces) => tell(News::Here(pieces)),
                        Err(reason) => return reason,
                    },
                    MsgType::PIECE_DATA => {
                        let Ok(data) = PieceData::decode(received.payload) else {
                            return "a part of a piece that cannot be read".to_owned();
                        };
                        if data.refused {
                            owed.remove(&data.piece);
                            coming = None;
                            tell(News::Refused(data.piece));
                            continue;
                        }
                        tell(News::Heard);
                        let known = owed.get(&data.piece).cloned();
                        let known = known.or_else(|| {
                            withdrawn.iter().find(|w| w.piece == data.piece).cloned()
                        });
                        let Some(wanted) = known else {
                            return format!("it sends piece {}, which nobody asked for", data.piece);
                        };
                        if let Err(reason) = take_part(&mut coming, wanted, &data) {
                            return reason;
                        }
                        let whole = coming
                            .take_if(|coming| coming.data.len() == coming.wanted.bytes as usize);
                        if let Some(whole) = whole {
                            owed.remove(&whole.wanted.piece);
                            let (held, writer) = (held.clone(), writer.clone());
                            let kept = tokio::task::spawn_blocking(move || keep(&held, &writer, whole));
                            match kept.await {
                                Ok(news) => tell(news),
                                Err(error) => tell(News::Disk(error.to_string())),
                            }
                        }
                    }
                    other => return format!("a {other} does not belong on this stream"),
                }
            }
        }
    }
}

/// Puts a part to those before it.
fn take_part(coming: &mut Option<Coming>, wanted: Wanted, part: &PieceData) -> Result<(), String> {
    let piece = part.piece;
    if coming
        .as_ref()
        .is_none_or(|coming| coming.wanted.piece != piece)
    {
        // The manifest says how long it is, and no piece is longer than 4 MiB.
        let data = Vec::with_capacity(wanted.bytes as usize);
        *coming = Some(Coming { wanted, data });
    }
    let Some(coming) = coming else {
        return Ok(());
    };
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
fn keep(held: &Held, writer: &Writer, coming: Coming) -> News {
    match coming.wanted.verify(&coming.data) {
        Err(bad) => News::Bad(bad),
        Ok(verified) => match writer.write(held, verified.piece(), &coming.data) {
            Ok(()) => News::Piece(verified),
            Err(error) => News::Disk(error),
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
        stream
            .send(message(MsgType::MANIFEST_REQUEST, &request))
            .await
            .map_err(|error| error.to_string())?;
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
    let reply = tokio::time::timeout(MANIFEST_TIMEOUT, exchange)
        .await
        .map_err(|_| "no manifest in time".to_owned())??;
    let fingerprint = *fingerprint;
    // Megabytes of JSON.
    let parsed = tokio::task::spawn_blocking(move || {
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
    });
    parsed.await.map_err(|error| error.to_string())?
}

/// Prefix of the reason of a source that has not got the model.
pub(super) const REFUSES: &str = "it refused";
const MANIFEST_TIMEOUT: Duration = Duration::from_secs(60);
const MOST_WITHDRAWN: usize = 64;

#[cfg(test)]
mod tests {
    use mesh_net::quic::timestamp_us;

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
        let message = |pieces: PieceSet| {
            let here = PiecesHere {
                pieces: Some(pieces.to_proto()),
            };
            Message::new(
                MsgType::PIECES_HERE,
                0,
                timestamp_us(),
                here.encode_to_vec(),
            )
        };
        assert_eq!(here(&message(PieceSet::all(9)), 9), Ok(PieceSet::all(9)));
        assert!(here(&message(PieceSet::all(10)), 9).is_err());
        let nothing = Message::new(MsgType::PIECES_HERE, 0, 0, Vec::new());
        assert!(here(&nothing, 9).is_err());
    }
}
