//! Memory bandwidth of a device, by an operator that reads and writes each number once.

use std::time::Instant;

use ort::memory::Allocator;
use ort::value::{DynTensor, TensorElementType};

use super::Device;
use crate::onnx::{Dim, ElementType, Initializer, ModelProto, NodeProto, ValueInfo};
use crate::options::{LoadError, OrtOptions};
use crate::provider::Provider;
use crate::runtime;
use crate::webgpu;

const FROM: &str = "from";
const TO: &str = "to";
const FIRST: &str = "first";
/// One number on the host: it is there when the operator before it is through.
const SEEN: &str = "seen";

/// Bytes per second that `provider`'s device reads and writes, for tensors of so many bytes: the best of a few runs.
/// A tensor must be larger than the device's caches.
///
/// # Errors
/// If the provider cannot be used, or the device has no memory for two such tensors.
pub fn bandwidth(options: &OrtOptions, provider: Provider, bytes: usize) -> Result<f64, LoadError> {
    let environment = runtime::environment(options.library.as_deref())?;
    Device::new(provider).supported(&environment, options)?;
    let numbers = (bytes / 4).max(1);
    let _turn = webgpu::turn(provider);
    let (threads, model) = (options.thread_count(), copy_of(numbers).encode());
    let mut session = provider.session(&environment, threads, &model, Vec::new())?;
    let allocator = provider.allocator(&session)?;
    let tensor = || DynTensor::new(&allocator, TensorElementType::Float32, [numbers as i64]);
    let (from, mut to) = (tensor()?, tensor()?);
    let mut binding = session.create_binding()?;
    binding.bind_input(FROM, &from)?;
    binding.bind_output(TO, &mut to)?;
    binding.bind_output_to_device(SEEN, Allocator::default().memory_info())?;
    let mut least = f64::INFINITY;
    for _ in 0..RUNS {
        let start = Instant::now();
        session.run_binding(&binding)?;
        least = least.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * 4.0 * numbers as f64 / least)
}

/// `to = -from`, and the first number of it.
fn copy_of(numbers: usize) -> ModelProto<'static> {
    let value = |name: &str, numbers| ValueInfo {
        name: name.to_owned(),
        element: ElementType::F32,
        dims: vec![Dim::Fixed(numbers)],
    };
    let node = |operator, inputs: &[&str], output: &str| NodeProto {
        operator,
        domain: "",
        name: operator.to_owned(),
        inputs: inputs.iter().map(|&input| input.to_owned()).collect(),
        outputs: vec![output.to_owned()],
        attributes: Vec::new(),
    };
    ModelProto {
        opsets: &[("", 21)],
        nodes: vec![node("Neg", &[FROM], TO), node("Gather", &[TO, FIRST], SEEN)],
        initializers: vec![Initializer {
            name: FIRST.to_owned(),
            element: ElementType::I64,
            dims: vec![1],
            data: Some(0i64.to_le_bytes().to_vec()),
        }],
        inputs: vec![value(FROM, numbers)],
        outputs: vec![value(TO, numbers), value(SEEN, 1)],
    }
}

/// The first one compiles programs and touches memory.
const RUNS: usize = 6;
