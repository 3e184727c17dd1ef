//! Folders in diffusers' form: `model_index.json` and a folder for each module.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use mesh_model::file::has_extension;
use serde_json::Value;

use super::names::{Origin, vae_origins};
use super::{Checkpoint, ModelError, Module, WeightFile, Weights};
use crate::config::PipelineConfig;
use crate::config::object::Object;

/// Name of the weights that diffusers writes, without extensions.
pub(super) const DIFFUSERS: &str = "diffusion_pytorch_model";
/// Name of the weights that transformers writes, without extensions.
const TRANSFORMERS: &str = "model";
const MAX_SHARDS: usize = 256;

pub(super) fn open(root: &Path) -> Result<Checkpoint, ModelError> {
    let config = PipelineConfig::read(root)?;
    let load = |module: Module, stem, tensors, origins: fn(&str) -> Vec<Origin>| {
        let files = files(&root.join(module.name()), stem)?;
        Ok((module, Weights::find(files, tensors, origins)?.into()))
    };
    let mut modules = Vec::new();
    for (module, text) in [Module::TextEncoder, Module::TextEncoder2]
        .into_iter()
        .zip(&config.text)
    {
        modules.push(load(module, TRANSFORMERS, text.tensors(), Origin::plain)?);
    }
    modules.push(load(
        Module::Unet,
        DIFFUSERS,
        config.unet.tensors(),
        Origin::plain,
    )?);
    modules.push(load(
        Module::Vae,
        DIFFUSERS,
        config.vae.tensors(),
        vae_origins,
    )?);
    Ok(Checkpoint { config, modules })
}

/// The files of weights of the module in `folder`: one file or an index of several, in full precision if there are both.
pub(super) fn files(folder: &Path, stem: &str) -> Result<Vec<WeightFile>, ModelError> {
    for variant in ["", ".fp16"] {
        let single = folder.join(format!("{stem}{variant}.safetensors"));
        if single.is_file() {
            return Ok(vec![WeightFile::open(single)?]);
        }
        for name in [
            format!("{stem}.safetensors.index{variant}.json"),
            format!("{stem}{variant}.safetensors.index.json"),
        ] {
            if let Some(index) = Object::open(&folder.join(name))? {
                return shards(&index, folder)?
                    .into_iter()
                    .map(WeightFile::open)
                    .collect();
            }
        }
    }
    Err(ModelError::Missing {
        path: folder.join(format!("{stem}.safetensors")),
        remedy: "weights are read from .safetensors files only, since pickled ones can run code; convert the model or fetch the \
                 whole folder",
    })
}

/// Paths of the files that an index names.
fn shards(index: &Object, folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let map = index.get("weight_map").and_then(Value::as_object);
    let names: Option<BTreeSet<&str>> =
        map.and_then(|map| map.values().map(Value::as_str).collect());
    let names = names.filter(|names| (1..=MAX_SHARDS).contains(&names.len()));
    let Some(names) = names else {
        let reason = format!("but must name the file of each tensor, from 1 to {MAX_SHARDS} files");
        return Err(index.refuse("weight_map", reason));
    };
    // Other systems' separators, too: a folder may travel.
    let plain = |name: &str| {
        let mut components = Path::new(name).components();
        let single = matches!(
            (components.next(), components.next()),
            (Some(Component::Normal(_)), None)
        );
        single
            && !name.contains(['/', '\\', '\0', ':'])
            && has_extension(Path::new(name), "safetensors")
    };
    match names.iter().find(|name| !plain(name)) {
        None => Ok(names.into_iter().map(|name| folder.join(name)).collect()),
        Some(name) => Err(index.refuse(
            "weight_map",
            format!("but {name:?} is not the name of a .safetensors file in the same folder"),
        )),
    }
}
