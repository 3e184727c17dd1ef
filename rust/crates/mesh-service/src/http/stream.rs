//! Connections, bodies and answers that a [`Table`](super::table::Table) is told about, and that end when the other side does nothing.

use std::error::Error;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes, HttpBody};
use http_body::Frame;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::Shared;
use super::table::Id;

/// A client's connection.
pub(super) struct Watched<S> {
    stream: S,
    shared: Shared,
    id: Id,
    /// Time limit for a client that takes nothing of the written data.
    limit: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> Watched<S> {
    pub(super) fn new(stream: S, shared: Shared, id: Id, limit: Duration) -> Self {
        Self {
            stream,
            shared,
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
        let stalled = self
            .stalled
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = ready!(Pin::new(&mut self.stream).poll_read(cx, buffer));
        if buffer.filled().len() > before {
            self.shared.table().heard(self.id, Instant::now());
        }
        Poll::Ready(result)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
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

/// A body that did not come in time.
#[derive(Debug)]
pub struct TooSlow(Duration);

impl fmt::Display for TooSlow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs_f64();
        write!(
            f,
            "the body did not arrive in time: nothing came for {seconds} s, or less than {LEAST_RATE} bytes a second \
             (http.connections.body_timeout)"
        )
    }
}

impl Error for TooSlow {}

impl TooSlow {
    /// This failure among the causes of another.
    pub fn cause_of<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Self> {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(slow) = error.downcast_ref() {
                return Some(slow);
            }
            cause = error.source();
        }
        None
    }
}

/// The body of a request, for which is not waited longer than it deserves.
pub(super) struct Incoming {
    body: Body,
    shared: Shared,
    id: Id,
    limit: Duration,
    began: tokio::time::Instant,
    received: u64,
    timer: Pin<Box<Sleep>>,
    over: bool,
}

impl Incoming {
    pub(super) fn new(body: Body, shared: Shared, id: Id, limit: Duration) -> Self {
        Self {
            over: body.is_end_stream(),
            body,
            shared,
            id,
            limit,
            began: tokio::time::Instant::now(),
            received: 0,
            timer: Box::pin(tokio::time::sleep(limit)),
        }
    }

    fn end(&mut self) {
        if !std::mem::replace(&mut self.over, true) {
            self.shared.table().read(self.id);
        }
    }
}

impl HttpBody for Incoming {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
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
                // Silence has a limit, and what comes drop by drop has one, too.
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

impl Drop for Incoming {
    fn drop(&mut self) {
        self.end();
    }
}

/// An answer on its way, in pieces of at most [`PIECE`] bytes.
///
/// The server asks for a piece when it has room for it. Where a client's window has none, nothing is asked for, and no write waits
/// that could time out: so the table knows since when a piece waits.
pub(super) struct Outgoing {
    body: Body,
    /// The rest of the body's last frame.
    rest: Bytes,
    /// Time at which the last piece was handed over, if no other has been asked for since.
    offered: Option<Instant>,
    answer: Answer,
}

/// An answer counts as under way until this is dropped.
pub(super) struct Answer {
    pub(super) shared: Shared,
    pub(super) id: Id,
}

impl Outgoing {
    pub(super) fn new(body: Body, answer: Answer) -> Self {
        Self {
            body,
            rest: Bytes::new(),
            offered: None,
            answer,
        }
    }

    fn taken(&mut self) {
        if let Some(offered) = self.offered.take() {
            self.answer.shared.table().taken(self.answer.id, offered);
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

impl HttpBody for Outgoing {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.taken();
        let piece = ready!(self.poll_piece(cx));
        let now = Instant::now();
        self.offered = Some(now);
        self.answer.shared.table().offered(self.answer.id, now);
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

impl Drop for Outgoing {
    fn drop(&mut self) {
        self.taken();
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.shared.table().answered(self.id, Instant::now());
    }
}

/// Bytes of a body for each of which nobody waits longer than a second.
const LEAST_RATE: u64 = 1024;
/// Bytes of an answer that a client takes at once: few enough that a slow one takes them in time.
const PIECE: usize = 16 << 10;
