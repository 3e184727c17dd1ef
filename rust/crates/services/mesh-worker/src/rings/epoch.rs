//! The streams of one epoch of a ring: those that this worker opens, and those that it lets in.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mesh_net::quic::MsgStream;
use mesh_pipeline::DriverEvent;
use mesh_proto::{NodeAddr, Ring, RingHello, RingPurpose};
use mesh_worker_core::StreamEnd;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::driver::DriverHandle;
use super::part::{Command, Counters, Outboxes, Outflow, PartHandle};
use super::streams::{self, Broken, Target};
use crate::peers::Peers;

/// State that ends with an epoch.
#[derive(Default)]
pub(super) struct Epoch {
    /// One task for each stream.
    pub(super) streams: JoinSet<StreamEnd>,
    /// What the inbound streams of the parts need that have begun.
    begun: BTreeMap<u32, Inbound>,
    replications: BTreeMap<u32, AbortOnDropHandle<()>>,
    /// Gives the driver's pings back to it.
    echo: Option<AbortOnDropHandle<()>>,
}

#[derive(Default)]
struct Inbound {
    counters: Arc<Counters>,
    /// Taken by the stream that brings rows.
    back: Option<Outflow>,
    /// Taken by the driver's stream.
    outcomes: Option<Outflow>,
}

/// A member with which a stream is to be opened.
pub(super) struct Member {
    pub(super) peers: Peers,
    pub(super) seat: NodeAddr,
    pub(super) stage: u32,
}

impl Epoch {
    /// Begins with a part as `stage`, which sends rows to the member `next` unless it is a standby's.
    pub(super) fn begin_part(
        &mut self,
        ring: &Ring,
        stage: u32,
        part: &PartHandle,
        next: Option<Member>,
    ) {
        let (to_next, rows) = mpsc::unbounded_channel();
        let (driver, outcomes) = mpsc::unbounded_channel();
        let (previous, back) = mpsc::unbounded_channel();
        let counters = Arc::new(Counters::default());
        part.tell(Command::Begin {
            epoch: ring.epoch,
            stage,
            half_rows: ring.half_rows,
            outboxes: Outboxes {
                next: to_next,
                driver,
                previous,
            },
            counters: counters.clone(),
        });
        let inbound = Inbound {
            counters,
            back: Some(back),
            outcomes: Some(outcomes),
        };
        self.begun.insert(stage, inbound);
        if let Some(next) = next {
            let part = part.clone();
            self.open(ring, next, RingPurpose::Rows, "rows", move |stream| {
                streams::rows_out(stream, part, rows)
            });
        }
    }

    /// Begins with the driver, which is `stage` and opens a stream to each member before it.
    pub(super) fn begin_driver(
        &mut self,
        ring: &Ring,
        stage: u32,
        driver: &DriverHandle,
        members: Vec<Option<Member>>,
    ) {
        let channels = members.iter().map(|_| mpsc::unbounded_channel());
        let (outboxes, flows): (Vec<_>, Vec<_>) = channels.unzip();
        let (previous, back) = mpsc::unbounded_channel();
        let (echo, mut pings) = mpsc::unbounded_channel();
        driver.begin_epoch(ring.epoch, ring.half_rows, outboxes, previous, echo);
        let pinged = driver.clone();
        // On this thread, behind all that comes from the network and all that goes there.
        self.echo = Some(AbortOnDropHandle::new(tokio::spawn(async move {
            while let Some(nonce) = pings.recv().await {
                pinged.tell(DriverEvent::Echo(nonce));
            }
        })));
        let inbound = Inbound {
            back: Some(back),
            ..Inbound::default()
        };
        self.begun.insert(stage, inbound);
        for (member, orders) in members.into_iter().zip(flows) {
            let Some(member) = member else {
                continue;
            };
            let (driver, stage) = (driver.clone(), member.stage);
            self.open(ring, member, RingPurpose::Drive, "drive", move |stream| {
                streams::drive_out(stream, stage, driver, orders)
            });
        }
    }

    /// Opens a stream to a member and serves it for the rest of the epoch.
    fn open<F>(
        &mut self,
        ring: &Ring,
        member: Member,
        purpose: RingPurpose,
        name: &'static str,
        serve: impl FnOnce(MsgStream) -> F + Send + 'static,
    ) where
        F: Future<Output = Broken> + Send,
    {
        let Member { peers, seat, stage } = member;
        let hello = hello(ring, stage, purpose);
        self.streams.spawn(async move {
            let broken = match streams::open(&peers, &seat, &hello).await {
                // The link is held for as long as the stream: nothing else may keep it.
                Ok((_link, stream)) => serve(stream).await,
                Err(error) => error,
            };
            end_of(hello.epoch, Some(seat), name, broken)
        });
    }

    /// Serves a stream that the member `from` opened.
    pub(super) fn accept(
        &mut self,
        stream: MsgStream,
        hello: &RingHello,
        from: NodeAddr,
        target: Target,
    ) {
        let Some(inbound) = self.begun.get_mut(&hello.stage) else {
            return streams::refuse(stream);
        };
        let (epoch, counters) = (hello.epoch, inbound.counters.clone());
        match (hello.purpose(), target) {
            (RingPurpose::Rows, target) => {
                let Some(back) = inbound.back.take() else {
                    return streams::refuse(stream);
                };
                self.streams.spawn(async move {
                    let broken = streams::rows_in(stream, target, counters, back).await;
                    end_of(epoch, Some(from), "rows", broken)
                });
            }
            (RingPurpose::Drive, Target::Part(part)) => {
                let Some(outcomes) = inbound.outcomes.take() else {
                    return streams::refuse(stream);
                };
                self.streams.spawn(async move {
                    let broken = streams::drive_in(stream, part, counters, outcomes).await;
                    end_of(epoch, Some(from), "drive", broken)
                });
            }
            (RingPurpose::Mirror, Target::Part(part)) => {
                self.streams.spawn(async move {
                    let broken = streams::mirror_in(stream, part).await;
                    end_of(epoch, None, "mirror", broken)
                });
            }
            _ => streams::refuse(stream),
        }
    }

    /// Replicates a part to this standby, and to no other.
    pub(super) fn replicate(
        &mut self,
        ring: &Ring,
        stage: u32,
        target: Target,
        peers: Peers,
        standby: Option<NodeAddr>,
    ) {
        self.replications.remove(&stage);
        let Some(standby) = standby else {
            return stop_replicating(&target);
        };
        let hello = hello(ring, stage, RingPurpose::Mirror);
        let task = tokio::spawn(keep_replicating(peers, standby, hello, target));
        self.replications
            .insert(stage, AbortOnDropHandle::new(task));
    }
}

fn hello(ring: &Ring, stage: u32, purpose: RingPurpose) -> RingHello {
    RingHello {
        ring: ring.ring,
        epoch: ring.epoch,
        stage,
        purpose: purpose.into(),
    }
}

fn end_of(epoch: u32, peer: Option<NodeAddr>, purpose: &'static str, broken: Broken) -> StreamEnd {
    StreamEnd {
        epoch,
        peer,
        purpose,
        reason: broken.text,
        link: broken.link,
    }
}

/// Replicates to a standby, and begins again when that breaks: the standby may still be loading, or have lost
/// step. Whether it is still the right one is for the head to say.
async fn keep_replicating(peers: Peers, standby: NodeAddr, hello: RingHello, target: Target) {
    loop {
        let broken = match streams::open(&peers, &standby, &hello).await {
            Ok((_link, stream)) => streams::mirror_out(stream, target.clone()).await,
            Err(error) => error,
        };
        tracing::debug!(
            standby = standby.name,
            reason = broken.text,
            "not replicated"
        );
        stop_replicating(&target);
        tokio::time::sleep(PAUSE).await;
    }
}

fn stop_replicating(target: &Target) {
    match target {
        Target::Part(part) => part.tell(Command::NoStandby),
        Target::Driver(driver) => driver.no_standby(),
    }
}

const PAUSE: Duration = Duration::from_millis(250);
