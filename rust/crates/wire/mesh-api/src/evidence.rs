//! Evidence of nodes, as administrators see it.

use serde::{Deserialize, Serialize};

/// What a node states about itself, signed by its identity. It is the node's word: nothing measures it, but
/// for `tpm`. Unknown parts are empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct NodeEvidence {
    /// Time since which it is as it is, in seconds since 1970.
    pub since: u64,
    /// True if the node sends none any more; this is its last one.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub withheld: bool,
    /// Version of HydraMesh.
    pub version: String,
    /// Release of the kernel.
    pub kernel: String,
    /// Id of the operating system.
    pub os: String,
    /// Version of the operating system.
    pub os_version: String,
    /// Processor architecture.
    pub architecture: String,
    /// The processor's model.
    pub processor: String,
    /// Hardware threads.
    pub threads: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Graphics cards.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<String>,
    /// Id of the running boot.
    pub boot: String,
    /// Models that it serves.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<NodeModel>,
    /// The running NixOS system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system: Option<NodeSystem>,
    /// Its TPM, by a quote that the head verified.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tpm: Option<NodeTpm>,
    /// Changes that were accepted, the oldest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<EvidenceChange>,
    /// Changes that wait for approval.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub waiting: Vec<EvidenceChange>,
}

/// A model that a node states to serve.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct NodeModel {
    /// Name of the model.
    pub name: String,
    /// SHA-256 of the model.
    pub fingerprint: String,
}

/// The running NixOS system of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct NodeSystem {
    /// Its store path.
    pub path: String,
    /// Hash of the path's NAR.
    pub nar_hash: String,
    /// Number of its direct references, by its narinfo.
    pub references: u32,
    /// Names of the trusted keys that signed its narinfo.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub signed_by: Vec<String>,
}

/// The TPM of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct NodeTpm {
    /// Its manufacturer, by the node's word.
    pub manufacturer: String,
    /// Name of its attestation key, in hexadecimal.
    pub key: String,
    /// Algorithm of that key.
    pub algorithm: String,
    /// The quoted registers (PCRs) of the SHA-256 bank.
    pub pcrs: Vec<NodePcr>,
}

/// A register of a TPM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct NodePcr {
    /// Its number.
    pub index: u8,
    /// Its value, in hexadecimal.
    pub value: String,
}

/// A change of a node's evidence.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct EvidenceChange {
    /// Time at which the head heard of it, in seconds since 1970.
    pub at: u64,
    /// The field that changed.
    pub field: String,
    /// Its value before.
    pub before: String,
    /// Its value after.
    pub after: String,
}
