//! Serving an `axum` router until the drain, then letting open requests finish.
//!
//! [`Connections`] limits the time and the connections of clients. [`Guard`] decides which clients may ask.

mod budget;
mod guard;
mod stream;
mod table;

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::extract::{ConnectInfo, Request};
use axum::http::{HeaderValue, StatusCode, Version, header};
use axum::response::{IntoResponse, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use mesh_base::addresses::source;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use crate::config::units;
use crate::files::raise_open_files;
use budget::Budget;
use stream::{Answer, Incoming, Outgoing, Streams, Watched};
use table::{Admitted, Bounds, Id, Patience, Table};

pub use guard::{Guard, NotAnOrigin, Origin};
pub use stream::{NoRoom, TooSlow};

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
    /// Name and value of a time limit that is zero, which would close all connections at once.
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
        let total = if self.total == 0 {
            most.min(USUAL_CONNECTIONS)
        } else {
            self.total.min(most)
        };
        let per_source = if self.per_source == 0 {
            total.div_ceil(2)
        } else {
            self.per_source
        };
        Bounds {
            total,
            per_source,
            reserve: RESERVE,
        }
    }

    fn patience(&self) -> Patience {
        Patience {
            header: self.header_timeout,
            idle: self.idle_timeout,
            write: self.write_timeout,
        }
    }
}

/// Binds a listener; the error names the address.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    mesh_base::listen::tcp(address).map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("cannot listen on {address}/tcp: {error}"),
        )
    })
}

/// Like [`serve_with`], with default [`Connections`].
pub async fn serve(
    listener: TcpListener,
    router: Router,
    draining: CancellationToken,
    limit: Duration,
) -> io::Result<()> {
    serve_with(Connections::default(), listener, router, draining, limit).await
}

/// Serves `router` until `draining`; then takes no new connection and gives open requests `limit` to finish.
///
/// Handlers find the peer's address as `ConnectInfo<SocketAddr>`.
pub async fn serve_with(
    connections: Connections,
    listener: TcpListener,
    router: Router,
    draining: CancellationToken,
    limit: Duration,
) -> io::Result<()> {
    let bounds = connections.bounds(raise_open_files());
    let server = Server {
        shared: Shared::new(bounds, connections.unfinished),
        connections: Arc::new(connections),
        router,
        draining: draining.clone(),
        cut: CancellationToken::new(),
    };
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
        server.cut.cancel();
    }
    Ok(())
}

/// The state that all connections share.
#[derive(Clone)]
struct Shared(Arc<Mutex<Inner>>);

struct Inner {
    table: Table,
    /// Tokens that end a connection that is evicted for another.
    ends: HashMap<Id, CancellationToken>,
    /// Budget of incomplete requests.
    unfinished: Budget<CancellationToken>,
    /// Budget ids of requests whose heads are incomplete.
    heads: HashMap<Id, u64>,
}

impl Shared {
    fn new(bounds: Bounds, unfinished: u64) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            table: Table::new(bounds),
            ends: HashMap::new(),
            unfinished: Budget::new(unfinished),
            heads: HashMap::new(),
        })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn table(&self) -> impl std::ops::DerefMut<Target = Table> {
        TableGuard(self.inner())
    }

    fn open(&self, address: SocketAddr) -> (Admitted, CancellationToken) {
        let mut inner = self.inner();
        let admitted = inner.table.open(address.ip(), Instant::now());
        let end = CancellationToken::new();
        inner.ends.insert(admitted.id, end.clone());
        if let Some(evicted) = admitted.evicted.and_then(|id| inner.ends.remove(&id)) {
            evicted.cancel();
        }
        (admitted, end)
    }

    /// Evicts a connection when the system has no room for another.
    fn exhausted(&self) {
        let mut inner = self.inner();
        let evicted = inner.table.exhausted();
        if let Some(evicted) = evicted.and_then(|id| inner.ends.remove(&id)) {
            evicted.cancel();
        }
    }

    fn closed(&self, id: Id) {
        let mut inner = self.inner();
        inner.table.closed(id);
        inner.ends.remove(&id);
        inner.head_is_over(id);
    }

    /// Records that bytes arrived.
    fn heard(&self, id: Id, bytes: u64) {
        let mut inner = self.inner();
        let inner = &mut *inner;
        inner.table.heard(id, Instant::now());
        let Some(source) = inner.table.head_from(id) else {
            return;
        };
        let place = match inner.heads.get(&id) {
            Some(&place) => place,
            None => {
                let Some(end) = inner.ends.get(&id) else {
                    return;
                };
                let place = inner.unfinished.enter(source, end.clone());
                inner.heads.insert(id, place);
                place
            }
        };
        for end in inner.unfinished.grow(place, bytes) {
            end.cancel();
        }
    }

    /// Records that the head of a request is complete.
    fn asked(&self, id: Id, body: bool, streams: bool) {
        let mut inner = self.inner();
        inner.table.asked(id, body, streams, Instant::now());
        inner.head_is_over(id);
    }

    /// Begins a body, which `given_up` ends.
    fn unfinished(&self, source: IpAddr, given_up: CancellationToken) -> u64 {
        self.inner().unfinished.enter(source, given_up)
    }

    /// Records that more of a body arrived.
    fn grows(&self, place: u64, bytes: u64) {
        for given_up in self.inner().unfinished.grow(place, bytes) {
            given_up.cancel();
        }
    }

    /// Ends a body that is complete or abandoned.
    fn finished(&self, place: u64) {
        self.inner().unfinished.leave(place);
    }
}

impl Inner {
    fn head_is_over(&mut self, id: Id) {
        if let Some(place) = self.heads.remove(&id) {
            self.unfinished.leave(place);
        }
    }
}

struct TableGuard<'a>(MutexGuard<'a, Inner>);

impl std::ops::Deref for TableGuard<'_> {
    type Target = Table;

    fn deref(&self) -> &Table {
        &self.0.table
    }
}

impl std::ops::DerefMut for TableGuard<'_> {
    fn deref_mut(&mut self) -> &mut Table {
        &mut self.0.table
    }
}

/// The connections of one listener.
#[derive(Clone)]
struct Server {
    shared: Shared,
    connections: Arc<Connections>,
    router: Router,
    draining: CancellationToken,
    cut: CancellationToken,
}

impl Server {
    async fn accept(&self, listener: &TcpListener, running: &TaskTracker) {
        let mut warned: Option<Instant> = None;
        loop {
            match listener.accept().await {
                Ok((stream, address)) => {
                    let (admitted, end) = self.shared.open(address);
                    running.spawn(self.clone().connection(stream, address, admitted, end));
                }
                // The client's, not ours.
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    let due = warned.is_none_or(|at| at.elapsed() > WARNING_PAUSE);
                    if due {
                        warned = Some(Instant::now());
                        let connections = self.shared.table().len();
                        tracing::warn!(%error, connections, "no connection can be accepted; raise the limit of open files (LimitNOFILE)");
                    }
                    self.shared.exhausted();
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Serves a connection from its first byte on: one that stays silent gets no buffers.
    async fn connection(
        self,
        stream: TcpStream,
        address: SocketAddr,
        admitted: Admitted,
        end: CancellationToken,
    ) {
        let id = admitted.id;
        let due = self.shared.table().due(id, &self.connections.patience());
        let silence = due.unwrap_or_else(Instant::now);
        tokio::select! {
            _ = stream.readable() => {
                Box::pin(self.clone().requests(stream, address, admitted, end)).await;
            }
            () = end.cancelled() => {
                tracing::debug!(%address, "connection closed: others need the room");
            }
            () = self.cut.cancelled() => {}
            () = self.draining.cancelled() => {}
            () = tokio::time::sleep_until(silence.into()) => {
                tracing::debug!(%address, "connection closed: nothing came in time");
            }
        }
        self.shared.closed(id);
    }

    async fn requests(
        self,
        stream: TcpStream,
        address: SocketAddr,
        admitted: Admitted,
        end: CancellationToken,
    ) {
        let id = admitted.id;
        // A streamed token is a small write that must not wait for the previous one's acknowledgement.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY refused");
        }
        let limit = self.connections.write_timeout;
        let io = TokioIo::new(Watched::new(stream, self.shared.clone(), id, limit));
        let mut builder = auto::Builder::new(Streams { limit });
        builder.http1().max_buf_size(MOST_BUFFER);
        builder
            .http2()
            .max_header_list_size(MOST_HEADERS)
            .timer(TokioTimer::new())
            .keep_alive_interval(self.connections.header_timeout)
            .max_send_buf_size(MOST_BUFFER)
            .max_concurrent_streams(MOST_STREAMS);
        let this = self.clone();
        let service =
            hyper::service::service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
                this.clone()
                    .answer(request.map(Body::new), address, id, admitted.restricted)
            });
        let mut connection = pin!(builder.serve_connection(io, service));
        let patience = self.connections.patience();
        let mut drained = false;
        loop {
            let now = Instant::now();
            let due = self.shared.table().due(id, &patience);
            if due.is_some_and(|due| due <= now) {
                tracing::debug!(%address, "connection closed: nothing came or was taken in time");
                break;
            }
            // The due time may change meanwhile, but never to anything sooner than this.
            let soonest = now + patience.least();
            let look = due.map_or(soonest, |due| due.min(soonest));
            tokio::select! {
                ended = connection.as_mut() => {
                    if let Err(error) = ended {
                        tracing::trace!(%error, %address, "connection ended");
                    }
                    break;
                }
                () = end.cancelled() => {
                    tracing::debug!(%address, "connection closed: others need the room");
                    break;
                }
                () = self.cut.cancelled() => break,
                () = self.draining.cancelled(), if !drained => {
                    drained = true;
                    if self.shared.table().waits(id) {
                        break;
                    }
                    connection.as_mut().graceful_shutdown();
                }
                () = tokio::time::sleep_until(look.into()) => {}
            }
        }
    }

    async fn answer(
        self,
        mut request: Request,
        address: SocketAddr,
        id: Id,
        restricted: bool,
    ) -> Result<Response, Infallible> {
        let has_body = !request.body().is_end_stream();
        let streams = request.version() == Version::HTTP_2;
        self.shared.asked(id, has_body, streams);
        let answer = Answer {
            shared: self.shared.clone(),
            id,
        };
        let response = if restricted && !is_health(request.uri().path()) {
            if has_body {
                self.shared.table().read(id);
            }
            no_room()
        } else {
            request.extensions_mut().insert(ConnectInfo(address));
            let limit = self.connections.body_timeout;
            let shared = self.shared.clone();
            let source = source(address.ip());
            let request =
                request.map(|body| Body::new(Incoming::new(body, shared, id, source, limit)));
            self.router.oneshot(request).await?
        };
        Ok(response.map(|body| Body::new(Outgoing::new(body, answer))))
    }
}

/// The answer to clients that come while all permitted connections are in use.
fn no_room() -> Response {
    let error = json!({
        "message": "all connections of this service are in use; try again later",
        "type": "server_error", "param": null, "code": "overloaded",
    });
    let headers = [
        (header::RETRY_AFTER, HeaderValue::from_static("1")),
        (header::CONNECTION, HeaderValue::from_static("close")),
    ];
    let body = axum::Json(json!({ "error": error }));
    (StatusCode::SERVICE_UNAVAILABLE, headers, body).into_response()
}

fn is_health(path: &str) -> bool {
    matches!(path, "/health" | "/ready" | "/metrics")
}

fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

/// Connections beyond the limit that may ask for health.
const RESERVE: usize = 8;
/// Files that are left to the rest of the process, at least and at most.
const OWN_FILES: usize = 40;
const MOST_OWN_FILES: usize = 512;
const MOST_CONNECTIONS: usize = 16_384;
/// Connections by default; each takes some 20 kB from its first byte on.
const USUAL_CONNECTIONS: usize = 1024;
/// Requests at once on one connection.
const MOST_STREAMS: u32 = 100;
/// Bytes of a connection's buffer, so of a head, and of the headers of one request among many.
const MOST_BUFFER: usize = 64 << 10;
const MOST_HEADERS: u32 = 32 << 10;
/// Pause after an error that does not concern one connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const WARNING_PAUSE: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn slow(ConnectInfo(peer): ConnectInfo<SocketAddr>) -> String {
        tokio::time::sleep(Duration::from_millis(100)).await;
        format!("hello {}", peer.ip())
    }

    #[tokio::test]
    async fn an_open_request_finishes_during_the_drain_and_new_connections_are_refused() {
        let listener = bind(([127, 0, 0, 1], 0).into()).await.expect("bind");
        let address = listener.local_addr().expect("address");
        let draining = CancellationToken::new();
        let router = Router::new().route("/", get(slow));
        let server = tokio::spawn(serve(
            listener,
            router,
            draining.clone(),
            Duration::from_secs(5),
        ));

        let mut client = TcpStream::connect(address).await.expect("connect");
        client
            .write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            .await
            .expect("send");
        tokio::time::sleep(Duration::from_millis(30)).await;
        draining.cancel();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.expect("answer");
        assert!(answer.ends_with("hello 127.0.0.1"), "{answer}");
        server.await.expect("join").expect("served");
        assert!(TcpStream::connect(address).await.is_err());
    }

    #[tokio::test]
    async fn a_request_beyond_the_limit_is_cut() {
        let listener = bind(([127, 0, 0, 1], 0).into()).await.expect("bind");
        let address = listener.local_addr().expect("address");
        let draining = CancellationToken::new();
        let router = Router::new().route("/", get(std::future::pending::<String>));
        let server = tokio::spawn(serve(
            listener,
            router,
            draining.clone(),
            Duration::from_millis(50),
        ));
        let mut client = TcpStream::connect(address).await.expect("connect");
        client
            .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .expect("send");
        tokio::time::sleep(Duration::from_millis(20)).await;
        draining.cancel();
        tokio::time::timeout(Duration::from_secs(2), server)
            .await
            .expect("in time")
            .expect("join")
            .expect("served");
    }

    async fn until_closed(client: &mut TcpStream) -> (String, Duration) {
        let started = Instant::now();
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(20), client.read_to_end(&mut answer));
        // A reset is a close, too.
        let _ = read.await.expect("closed within 20 s");
        (String::from_utf8(answer).expect("UTF-8"), started.elapsed())
    }

    /// A server that is impatient, and its address.
    async fn impatient(change: impl FnOnce(&mut Connections)) -> (SocketAddr, CancellationToken) {
        let listener = bind(([127, 0, 0, 1], 0).into()).await.expect("bind");
        let address = listener.local_addr().expect("address");
        let short = Duration::from_millis(400);
        let mut connections = Connections {
            header_timeout: short,
            idle_timeout: 3 * short,
            body_timeout: short,
            write_timeout: short,
            ..Connections::default()
        };
        change(&mut connections);
        let draining = CancellationToken::new();
        let big = || async { "x".repeat(64 << 20) };
        let router = Router::new()
            .route("/health", get(|| async { "alive" }))
            .route("/slow", get(std::future::pending::<String>))
            .route("/big", get(big))
            .route(
                "/body",
                axum::routing::post(|body: String| async move { body.len().to_string() }),
            )
            .layer(axum::extract::DefaultBodyLimit::disable());
        let limit = Duration::from_secs(1);
        tokio::spawn(serve_with(
            connections,
            listener,
            router,
            draining.clone(),
            limit,
        ));
        (address, draining)
    }

    async fn send(address: SocketAddr, text: &str) -> TcpStream {
        let mut client = TcpStream::connect(address).await.expect("connect");
        client.write_all(text.as_bytes()).await.expect("send");
        client
    }

    #[tokio::test]
    async fn silence_ends_a_connection_wherever_it_begins() {
        let (address, _draining) = impatient(|_| {}).await;
        for (text, answer) in [
            ("", ""),
            ("GET /health HTTP/1.1\r\nhost: x\r\nx-half", ""),
            ("PRI * HTTP/2.0\r\n", ""),
            ("GET /health HTTP/1.1\r\nhost: x\r\n\r\n", "alive"),
            ("GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /hea", "alive"),
            (
                "POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nabc",
                "did not arrive in time",
            ),
        ] {
            let mut client = send(address, text).await;
            let (got, _) = until_closed(&mut client).await;
            assert!(
                got.contains(answer) && got.is_empty() == answer.is_empty(),
                "{text:?}: {got:?}"
            );
        }
        // Bytes that drop in one by one buy no time.
        let mut client = send(address, "GET /health HTTP/1.1\r\n").await;
        let started = Instant::now();
        while client.write_all(b"x").await.is_ok() {
            assert!(started.elapsed() < Duration::from_secs(10));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_is_cut_and_one_that_waits_is_not() {
        let (address, _draining) = impatient(|_| {}).await;
        let mut waiting = send(address, "GET /slow HTTP/1.1\r\nhost: x\r\n\r\n").await;
        let mut client = send(address, "GET /big HTTP/1.1\r\nhost: x\r\n\r\n").await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let (got, _) = until_closed(&mut client).await;
        assert!(got.len() < 64 << 20, "{}", got.len());
        let quiet = tokio::time::timeout(Duration::from_millis(50), waiting.read_u8());
        assert!(quiet.await.is_err(), "it still waits for its answer");
    }

    /// A client that speaks HTTP/2 by hand: its streams have no window, and it has asked for `path`.
    async fn without_window(address: SocketAddr, path: &str) -> TcpStream {
        let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        // SETTINGS_INITIAL_WINDOW_SIZE = 0
        sent.extend(frame(4, 0, 0, &[0, 4, 0, 0, 0, 0]));
        // :method GET, :scheme http, :authority and :path as literals.
        let len = u8::try_from(path.len()).expect("a short path");
        let mut head = vec![0x82, 0x86, 0x41, 1, b'x', 0x04, len];
        head.extend(path.as_bytes());
        sent.extend(frame(1, 0x5, 1, &head));
        let mut client = TcpStream::connect(address).await.expect("connect");
        client.write_all(&sent).await.expect("send");
        client
    }

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let len = u32::try_from(payload.len()).expect("a short frame");
        let mut frame = len.to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        frame
    }

    /// Answers SETTINGS and PING until the connection ends, or for `limit`: bytes of data, PINGs, and whether it ended.
    ///
    /// Grants `window` every 100 ms.
    async fn answer_pings(client: TcpStream, window: u32, limit: Duration) -> (usize, usize, bool) {
        let (mut reader, mut writer) = client.into_split();
        let (mut data, mut pings) = (0, 0);
        let (acknowledge, mut acknowledged) = tokio::sync::mpsc::channel(64);
        let read = async {
            loop {
                let mut head = [0; 9];
                if reader.read_exact(&mut head).await.is_err() {
                    return;
                }
                let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
                let mut payload = vec![0; len];
                if reader.read_exact(&mut payload).await.is_err() {
                    return;
                }
                match (head[3], head[4]) {
                    (0, _) => data += len,
                    (4, 0) => acknowledge.send(frame(4, 1, 0, &[])).await.expect("send"),
                    (6, 0) => {
                        pings += 1;
                        let pong = frame(6, 1, 0, &payload);
                        acknowledge.send(pong).await.expect("send");
                    }
                    _ => {}
                }
            }
        };
        let write = async {
            let mut grants = tokio::time::interval(Duration::from_millis(100));
            loop {
                let frames = tokio::select! {
                    Some(frame) = acknowledged.recv() => frame,
                    _ = grants.tick(), if window > 0 => {
                        let window = window.to_be_bytes();
                        [frame(8, 0, 0, &window), frame(8, 0, 1, &window)].concat()
                    }
                };
                if writer.write_all(&frames).await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        let ended = tokio::select! {
            () = read => true,
            () = write => unreachable!(),
            () = tokio::time::sleep(limit) => false,
        };
        (data, pings, ended)
    }

    #[tokio::test]
    async fn a_client_without_a_window_is_cut_and_slow_ones_are_not() {
        let (address, _draining) = impatient(|connections| {
            connections.header_timeout = Duration::from_millis(200);
            connections.write_timeout = Duration::from_secs(2);
            connections.idle_timeout = Duration::from_secs(2);
        })
        .await;
        let run = |path, window, seconds| async move {
            let client = without_window(address, path).await;
            answer_pings(client, window, Duration::from_secs(seconds)).await
        };
        let (stuck, waiting, slow) = tokio::join!(
            run("/health", 0, 20),
            run("/slow", 0, 6),
            run("/big", 4096, 6)
        );
        let (data, pings, ended) = stuck;
        assert!(ended && data == 0 && pings > 0, "{stuck:?}");
        let (_, pings, ended) = waiting;
        assert!(!ended && pings > 0, "{waiting:?}");
        let (data, _, ended) = slow;
        assert!(!ended && data > 40_000, "{slow:?}");
    }

    #[tokio::test]
    async fn a_stuck_stream_ends_alone() {
        let (address, _draining) = impatient(|connections| {
            connections.write_timeout = Duration::from_secs(1);
            connections.idle_timeout = Duration::from_secs(30);
            connections.header_timeout = Duration::from_secs(30);
        })
        .await;
        let mut client = without_window(address, "/health").await;
        // Another request, of which the answer is still being made.
        let mut head = vec![0x82, 0x86, 0x41, 1, b'x', 0x04, 5];
        head.extend(b"/slow");
        client
            .write_all(&frame(1, 0x5, 3, &head))
            .await
            .expect("send");
        let mut resets = Vec::new();
        let limit = Duration::from_secs(20);
        let reset = tokio::time::timeout(limit, next_of(&mut client, 3, &mut resets)).await;
        assert_eq!(reset.expect("a reset in time").expect("open"), 1);
        // The connection and its other streams go on.
        let mut head = vec![0x82, 0x86, 0x41, 1, b'x', 0x04, 7];
        head.extend(b"/health");
        client
            .write_all(&frame(1, 0x5, 5, &head))
            .await
            .expect("send");
        client
            .write_all(&frame(8, 0, 5, &1000u32.to_be_bytes()))
            .await
            .expect("send");
        let data = tokio::time::timeout(limit, next_of(&mut client, 0, &mut resets)).await;
        assert_eq!(data.expect("data in time").expect("open"), 5);
        assert_eq!(resets, [1]);
    }

    /// Reads up to a frame of this kind: its stream. Collects the streams that were reset.
    async fn next_of(client: &mut TcpStream, kind: u8, resets: &mut Vec<u32>) -> io::Result<u32> {
        loop {
            let mut head = [0; 9];
            client.read_exact(&mut head).await?;
            let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let mut payload = vec![0; len];
            client.read_exact(&mut payload).await?;
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            if head[3] == 3 {
                resets.push(stream);
            }
            if (head[3], head[4] & 1) == (4, 0) {
                client.write_all(&frame(4, 1, 0, &[])).await?;
            }
            if head[3] == kind {
                return Ok(stream);
            }
        }
    }

    #[tokio::test]
    async fn unfinished_requests_make_room_for_finished_ones() {
        let (address, _draining) = impatient(|connections| {
            connections.unfinished = 1 << 20;
            connections.header_timeout = Duration::from_secs(600);
            connections.body_timeout = Duration::from_secs(600);
        })
        .await;
        let mut half = Vec::new();
        for _ in 0..40 {
            let mut post =
                "POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n".to_owned();
            post.push_str(&"z".repeat(100_000));
            half.push(send(address, &post).await);
        }
        let len = 500_000;
        let mut post = format!(
            "POST /body HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len}\r\n\r\n"
        );
        post.push_str(&"z".repeat(len));
        let (got, _) = until_closed(&mut send(address, &post).await).await;
        assert!(got.ends_with("500000"), "{got}");
        let mut oldest = half.swap_remove(0);
        let mut said = [0; 1000];
        let len = tokio::time::timeout(Duration::from_secs(10), oldest.read(&mut said))
            .await
            .expect("an answer")
            .expect("a byte");
        let said = String::from_utf8_lossy(&said[..len]);
        assert!(
            said.contains("too many requests are on their way"),
            "{said}"
        );
        // A client that only reads at its end gets there.
        let rest = "z".repeat(900_000);
        oldest.write_all(rest.as_bytes()).await.expect("taken");

        // Heads count, too.
        let mut heads = Vec::new();
        for _ in 0..40 {
            let head = format!(
                "GET /health HTTP/1.1\r\nhost: x\r\nx: {}",
                "y".repeat(50_000)
            );
            heads.push(send(address, &head).await);
        }
        let (got, _) = until_closed(&mut heads[0]).await;
        assert!(got.is_empty(), "{got}");
        let health = "GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        let (got, _) = until_closed(&mut send(address, health).await).await;
        assert!(got.ends_with("alive"), "{got}");
    }

    #[tokio::test]
    async fn a_head_has_a_bound_and_bodies_do_not_share_it() {
        let (address, _draining) = impatient(|_| {}).await;
        let mut head = "GET /health HTTP/1.1\r\nhost: x\r\nx: ".to_owned();
        // No more than is read, since a close with more to read is a reset.
        head.push_str(&"y".repeat(MOST_BUFFER - head.len()));
        let (got, _) = until_closed(&mut send(address, &head).await).await;
        assert!(got.starts_with("HTTP/1.1 431"), "{got}");
        let len = 8 << 20;
        let mut post = format!(
            "POST /body HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len}\r\n\r\n"
        );
        post.push_str(&"z".repeat(len));
        let (got, _) = until_closed(&mut send(address, &post).await).await;
        assert!(got.ends_with("8388608"), "{got}");
        let big = "GET /big HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        let (got, _) = until_closed(&mut send(address, big).await).await;
        let (head, body) = got.split_once("\r\n\r\n").expect("a head");
        assert!(head.contains("content-length: 67108864"), "{head}");
        assert_eq!(body.len(), 64 << 20);
    }

    #[tokio::test]
    async fn health_is_answered_whatever_others_hold() {
        let (address, _draining) = impatient(|connections| {
            connections.total = 4;
            connections.header_timeout = Duration::from_secs(600);
        })
        .await;
        let health = "GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        let mut half = Vec::new();
        for _ in 0..20 {
            half.push(send(address, "GET / HTTP/1.1\r\nx-half").await);
        }
        let (got, _) = until_closed(&mut send(address, health).await).await;
        assert!(got.ends_with("alive"), "{got}");
        let mut running = Vec::new();
        for _ in 0..4 {
            running.push(send(address, "GET /slow HTTP/1.1\r\nhost: x\r\n\r\n").await);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let (got, _) = until_closed(&mut send(address, health).await).await;
        assert!(got.ends_with("alive"), "{got}");
        let other = "GET /big HTTP/1.1\r\nhost: x\r\n\r\n";
        let (got, _) = until_closed(&mut send(address, other).await).await;
        assert!(
            got.starts_with("HTTP/1.1 503") && got.contains("retry-after"),
            "{got}"
        );
    }

    #[tokio::test]
    async fn a_silent_connection_takes_little_memory() {
        let listener = bind(([127, 0, 0, 1], 0).into()).await.expect("bind");
        let address = listener.local_addr().expect("address");
        let stream = TcpStream::connect(address).await.expect("connect");
        let connections = Connections::default();
        let server = Server {
            shared: Shared::new(connections.bounds(1024), connections.unfinished),
            connections: Arc::new(connections),
            router: Router::new(),
            draining: CancellationToken::new(),
            cut: CancellationToken::new(),
        };
        let (admitted, end) = server.shared.open(address);
        let waiting = server.connection(stream, address, admitted, end);
        assert!(size_of_val(&waiting) < 2048, "{}", size_of_val(&waiting));
    }

    #[test]
    fn as_many_connections_as_files_allow() {
        let bounds = |files| Connections::default().bounds(files);
        assert_eq!((bounds(128).total, bounds(128).per_source), (80, 40));
        assert_eq!(bounds(1024).total, 760);
        assert_eq!(bounds(1 << 20).total, 1024);
        assert!(bounds(10).total >= 1);
        let few = Connections {
            total: 5,
            ..Connections::default()
        };
        assert_eq!(few.bounds(1024).total, 5);
        let many = Connections {
            total: 100_000,
            ..Connections::default()
        };
        assert_eq!(many.bounds(1 << 20).total, 16_384);
    }

    #[tokio::test]
    async fn a_taken_port_is_named() {
        let listener = bind(([127, 0, 0, 1], 0).into()).await.expect("bind");
        let address = listener.local_addr().expect("address");
        let error = bind(address).await.expect_err("taken").to_string();
        assert!(error.contains(&address.to_string()), "{error}");
    }
}
