//! Weights of a model of images: a folder in diffusers' form, or one file.
//!
//! Whatever the file calls them, tensors are served under the names of diffusers and transformers. When a model is opened, the
//! headers of all its files are read and every tensor that the configuration asks for is found and its shape and type
//! compared. Elements are read when they are asked for. So memory is taken for what is in the files, not for what a header or
//! a configuration claims.

mod error;
mod folder;
mod names;
mod single;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_model::data::Data;
use mesh_model::file::has_extension;
use mesh_model::safetensors::{Dtype, Safetensors, TensorView};

pub use error::ModelError;

use crate::config::{PipelineConfig, TensorShape, TinyVaeConfig};
pub(crate) use names::Origin;
#[cfg(any(test, feature = "synth"))]
pub(crate) use single::origins as single_origins;

/// A network of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Module {
    /// The first text encoder.
    TextEncoder,
    /// XL's second text encoder.
    TextEncoder2,
    /// The network that predicts the noise.
    Unet,
    /// The autoencoder.
    Vae,
}

impl Module {
    /// Name of the module's folder in diffusers' form.
    pub fn name(self) -> &'static str {
        match self {
            Module::TextEncoder => "text_encoder",
            Module::TextEncoder2 => "text_encoder_2",
            Module::Unet => "unet",
            Module::Vae => "vae",
        }
    }
}

/// An open model. Its files are read when weights are asked for.
#[derive(Debug)]
pub struct Checkpoint {
    config: PipelineConfig,
    modules: Vec<(Module, Arc<Weights>)>,
}

/// The weights of a module: its tensors, all there and of the right shape.
#[derive(Debug)]
pub struct Weights {
    files: Vec<WeightFile>,
    tensors: Vec<Found>,
}

#[derive(Debug)]
pub(crate) struct WeightFile {
    path: PathBuf,
    file: Arc<Safetensors>,
}

#[derive(Debug)]
struct Found {
    shape: TensorShape,
    file: usize,
    /// Name in the file.
    name: String,
    origin: Origin,
}

/// A tensor of a module and its elements.
#[derive(Debug, Clone)]
pub struct Weight<'a> {
    /// Name within the module, as diffusers or transformers names it.
    pub name: &'a str,
    /// Dimensions, the contiguous one last, as the network wants them.
    pub shape: &'a [u64],
    /// Type of the elements: F32, F16, BF16 or F64.
    pub dtype: Dtype,
    /// True if a matrix lies in the file column by column.
    pub transposed: bool,
    /// The elements, not read yet.
    pub data: Data<'a>,
}

impl Checkpoint {
    /// Opens the model at `path`: a folder with a `model_index.json`, or a `.safetensors` file with the keys of the original
    /// programs. All tensors are looked up.
    ///
    /// # Errors
    /// If a file is missing or malformed, or does not fit the configuration.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        if path.is_dir() {
            return folder::open(path);
        }
        match has_extension(path, "safetensors") {
            true => single::open(path),
            false => Err(ModelError::Unknown {
                path: path.into(),
                reason: "it is neither a folder with a model_index.json nor a .safetensors file; pickled checkpoints \
                         (.ckpt, .pt) can run code and are not read: convert the model"
                    .into(),
            }),
        }
    }

    /// Reads a single file that is in memory, as [`Checkpoint::open`] reads one on disk.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, ModelError> {
        let path = PathBuf::from("memory");
        match Safetensors::from_bytes(bytes) {
            Ok(file) => single::read(WeightFile {
                path,
                file: file.into(),
            }),
            Err(source) => Err(ModelError::Safetensors { path, source }),
        }
    }

    /// Configuration of the model.
    pub fn config(&self) -> &PipelineConfig {
        &self.config
    }

    /// The weights of a module, which may be kept to be read again; `None` if the model has no such module.
    pub fn weights(&self, module: Module) -> Option<&Arc<Weights>> {
        let mut modules = self.modules.iter();
        modules
            .find(|(other, _)| *other == module)
            .map(|(_, weights)| weights)
    }

    /// Bytes of all weights in the files.
    pub fn bytes(&self) -> u64 {
        self.modules
            .iter()
            .map(|(_, weights)| weights.bytes())
            .sum()
    }

    /// Checks that every file is still the one that was opened.
    ///
    /// # Errors
    /// If one changed or cannot be looked at.
    pub fn check_unchanged(&self) -> Result<(), ModelError> {
        self.modules
            .iter()
            .try_for_each(|(_, weights)| weights.check_unchanged())
    }
}

/// Opens the tiny autoencoder in the folder at `path`, which has a `config.json` and the weights in one file or several.
///
/// # Errors
/// As [`Checkpoint::open`].
pub fn open_tiny_vae(path: &Path) -> Result<(TinyVaeConfig, Weights), ModelError> {
    let config = PipelineConfig::read_tiny_vae(path)?;
    let files = folder::files(path, folder::DIFFUSERS)?;
    let weights = Weights::find(files, config.tensors(), Origin::plain)?;
    Ok((config, weights))
}

impl Weights {
    /// Finds every tensor of `wanted` in `files`. `origins` gives the places where it may lie, the usual one first.
    fn find(
        files: Vec<WeightFile>,
        wanted: Vec<TensorShape>,
        origins: impl Fn(&str) -> Vec<Origin>,
    ) -> Result<Self, ModelError> {
        let mut tensors = Vec::with_capacity(wanted.len());
        for shape in wanted {
            let places = origins(&shape.name);
            let place = places.iter().find_map(|origin| {
                let file = files
                    .iter()
                    .position(|file| file.file.tensor(&origin.name).is_some())?;
                Some((file, origin.clone()))
            });
            let Some((file, origin)) = place else {
                return Err(ModelError::NoTensor {
                    path: files[0].path.clone(),
                    tensor: places
                        .into_iter()
                        .next()
                        .map_or(shape.name, |origin| origin.name),
                    shape: shape.shape,
                });
            };
            let name = origin.name.clone();
            let found = Found {
                shape,
                file,
                name,
                origin,
            };
            found.check(&files[file])?;
            tensors.push(found);
        }
        Ok(Weights { files, tensors })
    }

    /// All tensors, in the order in which the network uses them.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Weight<'_>> {
        self.tensors.iter().map(|found| self.weight(found))
    }

    /// The tensor at a position of [`Weights::iter`].
    pub fn get(&self, position: usize) -> Option<Weight<'_>> {
        self.tensors.get(position).map(|found| self.weight(found))
    }

    /// Bytes of all tensors in the files.
    pub fn bytes(&self) -> u64 {
        self.iter().map(|weight| weight.data.len() as u64).sum()
    }

    /// Number of elements of all tensors.
    pub fn elements(&self) -> u64 {
        self.iter()
            .map(|weight| weight.shape.iter().product::<u64>())
            .sum()
    }

    fn weight<'a>(&'a self, found: &'a Found) -> Weight<'a> {
        let view = self.files[found.file]
            .file
            .tensor(&found.name)
            .expect("it was found when the file was opened");
        let data = match found.origin.part {
            None => view.data,
            Some((part, parts)) => {
                let len = view.data.len() / parts;
                view.data
                    .part(part * len, len)
                    .expect("the parts are within the whole")
            }
        };
        Weight {
            name: &found.shape.name,
            shape: &found.shape.shape,
            dtype: view.dtype,
            transposed: found.origin.transposed,
            data,
        }
    }

    /// As [`Checkpoint::check_unchanged`].
    ///
    /// # Errors
    /// The same.
    pub fn check_unchanged(&self) -> Result<(), ModelError> {
        self.files.iter().try_for_each(|file| {
            file.file
                .check_unchanged()
                .map_err(|source| ModelError::Safetensors {
                    path: file.path.clone(),
                    source,
                })
        })
    }

    /// Path of the file that holds the tensor called `name`.
    pub fn path_of(&self, name: &str) -> Option<&Path> {
        let found = self.tensors.iter().find(|found| found.shape.name == name)?;
        Some(&self.files[found.file].path)
    }
}

impl Found {
    /// Checks that the file's tensor has the elements of the one that is wanted.
    fn check(&self, file: &WeightFile) -> Result<(), ModelError> {
        let Found {
            shape,
            name,
            origin,
            ..
        } = self;
        let TensorView {
            dtype,
            shape: found,
            ..
        } = file.file.tensor(name).expect("it was found");
        let expected = origin.shape_in_file(&shape.shape);
        if !expected.iter().any(|expected| expected == found) {
            return Err(ModelError::Shape {
                path: file.path.clone(),
                tensor: name.clone(),
                expected: expected.into_iter().next().unwrap_or_default(),
                found: found.into(),
            });
        }
        match dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64 => Ok(()),
            found => Err(ModelError::Type {
                path: file.path.clone(),
                tensor: name.clone(),
                found,
            }),
        }
    }
}

impl WeightFile {
    fn open(path: PathBuf) -> Result<Self, ModelError> {
        match Safetensors::open(&path) {
            Ok(file) => Ok(WeightFile {
                path,
                file: file.into(),
            }),
            Err(source) => Err(ModelError::Safetensors { path, source }),
        }
    }
}

#[cfg(test)]
mod tests;
