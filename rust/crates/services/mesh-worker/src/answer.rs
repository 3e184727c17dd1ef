//! Answers one request of the head on a stream of its own: a task in, events or an error out.
//!
//! All kinds of work are served here in the same way; a [`Codec`] translates.

use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dcf::{ErrorCode, Message, MsgType};
use futures::StreamExt;
use mesh_engine::{Embedding, Generation, RequestStream};
use mesh_net::quic::{MsgStream, RecvHalf, SendHalf, StreamFailure, timestamp_us};
use mesh_proto::ImageData;
use prost::Message as _;
use tracing::Instrument;

use crate::codec::{self, Codec, PrepareError};
use crate::config::SamplingDefaults;
use crate::host::Host;
#[cfg(feature = "images")]
use crate::image::ImageWork;
use crate::life::{self, Life};
use crate::precedence::Precedence;
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
        let upload = match exchange.upload(W::upload_bytes(&task)).await {
            Some(Ok(upload)) => upload,
            Some(Err(reason)) => return exchange.refuse_upload(&reason).await,
            None => return,
        };
        let tokenising = OnceLock::new();
        let starting = start::<W>(host, task, upload, defaults, &tokenising);
        let Some(started) = exchange.prepare(starting, &tokenising).await else {
            return;
        };
        match started {
            Ok((events, reply, _precedence)) => {
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

/// Prepares a task and hands it to its model's engine; what comes last has to be kept until its last event. `tokenising` is set when only the tokenizer is left
/// to wait for: other requests and the chat template do not count as silence, and have limits of their own.
pub(crate) async fn start<W: Codec>(
    host: &Host,
    task: W::Task,
    upload: Bytes,
    defaults: Arc<SamplingDefaults>,
    tokenising: &OnceLock<Instant>,
) -> Result<(RequestStream<W>, W::Reply, Option<Precedence>), PrepareError> {
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
    let mut written = W::write(&model, &host.templates, task).await?;
    W::with_upload(&mut written, upload);
    let _ = tokenising.set(Instant::now());
    let engine = model.engine.clone();
    // Other streams go on meanwhile.
    let prepare = move || W::request(&model, &defaults, written, arrived);
    let (request, reply) = preparations::prepare(permit, prepare).await??;
    let precedence = W::PRECEDES.then(Precedence::take);
    Ok((engine.submit(request), reply, precedence))
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
    /// Receives so many bytes in parts, and says meanwhile that the request lives. An error is a fault of the head's
    /// messages; `None` when the head is gone or breaks off.
    async fn upload(&mut self, total: usize) -> Option<Result<Bytes, String>> {
        if total > MOST_UPLOAD {
            let text = format!("{total} bytes of pixels are more than the limit of {MOST_UPLOAD}");
            return Some(Err(text));
        }
        let mut bytes = Vec::new();
        let mut heard = Instant::now();
        while bytes.len() < total {
            let silent = tokio::time::sleep_until((heard + REQUEST_TIMEOUT).into());
            tokio::select! {
                biased;
                received = self.recv.recv() => {
                    let message = match received {
                        Ok(Some(message)) => message,
                        Ok(None) => return Some(Err("the pixels are cut short".to_owned())),
                        Err(failure) => {
                            tracing::debug!(%failure, "cancelled");
                            return None;
                        }
                    };
                    if let Err(reason) = add_part(&mut bytes, total, message) {
                        return Some(Err(reason));
                    }
                    heard = Instant::now();
                }
                () = silent => return Some(Err("the pixels did not arrive in time".to_owned())),
                () = self.life.due() => {
                    let progress = life::preparing(Some(heard));
                    self.say(life::message(self.sequence, progress)).await?;
                }
            }
        }
        Some(Ok(bytes.into()))
    }

    async fn refuse_upload(self, reason: &str) {
        tracing::warn!(reason, "the head sent pixels that cannot be used");
        refuse(self.send, self.sequence, ErrorCode::INVALID_PAYLOAD, reason).await;
    }

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

/// Adds a part of an upload, which must be the next one.
fn add_part(bytes: &mut Vec<u8>, total: usize, message: Message) -> Result<(), String> {
    if message.kind != MsgType::IMAGE_DATA {
        return Err(format!("a {} came instead of pixels", message.kind));
    }
    let part = ImageData::decode(message.payload);
    let part = part.map_err(|error| format!("the pixels cannot be read: {error}"))?;
    let (have, came) = (bytes.len(), part.data.len());
    let fits = part.offset as usize == have && part.total as usize == total;
    if !fits || came == 0 || have + came > total {
        return Err(format!(
            "{came} bytes of pixels at {} of {} came where byte {have} of {total} was next",
            part.offset, part.total
        ));
    }
    bytes.extend_from_slice(&part.data);
    Ok(())
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

/// Most bytes of an upload: the pixels of the largest image, and its mask.
const MOST_UPLOAD: usize = 2048 * 2048 * 3 + 2048 * 2048 / 8;

/// Time for which a stream may stay empty, and between two parts of an upload.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pixels_come_in_order_and_no_more_than_were_announced() {
        let message =
            |part: &ImageData| Message::new(MsgType::IMAGE_DATA, 1, 0, part.encode_to_vec());
        let pixels = Bytes::from(vec![7; 600_000]);
        let parts: Vec<ImageData> = ImageData::parts(pixels.clone()).collect();
        let mut bytes = Vec::new();
        for part in &parts {
            add_part(&mut bytes, 600_000, message(part)).unwrap();
        }
        assert_eq!(bytes, pixels);
        let mut few = Vec::new();
        let wrong = [
            message(&parts[1]),
            message(&ImageData {
                total: 9,
                ..parts[0].clone()
            }),
            message(&ImageData {
                data: Bytes::new(),
                ..parts[0].clone()
            }),
            Message::new(MsgType::IMAGE_DATA, 1, 0, vec![0xFF; 9]),
            Message::new(MsgType::DONE, 1, 0, Vec::new()),
        ];
        for message in wrong {
            assert!(
                add_part(&mut few, 600_000, message.clone()).is_err(),
                "{message:?}"
            );
        }
        let error = add_part(
            &mut few,
            100,
            message(&ImageData {
                total: 100,
                ..parts[0].clone()
            }),
        );
        assert!(error.is_err() && few.is_empty());
    }

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
