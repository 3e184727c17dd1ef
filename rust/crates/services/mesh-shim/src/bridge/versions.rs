//! The two versions of DCF, and all that the bridge decides by them.
//!
//! A datagram of v5.1 has a version byte before the header of v5.0.0. A head of v5.0.0 answers no probes, and
//! a client of v5.0.0 reads one datagram and no Chunks.

use dcf::Version;

/// The versions that are spoken, oldest first.
pub(super) const ALL: [Version; 2] = [OLDEST, Version::V5_1];

/// The version of a head of which nothing is known.
pub(super) const OLDEST: Version = Version::V5_0;

/// Room that has to be before a datagram for it to be sent on in any version.
pub const HEADROOM: usize = Version::V5_1.prefix().len();

/// Bytes of an answer that a client which knows no Chunks can get.
pub(super) const MOST_WHOLE: usize = Version::V5_0.max_payload();

/// The offset at which a received datagram begins if it is sent on in `version`: its first byte, the one
/// behind it, or one byte before it, where [`Version::BYTE`] has to be.
#[must_use]
pub fn reframed(datagram: &[u8], version: Version) -> isize {
    let (received, sent) = (Version::of(datagram).prefix(), version.prefix());
    received.len() as isize - sent.len() as isize
}

pub(super) fn other(version: Version) -> Version {
    match version {
        Version::V5_0 => Version::V5_1,
        Version::V5_1 => Version::V5_0,
    }
}

/// True if clients of this version put Chunks together.
pub(super) fn takes_chunks(version: Version) -> bool {
    version != Version::V5_0
}

/// The version in which a head that speaks these is probed in each round.
pub(super) fn probed_in(speaks: impl Fn(Version) -> bool) -> Version {
    let only_new = speaks(Version::V5_1) && !speaks(Version::V5_0);
    if only_new {
        Version::V5_1
    } else {
        Version::V5_0
    }
}
