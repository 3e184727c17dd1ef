//! Weights from files into tensors.

use std::collections::HashMap;
use std::sync::Arc;

use mesh_diffusion::checkpoint::Weights;
use mesh_model::safetensors::Dtype;
use tch::{Device, Kind, Tensor};

use crate::error::{Failure, LoadError, Outcome};
use crate::weight::{Place, Weight, empty, unlisted};

/// Bytes that are read at once.
const PIECE: usize = 4 << 20;

/// How the matrices and kernels of a module are kept. Vectors are always kept as they compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    /// As they compute.
    Ready,
    /// As in the file, where that takes less memory and loses nothing.
    Stored,
    /// In 8 bits, but for the first and the last layers.
    Int8,
    /// In the file.
    InFile,
}

/// The tensors of a module, on their device and of their type, until its layers take them.
pub(crate) struct Params {
    tensors: HashMap<String, Param>,
    /// Bytes in memory.
    pub(crate) bytes: u64,
}

enum Param {
    Vector(Tensor),
    Weight(Weight),
}

/// Matrices over the same input that are computed as one: the ends of their names.
pub(crate) type Stack = &'static [&'static str];

/// Name of a stack, from the whole names of its parts.
pub(crate) fn stack_name(names: &[String]) -> String {
    names.join("+")
}

/// A tensor of the network and the positions of its parts among the weights: several lie below each other.
struct Group {
    name: String,
    shape: Vec<i64>,
    /// Number of the part, and its position.
    parts: Vec<(usize, usize)>,
}

/// Reads the weights of a module.
pub(crate) fn load(
    weights: &Arc<Weights>,
    stacks: &[Stack],
    module: &'static str,
    keep: Keep,
    place: &Place,
) -> Result<Params, LoadError> {
    let mut params = Params {
        tensors: HashMap::new(),
        bytes: 0,
    };
    for group in groups(weights, stacks, module)? {
        let name = group.name.clone();
        let param = group
            .load(weights, keep, place)
            .map_err(|failure| LoadError::Torch {
                module,
                message: failure.message(),
            })?;
        params.bytes += match &param {
            Param::Vector(tensor) => (tensor.numel() * place.kind.elt_size_in_bytes()) as u64,
            Param::Weight(weight) => weight.bytes(),
        };
        params.tensors.insert(name, param);
    }
    weights.check_unchanged()?;
    Ok(params)
}

/// Bytes in memory of a module's weights, and elements of the largest one that becomes ready only for its use.
pub(crate) fn bytes(weights: &Weights, keep: Keep, kind: Kind) -> (u64, u64) {
    let width = kind.elt_size_in_bytes() as u64;
    let mut total = 0;
    let mut largest = 0;
    for weight in weights.iter() {
        let count: u64 = weight.shape.iter().product();
        let bits = |dtype| stored(dtype).elt_size_in_bytes() as u64;
        let (bytes, ready) = match keep_of(keep, weight.name, weight.shape.len()) {
            Keep::Stored if is_narrow(weight.dtype, kind) => (count * bits(weight.dtype), false),
            Keep::Ready | Keep::Stored => (count * width, true),
            Keep::Int8 => (count + weight.shape[0] * width, false),
            Keep::InFile => (0, false),
        };
        total += bytes;
        if !ready {
            // Three matrices of attention lie in one.
            let parts = if weight.shape.len() == 2 { 3 } else { 1 };
            largest = largest.max(count * parts);
        }
    }
    (total, largest)
}

fn keep_of(keep: Keep, name: &str, dims: usize) -> Keep {
    // Errors of these reach every pixel, and they are small.
    let ends = ["conv_in.", "conv_out.", "time_embedding.", "add_embedding."];
    match keep {
        _ if dims < 2 => Keep::Ready,
        Keep::Int8 if ends.iter().any(|end| name.starts_with(end)) => Keep::Ready,
        keep => keep,
    }
}

fn stored(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F64 => Kind::Double,
        _ => Kind::Float,
    }
}

/// True if all numbers of the file's type are numbers of `kind` and take less memory as they are.
fn is_narrow(dtype: Dtype, kind: Kind) -> bool {
    stored(dtype).elt_size_in_bytes() < kind.elt_size_in_bytes()
}

/// The tensors of the network, in the order in which it uses them.
fn groups(
    weights: &Weights,
    stacks: &[Stack],
    module: &'static str,
) -> Result<Vec<Group>, LoadError> {
    let mut groups: Vec<Group> = Vec::new();
    let mut by_name = HashMap::new();
    for (position, weight) in weights.iter().enumerate() {
        let shape: Vec<i64> = weight.shape.iter().map(|&dim| dim as i64).collect();
        let (name, part) = place_of(weight.name, stacks);
        let at = *by_name.entry(name.clone()).or_insert(groups.len());
        let Some(group) = groups.get_mut(at) else {
            groups.push(Group {
                name,
                shape,
                parts: vec![(part, position)],
            });
            continue;
        };
        if group.shape.get(1..) != shape.get(1..) {
            return Err(LoadError::Torch {
                module,
                message: format!(
                    "tensor {} has shape {shape:?}, unlike those beside it",
                    weight.name
                ),
            });
        }
        group.shape[0] += shape[0];
        group.parts.push((part, position));
    }
    for group in &mut groups {
        group.parts.sort_unstable();
    }
    Ok(groups)
}

/// Name of the tensor that holds a weight, and which part of it the weight is.
fn place_of(weight: &str, stacks: &[Stack]) -> (String, usize) {
    if let Some((name, kind)) = weight.rsplit_once('.') {
        for stack in stacks {
            for (part, end) in stack.iter().enumerate() {
                let Some(prefix) = name.strip_suffix(end) else {
                    continue;
                };
                let names: Vec<String> = stack.iter().map(|end| format!("{prefix}{end}")).collect();
                return (format!("{}.{kind}", stack_name(&names)), part);
            }
        }
    }
    (weight.into(), 0)
}

impl Group {
    fn load(self, weights: &Arc<Weights>, keep: Keep, place: &Place) -> Outcome<Param> {
        let Group { name, shape, parts } = self;
        let parts: Vec<usize> = parts.into_iter().map(|(_, position)| position).collect();
        let Place { device, kind, .. } = *place;
        let read_as = |kind, device| {
            let tensor = empty(&shape, kind, device)?;
            read(weights, &parts, &tensor)?;
            Ok::<_, Failure>(tensor)
        };
        if shape.len() < 2 {
            return Ok(Param::Vector(read_as(kind, device)?));
        }
        let dtype = |part: &usize| weights.get(*part).map(|weight| weight.dtype);
        let first = parts.first().and_then(dtype).unwrap_or(Dtype::F32);
        let uniform = parts.iter().all(|part| dtype(part) == Some(first));
        Ok(Param::Weight(match keep_of(keep, &name, shape.len()) {
            Keep::Stored if uniform && is_narrow(first, kind) => {
                Weight::narrow(read_as(stored(first), device)?, place)
            }
            Keep::Ready | Keep::Stored => Weight::ready(read_as(kind, device)?, place),
            Keep::Int8 => Weight::int8(read_as(Kind::Float, Device::Cpu)?, place)?,
            Keep::InFile => Weight::in_file(shape, weights.clone(), parts, place),
        }))
    }
}

/// Reads weights, one below the other, into `tensor`, which has their shape.
pub(crate) fn read(weights: &Weights, parts: &[usize], tensor: &Tensor) -> Outcome<()> {
    let mut buffer = Vec::new();
    let mut at = 0;
    for &part in parts {
        let Some(weight) = weights.get(part) else {
            return Err(Failure::new(format!("no tensor {part} in the file")));
        };
        let rows = weight.shape.first().map_or(1, |&rows| rows as i64);
        let target = match parts.len() {
            1 => tensor.shallow_clone(),
            _ => tensor.f_narrow(0, at, rows)?,
        };
        at += rows;
        // A view in the order of the file.
        let target = match weight.transposed {
            true => target.f_transpose(0, 1)?,
            false => target,
        };
        let order = target.size();
        let rows = order.first().map_or(1, |&rows| rows as usize);
        if rows == 0 || weight.data.is_empty() {
            continue;
        }
        let row = weight.data.len() / rows;
        let step = (PIECE / row.max(1)).max(1);
        for at in (0..rows).step_by(step) {
            let count = step.min(rows - at);
            buffer.resize(count * row, 0);
            weight
                .data
                .read_at(at * row, &mut buffer)
                .map_err(|error| Failure::new(format!("tensor {}: {error}", weight.name)))?;
            let mut dims = order.clone();
            if let Some(first) = dims.first_mut() {
                *first = count as i64;
            }
            let piece = Tensor::f_from_data_size(&buffer, &dims, stored(weight.dtype))?;
            let mut place = match order.len() {
                0 => target.shallow_clone(),
                _ => target.f_narrow(0, at as i64, count as i64)?,
            };
            place.f_copy_(&piece)?;
        }
    }
    Ok(())
}

/// Reads rows of a matrix into `out`. False if the matrix does not lie row by row in one place.
pub(crate) fn read_rows(
    weights: &Weights,
    parts: &[usize],
    rows: &[i64],
    out: &Tensor,
) -> Outcome<bool> {
    let [part] = parts else { return Ok(false) };
    let Some(weight) = weights.get(*part).filter(|weight| !weight.transposed) else {
        return Ok(false);
    };
    let row = weight.data.len() / weight.shape.first().map_or(1, |&rows| rows.max(1) as usize);
    let mut buffer = vec![0; row * rows.len()];
    for (place, &number) in buffer.chunks_mut(row.max(1)).zip(rows) {
        let at = usize::try_from(number)
            .unwrap_or(usize::MAX)
            .saturating_mul(row);
        weight
            .data
            .read_at(at, place)
            .map_err(|error| Failure::new(format!("tensor {}: {error}", weight.name)))?;
    }
    let rows = Tensor::f_from_data_size(&buffer, &out.size(), stored(weight.dtype))?;
    out.shallow_clone().f_copy_(&rows)?;
    Ok(true)
}

impl Params {
    /// The vector called `name`.
    pub(crate) fn take(&mut self, name: &str) -> Outcome<Tensor> {
        self.maybe(name).ok_or_else(|| unlisted(name))
    }

    /// The vector called `name`, if the configuration has one.
    pub(crate) fn maybe(&mut self, name: &str) -> Option<Tensor> {
        match self.tensors.remove(name)? {
            Param::Vector(tensor) => Some(tensor),
            Param::Weight(_) => None,
        }
    }

    /// The matrix or kernel called `name`.
    pub(crate) fn weight(&mut self, name: &str) -> Outcome<Weight> {
        match self.tensors.remove(name) {
            Some(Param::Weight(weight)) => Ok(weight),
            _ => Err(unlisted(name)),
        }
    }

    /// True if there is a tensor called `name`.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }
}
