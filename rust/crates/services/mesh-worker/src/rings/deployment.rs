//! One ring on this worker: carries out what the core's deployment wants, and tells it what comes of that.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use mesh_engine::RequestError;
use mesh_net::quic::MsgStream;
use mesh_pipeline::{DriverOut, StageReplica};
use mesh_proto::{ModelCard, PartState, Ring};
use mesh_worker_core::{LoadedPart, RingStep};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::context::{Rings, Served};
use super::driver::{DriverHandle, Notice};
use super::epoch::Epoch;
use super::part::PartHandle;
use super::progress::Progress;
use super::ring_model::RingModel;
use super::streams::{self, Target};
use crate::codec::ModelEngine;
use crate::generate::load::warm_up;
use crate::peers::Peers;

/// Runs a ring's parts on this worker until the core's deployment ends.
pub(super) struct Deployment {
    /// Of the core's deployment.
    number: u64,
    rings: Arc<Rings>,
    peers: Peers,
    ring_model: Arc<RingModel>,
    /// As the head last named it.
    ring: Ring,
    parts: BTreeMap<u32, LocalPart>,
    driver: Option<DriverHandle>,
    notices: mpsc::UnboundedSender<Notice>,
    loads: JoinSet<LoadEnd>,
    epoch: Epoch,
    warming_up: Option<AbortOnDropHandle<()>>,
    /// Steps of all parts here at the last look, and the time of the next one.
    steps: (u64, Instant),
}

enum LocalPart {
    Loading(Arc<Progress>),
    Ready(PartHandle),
}

/// Number of the load, stage, and result.
type LoadEnd = (u64, u32, Result<(StageReplica, LoadedPart), String>);

impl Deployment {
    /// Starts the task of the core's deployment with this number on the thread of the carrier.
    pub(super) fn spawn(
        carrier: &Handle,
        peers: Peers,
        rings: Arc<Rings>,
        ring_model: Arc<RingModel>,
        number: u64,
    ) {
        let (notices, noticed) = mpsc::unbounded_channel();
        let deployment = Deployment {
            number,
            rings,
            peers,
            ring_model,
            ring: Ring::default(),
            parts: BTreeMap::new(),
            driver: None,
            notices,
            loads: JoinSet::new(),
            epoch: Epoch::default(),
            warming_up: None,
            steps: (0, Instant::now()),
        };
        carrier.spawn(deployment.run(noticed));
    }

    async fn run(mut self, mut notices: mpsc::UnboundedReceiver<Notice>) {
        let mut changes = self.rings.core().changes();
        loop {
            let until = match self.poll() {
                RingStep::Wait(until) => until,
                RingStep::End => {
                    self.rings.withdraw(self.number);
                    return;
                }
                step => {
                    self.carry_out(step).await;
                    continue;
                }
            };
            tokio::select! {
                () = changes.next_until(until) => {}
                Some(notice) = notices.recv() => self.take_notice(notice),
                Some(loaded) = self.loads.join_next() => {
                    if let Ok(loaded) = loaded {
                        self.take_loaded(loaded);
                    }
                }
                Some(ended) = self.epoch.streams.join_next() => {
                    if let Ok(ended) = ended {
                        self.tell(|core| core.stream_ended(ended));
                    }
                }
            }
            self.note_activity();
        }
    }

    fn poll(&mut self) -> RingStep<MsgStream> {
        let (step, ring) = self.rings.core().with(|core| {
            let measured = |stage| self.measured(stage);
            let card = || self.driver.as_ref().map(|driver| self.card(driver));
            let deployments = &mut core.deployments;
            deployments.poll(self.number, Instant::now(), measured, card)
        });
        self.ring = ring;
        step
    }

    /// Tells the core's deployment something; `None` if that has ended.
    fn tell<T>(
        &self,
        event: impl FnOnce(&mut mesh_worker_core::Deployment<MsgStream>) -> T,
    ) -> Option<T> {
        let core = self.rings.core();
        core.with(|core| core.deployments.get(self.number).map(event))
    }

    async fn carry_out(&mut self, step: RingStep<MsgStream>) {
        match step {
            RingStep::Load {
                number,
                stage,
                layers,
                format,
            } => self.load(number, stage, layers, format),
            RingStep::Unload(stage) => {
                self.parts.remove(&stage);
            }
            RingStep::EndDriver { reason, moved } => {
                if let Some(driver) = self.driver.take() {
                    driver.end(match moved {
                        true => RequestError::Moved { reason },
                        false => RequestError::RingLost { reason },
                    });
                }
            }
            RingStep::Redial(nodes) => nodes.iter().for_each(|node| self.peers.forget(node)),
            RingStep::EndStreams => {
                self.epoch = Epoch::default();
                self.warming_up = None;
            }
            RingStep::BeginPart { stage, member } => {
                if let Some(LocalPart::Ready(part)) = self.parts.get(&stage) {
                    let (peers, ring) = (&self.peers, &self.ring);
                    self.epoch.begin_part(peers, ring, stage, part, member);
                }
            }
            RingStep::StartDriver(stage) => self.start_driver(stage).await,
            RingStep::BeginDriver(stage) => {
                if let Some(driver) = &self.driver {
                    let (peers, ring) = (&self.peers, &self.ring);
                    self.epoch.begin_driver(peers, ring, stage, driver);
                }
            }
            RingStep::Replicate(stage, standby) => {
                if let Some(target) = self.target(stage) {
                    let peers = self.peers.clone();
                    self.epoch
                        .replicate(&self.ring, stage, target, peers, standby);
                }
            }
            RingStep::Accept {
                stream,
                hello,
                from,
            } => match self.target(hello.stage) {
                Some(target) => self.epoch.accept(stream, &hello, from, target),
                None => streams::refuse(stream),
            },
            RingStep::Refuse(stream) => streams::refuse(stream),
            RingStep::WarmUp => self.warm_up(),
            RingStep::Serve => self.serve(),
            RingStep::Withdraw => self.rings.withdraw(self.number),
            RingStep::Report(state) => self.rings.report(&state),
            RingStep::Wait(_) | RingStep::End => {}
        }
    }

    /// Notes activity if any part here has computed something since the last look.
    fn note_activity(&mut self) {
        let now = Instant::now();
        if now < self.steps.1 {
            return;
        }
        let parts = self.parts.values().map(|part| match part {
            LocalPart::Ready(part) => part.gauges.steps.load(Relaxed),
            LocalPart::Loading(_) => 0,
        });
        let driven = self.driver.as_ref().map(|d| d.engine().load().totals.steps);
        let steps = parts.sum::<u64>() + driven.unwrap_or(0);
        if steps != self.steps.0 {
            self.rings.core().with(|core| core.deployments.active(now));
        }
        self.steps = (steps, now + ACTIVITY_LOOK);
    }

    fn load(&mut self, number: u64, stage: u32, layers: std::ops::Range<u32>, format: String) {
        let progress = Arc::new(Progress::default());
        self.parts
            .insert(stage, LocalPart::Loading(progress.clone()));
        let (ring_model, config) = (self.ring_model.clone(), self.rings.config.clone());
        let (slots, context) = (self.ring.slots, self.ring.context);
        let models = self.rings.models.clone();
        self.loads.spawn(async move {
            if let Err(error) = ring_model.fetch(layers.clone(), &models, &progress).await {
                return (number, stage, Err(error));
            }
            let started = Instant::now();
            let loaded = tokio::task::spawn_blocking(move || {
                let _working = progress.works_here();
                let part = ring_model.load(layers, &format, slots, context, &config)?;
                let loaded = LoadedPart {
                    seconds: started.elapsed().as_secs_f32(),
                    weight_bytes: part.info().weight_bytes,
                };
                Ok((part, loaded))
            });
            let result = loaded.await.unwrap_or_else(|error| Err(error.to_string()));
            (number, stage, result)
        });
    }

    fn take_loaded(&mut self, (load, stage, result): LoadEnd) {
        let started = result.and_then(|(part, loaded)| {
            let part = PartHandle::start(part);
            let part = part.map_err(|error| format!("no thread for it: {error}"))?;
            Ok((part, loaded))
        });
        let (part, result) = match started {
            Ok((part, loaded)) => (Some(part), Ok(loaded)),
            Err(error) => (None, Err(error)),
        };
        let needed = self.tell(|core| core.loaded(load, stage, result));
        match part {
            Some(part) if needed == Some(true) => {
                self.parts.insert(stage, LocalPart::Ready(part));
            }
            // Giving its memory back takes a while.
            part => drop(tokio::task::spawn_blocking(move || drop(part))),
        }
    }

    async fn start_driver(&mut self, stage: u32) {
        let taken = match self.parts.get(&stage) {
            Some(LocalPart::Ready(part)) => part.take().await,
            _ => None,
        };
        let config = self.rings.config.scheduler();
        let model = &self.ring_model.model;
        let started = taken
            .ok_or_else(|| STEP_PANICKED.to_owned())
            .and_then(|part| {
                let notices = self.notices.clone();
                let started = DriverHandle::start(part, &self.ring, model, config, notices);
                started.map_err(|error| error.to_string())
            });
        let result = started.map(|driver| self.driver = Some(driver));
        self.tell(|core| core.driver_started(stage, result));
    }

    fn target(&self, stage: u32) -> Option<Target> {
        let is_last = stage as usize + 1 == self.ring.stages.len();
        match (self.parts.get(&stage)?, &self.driver) {
            (_, Some(driver)) if is_last => Some(Target::Driver(driver.clone())),
            (LocalPart::Ready(part), _) => Some(Target::Part(part.clone())),
            (LocalPart::Loading(_), _) => None,
        }
    }

    fn take_notice(&mut self, notice: Notice) {
        self.tell(|core| match notice {
            Notice::Warm { epoch } => core.warm(epoch),
            Notice::Driver(DriverOut::Running { epoch }) => core.running(epoch),
            Notice::Driver(DriverOut::Trust { stage }) => core.heard(stage),
            Notice::Driver(DriverOut::Recovered(recovery)) => core.recovered(recovery),
            Notice::Driver(DriverOut::Suspect(suspicion)) => {
                let seconds = suspicion.silence.as_secs_f64();
                let reason = match suspicion.link {
                    true => format!("nothing has passed its link for {seconds:.1} s"),
                    false => format!("silent for {seconds:.1} s"),
                };
                core.silent(suspicion.stage, &reason, suspicion.link);
            }
            Notice::Driver(_) => {}
        });
    }

    fn warm_up(&mut self) {
        let Some(driver) = &self.driver else {
            return;
        };
        let epoch = self.ring.epoch;
        let (engine, name) = (driver.engine(), self.ring.model.clone());
        let (model, notices) = (self.ring_model.model.clone(), self.notices.clone());
        let warm = tokio::spawn(async move {
            let warmed =
                tokio::task::spawn_blocking(move || warm_up(&engine, &name, model.tokenizer()));
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

    fn serve(&self) {
        if let Some(driver) = &self.driver {
            self.rings.serve(Served {
                deployment: self.number,
                model: ModelEngine {
                    model: self.ring_model.model.clone(),
                    engine: driver.engine(),
                },
                card: self.card(driver),
            });
        }
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
            keeps_text: self.ring_model.model.keeps_text(),
            ..self.ring_model.card.clone()
        }
    }

    /// Progress and figures of a part here.
    fn measured(&self, stage: u32) -> PartState {
        match (self.target(stage), self.parts.get(&stage)) {
            (Some(Target::Driver(driver)), _) => {
                let gauges = driver.gauges();
                PartState {
                    lag_rows: gauges.lag,
                    step_us: gauges.step_us,
                    prefill_us: gauges.prefill_us,
                    kv_bytes: gauges.kv_bytes,
                    ..PartState::default()
                }
            }
            (Some(Target::Part(part)), _) => PartState {
                error: match part.is_broken() {
                    true => STEP_PANICKED.to_owned(),
                    false => String::new(),
                },
                lag_rows: part.gauges.lag.load(Relaxed),
                step_us: part.gauges.step_us.load(Relaxed) as f32,
                prefill_us: part.gauges.prefill_us.load(Relaxed),
                kv_bytes: part.gauges.kv_bytes.load(Relaxed),
                kept_bytes: part.gauges.kept_bytes.load(Relaxed),
                ..PartState::default()
            },
            (None, Some(LocalPart::Loading(progress))) => PartState {
                progress: progress.value(),
                ..PartState::default()
            },
            (None, _) => PartState::default(),
        }
    }
}

const STEP_PANICKED: &str = "a step panicked; see the worker's log";

/// Interval at which it is noted whether parts compute.
const ACTIVITY_LOOK: Duration = Duration::from_millis(250);
