//! The paths of the API.

/// Chats.
pub const CHAT_COMPLETIONS: &str = "/v1/chat/completions";
/// Texts to continue.
pub const COMPLETIONS: &str = "/v1/completions";
/// Texts to vectors.
pub const EMBEDDINGS: &str = "/v1/embeddings";
/// Texts to images.
pub const IMAGES: &str = "/v1/images/generations";
/// Images to other images.
pub const IMAGE_EDITS: &str = "/v1/images/edits";
/// An image that was made a while ago, by its unguessable name.
pub const IMAGE_FILE: &str = "/v1/images/files/{name}";
/// The models that requests can name.
pub const MODELS: &str = "/v1/models";
/// One model. Its name may have slashes.
pub const MODEL: &str = "/v1/models/{*name}";
/// Workers, rings, shared models and warnings.
pub const MESH: &str = "/v1/mesh";
/// Join tokens: the list, and a new one.
pub const TOKENS: &str = "/v1/mesh/tokens";
/// Revokes a join token.
pub const REVOKE_TOKEN: &str = "/v1/mesh/tokens/revoke";
/// The mesh root.
pub const ROOT: &str = "/v1/mesh/root";
/// Rotates the mesh root.
pub const ROTATE_ROOT: &str = "/v1/mesh/root/rotate";
/// Curtain tokens and API keys: the list, and a new token.
pub const KEYS: &str = "/v1/mesh/keys";
/// Revokes a curtain token.
pub const REVOKE_KEY: &str = "/v1/mesh/keys/revoke";
/// The nodes that the head knows.
pub const NODES: &str = "/v1/mesh/nodes";
/// Expels a node.
pub const EXPEL: &str = "/v1/mesh/nodes/expel";
/// Approves a node that waits to join.
pub const APPROVE: &str = "/v1/mesh/nodes/approve";
/// Readmits a node.
pub const READMIT: &str = "/v1/mesh/nodes/readmit";
/// Pins of model names: the list, and a decision.
pub const PINS: &str = "/v1/mesh/pins";
/// Drains a worker.
pub const DRAIN: &str = "/v1/mesh/drain";
/// Ends the drain of a worker.
pub const UNDRAIN: &str = "/v1/mesh/undrain";
/// The ring that would be formed for a model.
pub const PLAN: &str = "/v1/mesh/plan";
/// Compares rings with fresh plans.
pub const REBALANCE: &str = "/v1/mesh/rebalance";
/// Liveness.
pub const HEALTH: &str = "/health";
/// Readiness.
pub const READY: &str = "/ready";
/// Prometheus metrics.
pub const METRICS: &str = "/metrics";
/// The OpenAPI document.
pub const OPENAPI: &str = "/openapi.json";
