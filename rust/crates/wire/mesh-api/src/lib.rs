//! The types of the head's HTTP API.
//!
//! The head serialises the responses and reads the bodies of administrators with them; the client, the
//! command line and the tests use the same types from the other side. The OpenAI API's types have the names of
//! its reference: [`ChatCompletionRequest`], [`ChatCompletionChunk`], [`CreateEmbeddingResponse`], [`Model`],
//! [`ErrorResponse`]. Administration has [`Mesh`], [`Node`], [`Token`], [`Key`], [`Ring`] and [`Pin`].
//!
//! Rules for a change:
//! - a response may gain fields: fields have defaults, which stand for null, too, where servers send that, and
//!   readers skip fields that they do not know, so that a client and a head of different versions understand
//!   each other;
//! - the head reads requests of the OpenAI API field by field, within bounds on their memory; the types of
//!   these requests are for those who write them. [`fields`] has the fields that have no effect and those that
//!   are refused, and the head's reader uses the same tables;
//! - [`OPENAPI`] is made of these types, and a test fails when it is not current:
//!   `cargo run -p mesh-api --features schema --bin openapi -- --write` writes it. The comments on types and
//!   fields are its descriptions.
//!
//! The feature `schema` adds what makes the document; only that needs it.

mod admin;
mod completion;
mod embeddings;
mod error;
mod evidence;
pub mod fields;
mod images;
mod keys;
mod mesh;
mod models;
mod null;
#[cfg(feature = "schema")]
pub mod openapi;
pub mod paths;
mod requests;
mod rings;
#[cfg(feature = "schema")]
mod schema;

pub use admin::{
    CreateTokenRequest, DrainProgress, ExpelRequest, FormerRoot, Node, NodeChange, NodeList,
    NodeRequest, Pin, PinDecision, PinList, PlanResponse, RebalanceRequest, RebalanceResponse,
    RevokedToken, RingComparison, RingLayout, RingPlan, Root, RotateRootRequest, Token,
    TokenCreated, TokenList, TokenRequest, TokenUse, WorkerRequest,
};
pub use completion::{
    Alternatives, ChatChoice, ChatChunkChoice, ChatCompletion, ChatCompletionChunk, ChatDelta,
    ChatLogprob, ChatLogprobs, ChatResponseMessage, Completion, CompletionChoice,
    CompletionLogprobs, CompletionUsage, Envelope, LogprobToken, PromptTokensDetails, Timings,
};
pub use embeddings::{
    CreateEmbeddingRequest, CreateEmbeddingResponse, Embedding, EmbeddingUsage, EncodingFormat,
    Vector,
};
pub use error::{Code, Error, ErrorResponse};
pub use evidence::{EvidenceChange, NodeEvidence, NodeModel, NodePcr, NodeSystem, NodeTpm};
pub use images::{
    CreateImageRequest, EditImageRequest, Image, ImageFormat, ImageInputTokens, ImageMaking,
    ImageStreamEvent, ImageTimings, ImageUsage, ImagesResponse,
};
pub use keys::{CreateKeyRequest, Key, KeyCreated, KeyList, KeyRequest, RevokedKey};
pub use mesh::{
    DeviceSplit, DuplicateIdentity, Fleet, Gossip, Machine, Mesh, ModelHolder, ModelSeeker,
    NameConflict, Path, Quarantine, RequestCounts, ServedModel, SharedModel, Sighting, Spread,
    TokenCounts, Worker,
};
pub use models::{Health, ListModelsResponse, Model, Readiness};
pub use requests::{
    ChatCompletionRequest, CompletionRequest, ContentPart, GenerationOptions, Message,
    MessageContent, NamedSchema, ResponseFormat, ResponseKind, SkippedPart, StopTexts,
    StreamOptions, StructuredOutputs, TextInput, TextPart,
};
pub use rings::{Holding, LeftOut, Recovery, Ring, RingStage, StageWorker, Unformed};

/// The OpenAPI 3.1 document of the API, as the head serves it at [`paths::OPENAPI`].
pub const OPENAPI: &str = include_str!("../openapi.json");
