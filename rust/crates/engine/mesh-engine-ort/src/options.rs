//! Options for loading a stage, and the errors of loading.

use std::path::PathBuf;

pub use mesh_kernels::KvFormat;
use mesh_model::{GgmlType, Model};

use crate::cache::WeightCache;
use crate::overflow::DeviceOptions;

/// Options for loading a stage.
#[derive(Debug, Clone)]
pub struct OrtOptions {
    /// ONNX Runtime's shared library; `None` means the environment variable `ORT_DYLIB_PATH`. The first stage
    /// of a process decides: later ones use the library that is already loaded.
    pub library: Option<PathBuf>,
    /// The plugin library for [`Provider::WebGpu`](crate::Provider::WebGpu); `None` means the environment
    /// variable `ORT_WEBGPU_EP`, or else the file `libonnxruntime_providers_webgpu.so` beside ONNX Runtime's
    /// library. The first use in a process decides.
    pub webgpu_library: Option<PathBuf>,
    /// Threads that compute, the caller's among them; `0` means one per available core.
    pub threads: usize,
    /// Number of KV slots.
    pub slots: u32,
    /// Most tokens in one slot; `0` means the model's own context length. More than the model's length is
    /// refused.
    pub context: u32,
    /// Most rows in one step.
    pub max_rows: u32,
    /// Store the scales of Q4_0 and Q4_1 weights as codes of 8 bits, 0.539 bytes a weight instead of 0.5625 and
    /// 0.578 instead of 0.625: decoding is bound by the bytes read, and perplexity hardly changes
    /// (docs/reference/benchmarks.md). All stages of a model must agree on it for their results to be the same
    /// bit for bit.
    pub compact: bool,
    /// Format of the weights in memory. Stages of one model may differ in it: each computes with its own
    /// weights.
    pub weights: WeightFormat,
    /// Format of keys and values; `None` chooses by the weights, see [`suited_kv`]. Stages that exchange KV
    /// rows must agree on it. Execution providers compute at a precision of their own but export rows in this
    /// format.
    pub kv: Option<KvFormat>,
    /// Folder for weights that are quantised during the load, for the next load; `None` disables it. Weights
    /// that are integers in the file are not kept: converting them takes hardly longer than reading them.
    pub cache: Option<WeightCache>,
    /// Limits of the part on an execution provider's device.
    pub device: DeviceOptions,
    /// Measure the time spent in each operator, see [`OrtStage::profile`](crate::OrtStage::profile).
    pub profile: bool,
}

impl Default for OrtOptions {
    fn default() -> Self {
        OrtOptions {
            library: None,
            webgpu_library: None,
            threads: 0,
            slots: 8,
            context: 0,
            max_rows: 128,
            compact: true,
            weights: WeightFormat::File,
            kv: None,
            cache: None,
            device: DeviceOptions::default(),
            profile: false,
        }
    }
}

impl OrtOptions {
    /// Threads that compute.
    pub(crate) fn thread_count(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        }
    }
}

/// Format of the weights in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum WeightFormat {
    /// Unchanged, as stored in the file.
    #[default]
    File,
    /// All matrices as Q8_0: for processors that multiply bytes faster than they unpack nibbles.
    Int8,
    /// The layers' matrices as Q4_1 where the file has more than 4 bits; embedding and output stay as they
    /// are, or become Q8_0 where they are floats, since a small model loses most quality there.
    Int4,
}

impl WeightFormat {
    /// All formats.
    pub const ALL: [WeightFormat; 3] = [WeightFormat::File, WeightFormat::Int8, WeightFormat::Int4];

    /// Default format for a model: a file of integers stays as it is, floats become 8-bit integers. That
    /// halves the bytes of bf16, and with them the time of a decode step, for less than 1 % of perplexity; 4
    /// bits cost several percent (docs/reference/benchmarks.md).
    pub fn suited(model: &Model) -> WeightFormat {
        match has_floats(model) {
            true => WeightFormat::Int8,
            false => WeightFormat::File,
        }
    }

    /// `file`, `int8` or `int4`.
    pub fn name(self) -> &'static str {
        match self {
            WeightFormat::File => "file",
            WeightFormat::Int8 => "int8",
            WeightFormat::Int4 => "int4",
        }
    }

    /// The format with this [`WeightFormat::name`]; `None` for other names.
    pub fn from_name(name: &str) -> Option<WeightFormat> {
        WeightFormat::ALL
            .into_iter()
            .find(|format| format.name() == name)
    }
}

/// Default format of keys and values: f32 if the weights stay f32, so that nothing is rounded; otherwise f16,
/// which takes half the memory and loses less than the rounding of the weights.
pub fn suited_kv(model: &Model, weights: WeightFormat) -> KvFormat {
    match (weights, matrices(model)) {
        (WeightFormat::File, Some(GgmlType::F32)) => KvFormat::F32,
        _ => KvFormat::F16,
    }
}

/// True if the layers' matrices are floats in the file.
pub(crate) fn has_floats(model: &Model) -> bool {
    matrices(model).is_some_and(|ty| ty.block_size() == 1)
}

/// Type of the layers' matrices in the file.
fn matrices(model: &Model) -> Option<GgmlType> {
    let tensors = model.tensors();
    let tensor = tensors.get("blk.0.ffn_up.weight");
    let tensor = tensor.or_else(|| tensors.expert("blk.0.ffn_up", 0));
    tensor.map(|tensor| tensor.ty)
}

/// Errors of loading a stage.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum LoadError {
    /// The path of ONNX Runtime's library is not configured.
    #[error(
        "ONNX Runtime's library is not configured: give its path in the options or in ORT_DYLIB_PATH \
         (libonnxruntime.so.1.24.4, in the PyPI package `onnxruntime` 1.24.4 under onnxruntime/capi/)"
    )]
    NoLibrary,
    /// The library could not be loaded.
    #[error("ONNX Runtime at {path} cannot be loaded: {message}; version 1.24 or later is needed")]
    Library {
        path: PathBuf,
        /// The dynamic loader's error message.
        message: String,
    },
    /// ONNX Runtime refused the graph or the session.
    #[error("ONNX Runtime: {0}")]
    Runtime(#[from] ort::Error),
    /// The layer range is empty or outside the model.
    #[error("layers {start}..{end} are not a range of a model with {layers} layers")]
    Layers {
        /// First layer asked for.
        start: u32,
        /// One past the last.
        end: u32,
        /// Layers in the model.
        layers: u32,
    },
    /// An option outside its limits.
    #[error("option {name} = {value}: {remedy}")]
    Option {
        /// Name of the option's field.
        name: &'static str,
        value: u64,
        /// Description of the allowed values.
        remedy: String,
    },
    /// A tensor that the architecture needs is absent.
    #[error("the model has no tensor {0}: it is incomplete or of another architecture")]
    MissingTensor(String),
    /// The model file changed while it was read.
    #[error("the model changed while its weights were read: {0}")]
    Model(String),
    /// The file cannot be read, or was cut short.
    #[error(transparent)]
    File(#[from] mesh_model::file::FileError),
    /// A tensor that cannot be packed or read.
    #[error("tensor {name} of type {ty}: {message}")]
    Tensor {
        /// Name of the tensor in the file.
        name: String,
        /// Quantisation of the tensor.
        ty: String,
        message: String,
    },
    /// An execution provider that is not there, or does not take the graph, or computes something else.
    #[error(
        "execution provider {provider} cannot be used: {reason}; it needs {}, or set the backend to \"auto\" or \"cpu\"",
        .provider.needs()
    )]
    Provider {
        provider: crate::Provider,
        reason: String,
    },
    /// The device of an execution provider has too little memory.
    #[error(
        "execution provider {provider} has too little memory: {reason}; free some of it, raise the limit, or use fewer slots or a \
         shorter context"
    )]
    DeviceMemory {
        provider: crate::Provider,
        reason: String,
    },
    /// A network that the graph for execution providers cannot express.
    #[error(
        "the model has {feature}, which ONNX Runtime's operators cannot run: set the backend to \"cpu\""
    )]
    Unsupported {
        /// The feature of the model that has no operator.
        feature: String,
    },
    /// The kernels cannot run such a network, or there is no memory for its KV cache.
    #[error("{0}; another model, fewer slots or a shorter context may do")]
    Kernel(#[from] mesh_kernels::KernelError),
}
