//! Notices members that have fallen silent.

use std::time::{Duration, Instant};

use mesh_proto::RingPing;

/// Watches the members while something is due from them.
///
/// A member's network task answers pings however long its step takes, so silence means that the process is stopped or cut
/// off. If everybody answers but a step that was passed on does not arrive, the link between two members is broken, and the
/// later one of them counts as gone.
#[derive(Debug)]
pub(crate) struct Pulse {
    members: Vec<MemberPulse>,
    /// Something has been due since then.
    due_since: Option<Instant>,
    last_ping: Option<Instant>,
    nonce: u64,
    slowest: Duration,
    /// Steps that arrived at the driver.
    arrived: u64,
}

#[derive(Debug, Clone)]
struct MemberPulse {
    heard: Instant,
    received: u64,
    sent: u64,
    /// Since when the member before it has passed on more than has arrived here.
    starved: Option<Instant>,
    suspected: bool,
}

impl Pulse {
    /// Of `members` members besides the driver.
    pub(crate) fn new(members: u32, now: Instant) -> Self {
        Pulse {
            members: vec![
                MemberPulse {
                    heard: now,
                    received: 0,
                    sent: 0,
                    starved: None,
                    suspected: false,
                };
                members as usize
            ],
            due_since: None,
            last_ping: None,
            nonce: 0,
            slowest: Duration::ZERO,
            arrived: 0,
        }
    }

    /// A new epoch with `members` members; what is known of the pace stays.
    pub(crate) fn begin_epoch(&mut self, members: u32, now: Instant) {
        let slowest = self.slowest;
        *self = Pulse::new(members, now);
        self.slowest = slowest;
    }

    /// A step took this long.
    pub(crate) fn step(&mut self, took: Duration) {
        // Fades, so that one slow step does not blunt the watch for ever.
        self.slowest = took.max(self.slowest.mul_f64(0.99));
    }

    /// So many steps have arrived at the driver in this epoch.
    pub(crate) fn arrived(&mut self, steps: u64) {
        self.arrived = steps;
    }

    /// Since when something has been due.
    pub(crate) fn due_since(&self) -> Option<Instant> {
        self.due_since
    }

    /// Whether anything is due, and since when at the earliest.
    pub(crate) fn due(&mut self, since: Option<Instant>, now: Instant) {
        if since.is_some() && self.due_since.is_none() {
            // Nobody was asked before, so nobody can have been silent.
            for member in &mut self.members {
                member.heard = now;
            }
        }
        self.due_since = since;
    }

    /// A member answered a ping, or said anything else.
    pub(crate) fn heard(&mut self, member: u32, ping: Option<&RingPing>, now: Instant) {
        if let Some(pulse) = self.members.get_mut(member as usize) {
            pulse.heard = now;
            if let Some(ping) = ping {
                pulse.received = pulse.received.max(ping.received);
                pulse.sent = pulse.sent.max(ping.sent);
            }
        }
        for member in 0..self.members.len() {
            // The last one's successor is the driver. If nothing of what it passed on arrives there, it is the one to go.
            let (sent, received) = match self.members.get(member + 1) {
                Some(next) => (self.members[member].sent, next.received),
                None => (self.members[member].sent, self.arrived),
            };
            let starved = if member + 1 < self.members.len() {
                member + 1
            } else {
                member
            };
            // The last member may be starved in either way.
            let both = starved == member && member > 0;
            let upstream = both && self.members[member - 1].sent > self.members[member].received;
            let pulse = &mut self.members[starved];
            if sent > received || upstream {
                pulse.starved.get_or_insert(now);
            } else {
                pulse.starved = None;
            }
        }
        if let Some(pulse) = self.members.get_mut(member as usize) {
            pulse.suspected &= pulse.starved.is_some();
        }
    }

    /// When to look again.
    pub(crate) fn next_timer(&self) -> Option<Instant> {
        let since = self.due_since?;
        let ping = self.last_ping.map_or(since, |at| at + PING) + PING;
        Some(ping.min(since + self.limit()).max(since + PING))
    }

    /// The ping to send to every member, if it is time for one.
    pub(crate) fn ping(&mut self, now: Instant) -> Option<RingPing> {
        let since = self.due_since?;
        let last = self.last_ping.map_or(since, |at| at.max(since));
        if now < last + PING {
            return None;
        }
        self.last_ping = Some(now);
        self.nonce += 1;
        Some(RingPing {
            nonce: self.nonce,
            ..RingPing::default()
        })
    }

    /// Members that have been silent for too long, each said once.
    pub(crate) fn silent(&mut self, now: Instant) -> Vec<(u32, Duration)> {
        let Some(since) = self.due_since else {
            return Vec::new();
        };
        let limit = self.limit();
        let mut silent = Vec::new();
        for (index, member) in self.members.iter_mut().enumerate() {
            let heard = now.saturating_duration_since(member.heard.max(since));
            let starved = member
                .starved
                .map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
            let quiet = heard.max(starved);
            if quiet >= limit && !member.suspected {
                member.suspected = true;
                silent.push((index as u32, quiet));
            }
        }
        silent
    }

    /// Silence beyond this is death: a second, or four times the slowest step of late.
    fn limit(&self) -> Duration {
        LEAST_SILENCE.max(self.slowest * 4)
    }
}

/// Between pings while something is due.
const PING: Duration = Duration::from_millis(200);

/// The least silence that counts.
const LEAST_SILENCE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs for `seconds`; `answers` says what a member answers to a ping.
    fn run(seconds: f64, answers: impl Fn(u32) -> Option<RingPing>) -> Vec<(u32, f64)> {
        let start = Instant::now();
        let mut pulse = Pulse::new(3, start);
        pulse.due(Some(start), start);
        let mut silent = Vec::new();
        let mut now = start;
        while now < start + Duration::from_secs_f64(seconds) {
            now = pulse
                .next_timer()
                .unwrap()
                .max(now + Duration::from_millis(1));
            if pulse.ping(now).is_some() {
                for member in 0..3 {
                    if let Some(ping) = answers(member) {
                        pulse.heard(member, Some(&ping), now);
                    }
                }
            }
            for (member, _) in pulse.silent(now) {
                silent.push((member, (now - start).as_secs_f64()));
            }
        }
        silent
    }

    #[test]
    fn who_answers_is_never_suspected_however_long_a_step_takes() {
        assert_eq!(run(60.0, |_| Some(RingPing::default())), []);
    }

    #[test]
    fn who_does_not_answer_is_suspected_after_a_second_and_once() {
        let silent = run(60.0, |member| (member != 1).then(RingPing::default));
        let [(1, at)] = silent[..] else {
            panic!("{silent:?}")
        };
        assert!((1.0..1.3).contains(&at), "{at}");
    }

    #[test]
    fn a_broken_link_between_two_that_answer_is_noticed() {
        let silent = run(60.0, |member| {
            Some(RingPing {
                received: if member == 2 { 4 } else { 5 },
                sent: if member == 2 { 4 } else { 5 },
                ..RingPing::default()
            })
        });
        let [(2, at)] = silent[..] else {
            panic!("{silent:?}")
        };
        assert!((1.0..1.6).contains(&at), "{at}");
    }

    #[test]
    fn nothing_is_asked_while_nothing_is_due() {
        let start = Instant::now();
        let mut pulse = Pulse::new(2, start);
        assert_eq!(pulse.next_timer(), None);
        assert_eq!(pulse.ping(start + Duration::from_secs(9)), None);
        assert!(pulse.silent(start + Duration::from_secs(9)).is_empty());
        // A long idle time before is no silence.
        let later = start + Duration::from_secs(60);
        pulse.due(Some(later), later);
        assert!(pulse.silent(later + Duration::from_millis(900)).is_empty());
    }
}
