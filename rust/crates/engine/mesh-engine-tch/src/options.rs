//! Options of a loaded model.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use mesh_diffusion::checkpoint::Checkpoint;
use mesh_diffusion::config::PipelineConfig;

use crate::parts::weight_bytes;

/// The device that computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Device {
    /// A GPU if libtorch has one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU by number, of CUDA or ROCm.
    Gpu(usize),
}

impl Device {
    /// Number of GPUs that libtorch sees.
    pub fn gpus() -> usize {
        usize::try_from(tch::Cuda::device_count()).unwrap_or(0)
    }

    /// The device in libtorch; `None` if there is no such device.
    pub(crate) fn find(self) -> Option<tch::Device> {
        let count = Self::gpus();
        match self {
            Device::Cpu => Some(tch::Device::Cpu),
            Device::Auto if count == 0 => Some(tch::Device::Cpu),
            Device::Auto => Some(tch::Device::Cuda(0)),
            Device::Gpu(number) => (number < count).then_some(tch::Device::Cuda(number)),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Gpu(number) => write!(f, "cuda:{number}"),
        }
    }
}

/// A device's name that does not exist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown device {0:?}: use auto, cpu, cuda or cuda:NUMBER (ROCm's GPUs are cuda in libtorch too)"
)]
pub struct UnknownDevice(String);

impl FromStr for Device {
    type Err = UnknownDevice;

    fn from_str(name: &str) -> Result<Self, UnknownDevice> {
        let unknown = || UnknownDevice(name.into());
        match name {
            "auto" => Ok(Device::Auto),
            "cpu" => Ok(Device::Cpu),
            "cuda" | "rocm" => Ok(Device::Gpu(0)),
            _ => {
                let number = name
                    .strip_prefix("cuda:")
                    .or_else(|| name.strip_prefix("rocm:"));
                let number = number.and_then(|number| number.parse().ok());
                number.map(Device::Gpu).ok_or_else(unknown)
            }
        }
    }
}

/// Type of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// f32 on CPUs, f16 on GPUs.
    #[default]
    Auto,
    /// 32 bits.
    F32,
    /// 16 bits, IEEE.
    F16,
    /// 16 bits with the range of f32.
    Bf16,
}

/// Form in which matrices and kernels are kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum WeightForm {
    /// The UNet's as they compute, which is the fastest; those of the text encoders and the autoencoder, which compute once a
    /// picture, as in the file where that takes less memory.
    #[default]
    Auto,
    /// All as they compute.
    Full,
    /// All as in the file where that takes less memory. Each is converted for its use; pictures are the same.
    File,
    /// Integers of 8 bits with a scale for each output; the autoencoder's as in the file. Pictures differ a little.
    Int8,
}

/// Parts of a model that are not in memory while they do not compute. They are read from the model's files, which the system
/// keeps in memory as far as there is room. Pictures are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Offload {
    /// All is in memory.
    #[default]
    None,
    /// Text encoders, UNet and autoencoder, of which one is in memory.
    Modules,
    /// Every matrix and kernel: one is in memory.
    Sequential,
}

/// Options of a loaded model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    /// The device that computes.
    pub device: Device,
    /// Type of weights and activations.
    pub precision: Precision,
    /// Form of the weights in memory.
    pub weights: WeightForm,
    /// Parts of the model that are not in memory while they do not compute.
    pub offload: Offload,
    /// Threads of the CPU; 0 takes libtorch's choice. libtorch has one number for the whole process.
    pub threads: usize,
    /// Folder of a tiny autoencoder (TAESD) that takes the place of the model's own.
    pub tiny_vae: Option<PathBuf>,
    /// The two halves of classifier-free guidance run one after the other, which takes half the memory for activations, and
    /// more time where a batch of two is faster.
    pub guidance_in_turn: bool,
    /// Largest side, in latents, that the autoencoder takes whole; larger pictures are made of overlapping tiles of this side.
    /// 0 takes 128, which is 1024 pixels.
    pub tile: u32,
    /// Bytes that weights and activations may take together; `None` means unknown, and every size is taken.
    pub memory_limit: Option<u64>,
}

impl Options {
    /// Bytes of the weights of `checkpoint` that these options keep in memory.
    pub fn weight_bytes(&self, checkpoint: &Checkpoint) -> u64 {
        // A device that does not exist is an error of the load.
        let device = self.device.find().unwrap_or(tch::Device::Cpu);
        let (kind, vae_kind) = self.kinds(checkpoint.config(), device);
        weight_bytes(checkpoint, self, kind, vae_kind)
    }

    /// The fastest of the forms of weights and of offloading whose weights take at most `memory` bytes and that make the same
    /// pictures; the one that takes the least memory if none does. Only what is `Auto` or `None` changes.
    #[must_use]
    pub fn within(&self, checkpoint: &Checkpoint, memory: u64) -> Self {
        let forms = [
            (self.weights, self.offload),
            (WeightForm::File, Offload::None),
            (WeightForm::File, Offload::Modules),
            (WeightForm::File, Offload::Sequential),
        ];
        let options = forms.map(|(weights, offload)| Options {
            weights: match self.weights {
                WeightForm::Auto => weights,
                set => set,
            },
            offload: match self.offload {
                Offload::None => offload,
                set => set,
            },
            ..self.clone()
        });
        let fits = |options: &&Options| options.weight_bytes(checkpoint) <= memory;
        let found = options.iter().find(fits);
        found.unwrap_or(&options[options.len() - 1]).clone()
    }

    /// Types of the networks and of the autoencoder.
    pub(crate) fn kinds(
        &self,
        config: &PipelineConfig,
        device: tch::Device,
    ) -> (tch::Kind, tch::Kind) {
        match self.kind(device) {
            tch::Kind::Half if config.vae.force_f32 && self.tiny_vae.is_none() => {
                (tch::Kind::Half, tch::Kind::Float)
            }
            kind => (kind, kind),
        }
    }

    fn kind(&self, device: tch::Device) -> tch::Kind {
        match (self.precision, device) {
            (Precision::F32, _) | (Precision::Auto, tch::Device::Cpu) => tch::Kind::Float,
            (Precision::F16 | Precision::Auto, _) => tch::Kind::Half,
            (Precision::Bf16, _) => tch::Kind::BFloat16,
        }
    }

    pub(crate) fn tile(&self) -> usize {
        match self.tile {
            0 => 128,
            tile => tile.max(32) as usize,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_known_by_name() {
        assert_eq!("auto".parse(), Ok(Device::Auto));
        assert_eq!("cuda:3".parse(), Ok(Device::Gpu(3)));
        assert_eq!("rocm".parse(), Ok(Device::Gpu(0)));
        let error = "cuda:x".parse::<Device>().unwrap_err().to_string();
        assert!(
            error.contains("\"cuda:x\"") && error.contains("use auto"),
            "{error}"
        );
    }
}
