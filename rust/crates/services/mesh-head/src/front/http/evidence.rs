//! Evidence of nodes in the form of the API.

use arcanum_attestor::{Change, Evidence, EvidenceRecord};
use mesh_api::{EvidenceChange, NodeEvidence, NodeModel, NodePcr, NodeSystem, NodeTpm};

/// The record of a member.
pub(super) fn of_member(record: EvidenceRecord) -> NodeEvidence {
    let past = record.history.into_iter();
    let held = record.held.into_iter().flat_map(|held| {
        let changes = held.changes.into_iter();
        changes.map(move |change| shown(held.since, change))
    });
    NodeEvidence {
        withheld: record.withheld,
        changes: past.map(|past| shown(past.at, past.change)).collect(),
        waiting: held.collect(),
        ..of_newcomer(record.evidence, record.since)
    }
}

/// The evidence of a node that waits for approval since then.
pub(super) fn of_newcomer(said: Evidence, since: u64) -> NodeEvidence {
    let models = said.models.into_iter();
    NodeEvidence {
        since,
        version: said.version,
        kernel: said.kernel,
        os: said.os,
        os_version: said.os_version,
        architecture: said.architecture,
        processor: said.processor,
        threads: said.threads,
        memory_mib: said.memory_mib,
        gpus: said.gpus,
        boot: said.boot,
        models: models
            .map(|(name, fingerprint)| NodeModel { name, fingerprint })
            .collect(),
        system: said.system.map(|system| NodeSystem {
            path: system.path,
            nar_hash: system.nar_hash,
            references: system.references,
            signed_by: system.signed_by,
        }),
        tpm: said.tpm.map(|tpm| NodeTpm {
            manufacturer: tpm.manufacturer,
            key: tpm.key,
            algorithm: tpm.algorithm,
            pcrs: tpm
                .pcrs
                .into_iter()
                .map(|(index, value)| NodePcr { index, value })
                .collect(),
        }),
        ..NodeEvidence::default()
    }
}

fn shown(at: u64, change: Change) -> EvidenceChange {
    EvidenceChange {
        at,
        field: change.field.name().to_owned(),
        before: change.before,
        after: change.after,
    }
}
