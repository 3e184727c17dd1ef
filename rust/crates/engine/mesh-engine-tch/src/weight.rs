//! Matrices and kernels in the form in which they are kept, and the memory in which they become what computes.
//!
//! A weight that is not kept as it computes is written into the model's [`Workspace`] for each use. The workspace is as large as
//! the largest of these weights and is used again for each, so a model takes the memory of the kept form and of one weight more.

use std::sync::{Arc, Mutex, PoisonError};

use mesh_diffusion::checkpoint::Weights;
use tch::{Device, Kind, Tensor};

use crate::error::{Failure, Outcome};
use crate::load;

/// Elements whose codes become numbers and are scaled while they lie in a cache.
const BLOCK: i64 = 1 << 18;
/// The largest code of 8 bits: codes lie symmetrically around 0.
const MOST: f64 = 127.0;
/// The least scale, for rows of zeros.
const LEAST: f64 = 1e-30;

/// Where tensors compute, and how.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) device: Device,
    pub(crate) kind: Kind,
    pub(crate) workspace: Workspace,
}

/// Memory of one weight, which all weights of a model share.
#[derive(Debug, Clone, Default)]
pub(crate) struct Workspace(Arc<Mutex<Option<Tensor>>>);

impl Workspace {
    /// A tensor without values. It is one with all others of the workspace: only the last one may be used.
    fn tensor(&self, shape: &[i64], kind: Kind, device: Device) -> Outcome<Tensor> {
        let count = shape.iter().product::<i64>();
        let mut memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |memory: &Tensor| memory.numel() as i64 >= count && memory.kind() == kind;
        let memory = match &mut *memory {
            Some(memory) if fits(memory) => memory,
            other => {
                // The old one first.
                *other = None;
                other.insert(Tensor::f_empty([count], (kind, device))?)
            }
        };
        Ok(memory.f_as_strided(shape, strides(shape), 0)?)
    }
}

/// A matrix or a kernel.
#[derive(Debug)]
pub(crate) struct Weight {
    shape: Vec<i64>,
    form: Form,
    place: Place,
}

#[derive(Debug)]
enum Form {
    /// As it computes.
    Ready(Tensor),
    /// With fewer bits, all of which the computing type has.
    Narrow(Tensor),
    /// Codes of 8 bits, and a scale for each of the first dimension.
    Int8 { codes: Tensor, scales: Tensor },
    /// In the file: one tensor, or several that lie below each other.
    File {
        weights: Arc<Weights>,
        parts: Vec<usize>,
    },
}

impl Weight {
    pub(crate) fn ready(tensor: Tensor, place: &Place) -> Self {
        Weight::new(tensor.size(), Form::Ready(tensor), place)
    }

    pub(crate) fn narrow(tensor: Tensor, place: &Place) -> Self {
        Weight::new(tensor.size(), Form::Narrow(tensor), place)
    }

    /// Rounds `tensor`, of f32 and on the CPU, to 8 bits. It is overwritten.
    pub(crate) fn int8(mut tensor: Tensor, place: &Place) -> Outcome<Self> {
        let shape = tensor.size();
        let inner: Vec<i64> = (1..shape.len() as i64).collect();
        let most = tensor.f_abs()?.f_amax(inner, true)?;
        let number = crate::nn::number;
        let scales = most
            .f_div(&number(MOST)?)?
            .f_maximum(&number(LEAST)?.f_to_kind(Kind::Float)?)?;
        let codes = tensor
            .f_div_(&scales)?
            .f_round_()?
            .f_to_kind(Kind::Int8)?
            .f_to_device(place.device)?;
        let scales = scales.f_to_kind(place.kind)?.f_to_device(place.device)?;
        Ok(Weight::new(shape, Form::Int8 { codes, scales }, place))
    }

    pub(crate) fn in_file(
        shape: Vec<i64>,
        weights: Arc<Weights>,
        parts: Vec<usize>,
        place: &Place,
    ) -> Self {
        Weight::new(shape, Form::File { weights, parts }, place)
    }

    fn new(shape: Vec<i64>, form: Form, place: &Place) -> Self {
        Weight {
            shape,
            form,
            place: place.clone(),
        }
    }

    /// Dimensions; `[outputs, inputs]` of a matrix, `[outputs, inputs, height, width]` of a kernel.
    pub(crate) fn shape(&self) -> &[i64] {
        &self.shape
    }

    /// True if it computes on a CPU.
    pub(crate) fn on_cpu(&self) -> bool {
        self.place.device == Device::Cpu
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> u64 {
        let bytes = |tensor: &Tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
        match &self.form {
            Form::Ready(tensor) | Form::Narrow(tensor) => bytes(tensor),
            Form::Int8 { codes, scales } => bytes(codes) + bytes(scales),
            Form::File { .. } => 0,
        }
    }

    /// The weight as it computes, until the next one is asked for.
    pub(crate) fn get(&self) -> Outcome<Tensor> {
        let Place {
            device,
            kind,
            workspace,
        } = &self.place;
        if let Form::Ready(tensor) = &self.form {
            return Ok(tensor.shallow_clone());
        }
        let mut out = workspace.tensor(&self.shape, *kind, *device)?;
        match &self.form {
            Form::Ready(_) => {}
            Form::Narrow(tensor) => out.f_copy_(tensor)?,
            Form::Int8 { codes, scales } => {
                let rows = self.shape[0];
                let step = (BLOCK * rows / out.numel().max(1) as i64).clamp(1, rows.max(1));
                for at in (0..rows).step_by(step as usize) {
                    let count = step.min(rows - at);
                    let part = |tensor: &Tensor| tensor.f_narrow(0, at, count);
                    let mut block = part(&out)?;
                    block.f_copy_(&part(codes)?)?;
                    let _same = block.f_mul_(&part(scales)?)?;
                }
            }
            Form::File { weights, parts } => load::read(weights, parts, &out)?,
        }
        Ok(out)
    }

    /// [`Weight::get`] as a matrix of the first dimension by the others. Kernels have their channels innermost.
    pub(crate) fn matrix(&self) -> Outcome<Tensor> {
        let tensor = self.get()?;
        Ok(match *self.shape {
            [outputs, inputs, height, width] => tensor
                .f_permute([0, 2, 3, 1])?
                .f_view([outputs, height * width * inputs])?,
            _ => tensor,
        })
    }

    /// Rows of a matrix by number, which must be in range: `[rows, inputs]`.
    pub(crate) fn rows(&self, rows: &[i64]) -> Outcome<Tensor> {
        let Place { device, kind, .. } = self.place;
        if let Form::File { weights, parts } = &self.form {
            let out = Tensor::f_empty([rows.len() as i64, self.shape[1]], (kind, device))?;
            if load::read_rows(weights, parts, rows, &out)? {
                return Ok(out);
            }
        }
        let index = Tensor::f_from_slice(rows)?.f_to_device(device)?;
        let select = |tensor: &Tensor| tensor.f_index_select(0, &index);
        Ok(match &self.form {
            Form::Ready(tensor) | Form::Narrow(tensor) => select(tensor)?.f_to_kind(kind)?,
            Form::Int8 { codes, scales } => {
                select(codes)?.f_to_kind(kind)?.f_mul_(&select(scales)?)?
            }
            Form::File { .. } => select(&self.get()?)?,
        })
    }
}

/// A tensor without values; kernels of convolutions have their channels innermost.
pub(crate) fn empty(shape: &[i64], kind: Kind, device: Device) -> Result<Tensor, tch::TchError> {
    Tensor::f_empty_strided(shape, strides(shape), (kind, device))
}

fn strides(shape: &[i64]) -> Vec<i64> {
    match *shape {
        [_, inputs, height, width] => vec![inputs * height * width, 1, width * inputs, inputs],
        _ => {
            let mut strides = vec![1; shape.len()];
            for at in (1..shape.len()).rev() {
                strides[at - 1] = strides[at] * shape[at].max(1);
            }
            strides
        }
    }
}

/// A weight that is not among the configuration's.
pub(crate) fn unlisted(name: &str) -> Failure {
    Failure::new(format!("the configuration lists no tensor {name}"))
}
