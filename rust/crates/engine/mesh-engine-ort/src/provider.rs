//! ONNX Runtime's execution providers: which there are, and sessions on them.

use std::fmt;

use ort::environment::Environment;
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::Session;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::value::DynTensor;

use crate::device::memory::says_exhausted;
use crate::options::LoadError;
use crate::webgpu;

/// The runtime that executes the graph of a [`DeviceStage`](crate::DeviceStage).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provider {
    /// ONNX Runtime's own CPU kernels: slower than [`OrtStage`](crate::OrtStage), and the way to test the
    /// graph without a GPU.
    Cpu,
    /// NVIDIA GPUs, through CUDA.
    Cuda,
    /// AMD GPUs, through MIGraphX.
    MiGraphX,
    /// Any GPU with a Vulkan driver, through ONNX Runtime's WebGPU plugin.
    WebGpu,
}

impl Provider {
    /// Name in configuration and logs: `cpu`, `cuda`, `migraphx` or `webgpu`.
    pub fn name(self) -> &'static str {
        match self {
            Provider::Cpu => "cpu",
            Provider::Cuda => "cuda",
            Provider::MiGraphX => "migraphx",
            Provider::WebGpu => "webgpu",
        }
    }

    /// True if this build supports the provider. WebGPU is a plugin, which every build can load.
    pub fn is_compiled_in(self) -> bool {
        match self {
            Provider::Cpu | Provider::WebGpu => true,
            Provider::Cuda => cfg!(feature = "cuda"),
            Provider::MiGraphX => cfg!(feature = "migraphx"),
        }
    }

    /// The requirements of the provider, for messages.
    pub(crate) fn needs(self) -> &'static str {
        match self {
            Provider::WebGpu => "a GPU with a Vulkan driver and ONNX Runtime's WebGPU plugin",
            _ => {
                "its GPU with the driver, an ONNX Runtime built with it and this program's package for such GPUs"
            }
        }
    }

    /// Makes a session of `model` that runs wholly on this provider. `weights` are the constants that the
    /// model names and does not carry; the session keeps them.
    // `ort`'s builder returns itself in its errors.
    #[allow(clippy::result_large_err)]
    pub(crate) fn session(
        self,
        environment: &Environment,
        threads: usize,
        model: &[u8],
        weights: Vec<(String, DynTensor)>,
    ) -> Result<Session, LoadError> {
        let refused = |reason: String| LoadError::Provider {
            provider: self,
            reason,
        };
        let builder = SessionBuilder::new(environment)?;
        let builder = self.register(builder, environment).map_err(refused)?;
        // The graph is written as it should run. Shapes change with every step: no plans of memory.
        let builder = builder
            .with_intra_threads(threads)
            .and_then(|builder| builder.with_inter_threads(1))
            .and_then(|builder| builder.with_intra_op_spinning(false))
            .and_then(|builder| builder.with_memory_pattern(false))
            .and_then(|builder| builder.with_optimization_level(GraphOptimizationLevel::Disable));
        let mut builder = builder.map_err(|error| ort::Error::new(error.to_string()))?;
        for (name, tensor) in weights {
            builder = builder
                .with_external_initializer(name, tensor.into_dyn())
                .map_err(|error| ort::Error::new(error.to_string()))?;
        }
        builder
            .commit_from_memory(model)
            .map_err(|error| match self {
                _ if says_exhausted(&error.to_string()) => LoadError::DeviceMemory {
                    provider: self,
                    reason: reason(&error),
                },
                Provider::Cpu => LoadError::Runtime(error),
                _ => refused(reason(&error)),
            })
    }

    /// The allocator for KV caches.
    pub(crate) fn allocator(self, session: &Session) -> ort::Result<Allocator> {
        let device = match self {
            Provider::Cpu => return Ok(Allocator::default()),
            Provider::Cuda => AllocationDevice::CUDA,
            Provider::MiGraphX => AllocationDevice::HIP,
            Provider::WebGpu => AllocationDevice::WEBGPU_BUFFER,
        };
        let info = MemoryInfo::new(device, 0, AllocatorType::Device, MemoryType::Default)?;
        Allocator::new(session, info)
    }

    /// Adds the provider to a session, or says why it is not there.
    // `ort`'s builder returns itself in its errors.
    #[allow(clippy::result_large_err)]
    fn register(
        self,
        builder: SessionBuilder,
        environment: &Environment,
    ) -> Result<SessionBuilder, String> {
        let provider: Option<ort::ep::ExecutionProviderDispatch> = match self {
            Provider::Cpu => return Ok(builder),
            Provider::WebGpu => {
                // An empty list would be taken silently.
                let device = webgpu::device(environment).ok_or("its plugin is not loaded")?;
                return builder
                    .with_devices([device], None)
                    .and_then(|builder| builder.with_disable_cpu_fallback())
                    .map_err(|error| reason(&error));
            }
            #[cfg(feature = "cuda")]
            Provider::Cuda => Some(
                ort::ep::CUDA::default()
                    .with_arena_extend_strategy(ort::ep::ArenaExtendStrategy::SameAsRequested)
                    .build(),
            ),
            #[cfg(feature = "migraphx")]
            Provider::MiGraphX => Some(
                ort::ep::MIGraphX::default()
                    .with_arena_extend_strategy(ort::ep::ArenaExtendStrategy::SameAsRequested)
                    .build(),
            ),
            #[allow(unreachable_patterns, reason = "depends on the features")]
            _ => None,
        };
        let Some(provider) = provider else {
            return Err("this program was built without it".into());
        };
        if !self.is_in_library() {
            return Err(format!(
                "the ONNX Runtime that was loaded was built without it ({})",
                ort::info()
            ));
        }
        builder
            .with_execution_providers([provider.error_on_failure()])
            // A node left to the CPU would move every row to the host and back: better the CPU's own stage.
            .and_then(|builder| builder.with_disable_cpu_fallback())
            .map_err(|error| reason(&error))
    }

    /// True if the loaded ONNX Runtime library has the provider.
    fn is_in_library(self) -> bool {
        #[allow(unused_imports, reason = "depends on the features")]
        use ort::ep::ExecutionProvider;
        match self {
            Provider::Cpu | Provider::WebGpu => true,
            #[cfg(feature = "cuda")]
            Provider::Cuda => ort::ep::CUDA::is_available().unwrap_or(false),
            #[cfg(feature = "migraphx")]
            Provider::MiGraphX => ort::ep::MIGraphX::is_available().unwrap_or(false),
            #[allow(unreachable_patterns, reason = "depends on the features")]
            _ => false,
        }
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The core of ONNX Runtime's error message, without source files, signatures, trace and host name.
fn reason<T>(error: &ort::Error<T>) -> String {
    let text = error.to_string();
    gist(&text).to_owned()
}

fn gist(text: &str) -> &str {
    let line = text.lines().next().unwrap_or_default();
    // A call of the GPU's own library.
    for failure in [
        "CUDA failure",
        "CUDNN failure",
        "CUBLAS failure",
        "HIP failure",
    ] {
        if let Some(at) = line.rfind(failure) {
            let line = &line[at..];
            return line.split(" ; ").next().unwrap_or(line).trim();
        }
    }
    let code = [" : FAIL : ", " : RUNTIME_EXCEPTION : ", " : EP_FAIL : "]
        .into_iter()
        .filter_map(|code| line.rfind(code).map(|at| at + code.len()))
        .max();
    line[code.unwrap_or(0)..].trim()
}

#[cfg(test)]
mod tests {
    use super::gist;

    /// As ONNX Runtime 1.24.4 with CUDA said it, shortened in the middle.
    #[test]
    fn reasons_are_what_went_wrong() {
        for (text, expected) in [
            (
                "/onnxruntime_src/onnxruntime/core/session/provider_bridge_ort.cc:1952 onnxruntime::Provider& \
                 onnxruntime::ProviderLibrary::Get() [ONNXRuntimeError] : 1 : FAIL : Failed to load library /opt/x.so with \
                 error: libcublasLt.so.12: cannot open shared object file: No such file or directory\n",
                "Failed to load library /opt/x.so with error: libcublasLt.so.12: cannot open shared object file: No such file \
                 or directory",
            ),
            (
                "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:129 [with ERRTYPE = cudaError; bool THRW = \
                 true] CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version ; GPU=-1 ; hostname=x ; \
                 expr=cudaSetDevice(info_.device_id);",
                "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version",
            ),
            ("in plain words", "in plain words"),
            ("", ""),
        ] {
            assert_eq!(gist(text), expected);
        }
    }
}
