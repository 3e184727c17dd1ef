//! Accepting connections and serving requests on each.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::extract::{ConnectInfo, Request};
use axum::http::{HeaderValue, StatusCode, Version, header};
use axum::response::{IntoResponse, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use mesh_base::addresses::source;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use super::open::OpenConnections;
use super::stream::{ClientStream, RequestBody, ResponseBody, ResponseGuard, Streams};
use super::table::{Admitted, Id};
use super::tls::{self, ServerTls};
use super::{Connections, error_body};

/// The connections of one listener.
#[derive(Clone)]
pub(super) struct Server {
    open: OpenConnections,
    connections: Arc<Connections>,
    tls: Option<ServerTls>,
    router: Router,
    draining: CancellationToken,
    cut: CancellationToken,
}

/// A connection to a listener with TLS, after its first bytes.
enum Opened {
    Tls(Box<TlsStream<ClientStream<TcpStream>>>),
    /// Programs of this machine, such as health checks, may speak plain HTTP on the same port.
    Plain(ClientStream<TcpStream>),
    Refused,
}

/// One connection, as its requests need it.
#[derive(Clone, Copy)]
struct Peer {
    address: SocketAddr,
    id: Id,
    /// Beyond the limit of connections: only health is answered.
    restricted: bool,
    /// Over TLS.
    secure: bool,
}

impl Server {
    pub(super) fn new(
        connections: Connections,
        files: usize,
        tls: Option<ServerTls>,
        router: Router,
        draining: CancellationToken,
    ) -> Self {
        Self {
            open: OpenConnections::new(connections.bounds(files), connections.unfinished),
            connections: Arc::new(connections),
            tls,
            router,
            draining,
            cut: CancellationToken::new(),
        }
    }

    /// Ends all connections.
    pub(super) fn cut(&self) {
        self.cut.cancel();
    }

    pub(super) async fn accept(&self, listener: &TcpListener, running: &TaskTracker) {
        let mut warned: Option<Instant> = None;
        loop {
            match listener.accept().await {
                Ok((stream, address)) => {
                    let (admitted, end) = self.open.admit(address);
                    running.spawn(self.clone().connection(stream, address, admitted, end));
                }
                // The client's, not ours.
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    let due = warned.is_none_or(|at| at.elapsed() > WARNING_PAUSE);
                    if due {
                        warned = Some(Instant::now());
                        let connections = self.open.lock().table.len();
                        tracing::warn!(%error, connections, "no connection can be accepted; raise the limit of open files (LimitNOFILE)");
                    }
                    self.open.exhausted();
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
        let due = (self.open.lock().table).due(id, &self.connections);
        let silence = due.unwrap_or_else(Instant::now);
        tokio::select! {
            _ = stream.readable() => {
                Box::pin(self.clone().opened(stream, address, admitted, end)).await;
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
        self.open.closed(id);
    }

    /// Serves a connection whose first byte has come, after the TLS handshake if there is one.
    async fn opened(
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
        let open = self.open.clone();
        let peer = |secure| Peer {
            address,
            id,
            restricted: admitted.restricted,
            secure,
        };
        let Some(tls) = self.tls.clone() else {
            let stream = ClientStream::new(stream, open, id, limit);
            return self.requests(stream, peer(false), end).await;
        };
        let opening = async {
            let mut first = [0];
            let is_tls = stream.peek(&mut first).await? == 1 && tls::is_handshake(first[0]);
            let stream = ClientStream::new(stream, open, id, limit);
            Ok::<_, io::Error>(if is_tls {
                Opened::Tls(Box::new(tls.accept(stream).await?))
            } else if address.ip().to_canonical().is_loopback() {
                Opened::Plain(stream)
            } else {
                tls::refuse_plain(stream).await;
                Opened::Refused
            })
        };
        let opened = tokio::select! {
            opened = tokio::time::timeout(self.connections.header_timeout, opening) => opened,
            () = end.cancelled() => return,
            () = self.cut.cancelled() => return,
        };
        match opened {
            Ok(Ok(Opened::Tls(stream))) => self.requests(stream, peer(true), end).await,
            Ok(Ok(Opened::Plain(stream))) => self.requests(stream, peer(false), end).await,
            Ok(Ok(Opened::Refused)) => {}
            Ok(Err(error)) => tracing::debug!(%error, %address, "TLS handshake failed"),
            Err(_) => tracing::debug!(%address, "connection closed: no TLS handshake in time"),
        }
    }

    async fn requests(
        self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        peer: Peer,
        end: CancellationToken,
    ) {
        let Peer { address, id, .. } = peer;
        let limit = self.connections.write_timeout;
        let io = TokioIo::new(stream);
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
                this.clone().answer(request.map(Body::new), peer)
            });
        let mut connection = pin!(builder.serve_connection(io, service));
        let mut drained = false;
        loop {
            let now = Instant::now();
            let due = self.open.lock().table.due(id, &self.connections);
            if due.is_some_and(|due| due <= now) {
                tracing::debug!(%address, "connection closed: nothing came or was taken in time");
                break;
            }
            // The due time may change meanwhile, but never to anything sooner than this.
            let soonest = now + self.connections.soonest();
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
                    if self.open.lock().table.waits(id) {
                        break;
                    }
                    connection.as_mut().graceful_shutdown();
                }
                () = tokio::time::sleep_until(look.into()) => {}
            }
        }
    }

    async fn answer(self, mut request: Request, peer: Peer) -> Result<Response, Infallible> {
        let Peer {
            address,
            id,
            restricted,
            secure,
        } = peer;
        if secure {
            // As a proxy in front would say.
            let https = HeaderValue::from_static("https");
            request.headers_mut().insert("x-forwarded-proto", https);
        }
        let has_body = !request.body().is_end_stream();
        let streams = request.version() == Version::HTTP_2;
        self.open.asked(id, has_body, streams);
        let answer = ResponseGuard {
            open: self.open.clone(),
            id,
        };
        let response = if restricted && !is_health(request.uri().path()) {
            if has_body {
                self.open.lock().table.read(id);
            }
            no_room()
        } else {
            request.extensions_mut().insert(ConnectInfo(address));
            let limit = self.connections.body_timeout;
            let open = self.open.clone();
            let source = source(address.ip());
            let request =
                request.map(|body| Body::new(RequestBody::new(body, open, id, source, limit)));
            self.router.oneshot(request).await?
        };
        Ok(response.map(|body| Body::new(ResponseBody::new(body, answer))))
    }
}

/// The answer to clients that come while all permitted connections are in use.
fn no_room() -> Response {
    let text = "all connections of this service are in use; try again later";
    let headers = [
        (header::RETRY_AFTER, HeaderValue::from_static("1")),
        (header::CONNECTION, HeaderValue::from_static("close")),
    ];
    let body = error_body(text, "server_error", "overloaded");
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

/// Requests at once on one connection.
const MOST_STREAMS: u32 = 100;
/// Bytes of a connection's buffer, so of a head, and of the headers of one request among many.
pub(super) const MOST_BUFFER: usize = 64 << 10;
const MOST_HEADERS: u32 = 48 << 10;
/// Pause after an error that does not concern one connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const WARNING_PAUSE: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_silent_connection_takes_little_memory() {
        let listener = crate::http::bind(([127, 0, 0, 1], 0).into()).await;
        let listener = listener.expect("bind");
        let address = listener.local_addr().expect("address");
        let stream = TcpStream::connect(address).await.expect("connect");
        let draining = CancellationToken::new();
        let server = Server::new(Connections::default(), 1024, None, Router::new(), draining);
        let (admitted, end) = server.open.admit(address);
        let waiting = server.connection(stream, address, admitted, end);
        assert!(size_of_val(&waiting) < 2048, "{}", size_of_val(&waiting));
    }
}
