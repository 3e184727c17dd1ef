//! Reasons for which a worker does not start, or ends.

use std::net::SocketAddr;
use std::path::PathBuf;

use mesh_engine::StartError;
use mesh_engine_ort::LoadError;
use mesh_model::{EncoderError, ModelError};
use mesh_net::quic::JoinError;
use mesh_net::trust::TrustError;
use mesh_store::LocalError;

use crate::config::Unsound;

/// Reasons for which a worker does not start, or ends.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// Keys that make no sense together.
    #[error("configuration: {0}")]
    Config(#[from] Unsound),
    /// An address is taken or not ours.
    #[error(
        "cannot listen on {address}/{carrier}: {source}; set `{key}` to another address or port"
    )]
    Listen {
        /// Address that cannot be used.
        address: SocketAddr,
        /// `tcp` or `udp`.
        carrier: &'static str,
        /// Configuration key of the address.
        key: &'static str,
        /// Error of the system.
        source: std::io::Error,
    },
    /// The state directory cannot be used.
    #[error("cannot use the state directory {}: {source}; set `state_dir` to one that this user can write", path.display())]
    StateDir {
        /// Path of the directory.
        path: PathBuf,
        /// Error of the system.
        source: std::io::Error,
    },
    /// A model is not there.
    #[error(transparent)]
    NotFound(#[from] LocalError),
    /// No file, folder, worker or hub model has this name.
    #[error("no model {name:?}: it is no file, in no model folder, {hint}")]
    Unknown {
        /// Name from the configuration.
        name: String,
        /// Valid forms of a name, and known names that look like it.
        hint: String,
    },
    /// The store of models, or the keys that it trusts.
    #[error("the store of models: {reason}; `store.dir` says where it lies")]
    ModelStore {
        /// Fault of the store or of a key.
        reason: String,
    },
    /// ONNX Runtime cannot be used at all.
    #[error(transparent)]
    Runtime(LoadError),
    /// A model could not be fetched.
    #[error("model {name}: {reason}")]
    Fetch {
        /// Name of the model.
        name: String,
        /// Cause, for people.
        reason: String,
    },
    /// A model file is damaged or unsupported.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// An embedding model's folder is damaged or unsupported.
    #[error("embedding model {name}: {source}")]
    Encoder {
        /// Name of the model.
        name: String,
        /// Error of the model's files.
        source: EncoderError,
    },
    /// Two models go by one name.
    #[error("two models are called {name:?}; rename one of the files or drop one from `models`")]
    SameName {
        /// Name that two models have.
        name: String,
    },
    /// The model does not load.
    #[error("model {name}: {source}")]
    Load {
        /// Name of the model.
        name: String,
        /// Error of the load.
        source: Box<LoadError>,
    },
    /// The engine does not start.
    #[error("model {name}: {source}")]
    Start {
        /// Name of the model.
        name: String,
        /// Error of the engine.
        source: StartError,
    },
    /// The first token did not come.
    #[error("model {name} gives no token: {reason}")]
    Broken {
        /// Name of the model.
        name: String,
        /// Cause, for people.
        reason: String,
    },
    /// The cost of the model's layers on this machine cannot be measured.
    #[error("model {name} cannot be offered in parts: {reason}")]
    Measure {
        /// Name of the model.
        name: String,
        /// Cause, for people.
        reason: String,
    },
    /// The join token cannot be read.
    #[error("cannot read the join token from {}: {source}; `hydramesh token create` prints one", path.display())]
    TokenFile {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system.
        source: std::io::Error,
    },
    /// The join token is malformed.
    #[error("{origin}: {reason}")]
    Token {
        /// File or key.
        origin: String,
        /// Fault of the token.
        reason: String,
    },
    /// The worker has never joined and has no token.
    #[error(
        "this worker has not joined a mesh yet, and there is no join token: run `hydramesh token create` at the head and set `join_token_file`"
    )]
    NoToken,
    /// The files of the worker's identity are not whole.
    #[error(transparent)]
    Identity(TrustError),
    /// The head does not let this worker in.
    #[error("cannot join the mesh at {head}: {source}")]
    Join {
        /// The head's address.
        head: String,
        /// Error of the attempt to join.
        source: Box<JoinError>,
    },
    /// An engine's thread is gone.
    #[error("the engine of model {name} stopped: {reason}")]
    EngineDead {
        /// Name of the model.
        name: String,
        /// Cause, for people.
        reason: String,
    },
    /// A task of the program itself failed.
    #[error("internal error: {0}")]
    Internal(String),
}

impl WorkerError {
    /// True if the head says that this worker was expelled.
    pub(crate) fn is_expulsion(&self) -> bool {
        matches!(self, Self::Join { source, .. } if source.is_expulsion())
    }
}
