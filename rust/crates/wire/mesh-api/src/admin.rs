//! Administration: join tokens, nodes, pins, drains and plans.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::evidence::NodeEvidence;
use crate::mesh::NameConflict;
use crate::rings::Holding;

/// A join token to create.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CreateTokenRequest {
    /// Seconds for which a node may join with it, up to a year; a day if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 31_536_000)))]
    pub ttl_seconds: Option<u64>,
    /// Note for the operator, up to 256 bytes.
    #[serde(default)]
    pub note: String,
    /// Number of nodes that may join with it, up to 1024; one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 1024)))]
    pub nodes: Option<u32>,
    /// Role of the nodes that join with it; `worker` is the only one, and the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(extend("enum" = ["worker"])))]
    pub role: Option<String>,
}

/// A new join token.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TokenCreated {
    /// The token, which is shown only once.
    pub token: String,
    /// Id of the token.
    #[serde(default)]
    pub id: String,
    /// Its end, in seconds since 1970.
    #[serde(default)]
    pub expires_at: u64,
}

/// The join tokens that the head remembers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct TokenList {
    /// The tokens.
    pub tokens: Vec<Token>,
}

/// A join token, without its secret.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Token {
    /// Id of the token.
    pub id: String,
    /// Note of its creator.
    pub note: String,
    /// `open`, `used` or `expired`.
    #[cfg_attr(feature = "schema", schemars(extend("enum" = ["open", "used", "expired"])))]
    pub state: Cow<'static, str>,
    /// Its creation, in seconds since 1970.
    pub created_at: u64,
    /// Its end, in seconds since 1970.
    pub expires_at: u64,
    /// Seconds since its creation.
    pub age_seconds: u64,
    /// Seconds until its end.
    pub expires_in_seconds: u64,
    /// Nodes that may still join with it.
    pub uses_left: u32,
    /// The node that joined with it, the last one of several.
    pub used_by: Option<TokenUse>,
    /// Number of nodes that it was made for; 0 from heads of earlier versions.
    pub nodes: u32,
    /// Role of the nodes that join with it.
    pub role: Cow<'static, str>,
    /// The nodes that joined with it, in order.
    pub uses: Vec<TokenUse>,
}

/// The use of a join token.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct TokenUse {
    /// Id of the node.
    pub node_id: String,
    /// Name of the node.
    pub name: String,
    /// Time of the use, in seconds since 1970.
    pub at: u64,
}

/// A join token, by its id.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// Id of the token.
    pub id: String,
}

/// A join token that is no longer valid.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct RevokedToken {
    /// Id of the token.
    pub id: String,
    /// Always true.
    pub revoked: bool,
}

/// The mesh root.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Root {
    /// Name of the mesh.
    pub mesh: String,
    /// SHA-256 of the root's certificate, which join tokens pin.
    pub root: String,
    /// The root before it, while it is accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub former: Option<FormerRoot>,
    /// End of the intermediate by which the head issues certificates, in seconds since 1970; absent where it
    /// has the root's keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub intermediate_until: Option<u64>,
}

/// A mesh root that another one replaces.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct FormerRoot {
    /// SHA-256 of its certificate.
    pub root: String,
    /// End of the time in which it is accepted, in seconds since 1970.
    pub accepted_until: u64,
}

/// A rotation of the mesh root.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct RotateRootRequest {
    /// Time for which both roots are accepted; by default the head's `trust.root_overlap`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlap_seconds: Option<u64>,
}

/// The nodes that the head knows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct NodeList {
    /// The nodes, by their ids.
    pub nodes: Vec<Node>,
}

/// A node that the head knows by its certificate.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Node {
    /// Id of the node.
    pub node_id: String,
    /// Name of the node.
    pub name: String,
    /// `connected`, `absent`, `expelled`, `pending` (it, or a change of its evidence, waits for approval), `approved` (it joins when it asks again) or
    /// `replaced` (its identity was rotated).
    #[cfg_attr(feature = "schema", schemars(extend("enum" = ["connected", "absent", "expelled", "pending", "approved", "replaced"])))]
    pub state: Cow<'static, str>,
    /// Time at which it joined, in seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub member_since: Option<u64>,
    /// End of its certificate, in seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate_ends: Option<u64>,
    /// `ip:port` of its link.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Seconds since it connected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connected_seconds: Option<f64>,
    /// Seconds since its last sign of life.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_seen_seconds: Option<f64>,
    /// Time of its expulsion, in seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expelled_at: Option<u64>,
    /// Reason for its expulsion.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Signature algorithm of its identity; absent for nodes of earlier versions, which have none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<String>,
    /// SHA-256 of the key of its certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,
    /// Id of the token that it joined with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// Ids that it had before, the oldest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub former_ids: Vec<String>,
    /// The identity that has taken the place of this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replaced_by: Option<String>,
    /// Time since which it, or a change of its evidence, waits for approval, in seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waits_since: Option<u64>,
    /// What it states about itself; absent for nodes that sent nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evidence: Option<NodeEvidence>,
}

/// A node to expel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ExpelRequest {
    /// Name or id of the node, or at least the first 8 digits of the id.
    pub node: String,
    /// Reason, one line of up to 256 bytes.
    #[serde(default)]
    pub reason: String,
}

/// A node, by its name or id.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NodeRequest {
    /// Name or id of the node, or at least the first 8 digits of the id.
    pub node: String,
}

/// A node that was approved, expelled or readmitted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct NodeChange {
    /// Id of the node.
    pub node_id: String,
    /// Name of the node; empty if it is not known.
    pub name: String,
    /// `connected`, `absent`, `expelled` or `approved`.
    #[cfg_attr(feature = "schema", schemars(extend("enum" = ["connected", "absent", "expelled", "approved"])))]
    pub state: Cow<'static, str>,
    /// True if an expulsion closed its links.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub was_connected: Option<bool>,
}

/// Pins, and names that several models claim.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct PinList {
    /// The pins, by name.
    pub pins: Vec<Pin>,
    /// Names that several models claim.
    pub name_conflicts: Vec<NameConflict>,
}

/// A pin: the model that a name stands for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
// No defaults: the head keeps its pins in this form, and one in part is a damaged one.
pub struct Pin {
    /// The name, as it was first written.
    pub name: String,
    /// SHA-256 of the manifest.
    pub fingerprint: String,
    /// Name of the worker that had it first; of no account where an operator decided.
    pub worker: String,
    /// True if an operator set it.
    pub operator: bool,
    /// Id of the node that first sought it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node: String,
    /// Id of the worker that had it first.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub holder: String,
}

/// An operator's decision on a name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct PinDecision {
    /// Name of the model.
    pub name: String,
    /// SHA-256 of the manifest, in hexadecimal; `null` releases the pin.
    #[serde(default)]
    pub fingerprint: Option<String>,
}

/// A worker, by its name or node id.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct WorkerRequest {
    /// Name or node id of the worker.
    pub worker: String,
}

/// What a worker still holds and runs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct DrainProgress {
    /// Name of the worker; absent if it is not connected.
    pub worker: Option<String>,
    /// Its node id; old workers have none.
    pub node_id: Option<String>,
    /// True if it gets nothing new.
    pub draining: bool,
    /// Requests of this head that run on it.
    pub assigned: u32,
    /// Its stages of rings.
    pub holds: Vec<Holding>,
}

/// The ring that would be formed for a model.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct PlanResponse {
    /// Name of the model.
    pub model: String,
    /// Most tokens of a request.
    pub context: u32,
    /// The plan as a table, for people.
    pub text: String,
    /// Names of all nodes by their ids.
    pub names: BTreeMap<String, String>,
    /// Stages, nodes that are left out and the expected speed.
    pub plan: Value,
}

/// Rings to compare with fresh plans.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RebalanceRequest {
    /// Name of the model; all rings if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Compare only.
    #[serde(default)]
    pub dry_run: bool,
}

/// Rings and the plans that they were compared with.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct RebalanceResponse {
    /// True if nothing was changed.
    pub dry_run: bool,
    /// The comparisons.
    pub rings: Vec<RingComparison>,
}

/// A ring and a fresh plan.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct RingComparison {
    /// Name of the model.
    pub model: String,
    /// The ring.
    pub old: RingLayout,
    /// The plan.
    pub new: RingPlan,
    /// Part of the cost that the plan saves; negative where it costs more.
    pub gain: f64,
    /// The change that was made or would be made, as a sentence.
    pub verdict: String,
}

/// A ring as it is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct RingLayout {
    /// Stages and workers, in one line.
    pub layout: String,
    /// Milliseconds per token of one stream.
    pub token_ms: f64,
    /// Tokens per second of many streams.
    pub tokens_per_second: f64,
}

/// A ring as it could be.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct RingPlan {
    /// Milliseconds per token of one stream.
    pub token_ms: f64,
    /// Tokens per second of many streams.
    pub tokens_per_second: f64,
    /// The plan as a table, for people.
    pub text: String,
    /// Stages, nodes that are left out and the expected speed.
    pub plan: Value,
}
