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

#[derive(Default)]
pub(super) struct Epoch {
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

impl Epoch {
    /// Begins with a part as `stage`, which sends rows to the next stage unless it is a standby's.
    pub(super) fn begin_part(
        &mut self,
        peers: &Peers,
        ring: &Ring,
        stage: u32,
        part: &PartHandle,
        is_member: bool,
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
                next: Some(to_next),
                driver: Some(driver),
                previous: Some(previous),
                standby: None,
            },
            counters: counters.clone(),
        });
        let inbound = Inbound {
            counters,
            back: Some(back),
            outcomes: Some(outcomes),
        };
        self.begun.insert(stage, inbound);
        if is_member {
            let part = part.clone();
            let serve = move |stream| streams::rows_out(stream, part, rows);
            self.open(peers, ring, stage + 1, RingPurpose::Rows, "rows", serve);
        }
    }

    /// Begins with the driver, which is `stage` and opens a stream to each member before it.
    pub(super) fn begin_driver(
        &mut self,
        peers: &Peers,
        ring: &Ring,
        stage: u32,
        driver: &DriverHandle,
    ) {
        let channels = (0..stage).map(|_| mpsc::unbounded_channel());
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
        for (member, orders) in (0..).zip(flows) {
            let driver = driver.clone();
            let serve = move |stream| streams::drive_out(stream, member, driver, orders);
            self.open(peers, ring, member, RingPurpose::Drive, "drive", serve);
        }
    }

    /// Opens a stream to the member of `stage` and serves it for the rest of the epoch.
    fn open<F>(
        &mut self,
        peers: &Peers,
        ring: &Ring,
        stage: u32,
        purpose: RingPurpose,
        name: &'static str,
        serve: impl FnOnce(MsgStream) -> F + Send + 'static,
    ) where
        F: Future<Output = Broken> + Send,
    {
        let planned = ring.stages.get(stage as usize);
        let Some(seat) = planned.and_then(|planned| planned.member.clone()) else {
            return;
        };
        let (peers, hello) = (peers.clone(), hello(ring, stage, purpose));
        self.serve(hello.epoch, Some(seat.clone()), name, async move {
            match streams::open(&peers, &seat, &hello).await {
                // The link is held for as long as the stream: nothing else may keep it.
                Ok((_link, stream)) => serve(stream).await,
                Err(broken) => broken,
            }
        });
    }

    /// Runs a stream's task. `peer` is the member whose loss its end may mean.
    fn serve(
        &mut self,
        epoch: u32,
        peer: Option<NodeAddr>,
        purpose: &'static str,
        serving: impl Future<Output = Broken> + Send + 'static,
    ) {
        self.streams.spawn(async move {
            let Broken { text: reason, link } = serving.await;
            StreamEnd {
                epoch,
                peer,
                purpose,
                reason,
                link,
            }
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
            (RingPurpose::Rows, target) if let Some(back) = inbound.back.take() => {
                let serving = streams::rows_in(stream, target, counters, back);
                self.serve(epoch, Some(from), "rows", serving);
            }
            (RingPurpose::Drive, Target::Part(part))
                if let Some(outcomes) = inbound.outcomes.take() =>
            {
                let serving = streams::drive_in(stream, part, counters, outcomes);
                self.serve(epoch, Some(from), "drive", serving);
            }
            (RingPurpose::Mirror, Target::Part(part)) => {
                self.serve(epoch, None, "mirror", streams::mirror_in(stream, part));
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
