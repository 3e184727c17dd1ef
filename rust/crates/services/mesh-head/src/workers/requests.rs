//! Requests to workers over their links, and the messages on them.

use std::time::Duration;

use dcf::{Message, MsgType};
use mesh_control::embedding::check;
use mesh_control::request::Failure;
use mesh_net::quic::{Link, MsgStream, StreamFailure};
use mesh_proto::{Embed, Embeddings, Progress};
use prost::Message as _;
use tracing::debug;

use crate::mesh::{Mesh, timestamp_us};

/// Bytes of an answer with `texts` vectors; `dimensions` of 0 means an unknown length.
pub(crate) fn embeddings_bytes(texts: usize, dimensions: u32) -> usize {
    let dimensions = match dimensions {
        0 => LONGEST_VECTOR,
        known => known as usize,
    };
    // A vector, and the number of its tokens.
    texts
        .saturating_mul(dimensions * 4 + 8)
        .saturating_add(64 << 10)
}

/// A worker's message on the stream of an Embed.
pub(crate) enum Said {
    Vectors(Embeddings),
    Lives(Progress),
    /// Something that this version does not know.
    Other,
}

/// Opens the stream of an Embed. Dropped early it is reset, which cancels the request there.
pub(crate) async fn open_embed(
    link: &Link,
    embed: Embed,
    attempt: u32,
) -> Result<MsgStream, Failure> {
    let body = embed.encode_to_vec();
    let message = Message::new(MsgType::EMBED, attempt, timestamp_us(), body);
    let mut stream = link.open().await.map_err(lost)?;
    stream.send(message).await.map_err(lost)?;
    Ok(stream)
}

/// The next message on the stream of an Embed of so many texts.
pub(crate) async fn next_embeddings(
    stream: &mut MsgStream,
    texts: usize,
    dimensions: u32,
) -> Result<Said, Failure> {
    let Some(message) = stream.recv().await.map_err(lost)? else {
        let text = "the worker ended the stream without an answer";
        return Err(Failure::Lost(text.to_owned()));
    };
    let unreadable =
        |kind: MsgType| Failure::Nonsense(format!("the worker sent a {kind} that cannot be read"));
    match message.kind {
        MsgType::EMBEDDINGS => {
            let embeddings =
                Embeddings::decode(message.payload).map_err(|_| unreadable(MsgType::EMBEDDINGS))?;
            check(&embeddings, texts, dimensions).map_err(Failure::Nonsense)?;
            Ok(Said::Vectors(embeddings))
        }
        MsgType::PROGRESS => Progress::decode(message.payload)
            .map(Said::Lives)
            .map_err(|_| unreadable(MsgType::PROGRESS)),
        MsgType::ERROR => Err(error_of(&message)),
        other => {
            debug!(kind = %other, "unexpected on a request's stream");
            Ok(Said::Other)
        }
    }
}

fn lost(error: StreamFailure) -> Failure {
    Failure::Lost(error.to_string())
}

/// Numbers of a vector of unknown length.
const LONGEST_VECTOR: usize = 8192;

/// Interval at which a worker is asked to say that a request lives, in milliseconds.
pub(crate) fn progress_ms(mesh: &Mesh) -> u32 {
    u32::try_from(mesh.config.progress_interval().as_millis()).unwrap_or(u32::MAX)
}

/// True if the work that a request waits for made progress just now.
pub(crate) fn gets_on(progress: &Progress) -> bool {
    progress.quiet_ms < GETS_ON.as_millis() as u64
}

/// Failure in a worker's message that is not an answer.
pub(crate) fn error_of(message: &Message) -> Failure {
    match message.error_body() {
        Some(body) => Failure::Error {
            code: body.code,
            text: body.text.into_owned(),
        },
        None => Failure::Lost(format!("the worker answered with a {}", message.kind)),
    }
}

/// Age of the last step up to which the engine counts as working.
const GETS_ON: Duration = Duration::from_secs(5);
