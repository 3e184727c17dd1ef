//! Answers one request of the head: Generate in, Tokens and Done (or Error) out, on a stream of their own.

use std::pin::pin;
use std::sync::{Arc, OnceLock};
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
use crate::life::{self, Life};
use crate::preparations;

/// Reads the request from `stream` and answers it. Ends early when the head breaks the stream off, which
/// cancels the request.
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
        let (send, recv) = stream.split();
        let mut exchange = Exchange {
            send,
            recv,
            sequence,
            may_cancel: true,
            life: Life::new(generate.progress_ms),
        };
        let tokenising = OnceLock::new();
        let starting = start(&host, generate, defaults, &tokenising);
        let Some(started) = exchange.prepare(starting, &tokenising).await else {
            return;
        };
        match started {
            Ok((events, model)) => exchange.forward(events, &model).await,
            Err(refusal) => {
                tracing::debug!(%refusal, "refused");
                let (code, text) = (refusal.code(), refusal.to_string());
                refuse_on(exchange.send, sequence, code, &text).await;
            }
        }
    };
    answering.instrument(span).await;
}

/// Prepares a request and hands it to its model's engine. `tokenising` is set when only the tokenizer is left
/// to wait for: the chat template has a limit of its own.
pub(crate) async fn start(
    host: &Arc<Host>,
    mut generate: Generate,
    defaults: Arc<SamplingDefaults>,
    tokenising: &OnceLock<Instant>,
) -> Result<(RequestStream, Model), Refusal> {
    let now = Instant::now();
    let Some(hosted) = host.find(&generate.model) else {
        return Err(Refusal::UnknownModel {
            name: generate.model,
        });
    };
    let (model, engine) = (hosted.model, hosted.engine);
    let context = engine.info().context;
    generate::check_length(&model, generate.prompt.as_ref(), context)?;
    let bytes = generate.prompt.as_ref().map_or(0, preparations::bytes_of);
    let place = host.preparations().enter(bytes).await?;
    let prompt = generate::write(&model, host.templates(), &mut generate).await?;
    let _ = tokenising.set(Instant::now());
    // A long prompt takes milliseconds to tokenize; other streams go on meanwhile.
    let prepared = preparations::prepare(place, move || {
        let request = generate::request(&model, &defaults, generate, prompt, context, now)?;
        Ok::<_, Refusal>((request, model))
    });
    let (request, model) = prepared
        .await
        .map_err(|error| Refusal::Failed(error.to_string()))??;
    Ok((engine.submit(request), model))
}

/// One request's stream, from the time that the request was read.
struct Exchange {
    send: SendHalf,
    recv: RecvHalf,
    sequence: u32,
    /// The head has not ended its side yet.
    may_cancel: bool,
    life: Life,
}

impl Exchange {
    /// Waits for the preparation of a request, and says meanwhile that it lives. `None` when the head is gone
    /// or breaks off.
    async fn prepare<T>(
        &mut self,
        starting: impl Future<Output = T>,
        tokenising: &OnceLock<Instant>,
    ) -> Option<T> {
        let mut starting = pin!(starting);
        loop {
            tokio::select! {
                biased;
                received = self.recv.recv(), if self.may_cancel => self.heard(received)?,
                started = &mut starting => return Some(started),
                () = self.life.due() => {
                    let progress = life::preparing(tokenising.get().copied());
                    self.say(life::message(self.sequence, progress)).await?;
                }
            }
        }
    }

    /// Sends the events of an answer until its last one, and signs of life in the absence of events. Returns
    /// early, which cancels the request, when the head is gone or breaks off.
    async fn forward(mut self, events: RequestStream, model: &Model) {
        // Sent data must arrive before the stream's halves are dropped.
        if self.forward_all(events, model).await.is_some() {
            let _ = self.send.finish();
            self.send.stopped().await;
        }
    }

    async fn forward_all(&mut self, mut events: RequestStream, model: &Model) -> Option<()> {
        let mut begun = false;
        loop {
            tokio::select! {
                biased;
                received = self.recv.recv(), if self.may_cancel => self.heard(received)?,
                event = events.next() => {
                    let event = event?;
                    let is_last = event.is_last();
                    begun = true;
                    self.say(generate::message(event, model, self.sequence, timestamp_us())).await?;
                    if is_last {
                        return Some(());
                    }
                    self.life.sent();
                }
                () = self.life.due() => {
                    let progress = life::of_stream(&events, begun);
                    self.say(life::message(self.sequence, progress)).await?;
                }
            }
        }
    }

    /// Takes in a message of the head; `None` when it breaks off.
    fn heard(&mut self, received: Result<Option<Message>, StreamFailure>) -> Option<()> {
        match received {
            // It has nothing more to say, and still listens.
            Ok(None) => self.may_cancel = false,
            Ok(Some(message)) => tracing::debug!(kind = %message.kind, "unexpected message"),
            Err(failure) => {
                tracing::debug!(%failure, "cancelled");
                return None;
            }
        }
        Some(())
    }

    /// Sends a message; `None` when the head is gone.
    async fn say(&mut self, message: Message) -> Option<()> {
        match self.send.send(message).await {
            Ok(()) => Some(()),
            Err(failure) => {
                tracing::debug!(%failure, "the head is gone");
                None
            }
        }
    }
}

pub(crate) async fn refuse(stream: MsgStream, sequence: u32, code: ErrorCode, text: &str) {
    let (send, _recv) = stream.split();
    refuse_on(send, sequence, code, text).await;
}

async fn refuse_on(mut send: SendHalf, sequence: u32, code: ErrorCode, text: &str) {
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

/// Time for which a stream may stay empty.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
