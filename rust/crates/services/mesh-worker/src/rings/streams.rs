//! The streams between members: one task for each, which carries messages between the network and a part or a
//! driver.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use dcf::{ErrorCode, Message, MsgType};
use mesh_net::quic::{Link, MsgStream, SendHalf, StreamFailure};
use mesh_pipeline::DriverEvent;
use mesh_proto::{NodeAddr, RingHeld, RingHello, RingMirrored, RingPing, RingPurpose};
use tokio::sync::mpsc;

use super::driver::DriverHandle;
use super::part::{Command, Counters, Outflow, PartHandle};
use crate::codec::message;
use crate::peers::Peers;

#[derive(Clone)]
pub(super) enum Target {
    Part(PartHandle),
    /// The driver with the last part.
    Driver(DriverHandle),
}

#[derive(Debug)]
pub(super) struct Broken {
    pub(super) text: String,
    /// The link itself is gone, and with it probably the worker at its other end.
    pub(super) link: bool,
}

impl From<StreamFailure> for Broken {
    fn from(failure: StreamFailure) -> Self {
        Broken {
            text: failure.to_string(),
            link: matches!(failure, StreamFailure::Link(_)),
        }
    }
}

impl From<&str> for Broken {
    fn from(text: &str) -> Self {
        Broken {
            text: text.to_owned(),
            link: false,
        }
    }
}

impl From<String> for Broken {
    fn from(text: String) -> Self {
        Broken { text, link: false }
    }
}

/// Opens a stream to `seat` and states its purpose. Tries again for a while: the other side may hear of the
/// epoch a moment later, or just be starting.
pub(super) async fn open(
    peers: &Peers,
    seat: &NodeAddr,
    hello: &RingHello,
) -> Result<(Link, MsgStream), Broken> {
    let mut last = String::new();
    for attempt in 0..DIAL_ATTEMPTS {
        if attempt > 0 {
            tokio::time::sleep(DIAL_PAUSE).await;
        }
        let opened = async {
            let link = peers.link(seat).await?;
            let mut stream = link.open().await?;
            stream.send(message(MsgType::RING_HELLO, hello)).await?;
            Ok::<_, Broken>((link, stream))
        };
        match opened.await {
            Ok(opened) => return Ok(opened),
            Err(broken) => last = broken.text,
        }
    }
    Err(Broken {
        text: last,
        link: true,
    })
}

/// Serves the stream to the next stage: rows go out, its standby's confirmations come back.
pub(super) async fn rows_out(stream: MsgStream, part: PartHandle, rows: Outflow) -> Broken {
    let take = |message| {
        let mirrored = expect(message, MsgType::RING_MIRRORED)?;
        part.tell(Command::NextMirrored(mirrored));
        Ok(None)
    };
    carry(stream, rows, take).await
}

/// Serves the stream from the stage before: rows come in, the standby's confirmations go back.
pub(super) async fn rows_in(
    stream: MsgStream,
    target: Target,
    counters: Arc<Counters>,
    back: Outflow,
) -> Broken {
    let take = |message| {
        let step = expect(message, MsgType::RING_STEP)?;
        counters.received.fetch_add(1, Ordering::Relaxed);
        match &target {
            Target::Part(part) => part.step(step),
            Target::Driver(driver) => driver.rows(step),
        }
        Ok(None)
    };
    carry(stream, back, take).await
}

/// The driver's stream to a member.
pub(super) async fn drive_out(
    stream: MsgStream,
    stage: u32,
    driver: DriverHandle,
    orders: Outflow,
) -> Broken {
    let take = |message: Message| {
        driver.tell(match message.kind {
            MsgType::RING_HELD => DriverEvent::Held {
                stage,
                held: decode(message)?,
            },
            MsgType::RING_PING => DriverEvent::Pong {
                stage,
                ping: decode(message)?,
            },
            MsgType::RING_OUTCOME => DriverEvent::Outcome {
                stage,
                outcome: decode(message)?,
            },
            other => return Err(unexpected(other)),
        });
        Ok(None)
    };
    carry(stream, orders, take).await
}

/// A member's end of its driver's stream.
pub(super) async fn drive_in(
    mut stream: MsgStream,
    part: PartHandle,
    counters: Arc<Counters>,
    outcomes: Outflow,
) -> Broken {
    if let Err(broken) = send_held(&mut stream, &part).await {
        return broken;
    }
    let take = |received: Message| {
        match received.kind {
            MsgType::RING_STEP => {
                let step = decode(received)?;
                counters.received.fetch_add(1, Ordering::Relaxed);
                part.step(step);
            }
            MsgType::RING_RESEND => part.tell(Command::Resend(decode(received)?)),
            MsgType::RING_PING => {
                let mut ping: RingPing = decode(received)?;
                ping.received = counters.received.load(Ordering::Relaxed);
                ping.sent = counters.sent.load(Ordering::Relaxed);
                return Ok(Some(message(MsgType::RING_PING, &ping)));
            }
            other => return Err(unexpected(other)),
        }
        Ok(None)
    };
    carry(stream, outcomes, take).await
}

/// To the standby: KV rows out, how far it is back.
pub(super) async fn mirror_out(mut stream: MsgStream, target: Target) -> Broken {
    let first = received_message(stream.recv().await);
    let held: RingHeld = match first.and_then(|first| expect(first, MsgType::RING_HELD)) {
        Ok(held) => held,
        Err(broken) => return broken,
    };
    let (outbox, rows) = mpsc::unbounded_channel();
    match &target {
        Target::Part(part) => part.tell(Command::Standby(held.slots, outbox)),
        Target::Driver(driver) => driver.standby(held.slots, outbox),
    }
    let take = |message| {
        let RingMirrored { count, .. } = expect(message, MsgType::RING_MIRRORED)?;
        match &target {
            Target::Part(part) => part.tell(Command::Mirrored(count)),
            Target::Driver(driver) => driver.tell(DriverEvent::Acknowledged(count)),
        }
        Ok(None)
    };
    carry(stream, rows, take).await
}

/// A standby's end of the stream from its member.
pub(super) async fn mirror_in(mut stream: MsgStream, part: PartHandle) -> Broken {
    if let Err(broken) = send_held(&mut stream, &part).await {
        return broken;
    }
    let (outbox, answers) = mpsc::unbounded_channel();
    let take = |message| {
        let mirror = expect(message, MsgType::RING_MIRROR)?;
        part.tell(Command::TakeMirrored(mirror, outbox.clone()));
        Ok(None)
    };
    carry(stream, answers, take).await
}

/// Serves a stream until it ends: what `out` gives goes out, and `take` gets what comes in and may answer it.
async fn carry(
    stream: MsgStream,
    mut out: Outflow,
    mut take: impl FnMut(Message) -> Result<Option<Message>, Broken>,
) -> Broken {
    let (mut send, mut recv) = stream.split();
    loop {
        let carried = tokio::select! {
            biased;
            message = out.recv() => pass(&mut send, message).await,
            received = recv.recv() => match received_message(received).and_then(&mut take) {
                Ok(None) => {
                    // Rows that have just been computed go out before the next step is computed.
                    tokio::task::yield_now().await;
                    Ok(())
                }
                Ok(answer) => pass(&mut send, answer).await,
                Err(broken) => Err(broken),
            },
        };
        if let Err(broken) = carried {
            return broken;
        }
    }
}

async fn pass(send: &mut SendHalf, message: Option<Message>) -> Result<(), Broken> {
    let message = message.ok_or("the part is gone")?;
    let is_error = message.kind == MsgType::ERROR;
    send.send(message).await?;
    match is_error {
        // The member begins again, on a new stream, from the rows that this side holds.
        true => Err("the standby has lost step".into()),
        false => Ok(()),
    }
}

/// Tells the other side which rows the part holds.
async fn send_held(stream: &mut MsgStream, part: &PartHandle) -> Result<(), Broken> {
    let held = part.held().await.ok_or("the part is gone")?;
    Ok(stream.send(message(MsgType::RING_HELD, &held)).await?)
}

fn received_message(received: Result<Option<Message>, StreamFailure>) -> Result<Message, Broken> {
    Ok(received?.ok_or("the other side ended the stream")?)
}

fn expect<T: prost::Message + Default>(message: Message, kind: MsgType) -> Result<T, Broken> {
    match message.kind == kind {
        true => decode(message),
        false => Err(unexpected(message.kind)),
    }
}

fn decode<T: prost::Message + Default>(message: Message) -> Result<T, Broken> {
    let kind = message.kind;
    let decoded = T::decode(message.payload);
    decoded.map_err(|error| format!("a {kind} that cannot be read: {error}").into())
}

fn unexpected(kind: MsgType) -> Broken {
    format!("a {kind} does not belong on this stream").into()
}

/// The first message of a stream that another worker opened.
pub(super) async fn first(stream: &mut MsgStream) -> Result<Message, Broken> {
    let received = tokio::time::timeout(HELLO_TIMEOUT, stream.recv()).await;
    received_message(received.map_err(|_| "no first message in time")?)
}

/// Reads the purpose of a stream between members from its first message.
pub(super) fn hello(first: Message) -> Result<RingHello, Broken> {
    let hello: RingHello = expect(first, MsgType::RING_HELLO)?;
    if hello.purpose() == RingPurpose::Unspecified {
        return Err("a RingHello without a purpose".into());
    }
    Ok(hello)
}

/// Ends a stream that leads nowhere.
pub(super) fn refuse(stream: MsgStream) {
    stream.reset(ErrorCode::CANCELLED);
}

const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
const DIAL_ATTEMPTS: u32 = 3;
const DIAL_PAUSE: Duration = Duration::from_millis(100);
