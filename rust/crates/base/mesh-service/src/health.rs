//! `/health` (liveness), `/ready` (readiness with its reason) and `/metrics`, the same for every service.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use mesh_base::sync::lock;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::http::{self, Connections, Guard};
use crate::metrics::{Format, Metrics};
use crate::notify::Watchdog;

/// State behind the health endpoints. Clones share it.
#[derive(Clone, Debug)]
pub struct Health {
    readiness: Arc<Mutex<Readiness>>,
    watchdog: Option<Watchdog>,
}

#[derive(Debug)]
struct Readiness {
    /// Reason for not being ready; `None` while ready.
    unready: Option<String>,
    /// A problem that leaves the service ready.
    note: Option<String>,
}

impl Health {
    /// A service that is alive, but not ready because it is starting.
    pub fn starting() -> Self {
        let readiness = Readiness {
            unready: Some("starting".to_owned()),
            note: None,
        };
        Self {
            readiness: Arc::new(Mutex::new(readiness)),
            watchdog: None,
        }
    }

    /// Makes `/health` fail while a loop that `watchdog` watches is stuck.
    #[must_use]
    pub fn watched_by(mut self, watchdog: Watchdog) -> Self {
        self.watchdog = Some(watchdog);
        self
    }

    /// Marks the service as ready.
    pub fn set_ready(&self) {
        lock(&self.readiness).unready = None;
    }

    /// Sets a problem that does not keep the service from serving requests; `/ready` reports it with its
    /// answer.
    pub fn set_note(&self, note: Option<String>) {
        lock(&self.readiness).note = note;
    }

    /// Marks the service as not ready, for this reason.
    pub fn set_unready(&self, reason: impl Into<String>) {
        lock(&self.readiness).unready = Some(reason.into());
    }

    /// The reason that the service is not ready; `None` while it is ready.
    pub fn unready_reason(&self) -> Option<String> {
        lock(&self.readiness).unready.clone()
    }
}

/// The three endpoints; merge it into the service's own router.
pub fn router(health: Health, metrics: Arc<Metrics>) -> Router {
    Router::new()
        .route("/health", get(live))
        .route("/ready", get(ready))
        .with_state(health)
        .route("/metrics", get(scrape).with_state(metrics))
}

/// Serves nothing but the three endpoints, in the background, until the result is dropped. `hosts` are names besides this
/// machine's own under which browsers may reach it on loopback.
pub fn serve(
    listener: TcpListener,
    hosts: &[String],
    health: Health,
    metrics: Arc<Metrics>,
) -> io::Result<Serving> {
    let guard = Guard::of_listener(listener.local_addr()?.ip(), hosts);
    let router = guard.before(router(health, metrics));
    let stop = CancellationToken::new();
    let running = tokio::spawn(http::serve(
        Connections::default(),
        listener,
        None,
        router,
        stop.clone(),
        GOODBYE,
    ));
    Ok(Serving {
        running,
        stop: stop.drop_guard(),
    })
}

/// The endpoints while [`serve`] serves them.
#[derive(Debug)]
pub struct Serving {
    running: JoinHandle<io::Result<()>>,
    stop: DropGuard,
}

impl Serving {
    /// Takes no new request, and gives open ones a second to finish.
    pub async fn end(self) {
        drop(self.stop);
        // An end by a panic is an end, too.
        let _ = self.running.await;
    }
}

async fn live(State(health): State<Health>) -> Response {
    match health.watchdog.as_ref().and_then(Watchdog::stuck) {
        None => Json(json!({ "status": "ok" })).into_response(),
        Some((name, silence)) => {
            let reason = format!("{name} has not turned for {:.1} s", silence.as_secs_f64());
            unavailable("stuck", &reason)
        }
    }
}

async fn ready(State(health): State<Health>) -> Response {
    let readiness = lock(&health.readiness);
    match (&readiness.unready, &readiness.note) {
        (Some(reason), _) => unavailable("unready", reason),
        (None, None) => Json(json!({ "status": "ready" })).into_response(),
        (None, Some(note)) => Json(json!({ "status": "ready", "note": note })).into_response(),
    }
}

fn unavailable(status: &str, reason: &str) -> Response {
    let body = Json(json!({ "status": status, "reason": reason }));
    (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
}

async fn scrape(State(metrics): State<Arc<Metrics>>, headers: HeaderMap) -> impl IntoResponse {
    let accept = headers.get(header::ACCEPT);
    let format = Format::accepted(accept.and_then(|accept| accept.to_str().ok()));
    let headers = [
        (header::CONTENT_TYPE, format.content_type()),
        (header::VARY, "accept"),
    ];
    (headers, metrics.encode(format))
}

/// Time for requests that are open when a service stops.
const GOODBYE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::{Body, to_bytes};
    use axum::http::Request;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tower::ServiceExt;

    async fn get(router: &Router, path: &str) -> (StatusCode, String) {
        let request = Request::get(path).body(Body::empty()).expect("request");
        let response = router.clone().oneshot(request).await.expect("infallible");
        let status = response.status();
        let body = to_bytes(response.into_body(), 1 << 20).await.expect("body");
        (status, String::from_utf8(body.to_vec()).expect("UTF-8"))
    }

    #[tokio::test]
    async fn readiness_follows_the_service_and_tells_why_not() {
        let health = Health::starting();
        let router = router(health.clone(), Arc::new(Metrics::new("test", "0")));
        let (status, body) = get(&router, "/ready").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(body, r#"{"status":"unready","reason":"starting"}"#);
        health.set_ready();
        assert_eq!(get(&router, "/ready").await.0, StatusCode::OK);
        health.set_unready("no worker");
        assert!(get(&router, "/ready").await.1.contains("no worker"));
        assert_eq!(
            get(&router, "/health").await,
            (StatusCode::OK, r#"{"status":"ok"}"#.to_owned())
        );
        assert!(
            get(&router, "/metrics")
                .await
                .1
                .contains("process_open_fds")
        );
    }

    #[tokio::test]
    async fn the_end_closes_connections_and_the_port() {
        let listener = http::bind(([127, 0, 0, 1], 0).into()).await.expect("bound");
        let address = listener.local_addr().expect("an address");
        let metrics = Arc::new(Metrics::new("test", "0"));
        let serving = serve(listener, &[], Health::starting(), metrics).expect("served");
        let mut stream = TcpStream::connect(address).await.expect("connected");
        let request = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n";
        stream.write_all(request).await.expect("sent");
        stream.readable().await.expect("answered");
        serving.end().await;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("closed");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
        let refused = TcpStream::connect(address).await;
        refused.expect_err("nothing listens");
    }

    #[tokio::test]
    async fn a_stuck_loop_ends_liveness() {
        let watchdog = Watchdog::with_feed(None, || {});
        let health = Health::starting().watched_by(watchdog.clone());
        let router = router(health, Arc::new(Metrics::new("test", "0")));
        let heart = watchdog.register("router", Duration::from_millis(20));
        tokio::time::sleep(Duration::from_millis(40)).await;
        let (status, body) = get(&router, "/health").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(body.contains("router"), "{body}");
        heart.beat();
        assert_eq!(get(&router, "/health").await.0, StatusCode::OK);
    }
}
