//! Clients that have shown that they have the address that they send from.
//!
//! An answer may have hundreds of times the bytes of its Task, so it must not go to an address that somebody else wrote into a
//! datagram. A client that is not known gets a cookie and is served when it has sent the cookie back. Nothing is kept for it
//! meanwhile, and no answer here is longer than what it answers.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use dcf::MsgType;
use mesh_service::cookie::{COOKIE_LEN, Cookies};

/// The clients of one port.
#[derive(Debug)]
pub struct Proofs {
    cookies: Cookies,
    started: Instant,
    /// Addresses that have echoed a cookie, and when.
    verified: HashMap<SocketAddr, Instant>,
}

/// What a client that has shown nothing yet is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// A Challenge with this cookie.
    Challenge([u8; COOKIE_LEN]),
    /// An empty Ack: it is known from now on.
    Verified,
    /// An empty Health.
    Health,
    /// Nothing.
    Silence,
}

impl Proofs {
    /// Nobody is known. `key` is nobody else's.
    pub fn new(key: &[u8; 32], now: Instant) -> Self {
        Self {
            cookies: Cookies::new(key),
            started: now,
            verified: HashMap::new(),
        }
    }

    /// True if this client has echoed a cookie lately.
    pub fn knows(&self, client: SocketAddr, now: Instant) -> bool {
        let since = self.verified.get(&client);
        since.is_some_and(|since| now.saturating_duration_since(*since) < KNOWN_FOR)
    }

    /// A message of a client that is not known. `room` is the length of its datagram beyond a header.
    pub fn ask(
        &mut self,
        client: SocketAddr,
        (kind, payload): (MsgType, &[u8]),
        room: usize,
        now: Instant,
    ) -> Verdict {
        let uptime = now.saturating_duration_since(self.started);
        match kind {
            MsgType::CHALLENGE_REPLY if self.cookies.check(payload, client, uptime) => {
                if self.verified.len() >= MOST_KNOWN {
                    self.verified
                        .retain(|_, since| now.saturating_duration_since(*since) < KNOWN_FOR);
                }
                if self.verified.len() >= MOST_KNOWN {
                    return Verdict::Silence;
                }
                self.verified.insert(client, now);
                Verdict::Verified
            }
            MsgType::TASK | MsgType::CHUNK | MsgType::HEALTH if room >= COOKIE_LEN => {
                Verdict::Challenge(self.cookies.make(client, uptime))
            }
            // An old shim sees by it that a head is here.
            MsgType::HEALTH => Verdict::Health,
            _ => Verdict::Silence,
        }
    }
}

/// Time for which an echoed cookie counts.
const KNOWN_FOR: Duration = Duration::from_secs(3600);
/// Addresses that are known at once.
const MOST_KNOWN: usize = 1 << 14;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_known_when_it_has_echoed_its_own_cookie() {
        let start = Instant::now();
        let mut proofs = Proofs::new(&[7; 32], start);
        let (client, other) = (([192, 0, 2, 1], 9).into(), ([192, 0, 2, 2], 9).into());
        let task = (MsgType::TASK, &b"{}"[..]);
        assert_eq!(
            proofs.ask(client, task, COOKIE_LEN - 1, start),
            Verdict::Silence
        );
        let Verdict::Challenge(cookie) = proofs.ask(client, task, COOKIE_LEN, start) else {
            panic!("no challenge");
        };
        let echo = (MsgType::CHALLENGE_REPLY, &cookie[..]);
        assert_eq!(proofs.ask(other, echo, 99, start), Verdict::Silence);
        assert!(!proofs.knows(client, start));
        assert_eq!(proofs.ask(client, echo, 99, start), Verdict::Verified);
        assert!(proofs.knows(client, start) && !proofs.knows(other, start));
        assert!(!proofs.knows(client, start + KNOWN_FOR));
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
                    Verdict::Challenge(cookie) => cookie.len(),
                    Verdict::Verified | Verdict::Health | Verdict::Silence => 0,
                };
                assert!(answer <= room, "{kind:#04x}");
            }
        }
    }
}
