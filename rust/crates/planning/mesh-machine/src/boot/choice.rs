//! Chooses the backend for the hardware found, with the reason.

use std::fmt;
use std::str::FromStr;

use arcanum_profiler::generation::Generation;
use arcanum_profiler::gpu::{Gfx, Gpu, GpuKind, Vendor};
use serde::Serialize;

use crate::hardware::Hardware;

/// A backend of the live image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The processor, without a GPU.
    Cpu,
    /// NVIDIA GPUs, through CUDA.
    Nvidia,
    /// AMD GPUs, through ROCm.
    Rocm,
    /// Any GPU with a Vulkan driver, through WebGPU.
    WebGpu,
}

impl Backend {
    /// All backends.
    pub const ALL: [Self; 4] = [Self::Cpu, Self::Nvidia, Self::Rocm, Self::WebGpu];
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Nvidia => "nvidia",
            Self::Rocm => "rocm",
            Self::WebGpu => "webgpu",
        })
    }
}

/// Requests and limits for the choice of a backend.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wish {
    /// A backend; `None` lets the hardware decide.
    pub backend: Option<Backend>,
    /// The kernel was started with `nomodeset`: the graphics drivers stay out.
    pub nomodeset: bool,
    /// The machine runs NVIDIA's legacy driver (branch 580), which drives cards from Maxwell on.
    pub nvidia_legacy: bool,
    /// The image has no programs for NVIDIA cards.
    pub without_nvidia: bool,
    /// The image has no programs for AMD cards.
    pub without_rocm: bool,
    /// The image has no programs that compute through Vulkan.
    pub without_webgpu: bool,
}

/// The value of `backend` that lets the hardware decide.
pub const AUTO: &str = "auto";

impl Wish {
    /// Reads `auto`, `cpu`, `nvidia`, `rocm` or `webgpu`.
    ///
    /// # Errors
    /// A message that lists the valid words.
    pub fn parse_backend(text: &str) -> Result<Option<Backend>, String> {
        if text == AUTO {
            return Ok(None);
        }
        text.parse().map(Some)
    }
}

impl FromStr for Backend {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|backend| backend.to_string() == text)
            .ok_or_else(|| "there are auto, cpu, nvidia, rocm and webgpu".to_owned())
    }
}

/// The chosen backend, the reason, and the cards that it leaves unused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// The chosen backend.
    pub backend: Backend,
    /// Reason for the choice, as a sentence.
    pub reason: String,
    /// Cards that are not used.
    pub left_out: Vec<LeftOut>,
}

/// A card that is not used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// Description of the card.
    pub gpu: String,
    /// Reason why it is not used.
    pub why: String,
}

/// Chooses the backend: an NVIDIA card that the image's driver supports, else an AMD card that ROCm can use, else a card
/// with a Vulkan driver, else the processor. A wish is followed where the hardware allows it.
pub fn choose(hardware: &Hardware, wish: Wish) -> Choice {
    let judge = |gpu| (gpu, judge(gpu, hardware, wish));
    let judged: Vec<(&Gpu, Verdict)> = hardware.gpus.iter().map(judge).collect();
    let best = |backend| {
        let cards = judged.iter();
        let usable = cards.filter_map(move |(gpu, verdict)| {
            let (sure, note) = verdict.with(backend)?;
            Some((*gpu, sure, note))
        });
        // A card that is known to work goes before one that is tried.
        usable.max_by_key(|(gpu, sure, _)| (*sure, std::cmp::Reverse(&gpu.address)))
    };
    let on_cpu = |why: &str| (Backend::Cpu, why.to_owned());
    let (backend, reason) = match wish.backend {
        _ if wish.nomodeset => on_cpu(
            "safe graphics (nomodeset) keeps the graphics drivers out, so the processor computes",
        ),
        Some(Backend::Cpu) => on_cpu("CPU only was asked for at boot"),
        Some(backend) => match best(backend) {
            Some((gpu, _, note)) => {
                let reason =
                    format!("{backend} was asked for at boot, and there is an {gpu}; {note}");
                (backend, reason)
            }
            None => on_cpu(&format!(
                "{backend} was asked for at boot, but no card here can be used with it, so the processor computes"
            )),
        },
        None => {
            let vendors = by_vendor(best(Backend::Nvidia), best(Backend::Rocm));
            vendors.unwrap_or_else(|| any_card(best(Backend::WebGpu), &hardware.gpus))
        }
    };
    let left_out = judged
        .iter()
        .filter_map(|(gpu, verdict)| {
            let why = match verdict.uses.first() {
                _ if verdict.with(backend).is_some() => return None,
                Some(CardUse { with, .. }) if backend == Backend::Cpu => {
                    format!("it could be used with hydramesh.backend={with}")
                }
                Some(CardUse { with, .. }) => {
                    format!("one worker uses one backend; hydramesh.backend={with} takes this card instead")
                }
                None => verdict.why_not.clone(),
            };
            let gpu = gpu.to_string();
            Some(LeftOut { gpu, why })
        })
        .collect();
    Choice {
        backend,
        reason,
        left_out,
    }
}

type Found<'a> = Option<(&'a Gpu, bool, &'a str)>;

/// The card that its maker's own libraries compute on.
fn by_vendor(nvidia: Found<'_>, amd: Found<'_>) -> Option<(Backend, String)> {
    let sure = |found: Found<'_>| found.is_some_and(|(_, sure, _)| sure);
    // A guess about an NVIDIA card does not push aside an AMD card that is known to work.
    let nvidia_first = sure(nvidia) || !sure(amd);
    match (nvidia, amd) {
        (Some((gpu, _, note)), amd) if nvidia_first => {
            let aside = match amd {
                Some(_) => "; of an NVIDIA and an AMD card the NVIDIA card is taken",
                None => "",
            };
            Some((Backend::Nvidia, format!("there is an {gpu}; {note}{aside}")))
        }
        (_, Some((gpu, _, note))) => Some((Backend::Rocm, format!("there is an {gpu}; {note}"))),
        _ => None,
    }
}

/// A card with a Vulkan driver, else the processor.
fn any_card(vulkan: Found<'_>, gpus: &[Gpu]) -> (Backend, String) {
    if let Some((gpu, _, note)) = vulkan {
        let article = match gpu.vendor {
            Vendor::Other => "a",
            Vendor::Nvidia | Vendor::Amd | Vendor::Intel => "an",
        };
        return (Backend::WebGpu, format!("there is {article} {gpu}; {note}"));
    }
    let why = if gpus.is_empty() {
        "no graphics card was found"
    } else if gpus.iter().all(|gpu| gpu.kind == GpuKind::Virtual) {
        "the only graphics here are a virtual machine's, which cannot compute"
    } else {
        "no graphics card here can be used for computing"
    };
    (Backend::Cpu, format!("{why}, so the processor computes"))
}

/// The backends that can use a card, the preferred one first.
struct Verdict {
    uses: Vec<CardUse>,
    /// Reason why its maker's libraries do not use it; empty if they do.
    why_not: String,
}

/// A backend that can use a card.
struct CardUse {
    with: Backend,
    /// The card is known to work with it.
    sure: bool,
    note: String,
}

impl Verdict {
    fn with(&self, backend: Backend) -> Option<(bool, &str)> {
        let found = self.uses.iter().find(|card| card.with == backend)?;
        Some((found.sure, &found.note))
    }
}

fn judge(gpu: &Gpu, hardware: &Hardware, wish: Wish) -> Verdict {
    let (mut uses, why_not) = match by_its_maker(gpu, hardware, wish) {
        Ok(card) => (vec![card], String::new()),
        Err(why) => (Vec::new(), why),
    };
    // A driver with a render node has a Vulkan driver beside it on the image; whether that suffices, and is faster than
    // the processor, is measured when a model is loaded.
    let reachable = gpu.render_node.is_some() && gpu.kind == GpuKind::Real;
    if reachable && !wish.without_webgpu {
        let tried = "it is tried through Vulkan, and the processor computes where it is faster";
        let note = match why_not.is_empty() {
            true => tried.to_owned(),
            false => format!("{why_not}; {tried}"),
        };
        let (with, sure) = (Backend::WebGpu, false);
        uses.push(CardUse { with, sure, note });
    }
    Verdict { uses, why_not }
}

/// The use by the libraries of the card's maker, or the reason against it.
fn by_its_maker(gpu: &Gpu, hardware: &Hardware, wish: Wish) -> Result<CardUse, String> {
    let leave_out = |why: &str| Err(why.to_owned());
    match (gpu.kind, gpu.vendor) {
        (GpuKind::Virtual, _) => leave_out("it is a virtual machine's display and cannot compute"),
        (GpuKind::Real, Vendor::Nvidia) if wish.without_nvidia => leave_out(
            "this image has no programs for NVIDIA cards; the images iso-nvidia and iso-all have them",
        ),
        (GpuKind::Real, Vendor::Amd) if wish.without_rocm => {
            leave_out("this image has no programs for AMD cards; the image iso-all has them")
        }
        (GpuKind::Real, Vendor::Nvidia) => judge_nvidia(gpu, hardware, wish.nvidia_legacy),
        (GpuKind::Real, Vendor::Amd) => judge_amd(gpu, hardware),
        (GpuKind::Real, Vendor::Intel | Vendor::Other) => {
            leave_out("Vulkan alone reaches such a GPU")
        }
    }
}

/// By the image's driver: branch 595 with the open kernel modules, or with `legacy` branch 580.
///
/// The open modules need Turing or newer: the list of supported cards in the README of NVIDIA/open-gpu-kernel-modules begins
/// with device 1E02. Maxwell, Pascal and Volta need branch 580, whose kernel module cannot be loaded beside this one: an entry of
/// the boot menu starts the system with it.
fn judge_nvidia(gpu: &Gpu, hardware: &Hardware, legacy: bool) -> Result<CardUse, String> {
    let driver = match &hardware.nvidia_driver {
        Some(version) => format!("NVIDIA's driver {version} is loaded"),
        None => "NVIDIA's driver is not loaded yet, and the worker falls back to the processor should it not come".to_owned(),
    };
    let usable = |sure, note| {
        let with = Backend::Nvidia;
        Ok(CardUse { with, sure, note })
    };
    match gpu.generation.unwrap_or(Generation::Unknown) {
        Generation::TuringOrNewer => usable(true, driver),
        // Trying does no harm, since a worker falls back to the processor.
        Generation::Unknown => {
            let note = format!("this program does not know the card, so it is tried; {driver}");
            usable(false, note)
        }
        // Whether CUDA's libraries still have kernels for it shows when a model is loaded.
        Generation::MaxwellOrPascal | Generation::Volta if legacy => {
            let note = format!("the legacy driver drives the card, and CUDA is tried on it; {driver}");
            usable(false, note)
        }
        Generation::Older => Err(
            "it is too old: no driver that is still maintained supports it".to_owned(),
        ),
        Generation::MaxwellOrPascal | Generation::Volta => Err(
            "this driver (branch 595) needs Turing or newer; this card needs branch 580: choose \"older NVIDIA\" in the \
             boot menu"
                .to_owned(),
        ),
    }
}

fn judge_amd(gpu: &Gpu, hardware: &Hardware) -> Result<CardUse, String> {
    if !hardware.kfd {
        return Err(
            "the amdgpu driver offers no computing on it (/dev/kfd is missing): the card is too old, or the driver did not start"
                .to_owned(),
        );
    }
    if let Some(gfx) = gpu.gfx.filter(|gfx| *gfx < OLDEST_GFX) {
        return Err(format!(
            "it is {gfx}; ROCm needs {OLDEST_GFX} (Vega) or newer"
        ));
    }
    let note = match gpu.gfx {
        Some(gfx) => format!("AMD's compute driver knows it as {gfx}"),
        None => "AMD's compute driver is there but does not name the card's type, so it is tried, and the worker falls back to \
                 the processor"
            .to_owned(),
    };
    Ok(CardUse {
        with: Backend::Rocm,
        sure: gpu.gfx.is_some(),
        note,
    })
}

/// Polaris (gfx803) and before left ROCm with its version 5 and 6.
const OLDEST_GFX: Gfx = Gfx {
    major: 9,
    minor: 0,
    step: 0,
};
