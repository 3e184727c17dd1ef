//! Weights from files into tensors.

use std::collections::HashMap;

use mesh_diffusion::checkpoint::{Weight, Weights};
use mesh_model::safetensors::Dtype;
use tch::{Device, Kind, Tensor};

use crate::error::{Failure, LoadError, Outcome};

/// Bytes that are read at once.
const PIECE: usize = 4 << 20;

/// The tensors of a module, on their device and of their type, until its layers take them.
pub(crate) struct Params {
    tensors: HashMap<String, Tensor>,
    /// Bytes in memory.
    pub(crate) bytes: u64,
}

/// Reads all weights of a module.
pub(crate) fn load(
    weights: &Weights,
    module: &'static str,
    device: Device,
    kind: Kind,
) -> Result<Params, LoadError> {
    let mut params = Params {
        tensors: HashMap::with_capacity(weights.iter().len()),
        bytes: 0,
    };
    let mut buffer = Vec::new();
    for weight in weights.iter() {
        let tensor = read(&weight, module, device, kind, &mut buffer)?;
        params.bytes += (tensor.numel() * kind.elt_size_in_bytes()) as u64;
        params.tensors.insert(weight.name.into(), tensor);
    }
    weights.check_unchanged()?;
    Ok(params)
}

fn read(
    weight: &Weight<'_>,
    module: &'static str,
    device: Device,
    kind: Kind,
    buffer: &mut Vec<u8>,
) -> Result<Tensor, LoadError> {
    let torch = |error: tch::TchError| LoadError::Torch {
        module,
        message: format!("tensor {}: {}", weight.name, Failure::from(error).message()),
    };
    let stored = match weight.dtype {
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F64 => Kind::Double,
        _ => Kind::Float,
    };
    let shape: Vec<i64> = weight.shape.iter().map(|&dim| dim as i64).collect();
    let tensor = empty(&shape, kind, device).map_err(torch)?;
    // A view in the order of the file.
    let target = match weight.transposed {
        true => tensor.f_transpose(0, 1).map_err(torch)?,
        false => tensor.shallow_clone(),
    };
    let order = target.size();
    let rows = order.first().map_or(1, |&rows| rows as usize);
    if rows == 0 || weight.data.is_empty() {
        return Ok(tensor);
    }
    let row = weight.data.len() / rows;
    let step = (PIECE / row.max(1)).max(1);
    for at in (0..rows).step_by(step) {
        let count = step.min(rows - at);
        buffer.resize(count * row, 0);
        weight
            .data
            .read_at(at * row, buffer)
            .map_err(|source| LoadError::Read {
                module,
                tensor: weight.name.into(),
                source,
            })?;
        let mut dims = order.clone();
        dims[0] = count as i64;
        let piece = Tensor::f_from_data_size(buffer, &dims, stored).map_err(torch)?;
        let mut place = target.f_narrow(0, at as i64, count as i64).map_err(torch)?;
        place.f_copy_(&piece).map_err(torch)?;
    }
    Ok(tensor)
}

/// A tensor without values; kernels of convolutions have their channels innermost.
fn empty(shape: &[i64], kind: Kind, device: Device) -> Result<Tensor, tch::TchError> {
    match *shape {
        [_, inputs, height, width] => {
            let strides = [inputs * height * width, 1, width * inputs, inputs];
            Tensor::f_empty_strided(shape, strides, (kind, device))
        }
        _ => Tensor::f_empty(shape, (kind, device)),
    }
}

impl Params {
    /// The tensor called `name`.
    pub(crate) fn take(&mut self, name: &str) -> Outcome<Tensor> {
        let tensor = self.tensors.remove(name);
        tensor.ok_or_else(|| Failure::new(format!("the configuration lists no tensor {name}")))
    }

    /// The tensor called `name`, if the configuration has one.
    pub(crate) fn maybe(&mut self, name: &str) -> Option<Tensor> {
        self.tensors.remove(name)
    }

    /// True if there is a tensor called `name`.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }
}
