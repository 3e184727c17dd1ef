//! A model on a worker: its card, measured speeds, and proof that it answers.

use std::time::{Duration, Instant};

use mesh_proto::{ModelCard, ModelKind};

use super::clock::TokenClock;
use crate::speed::Measured;
use crate::spotcheck::{CheckState, Weights};

/// One model on one worker, with the speeds the head believes in.
#[derive(Debug, Clone)]
pub struct ServedModel {
    /// The worker's description of the model.
    pub card: ModelCard,
    /// Decode speed of a single stream, tokens per second: as measured here, else as the worker claims; 0 is
    /// unknown.
    pub decode_tps: f64,
    /// Prefill speed, tokens per second, in the same way.
    pub prefill_tps: f64,
    /// Decode speed as measured here.
    pub decode: Measured,
    /// Prefill speed as measured here, in tokens as the head estimates them.
    pub prefill: Measured,
    /// The ring that it answers for as its driver; `None` where the worker holds the whole model.
    pub ring: Option<u64>,
    /// True if the last attempt with this model, probes included, brought an answer.
    pub proven: bool,
    /// True if the last attempt failed, for reasons that are not the request's: then only a token proves the
    /// contrary.
    pub failing: bool,
    /// Time at which a token of this model last came back.
    pub last_success: Option<Instant>,
    /// Time at which a request for it last showed that the worker's engine makes progress.
    pub last_sign: Option<Instant>,
    /// Result of comparing its answers with those of others.
    pub check_state: CheckState,
    /// Answers that it was seen to stream at the same time.
    pub streams: u32,
    /// Seconds to a first token that its prompt does not explain, smoothed, and when one was last measured.
    pub(super) delay: (f64, Option<Instant>),
    /// Start of the time in which it has to prove itself: it is new, or failed.
    pub(super) trial_since: Instant,
    /// Questions of the head that it did not answer, since it last answered one.
    pub(super) unanswered: u32,
    /// Time before which it is not asked again.
    pub(super) retry_at: Option<Instant>,
    /// Time since which it declines the head's questions for want of room.
    pub(super) declines_since: Option<Instant>,
    /// Time of the last token of an answer of this model.
    pub tokens_seen: TokenClock,
}

/// Decision on requests of a model for a worker, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Service {
    /// It gets requests.
    Serves,
    /// It is about to be asked for a proof: requests may wait for that.
    Soon,
    /// It gets no requests.
    Out,
}

impl ServedModel {
    /// True if it is reliable: a token came back, or, before any did, its engine makes progress with its
    /// work.
    pub fn answers(&self, now: Instant) -> bool {
        let fresh = |at| now.saturating_duration_since(at) < SIGN_AGE;
        self.proven || (!self.failing && self.last_sign.is_some_and(fresh))
    }

    /// True if it answers, and as others do.
    pub(crate) fn is_cleared(&self) -> bool {
        self.proven && self.check_state == CheckState::Cleared
    }

    /// A token came back.
    pub(crate) fn succeeded(&mut self, now: Instant) {
        (self.proven, self.failing) = (true, false);
        self.last_success = Some(now);
        (self.unanswered, self.retry_at, self.declines_since) = (0, None, None);
    }

    /// Time at which a token of an answer of this model last came: also of one that began long ago.
    pub fn last_token(&self) -> Option<Instant> {
        self.last_success.max(self.tokens_seen.last())
    }

    /// It declines a question because it is full or drains. That is no silence, unless nothing came of it in
    /// all of `limit`. Says whether it is excused.
    pub fn declined(&mut self, limit: Duration, now: Instant) -> bool {
        let since = *self.declines_since.get_or_insert(now);
        let since = self.last_token().map_or(since, |token| since.max(token));
        let excused = now.saturating_duration_since(since) < limit;
        if excused {
            self.retry_at = Some(now + RETRY);
        }
        excused
    }

    /// An attempt failed: the model has to prove again that it answers.
    pub fn failed(&mut self, now: Instant) {
        if self.proven {
            self.trial_since = now;
        }
        (self.proven, self.failing) = (false, true);
    }

    /// It is as one that has just joined.
    pub(super) fn begins_anew(&mut self, now: Instant) {
        (self.proven, self.failing) = (false, false);
        (self.unanswered, self.retry_at, self.declines_since) = (0, None, None);
        self.trial_since = now;
    }

    /// Returns true if its retry time has come, or it has none.
    pub(crate) fn may_be_asked(&self, now: Instant) -> bool {
        self.retry_at.is_none_or(|at| now >= at)
    }

    /// Takes in a measurement: `tokens` came within `took`, while `batch` requests ran there.
    pub fn decoded(&mut self, tokens: u32, took: Duration, batch: u32) {
        self.decode
            .add(f64::from(tokens), took.div_f64(batch_gain(batch)));
        if let Some(rate) = self.decode.rate() {
            self.decode_tps = rate;
        }
    }

    /// Takes in a measurement: a prompt of `tokens` tokens, estimated, took `took`.
    pub fn prefilled(&mut self, tokens: u64, took: Duration) {
        self.prefill.add(tokens as f64, took);
        if let Some(rate) = self.prefill.rate() {
            self.prefill_tps = rate;
        }
    }

    /// A first token came after `took`, of which the prompt explains a part.
    pub fn waited(&mut self, prompt: u64, took: Duration, now: Instant) {
        let known = self.prefill_tps > 0.0;
        let explained = if known {
            prompt as f64 / self.prefill_tps
        } else {
            0.0
        };
        let more = (took.as_secs_f64() - explained).max(0.0);
        let before = self.delay.1.map_or(more, |_| self.delay(now));
        self.delay = (before + (more - before) * DELAY_WEIGHT, Some(now));
    }

    /// Seconds to a first token besides those that its prompt takes: a worker may be busy with work that this
    /// head does not see. Old measurements count for less.
    pub(crate) fn delay(&self, now: Instant) -> f64 {
        let (delay, at) = self.delay;
        let age = at.map_or(0.0, |at| now.saturating_duration_since(at).as_secs_f64());
        delay * (-age / DELAY_FADES).exp2()
    }

    /// The slots to count on: as many as it claims, and at most twice as many as it was seen to use, or a few
    /// at the beginning.
    pub fn slots(&self) -> u32 {
        let claimed = self.card.slots.max(1);
        match self.card.kind() {
            ModelKind::Chat => claimed.min(self.streams.saturating_mul(2).max(FIRST_SLOTS)),
            // An encoder's answers do not stream, and images take turns.
            ModelKind::Embed | ModelKind::Image => claimed,
        }
    }

    /// Its name in spot checks.
    pub(super) fn subject(&self, node: &str) -> String {
        match self.ring {
            Some(ring) => subject_of_ring(ring),
            None => node.to_owned(),
        }
    }

    pub(super) fn weights(&self) -> Weights {
        (self.card.name.clone(), self.card.fingerprint.clone())
    }

    /// Speeds that its worker claims. They count until the first measurement.
    pub(super) fn claims(&mut self, decode: f64, prefill: f64) {
        if decode > 0.0 && self.decode.rate().is_none() {
            self.decode_tps = decode;
        }
        if prefill > 0.0 && self.prefill.rate().is_none() {
            self.prefill_tps = prefill;
        }
    }

    pub(super) fn new(card: ModelCard, ring: Option<u64>, now: Instant) -> Self {
        Self {
            decode_tps: speed(card.decode_tps),
            prefill_tps: speed(card.prefill_tps),
            card: plausible(card),
            ring,
            decode: Measured::default(),
            prefill: Measured::default(),
            proven: false,
            failing: false,
            last_success: None,
            last_sign: None,
            check_state: CheckState::New,
            streams: 0,
            delay: (0.0, None),
            trial_since: now,
            unanswered: 0,
            retry_at: None,
            declines_since: None,
            tokens_seen: TokenClock::new(now),
        }
    }
}

/// Speed of `batch` streams that decode together, relative to one stream. Decoding is bound by reading the
/// weights, which a batch shares; the square root lies between no gain and a perfect one, and both measured
/// points (2 and 8 streams) near it.
pub fn batch_gain(batch: u32) -> f64 {
    f64::from(batch.max(1)).sqrt()
}

/// A reported speed, or 0 (unknown) where the report makes no sense.
pub(super) fn speed(reported: f32) -> f64 {
    if reported.is_finite() && reported > 0.0 {
        f64::from(reported)
    } else {
        0.0
    }
}

/// Returns true if the fields of a card are within bounds. Names go into logs, tables and maps.
pub(super) fn is_sound(card: &ModelCard) -> bool {
    let fits = |text: &str, limit: usize| text.len() <= limit && !text.contains(char::is_control);
    !card.name.is_empty() && fits(&card.name, NAME_BYTES) && fits(&card.fingerprint, NAME_BYTES)
}

/// A card with numbers that a model can have.
pub(super) fn plausible(mut card: ModelCard) -> ModelCard {
    card.slots = card.slots.clamp(1, MOST_SLOTS);
    card.context = card.context.min(MOST_CONTEXT);
    card.dimensions = card.dimensions.min(MOST_DIMENSIONS);
    for text in [
        &mut card.architecture,
        &mut card.quantization,
        &mut card.backend,
    ] {
        text.retain(|c| !c.is_control());
        text.truncate(text.floor_char_boundary(NAME_BYTES));
    }
    card
}

pub(super) fn subject_of_ring(ring: u64) -> String {
    format!("ring {ring:016x}")
}

/// Time for which a sign of life counts.
const SIGN_AGE: Duration = Duration::from_secs(10);

/// Slots that are believed in before they were seen in use.
const FIRST_SLOTS: u32 = 8;

/// Weight of the newest delay of a first token.
const DELAY_WEIGHT: f64 = 0.3;

/// Seconds after which a delay counts half.
const DELAY_FADES: f64 = 60.0;

pub(super) const NAME_BYTES: usize = 256;

pub(super) const MOST_SLOTS: u32 = 256;

pub(super) const MOST_CONTEXT: u32 = 1 << 24;

pub(super) const MOST_DIMENSIONS: u32 = 1 << 16;

/// Time to the second question after one that was not answered; doubled with every other one.
pub(super) const RETRY: Duration = Duration::from_secs(1);

/// The first characters of a node id, enough to tell nodes apart.
pub(super) fn short(node_id: &str) -> &str {
    node_id.get(..12).unwrap_or(node_id)
}

pub(super) fn ring_of_subject(subject: &str) -> Option<u64> {
    u64::from_str_radix(subject.strip_prefix("ring ")?, 16).ok()
}
