//! The link to the head: when to try again after it was lost, and what the head has yet to hear.

use std::time::{Duration, Instant};

use mesh_base::backoff::Backoff;
use mesh_proto::{Load, ModelCard};

/// The time of one link to a head, from its welcome to its loss. What the head orders holds as long as that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease(u64);

/// A refusal that lasts until an operator does something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Another machine has this worker's identity.
    Duplicate,
    /// This worker is no longer part of the mesh.
    Expelled,
}

/// The state of the link to the head.
#[derive(Debug)]
pub struct HeadLink {
    lease: Option<Lease>,
    leases: u64,
    /// Time at which the present attempt began.
    tried: Option<Instant>,
    backoff: Backoff,
    /// Refusals in a row that trying again soon does not end.
    refusals: u32,
    reported: Reported,
}

/// What the head has heard in this lease.
#[derive(Debug, Default)]
struct Reported {
    load: Option<(Load, Instant)>,
    cards: Vec<ModelCard>,
    models: Option<(u64, Instant)>,
}

impl Default for HeadLink {
    fn default() -> Self {
        HeadLink {
            lease: None,
            leases: 0,
            tried: None,
            backoff: Backoff::new(FIRST_PAUSE, LONGEST_PAUSE),
            refusals: 0,
            reported: Reported::default(),
        }
    }
}

impl HeadLink {
    /// An attempt to make the link begins.
    pub fn tries(&mut self, now: Instant) {
        self.tried = Some(now);
    }

    /// The link is up, and the head has heard that these models are served.
    pub(crate) fn up(&mut self, cards: Vec<ModelCard>) -> Lease {
        self.leases += 1;
        let lease = Lease(self.leases);
        self.lease = Some(lease);
        self.reported = Reported {
            cards,
            ..Reported::default()
        };
        lease
    }

    /// True if that lease holds still.
    pub fn holds(&self, lease: Lease) -> bool {
        self.lease == Some(lease)
    }

    /// There is no link, or no longer one. Returns the pause before the next attempt; `random` goes from 0 to
    /// 1.
    pub(crate) fn down(&mut self, refusal: Option<Refusal>, now: Instant, random: f64) -> Duration {
        self.lease = None;
        // A link that held for a while was no failed attempt.
        let tried = self.tried.take();
        if tried.is_some_and(|tried| now.saturating_duration_since(tried) > STEADY) {
            self.backoff.reset();
        }
        if refusal.is_some() {
            self.refusals += 1;
        } else if tried.is_some() {
            self.refusals = 0;
        }
        let pause = refusal.map_or(Duration::ZERO, |_| refusal_pause(self.refusals));
        pause.max(self.backoff.failed(random))
    }

    /// True if the head should hear of this load now: a drain at once, other changes at most four times a
    /// second. It counts as told then.
    pub fn tells_load(&mut self, load: &Load, now: Instant) -> bool {
        let news = match &self.reported.load {
            None => true,
            Some((last, at)) => {
                let same = Load {
                    resident_bytes: last.resident_bytes,
                    ..load.clone()
                };
                let rested = now >= *at + LOAD_INTERVAL;
                load.draining != last.draining || (same != *last && rested)
            }
        };
        if news {
            self.reported.load = Some((load.clone(), now));
        }
        news
    }

    /// True if the head has not heard yet that these models are served. It counts as told then.
    pub fn tells_cards(&mut self, cards: &[ModelCard]) -> bool {
        let news = self.reported.cards != cards;
        if news {
            self.reported.cards = cards.to_vec();
        }
        news
    }

    /// The version of the models' report that the head has, if another one may be sent now.
    pub fn models_due(&self, now: Instant) -> Option<Option<u64>> {
        match self.reported.models {
            None => Some(None),
            Some((version, at)) => (now >= at + MODELS_INTERVAL).then_some(Some(version)),
        }
    }

    /// The head was told this version of the models' report.
    pub fn models_told(&mut self, version: u64, now: Instant) {
        self.reported.models = Some((version, now));
    }
}

/// The wait of a worker before it asks again after a refusal that lasts, the `times`th time.
fn refusal_pause(times: u32) -> Duration {
    REFUSAL_PAUSE
        .saturating_mul(1 << (times.clamp(1, 8) - 1))
        .min(LONGEST_REFUSAL_PAUSE)
}

/// A head that restarts is back within a second.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A worker that an operator has to help asks again after this time, and then more rarely.
const REFUSAL_PAUSE: Duration = Duration::from_secs(30);
const LONGEST_REFUSAL_PAUSE: Duration = Duration::from_secs(300);

/// A link that held this long was no failed attempt.
const STEADY: Duration = Duration::from_secs(2);

const LOAD_INTERVAL: Duration = Duration::from_millis(250);
/// Least interval between reports to the head of the models that are held and sought.
const MODELS_INTERVAL: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use super::*;

    fn later(now: &mut Instant, ms: u64) -> Instant {
        *now += Duration::from_millis(ms);
        *now
    }

    #[test]
    fn a_worker_that_is_refused_for_good_asks_rarely() {
        let (mut link, mut now) = (HeadLink::default(), Instant::now());
        for seconds in [30, 60, 120, 240, 300, 300] {
            link.tries(now);
            let pause = link.down(Some(Refusal::Expelled), later(&mut now, 1), 1.0);
            assert_eq!(pause.as_secs(), seconds);
        }
        // Any other end ends that.
        link.tries(now);
        assert!(link.down(None, now, 1.0) <= LONGEST_PAUSE);
        let pause = link.down(Some(Refusal::Duplicate), now, 1.0);
        assert_eq!(pause, REFUSAL_PAUSE);
    }

    #[test]
    fn a_head_that_is_away_is_tried_ever_more_rarely_until_a_link_has_held() {
        let (mut link, mut now) = (HeadLink::default(), Instant::now());
        let mut pauses = Vec::new();
        for _ in 0..8 {
            link.tries(now);
            pauses.push(link.down(None, later(&mut now, 1), 1.0).as_millis());
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        // A link that breaks at once is a failed attempt, too.
        link.tries(now);
        link.up(Vec::new());
        assert_eq!(link.down(None, later(&mut now, 10), 1.0), LONGEST_PAUSE);
        link.tries(now);
        link.up(Vec::new());
        assert_eq!(link.down(None, later(&mut now, 2_001), 1.0), FIRST_PAUSE);
    }

    #[test]
    fn a_lease_ends_with_its_link_and_does_not_come_back() {
        let mut link = HeadLink::default();
        let first = link.up(Vec::new());
        assert!(link.holds(first));
        link.down(None, Instant::now(), 0.5);
        assert!(!link.holds(first));
        let second = link.up(Vec::new());
        assert!(link.holds(second) && !link.holds(first));
    }

    #[test]
    fn load_is_told_at_most_four_times_a_second_and_a_drain_at_once() {
        let (mut link, mut now) = (HeadLink::default(), Instant::now());
        link.up(Vec::new());
        let mut load = Load::default();
        assert!(link.tells_load(&load, now));
        assert!(!link.tells_load(&load, later(&mut now, 10_000)));
        load.resident_bytes = 7;
        assert!(
            !link.tells_load(&load, later(&mut now, 1_000)),
            "memory alone"
        );
        load.running = 1;
        assert!(link.tells_load(&load, now));
        load.running = 2;
        assert!(!link.tells_load(&load, later(&mut now, 249)));
        assert!(link.tells_load(&load, later(&mut now, 1)));
        load.draining = true;
        assert!(link.tells_load(&load, now));
        // A new link knows nothing.
        link.up(Vec::new());
        assert!(link.tells_load(&load, now));
    }

    #[test]
    fn cards_and_models_are_told_when_they_change() {
        let (mut link, mut now) = (HeadLink::default(), Instant::now());
        let card = ModelCard {
            name: "m".to_owned(),
            ..ModelCard::default()
        };
        link.up(vec![card.clone()]);
        assert!(!link.tells_cards(std::slice::from_ref(&card)));
        assert!(link.tells_cards(&[]) && !link.tells_cards(&[]));
        assert_eq!(link.models_due(now), Some(None));
        link.models_told(4, now);
        assert_eq!(link.models_due(later(&mut now, 199)), None);
        assert_eq!(link.models_due(later(&mut now, 1)), Some(Some(4)));
    }
}
