//! Tensors of the host whose numbers are f32 to us and f32 or f16 to the graph.

use half::f16;
use half::vec::HalfFloatVecExt;
use ort::value::{DynTensor, Tensor, TensorElementType};

use crate::onnx::ElementType;
use crate::options::KvFormat;

/// The element type of a graph's activations, scales and KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// 32 bits, for CPUs.
    F32,
    /// 16 bits, for GPUs. The residual stream stays f32.
    F16,
}

impl Precision {
    /// Bytes of one number.
    pub(super) fn bytes(self) -> usize {
        match self {
            Precision::F32 => 4,
            Precision::F16 => 2,
        }
    }

    pub(super) fn element(self) -> ElementType {
        match self {
            Precision::F32 => ElementType::F32,
            Precision::F16 => ElementType::F16,
        }
    }

    pub(super) fn tensor_type(self) -> TensorElementType {
        match self {
            Precision::F32 => TensorElementType::Float32,
            Precision::F16 => TensorElementType::Float16,
        }
    }

    /// A tensor of the host with these numbers, rounded to this precision.
    pub(super) fn tensor(self, shape: &[usize], numbers: Vec<f32>) -> ort::Result<DynTensor> {
        Ok(match self {
            Precision::F32 => Tensor::from_array((shape.to_vec(), numbers))?.upcast(),
            Precision::F16 => {
                let numbers = Vec::<f16>::from_f32_slice(&numbers);
                Tensor::from_array((shape.to_vec(), numbers))?.upcast()
            }
        })
    }

    /// The little-endian bytes of a tensor of the host.
    pub(super) fn write_bytes(self, tensor: &DynTensor) -> ort::Result<Vec<u8>> {
        Ok(match self {
            Precision::F32 => tensor
                .try_extract_tensor::<f32>()?
                .1
                .iter()
                .flat_map(|number| number.to_le_bytes())
                .collect(),
            Precision::F16 => tensor
                .try_extract_tensor::<f16>()?
                .1
                .iter()
                .flat_map(|number| number.to_le_bytes())
                .collect(),
        })
    }

    /// A tensor of the host from little-endian bytes, which must be as many as the shape takes.
    pub(super) fn read_bytes(self, shape: &[usize], bytes: &[u8]) -> ort::Result<DynTensor> {
        let shape = shape.to_vec();
        Ok(match self {
            Precision::F32 => {
                let numbers = bytes.as_chunks().0.iter().copied().map(f32::from_le_bytes);
                Tensor::from_array((shape, numbers.collect::<Vec<_>>()))?.upcast()
            }
            Precision::F16 => {
                let numbers = bytes.as_chunks().0.iter().copied().map(f16::from_le_bytes);
                Tensor::from_array((shape, numbers.collect::<Vec<_>>()))?.upcast()
            }
        })
    }

    /// Numbers of this precision as those of exported rows, little-endian.
    pub(super) fn to_exported(self, bytes: Vec<u8>, exported: KvFormat) -> Vec<u8> {
        match (self, exported) {
            (Precision::F16, KvFormat::F16) | (Precision::F32, KvFormat::F32) => bytes,
            (Precision::F32, KvFormat::F16) => narrowed(&bytes),
            (Precision::F16, KvFormat::F32) => widened(&bytes),
        }
    }

    /// Inverse of the export: bytes in this format from exported bytes.
    pub(super) fn of_exported(self, bytes: &[u8], exported: KvFormat) -> Vec<u8> {
        match (self, exported) {
            (Precision::F16, KvFormat::F16) | (Precision::F32, KvFormat::F32) => bytes.to_vec(),
            (Precision::F32, KvFormat::F16) => widened(bytes),
            (Precision::F16, KvFormat::F32) => narrowed(bytes),
        }
    }
}

/// Converts f32 to f16.
fn narrowed(bytes: &[u8]) -> Vec<u8> {
    let numbers = bytes.as_chunks().0.iter().copied().map(f32::from_le_bytes);
    numbers
        .flat_map(|number| f16::from_f32(number).to_le_bytes())
        .collect()
}

/// Converts f16 to f32.
fn widened(bytes: &[u8]) -> Vec<u8> {
    let numbers = bytes.as_chunks().0.iter().copied().map(f16::from_le_bytes);
    numbers
        .flat_map(|number| number.to_f32().to_le_bytes())
        .collect()
}
