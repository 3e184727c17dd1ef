//! A model that this worker serves, of any kind.

use std::any::Any;
use std::path::Path;

use futures::future::{BoxFuture, FutureExt};
use mesh_engine::{Engine, Load, RequestError};
use mesh_engine_ort::Split;
use mesh_proto::{DeviceSplit, ModelCard};
use mesh_store::Pin;
use mesh_worker_core::Location;

use crate::codec::{Codec, ModelEngine};

pub(crate) struct ServedModel {
    pub(crate) card: ModelCard,
    /// Device that computes it: `cpu`, `cuda`, `migraphx` or `webgpu`.
    pub(crate) backend: &'static str,
    /// Its parts, if any of it is on a GPU.
    pub(crate) split: Option<Split>,
    pub(crate) engine: Box<dyn AnyEngine>,
    pub(crate) location: Location,
    /// Its [`Engine`], whose thread ends when this is dropped.
    _thread: Box<dyn Any + Send + Sync>,
    /// Keeps its files in the store.
    _pin: Option<Pin>,
}

/// A [`ModelEngine`] of any kind.
pub(crate) trait AnyEngine: Any + Send + Sync {
    fn load(&self) -> Load;

    fn max_rows(&self) -> usize;

    /// The error that ended the engine; `None` while it runs.
    fn death(&self) -> Option<RequestError>;

    /// Refuses new requests; resolves when the running ones have ended.
    fn drain(&self) -> BoxFuture<'_, ()>;
}

impl<W: Codec> AnyEngine for ModelEngine<W> {
    fn load(&self) -> Load {
        W::load(&self.engine)
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
            card: ModelCard {
                backend: backend.to_owned(),
                ..card
            },
            backend,
            split: None,
            engine: Box::new(ModelEngine {
                model,
                engine: handle,
            }),
            location: Location::At(path.into()),
            _thread: Box::new(engine),
            _pin: None,
        }
    }

    /// The parts that it was loaded in.
    pub(crate) fn placed(mut self, split: Option<Split>) -> Self {
        self.card.split = split.as_ref().map(|split| DeviceSplit {
            device_layers: split.device_layers.len() as u32,
            expert_layers: split.expert_layers,
            cpu_layers: split.cpu_layers.len() as u32,
            device_bytes: split.memory.used(),
            cpu_bytes: split.cpu_weight_bytes,
        });
        self.split = split;
        self
    }

    /// It was loaded from the store, where `pin` keeps its files for as long as it is loaded.
    pub(crate) fn stored(self, name: &str, pin: Option<Pin>) -> Self {
        ServedModel {
            location: Location::Store(name.to_owned()),
            _pin: pin,
            ..self
        }
    }

    /// The model and its engine, if it is of this kind.
    pub(crate) fn as_kind<W: Codec>(&self) -> Option<&ModelEngine<W>> {
        let engine: &dyn Any = &*self.engine;
        engine.downcast_ref()
    }
}
