//! Answers one request of the head on a stream of its own: a task in, events or an error out.
//!
//! All kinds of work are served here in the same way; a [`Codec`] translates.

use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use dcf::{ErrorCode, Message};
use futures::StreamExt;
use mesh_engine::{Embedding, Generation, RequestStream};
use mesh_net::quic::{MsgStream, RecvHalf, SendHalf, StreamFailure, timestamp_us};
use prost::Message as _;
use tracing::Instrument;

use crate::codec::{self, Codec, PrepareError};
use crate::config::SamplingDefaults;
use crate::host::Host;
#[cfg(feature = "images")]
use crate::image::ImageWork;
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
    match first.kind {
        Generation::TASK => answer::<Generation>(stream, first, &host, defaults).await,
        Embedding::TASK => answer::<Embedding>(stream, first, &host, defaults).await,
        #[cfg(feature = "images")]
        ImageWork::TASK => answer::<ImageWork>(stream, first, &host, defaults).await,
        kind => {
            let reason = format!(
                "a request stream begins with a Generate, an Embed or an ImageTask that this build serves, not with a {kind}"
            );
            refuse_unread(stream, first.sequence, &reason).await;
        }
    }
}

async fn answer<W: Codec>(
    stream: MsgStream,
    first: Message,
    host: &Host,
    defaults: Arc<SamplingDefaults>,
) {
    let sequence = first.sequence;
    let task = match W::Task::decode(first.payload) {
        Ok(task) => task,
        Err(error) => {
            let reason = format!("the {} cannot be read: {error}", W::TASK);
            return refuse_unread(stream, sequence, &reason).await;
        }
    };
    let header = W::header(&task);
    let span = tracing::info_span!("request", id = header.id);
    let life = Life::new(header.progress_ms);
    let answering = async {
        let (send, recv) = stream.split();
        let mut exchange = Exchange {
            send,
            recv,
            sequence,
            may_cancel: true,
            life,
        };
        let tokenising = OnceLock::new();
        let starting = start::<W>(host, task, defaults, &tokenising);
        let Some(started) = exchange.prepare(starting, &tokenising).await else {
            return;
        };
        match started {
            Ok((events, reply)) => {
                if exchange.forward(events, &reply).await.is_some() {
                    finish(exchange.send).await;
                }
            }
            Err(refusal) => {
                tracing::debug!(%refusal, "refused");
                let (code, text) = (refusal.code(), refusal.to_string());
                refuse(exchange.send, sequence, code, &text).await;
            }
        }
    };
    answering.instrument(span).await;
}

/// Prepares a task and hands it to its model's engine. `tokenising` is set when only the tokenizer is left
/// to wait for: other requests and the chat template do not count as silence, and have limits of their own.
pub(crate) async fn start<W: Codec>(
    host: &Host,
    task: W::Task,
    defaults: Arc<SamplingDefaults>,
    tokenising: &OnceLock<Instant>,
) -> Result<(RequestStream<W>, W::Reply), PrepareError> {
    let arrived = Instant::now();
    let name = W::header(&task).model;
    let model = host
        .find::<W>(name)
        .ok_or_else(|| PrepareError::UnknownModel {
            kind: W::MODEL,
            name: name.to_owned(),
        })?;
    W::check(&model, &task)?;
    let permit = host.preparations.enter(W::bytes(&task)).await?;
    let written = W::write(&model, &host.templates, task).await?;
    let _ = tokenising.set(Instant::now());
    let engine = model.engine.clone();
    // Other streams go on meanwhile.
    let prepare = move || W::request(&model, &defaults, written, arrived);
    let (request, reply) = preparations::prepare(permit, prepare).await??;
    Ok((engine.submit(request), reply))
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

    /// Sends the events of an answer until its last one, and signs of life in the absence of events. `None` when
    /// the head is gone or breaks off, which cancels the request.
    async fn forward<W: Codec>(
        &mut self,
        mut events: RequestStream<W>,
        reply: &W::Reply,
    ) -> Option<()> {
        let mut begun = false;
        loop {
            tokio::select! {
                biased;
                received = self.recv.recv(), if self.may_cancel => self.heard(received)?,
                event = events.next() => {
                    let event = event?;
                    let is_last = W::is_last(&event);
                    begun = true;
                    for message in messages::<W>(reply, event, self.sequence).await {
                        self.say(message).await?;
                    }
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

async fn messages<W: Codec>(reply: &W::Reply, event: W::Event, sequence: u32) -> Vec<Message> {
    match W::encode(reply, event).await {
        Ok(bodies) => {
            let message = |(kind, body)| Message::new(kind, sequence, timestamp_us(), body);
            bodies.into_iter().map(message).collect()
        }
        Err(error) => {
            let (code, text) = (codec::code(&error), error.to_string());
            vec![Message::error(sequence, timestamp_us(), code, &text)]
        }
    }
}

async fn refuse_unread(stream: MsgStream, sequence: u32, reason: &str) {
    tracing::warn!(reason, "the head sent a request that cannot be read");
    let (send, _recv) = stream.split();
    refuse(send, sequence, ErrorCode::INVALID_PAYLOAD, reason).await;
}

async fn refuse(mut send: SendHalf, sequence: u32, code: ErrorCode, text: &str) {
    let error = Message::error(sequence, timestamp_us(), code, text);
    if send.send(error).await.is_ok() {
        finish(send).await;
    }
}

async fn finish(mut send: SendHalf) {
    let _ = send.finish();
    // Sent data must arrive before the stream's halves are dropped.
    send.stopped().await;
}

/// Time for which a stream may stay empty.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_waits_for_a_permit_is_not_silent() {
        let tokenising = OnceLock::new();
        let progress = |at: &OnceLock<Instant>| life::preparing(at.get().copied());
        assert_eq!(
            progress(&tokenising).quiet_ms,
            0,
            "however long ago it arrived"
        );
        let begun = Instant::now().checked_sub(Duration::from_secs(2));
        tokenising.set(begun.unwrap()).unwrap();
        assert!(progress(&tokenising).quiet_ms >= 2000);
    }
}
