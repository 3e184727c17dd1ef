//! Epochs that other nodes kept of a trail.

use std::path::PathBuf;

use mesh_audit::kept::{EpochRoot, Kept};
use mesh_audit::verify::{Finding, Report};

use super::failed;
use crate::failure::Failure;

pub(super) fn read(paths: &[PathBuf]) -> Result<Vec<Kept>, Failure> {
    let read = paths.iter().map(|path| Kept::read(path).map_err(failed));
    read.collect()
}

/// The epochs that any of these nodes kept of a trail.
pub(super) fn epochs_of(kept: &[Kept], trail: &str) -> Vec<EpochRoot> {
    kept.iter().flat_map(|kept| kept.epochs_of(trail)).collect()
}

/// A trail of which nobody kept an epoch, while epochs of another one of its tier were kept, becomes a
/// finding.
pub(super) fn check(report: &mut Report, tier: &str, kept: &[Kept]) {
    let trails: Vec<_> = kept.iter().flat_map(|kept| kept.trails_of(tier)).collect();
    if trails.is_empty() || trails.iter().any(|(trail, _)| *trail == report.origin) {
        return;
    }
    for (trail, head) in trails {
        report.findings.push(Finding {
            file: "keys".into(),
            bytes: None,
            records: None,
            text: format!(
                "a node kept epochs of the trail {trail} of head {head}, which is another one"
            ),
        });
    }
}
