//! The instruction sets that the kernels can use.
//!
//! **Two groups give the same bits.** [`Isa::Scalar`], [`Isa::Sse2`], [`Isa::Sse41`] and [`Isa::Avx`] round a
//! product before they add it; the others fuse both, with one rounding. Within a group all results are equal;
//! the groups differ in the last bits of floats. Integer products are exact everywhere.
//!
//! The choice depends on the CPU's features alone: the last of [`Isa::ALL`] that it has. Each set does the
//! work of the one before it in fewer instructions of the same kinds, so a measurement at the start could
//! only add noise, and two runs on one machine could differ in the last bits.

use std::sync::OnceLock;

/// An instruction set that the kernels were written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable Rust: every CPU.
    Scalar,
    /// SSE2: every x86-64 CPU, such as Athlon 64 and Phenom.
    Sse2,
    /// SSE4.1 and SSSE3: Intel since 2008.
    Sse41,
    /// AVX, and F16C where the CPU has it: Sandy Bridge, Ivy Bridge, Bulldozer, Piledriver.
    Avx,
    /// AVX2 with FMA and F16C: Haswell, Excavator, Zen and later.
    Avx2,
    /// AVX2 with FMA, F16C and AVX-VNNI: Alder Lake, Zen 5 and later.
    AvxVnni,
    /// AVX-512 F, BW, DQ, VL: Skylake-X.
    Avx512Bw,
    /// The same with VNNI: Cascade Lake, Ice Lake, Zen 4 and later.
    Avx512,
    /// aarch64 NEON as in ARMv8.0: Cortex-A53, A57, A72.
    NeonV8,
    /// NEON with the dot product instructions: Cortex-A55, A76, Apple M1 and later.
    Neon,
    /// The same with the 8-bit integer matrix extension: Cortex-A510, A710, Neoverse V1, Apple M2 and later.
    NeonI8mm,
}

/// `HYDRAMESH_ISA` names no instruction set that this CPU runs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("HYDRAMESH_ISA={name:?} names no instruction set of this CPU; it has {available}")]
pub struct UnknownIsa {
    name: String,
    available: String,
}

impl Isa {
    /// Every instruction set, slowest first.
    pub const ALL: [Isa; 11] = [
        Isa::Scalar,
        Isa::Sse2,
        Isa::Sse41,
        Isa::Avx,
        Isa::Avx2,
        Isa::AvxVnni,
        Isa::Avx512Bw,
        Isa::Avx512,
        Isa::NeonV8,
        Isa::Neon,
        Isa::NeonI8mm,
    ];

    /// The fastest instruction set of this CPU.
    pub fn detect() -> Isa {
        Isa::available().last().copied().unwrap_or(Isa::Scalar)
    }

    /// [`Isa::requested`], or [`Isa::detect`] where nothing usable was requested. Read once.
    pub fn current() -> Isa {
        static CURRENT: OnceLock<Isa> = OnceLock::new();
        *CURRENT.get_or_init(|| {
            let requested = Isa::requested().ok().flatten();
            requested.unwrap_or_else(Isa::detect)
        })
    }

    /// The instruction set that the environment variable `HYDRAMESH_ISA` names; `None` without the variable.
    ///
    /// # Errors
    /// When this CPU runs none of that name. The error lists those that it runs.
    pub fn requested() -> Result<Option<Isa>, UnknownIsa> {
        match std::env::var_os("HYDRAMESH_ISA") {
            Some(name) if !name.is_empty() => Isa::named(&name.to_string_lossy()).map(Some),
            _ => Ok(None),
        }
    }

    /// The instruction set that `HYDRAMESH_ISA` names with this value; upper and lower case are the same.
    ///
    /// # Errors
    /// As [`Isa::requested`].
    pub fn named(name: &str) -> Result<Isa, UnknownIsa> {
        Isa::from_name(name)
            .filter(|isa| isa.is_available())
            .ok_or_else(|| UnknownIsa {
                name: name.chars().take(32).collect(),
                available: Isa::available()
                    .iter()
                    .map(|isa| isa.name())
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }

    /// The instruction sets of this CPU, slowest first.
    pub fn available() -> Vec<Isa> {
        Isa::ALL
            .into_iter()
            .filter(|isa| isa.is_available())
            .collect()
    }

    /// True if this CPU has the instructions.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Sse2 => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Sse41 => is_x86_feature_detected!("sse4.1") && is_x86_feature_detected!("ssse3"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx => is_x86_feature_detected!("avx"),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => Isa::Avx2.is_available() && has_avx_vnni(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bw => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Isa::Avx512Bw.is_available() && is_x86_feature_detected!("avx512vnni"),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonV8 => std::arch::is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => {
                Isa::NeonV8.is_available() && std::arch::is_aarch64_feature_detected!("dotprod")
            }
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm => {
                Isa::Neon.is_available() && std::arch::is_aarch64_feature_detected!("i8mm")
            }
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// The name used in `HYDRAMESH_ISA` and in logs.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Sse2 => "sse2",
            Isa::Sse41 => "sse41",
            Isa::Avx => "avx",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512Bw => "avx512bw",
            Isa::Avx512 => "avx512",
            Isa::NeonV8 => "neonv8",
            Isa::Neon => "neon",
            Isa::NeonI8mm => "neoni8mm",
        }
    }

    fn from_name(name: &str) -> Option<Isa> {
        Isa::ALL
            .into_iter()
            .find(|isa| isa.name().eq_ignore_ascii_case(name.trim()))
    }

    /// True if products are rounded before they are added: the group of sets without fused operations.
    pub fn rounds_products(self) -> bool {
        matches!(self, Isa::Scalar | Isa::Sse2 | Isa::Sse41 | Isa::Avx)
    }

    /// Most rows that one register tile takes.
    pub(crate) fn tile_rows(self) -> usize {
        match self {
            Isa::Avx512Bw | Isa::Avx512 => 8,
            Isa::Sse2 | Isa::Sse41 | Isa::Avx | Isa::Avx2 | Isa::AvxVnni => 4,
            Isa::NeonV8 => 2,
            Isa::Neon | Isa::NeonI8mm => 4,
            Isa::Scalar => 1,
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx_vnni() -> bool {
    if cfg!(feature = "evex-vnni") {
        is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512vnni")
    } else {
        is_x86_feature_detected!("avxvnni")
    }
}
