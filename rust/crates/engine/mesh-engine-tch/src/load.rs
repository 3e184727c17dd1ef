//! Weights from files into tensors.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

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

/// Matrices over the same input that are computed as one: the ends of their names.
pub(crate) type Stack = &'static [&'static str];

/// Name of a stack, from the whole names of its parts.
pub(crate) fn stack_name(names: &[String]) -> String {
    names.join("+")
}

/// Reads all weights of a module. Those of a stack lie below each other in one tensor.
pub(crate) fn load(
    weights: &Weights,
    stacks: &[Stack],
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
        let torch = |error: tch::TchError| LoadError::Torch {
            module,
            message: format!("tensor {}: {}", weight.name, Failure::from(error).message()),
        };
        let shape: Vec<i64> = weight.shape.iter().map(|&dim| dim as i64).collect();
        let (name, part, parts) = place(weight.name, stacks);
        let tensor = match params.tensors.entry(name) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let mut whole = shape.clone();
                if let Some(rows) = whole.first_mut() {
                    *rows *= parts;
                }
                let tensor = empty(&whole, kind, device).map_err(torch)?;
                params.bytes += (tensor.numel() * kind.elt_size_in_bytes()) as u64;
                entry.insert(tensor)
            }
        };
        let rows = shape.first().copied().unwrap_or(1);
        let target = match parts {
            1 => tensor.shallow_clone(),
            _ => tensor.f_narrow(0, part * rows, rows).map_err(torch)?,
        };
        if target.size() != shape {
            return Err(LoadError::Torch {
                module,
                message: format!(
                    "tensor {} has shape {shape:?}, unlike those beside it",
                    weight.name
                ),
            });
        }
        read(&weight, &target, module, &mut buffer)?;
    }
    weights.check_unchanged()?;
    Ok(params)
}

/// Name of the tensor that holds a weight, which part of it the weight is, and of how many.
fn place(weight: &str, stacks: &[Stack]) -> (String, i64, i64) {
    if let Some((name, kind)) = weight.rsplit_once('.') {
        for stack in stacks {
            for (part, end) in stack.iter().enumerate() {
                let Some(prefix) = name.strip_suffix(end) else {
                    continue;
                };
                let names: Vec<String> = stack.iter().map(|end| format!("{prefix}{end}")).collect();
                let whole = format!("{}.{kind}", stack_name(&names));
                return (whole, part as i64, stack.len() as i64);
            }
        }
    }
    (weight.into(), 0, 1)
}

/// Reads a weight into `tensor`, which has its shape.
fn read(
    weight: &Weight<'_>,
    tensor: &Tensor,
    module: &'static str,
    buffer: &mut Vec<u8>,
) -> Result<(), LoadError> {
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
    // A view in the order of the file.
    let target = match weight.transposed {
        true => tensor.f_transpose(0, 1).map_err(torch)?,
        false => tensor.shallow_clone(),
    };
    let order = target.size();
    let rows = order.first().map_or(1, |&rows| rows as usize);
    if rows == 0 || weight.data.is_empty() {
        return Ok(());
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
    Ok(())
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
