//! One ring as this worker sees it: which parts it loads, how they are connected in every epoch, and what the
//! head hears of them.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

use mesh_proto::{
    ModelCard, NodeAddr, PartPhase, PartState, Recovery, Ring, RingHello, RingPurpose, RingState,
};

/// What a deployment wants done next. The steps are carried out in this order; [`RingStep::StartDriver`]
/// reports its result before the next step is asked for.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the variants' comments name the fields")]
pub enum RingStep<S> {
    /// Load these layers as this stage, in the weight format of that name or, if it is empty, in the one of
    /// choice; the number comes back with the result.
    Load {
        number: u64,
        stage: u32,
        layers: Range<u32>,
        format: String,
    },
    /// Let go of this stage's part: there may be no room for it and others.
    Unload(u32),
    /// End the driver and its requests; they go on elsewhere if the ring `moved`.
    EndDriver { reason: String, moved: bool },
    /// Make new links to these nodes.
    Redial(Vec<String>),
    /// End the streams of the epoch before.
    EndStreams,
    /// Begin the epoch with this stage's part; a `member` opens the stream of rows to the next stage.
    BeginPart { stage: u32, member: bool },
    /// Make a driver of the last stage's part.
    StartDriver(u32),
    /// Begin the epoch with the driver, the last stage.
    BeginDriver(u32),
    /// Replicate the part of this stage to this standby, or to none any more.
    Replicate(u32, Option<NodeAddr>),
    /// Serve this stream, which `from` opened and which begins with `hello`.
    Accept {
        stream: S,
        hello: RingHello,
        from: NodeAddr,
    },
    /// This stream leads nowhere.
    Refuse(S),
    /// Let the driver answer once.
    WarmUp,
    /// Take requests for the ring's model.
    Serve,
    /// Take none any more.
    Withdraw,
    /// Tell the head.
    Report(Box<RingState>),
    /// Nothing before that time, or before something changes.
    Wait(Instant),
    /// The ring is no longer deployed here: this was the last step.
    End,
}

/// A loaded part.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoadedPart {
    /// Time that loading took.
    pub seconds: f32,
    /// Bytes of weights in memory.
    pub weight_bytes: u64,
}

/// A stream that ended.
#[derive(Debug)]
pub struct StreamEnd {
    /// Epoch that it belonged to.
    pub epoch: u32,
    /// The member at its other end; `None` if its loss does not matter.
    pub peer: Option<NodeAddr>,
    /// Purpose, for people.
    pub purpose: &'static str,
    /// Cause, for people.
    pub reason: String,
    /// The link itself is gone, and with it probably the worker at its other end.
    pub link: bool,
}

/// A deployment of one ring.
pub struct Deployment<S> {
    pub(crate) id: u64,
    node_id: String,
    ring: Ring,
    parts: BTreeMap<u32, PartPlace>,
    next_load: u64,
    has_driver: bool,
    /// Parts that have begun this epoch, with the streams that they still take.
    begun: BTreeMap<u32, Inbound>,
    /// The standbys that parts here replicate to.
    standbys: BTreeMap<u32, NodeAddr>,
    /// Streams of an epoch that has not come here yet, or whose part is still being loaded.
    waiting: Vec<(RingHello, String, S)>,
    /// Epoch in which a token came back through every stage.
    serving: u32,
    suspects: Vec<Suspect>,
    recovery: Option<Recovery>,
    reported: Option<(RingState, Instant)>,
    queue: VecDeque<RingStep<S>>,
    ended: bool,
}

#[derive(Debug, Clone, PartialEq)]
enum PartPlace {
    Loading(u64),
    Failed(String),
    Ready(LoadedPart),
    /// The driver has it, or is about to.
    Driving(LoadedPart),
}

/// Streams to a part that have yet to come, each once in an epoch.
#[derive(Debug)]
struct Inbound {
    rows: bool,
    drive: bool,
}

/// A member that does not answer.
#[derive(Debug)]
struct Suspect {
    node_id: String,
    /// Nothing passes its link.
    severed: bool,
    /// The link itself is closed.
    closed: bool,
}

impl<S> Deployment<S> {
    pub(crate) fn new(id: u64, node_id: &str) -> Self {
        Deployment {
            id,
            node_id: node_id.to_owned(),
            ring: Ring::default(),
            parts: BTreeMap::new(),
            next_load: 0,
            has_driver: false,
            begun: BTreeMap::new(),
            standbys: BTreeMap::new(),
            waiting: Vec::new(),
            serving: 0,
            suspects: Vec::new(),
            recovery: None,
            reported: None,
            queue: VecDeque::new(),
            ended: false,
        }
    }

    pub(crate) fn ring(&self) -> &Ring {
        &self.ring
    }

    pub(crate) fn is_ended(&self) -> bool {
        self.ended
    }

    /// True if this worker runs every stage: then there is no other worker to hand the ring over to.
    pub(crate) fn is_alone(&self) -> bool {
        let mut stages = self.ring.stages.iter();
        !self.ring.stages.is_empty() && stages.all(|stage| self.is_own(stage.member.as_ref()))
    }

    /// The next step. `measured` has the progress and the figures of a stage's part here, and its error if a
    /// step panicked; `card` is the driver's description of the model.
    pub(crate) fn poll(
        &mut self,
        now: Instant,
        measured: impl Fn(u32) -> PartState,
        card: impl FnOnce() -> Option<ModelCard>,
    ) -> RingStep<S> {
        if let Some(step) = self.queue.pop_front() {
            return step;
        }
        if self.ended {
            return RingStep::End;
        }
        if let Some(state) = self.news(now, measured, card) {
            return RingStep::Report(Box::new(state));
        }
        RingStep::Wait(now + REPORT_INTERVAL)
    }

    /// The head names the members. Returns false if none of them is this worker any more.
    pub(crate) fn order(&mut self, ring: Ring) -> bool {
        let newer = ring.epoch > self.ring.epoch;
        if !newer && ring.epoch < self.ring.epoch {
            return true;
        }
        tracing::info!(
            ring = format!("{:x}", self.id),
            epoch = ring.epoch,
            model = ring.model,
            stages = ring.stages.len(),
            reason = ring.reason,
            "ring"
        );
        if newer && members(&ring) == members(&self.ring) {
            // The same members once more: their links have to be renewed.
            let nodes = members(&ring).into_iter().flatten().map(str::to_owned);
            self.queue.push_back(RingStep::Redial(nodes.collect()));
        }
        self.ring = ring;
        let stages = (0..).zip(&self.ring.stages);
        let own = stages.filter(|(_, stage)| {
            self.is_own(stage.member.as_ref()) || self.is_own(stage.standby.as_ref())
        });
        let own: Vec<u32> = own.map(|(index, _)| index).collect();
        // First drop the parts that are no longer needed: there may be no room for both.
        self.unload(|stage, _| !own.contains(&stage));
        let last = self.ring.stages.last();
        let drives = last.is_some_and(|stage| self.is_own(stage.member.as_ref()));
        if !drives {
            if self.has_driver {
                let reason = self.ring.reason.clone();
                self.end_driver(reason, true);
            }
            self.unload(|_, place| matches!(place, PartPlace::Driving(_)));
        }
        if newer {
            self.drop_old_steps();
            self.queue.push_back(RingStep::EndStreams);
            self.begun.clear();
            self.standbys.clear();
            self.suspects.clear();
        }
        for stage in own {
            if matches!(self.parts.get(&stage), None | Some(PartPlace::Failed(_))) {
                self.load(stage);
            }
        }
        let parts = &self.parts;
        self.begun.retain(|stage, _| parts.contains_key(stage));
        self.begin_ready();
        !self.parts.is_empty()
    }

    fn unload(&mut self, goes: impl Fn(u32, &PartPlace) -> bool) {
        let queue = &mut self.queue;
        self.parts.retain(|stage, place| {
            let goes = goes(*stage, place);
            if goes {
                queue.push_back(RingStep::Unload(*stage));
            }
            !goes
        });
    }

    /// Drops steps of the epoch before that have not begun.
    fn drop_old_steps(&mut self) {
        let steps = std::mem::take(&mut self.queue).into_iter();
        let kept = steps.filter_map(|step| match step {
            RingStep::BeginPart { .. }
            | RingStep::BeginDriver(_)
            | RingStep::Replicate(..)
            | RingStep::WarmUp
            | RingStep::Serve => None,
            RingStep::Accept { stream, .. } => Some(RingStep::Refuse(stream)),
            RingStep::StartDriver(stage) => self.is_driving(stage).then_some(step),
            RingStep::Load { stage, number, .. } => {
                let needed = self.parts.get(&stage) == Some(&PartPlace::Loading(number));
                needed.then_some(step)
            }
            step => Some(step),
        });
        self.queue = kept.collect();
    }

    fn load(&mut self, stage: u32) {
        let Some(planned) = self.ring.stages.get(stage as usize) else {
            return;
        };
        self.queue.push_back(RingStep::Load {
            number: self.next_load,
            stage,
            layers: planned.layer_start..planned.layer_end,
            format: planned.format.clone(),
        });
        self.parts.insert(stage, PartPlace::Loading(self.next_load));
        self.next_load += 1;
    }

    /// Result of [`RingStep::Load`]. Returns false if it is not needed any more.
    pub fn loaded(&mut self, number: u64, stage: u32, result: Result<LoadedPart, String>) -> bool {
        if self.ended || self.parts.get(&stage) != Some(&PartPlace::Loading(number)) {
            return false;
        }
        let ring = format!("{:x}", self.id);
        let place = match result {
            Ok(loaded) => {
                let planned = self.ring.stages.get(stage as usize);
                let layers = planned.map(|planned| planned.layer_start..planned.layer_end);
                let seconds = loaded.seconds;
                tracing::info!(ring, stage, ?layers, seconds, "part loaded");
                PartPlace::Ready(loaded)
            }
            Err(error) => {
                tracing::error!(ring, stage, error, "part not loaded");
                PartPlace::Failed(error)
            }
        };
        self.parts.insert(stage, place);
        self.begin_ready();
        true
    }

    /// Begins the current epoch with the parts that are ready and have not begun it.
    fn begin_ready(&mut self) {
        let last = self.ring.stages.len().saturating_sub(1) as u32;
        for (stage, place) in self.parts.clone() {
            if self.begun.contains_key(&stage) {
                continue;
            }
            let member = self.is_member(stage);
            match place {
                PartPlace::Ready(_) if !member || stage < last => {
                    self.begin(stage, RingStep::BeginPart { stage, member });
                }
                PartPlace::Ready(loaded) => {
                    self.parts.insert(stage, PartPlace::Driving(loaded));
                    self.queue.push_back(RingStep::StartDriver(stage));
                }
                PartPlace::Driving(_) if self.has_driver => {
                    self.begin(stage, RingStep::BeginDriver(stage));
                }
                _ => {}
            }
        }
        for (hello, peer, stream) in std::mem::take(&mut self.waiting) {
            self.stream_came(hello, peer, stream);
        }
        self.replicate();
    }

    fn begin(&mut self, stage: u32, step: RingStep<S>) {
        let inbound = Inbound {
            rows: true,
            drive: matches!(step, RingStep::BeginPart { .. }),
        };
        self.queue.push_back(step);
        self.begun.insert(stage, inbound);
    }

    /// Result of [`RingStep::StartDriver`].
    pub fn driver_started(&mut self, stage: u32, result: Result<(), String>) {
        let driving = self.is_driving(stage);
        match result {
            Ok(()) => {
                self.has_driver = true;
                if self.ended || !driving {
                    // The head moved it meanwhile.
                    return self.end_driver(self.ring.reason.clone(), true);
                }
            }
            Err(error) if driving => {
                self.parts.insert(stage, PartPlace::Failed(error));
            }
            Err(_) => return,
        }
        self.begin_ready();
    }

    /// Replicates each member's part here to the standby that the head names, and to no other.
    fn replicate(&mut self) {
        for (stage, planned) in (0..).zip(&self.ring.stages) {
            let at_work = match self.parts.get(&stage) {
                Some(PartPlace::Ready(_)) => self.is_own(planned.member.as_ref()),
                Some(PartPlace::Driving(_)) => self.has_driver,
                _ => false,
            };
            let before = self.standbys.get(&stage);
            if at_work && before != planned.standby.as_ref() {
                let standby = planned.standby.clone();
                match standby.clone() {
                    Some(standby) => self.standbys.insert(stage, standby),
                    None => self.standbys.remove(&stage),
                };
                self.queue.push_back(RingStep::Replicate(stage, standby));
            }
        }
    }

    /// A stream that the node `peer` opened.
    pub(crate) fn stream_came(&mut self, hello: RingHello, peer: String, stream: S) {
        if self.ended || hello.epoch < self.ring.epoch {
            return self.queue.push_back(RingStep::Refuse(stream));
        }
        if hello.epoch > self.ring.epoch || !self.begun.contains_key(&hello.stage) {
            if self.waiting.len() >= WAITING {
                return self.queue.push_back(RingStep::Refuse(stream));
            }
            return self.waiting.push((hello, peer, stream));
        }
        let from = match hello.purpose() {
            RingPurpose::Rows => hello.stage.checked_sub(1),
            RingPurpose::Drive => (self.ring.stages.len() as u32).checked_sub(1),
            RingPurpose::Mirror => Some(hello.stage),
            RingPurpose::Unspecified => None,
        };
        let from = from.and_then(|stage| self.seat(stage));
        let Some(from) = from.filter(|seat| seat.node_id == peer) else {
            tracing::warn!(peer, ?hello, "this node has no such place in the ring");
            return self.queue.push_back(RingStep::Refuse(stream));
        };
        let is_part = matches!(self.parts.get(&hello.stage), Some(PartPlace::Ready(_)));
        let Some(inbound) = self.begun.get_mut(&hello.stage) else {
            return;
        };
        let taken = match hello.purpose() {
            RingPurpose::Rows => std::mem::take(&mut inbound.rows),
            RingPurpose::Drive => std::mem::take(&mut inbound.drive),
            _ => is_part,
        };
        self.queue.push_back(match taken {
            true => RingStep::Accept {
                stream,
                hello,
                from,
            },
            false => RingStep::Refuse(stream),
        });
    }

    /// All members are there. A ring that has never worked answers once first, which also measures its speed;
    /// one that comes back from a loss has clients that wait.
    pub fn running(&mut self, epoch: u32) {
        if epoch != self.ring.epoch || !self.has_driver {
            return;
        }
        if epoch > 1 {
            self.serve();
        } else {
            self.queue.push_back(RingStep::WarmUp);
        }
    }

    /// The driver has answered once.
    pub fn warm(&mut self, epoch: u32) {
        if epoch == self.ring.epoch && self.has_driver {
            self.serve();
        }
    }

    fn serve(&mut self) {
        self.serving = self.ring.epoch;
        self.queue.push_back(RingStep::Serve);
    }

    /// The first step after a loss is through.
    pub fn recovered(&mut self, recovery: Recovery) {
        tracing::info!(
            ring = format!("{:x}", self.id),
            gap_ms = recovery.gap_us as f64 / 1e3,
            rows = recovery.rows,
            "recovered"
        );
        self.recovery = Some(recovery);
    }

    /// A stream of the epoch ended.
    pub fn stream_ended(&mut self, end: StreamEnd) {
        if end.epoch != self.ring.epoch {
            return;
        }
        let (purpose, reason) = (end.purpose, end.reason);
        match end.peer {
            Some(seat) if end.link => {
                self.suspect(&seat, &format!("{purpose}: {reason}"), true, true);
            }
            // The other side is in another epoch already, or will dial again; silence would show in its
            // pings.
            _ => tracing::debug!(purpose, reason, "stream ended"),
        }
    }

    /// The member of this stage does not answer; `severed` if nothing passes its link.
    pub fn silent(&mut self, stage: u32, reason: &str, severed: bool) {
        if let Some(seat) = self.seat(stage) {
            self.suspect(&seat, reason, severed, false);
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

    /// The member of this stage, which was silent, has been heard again.
    pub fn heard(&mut self, stage: u32) {
        let Some(seat) = self.seat(stage) else {
            return;
        };
        let before = self.suspects.len();
        self.suspects
            .retain(|suspect| suspect.node_id != seat.node_id || suspect.closed);
        if self.suspects.len() < before {
            let ring = format!("{:x}", self.id);
            tracing::info!(ring, member = seat.name, "the member answers again");
        }
    }

    /// The ring ends here.
    pub(crate) fn end(&mut self, reason: &str) {
        if self.ended {
            return;
        }
        tracing::info!(ring = format!("{:x}", self.id), reason, "ring dissolved");
        let streams = self.waiting.drain(..);
        let refused = streams.map(|(.., stream)| RingStep::Refuse(stream));
        self.queue.extend(refused);
        if self.has_driver {
            self.end_driver(reason.to_owned(), reason.starts_with("moved"));
        }
        self.ended = true;
    }

    fn end_driver(&mut self, reason: String, moved: bool) {
        self.has_driver = false;
        self.queue.push_back(RingStep::Withdraw);
        self.queue.push_back(RingStep::EndDriver { reason, moved });
    }

    /// What the head should hear now: changes at most four times a second unless one is urgent.
    fn news(
        &mut self,
        now: Instant,
        measured: impl Fn(u32) -> PartState,
        card: impl FnOnce() -> Option<ModelCard>,
    ) -> Option<RingState> {
        if self.ring.epoch == 0 {
            return None;
        }
        let state = self.state(measured, card);
        let due = match &self.reported {
            None => true,
            Some((last, _)) if is_urgent(last, &state) => true,
            Some((last, at)) => *last != state && now.duration_since(*at) >= REPORT_INTERVAL,
        };
        due.then(|| {
            self.recovery = None;
            let said = RingState {
                recovery: None,
                ..state.clone()
            };
            self.reported = Some((said, now));
            state
        })
    }

    fn state(
        &self,
        measured: impl Fn(u32) -> PartState,
        card: impl FnOnce() -> Option<ModelCard>,
    ) -> RingState {
        let serving = self.serving == self.ring.epoch;
        let parts = self.parts.iter();
        let parts = parts.map(|(&stage, place)| self.part_state(stage, place, measured(stage)));
        let severed = self.suspects.iter().filter(|suspect| suspect.severed);
        RingState {
            ring: self.id,
            epoch: self.ring.epoch,
            parts: parts.collect(),
            serving,
            card: (serving && self.has_driver).then(card).flatten(),
            suspects: self.suspects.iter().map(|s| s.node_id.clone()).collect(),
            severed: severed.map(|suspect| suspect.node_id.clone()).collect(),
            recovery: self.recovery.clone(),
        }
    }

    /// The report on a part, with what was `measured`.
    fn part_state(&self, stage: u32, place: &PartPlace, measured: PartState) -> PartState {
        let state = PartState {
            stage,
            standby: !self.is_member(stage),
            ..PartState::default()
        };
        let failed = |error: &str| PartState {
            phase: PartPhase::Failed.into(),
            error: error.to_owned(),
            ..state.clone()
        };
        match place {
            PartPlace::Loading(_) => PartState {
                phase: PartPhase::Loading.into(),
                progress: measured.progress,
                ..state
            },
            PartPlace::Failed(error) => failed(error),
            PartPlace::Ready(_) if !measured.error.is_empty() => failed(&measured.error),
            PartPlace::Ready(loaded) | PartPlace::Driving(loaded) => PartState {
                stage,
                standby: state.standby,
                phase: PartPhase::Ready.into(),
                load_seconds: loaded.seconds,
                weight_bytes: loaded.weight_bytes,
                ..measured
            },
        }
    }

    fn is_driving(&self, stage: u32) -> bool {
        matches!(self.parts.get(&stage), Some(PartPlace::Driving(_)))
    }

    fn seat(&self, stage: u32) -> Option<NodeAddr> {
        self.ring.stages.get(stage as usize)?.member.clone()
    }

    fn is_member(&self, stage: u32) -> bool {
        let stage = self.ring.stages.get(stage as usize);
        self.is_own(stage.and_then(|stage| stage.member.as_ref()))
    }

    fn is_own(&self, seat: Option<&NodeAddr>) -> bool {
        seat.is_some_and(|seat| seat.node_id == self.node_id)
    }
}

/// Node ids of the members, by stage.
fn members(ring: &Ring) -> Vec<Option<&str>> {
    let members = ring.stages.iter().map(|stage| stage.member.as_ref());
    members.map(|seat| Some(seat?.node_id.as_str())).collect()
}

/// True if the head should hear of the change at once.
fn is_urgent(last: &RingState, state: &RingState) -> bool {
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

/// Streams that wait for their epoch at once.
const WAITING: usize = 64;

#[cfg(test)]
mod tests;
