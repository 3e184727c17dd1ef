//! What sysfs and procfs say about a machine.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use serde::Serialize;

use crate::files::kernel_text;
use crate::nvidia::Generation;

/// What was found. Nothing here is an error: what cannot be read is left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Hardware {
    /// Graphics cards and accelerators, in the order of their PCI addresses.
    pub gpus: Vec<Gpu>,
    /// Version of the loaded NVIDIA kernel module.
    pub nvidia_driver: Option<String>,
    /// Whether AMD's compute driver is there: /dev/kfd.
    pub kfd: bool,
    /// The processor.
    pub cpu: Cpu,
    /// Memory of the machine, in bytes.
    pub memory_bytes: Option<u64>,
}

/// A graphics card or accelerator on the PCI bus.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gpu {
    /// PCI address, such as `0000:01:00.0`.
    pub address: String,
    /// Who made it.
    pub vendor: Vendor,
    /// PCI vendor id.
    pub vendor_id: u16,
    /// PCI device id.
    pub device_id: u16,
    /// PCI class, 24 bits.
    pub class: u32,
    /// Whether there is silicon behind it.
    pub kind: Kind,
    /// NVIDIA: how old it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<Generation>,
    /// AMD: its instruction set, where the compute driver names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gfx: Option<Gfx>,
}

/// Whose cards are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vendor {
    /// NVIDIA.
    Nvidia,
    /// AMD, ATI before.
    Amd,
    /// Intel.
    Intel,
    /// Anybody else.
    Other,
}

/// Whether there is silicon behind a card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A card, or a real one handed through to a virtual machine.
    Real,
    /// A picture that a hypervisor draws.
    Virtual,
}

/// Version of AMD's instruction set, `gfx90a` being 9, 0, 10.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(into = "String")]
pub struct Gfx {
    /// Generation.
    pub major: u32,
    /// Family.
    pub minor: u32,
    /// Chip.
    pub step: u32,
}

/// The processor.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Cpu {
    /// Its name.
    pub model: Option<String>,
    /// Hardware threads.
    pub threads: usize,
    /// Vector instructions that the kernels use, the best last.
    pub vectors: Vec<&'static str>,
}

/// Reads the hardware below `root`, which is `/` but in tests.
pub fn probe(root: &Path) -> Hardware {
    let mut gpus = pci_gpus(&root.join("sys/bus/pci/devices"));
    let nodes = kfd_nodes(&root.join("sys/class/kfd/kfd/topology/nodes"));
    for gpu in gpus.iter_mut().filter(|gpu| gpu.vendor == Vendor::Amd) {
        gpu.gfx = nodes.iter().find(|node| node.is(gpu)).map(|node| node.gfx);
    }
    Hardware {
        gpus,
        nvidia_driver: kernel_text(&root.join("proc/driver/nvidia/version"))
            .and_then(|text| nvidia_version(&text)),
        kfd: root.join("dev/kfd").exists(),
        cpu: kernel_text(&root.join("proc/cpuinfo"))
            .map(|text| cpu(&text))
            .unwrap_or_default(),
        memory_bytes: kernel_text(&root.join("proc/meminfo")).and_then(|text| memory(&text)),
    }
}

impl Gpu {
    fn new(address: String, vendor_id: u16, device_id: u16, class: u32) -> Self {
        let vendor = match vendor_id {
            0x10de => Vendor::Nvidia,
            0x1002 => Vendor::Amd,
            0x8086 => Vendor::Intel,
            _ => Vendor::Other,
        };
        let kind = match VIRTUAL_VENDORS.iter().any(|(id, _)| *id == vendor_id) {
            true => Kind::Virtual,
            false => Kind::Real,
        };
        Self {
            address,
            vendor,
            vendor_id,
            device_id,
            class,
            kind,
            generation: (vendor == Vendor::Nvidia).then(|| Generation::of(device_id)),
            gfx: None,
        }
    }
}

/// `NVIDIA card 10de:1b80 at 0000:01:00.0 (Maxwell or Pascal)`.
impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let made_by = match self.vendor {
            Vendor::Nvidia => "NVIDIA card",
            Vendor::Amd => "AMD card",
            Vendor::Intel => "Intel graphics",
            Vendor::Other => VIRTUAL_VENDORS
                .iter()
                .find(|(id, _)| *id == self.vendor_id)
                .map_or("card", |(_, name)| name),
        };
        write!(
            f,
            "{made_by} {:04x}:{:04x} at {}",
            self.vendor_id, self.device_id, self.address
        )?;
        match (self.generation, self.gfx) {
            (Some(generation), _) => write!(f, " ({generation})"),
            (None, Some(gfx)) => write!(f, " ({gfx})"),
            (None, None) => Ok(()),
        }
    }
}

impl fmt::Display for Gfx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gfx{}{:x}{:x}", self.major, self.minor, self.step)
    }
}

impl From<Gfx> for String {
    fn from(gfx: Gfx) -> Self {
        gfx.to_string()
    }
}

/// Display controllers (class 03) of all makers, and processing accelerators (class 1200) of those whose cards count.
fn pci_gpus(devices: &Path) -> Vec<Gpu> {
    let Ok(entries) = std::fs::read_dir(devices) else {
        return Vec::new();
    };
    let mut gpus: Vec<Gpu> = entries
        .flatten()
        .filter_map(|entry| {
            let hex = |name| hex(&kernel_text(&entry.path().join(name))?);
            let vendor_id = u16::try_from(hex("vendor")?).ok()?;
            let device_id = u16::try_from(hex("device")?).ok()?;
            let class = hex("class")?;
            let counts = match class >> 8 {
                0x0300..=0x03ff => true,
                0x1200 => matches!(vendor_id, 0x10de | 0x1002),
                _ => false,
            };
            let address = entry.file_name().to_string_lossy().into_owned();
            counts.then(|| Gpu::new(address, vendor_id, device_id, class))
        })
        .collect();
    gpus.sort_by(|a, b| a.address.cmp(&b.address));
    gpus
}

/// `0x10de\n`.
fn hex(text: &str) -> Option<u32> {
    u32::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
}

/// A GPU as AMD's compute driver sees it.
struct KfdNode {
    device_id: u32,
    location: Option<u32>,
    gfx: Gfx,
}

impl KfdNode {
    fn is(&self, gpu: &Gpu) -> bool {
        let location = |address: &str| {
            let (bus, rest) = address.split_once(':')?.1.split_once(':')?;
            let (slot, function) = rest.split_once('.')?;
            let part = |text| u32::from_str_radix(text, 16).ok();
            Some(part(bus)? << 8 | part(slot)? << 3 | part(function)?)
        };
        self.device_id == u32::from(gpu.device_id)
            && match (self.location, location(&gpu.address)) {
                (Some(here), Some(there)) => here == there,
                _ => true,
            }
    }
}

fn kfd_nodes(nodes: &Path) -> Vec<KfdNode> {
    let Ok(entries) = std::fs::read_dir(nodes) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| kfd_node(&kernel_text(&entry.path().join("properties"))?))
        .collect()
}

/// A processor's node has the version 0.
fn kfd_node(properties: &str) -> Option<KfdNode> {
    let value = |name: &str| -> Option<u32> {
        properties.lines().find_map(|line| {
            let (key, value) = line.split_once(' ')?;
            (key == name).then(|| value.trim().parse().ok())?
        })
    };
    let version = value("gfx_target_version").filter(|&version| version > 0)?;
    Some(KfdNode {
        device_id: value("device_id")?,
        location: value("location_id"),
        gfx: Gfx {
            major: version / 10_000,
            minor: version / 100 % 100,
            step: version % 100,
        },
    })
}

/// The first word that looks like `595.71.05`.
fn nvidia_version(text: &str) -> Option<String> {
    let is_version = |word: &&str| {
        word.len() <= 32
            && word.contains('.')
            && word
                .split('.')
                .all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
    };
    text.lines()
        .next()?
        .split_whitespace()
        .find(is_version)
        .map(str::to_owned)
}

fn cpu(text: &str) -> Cpu {
    let mut cpu = Cpu::default();
    let mut flags = BTreeSet::new();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        match key.trim() {
            "processor" => cpu.threads += 1,
            "model name" => {
                cpu.model.get_or_insert_with(|| {
                    let shown = value.trim().chars().filter(|c| !c.is_control());
                    shown.take(80).collect()
                });
            }
            // x86 says flags, ARM says Features.
            "flags" | "Features" => flags.extend(value.split_whitespace()),
            _ => {}
        }
    }
    cpu.vectors = VECTORS
        .iter()
        .filter(|(flag, _)| flags.contains(flag))
        .map(|&(_, name)| name)
        .collect();
    cpu
}

/// `MemTotal:       16384 kB`.
fn memory(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

/// Makers of cards that exist in virtual machines only (pci.ids).
const VIRTUAL_VENDORS: &[(u16, &str)] = &[
    (0x1af4, "virtual card (virtio)"),
    (0x1b36, "virtual card (QXL)"),
    (0x15ad, "virtual card (VMware)"),
    (0x1414, "virtual card (Hyper-V)"),
    (0x1013, "virtual card (Cirrus)"),
    (0x1234, "virtual card (Bochs)"),
    (0x80ee, "virtual card (VirtualBox)"),
    (0x1ab8, "virtual card (Parallels)"),
];

/// The kernel's names, and ours.
const VECTORS: &[(&str, &str)] = &[
    ("avx", "AVX"),
    ("avx2", "AVX2"),
    ("avx_vnni", "AVX-VNNI"),
    ("avx512f", "AVX-512"),
    ("avx512_vnni", "AVX-512 VNNI"),
    ("asimd", "NEON"),
    ("neon", "NEON"),
    ("asimddp", "NEON dot product"),
];
