//! The report of models to the head: those that are sought, with their progress, and sources that lied.

use std::collections::BTreeMap;

use mesh_base::units::about_bytes;
use mesh_proto::{BadSource, SoughtModel};

/// What the head hears of models, besides the replicas.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) sought: BTreeMap<String, SoughtModel>,
    pub(crate) bad: Vec<BadSource>,
    /// Number of those that were taken by [`take_accused`](Self::take_accused).
    told: usize,
    /// Counts the changes.
    pub(crate) version: u64,
}

impl Report {
    /// Notes that a model is sought, with its progress.
    pub(crate) fn seeks(&mut self, name: &str, change: impl FnOnce(&mut SoughtModel)) {
        let sought = self.sought.entry(name.to_owned()).or_default();
        let before = sought.clone();
        name.clone_into(&mut sought.name);
        change(sought);
        if *sought != before {
            self.version += 1;
        }
    }

    pub(crate) fn ends(&mut self, name: &str) {
        if self.sought.remove(name).is_some() {
            self.version += 1;
        }
    }

    /// True if this worker may get the model from the hub, asked to or not.
    pub(crate) fn may_download(&self, name: &str) -> bool {
        self.sought.get(name).is_some_and(|sought| sought.origin)
    }

    /// A worker sent something else than the manifest says.
    pub(crate) fn accuse(&mut self, bad: BadSource) {
        if !self.bad.contains(&bad) && self.bad.len() < MOST_BAD {
            self.bad.push(bad);
            self.version += 1;
        }
    }

    /// The accusations since the last call.
    pub(crate) fn take_accused(&mut self) -> Vec<BadSource> {
        let fresh = self.bad[self.told..].to_vec();
        self.told = self.bad.len();
        fresh
    }

    /// Description of what is missing still; empty if nothing is.
    pub(crate) fn lacking(&self) -> String {
        let texts = self.sought.values().map(|sought| {
            let (bytes, total) = (sought.bytes.max(sought.origin_bytes), sought.bytes_total);
            let mut text = format!("{} is being fetched", sought.name);
            if total > 0 {
                text += &format!(", {} of {}", about_bytes(bytes), about_bytes(total));
            }
            if !sought.origin_error.is_empty() {
                text += &format!(" ({})", sought.origin_error);
            }
            text
        });
        texts.collect::<Vec<_>>().join("; ")
    }
}

const MOST_BAD: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changes_count() {
        let mut report = Report::default();
        report.seeks("m", |sought| sought.origin = true);
        report.seeks("m", |sought| sought.origin = true);
        assert_eq!(report.version, 1);
        assert!(report.may_download("m") && !report.may_download("n"));
        report.ends("n");
        report.ends("m");
        assert_eq!(report.version, 2);
    }

    #[test]
    fn accusations_are_bounded_and_said_once() {
        let mut report = Report::default();
        for round in 0..2 {
            for node in 0..1000 {
                report.accuse(BadSource {
                    node_id: node.to_string(),
                    ..BadSource::default()
                });
            }
            assert_eq!(report.bad.len(), MOST_BAD, "round {round}");
            let fresh = if round == 0 { MOST_BAD } else { 0 };
            assert_eq!(report.take_accused().len(), fresh);
        }
        assert_eq!(report.version, MOST_BAD as u64);
    }

    #[test]
    fn what_is_missing_is_said_with_its_obstacle() {
        let mut report = Report::default();
        report.seeks("m", |sought| {
            (sought.bytes, sought.bytes_total) = (1 << 20, 4 << 20);
            sought.origin_error = "no route".to_owned();
        });
        assert_eq!(
            report.lacking(),
            "m is being fetched, 1.0 MiB of 4.0 MiB (no route)"
        );
    }
}
