//! The parts of a model: which are in memory, and how they come there.

use std::sync::Arc;

use mesh_diffusion::checkpoint::{Checkpoint, Module, Weights, open_tiny_vae};
use mesh_diffusion::config::TinyVaeConfig;
use mesh_engine::StageError;
use tch::{Device, Kind, Tensor};

use crate::clip::{self, TextEncoder};
use crate::error::{Failure, LoadError, Outcome};
use crate::load::{self, Keep, Params, Stack};
use crate::memory;
use crate::options::{Offload, Options, WeightForm};
use crate::tiny::TinyVae;
use crate::unet::{self, Unet};
use crate::vae::{self, Vae};
use crate::weight::{Place, Workspace};

/// Parts that compute one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Text,
    Unet,
    Vae,
}

#[derive(Debug)]
pub(crate) enum Autoencoder {
    Full(Box<Vae>),
    Tiny(TinyVae),
}

impl Autoencoder {
    pub(crate) fn decode(&self, latents: &Tensor) -> Outcome<Tensor> {
        match self {
            Autoencoder::Full(vae) => vae.decode(latents),
            Autoencoder::Tiny(vae) => vae.decode(latents),
        }
    }
}

/// The parts of a model that are in memory, and the files of the others.
#[derive(Debug)]
pub(crate) struct Parts {
    source: Source,
    offload: Offload,
    text: Option<Vec<TextEncoder>>,
    unet: Option<Unet>,
    vae: Option<Autoencoder>,
}

#[derive(Debug)]
struct Source {
    /// `None` when all is in memory and nothing will be read again.
    checkpoint: Option<Arc<Checkpoint>>,
    tiny: Option<(TinyVaeConfig, Arc<Weights>)>,
    weights: WeightForm,
    offload: Offload,
    place: Place,
    vae_place: Place,
}

impl Parts {
    /// Loads all parts, or each once if only one is to be in memory. Returns the bytes of the weights that are in memory at once.
    pub(crate) fn load(
        checkpoint: &Arc<Checkpoint>,
        options: &Options,
        place: Place,
        vae_kind: Kind,
    ) -> Result<(Self, u64), LoadError> {
        let bytes = weight_bytes(checkpoint, options, place.kind, vae_kind);
        let source = Source {
            checkpoint: Some(checkpoint.clone()),
            tiny: tiny(checkpoint, options)?,
            weights: options.weights,
            offload: options.offload,
            vae_place: Place {
                kind: vae_kind,
                workspace: Workspace::default(),
                ..place.clone()
            },
            place,
        };
        let mut parts = Parts {
            source,
            offload: options.offload,
            text: None,
            unet: None,
            vae: None,
        };
        for part in [Part::Text, Part::Vae, Part::Unet] {
            parts.bring(part)?;
        }
        if options.offload == Offload::None {
            parts.source.checkpoint = None;
        }
        if parts.on_cpu() {
            memory::keep_freed();
        }
        Ok((parts, bytes))
    }

    /// Brings a part into memory if it is not there, in place of the others where only one may be.
    pub(crate) fn bring(&mut self, part: Part) -> Result<(), LoadError> {
        let there = match part {
            Part::Text => self.text.is_some(),
            Part::Unet => self.unet.is_some(),
            Part::Vae => self.vae.is_some(),
        };
        if there {
            return Ok(());
        }
        if self.offload == Offload::Modules {
            (self.text, self.unet, self.vae) = (None, None, None);
            memory::give_back();
        }
        match part {
            Part::Text => self.text = Some(self.source.text()?),
            Part::Unet => self.unet = Some(self.source.unet()?),
            Part::Vae => self.vae = Some(self.source.vae()?),
        }
        Ok(())
    }

    pub(crate) fn on_cpu(&self) -> bool {
        self.source.place.device == Device::Cpu
    }

    pub(crate) fn text(&self) -> Outcome<&[TextEncoder]> {
        self.text.as_deref().ok_or_else(absent)
    }

    pub(crate) fn unet(&self) -> Outcome<&Unet> {
        self.unet.as_ref().ok_or_else(absent)
    }

    pub(crate) fn vae(&self) -> Outcome<&Autoencoder> {
        self.vae.as_ref().ok_or_else(absent)
    }

    /// Checks that files that are read again are the ones that were opened.
    pub(crate) fn check_unchanged(&self) -> Result<(), StageError> {
        match &self.source.checkpoint {
            Some(checkpoint) => Ok(checkpoint.check_unchanged().map_err(LoadError::from)?),
            None => Ok(()),
        }
    }
}

fn absent() -> Failure {
    Failure::new("this part of the model is not in memory")
}

impl Source {
    fn weights(&self, module: Module) -> Result<&Arc<Weights>, LoadError> {
        let checkpoint = self.checkpoint.as_ref();
        let weights = checkpoint.and_then(|checkpoint| checkpoint.weights(module));
        weights.ok_or_else(|| LoadError::Torch {
            module: module.name(),
            message: "the model has no such module".into(),
        })
    }

    fn text(&self) -> Result<Vec<TextEncoder>, LoadError> {
        let configs = self
            .checkpoint
            .iter()
            .flat_map(|checkpoint| &checkpoint.config().text);
        let modules = [Module::TextEncoder, Module::TextEncoder2];
        let encoders = modules.into_iter().zip(configs).map(|(module, config)| {
            let params = self.read(self.weights(module)?, module)?;
            build(module, params, |params| TextEncoder::new(config, params))
        });
        encoders.collect()
    }

    fn unet(&self) -> Result<Unet, LoadError> {
        let weights = self.weights(Module::Unet)?;
        let params = self.read(weights, Module::Unet)?;
        let config = self
            .checkpoint
            .as_ref()
            .map(|checkpoint| checkpoint.config());
        let Place { device, kind, .. } = self.place;
        build(Module::Unet, params, |params| {
            let config = config.ok_or_else(absent)?;
            Unet::new(&config.unet, params, device, kind)
        })
    }

    fn vae(&self) -> Result<Autoencoder, LoadError> {
        if let Some((config, weights)) = &self.tiny {
            let params = self.read(weights, Module::Vae)?;
            let vae = build(Module::Vae, params, |params| TinyVae::new(config, params))?;
            return Ok(Autoencoder::Tiny(vae));
        }
        let params = self.read(self.weights(Module::Vae)?, Module::Vae)?;
        let config = self
            .checkpoint
            .as_ref()
            .map(|checkpoint| checkpoint.config());
        let vae = build(Module::Vae, params, |params| {
            Vae::new(&config.ok_or_else(absent)?.vae, params)
        })?;
        Ok(Autoencoder::Full(Box::new(vae)))
    }

    fn read(&self, weights: &Arc<Weights>, module: Module) -> Result<Params, LoadError> {
        let stacks: &[Stack] = match module {
            Module::TextEncoder | Module::TextEncoder2 => &clip::STACKS,
            Module::Unet => &unet::STACKS,
            Module::Vae => &vae::STACKS,
        };
        let place = match module {
            Module::Vae => &self.vae_place,
            _ => &self.place,
        };
        let keep = keep(module, self.weights, self.offload);
        load::load(weights, stacks, module.name(), keep, place)
    }
}

/// How the weights of a module are kept.
fn keep(module: Module, weights: WeightForm, offload: Offload) -> Keep {
    match (module, weights) {
        _ if offload == Offload::Sequential => Keep::InFile,
        (_, WeightForm::Full) => Keep::Ready,
        (Module::Unet, WeightForm::Auto) => Keep::Ready,
        // It is the smallest part, and the one whose errors are seen most.
        (Module::Vae, WeightForm::Int8) => Keep::Stored,
        (_, WeightForm::Int8) => Keep::Int8,
        // They compute once a picture.
        (_, WeightForm::Auto | WeightForm::File) => Keep::Stored,
    }
}

/// Bytes of the weights that are in memory at once, the one that is made ready for its use included.
pub(crate) fn weight_bytes(
    checkpoint: &Checkpoint,
    options: &Options,
    kind: Kind,
    vae_kind: Kind,
) -> u64 {
    let part = |modules: &[Module]| {
        let mut total = 0;
        let mut workspace = 0;
        for &module in modules {
            let Some(weights) = checkpoint.weights(module) else {
                continue;
            };
            let kind = match module {
                Module::Vae => vae_kind,
                _ => kind,
            };
            let keep = keep(module, options.weights, options.offload);
            let (bytes, largest) = load::bytes(weights, keep, kind);
            total += bytes;
            workspace = workspace.max(largest * kind.elt_size_in_bytes() as u64);
        }
        total + workspace
    };
    let text = [Module::TextEncoder, Module::TextEncoder2];
    match options.offload {
        Offload::Modules => part(&text)
            .max(part(&[Module::Unet]))
            .max(part(&[Module::Vae])),
        _ => part(&[text[0], text[1], Module::Unet, Module::Vae]),
    }
}

fn tiny(
    checkpoint: &Checkpoint,
    options: &Options,
) -> Result<Option<(TinyVaeConfig, Arc<Weights>)>, LoadError> {
    let Some(path) = &options.tiny_vae else {
        return Ok(None);
    };
    let (tiny, weights) = open_tiny_vae(path)?;
    let vae = &checkpoint.config().vae;
    match (tiny.latent, tiny.factor()) == (vae.latent, vae.factor()) {
        true => Ok(Some((tiny, weights.into()))),
        false => Err(LoadError::TinyVae {
            path: path.clone(),
            tiny: tiny.latent,
            model: vae.latent,
        }),
    }
}

fn build<T>(
    module: Module,
    mut params: Params,
    new: impl FnOnce(&mut Params) -> Outcome<T>,
) -> Result<T, LoadError> {
    new(&mut params).map_err(|failure| LoadError::Torch {
        module: module.name(),
        message: failure.message(),
    })
}
