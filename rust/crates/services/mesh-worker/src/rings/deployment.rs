//! One ring as this worker sees it: loads its parts, connects them in every epoch, and tells the head how
//! they are.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use mesh_engine::RequestError;
use mesh_net::quic::MsgStream;
use mesh_pipeline::{DriverEvent, StageReplica};
use mesh_proto::{
    ModelCard, NodeAddr, PartPhase, PartState, Recovery, Ring, RingHello, RingPurpose, RingStage,
    RingState,
};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::carrier::Carrier;
use super::driver::{DriverHandle, Notice};
use super::part::{Command, Counters, Outboxes, Outflow, PartHandle};
use super::progress::Progress;
use super::streams::{self, Broken, Target};
use super::{Rings, Served, Shard};
use crate::generate::load::warm_up;

/// Events of a deployment.
pub(super) enum Event {
    /// The head names the members.
    Ring(Ring),
    /// The node of that id opened a stream.
    Stream(RingHello, String, MsgStream),
}

/// Runs a ring's parts on this worker until the head dissolves it or the channel closes.
pub(super) struct Deployment {
    id: u64,
    rings: Arc<Rings>,
    shard: Arc<Shard>,
    ring: Ring,
    parts: BTreeMap<u32, Hosted>,
    driver: Option<DriverHandle>,
    notices: mpsc::UnboundedSender<Notice>,
    own: mpsc::WeakUnboundedSender<Event>,
    loads: JoinSet<Loaded>,
    /// The epoch's streams.
    epoch: EpochStreams,
    /// Streams of an epoch that has not come here yet, or whose part is still being loaded.
    waiting: Vec<(RingHello, String, MsgStream)>,
    /// Epoch in which a token came back through every stage.
    serving: u32,
    warming_up: Option<AbortOnDropHandle<()>>,
    suspects: Vec<Suspect>,
    recovery: Option<Recovery>,
    reported: Option<(RingState, Instant)>,
    /// Steps of all parts here at the last look.
    steps: u64,
}

/// A member that does not answer.
#[derive(Debug, Clone, PartialEq)]
struct Suspect {
    node_id: String,
    /// Nothing passes its link.
    severed: bool,
    /// The link itself is closed.
    closed: bool,
}

enum Hosted {
    Loading(Arc<Progress>),
    Failed(String),
    Ready {
        part: PartHandle,
        loaded: LoadedAs,
    },
    /// The driver has it.
    Driving(LoadedAs),
}

#[derive(Clone, Copy)]
struct LoadedAs {
    seconds: f32,
    weight_bytes: u64,
}

type Loaded = (u32, Result<(StageReplica, LoadedAs), String>);

/// State that ends with an epoch.
#[derive(Default)]
struct EpochStreams {
    tasks: JoinSet<Ended>,
    /// Parts that have begun this epoch, with what their inbound streams need.
    begun: BTreeMap<u32, Inbound>,
    mirrors: BTreeMap<u32, (NodeAddr, AbortOnDropHandle<()>)>,
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

/// A stream that ended, toward a seat or from a stage.
struct Ended {
    epoch: u32,
    peer: Option<NodeAddr>,
    what: &'static str,
    reason: Broken,
}

impl Deployment {
    /// Starts the task of a ring on the thread of `carrier`.
    pub(super) fn spawn(
        carrier: &Carrier,
        rings: Arc<Rings>,
        shard: Arc<Shard>,
        id: u64,
    ) -> mpsc::UnboundedSender<Event> {
        let (sender, events) = mpsc::unbounded_channel();
        let (notices, noticed) = mpsc::unbounded_channel();
        let deployment = Deployment {
            id,
            rings,
            shard,
            ring: Ring::default(),
            parts: BTreeMap::new(),
            driver: None,
            notices,
            own: sender.downgrade(),
            loads: JoinSet::new(),
            epoch: EpochStreams::default(),
            waiting: Vec::new(),
            serving: 0,
            warming_up: None,
            suspects: Vec::new(),
            recovery: None,
            reported: None,
            steps: 0,
        };
        carrier.spawn(deployment.run(events, noticed));
        sender
    }

    async fn run(
        mut self,
        mut events: mpsc::UnboundedReceiver<Event>,
        mut notices: mpsc::UnboundedReceiver<Notice>,
    ) {
        let mut look = tokio::time::interval(REPORT_INTERVAL);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Some(Event::Ring(ring)) => {
                        if ring.stages.is_empty() {
                            self.dissolve(&ring.reason);
                            return;
                        }
                        self.configure(ring).await;
                        if self.parts.is_empty() {
                            let reason = format!("moved: {}", self.ring.reason);
                            self.dissolve(&reason);
                            return;
                        }
                    }
                    Some(Event::Stream(hello, peer, stream)) => self.take_stream(hello, peer, stream),
                    None => {
                        self.dissolve("moved: the link to the head is lost");
                        return;
                    }
                },
                Some(notice) = notices.recv() => self.take_notice(notice),
                Some(loaded) = self.loads.join_next() => {
                    if let Ok(loaded) = loaded {
                        self.take_loaded(loaded).await;
                    }
                }
                Some(ended) = self.epoch.tasks.join_next() => {
                    if let Ok(ended) = ended {
                        self.take_ended(ended);
                    }
                }
                _ = look.tick() => self.note_activity(),
            }
            self.report();
        }
    }

    /// Notes activity if any part here has computed something since the last look.
    fn note_activity(&mut self) {
        let parts = self.parts.values().map(|hosted| match hosted {
            Hosted::Ready { part, .. } => part.gauges.steps.load(Relaxed),
            _ => 0,
        });
        let driven = self.driver.as_ref().map(|d| d.engine().load().totals.steps);
        let steps = parts.sum::<u64>() + driven.unwrap_or(0);
        if steps != self.steps {
            self.steps = steps;
            self.rings.note_activity();
        }
    }

    /// Takes in the members of a ring.
    async fn configure(&mut self, ring: Ring) {
        let newer = ring.epoch > self.ring.epoch;
        if !newer && ring.epoch < self.ring.epoch {
            return;
        }
        tracing::info!(
            ring = format!("{:x}", self.id),
            epoch = ring.epoch,
            model = ring.model,
            stages = ring.stages.len(),
            reason = ring.reason,
            "ring"
        );
        let own = self.rings.node_id();
        let holds = |seat: &Option<NodeAddr>| seat.as_ref().is_some_and(|seat| seat.node_id == own);
        let wanted: Vec<u32> = (0..)
            .zip(&ring.stages)
            .filter(|(_, stage)| holds(&stage.member) || holds(&stage.standby))
            .map(|(index, _)| index)
            .collect();
        let last = ring.stages.len() as u32 - 1;
        let drives = ring.stages.last().is_some_and(|stage| holds(&stage.member));
        let alone = ring.stages.iter().all(|stage| holds(&stage.member));
        self.rings.set_alone(self.id, alone);
        let seats = |ring: &Ring| -> Vec<Option<String>> {
            let stages = ring.stages.iter();
            let node = |stage: &RingStage| stage.member.as_ref().map(|seat| seat.node_id.clone());
            stages.map(node).collect()
        };
        if newer
            && seats(&ring) == seats(&self.ring)
            && let Some(peers) = self.rings.peers()
        {
            // The same members once more: their links have to be renewed.
            for node_id in seats(&ring).into_iter().flatten() {
                peers.forget(&node_id);
            }
        }
        self.ring = ring;
        // First drop the parts that are no longer needed: there may be no room for both.
        self.parts.retain(|stage, _| wanted.contains(stage));
        if !drives && let Some(driver) = self.driver.take() {
            self.rings.withdraw(self.id);
            driver.end(RequestError::Moved {
                reason: self.ring.reason.clone(),
            });
            self.parts.remove(&last);
        }
        if newer {
            self.epoch = EpochStreams::default();
            self.suspects.clear();
            self.warming_up = None;
        }
        for stage in wanted {
            if !matches!(
                self.parts.get(&stage),
                Some(Hosted::Loading(_) | Hosted::Ready { .. } | Hosted::Driving(_))
            ) {
                self.load(stage);
            }
        }
        let parts = &self.parts;
        self.epoch
            .begun
            .retain(|stage, _| parts.contains_key(stage));
        self.begin_ready_parts().await;
        self.mirror();
    }

    fn load(&mut self, stage: u32) {
        let Some(layers) = self.layers(stage) else {
            return;
        };
        let progress = Arc::new(Progress::default());
        self.parts.insert(stage, Hosted::Loading(progress.clone()));
        let (shard, config) = (self.shard.clone(), self.rings.config.clone());
        let (slots, context) = (self.ring.slots, self.ring.context);
        let planned = self.ring.stages.get(stage as usize);
        let format = planned.map_or_else(String::new, |stage| stage.format.clone());
        let models = self.rings.models.clone();
        self.loads.spawn(async move {
            if let Err(error) = shard.fetch(layers.clone(), &models, &progress).await {
                return (stage, Err(error));
            }
            let started = Instant::now();
            let loaded = tokio::task::spawn_blocking(move || {
                let _working = progress.works_here();
                let part = shard.load(layers, &format, slots, context, &config)?;
                let weight_bytes = part.info().weight_bytes;
                let seconds = started.elapsed().as_secs_f32();
                Ok((
                    part,
                    LoadedAs {
                        seconds,
                        weight_bytes,
                    },
                ))
            });
            let result = loaded.await.unwrap_or_else(|error| Err(error.to_string()));
            (stage, result)
        });
    }

    async fn take_loaded(&mut self, (stage, result): Loaded) {
        if !matches!(self.parts.get(&stage), Some(Hosted::Loading(_))) {
            // Giving its memory back takes a while.
            tokio::task::spawn_blocking(move || drop(result));
            return;
        }
        let hosted = match result {
            Ok((part, loaded)) => {
                tracing::info!(
                    ring = format!("{:x}", self.id),
                    stage,
                    layers = ?part.info().layers,
                    seconds = loaded.seconds,
                    "part loaded"
                );
                match PartHandle::start(part) {
                    Ok(part) => Hosted::Ready { part, loaded },
                    Err(error) => Hosted::Failed(format!("no thread for it: {error}")),
                }
            }
            Err(error) => {
                tracing::error!(
                    ring = format!("{:x}", self.id),
                    stage,
                    error,
                    "part not loaded"
                );
                Hosted::Failed(error)
            }
        };
        self.parts.insert(stage, hosted);
        self.begin_ready_parts().await;
        self.mirror();
    }

    /// Begins the current epoch with the parts that are ready and have not begun it.
    async fn begin_ready_parts(&mut self) {
        let stages = self.ring.stages.len() as u32;
        for stage in 0..stages {
            if self.epoch.begun.contains_key(&stage) {
                continue;
            }
            let is_member = self.is_own(self.ring.stages[stage as usize].member.as_ref());
            match self.parts.get(&stage) {
                Some(Hosted::Ready { part, .. }) if !is_member || stage + 1 < stages => {
                    let part = part.clone();
                    self.begin_part(stage, &part, is_member);
                }
                Some(Hosted::Ready { part, loaded }) => {
                    let (part, loaded) = (part.clone(), *loaded);
                    if let Some(part) = part.take().await {
                        self.start_driver(stage, part, loaded);
                    }
                }
                Some(Hosted::Driving(_)) => self.begin_driver(stage),
                _ => {}
            }
        }
        for (hello, peer, stream) in std::mem::take(&mut self.waiting) {
            self.take_stream(hello, peer, stream);
        }
    }

    fn begin_part(&mut self, stage: u32, part: &PartHandle, is_member: bool) {
        let epoch = self.ring.epoch;
        let (next, rows) = mpsc::unbounded_channel();
        let (driver, outcomes) = mpsc::unbounded_channel();
        let (previous, back) = mpsc::unbounded_channel();
        let counters = Arc::new(Counters::default());
        part.tell(Command::Begin {
            epoch,
            stage,
            half_rows: self.ring.half_rows,
            outboxes: Outboxes {
                next,
                driver,
                previous,
            },
            counters: counters.clone(),
        });
        self.epoch.begun.insert(
            stage,
            Inbound {
                counters,
                back: Some(back),
                outcomes: Some(outcomes),
            },
        );
        if is_member {
            let part = part.clone();
            self.open(stage + 1, RingPurpose::Rows, "rows", move |stream| {
                streams::rows_out(stream, part, rows)
            });
        }
    }

    fn start_driver(&mut self, stage: u32, part: StageReplica, loaded: LoadedAs) {
        let config = self.rings.config.scheduler();
        let model = &self.shard.model;
        match DriverHandle::start(part, &self.ring, model, config, self.notices.clone()) {
            Ok(driver) => {
                self.driver = Some(driver);
                self.parts.insert(stage, Hosted::Driving(loaded));
                self.begin_driver(stage);
            }
            Err(error) => {
                self.parts.insert(stage, Hosted::Failed(error.to_string()));
            }
        }
    }

    fn begin_driver(&mut self, stage: u32) {
        let Some(driver) = self.driver.clone() else {
            return;
        };
        let mut members = Vec::new();
        let mut flows = Vec::new();
        for _ in 0..stage {
            let (member, orders) = mpsc::unbounded_channel();
            members.push(member);
            flows.push(orders);
        }
        let (previous, back) = mpsc::unbounded_channel();
        let (echo, mut pings) = mpsc::unbounded_channel();
        let half_rows = self.ring.half_rows;
        driver.begin_epoch(self.ring.epoch, half_rows, members, previous, echo);
        let pinged = driver.clone();
        // On this thread, behind all that comes from the network and all that goes there.
        self.epoch.echo = Some(AbortOnDropHandle::new(tokio::spawn(async move {
            while let Some(nonce) = pings.recv().await {
                pinged.tell(DriverEvent::Echo(nonce));
            }
        })));
        self.epoch.begun.insert(
            stage,
            Inbound {
                back: Some(back),
                ..Inbound::default()
            },
        );
        for (member, orders) in (0..).zip(flows) {
            let driver = driver.clone();
            self.open(member, RingPurpose::Drive, "drive", move |stream| {
                streams::drive_out(stream, member, driver, orders)
            });
        }
    }

    /// Opens a stream to the member of `stage` and serves it for the rest of the epoch.
    fn open<F>(
        &mut self,
        stage: u32,
        purpose: RingPurpose,
        what: &'static str,
        serve: impl FnOnce(MsgStream) -> F + Send + 'static,
    ) where
        F: Future<Output = Broken> + Send,
    {
        let Some(seat) = self
            .ring
            .stages
            .get(stage as usize)
            .and_then(|stage| stage.member.clone())
        else {
            return;
        };
        let hello = self.hello(stage, purpose);
        let Some(peers) = self.rings.peers() else {
            return;
        };
        let epoch = self.ring.epoch;
        self.epoch.tasks.spawn(async move {
            let reason = match streams::open(&peers, &seat, &hello).await {
                // The link is held for as long as the stream: nothing else may keep it.
                Ok((_link, stream)) => serve(stream).await,
                Err(error) => error,
            };
            Ended {
                epoch,
                peer: Some(seat),
                what,
                reason,
            }
        });
    }

    /// Mirrors each member's part here to the standby that the head names, and to no other.
    fn mirror(&mut self) {
        let mut mirrors = std::mem::take(&mut self.epoch.mirrors);
        let stages = self.ring.stages.clone();
        for (stage, planned) in (0..).zip(&stages) {
            let target = match self.parts.get(&stage) {
                Some(Hosted::Ready { part, .. }) if self.is_own(planned.member.as_ref()) => {
                    Target::Part(part.clone())
                }
                Some(Hosted::Driving(_)) => match &self.driver {
                    Some(driver) => Target::Driver(driver.clone()),
                    None => continue,
                },
                _ => continue,
            };
            let running = mirrors.remove(&stage);
            let Some(seat) = &planned.standby else {
                if running.is_some() {
                    stop_mirroring(&target);
                }
                continue;
            };
            if let Some((to, task)) = running
                && to == *seat
            {
                self.epoch.mirrors.insert(stage, (to, task));
                continue;
            }
            let hello = self.hello(stage, RingPurpose::Mirror);
            let Some(peers) = self.rings.peers() else {
                continue;
            };
            let task = tokio::spawn(keep_mirroring(peers, seat.clone(), hello, target));
            self.epoch
                .mirrors
                .insert(stage, (seat.clone(), AbortOnDropHandle::new(task)));
        }
    }

    /// A stream that the node `peer` opened.
    fn take_stream(&mut self, hello: RingHello, peer: String, stream: MsgStream) {
        if hello.epoch < self.ring.epoch {
            return streams::refuse(stream);
        }
        let ready = hello.epoch == self.ring.epoch && self.epoch.begun.contains_key(&hello.stage);
        if !ready {
            if self.waiting.len() < WAITING {
                self.waiting.push((hello, peer, stream));
            }
            return;
        }
        let stages = &self.ring.stages;
        let from = match hello.purpose() {
            RingPurpose::Rows => hello.stage.checked_sub(1),
            RingPurpose::Drive => stages.len().checked_sub(1).map(|last| last as u32),
            RingPurpose::Mirror => Some(hello.stage),
            RingPurpose::Unspecified => None,
        };
        let expected = from
            .and_then(|stage| stages.get(stage as usize))
            .and_then(|stage| stage.member.clone());
        if expected.as_ref().is_none_or(|seat| seat.node_id != peer) {
            tracing::warn!(peer, ?hello, "this node has no such place in the ring");
            return streams::refuse(stream);
        }
        let Some(inbound) = self.epoch.begun.get_mut(&hello.stage) else {
            return;
        };
        let counters = inbound.counters.clone();
        let target = match (self.parts.get(&hello.stage), &self.driver) {
            (Some(Hosted::Ready { part, .. }), _) => Target::Part(part.clone()),
            (Some(Hosted::Driving(_)), Some(driver)) => Target::Driver(driver.clone()),
            _ => return streams::refuse(stream),
        };
        let epoch = hello.epoch;
        let peer = expected;
        match (hello.purpose(), target) {
            (RingPurpose::Rows, target) => {
                let Some(back) = inbound.back.take() else {
                    return streams::refuse(stream);
                };
                self.epoch.tasks.spawn(async move {
                    Ended {
                        epoch,
                        peer,
                        what: "rows",
                        reason: streams::rows_in(stream, target, counters, back).await,
                    }
                });
            }
            (RingPurpose::Drive, Target::Part(part)) => {
                let Some(outcomes) = inbound.outcomes.take() else {
                    return streams::refuse(stream);
                };
                self.epoch.tasks.spawn(async move {
                    Ended {
                        epoch,
                        peer,
                        what: "drive",
                        reason: streams::drive_in(stream, part, counters, outcomes).await,
                    }
                });
            }
            (RingPurpose::Mirror, Target::Part(part)) => {
                self.epoch.tasks.spawn(async move {
                    Ended {
                        epoch,
                        peer: None,
                        what: "mirror",
                        reason: streams::mirror_in(stream, part).await,
                    }
                });
            }
            _ => streams::refuse(stream),
        }
    }

    fn take_notice(&mut self, notice: Notice) {
        match notice {
            Notice::Running { epoch } if epoch == self.ring.epoch => self.ring_runs(),
            Notice::Warm { epoch } if epoch == self.ring.epoch => {
                if let Some(driver) = self.driver.clone() {
                    self.serve(&driver, epoch);
                }
            }
            Notice::Running { .. } | Notice::Warm { .. } => {}
            Notice::Suspect {
                stage,
                reason,
                link,
            } => {
                if let Some(seat) = self.seat(stage) {
                    self.suspect(&seat, &reason, link, false);
                }
            }
            Notice::Trust { stage } => {
                if let Some(seat) = self.seat(stage) {
                    self.trust(&seat);
                }
            }
            Notice::Recovered(recovery) => {
                tracing::info!(
                    ring = format!("{:x}", self.id),
                    gap_ms = recovery.gap_us as f64 / 1e3,
                    rows = recovery.rows,
                    "recovered"
                );
                self.recovery = Some(recovery);
            }
        }
    }

    /// All members are there. A ring that has never worked answers once first, which also measures its speed;
    /// one that comes back from a loss has clients that wait.
    fn ring_runs(&mut self) {
        let Some(driver) = self.driver.clone() else {
            return;
        };
        let epoch = self.ring.epoch;
        if epoch > 1 {
            return self.serve(&driver, epoch);
        }
        let (engine, name) = (driver.engine(), self.ring.model.clone());
        let (tokenizer, notices) = (self.shard.model.clone(), self.notices.clone());
        let warm = tokio::spawn(async move {
            let warmed =
                tokio::task::spawn_blocking(move || warm_up(&engine, &name, tokenizer.tokenizer()));
            match warmed.await {
                Ok(Ok(())) => {
                    let _ = notices.send(Notice::Warm { epoch });
                }
                Ok(Err(error)) => tracing::warn!(%error, "the ring gave no token"),
                Err(_) => {}
            }
        });
        self.warming_up = Some(AbortOnDropHandle::new(warm));
    }

    fn serve(&mut self, driver: &DriverHandle, epoch: u32) {
        self.serving = epoch;
        self.rings.serve(Served {
            ring: self.id,
            model: self.shard.model.clone(),
            engine: driver.engine(),
            card: self.card(driver),
        });
    }

    fn card(&self, driver: &DriverHandle) -> ModelCard {
        let load = driver.engine().load();
        ModelCard {
            context: self.ring.context,
            slots: self.ring.slots,
            decode_tps: load.decode_tps,
            prefill_tps: load.prefill_tps,
            layer_start: 0,
            layer_end: driver.engine().info().shape.layers,
            keeps_text: self.shard.model.keeps_text(),
            ..self.shard.card.clone()
        }
    }

    fn take_ended(&mut self, ended: Ended) {
        if ended.epoch != self.ring.epoch {
            return;
        }
        let Ended { what, reason, .. } = ended;
        match ended.peer {
            Some(seat) if reason.link => {
                self.suspect(&seat, &format!("{what}: {}", reason.text), true, true);
            }
            // The other side is in another epoch already, or will dial again; silence would show in its
            // pulse.
            _ => tracing::debug!(what, reason = reason.text, "stream ended"),
        }
    }

    fn suspect(&mut self, seat: &NodeAddr, reason: &str, severed: bool, closed: bool) {
        if self.is_own(Some(seat)) {
            return;
        }
        let mut known = self.suspects.iter_mut();
        if let Some(known) = known.find(|suspect| suspect.node_id == seat.node_id) {
            known.severed |= severed;
            known.closed |= closed;
            return;
        }
        tracing::warn!(
            ring = format!("{:x}", self.id),
            epoch = self.ring.epoch,
            member = seat.name,
            reason,
            "a member of the ring does not answer"
        );
        self.suspects.push(Suspect {
            node_id: seat.node_id.clone(),
            severed,
            closed,
        });
    }

    /// A member that was silent has been heard again.
    fn trust(&mut self, seat: &NodeAddr) {
        let before = self.suspects.len();
        self.suspects
            .retain(|suspect| suspect.node_id != seat.node_id || suspect.closed);
        if self.suspects.len() < before {
            tracing::info!(
                ring = format!("{:x}", self.id),
                member = seat.name,
                "the member answers again"
            );
        }
    }

    fn seat(&self, stage: u32) -> Option<NodeAddr> {
        self.ring.stages.get(stage as usize)?.member.clone()
    }

    fn dissolve(&mut self, reason: &str) {
        tracing::info!(ring = format!("{:x}", self.id), reason, "ring dissolved");
        self.rings.withdraw(self.id);
        if let Some(driver) = self.driver.take() {
            let reason = reason.to_owned();
            driver.end(if reason.starts_with("moved") {
                RequestError::Moved { reason }
            } else {
                RequestError::RingLost { reason }
            });
        }
        self.rings.forget(self.id, &self.own);
    }

    /// Reports changes to the head, at most four times a second unless a change is urgent.
    fn report(&mut self) {
        if self.ring.epoch == 0 {
            return;
        }
        let state = self.state();
        let now = Instant::now();
        let due = match &self.reported {
            None => true,
            Some((last, _)) if urgent(last, &state) => true,
            Some((last, at)) => *last != state && now.duration_since(*at) >= REPORT_INTERVAL,
        };
        if due {
            self.rings.report(&state);
            self.recovery = None;
            self.reported = Some((
                RingState {
                    recovery: None,
                    ..state
                },
                now,
            ));
        }
    }

    fn state(&self) -> RingState {
        let serving = self.serving == self.ring.epoch;
        let parts = self.parts.iter().map(|(&stage, hosted)| {
            let planned = self.ring.stages.get(stage as usize);
            let standby = !self.is_own(planned.and_then(|stage| stage.member.as_ref()));
            let mut state = PartState {
                stage,
                standby,
                phase: PartPhase::Ready.into(),
                ..PartState::default()
            };
            match hosted {
                Hosted::Loading(progress) => {
                    state.phase = PartPhase::Loading.into();
                    state.progress = progress.value();
                }
                Hosted::Failed(error) => {
                    state.phase = PartPhase::Failed.into();
                    state.error.clone_from(error);
                }
                Hosted::Ready { part, .. } if part.gauges.broken.load(Relaxed) => {
                    state.phase = PartPhase::Failed.into();
                    state.error = "a step panicked; see the worker's log".to_owned();
                }
                Hosted::Ready { part, loaded } => {
                    (state.load_seconds, state.weight_bytes) =
                        (loaded.seconds, loaded.weight_bytes);
                    state.lag_rows = part.gauges.lag.load(Relaxed);
                    state.step_us = part.gauges.step_us.load(Relaxed) as f32;
                    state.prefill_us = part.gauges.prefill_us.load(Relaxed);
                    state.kv_bytes = part.gauges.kv_bytes.load(Relaxed);
                    state.kept_bytes = part.gauges.kept_bytes.load(Relaxed);
                }
                Hosted::Driving(loaded) => {
                    (state.load_seconds, state.weight_bytes) =
                        (loaded.seconds, loaded.weight_bytes);
                    if let Some(driver) = &self.driver {
                        let gauges = driver.gauges();
                        state.lag_rows = gauges.lag;
                        state.step_us = gauges.step_us;
                        state.prefill_us = gauges.prefill_us;
                        state.kv_bytes = gauges.kv_bytes;
                    }
                }
            }
            state
        });
        RingState {
            ring: self.id,
            epoch: self.ring.epoch,
            parts: parts.collect(),
            serving,
            card: self
                .driver
                .as_ref()
                .filter(|_| serving)
                .map(|driver| self.card(driver)),
            suspects: self.suspects.iter().map(|s| s.node_id.clone()).collect(),
            severed: self
                .suspects
                .iter()
                .filter(|suspect| suspect.severed)
                .map(|suspect| suspect.node_id.clone())
                .collect(),
            recovery: self.recovery.clone(),
        }
    }

    fn layers(&self, stage: u32) -> Option<std::ops::Range<u32>> {
        let stage = self.ring.stages.get(stage as usize)?;
        Some(stage.layer_start..stage.layer_end)
    }

    fn is_own(&self, seat: Option<&NodeAddr>) -> bool {
        seat.is_some_and(|seat| seat.node_id == self.rings.node_id())
    }

    fn hello(&self, stage: u32, purpose: RingPurpose) -> RingHello {
        RingHello {
            ring: self.id,
            epoch: self.ring.epoch,
            stage,
            purpose: purpose.into(),
        }
    }
}

/// Mirrors to a standby, and begins again when that breaks: the standby may still be loading, or have lost
/// step. Whether it is still the right one is for the head to say.
async fn keep_mirroring(
    peers: super::peers::Peers,
    seat: NodeAddr,
    hello: RingHello,
    target: Target,
) {
    loop {
        let reason = match streams::open(&peers, &seat, &hello).await {
            Ok((_link, stream)) => streams::mirror_out(stream, target.clone()).await,
            Err(error) => error,
        };
        tracing::debug!(standby = seat.name, reason = reason.text, "not mirrored");
        stop_mirroring(&target);
        tokio::time::sleep(MIRROR_PAUSE).await;
    }
}

fn stop_mirroring(target: &Target) {
    match target {
        Target::Part(part) => part.tell(Command::NoStandby),
        Target::Driver(driver) => driver.no_standby(),
    }
}

/// Returns true if the head should hear of the change at once.
fn urgent(last: &RingState, state: &RingState) -> bool {
    let phases = |state: &RingState| -> Vec<(u32, bool, i32)> {
        let parts = state.parts.iter();
        parts.map(|p| (p.stage, p.standby, p.phase)).collect()
    };
    last.epoch != state.epoch
        || last.serving != state.serving
        || last.suspects != state.suspects
        || last.severed != state.severed
        || state.recovery.is_some()
        || phases(last) != phases(state)
}

const REPORT_INTERVAL: Duration = Duration::from_millis(250);
const MIRROR_PAUSE: Duration = Duration::from_millis(250);

/// Streams that wait for their epoch at once.
const WAITING: usize = 64;
