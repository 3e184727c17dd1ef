//! Reports of a fetch.

use std::time::Duration;

/// Receives progress reports of a fetch. Must not block.
pub trait Watch: Send + Sync {
    /// Number of bytes to fetch, and of bytes that are present already.
    fn planned(&self, missing: u64, present: u64) {
        let _ = (missing, present);
    }
    /// Number of bytes that arrived and were written.
    fn arrived(&self, bytes: u64) {
        let _ = bytes;
    }
    /// An attempt failed; the next one follows after this pause.
    fn waiting(&self, reason: &str, pause: Duration) {
        let _ = (reason, pause);
    }
    /// All bytes are present; this many are now read for checking.
    fn checking(&self, bytes: u64) {
        let _ = bytes;
    }
    /// Number of bytes that were read for checking.
    fn checked(&self, bytes: u64) {
        let _ = bytes;
    }
}

/// A watch that ignores all reports.
impl Watch for () {}
