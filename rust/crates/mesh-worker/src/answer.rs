//! Answers one request of the head: Generate in, Tokens and Done (or Error) out, on a stream of their own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dcf::{ErrorCode, Message, MsgType};
use futures::StreamExt;
use mesh_engine::RequestStream;
use mesh_model::Model;
use mesh_net::quic::{MsgStream, RecvHalf, SendHalf, StreamFailure, timestamp_us};
use mesh_proto::Generate;
use prost::Message as _;
use tracing::Instrument;

use crate::config::SamplingDefaults;
use crate::encoder;
use crate::generate::{self, Refusal};
use crate::host::Host;

/// Reads the request from `stream` and answers it. Ends early when the head breaks the stream off, which cancels the
/// request.
pub(crate) async fn serve(mut stream: MsgStream, host: Arc<Host>, defaults: Arc<SamplingDefaults>) {
    let first = match tokio::time::timeout(REQUEST_TIMEOUT, stream.recv()).await {
        Ok(Ok(Some(message))) => message,
        Ok(Ok(None) | Err(_)) => return,
        Err(_) => return stream.reset(ErrorCode::TIMEOUT),
    };
    let sequence = first.sequence;
    if first.kind == MsgType::EMBED {
        return encoder::serve(stream, first, &host).await;
    }
    let generate = match read(first) {
        Ok(generate) => generate,
        Err(reason) => {
            tracing::warn!(reason, "the head sent a request that cannot be read");
            return refuse(stream, sequence, ErrorCode::INVALID_PAYLOAD, &reason).await;
        }
    };
    let span = tracing::info_span!("request", id = generate.request_id);
    let answering = async {
        match start(&host, generate, defaults).await {
            Ok((events, model)) => {
                let (send, recv) = stream.split();
                forward(events, &model, send, recv, sequence).await;
            }
            Err(refusal) => {
                tracing::debug!(%refusal, "refused");
                refuse(stream, sequence, refusal.code(), &refusal.to_string()).await;
            }
        }
    };
    answering.instrument(span).await;
}

/// Prepares a request and hands it to its model's engine.
pub(crate) async fn start(
    host: &Arc<Host>,
    mut generate: Generate,
    defaults: Arc<SamplingDefaults>,
) -> Result<(RequestStream, Model), Refusal> {
    let now = Instant::now();
    let Some(hosted) = host.find(&generate.model) else {
        return Err(Refusal::UnknownModel {
            name: generate.model,
        });
    };
    let (model, engine) = (hosted.model, hosted.engine);
    let prompt = generate::write(&model, host.templates(), &mut generate).await?;
    // A long prompt takes milliseconds to tokenize; other streams go on meanwhile.
    let prepared = tokio::task::spawn_blocking(move || {
        let request = generate::request(&model, &defaults, generate, prompt, now)?;
        Ok::<_, Refusal>((request, model))
    });
    let (request, model) = prepared
        .await
        .map_err(|error| Refusal::Failed(error.to_string()))??;
    Ok((engine.submit(request), model))
}

/// Sends the events of an answer until its last one. Returns early, which cancels the request, when the head is gone or
/// breaks off.
async fn forward(
    mut events: RequestStream,
    model: &Model,
    mut send: SendHalf,
    mut recv: RecvHalf,
    sequence: u32,
) {
    let mut may_cancel = true;
    loop {
        tokio::select! {
            biased;
            received = recv.recv(), if may_cancel => match received {
                // It has nothing more to say, and still listens.
                Ok(None) => may_cancel = false,
                Ok(Some(message)) => tracing::debug!(kind = %message.kind, "unexpected message"),
                Err(failure) => {
                    tracing::debug!(%failure, "cancelled");
                    return;
                }
            },
            event = events.next() => {
                let Some(event) = event else { return };
                let is_last = event.is_last();
                let message = generate::message(event, model, sequence, timestamp_us());
                if let Err(failure) = send.send(message).await {
                    tracing::debug!(%failure, "the head is gone");
                    return;
                }
                if is_last {
                    let _ = send.finish();
                    // What was sent must arrive before the stream's halves are dropped.
                    send.stopped().await;
                    return;
                }
            }
        }
    }
}

pub(crate) async fn refuse(stream: MsgStream, sequence: u32, code: ErrorCode, text: &str) {
    let (mut send, _recv) = stream.split();
    let error = Message::error(sequence, timestamp_us(), code, text);
    let sent: Result<(), StreamFailure> = async {
        send.send(error).await?;
        send.finish()
    }
    .await;
    if sent.is_ok() {
        send.stopped().await;
    }
}

fn read(message: Message) -> Result<Generate, String> {
    if message.kind != MsgType::GENERATE {
        return Err(format!(
            "a request stream begins with a Generate or an Embed, not with a {}",
            message.kind
        ));
    }
    Generate::decode(message.payload)
        .map_err(|error| format!("the Generate cannot be read: {error}"))
}

/// How long a stream may stay empty.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
