//! The weights of an encoder, packed for the kernels.

use std::borrow::Cow;

use mesh_kernels::{PackOptions, Pool, QMatrix, WeightType};
use mesh_model::EncoderModel;
use mesh_model::encoder::EncoderConfig;
use mesh_model::safetensors::{Dtype, Safetensors, TensorView};

use crate::options::LoadError;

pub(crate) struct EncoderWeights {
    /// `[vocab, hidden]`.
    pub(crate) words: Vec<f32>,
    /// `[positions, hidden]`, the first token type's row added.
    pub(crate) positions: Vec<f32>,
    pub(crate) norm: LayerNorm,
    pub(crate) layers: Vec<EncoderLayer>,
}

/// Weights of a layer norm.
pub(crate) struct LayerNorm {
    pub(crate) weight: Vec<f32>,
    pub(crate) bias: Vec<f32>,
}

/// A product with its bias.
pub(crate) struct Dense {
    pub(crate) matrix: QMatrix,
    pub(crate) bias: Vec<f32>,
}

pub(crate) struct EncoderLayer {
    /// Query, key and value under each other.
    pub(crate) qkv: Dense,
    pub(crate) attention_output: Dense,
    pub(crate) attention_norm: LayerNorm,
    pub(crate) up: Dense,
    pub(crate) down: Dense,
    pub(crate) output_norm: LayerNorm,
}

impl EncoderWeights {
    /// Reads and packs the weights of `model`.
    pub(crate) fn load(model: &EncoderModel, pool: &Pool) -> Result<EncoderWeights, LoadError> {
        let config = model.config();
        let loader = EncoderLoader {
            tensors: model.tensors(),
            prefix: prefix(model.tensors())?,
            pool,
        };
        let hidden = config.hidden;
        let table = |name: &str, rows: usize| {
            let name = format!("embeddings.{name}.weight");
            loader.floats(&name, &[rows, hidden])
        };
        let words = table("word_embeddings", config.vocab)?;
        let mut positions = table("position_embeddings", config.positions)?;
        let types = table("token_type_embeddings", config.token_types)?;
        for row in positions.chunks_exact_mut(hidden) {
            for (x, ty) in row.iter_mut().zip(&types) {
                *x += ty;
            }
        }
        let norm = loader.norm("embeddings.LayerNorm", hidden)?;
        let layers = (0..config.layers)
            .map(|layer| loader.layer(layer, config))
            .collect::<Result<_, _>>()?;
        let unchanged = model.tensors().check_unchanged();
        unchanged.map_err(|error| LoadError::Model(error.to_string()))?;
        Ok(EncoderWeights {
            words,
            positions,
            norm,
            layers,
        })
    }

    /// Bytes of tables and packed matrices.
    pub(crate) fn bytes(&self) -> u64 {
        let tables = 4 * (self.words.len() + self.positions.len());
        let layers = self
            .layers
            .iter()
            .flat_map(|layer| [&layer.qkv, &layer.attention_output, &layer.up, &layer.down]);
        tables as u64 + layers.map(|dense| dense.matrix.bytes() as u64).sum::<u64>()
    }
}

/// Files of the encoder alone name its tensors plainly, those of a larger model behind the encoder's name.
fn prefix(tensors: &Safetensors) -> Result<&'static str, LoadError> {
    let has = |prefix: &&str| {
        let name = format!("{prefix}embeddings.word_embeddings.weight");
        tensors.tensor(&name).is_some()
    };
    let found = ["", "bert.", "roberta.", "model."].into_iter().find(has);
    found.ok_or_else(|| LoadError::MissingTensor("embeddings.word_embeddings.weight".into()))
}

struct EncoderLoader<'a> {
    tensors: &'a Safetensors,
    prefix: &'static str,
    pool: &'a Pool,
}

impl EncoderLoader<'_> {
    fn layer(&self, layer: usize, config: &EncoderConfig) -> Result<EncoderLayer, LoadError> {
        let name = |part: &str| format!("encoder.layer.{layer}.{part}");
        let hidden = config.hidden;
        let parts = ["query", "key", "value"].map(|part| {
            let part = name(&format!("attention.self.{part}"));
            self.dense(&part, hidden, hidden)
        });
        let (mut matrices, mut bias) = (Vec::new(), Vec::new());
        for part in parts {
            let part = part?;
            matrices.push(part.matrix);
            bias.extend(part.bias);
        }
        Ok(EncoderLayer {
            qkv: Dense {
                matrix: QMatrix::concat(matrices)?,
                bias,
            },
            attention_output: self.dense(&name("attention.output.dense"), hidden, hidden)?,
            attention_norm: self.norm(&name("attention.output.LayerNorm"), hidden)?,
            up: self.dense(&name("intermediate.dense"), config.intermediate, hidden)?,
            down: self.dense(&name("output.dense"), hidden, config.intermediate)?,
            output_norm: self.norm(&name("output.LayerNorm"), hidden)?,
        })
    }

    fn dense(&self, name: &str, outputs: usize, inputs: usize) -> Result<Dense, LoadError> {
        let weight = format!("{name}.weight");
        let tensor = self.tensor(&weight, &[outputs, inputs])?;
        let failed = |message: String| broken(&tensor, message);
        let ty = match tensor.dtype {
            Dtype::F16 => WeightType::F16,
            Dtype::BF16 => WeightType::BF16,
            _ => WeightType::F32,
        };
        let data: Cow<'_, [u8]> = match tensor.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => tensor.data.read()?,
            _ => {
                let floats = tensor.to_f32().map_err(|error| failed(error.to_string()))?;
                floats.iter().flat_map(|x| x.to_le_bytes()).collect()
            }
        };
        let options = PackOptions::default();
        let matrix = QMatrix::pack_with(self.pool, ty, outputs, inputs, &data, options)
            .map_err(|error| failed(error.to_string()))?;
        let bias = self.floats(&format!("{name}.bias"), &[outputs])?;
        Ok(Dense { matrix, bias })
    }

    fn norm(&self, name: &str, width: usize) -> Result<LayerNorm, LoadError> {
        Ok(LayerNorm {
            weight: self.floats(&format!("{name}.weight"), &[width])?,
            bias: self.floats(&format!("{name}.bias"), &[width])?,
        })
    }

    fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, LoadError> {
        let tensor = self.tensor(name, shape)?;
        let floats = tensor.to_f32();
        floats.map_err(|error| broken(&tensor, error.to_string()))
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>, LoadError> {
        let name = format!("{}{name}", self.prefix);
        let tensor = self.tensors.tensor(&name);
        let tensor = tensor.ok_or(LoadError::MissingTensor(name))?;
        let same = tensor.shape.len() == shape.len()
            && tensor.shape.iter().zip(shape).all(|(a, b)| *a == *b as u64);
        if !same {
            return Err(broken(
                &tensor,
                format!(
                    "its shape is {:?}, but config.json makes it {shape:?}",
                    tensor.shape
                ),
            ));
        }
        Ok(tensor)
    }
}

fn broken(tensor: &TensorView<'_>, message: String) -> LoadError {
    LoadError::Tensor {
        name: tensor.name.into(),
        ty: format!("{:?}", tensor.dtype),
        message,
    }
}
