//! Sessions of clients that hold a key or token: their keys, their limits and their ends.
//!
//! A session begins at the QUIC port ([`super::door`]) and lives as long as what the client has shown there
//! holds, at most [`LIFETIME`], and as long as the client says something. Answers go only to the address of
//! the last datagram that was authentic and whose sender had shown that it receives there.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use bytes::Bytes;
use dcf::{ErrorCode, Message};
use mesh_base::places::Places;
use mesh_control::fair::Origin;
use mesh_net::seal::{self, OpenError};
use mesh_net::sealed::SealedSession;

use crate::front::http::{Admitted, Client, Denied};
use crate::locks::lock;
use crate::mesh::timestamp_us;

/// Bounds on the sessions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SessionLimits {
    /// Number of sessions; each key or token has at most an eighth of them.
    pub sessions: usize,
    /// Silence after which a session ends.
    pub idle: Duration,
}

/// The sessions of one head.
#[derive(Debug)]
pub(crate) struct Sessions {
    limits: SessionLimits,
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    sessions: HashMap<u64, Session>,
    /// Open ones, by the key or token.
    places: Places<Origin, u64>,
    /// Those that are over, oldest first. Their clients may still be told.
    over: VecDeque<(Instant, u64)>,
    /// Those whose clients have yet to be told that they are over.
    untold: Vec<u64>,
}

#[derive(Debug)]
struct Session {
    sealed: SealedSession,
    admitted: Admitted,
    /// Address of the handshake.
    home: SocketAddr,
    /// Address for answers, once the client has sent something from an address that it has shown to be its
    /// own.
    at: Option<SocketAddr>,
    began: Instant,
    heard: Instant,
    place: u64,
    /// The cause of its end.
    over: Option<String>,
}

/// A datagram of a session that was authentic.
#[derive(Debug)]
pub(super) struct Opened {
    pub session: u64,
    /// The datagram inside.
    pub inner: Bytes,
    /// Address at which the session began.
    pub home: SocketAddr,
}

impl Sessions {
    pub(crate) fn new(limits: SessionLimits) -> Self {
        Self {
            limits,
            known: Mutex::new(Known {
                sessions: HashMap::new(),
                places: Places::new(limits.sessions, limits.sessions / 8),
                over: VecDeque::new(),
                untold: Vec::new(),
            }),
        }
    }

    pub(crate) fn limits(&self) -> SessionLimits {
        self.limits
    }

    /// Takes a session. Another one may have to end for it. False if there is one with its number.
    pub(super) fn enter(
        &self,
        sealed: SealedSession,
        admitted: Admitted,
        home: SocketAddr,
        now: Instant,
    ) -> bool {
        let mut known = lock(&self.known);
        let id = sealed.id();
        if known.sessions.contains_key(&id) {
            return false;
        }
        let origin = Client::new(admitted.clone(), home.ip()).origin();
        let (place, other) = known.places.enter(origin, id);
        let session = Session {
            sealed,
            admitted,
            home,
            at: None,
            began: now,
            heard: now,
            place,
            over: None,
        };
        known.sessions.insert(id, session);
        if let Some(other) = other {
            known.end(other, CROWDED.to_owned(), now);
        }
        true
    }

    /// True if there is nothing to look after.
    pub(super) fn is_empty(&self) -> bool {
        lock(&self.known).sessions.is_empty()
    }

    /// Opens a sealed datagram. `None` if it is of no session, or not fresh and authentic.
    pub(super) fn open(&self, message: &Message, now: Instant) -> Option<Opened> {
        let session = seal::session(message)?;
        let mut known = lock(&self.known);
        let found = known.sessions.get_mut(&session)?;
        let inner: Result<Bytes, OpenError> = found.sealed.open(message, now);
        let inner = inner.ok()?;
        Some(Opened {
            session,
            inner,
            home: found.home,
        })
    }

    /// True if answers of a session go to this address, which its client has proven.
    pub(super) fn is_at(&self, session: u64, from: SocketAddr) -> bool {
        let known = lock(&self.known);
        let found = known.sessions.get(&session);
        found.is_some_and(|found| found.at == Some(from))
    }

    /// Notes an authentic datagram from an address that its sender has proven. False if the session is over.
    pub(super) fn heard(&self, session: u64, from: SocketAddr, now: Instant) -> bool {
        let mut known = lock(&self.known);
        let Some(found) = known.sessions.get_mut(&session) else {
            return false;
        };
        found.at = Some(from);
        let open = found.over.is_none();
        if open {
            found.heard = now;
        }
        open
    }

    /// The client of an open session.
    pub(super) fn client(&self, session: u64) -> Option<Client> {
        let known = lock(&self.known);
        let found = known.sessions.get(&session)?;
        let open = found.over.is_none();
        open.then(|| Client::new(found.admitted.clone(), found.home.ip()))
    }

    /// Seals a message to the client of an open session; its address, and the datagram.
    pub(super) fn seal(
        &self,
        session: u64,
        message: &Message,
        now: Instant,
    ) -> Option<(SocketAddr, Bytes)> {
        let mut known = lock(&self.known);
        let found = known.sessions.get_mut(&session)?;
        match found.over {
            None => found.seal(message, now),
            Some(_) => None,
        }
    }

    /// Seals a message to a client whose address is not known to be its own yet.
    pub(super) fn seal_unproven(
        &self,
        session: u64,
        message: &Message,
        now: Instant,
    ) -> Option<Bytes> {
        let mut known = lock(&self.known);
        let found = known.sessions.get_mut(&session)?;
        let sealed = found.sealed.seal(message, 0, now).ok()?;
        Some(sealed.encode_datagram())
    }

    /// Tells the client of a session that it is over, in answer to a message with this sequence.
    pub(super) fn tell_end(
        &self,
        session: u64,
        sequence: u32,
        now: Instant,
    ) -> Option<(SocketAddr, Bytes)> {
        lock(&self.known).tell_end(session, sequence, now)
    }

    /// Ends the sessions whose time is over, and those whose key or token does not hold any more, as `again`
    /// says. Returns what their clients are told.
    pub(super) fn review(
        &self,
        now: Instant,
        again: impl Fn(&Admitted) -> Result<Admitted, Denied>,
    ) -> Vec<(SocketAddr, Bytes)> {
        let mut known = lock(&self.known);
        let idle = self.limits.idle;
        let mut ends = Vec::new();
        for (&id, session) in &mut known.sessions {
            if session.over.is_some() {
                continue;
            }
            match again(&session.admitted) {
                Err(denied) => ends.push((id, denied.to_string())),
                Ok(_) if now.saturating_duration_since(session.began) >= LIFETIME => {
                    ends.push((id, format!("the session is {LIFETIME:?} old: open another")));
                }
                Ok(_) if now.saturating_duration_since(session.heard) >= idle => {
                    ends.push((
                        id,
                        format!("nothing came for {idle:?}: open another session"),
                    ));
                }
                Ok(admitted) => session.admitted = admitted,
            }
        }
        for (id, text) in ends {
            known.end(id, text, now);
        }
        let is_forgotten =
            |(since, _): &(Instant, u64)| now.saturating_duration_since(*since) >= OVER_FOR;
        while known.over.front().is_some_and(is_forgotten) {
            known.forget_oldest();
        }
        let untold = std::mem::take(&mut known.untold);
        let told = untold
            .into_iter()
            .filter_map(|id| known.tell_end(id, 0, now));
        told.collect()
    }
}

impl Known {
    fn end(&mut self, id: u64, text: String, now: Instant) {
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        session.over = Some(text);
        self.places.leave(session.place);
        self.over.push_back((now, id));
        self.untold.push(id);
        if self.over.len() > MOST_OVER {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((_, id)) = self.over.pop_front() {
            self.sessions.remove(&id);
        }
    }

    fn tell_end(&mut self, id: u64, sequence: u32, now: Instant) -> Option<(SocketAddr, Bytes)> {
        let session = self.sessions.get_mut(&id)?;
        let text = session.over.clone()?;
        let code = ErrorCode::UNAUTHORIZED;
        let error = Message::error(sequence, timestamp_us(), code, &text);
        session.seal(&error, now)
    }
}

impl Session {
    fn seal(&mut self, message: &Message, now: Instant) -> Option<(SocketAddr, Bytes)> {
        let to = self.at?;
        let sealed = self.sealed.seal(message, 0, now).ok()?;
        Some((to, sealed.encode_datagram()))
    }
}

/// Most time for which a session lasts.
pub(super) const LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Time for which a client that sends something hears why its session is over.
const OVER_FOR: Duration = Duration::from_secs(60);
/// Sessions that are over and remembered.
const MOST_OVER: usize = 256;
const CROWDED: &str = "newer sessions took the place of this one (dcf.sessions): open another";
