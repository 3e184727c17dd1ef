//! Envelopes of the messages on the clients' port, counted before they go to the audit trail: a client sends
//! hundreds of Chunks for one long task, and none of them waits for a queue.

use std::collections::HashMap;
use std::net::IpAddr;

use dcf::MsgType;
use mesh_audit::writer::Tally;

use crate::audit::Recorder;
use crate::mesh::timestamp_us;

/// Counts messages by type and sender. What was counted is recorded by [`flush`](Self::flush), or when it is
/// dropped.
pub(crate) struct Tallies {
    recorder: Recorder,
    carrier: &'static str,
    counted: HashMap<(MsgType, IpAddr), Tally>,
}

impl Tallies {
    pub(crate) fn new(recorder: Recorder, carrier: &'static str) -> Self {
        Self {
            recorder,
            carrier,
            counted: HashMap::new(),
        }
    }

    /// Counts a message that was accepted.
    pub(crate) fn count(&mut self, kind: MsgType, from: IpAddr, bytes: usize) {
        let from = from.to_canonical();
        if !self.recorder.counts_messages() {
            return self.recorder.message(self.carrier, kind, from, bytes);
        }
        let tally = self.counted.entry((kind, from)).or_insert_with(|| Tally {
            count: 0,
            bytes: 0,
            since: timestamp_us() / 1000,
        });
        tally.count += 1;
        tally.bytes += bytes as u64;
        if self.counted.len() >= MOST_SENDERS {
            self.flush();
        }
    }

    /// True if there is nothing to record.
    pub(crate) fn is_empty(&self) -> bool {
        self.counted.is_empty()
    }

    /// Records what was counted.
    pub(crate) fn flush(&mut self) {
        for ((kind, from), tally) in self.counted.drain() {
            self.recorder.messages(self.carrier, kind, from, tally);
        }
    }
}

impl Drop for Tallies {
    fn drop(&mut self) {
        self.flush();
    }
}

/// Types and senders that are counted at a time.
const MOST_SENDERS: usize = 1024;
