//! Have-maps: the ranges of a partial file that are present.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::files;
use crate::ranges::RangeSet;

/// The have-map file beside a partial file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HaveMap {
    version: u32,
    /// Length of the whole file.
    pub(crate) bytes: u64,
    /// Number of bytes that the file needs in the end.
    pub(crate) wanted: u64,
    /// Start and end of the ranges that are present.
    have: Vec<(u64, u64)>,
}

const HAVE_VERSION: u32 = 1;

/// Longest have-map that is read: some hundred thousand holes.
const MAX_HAVE_MAP: u64 = 16 << 20;

impl HaveMap {
    pub(super) fn new(bytes: u64, wanted: u64, have: &RangeSet) -> Self {
        HaveMap {
            version: HAVE_VERSION,
            bytes,
            wanted,
            have: have.iter().map(|range| (range.start, range.end)).collect(),
        }
    }

    /// Reads the map at `path`. A broken map counts as missing, and its ranges are fetched again.
    pub(crate) fn read(path: &Path) -> Option<HaveMap> {
        let json = files::read_limited(path, MAX_HAVE_MAP).ok()??;
        Self::parse(&json)
    }

    pub(super) fn parse(json: &[u8]) -> Option<HaveMap> {
        let map: HaveMap = serde_json::from_slice(json).ok()?;
        let fits = |&(start, end): &(u64, u64)| start < end && end <= map.bytes;
        let sound = map.version == HAVE_VERSION && map.have.iter().all(fits);
        let ascending = map.have.windows(2).all(|pair| pair[0].1 < pair[1].0);
        (sound && ascending).then_some(map)
    }

    pub(crate) fn ranges(&self) -> RangeSet {
        self.have.iter().map(|&(start, end)| start..end).collect()
    }
}

/// Path of the have-map for the partial file at `path`.
pub(crate) fn have_path(path: &Path) -> PathBuf {
    path.with_extension("have")
}
