//! Requests to workers over their links, and the messages on them.

use std::time::Duration;

use bytes::Bytes;
use dcf::{ErrorCode, Message, MsgType};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use mesh_control::embedding::check;
use mesh_control::request::Failure;
use mesh_net::quic::{Closed, Link, MsgStream, RecvHalf, SendHalf, StreamFailure};
use mesh_proto::{Embeddings, ImageData, Progress};

use crate::mesh::connection::{AttemptStream, Connection, FromWorker, WorkerRequest};
use crate::mesh::{Mesh, message};

impl Connection for Link {
    fn open(
        &self,
        request: WorkerRequest,
    ) -> BoxFuture<'_, Result<Box<dyn AttemptStream>, Failure>> {
        Box::pin(async move {
            let sequence = request.message.sequence;
            let stream = open(self, request.message).await.map_err(lost)?;
            if request.upload.is_empty() {
                return Ok(Box::new(stream) as Box<dyn AttemptStream>);
            }
            let (send, recv) = stream.split();
            let sending = Some(upload(send, sequence, request.upload).boxed());
            Ok(Box::new(Uploading {
                sending,
                send: None,
                recv,
            }) as Box<dyn AttemptStream>)
        })
    }

    fn close_reason(&self) -> Option<Closed> {
        self.close_reason()
    }

    fn close(&self, code: ErrorCode, text: &str) {
        self.close(code, text);
    }
}

impl AttemptStream for MsgStream {
    fn limit(&mut self, bytes: usize) {
        self.limit(bytes);
    }

    fn receive(&mut self) -> BoxFuture<'_, Result<FromWorker, Failure>> {
        Box::pin(async move {
            let message = self.recv().await.map_err(lost)?;
            Ok(message.map_or(FromWorker::End, FromWorker::Message))
        })
    }

    fn finish(&mut self) {
        // The worker has sent its last message; only the confirmation of its receipt is left to send.
        let _ = self.finish();
    }
}

/// A request whose pixels are on their way, while the worker may already say something.
struct Uploading {
    /// Gives the sending half back when all is sent.
    sending: Option<BoxFuture<'static, Result<SendHalf, StreamFailure>>>,
    send: Option<SendHalf>,
    recv: RecvHalf,
}

impl AttemptStream for Uploading {
    fn limit(&mut self, bytes: usize) {
        self.recv.limit(bytes);
    }

    fn receive(&mut self) -> BoxFuture<'_, Result<FromWorker, Failure>> {
        Box::pin(async move {
            loop {
                let sending = async {
                    match &mut self.sending {
                        Some(sending) => sending.await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    biased;
                    message = self.recv.recv() => {
                        let message = message.map_err(lost)?;
                        return Ok(message.map_or(FromWorker::End, FromWorker::Message));
                    }
                    sent = sending => {
                        self.sending = None;
                        // A worker that reads no more says why, or its link is gone.
                        self.send = sent.ok();
                    }
                }
            }
        })
    }

    fn finish(&mut self) {
        if let Some(send) = &mut self.send {
            let _ = send.finish();
        }
    }
}

/// Sends pixels in parts.
async fn upload(
    mut send: SendHalf,
    sequence: u32,
    pixels: Bytes,
) -> Result<SendHalf, StreamFailure> {
    for part in ImageData::parts(pixels) {
        send.send(message(MsgType::IMAGE_DATA, sequence, &part))
            .await?;
    }
    Ok(send)
}

/// Opens the stream of a request. Dropped early it is reset, which cancels the request there.
pub(super) async fn open(link: &Link, request: Message) -> Result<MsgStream, StreamFailure> {
    let mut stream = link.open().await?;
    stream.send(request).await?;
    Ok(stream)
}

fn lost(error: StreamFailure) -> Failure {
    Failure::Lost(error.to_string())
}

/// A worker's message on the stream of a request of any kind.
pub(crate) enum WorkerReply {
    /// The request lives, and waits for this.
    Progress(Progress),
    /// The worker gives the request up, or sends what cannot be read.
    Failed(Failure),
    /// A message of this kind of work, or one that this version does not know.
    Work(Message),
}

/// Reads the messages that all kinds of work have.
pub(crate) fn reply_in(message: Message) -> WorkerReply {
    match message.kind {
        MsgType::PROGRESS => read(message).map_or_else(WorkerReply::Failed, WorkerReply::Progress),
        MsgType::ERROR => WorkerReply::Failed(error_of(&message)),
        _ => WorkerReply::Work(message),
    }
}

/// The body of a worker's message.
pub(crate) fn read<T: prost::Message + Default>(message: Message) -> Result<T, Failure> {
    let kind = message.kind;
    T::decode(message.payload)
        .map_err(|_| Failure::Nonsense(format!("the worker sent a {kind} that cannot be read")))
}

/// The vectors of this many texts. `dimensions` of 0 means an unknown length.
pub(crate) fn vectors(
    message: Message,
    texts: usize,
    dimensions: u32,
) -> Result<Embeddings, Failure> {
    let embeddings = read(message)?;
    check(&embeddings, texts, dimensions).map_err(Failure::Nonsense)?;
    Ok(embeddings)
}

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
