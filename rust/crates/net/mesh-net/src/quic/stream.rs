//! DCF messages on a bidirectional stream.

use dcf::{ErrorCode, Message, StreamCodec};
use futures::{SinkExt, StreamExt};
use quinn::{RecvStream, SendStream};
use tokio_util::codec::{FramedRead, FramedWrite};

use super::error::{StreamFailure, error_code};

/// A bidirectional stream of messages.
///
/// Dropping it, or one of its halves, before [`finish`](Self::finish) or the peer's end cancels it: the peer's next
/// [`recv`](Self::recv) or [`send`](Self::send) fails with [`StreamFailure::Cancelled`].
#[derive(Debug)]
pub struct MsgStream {
    send: SendHalf,
    recv: RecvHalf,
}

impl MsgStream {
    pub(super) fn new((send, recv): (SendStream, RecvStream), max_message: usize) -> Self {
        Self {
            send: SendHalf::new(send, max_message),
            recv: RecvHalf::new(recv, max_message),
        }
    }

    /// Sends one message; see [`SendHalf::send`].
    pub async fn send(&mut self, message: Message) -> Result<(), StreamFailure> {
        self.send.send(message).await
    }

    /// The next message; see [`RecvHalf::recv`].
    pub async fn recv(&mut self) -> Result<Option<Message>, StreamFailure> {
        self.recv.recv().await
    }

    /// Limits the payload of messages; see [`RecvHalf::limit`].
    pub fn limit(&mut self, max_message: usize) {
        self.recv.limit(max_message);
    }

    /// Ends the sending half; see [`SendHalf::finish`].
    pub fn finish(&mut self) -> Result<(), StreamFailure> {
        self.send.finish()
    }

    /// Cancels both halves.
    pub fn reset(mut self, code: ErrorCode) {
        self.send.reset_with(code);
        self.recv.stop_with(code);
    }

    /// Splits the stream into its halves, for two tasks.
    pub fn split(self) -> (SendHalf, RecvHalf) {
        (self.send, self.recv)
    }
}

/// The sending half of a [`MsgStream`].
#[derive(Debug)]
pub struct SendHalf {
    framed: FramedWrite<SendStream, StreamCodec>,
    /// True once the half is finished or reset.
    ended: bool,
}

impl SendHalf {
    pub(super) fn new(stream: SendStream, max_message: usize) -> Self {
        Self {
            framed: FramedWrite::new(stream, StreamCodec::new(max_message)),
            ended: false,
        }
    }

    /// Sends one message. Waits while the peer does not read. A message over the limit is refused and ends the stream.
    pub async fn send(&mut self, message: Message) -> Result<(), StreamFailure> {
        if self.ended {
            return Err(StreamFailure::Finished);
        }
        let sent = self.framed.send(message).await.map_err(StreamFailure::from);
        if let Err(StreamFailure::Codec(_)) = sent {
            self.reset_with(ErrorCode::INVALID_PAYLOAD);
        }
        sent
    }

    /// Ends the half; messages already sent still arrive.
    pub fn finish(&mut self) -> Result<(), StreamFailure> {
        self.ended = true;
        let finished = self.framed.get_mut().finish();
        finished.map_err(|_| StreamFailure::Finished)
    }

    /// Cancels the half: messages that have not arrived yet may be lost.
    pub fn reset(mut self, code: ErrorCode) {
        self.reset_with(code);
    }

    /// Resolves when the peer no longer wants to read, with its code, or when the link is over. `None`: everything was
    /// finished and has arrived.
    pub fn stopped(&self) -> impl Future<Output = Option<ErrorCode>> + Send + Sync + 'static {
        let stopped = self.framed.get_ref().stopped();
        async move {
            match stopped.await {
                Ok(code) => code.map(error_code),
                Err(_) => Some(ErrorCode::CANCELLED),
            }
        }
    }

    fn reset_with(&mut self, code: ErrorCode) {
        self.ended = true;
        // Fails only when the stream is over already.
        let _ = self.framed.get_mut().reset(u32::from(code.0).into());
    }
}

impl Drop for SendHalf {
    fn drop(&mut self) {
        // quinn would finish the stream, which looks like a whole answer to the peer.
        if !self.ended {
            self.reset_with(ErrorCode::CANCELLED);
        }
    }
}

/// The receiving half of a [`MsgStream`].
#[derive(Debug)]
pub struct RecvHalf {
    framed: FramedRead<RecvStream, StreamCodec>,
    /// True once the end or an error was seen.
    ended: bool,
}

impl RecvHalf {
    pub(super) fn new(stream: RecvStream, max_message: usize) -> Self {
        Self {
            framed: FramedRead::new(stream, StreamCodec::new(max_message)),
            ended: false,
        }
    }

    /// Sets the maximum payload of later messages in bytes; larger ones stop the stream.
    pub fn limit(&mut self, max_message: usize) {
        *self.framed.decoder_mut() = StreamCodec::new(max_message);
    }

    /// The next message; `None` when the peer has finished. Safe to drop half-way: nothing is lost.
    ///
    /// Errors are final. Bytes that are not DCF messages, and messages over the limit, stop the stream.
    pub async fn recv(&mut self) -> Result<Option<Message>, StreamFailure> {
        if self.ended {
            return Ok(None);
        }
        match self.framed.next().await {
            Some(Ok(message)) => Ok(Some(message)),
            Some(Err(error)) => {
                let failure = StreamFailure::from(error);
                self.stop_with(ErrorCode::INVALID_PAYLOAD);
                Err(failure)
            }
            None => {
                self.ended = true;
                Ok(None)
            }
        }
    }

    /// Tells the peer to stop sending.
    pub fn stop(mut self, code: ErrorCode) {
        self.stop_with(code);
    }

    fn stop_with(&mut self, code: ErrorCode) {
        self.ended = true;
        // Fails only when the stream is over already.
        let _ = self.framed.get_mut().stop(u32::from(code.0).into());
    }
}

impl Drop for RecvHalf {
    fn drop(&mut self) {
        if !self.ended {
            self.stop_with(ErrorCode::CANCELLED);
        }
    }
}
