//! The head's end of a connection to a worker, whatever carries it.

use std::fmt;
use std::time::Instant;

use bytes::Bytes;
use dcf::{ErrorCode, Message};
use futures::future::BoxFuture;
use mesh_control::request::Failure;
use mesh_net::quic::Closed;

/// A connection to a worker, on which attempts at requests are made.
pub(crate) trait Connection: fmt::Debug + Send + Sync {
    /// Gives the worker a request.
    fn open(
        &self,
        request: WorkerRequest,
    ) -> BoxFuture<'_, Result<Box<dyn AttemptStream>, Failure>>;

    /// Reason for which the connection is closed; `None` while it is open.
    fn close_reason(&self) -> Option<Closed> {
        None
    }

    /// Ends the connection and the requests on it.
    fn close(&self, code: ErrorCode, text: &str);

    /// Time of the worker's last answer to any request, where that is the only sign that it works: it may
    /// answer one request after the other and say nothing meanwhile.
    fn last_answer(&self) -> Option<Instant> {
        None
    }
}

/// A request in the forms in which workers take it.
#[derive(Debug, Clone)]
pub(crate) struct WorkerRequest {
    /// For a worker of the mesh.
    pub message: Message,
    /// Pixels that follow it in parts.
    pub upload: Bytes,
    /// Payload of the plain DCF task that asks for the same, if one can.
    pub plain: Option<Bytes>,
}

/// One request on a connection; dropping it cancels the request.
pub(crate) trait AttemptStream: Send {
    /// Limits the payload of the worker's messages, in bytes, where they have no limit of their own.
    fn limit(&mut self, _: usize) {}

    /// The worker's next message. Safe to drop half-way. Errors are final, and so are the whole answer and the
    /// end.
    fn receive(&mut self) -> BoxFuture<'_, Result<FromWorker, Failure>>;

    /// Confirms the receipt of a complete answer.
    fn finish(&mut self) {}
}

/// A message of a worker on an [`AttemptStream`].
#[derive(Debug)]
pub(crate) enum FromWorker {
    /// A message of the mesh's protocol.
    Message(Message),
    /// The whole answer, as it is: the Result of a plain task.
    Whole(Bytes),
    End,
}
