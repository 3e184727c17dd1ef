//! The weights of a stage, packed for the kernels.
//!
//! Packs layer by layer, each matrix on all threads: besides the packed weights, memory holds one matrix in
//! its new form, or the matrices of one layer if they are cached on disk.

mod experts;
mod latent;
mod shared_expert;

use std::cell::RefCell;
use std::ops::Range;

use mesh_kernels::{KernelError, PackOptions, Pool, QMatrix, WeightType};
use mesh_model::data::Data;
use mesh_model::file::FileError;
use mesh_model::{Gguf, Model, ModelConfig, Tensor, Tensors};

use crate::cache::{CacheEntry, QuantisedMatrix, WeightCache};
use crate::feed_forward::{FeedForwardHalf, FeedForwardWeights, HeadWeights};
use crate::latent::LatentWeights;
use crate::options::{LoadError, WeightFormat, has_floats};
use crate::requantise::requantise;
pub(crate) use latent::transposed_type;
pub(crate) use shared_expert::SharedExpertWeights;

/// The weights of a range of layers, and of embedding and head where the range has them.
pub(crate) struct StageWeights {
    pub(crate) layers: Vec<LayerWeights>,
    /// Present where tokens come in. With tied embeddings on a stage that also has the head, the head's
    /// matrix serves.
    embedding: Option<QMatrix>,
    pub(crate) head: Option<HeadWeights>,
}

/// Weights of one transformer layer.
pub(crate) struct LayerWeights {
    pub(crate) attention_norm: Vec<f32>,
    /// Query, key and value under each other; with latent attention the first projection: query or the row that
    /// it is made of, the row that keys and values are made of, and the rotated part of keys.
    pub(crate) qkv: QMatrix,
    pub(crate) latent: Option<LatentWeights>,
    pub(crate) qkv_bias: Option<Vec<f32>>,
    pub(crate) query_norm: Option<Vec<f32>>,
    pub(crate) key_norm: Option<Vec<f32>>,
    /// Of each query head a score of no position.
    pub(crate) sinks: Option<Vec<f32>>,
    pub(crate) attention_output: QMatrix,
    pub(crate) attention_output_bias: Option<Vec<f32>>,
    /// Norm of the attention output, before the residual is added.
    pub(crate) attention_post_norm: Option<Vec<f32>>,
    pub(crate) feed_forward: FeedForwardHalf,
}

/// Weights of the CPU's part of layers whose attention is on a device.
pub(crate) struct HostWeights {
    /// Of each layer its feed-forward half, if that is a mixture of experts.
    pub(crate) halves: Vec<Option<FeedForwardHalf>>,
    /// Present where the layers end the model.
    pub(crate) head: Option<HeadWeights>,
}

impl StageWeights {
    /// Reads and packs the weights of `layers`.
    pub(crate) fn load(
        model: &Model,
        layers: Range<u32>,
        pool: &Pool,
        options: PackOptions,
        format: WeightFormat,
        cache: Option<&WeightCache>,
    ) -> Result<StageWeights, LoadError> {
        let loader = Loader::new(model, pool, options, format, cache)?;
        let first = layers.start == 0;
        let last = layers.end == loader.config.layers;
        let packed = layers
            .map(|layer| loader.group(&format!("blk.{layer}"), || loader.layer(layer)))
            .collect::<Result<_, _>>()?;
        let tied = loader.config.tied_embeddings;
        let head = last
            .then(|| loader.group(loader.output(), || loader.head()))
            .transpose()?;
        let embedding = (first && !(last && tied))
            .then(|| loader.group(EMBEDDING, || loader.matrix("token_embd.weight")))
            .transpose()?;
        loader.check_unchanged()?;
        Ok(StageWeights {
            layers: packed,
            embedding,
            head,
        })
    }

    /// The matrix whose rows are the tokens' embeddings.
    pub(crate) fn embedding(&self) -> Option<&QMatrix> {
        self.embedding
            .as_ref()
            .or(self.head.as_ref().map(|head| &head.output))
    }

    /// Bytes of packed matrices.
    pub(crate) fn bytes(&self) -> u64 {
        let layers = self.layers.iter().map(|layer| {
            let latent = layer.latent.as_ref().map_or(0, LatentWeights::bytes);
            layer.qkv.bytes() + latent + layer.attention_output.bytes() + layer.feed_forward.bytes()
        });
        let ends = self
            .embedding
            .iter()
            .chain(self.head.iter().map(|head| &head.output));
        let all = layers.chain(ends.map(QMatrix::bytes));
        all.map(|bytes| bytes as u64).sum()
    }
}

/// The group of the embedding's matrix, which may be the output's, too.
const EMBEDDING: &str = "token_embd";

impl HostWeights {
    /// Reads and packs the mixtures of `layers`, and the output matrix if they end the model.
    pub(crate) fn load(
        model: &Model,
        layers: Range<u32>,
        pool: &Pool,
        options: PackOptions,
        format: WeightFormat,
        cache: Option<&WeightCache>,
    ) -> Result<HostWeights, LoadError> {
        let loader = Loader::new(model, pool, options, format, cache)?;
        let config = loader.config;
        let last = layers.end == config.layers;
        let half = |layer| {
            // Not the file of the whole layer: it would lack attention.
            let group = format!("blk.{layer}.experts");
            let load = || loader.group(&group, || loader.feed_forward(layer));
            config.mixture_of(layer).map(|_| load()).transpose()
        };
        let halves = layers.map(half).collect::<Result<_, _>>()?;
        let head = last.then(|| loader.group(loader.output(), || loader.head()));
        let head = head.transpose()?;
        loader.check_unchanged()?;
        Ok(HostWeights { halves, head })
    }
}

struct Loader<'a> {
    tensors: &'a Tensors,
    config: &'a ModelConfig,
    pool: &'a Pool,
    options: PackOptions,
    format: WeightFormat,
    /// Place of the quantised matrices in the cache, if there is a cache.
    entry: Option<CacheEntry>,
    group: RefCell<WeightGroup>,
}

/// The matrices that are being loaded together.
#[derive(Default)]
struct WeightGroup {
    /// The cached file, if there is one.
    kept: Option<Gguf>,
    /// Newly quantised matrices, to be written to the cache.
    fresh: Vec<QuantisedMatrix>,
}

impl<'a> Loader<'a> {
    fn new(
        model: &'a Model,
        pool: &'a Pool,
        options: PackOptions,
        format: WeightFormat,
        cache: Option<&WeightCache>,
    ) -> Result<Loader<'a>, LoadError> {
        let entry = match cache {
            Some(cache) if format != WeightFormat::File && has_floats(model) => {
                let fingerprint = model.fingerprint();
                let fingerprint =
                    fingerprint.map_err(|error| LoadError::Model(error.to_string()))?;
                Some(CacheEntry::new(cache, fingerprint, format))
            }
            _ => None,
        };
        Ok(Loader {
            tensors: model.tensors(),
            config: model.config(),
            pool,
            options,
            format,
            entry,
            group: RefCell::default(),
        })
    }
}

impl Loader<'_> {
    /// Loads the tensors of one group, with the quantised matrices from the cache; if the cache lacks them,
    /// adds them.
    fn group<T>(
        &self,
        name: &str,
        load: impl FnOnce() -> Result<T, LoadError>,
    ) -> Result<T, LoadError> {
        let kept = self.entry.as_ref().and_then(|entry| entry.read(name));
        *self.group.borrow_mut() = WeightGroup {
            kept,
            fresh: Vec::new(),
        };
        let loaded = load()?;
        let WeightGroup { kept, fresh } = self.group.take();
        if let Some(entry) = &self.entry
            && kept.is_none()
            && !fresh.is_empty()
        {
            // Weights read while somebody writes to the file must not enter the cache.
            self.check_unchanged()?;
            entry.write(name, &fresh);
        }
        Ok(loaded)
    }

    fn check_unchanged(&self) -> Result<(), LoadError> {
        let checked = self.tensors.check_unchanged();
        checked.map_err(|error| LoadError::Model(error.to_string()))
    }

    fn layer(&self, layer: u32) -> Result<LayerWeights, LoadError> {
        let name = |suffix: &str| format!("blk.{layer}.{suffix}");
        let matrix = |suffix: &str| self.matrix(&name(suffix));
        let vector = |suffix: &str| self.vector(&name(suffix));
        let first: &[&str] = match self.config.latent {
            None => &["attn_q.weight", "attn_k.weight", "attn_v.weight"],
            Some(latent) if latent.query_rank.is_none() => {
                &["attn_q.weight", "attn_kv_a_mqa.weight"]
            }
            Some(_) => &["attn_q_a.weight", "attn_kv_a_mqa.weight"],
        };
        let parts = first.iter().map(|suffix| matrix(suffix));
        let qkv = self.under_each_other(parts, || name(&first.join(", ")))?;
        let qkv_bias = if self.config.qkv_bias {
            let parts = ["attn_q.bias", "attn_k.bias", "attn_v.bias"].map(vector);
            let mut bias = Vec::new();
            for part in parts {
                bias.extend(part?);
            }
            Some(bias)
        } else {
            None
        };
        let norm = |suffix: &str| self.norm(&name(suffix));
        let optional = |there: bool, suffix: &str| there.then(|| norm(suffix)).transpose();
        let (qk_norm, post_norms) = (self.config.qk_norm, self.config.post_norms);
        Ok(LayerWeights {
            attention_norm: norm("attn_norm.weight")?,
            qkv,
            latent: (self.config.latent.is_some())
                .then(|| self.latent(layer))
                .transpose()?,
            qkv_bias,
            query_norm: optional(qk_norm, "attn_q_norm.weight")?,
            key_norm: optional(qk_norm, "attn_k_norm.weight")?,
            sinks: match self.config.attention_sinks {
                true => Some(self.sinks(&name("attn_sinks.weight"))?),
                false => None,
            },
            attention_output: matrix("attn_output.weight")?,
            attention_output_bias: match self.config.output_bias {
                true => Some(vector("attn_output.bias")?),
                false => None,
            },
            attention_post_norm: optional(post_norms, "post_attention_norm.weight")?,
            feed_forward: self.feed_forward(layer)?,
        })
    }

    fn feed_forward(&self, layer: u32) -> Result<FeedForwardHalf, LoadError> {
        let name = |suffix: &str| format!("blk.{layer}.{suffix}");
        let matrix = |suffix: &str| self.matrix(&name(suffix));
        let vector = |suffix: &str| self.vector(&name(suffix));
        let norm = |suffix: &str| self.norm(&name(suffix));
        Ok(FeedForwardHalf {
            norm: norm(self.config.ffn_norm())?,
            matrices: match self.config.mixture_of(layer) {
                None => FeedForwardWeights::Dense {
                    gate: matrix("ffn_gate.weight")?,
                    up: matrix("ffn_up.weight")?,
                    down: matrix("ffn_down.weight")?,
                },
                Some(mixture) => FeedForwardWeights::Mixture {
                    router: self.router(&name("ffn_gate_inp.weight"))?,
                    router_bias: match mixture.biases {
                        true => Some(vector("ffn_gate_inp.bias")?),
                        false => None,
                    },
                    experts: self.experts(layer, mixture)?,
                    shared: match mixture.shared {
                        Some(shared) => Some(self.shared_expert(layer, shared.gated)?),
                        None => None,
                    },
                },
            },
            post_norm: match self.config.post_norms {
                true => Some(norm("post_ffw_norm.weight")?),
                false => None,
            },
        })
    }

    /// The group of the output matrix.
    fn output(&self) -> &'static str {
        match self.config.tied_embeddings {
            true => EMBEDDING,
            false => "output",
        }
    }

    fn head(&self) -> Result<HeadWeights, LoadError> {
        let name = if self.config.tied_embeddings {
            "token_embd.weight"
        } else {
            "output.weight"
        };
        Ok(HeadWeights {
            norm: self.norm("output_norm.weight")?,
            output: self.matrix(name)?,
        })
    }

    /// Matrices that read the same rows as one; `name` names them in errors.
    fn under_each_other(
        &self,
        matrices: impl Iterator<Item = Result<QMatrix, LoadError>>,
        name: impl FnOnce() -> String,
    ) -> Result<QMatrix, LoadError> {
        let matrices = matrices.collect::<Result<Vec<_>, _>>()?;
        QMatrix::concat(matrices).map_err(|error| LoadError::Tensor {
            name: name(),
            ty: "several".into(),
            message: error.to_string(),
        })
    }

    /// Sinks, which must be scores that a sum can hold.
    fn sinks(&self, name: &str) -> Result<Vec<f32>, LoadError> {
        let sinks = self.vector(name)?;
        match sinks.iter().find(|sink| !sink.is_finite()) {
            None => Ok(sinks),
            Some(sink) => Err(LoadError::Tensor {
                name: name.into(),
                ty: "floats".into(),
                message: format!("a sink is {sink}: the file is damaged; fetch the model again"),
            }),
        }
    }

    /// The matrix of `outputs` rows and `inputs` columns in `bytes`.
    fn packed_bytes(
        &self,
        name: &str,
        ty: WeightType,
        (outputs, inputs): (usize, usize),
        bytes: &[u8],
    ) -> Result<QMatrix, LoadError> {
        let (pool, options) = (self.pool, self.options);
        QMatrix::pack_with(pool, ty, outputs, inputs, bytes, options).map_err(|error| {
            LoadError::Tensor {
                name: name.into(),
                ty: format!("{ty:?}"),
                message: error.to_string(),
            }
        })
    }

    /// A matrix in packed form. The model's configuration has checked its dimensions.
    fn matrix(&self, name: &str) -> Result<QMatrix, LoadError> {
        self.packed(name, self.tensor(name)?)
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'_>, LoadError> {
        let tensor = self.tensors.get(name);
        tensor.ok_or_else(|| LoadError::MissingTensor(name.into()))
    }

    /// The matrix in `tensor`, which has this name in the cache.
    fn packed(&self, name: &str, tensor: Tensor<'_>) -> Result<QMatrix, LoadError> {
        // Once, not for each panel.
        let gathered = tensor.data.gather()?;
        let tensor = Tensor {
            data: gathered.as_deref().map_or(tensor.data, Data::from),
            ..tensor
        };
        let failed = |message: String| LoadError::Tensor {
            name: name.into(),
            ty: format!("{:?}", tensor.ty),
            message,
        };
        let &[inputs, outputs] = tensor.dims else {
            return Err(failed(format!(
                "{} dimensions instead of 2",
                tensor.dims.len()
            )));
        };
        let (outputs, inputs) = (outputs as usize, inputs as usize);
        let read = |ty, data: Data<'_>| -> Result<QMatrix, PackError> {
            let (pool, options) = (self.pool, self.options);
            QMatrix::pack_reading(pool, ty, outputs, inputs, options, |at, rows| {
                Ok(data.read_at(at, rows)?)
            })
        };
        let mut group = self.group.borrow_mut();
        let kept = group
            .kept
            .as_ref()
            .and_then(|kept| kept.tensors().get(name));
        if let Some(kept) = kept.filter(|kept| kept.dims == tensor.dims) {
            match read(kept.ty, kept.data) {
                Ok(packed) => return Ok(packed),
                // They can be made anew.
                Err(error) => {
                    tracing::warn!(tensor = name, %error, "quantised weights cannot be read");
                }
            }
        }
        let in_layer = name.starts_with("blk.");
        let changed = requantise(self.format, in_layer, &tensor, inputs, self.pool)?;
        let Some((ty, data)) = changed else {
            return read(tensor.ty, tensor.data).map_err(|error| match error {
                PackError::File(error) => error.into(),
                PackError::Kernel(error) => failed(error.to_string()),
            });
        };
        let (pool, options) = (self.pool, self.options);
        let packed = QMatrix::pack_with(pool, ty, outputs, inputs, &data, options)
            .map_err(|error| failed(error.to_string()))?;
        if self.entry.is_some() {
            group.fresh.push(QuantisedMatrix {
                name: name.into(),
                ty,
                dims: tensor.dims.into(),
                data,
            });
        }
        Ok(packed)
    }

    /// The weight of a norm.
    fn norm(&self, name: &str) -> Result<Vec<f32>, LoadError> {
        let mut weight = self.vector(name)?;
        if self.config.norm_offset != 0.0 {
            let offset = self.config.norm_offset;
            weight.iter_mut().for_each(|weight| *weight += offset);
        }
        Ok(weight)
    }

    /// A vector as f32.
    fn vector(&self, name: &str) -> Result<Vec<f32>, LoadError> {
        let tensor = self.tensor(name)?;
        tensor.to_f32().map_err(|error| LoadError::Tensor {
            name: name.into(),
            ty: format!("{:?}", tensor.ty),
            message: error.to_string(),
        })
    }
}

/// Reasons why a matrix could not be packed.
#[derive(Debug, thiserror::Error)]
enum PackError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

#[cfg(test)]
mod tests {
    use mesh_model::synth::{Shape, Tokens, random_model};
    use mesh_model::{Architecture, GgmlType};

    use super::*;

    #[test]
    fn a_file_that_is_cut_short_while_its_weights_are_read_is_an_error() {
        for (ty, format) in [
            (GgmlType::Q4_0, WeightFormat::File),
            (GgmlType::F16, WeightFormat::Int8),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("tiny.gguf");
            random_model(&Shape::tiny(Architecture::Llama), ty, Tokens::Bytes, &path).unwrap();
            let model = Model::open(&path).unwrap();
            let layers = 0..model.config().layers;
            let load = || {
                let (pool, options) = (Pool::new(2), PackOptions::default());
                StageWeights::load(&model, layers.clone(), &pool, options, format, None)
            };
            assert!(load().is_ok());
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.set_len(model.tensors().file_len() / 2).unwrap();
            let error = load().err().expect("cut short").to_string();
            assert!(
                error.contains("tiny.gguf") && error.contains("ends before"),
                "{error}"
            );
        }
    }
}
