//! One ring as the head knows it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use arcanum_profiler::{Assignment, ModelSpec};
use mesh_proto::{ModelCard, PartPhase, PartState};
use tracing::info;

/// State of one ring.
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
    /// Start of its present epoch.
    pub(super) epoch_since: Instant,
    /// Time since which its driver serves in this epoch.
    pub(super) serving_since: Option<Instant>,
    /// Time of the last loss of a member.
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

/// A stage of it.
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
    pub(super) phase: PartPhase,
    /// Time at which it became ready.
    pub(super) ready_since: Option<Instant>,
    pub(super) lag_rows: u64,
    pub(super) step_us: f32,
    pub(super) load_seconds: f32,
    pub(super) prefill_us: u64,
    pub(super) weight_bytes: u64,
    pub(super) kv_bytes: u64,
    pub(super) kept_bytes: u64,
    /// Progress of loading, in a unit that only grows; 0 if the worker does not report it.
    pub(super) progress: u64,
    /// Time at which it last reported progress.
    pub(super) progressed: Option<Instant>,
}

impl Replica {
    /// A part that its worker has yet to load.
    pub(super) fn new(node: String) -> Self {
        Self {
            node,
            phase: PartPhase::Loading,
            ready_since: None,
            lag_rows: 0,
            step_us: 0.0,
            load_seconds: 0.0,
            prefill_us: 0,
            weight_bytes: 0,
            kv_bytes: 0,
            kept_bytes: 0,
            progress: 0,
            progressed: None,
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        self.phase == PartPhase::Ready
    }

    /// Takes a report in; true if there is anything new in it.
    fn report(&mut self, report: &PartState, now: Instant) -> bool {
        let news = self.phase as i32 != report.phase
            || self.progress != report.progress
            || self.step_us != sound(report.step_us)
            || self.prefill_us != report.prefill_us
            || self.kv_bytes != report.kv_bytes
            || self.lag_rows != report.lag_rows;
        if news {
            self.progressed = Some(now);
        }
        self.progress = report.progress;
        self.phase = PartPhase::try_from(report.phase).unwrap_or(PartPhase::Unspecified);
        if self.is_ready() {
            self.ready_since.get_or_insert(now);
        } else {
            self.ready_since = None;
        }
        self.lag_rows = report.lag_rows;
        self.step_us = sound(report.step_us);
        self.load_seconds = sound(report.load_seconds);
        self.prefill_us = report.prefill_us;
        self.weight_bytes = report.weight_bytes;
        self.kv_bytes = report.kv_bytes;
        self.kept_bytes = report.kept_bytes;
        news
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
        self.stages
            .iter()
            .flat_map(|stage| [Some(&stage.member), stage.standby.as_ref()])
            .flatten()
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
                let parts = [Some(&stage.member), stage.standby.as_ref()];
                let held = parts.into_iter().flatten().filter(|part| part.node == node);
                self.stage_bytes(&stage.layers)
                    .saturating_mul(held.count() as u64)
            })
            .fold(0, u64::saturating_add)
    }

    /// Bytes that a stage takes: weights and KV cache.
    pub(super) fn stage_bytes(&self, layers: &Range<u32>) -> u64 {
        stage_bytes(&self.spec, layers, self.kv_tokens)
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
        let stage = usize::try_from(report.stage)
            .ok()
            .and_then(|index| self.stages.get_mut(index));
        let part = match stage {
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

    /// A new epoch begins.
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
        let mut loading = self
            .stages
            .iter()
            .map(|stage| &stage.member)
            .filter(|part| !part.is_ready())
            .peekable();
        if loading.peek().is_some() {
            let stuck = |part: &&Replica| {
                let since = part.progressed.unwrap_or(self.epoch_since);
                let quiet = now.saturating_duration_since(since.max(self.epoch_since));
                // A worker of an older version does not say how far it is.
                let limit = if part.progress > 0 {
                    LOAD_SILENCE
                } else {
                    LOAD_LIMIT
                };
                quiet >= limit
            };
            let why = "it does not get on with loading its layers";
            return loading
                .filter(stuck)
                .map(|part| (part.node.clone(), why))
                .collect();
        }
        // Replays of long contexts take their time on slow machines; they show in the reports of parts.
        if now.saturating_duration_since(self.progressed.max(self.epoch_since)) >= SERVE_LIMIT {
            vec![(
                self.driver().to_owned(),
                "every stage is loaded and it does not serve",
            )]
        } else {
            Vec::new()
        }
    }

    /// Time at which the passing of time alone changes something.
    pub(super) fn next_timer(&self) -> Option<Instant> {
        if !self.lost.is_empty() {
            return Some(self.epoch_since);
        }
        let retires = self.retiring.map(|since| since + RETIRE_LOOK);
        let late = self
            .serving_since
            .is_none()
            .then(|| self.epoch_since + SERVE_LIMIT);
        let doubts = doubts_due(self);
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

/// Bytes of a stage: its layers, the embedding and output weights at the ends of the model, and KV rows for
/// all of its layers.
pub(super) fn stage_bytes(spec: &ModelSpec, layers: &Range<u32>, kv_tokens: u64) -> u64 {
    let count = u64::from(layers.end.saturating_sub(layers.start));
    let first = if layers.start == 0 {
        spec.first_bytes
    } else {
        0
    };
    let last = if layers.end == spec.layers {
        spec.last_bytes
    } else {
        0
    };
    let per_layer = spec
        .layer_bytes
        .saturating_add(spec.kv_bytes.saturating_mul(kv_tokens));
    count
        .saturating_mul(per_layer)
        .saturating_add(first)
        .saturating_add(last)
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

/// Time at which a ring's doubts are due for another check.
fn doubts_due(ring: &Ring) -> Option<Instant> {
    let since = ring.doubts.values().map(|doubt| doubt.since).min()?;
    Some(since + DOUBT_LOOK)
}

const DOUBT_LOOK: Duration = Duration::from_millis(50);

/// A ring's id as people see it.
pub(super) fn hex(ring: u64) -> String {
    format!("{ring:016x}")
}
