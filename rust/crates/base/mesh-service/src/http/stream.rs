//! Connections, bodies and answers that report to a [`Table`](super::table::Table) and end if the peer is
//! inactive.
//!
//! On HTTP/1 the connection ends, on HTTP/2 the stream.

use std::error::Error;
use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes, HttpBody};
use http_body::Frame;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::{Sleep, sleep, timeout};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::open::OpenConnections;
use super::table::Id;

/// A client's connection that reports to the table.
pub(super) struct ClientStream<S> {
    stream: S,
    open: OpenConnections,
    id: Id,
    /// Time limit for a client that takes nothing of the written data.
    limit: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> ClientStream<S> {
    pub(super) fn new(stream: S, open: OpenConnections, id: Id, limit: Duration) -> Self {
        Self {
            stream,
            open,
            id,
            limit,
            stalled: None,
        }
    }

    fn write<T>(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let limit = self.limit;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(limit)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ClientStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let most = buffer.remaining().min(MOST_READ);
        let mut part = ReadBuf::new(buffer.initialize_unfilled_to(most));
        let result = ready!(Pin::new(&mut self.stream).poll_read(cx, &mut part));
        let len = part.filled().len();
        buffer.advance(len);
        if len > 0 {
            self.open.heard(self.id, len as u64);
        }
        Poll::Ready(result)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ClientStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.write(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.write(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.write(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.write(cx, shut)
    }
}

/// Error of a body that did not arrive in time.
#[derive(Debug, thiserror::Error)]
#[error(
    "the body did not arrive in time: nothing came for {} s, or less than {LEAST_RATE} bytes a second \
     (http.connections.body_timeout)",
    .0.as_secs_f64()
)]
pub struct TooSlow(Duration);

/// Error of a body that was given up because unfinished requests held too much memory.
#[derive(Debug, thiserror::Error)]
#[error(
    "too many requests are on their way to this service at once; try again later (http.connections.unfinished)"
)]
pub struct NoRoom;

/// An error of this type among the causes of another, or that one itself.
pub fn cause_of<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    std::iter::successors(Some(error), |&error| error.source()).find_map(<dyn Error>::downcast_ref)
}

/// The body of a request, for which is not waited longer than it deserves.
pub(super) struct RequestBody {
    body: Body,
    open: OpenConnections,
    id: Id,
    limit: Duration,
    began: tokio::time::Instant,
    received: u64,
    timer: Pin<Box<Sleep>>,
    over: bool,
    source: IpAddr,
    /// Place among the unfinished requests, once a byte has arrived.
    place: Option<UnfinishedBody>,
}

struct UnfinishedBody {
    id: u64,
    given_up: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl RequestBody {
    pub(super) fn new(
        body: Body,
        open: OpenConnections,
        id: Id,
        source: IpAddr,
        limit: Duration,
    ) -> Self {
        Self {
            source,
            place: None,
            over: body.is_end_stream(),
            body,
            open,
            id,
            limit,
            began: tokio::time::Instant::now(),
            received: 0,
            timer: Box::pin(sleep(limit)),
        }
    }

    /// Accounts for bytes that have come.
    fn grow(&mut self, bytes: u64) {
        let place = self.place.get_or_insert_with(|| {
            let given_up = CancellationToken::new();
            UnfinishedBody {
                id: self.open.unfinished(self.source, given_up.clone()),
                given_up: Box::pin(given_up.cancelled_owned()),
            }
        });
        self.open.grows(place.id, bytes);
    }

    fn end(&mut self) {
        if !std::mem::replace(&mut self.over, true) {
            self.open.lock().table.read(self.id);
        }
    }
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if let Some(place) = &mut self.place
            && place.given_up.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Some(Err(axum::Error::new(NoRoom))));
        }
        let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
            ready!(self.timer.as_mut().poll(cx));
            self.end();
            let slow = TooSlow(self.limit);
            return Poll::Ready(Some(Err(axum::Error::new(slow))));
        };
        match &frame {
            Some(Ok(frame)) => {
                let len = frame.data_ref().map_or(0, Bytes::len);
                self.received += len as u64;
                if len > 0 {
                    self.grow(len as u64);
                }
                // Both silence and a slow trickle have a limit.
                let earned = Duration::from_secs(self.received / LEAST_RATE);
                let silence = tokio::time::Instant::now() + self.limit;
                let due = silence.min(self.began + self.limit + earned);
                self.timer.as_mut().reset(due);
                if self.body.is_end_stream() {
                    self.end();
                }
            }
            Some(Err(_)) | None => self.end(),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if let Some(place) = &self.place {
            self.open.finished(place.id);
        }
        // A client that still writes would find its connection closed and never read why. One that has sent nothing may wait for
        // the word to go on, which reading would give it.
        let still_writes = !self.over && !self.body.is_end_stream() && self.received > 0;
        match Handle::try_current() {
            Ok(runtime) if still_writes => {
                let (body, open, id) = (std::mem::take(&mut self.body), self.open.clone(), self.id);
                runtime.spawn(async move {
                    linger(body).await;
                    open.lock().table.read(id);
                });
            }
            _ => self.end(),
        }
    }
}

/// Reads and discards the rest of a body that was refused, as long as it keeps coming.
async fn linger(mut body: Body) {
    let rest = async {
        loop {
            let next = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx));
            let Ok(Some(Ok(_))) = timeout(SILENCE, next).await else {
                break;
            };
        }
    };
    let _ = timeout(LINGER, rest).await;
}

/// An answer on its way, in pieces of at most [`PIECE`] bytes.
///
/// The server asks for a piece when it has room for it. Where a client's window has none, nothing is asked for, and no write waits
/// that could time out: so the table knows since when a piece waits, or the stream does.
pub(super) struct ResponseBody {
    body: Body,
    /// The rest of the body's last frame.
    rest: Bytes,
    /// Time at which the last piece was handed over, if no other has been asked for since.
    offered: Option<Instant>,
    /// Present on HTTP/2, where only the stream ends.
    stream: Option<Arc<PendingPiece>>,
    answer: ResponseGuard,
}

/// Runs the streams of an HTTP/2 connection, and gives one up of whose answer the client takes nothing.
#[derive(Clone)]
pub(super) struct Streams {
    /// Time limit for that.
    pub(super) limit: Duration,
}

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, stream: F) {
        let limit = self.limit;
        let offer = Arc::new(PendingPiece(watch::Sender::new(None)));
        tokio::spawn(PENDING_PIECE.scope(offer.clone(), async move {
            tokio::select! {
                _ = stream => {}
                () = offer.is_ignored_for(limit) => {
                    tracing::debug!("a stream was given up: nothing of its answer was taken in time");
                }
            }
        }));
    }
}

/// The time since which a piece of a stream's answer waits to be taken.
struct PendingPiece(watch::Sender<Option<Instant>>);

impl PendingPiece {
    async fn is_ignored_for(&self, limit: Duration) {
        let mut offers = self.0.subscribe();
        loop {
            let Ok(offered) = offers.wait_for(Option::is_some).await.map(|offer| *offer) else {
                return std::future::pending().await;
            };
            if let Some(offered) = offered {
                tokio::time::sleep_until((offered + limit).into()).await;
            }
            if *self.0.borrow() == offered {
                return;
            }
        }
    }
}

tokio::task_local! {
    /// The offer of the stream that this task serves.
    static PENDING_PIECE: Arc<PendingPiece>;
}

/// An answer counts as under way until this is dropped.
pub(super) struct ResponseGuard {
    pub(super) open: OpenConnections,
    pub(super) id: Id,
}

impl ResponseBody {
    pub(super) fn new(body: Body, answer: ResponseGuard) -> Self {
        Self {
            body,
            rest: Bytes::new(),
            offered: None,
            stream: PENDING_PIECE.try_with(Arc::clone).ok(),
            answer,
        }
    }

    fn taken(&mut self) {
        let Some(offered) = self.offered.take() else {
            return;
        };
        match &self.stream {
            Some(stream) => drop(stream.0.send_replace(None)),
            None => self.answer.open.lock().table.taken(self.answer.id, offered),
        }
    }

    fn offer(&mut self) {
        let now = Instant::now();
        self.offered = Some(now);
        match &self.stream {
            Some(stream) => drop(stream.0.send_replace(Some(now))),
            None => self.answer.open.lock().table.offered(self.answer.id, now),
        }
    }

    fn poll_piece(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.rest.is_empty() {
            let frame = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                other => return Poll::Ready(other),
            };
            match frame.into_data() {
                Ok(data) => self.rest = data,
                Err(frame) => return Poll::Ready(Some(Ok(frame))),
            }
        }
        let piece = self.rest.split_to(self.rest.len().min(PIECE));
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }
}

impl HttpBody for ResponseBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.taken();
        let piece = ready!(self.poll_piece(cx));
        self.offer();
        Poll::Ready(piece)
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        let rest = self.rest.len() as u64;
        let body = self.body.size_hint();
        let mut hint = http_body::SizeHint::new();
        hint.set_lower(body.lower() + rest);
        if let Some(upper) = body.upper() {
            hint.set_upper(upper + rest);
        }
        hint
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        self.taken();
    }
}

impl Drop for ResponseGuard {
    fn drop(&mut self) {
        self.open.lock().table.answered(self.id, Instant::now());
    }
}

/// Bytes of a read. hyper's buffer of a connection grows up to its limit while reads fill it.
const MOST_READ: usize = 8 << 10;
/// Slowest accepted body, in bytes per second.
const LEAST_RATE: u64 = 1024;
/// Bytes of an answer that a client takes at once: few enough that a slow one takes them in time.
const PIECE: usize = 16 << 10;
/// Time limit for reading the rest of a refused body: 8 MiB at 1.1 Mbit/s.
const LINGER: Duration = Duration::from_secs(60);
/// Longest wait for the next piece of it.
const SILENCE: Duration = Duration::from_secs(5);
