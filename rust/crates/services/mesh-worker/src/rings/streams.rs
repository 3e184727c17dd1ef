//! The streams between members: one task for each, which carries messages between the network and a part or a
//! driver.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use dcf::{ErrorCode, Message, MsgType};
use mesh_net::quic::{Link, MsgStream, SendHalf, StreamFailure};
use mesh_pipeline::DriverEvent;
use mesh_proto::{
    NodeAddr, RingHeld, RingHello, RingMirror, RingMirrored, RingOutcome, RingPing, RingPurpose,
    RingResend, RingStep,
};
use prost::Message as _;

use super::driver::DriverHandle;
use super::part::{Command, Counters, Outflow, PartHandle, message};
use super::peers::Peers;

/// Target of a stream on this worker.
#[derive(Clone)]
pub(super) enum Target {
    /// A part that is not the last one.
    Part(PartHandle),
    /// The driver with the last part.
    Driver(DriverHandle),
}

/// Cause of a stream's end.
#[derive(Debug)]
pub(super) struct Broken {
    /// Description for people.
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
            let mut stream = link.open().await.map_err(|error| error.to_string())?;
            stream
                .send(message(MsgType::RING_HELLO, hello))
                .await
                .map_err(|error| error.to_string())?;
            Ok::<_, String>((link, stream))
        };
        match opened.await {
            Ok(opened) => return Ok(opened),
            Err(error) => last = error,
        }
    }
    Err(Broken {
        text: last,
        link: true,
    })
}

/// Serves the stream to the next stage: rows go out, its standby's confirmations come back.
pub(super) async fn rows_out(stream: MsgStream, part: PartHandle, mut rows: Outflow) -> Broken {
    let (mut send, mut recv) = stream.split();
    loop {
        tokio::select! {
            biased;
            message = rows.recv() => {
                if let Err(broken) = pass(&mut send, message).await {
                    return broken;
                }
            }
            received = recv.recv() => match read::<RingMirrored>(received, MsgType::RING_MIRRORED) {
                Ok(mirrored) => part.tell(Command::NextMirrored(mirrored)),
                Err(broken) => return broken,
            },
        }
    }
}

/// Serves the stream from the stage before: rows come in, the standby's confirmations go back.
pub(super) async fn rows_in(
    stream: MsgStream,
    target: Target,
    counters: Arc<Counters>,
    mut back: Outflow,
) -> Broken {
    let (mut send, mut recv) = stream.split();
    loop {
        tokio::select! {
            biased;
            received = recv.recv() => match read::<RingStep>(received, MsgType::RING_STEP) {
                Ok(step) => {
                    counters.received.fetch_add(1, Ordering::Relaxed);
                    match &target {
                        Target::Part(part) => part.step(step),
                        Target::Driver(driver) => driver.rows(step),
                    }
                    // Rows that have just been computed go out before the next step is computed.
                    tokio::task::yield_now().await;
                }
                Err(broken) => return broken,
            },
            message = back.recv() => {
                if let Err(broken) = pass(&mut send, message).await {
                    return broken;
                }
            }
        }
    }
}

/// The driver's stream to a member.
pub(super) async fn drive_out(
    stream: MsgStream,
    stage: u32,
    driver: DriverHandle,
    mut orders: Outflow,
) -> Broken {
    let (mut send, mut recv) = stream.split();
    loop {
        tokio::select! {
            biased;
            message = orders.recv() => {
                if let Err(broken) = pass(&mut send, message).await {
                    return broken;
                }
            }
            received = recv.recv() => {
                let event = received_message(received).and_then(|message| {
                    let event = match message.kind {
                        MsgType::RING_HELD => RingHeld::decode(message.payload)
                            .map(|held| DriverEvent::Held { stage, held }),
                        MsgType::RING_PING => RingPing::decode(message.payload)
                            .map(|ping| DriverEvent::Pong { stage, ping }),
                        MsgType::RING_OUTCOME => RingOutcome::decode(message.payload)
                            .map(|outcome| DriverEvent::Outcome { stage, outcome }),
                        other => return Err(unexpected(other)),
                    };
                    event.map_err(|error| Broken::from(error.to_string()))
                });
                match event {
                    Ok(event) => driver.tell(event),
                    Err(broken) => return broken,
                }
            }
        }
    }
}

/// A member's end of its driver's stream.
pub(super) async fn drive_in(
    stream: MsgStream,
    part: PartHandle,
    counters: Arc<Counters>,
    mut outcomes: Outflow,
) -> Broken {
    let (mut send, mut recv) = stream.split();
    let Some(held) = part.held().await else {
        return "the part is gone".into();
    };
    if let Err(broken) = pass(&mut send, Some(message(MsgType::RING_HELD, &held))).await {
        return broken;
    }
    loop {
        tokio::select! {
            biased;
            received = recv.recv() => {
                let message = match received_message(received) {
                    Ok(message) => message,
                    Err(broken) => return broken,
                };
                let done = match message.kind {
                    MsgType::RING_STEP => RingStep::decode(message.payload).map(|step| {
                        counters.received.fetch_add(1, Ordering::Relaxed);
                        part.step(step);
                        None
                    }),
                    MsgType::RING_RESEND => RingResend::decode(message.payload).map(|resend| {
                        part.tell(Command::Resend(resend));
                        None
                    }),
                    MsgType::RING_PING => RingPing::decode(message.payload).map(|mut ping| {
                        ping.received = counters.received.load(Ordering::Relaxed);
                        ping.sent = counters.sent.load(Ordering::Relaxed);
                        Some(super::part::message(MsgType::RING_PING, &ping))
                    }),
                    other => return unexpected(other),
                };
                match done {
                    Ok(None) => tokio::task::yield_now().await,
                    Ok(Some(answer)) => {
                        if let Err(broken) = pass(&mut send, Some(answer)).await {
                            return broken;
                        }
                    }
                    Err(error) => return error.to_string().into(),
                }
            }
            message = outcomes.recv() => {
                if let Err(broken) = pass(&mut send, message).await {
                    return broken;
                }
            }
        }
    }
}

/// To the standby: KV rows out, how far it is back.
pub(super) async fn mirror_out(stream: MsgStream, target: Target) -> Broken {
    let (mut send, mut recv) = stream.split();
    let held = match read::<RingHeld>(recv.recv().await, MsgType::RING_HELD) {
        Ok(held) => held.slots,
        Err(broken) => return broken,
    };
    let (outbox, mut rows) = tokio::sync::mpsc::unbounded_channel();
    match &target {
        Target::Part(part) => part.tell(Command::Standby(held, outbox)),
        Target::Driver(driver) => driver.standby(held, outbox),
    }
    loop {
        tokio::select! {
            message = rows.recv() => {
                if let Err(broken) = pass(&mut send, message).await {
                    return broken;
                }
            }
            received = recv.recv() => match read::<RingMirrored>(received, MsgType::RING_MIRRORED) {
                Ok(mirrored) => match &target {
                    Target::Part(part) => part.tell(Command::Mirrored(mirrored.count)),
                    Target::Driver(driver) => driver.tell(DriverEvent::Acknowledged(mirrored.count)),
                },
                Err(broken) => return broken,
            },
        }
    }
}

/// A standby's end of the stream from its member.
pub(super) async fn mirror_in(stream: MsgStream, part: PartHandle) -> Broken {
    let (mut send, mut recv) = stream.split();
    let Some(held) = part.held().await else {
        return "the part is gone".into();
    };
    if let Err(broken) = pass(&mut send, Some(message(MsgType::RING_HELD, &held))).await {
        return broken;
    }
    let (outbox, mut answers) = tokio::sync::mpsc::unbounded_channel();
    loop {
        tokio::select! {
            received = recv.recv() => match read::<RingMirror>(received, MsgType::RING_MIRROR) {
                Ok(mirror) => {
                    part.tell(Command::TakeMirrored(mirror, outbox.clone()));
                }
                Err(broken) => return broken,
            },
            message = answers.recv() => {
                // The member begins again, on a new stream, from the rows that this side holds.
                let lost_step = message.as_ref().is_some_and(|m| m.kind == MsgType::ERROR);
                if let Err(broken) = pass(&mut send, message).await {
                    return broken;
                }
                if lost_step {
                    return "the standby has lost step".into();
                }
            }
        }
    }
}

async fn pass(send: &mut SendHalf, message: Option<Message>) -> Result<(), Broken> {
    let message = message.ok_or("the part is gone")?;
    Ok(send.send(message).await?)
}

fn received_message(received: Result<Option<Message>, StreamFailure>) -> Result<Message, Broken> {
    match received {
        Ok(Some(message)) => Ok(message),
        Ok(None) => Err("the other side ended the stream".into()),
        Err(error) => Err(error.into()),
    }
}

fn read<T: prost::Message + Default>(
    received: Result<Option<Message>, StreamFailure>,
    kind: MsgType,
) -> Result<T, Broken> {
    let message = received_message(received)?;
    if message.kind != kind {
        return Err(unexpected(message.kind));
    }
    T::decode(message.payload)
        .map_err(|error| format!("a {kind} that cannot be read: {error}").into())
}

fn unexpected(kind: MsgType) -> Broken {
    format!("a {kind} does not belong on this stream").into()
}

/// The first message of a stream that another worker opened.
pub(super) async fn first(stream: &mut MsgStream) -> Result<Message, Broken> {
    let received = tokio::time::timeout(HELLO_TIMEOUT, stream.recv())
        .await
        .map_err(|_| "no first message in time")?;
    received_message(received)
}

/// Reads the purpose of a stream between members from its first message.
pub(super) fn hello(first: Message) -> Result<RingHello, Broken> {
    let hello: RingHello = read(Ok(Some(first)), MsgType::RING_HELLO)?;
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
