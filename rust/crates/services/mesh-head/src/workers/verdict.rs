//! What becomes of a datagram on the worker bus.

use crate::metrics::DatagramCounters;

/// A decision about one datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Accepted,
    /// It cannot be read.
    Malformed,
    /// Nobody waits for such a message.
    Unexpected,
    /// Its sender is not admitted.
    Untrusted,
}

impl Verdict {
    /// Counts the datagram.
    pub(super) fn count(self, counters: &DatagramCounters) {
        match self {
            Self::Accepted => counters.accepted.inc(),
            Self::Malformed => counters.malformed.inc(),
            Self::Unexpected => counters.unexpected.inc(),
            Self::Untrusted => counters.untrusted.inc(),
        };
    }
}
