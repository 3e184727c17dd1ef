//! Reports of a fetch.

use std::time::Duration;

/// Receives progress reports of a fetch. Must not block.
pub trait Watch: Send + Sync {
    /// Number of bytes to fetch, and of bytes that are present already.
    fn planned(&self, _missing: u64, _present: u64) {}
    /// Number of bytes that arrived and were written.
    fn arrived(&self, _bytes: u64) {}
    /// An attempt failed; the next one follows after this pause.
    fn waiting(&self, _reason: &str, _pause: Duration) {}
    /// All bytes are present; this many are now read for checking.
    fn checking(&self, _bytes: u64) {}
    /// Number of bytes that were read for checking.
    fn checked(&self, _bytes: u64) {}
}

/// A watch that ignores all reports.
impl Watch for () {}
