//! Clients that have proved that they receive datagrams at their address.
//!
//! An answer may have hundreds of times the bytes of its Task, so it must not go to a forged address. An
//! unknown client gets a cookie and is served when it has sent the cookie back. No state is kept for it
//! meanwhile, and no answer here is longer than the datagram that it answers.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use dcf::MsgType;
use mesh_base::places::Places;
use mesh_control::fair::Origin;
use mesh_service::cookie::{COOKIE_LEN, Cookies};

#[derive(Debug)]
pub(crate) struct Proofs {
    cookies: Cookies,
    started: Instant,
    /// Addresses that have echoed a cookie, when, and their place.
    verified: HashMap<SocketAddr, (Instant, u64)>,
    /// The same, in their places by the network they are of: no network keeps the others out.
    places: Places<Origin, SocketAddr>,
    /// Addresses whose tasks came before any echo.
    mute: HashMap<IpAddr, Mute>,
}

/// Tasks of clients that have not echoed a cookie.
#[derive(Debug, Clone, Copy)]
struct Mute {
    tasks: u32,
    first: Instant,
    last: Instant,
}

/// Answer to a client that has not yet proved its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProofReply {
    /// A Challenge with this cookie.
    Challenge([u8; COOKIE_LEN]),
    /// An empty Ack: it is known from now on.
    Verified,
    /// An empty Health.
    Health,
    /// No answer.
    Silence,
}

impl Proofs {
    /// No client is known yet. `key` must be secret.
    pub(crate) fn new(key: &[u8; 32], now: Instant) -> Self {
        Self {
            cookies: Cookies::new(key),
            started: now,
            verified: HashMap::new(),
            places: Places::new(MOST_KNOWN, MOST_KNOWN / 4),
            mute: HashMap::new(),
        }
    }

    /// True if this client has recently echoed a cookie.
    pub(crate) fn knows(&self, client: SocketAddr, now: Instant) -> bool {
        let known = self.verified.get(&client);
        known.is_some_and(|(since, _)| now.saturating_duration_since(*since) < KNOWN_FOR)
    }

    /// Notes a task of a client that is not known. True if it has sent several by now and no echo, as clients
    /// do that do not know Challenges.
    pub(crate) fn is_mute(&mut self, client: IpAddr, now: Instant) -> bool {
        let is_recent = |mute: &Mute| now.saturating_duration_since(mute.last) < MUTE_FOR;
        if self.mute.len() >= MOST_MUTE && !self.mute.contains_key(&client) {
            self.mute.retain(|_, mute| is_recent(mute));
            if self.mute.len() >= MOST_MUTE {
                return false;
            }
        }
        let fresh = Mute {
            tasks: 0,
            first: now,
            last: now,
        };
        let mute = self.mute.entry(client).or_insert(fresh);
        if !is_recent(mute) {
            *mute = fresh;
        }
        mute.tasks = mute.tasks.saturating_add(1);
        mute.last = now;
        mute.tasks >= SEVERAL && now.saturating_duration_since(mute.first) >= ECHOES_WITHIN
    }

    /// A message of a client that is not known. `room` is the length of its datagram beyond a header.
    pub(crate) fn ask(
        &mut self,
        client: SocketAddr,
        (kind, payload): (MsgType, &[u8]),
        room: usize,
        now: Instant,
    ) -> ProofReply {
        let uptime = now.saturating_duration_since(self.started);
        match kind {
            MsgType::CHALLENGE_REPLY if self.cookies.check(payload, client, uptime) => {
                self.note(client, now);
                self.mute.remove(&client.ip());
                ProofReply::Verified
            }
            MsgType::TASK | MsgType::CHUNK | MsgType::HEALTH if room >= COOKIE_LEN => {
                ProofReply::Challenge(self.cookies.make(client, uptime))
            }
            // An old shim sees by it that a head is here.
            MsgType::HEALTH => ProofReply::Health,
            _ => ProofReply::Silence,
        }
    }

    /// A client echoed its cookie. Another may have to show its address again for it.
    fn note(&mut self, client: SocketAddr, now: Instant) {
        if let Some((_, place)) = self.verified.remove(&client) {
            self.places.leave(place);
        }
        let (place, other) = self.places.enter(Origin::of(client.ip()), client);
        if let Some(other) = other {
            self.verified.remove(&other);
        }
        self.verified.insert(client, (now, place));
    }
}

/// Time for which an echoed cookie counts.
const KNOWN_FOR: Duration = Duration::from_secs(3600);
/// Tasks without an echo that say something about their client,
const SEVERAL: u32 = 3;
/// if the first of them is as old as this: one task may be many Chunks, and an echo takes a round trip.
const ECHOES_WITHIN: Duration = Duration::from_secs(2);
/// Time after which a client's tasks without an echo are forgotten.
const MUTE_FOR: Duration = Duration::from_secs(60);
/// Addresses whose tasks without an echo are counted.
const MOST_MUTE: usize = 256;
/// Addresses that are known at once.
const MOST_KNOWN: usize = 1 << 14;

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    #[test]
    fn a_client_is_known_when_it_has_echoed_its_own_cookie() {
        let start = Instant::now();
        let mut proofs = Proofs::new(&[7; 32], start);
        let (client, other) = (([192, 0, 2, 1], 9).into(), ([192, 0, 2, 2], 9).into());
        let task = (MsgType::TASK, &b"{}"[..]);
        assert_eq!(
            proofs.ask(client, task, COOKIE_LEN - 1, start),
            ProofReply::Silence
        );
        let ProofReply::Challenge(cookie) = proofs.ask(client, task, COOKIE_LEN, start) else {
            panic!("no challenge");
        };
        let echo = (MsgType::CHALLENGE_REPLY, &cookie[..]);
        assert_eq!(proofs.ask(other, echo, 99, start), ProofReply::Silence);
        assert!(!proofs.knows(client, start));
        assert_eq!(proofs.ask(client, echo, 99, start), ProofReply::Verified);
        assert!(proofs.knows(client, start) && !proofs.knows(other, start));
        assert!(!proofs.knows(client, start + KNOWN_FOR));
    }

    #[test]
    fn a_client_that_never_echoes_is_told_from_one_that_has_yet_to() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut proofs = Proofs::new(&[7; 32], start);
        let client: SocketAddr = ([192, 0, 2, 1], 9).into();
        // The Chunks of one task.
        assert!((0..100).all(|_| !proofs.is_mute(client.ip(), start)));
        let task = (MsgType::TASK, &b"{}"[..]);
        let ProofReply::Challenge(cookie) = proofs.ask(client, task, COOKIE_LEN, start) else {
            panic!("no challenge");
        };
        proofs.ask(client, (MsgType::CHALLENGE_REPLY, &cookie), 99, at(100));
        assert!(!proofs.is_mute(client.ip(), at(3000)), "another port of it");
        assert!(!proofs.is_mute(client.ip(), at(4000)));
        assert!(proofs.is_mute(client.ip(), at(5000)));
        assert!(!proofs.is_mute(client.ip(), at(70_000)), "a new beginning");
        for number in 0..2 * MOST_MUTE as u32 {
            proofs.is_mute(IpAddr::from(number.to_be_bytes()), at(70_000));
        }
        assert_eq!(proofs.mute.len(), MOST_MUTE);
    }

    #[test]
    fn one_source_with_many_ports_keeps_nobody_out() {
        let now = Instant::now();
        let mut proofs = Proofs::new(&[7; 32], now);
        let mut prove = |client: SocketAddr| {
            let cookie = proofs.cookies.make(client, Duration::ZERO);
            proofs.ask(client, (MsgType::CHALLENGE_REPLY, &cookie), 99, now)
        };
        let before = ([192, 0, 2, 1], 9).into();
        assert_eq!(prove(before), ProofReply::Verified);
        for port in 1..=u16::try_from(MOST_KNOWN + 10).unwrap() {
            assert_eq!(prove(([192, 0, 2, 66], port).into()), ProofReply::Verified);
        }
        for host in 0..u64::try_from(MOST_KNOWN / 4 + 10).unwrap() {
            let host = (0x2001_0db8_u128 << 96) + u128::from(host);
            let verdict = prove((Ipv6Addr::from(host), 9).into());
            assert_eq!(verdict, ProofReply::Verified);
        }
        let after = ([192, 0, 2, 2], 9).into();
        assert_eq!(prove(after), ProofReply::Verified);
        assert_eq!(prove(after), ProofReply::Verified, "again");
        assert!(proofs.knows(before, now) && proofs.knows(after, now));
        assert_eq!(proofs.verified.len(), MOST_KNOWN / 4 * 2 + 2);
        assert_eq!(proofs.places.len(), proofs.verified.len());
    }

    #[test]
    fn no_message_is_answered_with_more_bytes_than_it_had() {
        let now = Instant::now();
        let mut proofs = Proofs::new(&[7; 32], now);
        let client = ([192, 0, 2, 1], 9).into();
        for kind in 0..=u8::MAX {
            for room in [0, 1, COOKIE_LEN - 1, COOKIE_LEN, 1000] {
                let payload = vec![0; room];
                let answer = match proofs.ask(client, (MsgType(kind), &payload), room, now) {
                    ProofReply::Challenge(cookie) => cookie.len(),
                    ProofReply::Verified | ProofReply::Health | ProofReply::Silence => 0,
                };
                assert!(answer <= room, "{kind:#04x}");
            }
        }
    }
}
