//! The QUIC door for clients: a key or token is judged as at the HTTP API, and opens a session.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use dcf::{ErrorCode, MsgType};
use mesh_net::quic::{ClientDoor, NoSession, SessionAsk, SessionTerms};
use mesh_net::sealed::SealedSession;

use super::sealed::{LIFETIME, Sessions};
use crate::audit::Recorder;
use crate::front::http::Keys;

/// Admits clients to sealed DCF.
#[derive(Debug)]
pub(crate) struct Door {
    pub keys: Keys,
    pub sessions: Arc<Sessions>,
    pub audit: Recorder,
    /// Address of the clients' port.
    pub udp: SocketAddr,
}

impl ClientDoor for Door {
    fn enter(
        &self,
        ask: &SessionAsk<'_>,
        session: SealedSession,
    ) -> Result<SessionTerms, NoSession> {
        let refused = |code, text: &str| NoSession {
            code,
            text: text.to_owned(),
        };
        let limits = self.sessions.limits();
        if limits.sessions == 0 {
            let text = "this head does not serve sealed DCF (dcf.sessions = 0); use its HTTP API";
            return Err(refused(ErrorCode::UNAUTHORIZED, text));
        }
        let now = SystemTime::now();
        let admitted = self.keys.admit_shown(ask.credential, ask.tenant, now);
        let from = ask.from.ip();
        let admitted = admitted.map_err(|denied| {
            if let Some(refused) = denied.refused("quic") {
                self.audit.refused_credential(refused, from);
            }
            refused(ErrorCode::UNAUTHORIZED, &denied.to_string())
        })?;
        let bytes = ask.credential.len() + ask.tenant.len();
        self.audit
            .message("quic", MsgType::CLIENT_HELLO, from, bytes);
        let lifetime = admitted
            .papers
            .time_left(now)
            .map_or(LIFETIME, |left| left.min(LIFETIME));
        let id = session.id();
        if !self
            .sessions
            .enter(session, admitted, ask.from, Instant::now())
        {
            let text = "the number of the session is taken; ask again";
            return Err(refused(ErrorCode::INTERNAL, text));
        }
        tracing::debug!(session = id, %from, "session of a client opened");
        Ok(SessionTerms {
            lifetime,
            idle: limits.idle,
            udp: self.udp,
        })
    }
}
