//! The driver's failure detector: notices members that have fallen silent, and tells slow from dead.
//!
//! A member's network task answers pings however long its step takes, so silence means that its process is
//! stopped or cut off, or that a machine had no processor time for a while. Three things keep the last from
//! counting as death:
//!
//! - **Silence is counted on a clock that stands still while the driver itself does not run.** A gap
//!   between two looks counts for no more than two pings take; and while the driver's own network thread
//!   has not echoed a ping, the answers of others may be waiting behind it.
//! - **The deadline follows the answers.** It is at least a second, four times the slowest recent step, and
//!   four times the slowest recent answer.
//! - **A suspicion is not a verdict.** It is taken back when the member is heard again, and the head asks
//!   another witness first.
//!
//! If all members answer but no data from one member arrives at the next, the link between the two is broken.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use mesh_proto::RingPing;

/// Watches the members while something is due from them.
#[derive(Debug, Default)]
pub(crate) struct FailureDetector {
    members: Vec<MemberHealth>,
    /// From each member to the next, the last one's to the driver.
    links: Vec<LinkHealth>,
    /// Something has been due since then.
    due_since: Option<Instant>,
    /// The clock's value when the oldest step that is due became the oldest.
    due_mark: Duration,
    /// The clock on which silence is counted, and when it was last looked at.
    watched: Duration,
    looked: Option<Instant>,
    last_ping: Option<Instant>,
    nonce: u64,
    /// The last ping that this worker's own network thread echoed.
    echoed: u64,
    /// Recent pings with the clock's value when they were sent.
    sent: VecDeque<(u64, Duration)>,
    /// The slowest steps of a few rows, and of any number.
    slowest: Duration,
    slowest_of_all: Duration,
    /// Steps that arrived at the driver.
    arrived: u64,
    /// Stages whose members are no longer suspected.
    cleared: Vec<u32>,
}

#[derive(Debug, Clone, Default)]
struct MemberHealth {
    /// The clock's value when it was last heard.
    heard: Duration,
    /// The slowest recent answer.
    slowest: Duration,
    received: u64,
    sent: u64,
    suspected: bool,
}

#[derive(Debug, Clone, Default)]
struct LinkHealth {
    /// Time since which data is under way on it without any arrival, and the amount that had arrived by then.
    stalled: Option<(Duration, u64)>,
    suspected: bool,
}

/// The reason why a member is suspected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Suspicion {
    /// Index of the member's stage.
    pub stage: u32,
    /// Time since the member was last heard.
    pub silence: Duration,
    /// The member answers, but data passed on to it, or by it, does not arrive.
    pub link: bool,
}

impl FailureDetector {
    /// Of `members` members besides the driver.
    pub(crate) fn new(members: u32) -> Self {
        FailureDetector {
            members: vec![MemberHealth::default(); members as usize],
            links: vec![LinkHealth::default(); members as usize],
            ..FailureDetector::default()
        }
    }

    /// Begins an epoch with `members` members; measured times are kept.
    pub(crate) fn begin_epoch(&mut self, members: u32) {
        *self = FailureDetector {
            slowest: self.slowest,
            slowest_of_all: self.slowest_of_all,
            // Echoes and answers of the last epoch may still come.
            nonce: self.nonce,
            echoed: self.nonce,
            ..FailureDetector::new(members)
        };
    }

    /// A step took this long.
    pub(crate) fn step(&mut self, took: Duration, few_rows: bool) {
        // They fade, so that one slow step does not blunt the watch for ever.
        if few_rows {
            self.slowest = took.max(self.slowest.mul_f64(0.99));
        }
        self.slowest_of_all = took.max(self.slowest_of_all.mul_f64(0.95));
    }

    /// So many steps have arrived at the driver in this epoch.
    pub(crate) fn arrived(&mut self, steps: u64) {
        self.arrived = steps;
    }

    pub(crate) fn due_since(&self) -> Option<Instant> {
        self.due_since
    }

    /// The driver looks: `since` is the earliest time since which anything is due.
    pub(crate) fn look(&mut self, since: Option<Instant>, now: Instant) {
        match (self.due_since, since) {
            (Some(_), _) => self.advance(now),
            (None, Some(_)) => {
                // No member was asked before, so none can have been silent.
                for member in &mut self.members {
                    member.heard = self.watched;
                }
                for link in &mut self.links {
                    link.stalled = None;
                }
                self.echoed = self.nonce;
                self.last_ping = None;
            }
            (None, None) => {}
        }
        self.looked = Some(now);
        if self.due_since != since {
            self.due_mark = self.watched;
            self.due_since = since;
        }
    }

    fn advance(&mut self, now: Instant) {
        let unechoed = self.nonce - self.echoed;
        let asked = |at: Instant| now.saturating_duration_since(at) <= PING;
        let hears = unechoed == 0 || (unechoed == 1 && self.last_ping.is_some_and(asked));
        if let Some(looked) = self.looked.filter(|_| hears) {
            self.watched += now.saturating_duration_since(looked).min(MOST_AT_ONCE);
        }
    }

    /// The network thread of this worker has had ping `nonce` in its hands.
    pub(crate) fn echo(&mut self, nonce: u64) {
        self.echoed = self.echoed.max(nonce.min(self.nonce));
    }

    /// A member answered a ping, or said anything else.
    pub(crate) fn heard(&mut self, stage: u32, ping: Option<&RingPing>) {
        if let Some(member) = self.members.get_mut(stage as usize) {
            member.heard = self.watched;
            if std::mem::take(&mut member.suspected) {
                self.cleared.push(stage);
            }
            if let Some(ping) = ping {
                member.received = member.received.max(ping.received);
                member.sent = member.sent.max(ping.sent);
                let sent = self.sent.iter().find(|(nonce, _)| *nonce == ping.nonce);
                if let Some((_, sent)) = sent {
                    let took = self.watched.saturating_sub(*sent);
                    member.slowest = took.max(member.slowest.mul_f64(0.95));
                }
            }
        }
        for index in 0..self.links.len() {
            let received = match self.members.get(index + 1) {
                Some(next) => next.received,
                None => self.arrived,
            };
            let (link, sent) = (&mut self.links[index], self.members[index].sent);
            let progressed = link.stalled.is_none_or(|(_, before)| received > before);
            if sent <= received {
                link.stalled = None;
            } else if progressed {
                link.stalled = Some((self.watched, received));
            }
            if progressed && std::mem::take(&mut link.suspected) {
                self.cleared.push(victim(index, self.members.len()));
            }
        }
    }

    /// Time of the next check.
    pub(crate) fn next_timer(&self) -> Option<Instant> {
        let since = self.due_since?;
        Some(self.last_ping.map_or(since, |at| at.max(since)) + PING)
    }

    /// The ping to send to every member, if it is time for one.
    pub(crate) fn ping(&mut self, now: Instant) -> Option<RingPing> {
        if now < self.next_timer()? {
            return None;
        }
        self.last_ping = Some(now);
        self.nonce += 1;
        self.sent.push_back((self.nonce, self.watched));
        if self.sent.len() > PINGS_KNOWN {
            self.sent.pop_front();
        }
        Some(RingPing {
            nonce: self.nonce,
            ..RingPing::default()
        })
    }

    /// Members that have been silent for too long, each said once until it is heard again.
    pub(crate) fn silent(&mut self) -> Vec<Suspicion> {
        let mut silent = Vec::new();
        if self.due_since.is_none() {
            return silent;
        }
        let (watched, mark) = (self.watched, self.due_mark);
        for (stage, member) in (0..).zip(&mut self.members) {
            let silence = watched.saturating_sub(member.heard.max(mark));
            let answers = (member.slowest * 4).min(MOST_PATIENCE);
            let limit = LEAST_SILENCE.max(self.slowest * 4).max(answers);
            if silence >= limit && !member.suspected {
                member.suspected = true;
                silent.push(Suspicion {
                    stage,
                    silence,
                    link: false,
                });
            }
        }
        // Many rows take long on a slow link.
        let limit = LEAST_STALL
            .max(self.slowest * 4)
            .max(self.slowest_of_all * 2);
        for (index, link) in self.links.iter_mut().enumerate() {
            let Some((since, _)) = link.stalled else {
                continue;
            };
            let silence = watched.saturating_sub(since.max(mark));
            if silence >= limit && !link.suspected {
                link.suspected = true;
                silent.push(Suspicion {
                    stage: victim(index, self.members.len()),
                    silence,
                    link: true,
                });
            }
        }
        silent
    }

    /// Members that were suspected and have been heard since.
    pub(crate) fn cleared(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.cleared)
    }
}

/// The member that is named for a broken link: the later one of the two. The last one's successor is the
/// driver itself.
fn victim(link: usize, members: usize) -> u32 {
    (link + 1).min(members.saturating_sub(1)) as u32
}

/// Between pings while something is due.
const PING: Duration = Duration::from_millis(200);

/// The most that a gap between two looks counts. The driver looks at least once for every ping, if it runs.
const MOST_AT_ONCE: Duration = Duration::from_millis(400);

/// The least silence that counts.
const LEAST_SILENCE: Duration = Duration::from_secs(1);

/// The most that slow answers make of it.
const MOST_PATIENCE: Duration = Duration::from_secs(6);

/// The least standstill of a link that counts.
const LEAST_STALL: Duration = Duration::from_secs(2);

/// Pings of which it is known when they were sent.
const PINGS_KNOWN: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    /// A driver with three members, of which the first step is due for ever.
    struct Watch {
        detector: FailureDetector,
        start: Instant,
        now: Instant,
        suspicions: Vec<(Suspicion, f64)>,
        cleared: Vec<(u32, f64)>,
    }

    impl Watch {
        fn new() -> Self {
            let start = Instant::now();
            let mut detector = FailureDetector::new(3);
            detector.look(Some(start), start);
            Watch {
                detector,
                start,
                now: start,
                suspicions: Vec::new(),
                cleared: Vec::new(),
            }
        }

        /// Runs for `seconds`; `answers` gives a member's immediate answer to a ping.
        fn run(&mut self, seconds: f64, answers: impl Fn(u32) -> Option<RingPing>) {
            let end = self.now + Duration::from_secs_f64(seconds);
            while self.now < end {
                let timer = self.detector.next_timer().unwrap();
                self.now = timer.max(self.now + Duration::from_millis(1));
                self.look(&answers);
            }
        }

        fn look(&mut self, answers: impl Fn(u32) -> Option<RingPing>) {
            self.detector.look(Some(self.start), self.now);
            if let Some(ping) = self.detector.ping(self.now) {
                self.detector.echo(ping.nonce);
                for member in 0..3 {
                    if let Some(answer) = answers(member) {
                        let nonce = ping.nonce;
                        self.detector
                            .heard(member, Some(&RingPing { nonce, ..answer }));
                    }
                }
            }
            let at = (self.now - self.start).as_secs_f64();
            let suspicions = self.detector.silent();
            self.suspicions
                .extend(suspicions.into_iter().map(|suspicion| (suspicion, at)));
            let cleared = self.detector.cleared();
            self.cleared
                .extend(cleared.into_iter().map(|stage| (stage, at)));
        }
    }

    fn all(_: u32) -> Option<RingPing> {
        Some(RingPing::default())
    }

    fn all_but_one(member: u32) -> Option<RingPing> {
        (member != 1).then(RingPing::default)
    }

    #[test]
    fn who_answers_is_never_suspected_however_long_a_step_takes() {
        let mut watch = Watch::new();
        watch.run(60.0, all);
        assert_eq!(watch.suspicions, []);
    }

    #[test]
    fn who_does_not_answer_is_suspected_after_a_second_and_once() {
        let mut watch = Watch::new();
        watch.run(60.0, all_but_one);
        let [(suspicion, at)] = watch.suspicions[..] else {
            panic!("{:?}", watch.suspicions)
        };
        assert_eq!((suspicion.stage, suspicion.link), (1, false));
        assert!((1.0..1.3).contains(&at), "{at}");
    }

    #[test]
    fn a_suspicion_is_taken_back_when_the_member_is_heard() {
        let mut watch = Watch::new();
        watch.run(2.0, all_but_one);
        assert_eq!((watch.suspicions.len(), watch.cleared.len()), (1, 0));
        watch.run(1.0, all);
        assert_eq!(watch.cleared.len(), 1);
        watch.run(2.0, all_but_one);
        assert_eq!(watch.suspicions.len(), 2, "it may be suspected again");
    }

    #[test]
    fn a_driver_that_did_not_run_blames_nobody_for_it() {
        let mut watch = Watch::new();
        watch.run(5.0, all);
        // Its thread computes, or waits for a processor, for seconds at a time; answers come when it asks.
        for _ in 0..20 {
            watch.now += Duration::from_secs(3);
            watch.look(all);
            watch.now += Duration::from_millis(5);
            watch.look(all);
        }
        assert_eq!(watch.suspicions, []);
        // A dead member is found nevertheless.
        watch.run(3.0, all_but_one);
        assert_eq!(watch.suspicions.len(), 1);
    }

    #[test]
    fn answers_that_wait_behind_the_own_network_thread_are_no_silence() {
        let mut watch = Watch::new();
        watch.run(2.0, all);
        // The engine's thread runs, the network's does not: no echo comes, and no answer.
        for _ in 0..40 {
            watch.now += Duration::from_millis(200);
            watch.detector.look(Some(watch.start), watch.now);
            watch.detector.ping(watch.now);
            assert_eq!(watch.detector.silent(), []);
        }
        let nonce = watch.detector.nonce;
        watch.detector.echo(nonce);
        watch.run(2.0, all_but_one);
        assert_eq!(watch.suspicions.len(), 1);
    }

    #[test]
    fn slow_answers_of_late_stretch_the_deadline() {
        let mut watch = Watch::new();
        // Answers that take 0.6 s each.
        let mut late: VecDeque<u64> = VecDeque::new();
        for _ in 0..100 {
            watch.now += Duration::from_millis(200);
            watch.detector.look(Some(watch.start), watch.now);
            if let Some(ping) = watch.detector.ping(watch.now) {
                watch.detector.echo(ping.nonce);
                late.push_back(ping.nonce);
            }
            if late.len() > 3 {
                let nonce = late.pop_front().unwrap();
                for member in 0..3 {
                    let ping = RingPing {
                        nonce,
                        ..RingPing::default()
                    };
                    watch.detector.heard(member, Some(&ping));
                }
            }
        }
        let begun = watch.now;
        watch.run(5.0, all_but_one);
        let [(_, at)] = watch.suspicions[..] else {
            panic!("{:?}", watch.suspicions)
        };
        let took = at - (begun - watch.start).as_secs_f64();
        assert!((2.0..3.0).contains(&took), "{took}");
    }

    #[test]
    fn a_broken_link_between_two_that_answer_is_noticed() {
        let mut watch = Watch::new();
        watch.run(60.0, |member| {
            Some(RingPing {
                received: if member == 2 { 4 } else { 5 },
                sent: if member == 2 { 4 } else { 5 },
                ..RingPing::default()
            })
        });
        // Nothing arrives at the driver either, but its own link has four steps under way for the same
        // reason.
        let found: Vec<(u32, bool)> = watch
            .suspicions
            .iter()
            .map(|(suspicion, _)| (suspicion.stage, suspicion.link))
            .collect();
        assert_eq!(found, [(2, true), (2, true)]);
        let at = watch.suspicions[0].1;
        assert!((2.0..2.6).contains(&at), "{at}");
    }

    #[test]
    fn a_link_with_something_under_way_all_the_time_is_not_broken() {
        let mut watch = Watch::new();
        // There is always one step between two members when they answer, but never the same one.
        for round in 1..300 {
            watch.detector.arrived(round);
            watch.run(0.2, |member| {
                Some(RingPing {
                    received: round + 3 - u64::from(member),
                    sent: round + 3 - u64::from(member),
                    ..RingPing::default()
                })
            });
        }
        assert_eq!(watch.suspicions, []);
    }

    #[test]
    fn nothing_is_asked_while_nothing_is_due() {
        let start = Instant::now();
        let mut detector = FailureDetector::new(2);
        assert_eq!(detector.next_timer(), None);
        assert_eq!(detector.ping(start + Duration::from_secs(9)), None);
        assert!(detector.silent().is_empty());
        // A long idle time before does not count as silence.
        let later = start + Duration::from_secs(60);
        detector.look(Some(later), later);
        detector.look(Some(later), later + Duration::from_millis(900));
        assert!(detector.silent().is_empty());
    }
}
