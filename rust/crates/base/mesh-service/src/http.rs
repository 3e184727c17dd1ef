//! Serving an `axum` router until the drain, then letting open requests finish.
//!
//! [`Connections`] limits the time and the connections of clients. [`Guard`] decides which clients may ask.

mod budget;
mod guard;
mod open;
mod origin;
mod server;
mod stream;
mod table;
#[cfg(test)]
mod tests;
mod tls;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::units;
use crate::files::raise_open_files;
use server::Server;
use table::Bounds;

pub use guard::Guard;
pub use origin::{NotAnOrigin, Origin};
pub use stream::{NoRoom, TooSlow, cause_of};
pub use tls::{ServerTls, TlsConfig, TlsError};

/// Time limits for clients, and the number of connections that they may have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Connections {
    /// Maximum number of connections; 0 is 1024. Lower where the process may not open that many files.
    pub total: usize,
    /// Connections of one address or of one IPv6 /64; 0 is half of `total`. Loopback has no such limit.
    pub per_source: usize,
    /// Time limit for the head of a request.
    #[serde(with = "units::duration")]
    pub header_timeout: Duration,
    /// Time limit between two requests.
    #[serde(with = "units::duration")]
    pub idle_timeout: Duration,
    /// Time limit for silence within the body of a request.
    #[serde(with = "units::duration")]
    pub body_timeout: Duration,
    /// Time limit for a client that takes nothing of an answer that is ready.
    #[serde(with = "units::duration")]
    pub write_timeout: Duration,
    /// Maximum bytes of incomplete requests over all connections. A single incomplete request may have more.
    #[serde(with = "units::bytes")]
    pub unfinished: u64,
}

impl Default for Connections {
    fn default() -> Self {
        Self {
            total: 0,
            per_source: 0,
            header_timeout: Duration::from_secs(15),
            // Longer than proxies keep theirs, so that they close first and nothing is sent into a closing one.
            idle_timeout: Duration::from_secs(120),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(60),
            unfinished: 16 << 20,
        }
    }
}

impl Connections {
    /// Name of a time limit that is zero, which would close all connections at once.
    pub fn zero(&self) -> Option<&'static str> {
        let times = [
            ("http.connections.header_timeout", self.header_timeout),
            ("http.connections.idle_timeout", self.idle_timeout),
            ("http.connections.body_timeout", self.body_timeout),
            ("http.connections.write_timeout", self.write_timeout),
        ];
        let zero = times.into_iter().find(|(_, time)| time.is_zero());
        zero.map(|(name, _)| name)
    }

    fn bounds(&self, files: usize) -> Bounds {
        let own = (files / 4).clamp(OWN_FILES.min(files / 2), MOST_OWN_FILES);
        let most = files
            .saturating_sub(own + RESERVE)
            .clamp(1, MOST_CONNECTIONS);
        let total = match self.total {
            0 => most.min(USUAL_CONNECTIONS),
            total => total.min(most),
        };
        let per_source = match self.per_source {
            0 => total.div_ceil(2),
            per_source => per_source,
        };
        Bounds {
            total,
            per_source,
            reserve: RESERVE,
        }
    }

    /// The shortest time after which a connection is closed; nothing new is due sooner.
    fn soonest(&self) -> Duration {
        let timeouts = [self.header_timeout, self.idle_timeout, self.write_timeout];
        timeouts.into_iter().fold(Duration::MAX, Duration::min)
    }
}

/// Binds a listener; the error names the address.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    mesh_base::listen::tcp(address).map_err(|error| {
        let text = format!("cannot listen on {address}/tcp: {error}");
        io::Error::new(error.kind(), text)
    })
}

/// Serves `router`, over TLS if there is one, until `draining`; then takes no new connection and gives open requests `limit` to finish.
///
/// Handlers find the peer's address as `ConnectInfo<SocketAddr>`.
pub async fn serve(
    connections: Connections,
    listener: TcpListener,
    tls: Option<ServerTls>,
    router: Router,
    draining: CancellationToken,
    limit: Duration,
) -> io::Result<()> {
    let files = raise_open_files();
    let server = Server::new(connections, files, tls, router, draining.clone());
    let running = TaskTracker::new();
    tokio::select! {
        () = draining.cancelled() => {}
        () = server.accept(&listener, &running) => {}
    }
    drop(listener);
    running.close();
    if tokio::time::timeout(limit, running.wait()).await.is_err() {
        tracing::warn!(
            limit_seconds = limit.as_secs_f64(),
            "requests still open at the end of the drain are cut"
        );
        server.cut();
    }
    Ok(())
}

/// The body of a refusal.
fn error_body(message: &str, kind: &str, code: &str) -> Json<serde_json::Value> {
    Json(json!({
        "error": { "message": message, "type": kind, "param": null, "code": code },
    }))
}

/// Connections beyond the limit that may ask for health.
const RESERVE: usize = 8;
/// Files that are left to the rest of the process, at least and at most.
const OWN_FILES: usize = 40;
const MOST_OWN_FILES: usize = 512;
const MOST_CONNECTIONS: usize = 16_384;
/// Connections by default; each takes some 20 kB from its first byte on.
const USUAL_CONNECTIONS: usize = 1024;
