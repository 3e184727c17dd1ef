//! One ring as the head knows it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::{Duration, Instant};

use arcanum_profiler::{Assignment, ModelSpec};
use mesh_proto::{ModelCard, PartPhase, PartState};
use tracing::info;

#[derive(Debug, Clone)]
pub(super) struct Ring {
    pub(super) id: u64,
    pub(super) epoch: u32,
    pub(super) model: String,
    /// The members' offer of the model, for fields that the driver does not report.
    pub(super) offered: ModelCard,
    pub(super) spec: ModelSpec,
    pub(super) stages: Vec<Stage>,
    pub(super) slots: u32,
    pub(super) context: u32,
    pub(super) kv_tokens: u64,
    pub(super) half_rows: bool,
    /// Reason for the present choice of members, for the workers' logs.
    pub(super) reason: String,
    /// Cause of the present epoch, and of those before it that never served. The driver reports an epoch's
    /// recovery later, when `reason` may have changed.
    pub(super) reason_of_epoch: String,
    /// True if its driver ever served in its present epoch.
    pub(super) served: bool,
    pub(super) epoch_since: Instant,
    /// Time since which its driver serves in this epoch.
    pub(super) serving_since: Option<Instant>,
    pub(super) last_loss: Option<Instant>,
    /// The driver that answers for it, with the card that it serves.
    pub(super) served_by: Option<(String, ModelCard)>,
    /// Workers whose parts are gone, and why; dealt with at the next poll.
    pub(super) lost: BTreeMap<String, String>,
    /// Doubts between two members: the one that complains, and the one that it does not reach.
    pub(super) doubts: BTreeMap<(String, String), Doubt>,
    /// Time at which the link between two members was last renewed.
    pub(super) relinked: BTreeMap<(String, String), Instant>,
    /// Time at which a part of it last reported progress in loading or in computing.
    pub(super) progressed: Instant,
    /// Another ring serves in its place since then.
    pub(super) retiring: Option<Instant>,
    /// Requests that still run on it while it retires.
    pub(super) running: Option<usize>,
    /// The ring that it will replace when it serves.
    pub(super) replaces: Option<u64>,
    /// Stages that go to their standbys as soon as those have caught up: better workers, by their node ids.
    pub(super) moves: BTreeMap<usize, String>,
    /// Epoch whose recovery was reported.
    pub(super) recovered: u32,
    /// State of the mesh for which standbys were looked for.
    pub(super) standbys_for: Option<u64>,
    /// State of the mesh for which it was compared with a fresh plan.
    pub(super) compared: Option<u64>,
    /// As planned.
    pub(super) token_us: f64,
    pub(super) tokens_per_second: f64,
    /// Workers that have no part, and why.
    pub(super) left_out: Vec<(String, String)>,
    pub(super) formed: Instant,
}

#[derive(Debug, Clone)]
pub(super) struct Stage {
    pub(super) layers: Range<u32>,
    /// Weight format, the first member's; its successors use it too.
    pub(super) format: String,
    pub(super) member: Replica,
    pub(super) standby: Option<Replica>,
}

/// A worker's part in a stage.
#[derive(Debug, Clone)]
pub(super) struct Replica {
    pub(super) node: String,
    /// Its last report. The rows that the standby lacks are the head's own count after a change of it.
    pub(super) state: PartState,
    pub(super) ready_since: Option<Instant>,
    pub(super) progressed: Option<Instant>,
}

impl Replica {
    /// A part that its worker has yet to load.
    pub(super) fn new(node: String) -> Self {
        Self {
            node,
            state: PartState {
                phase: PartPhase::Loading.into(),
                ..PartState::default()
            },
            ready_since: None,
            progressed: None,
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        self.state.phase() == PartPhase::Ready
    }

    /// Takes a report in; true if there is anything new in it.
    fn report(&mut self, report: &PartState, now: Instant) -> bool {
        let state = PartState {
            step_us: sound(report.step_us),
            load_seconds: sound(report.load_seconds),
            error: String::new(),
            ..report.clone()
        };
        let marks = |of: &PartState| {
            let steps = (of.step_us.to_bits(), of.prefill_us, of.kv_bytes);
            (of.phase, of.progress, of.lag_rows, steps)
        };
        let news = marks(&self.state) != marks(&state);
        if news {
            self.progressed = Some(now);
        }
        self.state = state;
        let since = self.ready_since.unwrap_or(now);
        self.ready_since = self.is_ready().then_some(since);
        news
    }
}

impl Stage {
    fn parts(&self) -> impl Iterator<Item = &Replica> {
        [Some(&self.member), self.standby.as_ref()]
            .into_iter()
            .flatten()
    }
}

impl Ring {
    /// Node id of the worker that answers for it.
    pub(super) fn driver(&self) -> &str {
        self.stages.last().map_or("", |stage| &stage.member.node)
    }

    /// Returns true if the worker is one of its members or standbys.
    pub(super) fn has_part(&self, node: &str) -> bool {
        self.parts().any(|part| part.node == node)
    }

    /// Returns true if the worker runs one of its stages.
    pub(super) fn has_member(&self, node: &str) -> bool {
        self.stages.iter().any(|stage| stage.member.node == node)
    }

    /// All parts, members and standbys.
    pub(super) fn parts(&self) -> impl Iterator<Item = &Replica> {
        self.stages.iter().flat_map(Stage::parts)
    }

    /// Node ids of all workers with a part.
    pub(super) fn nodes(&self) -> BTreeSet<String> {
        self.parts().map(|part| part.node.clone()).collect()
    }

    pub(super) fn members(&self) -> BTreeSet<String> {
        let members = self.stages.iter().map(|stage| &stage.member);
        members.map(|part| part.node.clone()).collect()
    }

    /// Notes that a worker's parts are gone. The first reason stays.
    pub(super) fn lose(&mut self, node: &str, reason: String) {
        if self.has_part(node) {
            self.lost.entry(node.to_owned()).or_insert(reason);
            self.doubts
                .retain(|(by, about), _| by != node && about != node);
        }
    }

    /// Bytes that its parts take on a worker.
    pub(super) fn bytes_on(&self, node: &str) -> u64 {
        self.stages
            .iter()
            .map(|stage| {
                let held = stage.parts().filter(|part| part.node == node);
                self.stage_bytes(&stage.layers)
                    .saturating_mul(held.count() as u64)
            })
            .fold(0, u64::saturating_add)
    }

    /// Bytes that a stage takes: its layers, the embedding and output weights at the ends of the model, and KV
    /// rows for all of its layers.
    pub(super) fn stage_bytes(&self, layers: &Range<u32>) -> u64 {
        let spec = &self.spec;
        let count = u64::from(layers.end.saturating_sub(layers.start));
        let per_layer = spec
            .layer_bytes
            .saturating_add(spec.kv_bytes.saturating_mul(self.kv_tokens));
        let mut bytes = count.saturating_mul(per_layer);
        if layers.start == 0 {
            bytes = bytes.saturating_add(spec.first_bytes);
        }
        if layers.end == spec.layers {
            bytes = bytes.saturating_add(spec.last_bytes);
        }
        bytes
    }

    /// Its stages as placement knows them.
    pub(super) fn assignments(&self) -> Vec<Assignment> {
        self.stages
            .iter()
            .map(|stage| Assignment {
                node: stage.member.node.clone(),
                layers: stage.layers.clone(),
                standby: stage.standby.as_ref().map(|part| part.node.clone()),
            })
            .collect()
    }

    /// Takes in a worker's report on one of its parts. A report on a part that it does not hold (any more) is
    /// ignored.
    pub(super) fn report(&mut self, node: &str, report: &PartState, now: Instant) {
        let part = match self.stages.get_mut(report.stage as usize) {
            Some(stage) if report.standby => stage.standby.as_mut(),
            Some(stage) => Some(&mut stage.member),
            None => None,
        };
        if let Some(part) = part.filter(|part| part.node == node)
            && part.report(report, now)
        {
            self.progressed = now;
        }
    }

    /// True if its parts made progress recently.
    pub(super) fn goes_on(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.progressed) < STANDSTILL
    }

    /// The card to serve under. Name and weights are the ring's, whatever the driver says.
    pub(super) fn card(&self, said: Option<ModelCard>) -> ModelCard {
        let known = || self.served_by.as_ref().map(|(_, card)| card.clone());
        let mut card = said.or_else(known).unwrap_or_else(|| ModelCard {
            slots: self.slots,
            context: self.context,
            ..self.offered.clone()
        });
        card.name.clone_from(&self.model);
        card.fingerprint.clone_from(&self.offered.fingerprint);
        card.layer_start = 0;
        card.layer_end = self.spec.layers;
        card.slots = card.slots.clamp(1, MOST_SLOTS);
        card
    }

    /// Reason for which it does not serve.
    pub(super) fn hindrance(&self) -> &str {
        match self.served {
            true => "its driver waits for a member",
            false => &self.reason_of_epoch,
        }
    }

    pub(super) fn log_standbys(&self, reason: &str) {
        let (ring, model) = (hex(self.id), &self.model);
        info!(ring, model, reason, "standbys of a ring changed");
    }

    pub(super) fn log_move(&self, reason: &str) {
        let (ring, epoch, model) = (hex(self.id), self.epoch, &self.model);
        info!(ring, epoch, model, reason, "stages of a ring moved");
    }

    pub(super) fn next_epoch(&mut self, reason: String, now: Instant) {
        self.epoch = self.epoch.saturating_add(1);
        self.epoch_since = now;
        self.progressed = now;
        self.doubts.clear();
        self.serving_since = None;
        // A request that waits for this epoch waited for the one before it, too.
        let both = !std::mem::take(&mut self.served)
            && self.epoch > 2
            && self.reason_of_epoch.len() < LONGEST_REASON;
        if both {
            self.reason_of_epoch.push_str("; then ");
        } else {
            self.reason_of_epoch.clear();
        }
        self.reason_of_epoch.push_str(&reason);
        self.reason = reason;
    }

    /// Workers that keep the ring from serving for too long, and why.
    pub(super) fn late(&self, now: Instant) -> Vec<(String, &'static str)> {
        if self.serving_since.is_some() || !self.lost.is_empty() {
            return Vec::new();
        }
        let members = self.stages.iter().map(|stage| &stage.member);
        let mut loading = members.filter(|part| !part.is_ready()).peekable();
        if loading.peek().is_some() {
            let stuck = |part: &&Replica| {
                let since = part.progressed.unwrap_or(self.epoch_since);
                let quiet = now.saturating_duration_since(since.max(self.epoch_since));
                // A worker of an older version does not say how far it is.
                quiet
                    >= if part.state.progress > 0 {
                        LOAD_SILENCE
                    } else {
                        LOAD_LIMIT
                    }
            };
            let why = "it does not get on with loading its layers";
            let stuck = loading.filter(stuck);
            return stuck.map(|part| (part.node.clone(), why)).collect();
        }
        // Replays of long contexts take their time on slow machines; they show in the reports of parts.
        if now.saturating_duration_since(self.progressed.max(self.epoch_since)) >= SERVE_LIMIT {
            let why = "every stage is loaded and it does not serve";
            return vec![(self.driver().to_owned(), why)];
        }
        Vec::new()
    }

    /// Time at which the passing of time alone changes something.
    pub(super) fn next_timer(&self) -> Option<Instant> {
        if !self.lost.is_empty() {
            return Some(self.epoch_since);
        }
        let retires = self.retiring.map(|since| since + RETIRE_LOOK);
        let late = self.epoch_since + SERVE_LIMIT;
        let late = self.serving_since.is_none().then_some(late);
        let first_doubt = self.doubts.values().map(|doubt| doubt.since).min();
        let doubts = first_doubt.map(|since| since + DOUBT_LOOK);
        retires.into_iter().chain(late).chain(doubts).min()
    }

    /// Stages with their workers, in one line.
    pub(super) fn layout(&self, name: impl Fn(&str) -> String) -> String {
        let stage = |stage: &Stage| {
            let standby = match &stage.standby {
                Some(part) => format!(" (standby {})", name(&part.node)),
                None => String::new(),
            };
            let Range { start, end } = stage.layers;
            format!("{start}..{end} {}{standby}", name(&stage.member.node))
        };
        self.stages.iter().map(stage).collect::<Vec<_>>().join(", ")
    }
}

fn sound(value: f32) -> f32 {
    if value.is_finite() && value > 0.0 {
        value
    } else {
        0.0
    }
}

const MOST_SLOTS: u32 = 4096;
/// Bytes of joined reasons after which the next one replaces them.
const LONGEST_REASON: usize = 512;
/// Time for which the loading of a stage may stand still. The whole may take as long as a slow disk takes.
const LOAD_SILENCE: Duration = Duration::from_secs(300);
/// Time limit for loading if the worker reports no progress.
const LOAD_LIMIT: Duration = Duration::from_secs(900);
/// Time that a driver has to bring a token through loaded stages, counted from the last progress of any part.
const SERVE_LIMIT: Duration = Duration::from_secs(300);
/// Time without new reports after which a part counts as idle; parts report at most four times a second.
const STANDSTILL: Duration = Duration::from_secs(2);
/// Interval between looks at a ring that is being retired.
const RETIRE_LOOK: Duration = Duration::from_millis(200);

/// One member does not reach another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Doubt {
    /// Time since which the head knows of it.
    pub(super) since: Instant,
    /// Time at which the head last asked for a sign of life.
    pub(super) asked: Instant,
    /// Their link is closed, or nothing passes it: this is not a matter of waiting.
    pub(super) link: bool,
}

/// Time from the first doubt to the next check of a ring's doubts.
const DOUBT_LOOK: Duration = Duration::from_millis(50);

/// A ring's id as people see it.
pub(super) fn hex(ring: u64) -> String {
    format!("{ring:016x}")
}
