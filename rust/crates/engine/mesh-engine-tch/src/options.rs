//! Options of a loaded model.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

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

/// Options of a loaded model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    /// The device that computes.
    pub device: Device,
    /// Type of weights and activations.
    pub precision: Precision,
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
    pub(crate) fn kind(&self, device: tch::Device) -> tch::Kind {
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
