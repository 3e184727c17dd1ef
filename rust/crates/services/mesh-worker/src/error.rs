//! Reasons for which a worker does not start, or ends.

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

use mesh_engine::StartError;
use mesh_engine_ort::LoadError;
use mesh_model::{EncoderError, ModelError};
use mesh_net::quic::JoinError;
use mesh_net::trust::TrustError;
use mesh_store::LocalError;
use tokio::task;

use crate::config::Unsound;

/// Reasons for which a worker does not start, or ends.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum WorkerError {
    /// Keys that make no sense together.
    #[error("configuration: {0}")]
    Config(#[from] Unsound),
    /// An address is taken or not ours.
    #[error(
        "cannot listen on {address}/{carrier}: {source}; set `{key}` to another address or port"
    )]
    Listen {
        address: SocketAddr,
        /// `tcp` or `udp`.
        carrier: &'static str,
        key: &'static str,
        source: std::io::Error,
    },
    /// The state directory cannot be used.
    #[error("cannot use the state directory {}: {source}; set `state_dir` to one that this user can write", path.display())]
    StateDir {
        path: PathBuf,
        source: std::io::Error,
    },
    /// A model is not there.
    #[error(transparent)]
    NotFound(#[from] LocalError),
    /// No file, folder, worker or hub model has this name.
    #[error("no model {name:?}: it is no file, in no model folder, {hint}")]
    Unknown {
        name: String,
        /// Valid forms of a name, and known names that look like it.
        hint: String,
    },
    /// The store of models, or the keys that it trusts.
    #[error("the store of models: {reason}; `store.dir` says where it lies")]
    ModelStore { reason: String },
    /// ONNX Runtime cannot be used at all.
    #[error(transparent)]
    Runtime(LoadError),
    /// A model could not be fetched.
    #[error("model {name}: {reason}")]
    Fetch { name: String, reason: String },
    /// A model file is damaged or unsupported.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// An embedding model's folder is damaged or unsupported.
    #[error("embedding model {name}: {source}")]
    Encoder { name: String, source: EncoderError },
    /// An image model in a build that has no libtorch.
    #[error(
        "{} is a model for images, which this build does not serve: install the package variant hydramesh-images (in Nix: hydramesh-images; with cargo: --features images), or drop the model from `models`",
        path.display()
    )]
    NoImages { path: PathBuf },
    /// An image model's files are damaged or unsupported, or do not fit the memory.
    #[error("image model {name}: {reason}")]
    Imaging { name: String, reason: String },
    /// Two models go by one name.
    #[error("two models are called {name:?}; rename one of the files or drop one from `models`")]
    SameName { name: String },
    /// The model does not load.
    #[error("model {name}: {source}")]
    Load {
        name: String,
        source: Box<LoadError>,
    },
    /// The engine does not start.
    #[error("model {name}: {source}")]
    Start { name: String, source: StartError },
    /// The first token did not come.
    #[error("model {name} gives no token: {reason}")]
    Broken { name: String, reason: String },
    /// The cost of the model's layers on this machine cannot be measured.
    #[error("model {name} cannot be offered in parts: {reason}")]
    Measure { name: String, reason: String },
    /// The join token cannot be read.
    #[error("cannot read the join token from {}: {source}; `hydramesh token create` prints one", path.display())]
    TokenFile {
        path: PathBuf,
        source: std::io::Error,
    },
    /// The join token is malformed.
    #[error("{origin}: {reason}")]
    Token {
        /// File or key.
        origin: String,
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
        head: String,
        source: Box<JoinError>,
    },
    /// An engine's thread is gone.
    #[error("the engine of model {name} stopped: {reason}")]
    EngineDead { name: String, reason: String },
    /// A task of the program itself failed.
    #[error("internal error: {0}")]
    Internal(String),
}

impl From<task::JoinError> for WorkerError {
    fn from(error: task::JoinError) -> Self {
        WorkerError::Internal(error.to_string())
    }
}

impl WorkerError {
    /// An address that the key `key` sets cannot be used.
    pub(crate) fn listen(
        address: SocketAddr,
        carrier: &'static str,
        key: &'static str,
    ) -> impl Fn(std::io::Error) -> Self + Copy {
        move |source| WorkerError::Listen {
            address,
            carrier,
            key,
            source,
        }
    }

    /// The digest of a model cannot be computed.
    pub(crate) fn fingerprint(path: &Path, error: &std::io::Error) -> Self {
        WorkerError::Internal(format!("fingerprint of {}: {error}", path.display()))
    }

    /// True if the head says that this worker was expelled.
    pub(crate) fn is_expulsion(&self) -> bool {
        matches!(self, Self::Join { source, .. } if source.is_expulsion())
    }
}

/// Does something with a model at `path`, such as `loading` it. A panic is an error of this model.
pub(crate) fn unpanicked<T>(
    doing: &str,
    path: &Path,
    work: impl FnOnce() -> Result<T, WorkerError>,
) -> Result<T, WorkerError> {
    std::panic::catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        let path = path.display();
        let reason = format!("{doing} {path} panicked; the lines before say where");
        Err(WorkerError::Internal(reason))
    })
}
