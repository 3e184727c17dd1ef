//! What a node states about itself, for `hydramesh nodes show`.

use mesh_api::{EvidenceChange, NodeEvidence};
use mesh_base::clock;

use crate::output::plain;

/// Headings and values. All of it is the node's text, so no control character comes through.
pub(super) fn rows(evidence: &NodeEvidence) -> Vec<(String, String)> {
    let known = |text: &str| plain(if text.is_empty() { "unknown" } else { text });
    let mut rows: Vec<(String, String)> = Vec::new();
    let mut row = |heading: &str, value: String| rows.push((heading.to_owned(), value));
    row(
        "evidence",
        match evidence.withheld {
            true => "withheld now; the last one:".to_owned(),
            false => format!(
                "the node's word, unchanged since {}",
                clock::utc_of(evidence.since)
            ),
        },
    );
    row("hydramesh", known(&evidence.version));
    row("kernel", known(&evidence.kernel));
    let os = format!("{} {}", evidence.os, evidence.os_version);
    row("system", known(os.trim()));
    row("architecture", known(&evidence.architecture));
    row(
        "processor",
        format!(
            "{}, {} threads",
            known(&evidence.processor),
            evidence.threads
        ),
    );
    row("memory", format!("{} MiB", evidence.memory_mib));
    for gpu in &evidence.gpus {
        row("gpu", plain(gpu));
    }
    row("boot", known(&evidence.boot));
    for model in &evidence.models {
        let digits: String = model.fingerprint.chars().take(16).collect();
        row("model", plain(&format!("{} {digits}", model.name)));
    }
    if let Some(system) = &evidence.system {
        row("store path", plain(&system.path));
        row("nar hash", known(&system.nar_hash));
        let signers = system.signed_by.join(", ");
        row(
            "signed by",
            match signers.is_empty() {
                true => "no trusted key".to_owned(),
                false => plain(&signers),
            },
        );
    }
    if let Some(tpm) = &evidence.tpm {
        row("tpm", known(&tpm.manufacturer));
        let key = format!("{} {}", tpm.algorithm, tpm.key);
        row("tpm key", plain(&key));
        for pcr in &tpm.pcrs {
            row("pcr", plain(&format!("{:>2} {}", pcr.index, pcr.value)));
        }
    }
    for change in &evidence.changes {
        row("changed", changed(change));
    }
    for change in &evidence.waiting {
        row("waits", changed(change));
    }
    rows
}

fn changed(change: &EvidenceChange) -> String {
    let EvidenceChange {
        at,
        field,
        before,
        after,
    } = change;
    let text = format!("{} {field}: {before:?} to {after:?}", clock::utc_of(*at));
    plain(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evidence_is_shown_with_its_changes_and_controls_nothing() {
        let evidence: NodeEvidence = serde_json::from_value(serde_json::json!({
            "since": 1_795_910_400, "version": "0.1.0", "kernel": "6.12\u{1b}[31m", "os": "nixos", "os_version": "26.05",
            "processor": "Old CPU", "threads": 4, "memory_mib": 8000, "gpus": ["Nvidia 10de:2684"],
            "models": [{"name": "qwen\u{7}", "fingerprint": "ab".repeat(32)}],
            "system": {"path": "/nix/store/x", "nar_hash": "sha256:0", "references": 2, "signed_by": []},
            "tpm": {"manufacturer": "IFX\u{7}", "key": "000bab", "algorithm": "ecdsa-p256", "pcrs": [{"index": 7, "value": "65ca"}]},
            "changes": [{"at": 1_795_910_400, "field": "kernel", "before": "6.1\u{9b}", "after": "6.12"}],
            "waiting": [{"at": 1_795_910_400, "field": "os", "before": "debian 12", "after": "nixos 26.05"}],
        }))
        .unwrap();
        let shown: Vec<String> = rows(&evidence)
            .into_iter()
            .map(|(heading, value)| format!("{heading} {value}"))
            .collect();
        let shown = shown.join("\n");
        for part in [
            "evidence the node's word, unchanged since 2026-11-29",
            "system nixos 26.05",
            "architecture unknown",
            "model qwen abababababababab",
            "signed by no trusted key",
            "tpm IFX",
            "tpm key ecdsa-p256 000bab",
            "pcr  7 65ca",
            "kernel: \"6.1",
            "waits 2026-11-29",
            "\"debian 12\" to \"nixos 26.05\"",
        ] {
            assert!(shown.contains(part), "{part} is not in\n{shown}");
        }
        assert!(
            !shown.contains(|c: char| c.is_control() && c != '\n'),
            "{shown:?}"
        );
    }
}
