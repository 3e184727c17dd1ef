//! A model that this worker serves, of any kind.

use std::any::Any;
use std::path::{Path, PathBuf};

use futures::future::{BoxFuture, FutureExt};
use mesh_engine::{Engine, Load, RequestError};
use mesh_proto::ModelCard;
use mesh_store::Pin;

use crate::codec::{Codec, ModelEngine};

/// One model with its engine.
pub(crate) struct ServedModel {
    /// The model's description for the head.
    pub(crate) card: ModelCard,
    /// Device that computes it: `cpu`, `cuda` or `migraphx`.
    pub(crate) backend: &'static str,
    /// A [`ModelEngine`] of its kind.
    pub(crate) engine: Box<dyn AnyEngine>,
    pub(crate) source: Source,
    /// Its [`Engine`], whose thread ends when this is dropped.
    _thread: Box<dyn Any + Send + Sync>,
    /// Keeps its files in the store.
    _pin: Option<Pin>,
}

/// A model that is not served because something is wrong with it.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    /// The model's name in the configuration, or the one that it was served under.
    pub(crate) name: String,
    pub(crate) source: Source,
    pub(crate) reason: String,
}

/// The source that a model is loaded from.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// The file or folder that a name in the configuration means. A loaded model has [`Source::At`] its path.
    Named,
    /// The same, offered in parts.
    RingModel,
    /// This file or folder.
    At(PathBuf),
    /// The store, under a name; files come from elsewhere if need be.
    Store(String),
}

/// A [`ModelEngine`] of any kind.
pub(crate) trait AnyEngine: Any + Send + Sync {
    /// Work in progress and measured speed.
    fn load(&self) -> Load;

    /// Most rows of a step.
    fn max_rows(&self) -> usize;

    /// The error that ended the engine; `None` while it runs.
    fn death(&self) -> Option<RequestError>;

    /// Refuses new requests; resolves when the running ones have ended.
    fn drain(&self) -> BoxFuture<'_, ()>;
}

impl<W: Codec> AnyEngine for ModelEngine<W> {
    fn load(&self) -> Load {
        self.engine.load()
    }

    fn max_rows(&self) -> usize {
        W::max_rows(self.engine.info())
    }

    fn death(&self) -> Option<RequestError> {
        self.engine.death()
    }

    fn drain(&self) -> BoxFuture<'_, ()> {
        self.engine.drain().boxed()
    }
}

impl ServedModel {
    /// The model at `path`, computed by `engine`.
    pub(crate) fn new<W: Codec>(
        path: &Path,
        model: W::Model,
        engine: Engine<W>,
        card: ModelCard,
        backend: &'static str,
    ) -> Self {
        let handle = engine.handle();
        ServedModel {
            card,
            backend,
            engine: Box::new(ModelEngine {
                model,
                engine: handle,
            }),
            source: Source::At(path.into()),
            _thread: Box::new(engine),
            _pin: None,
        }
    }

    /// Sets the source that it was loaded from.
    pub(crate) fn from(self, source: Source) -> Self {
        ServedModel { source, ..self }
    }

    /// Keeps its files in the store for as long as it is loaded.
    pub(crate) fn pinned(self, pin: Option<Pin>) -> Self {
        ServedModel { _pin: pin, ..self }
    }

    /// The model and its engine, if it is of this kind.
    pub(crate) fn as_kind<W: Codec>(&self) -> Option<&ModelEngine<W>> {
        let engine: &dyn Any = &*self.engine;
        engine.downcast_ref()
    }
}
