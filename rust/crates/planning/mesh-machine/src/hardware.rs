//! Reads a machine's hardware from sysfs and procfs.

use std::collections::BTreeSet;
use std::fs::DirEntry;
use std::path::Path;

use arcanum_profiler::gpu::{Gfx, Gpu, Reported, Vendor};
use serde::Serialize;

use crate::files::kernel_text;
use crate::memory::Memory;

/// Hardware found on a machine. Unreadable values are left out and are not an error.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Hardware {
    /// Graphics cards and accelerators, in the order of their PCI addresses.
    pub gpus: Vec<Gpu>,
    /// Version of the loaded NVIDIA kernel module.
    pub nvidia_driver: Option<String>,
    /// True if AMD's compute driver is loaded: /dev/kfd exists.
    pub kfd: bool,
    /// The processor's model and abilities.
    pub cpu: Cpu,
    /// Memory of the machine, in bytes.
    pub memory_bytes: Option<u64>,
}

/// A processor: model, threads and vector instructions.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Cpu {
    /// Model name as the kernel reports it.
    pub model: Option<String>,
    /// Number of hardware threads.
    pub threads: usize,
    /// Vector instructions that the kernels use, the best last.
    pub vectors: Vec<&'static str>,
}

/// Reads the hardware below `root`, which is `/` except in tests.
pub fn probe(root: &Path) -> Hardware {
    let text = |path: &str| kernel_text(&root.join(path));
    let mut gpus = pci_gpus(&root.join("sys/bus/pci/devices"));
    let nodes = kfd_nodes(&root.join("sys/class/kfd/kfd/topology/nodes"));
    for gpu in gpus.iter_mut().filter(|gpu| gpu.vendor == Vendor::Amd) {
        gpu.gfx = nodes.iter().find(|node| node.is(gpu)).map(|node| node.gfx);
    }
    Hardware {
        gpus,
        nvidia_driver: text("proc/driver/nvidia/version").and_then(|text| nvidia_version(&text)),
        kfd: root.join("dev/kfd").exists(),
        cpu: cpu(&text("proc/cpuinfo").unwrap_or_default()),
        memory_bytes: Memory::read(root).installed,
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
            let folder = entry.path();
            let hex = |name| hex(&kernel_text(&folder.join(name))?);
            let vendor_id = u16::try_from(hex("vendor")?).ok()?;
            let device_id = u16::try_from(hex("device")?).ok()?;
            let class = hex("class")?;
            let counts = match class >> 8 {
                0x0300..=0x03ff => true,
                0x1200 => matches!(vendor_id, 0x10de | 0x1002),
                _ => false,
            };
            let address = entry.file_name().to_string_lossy().into_owned();
            let mut gpu = counts.then(|| Gpu::new(address, vendor_id, device_id, class))?;
            gpu.render_node = render_node(&folder.join("drm"));
            if gpu.vendor == Vendor::Amd {
                gpu.reported = amdgpu_report(&folder, device_id);
            }
            Some(gpu)
        })
        .collect();
    gpus.sort_by(|a, b| a.address.cmp(&b.address));
    gpus
}

/// The node through which programs without a screen compute on the card, where its driver made one.
fn render_node(drm: &Path) -> Option<String> {
    let names = std::fs::read_dir(drm).ok()?.flatten();
    let mut names = names.filter_map(|entry| entry.file_name().into_string().ok());
    names.find(|name| {
        let number = name.strip_prefix("renderD");
        number.is_some_and(|number| number.parse::<u8>().is_ok())
    })
}

/// Name and memory of an AMD card, as its driver (amdgpu) adds them to the card's folder.
fn amdgpu_report(folder: &Path, device_id: u16) -> Option<Reported> {
    let text = |file| Some(shown(&kernel_text(&folder.join(file))?));
    let number = |file| text(file)?.parse::<u64>().ok();
    let name = text("product_name").filter(|name| !name.is_empty());
    let total = number("mem_info_vram_total")?;
    Some(Reported {
        name: name.unwrap_or_else(|| format!("AMD GPU {device_id:#06x}")),
        vram_total: total,
        vram_free: total.saturating_sub(number("mem_info_vram_used").unwrap_or(0)),
    })
}

/// A name from outside, cut and without control characters.
pub(crate) fn shown(name: &str) -> String {
    let name = name.trim().chars().filter(|c| !c.is_control());
    name.take(80).collect()
}

/// Parses a number of sysfs, such as `0x10de\n`.
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
    let properties = |entry: DirEntry| kernel_text(&entry.path().join("properties"));
    let nodes = entries.flatten().filter_map(properties);
    nodes.filter_map(|text| kfd_node(&text)).collect()
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
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let is_version =
        |word: &&str| word.len() <= 32 && word.contains('.') && word.split('.').all(is_number);
    let mut words = text.lines().next()?.split_whitespace();
    words.find(is_version).map(str::to_owned)
}

fn cpu(text: &str) -> Cpu {
    let mut cpu = Cpu::default();
    let mut flags = BTreeSet::new();
    let (mut implementer, mut part) = (None, None);
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        match key.trim() {
            "processor" => cpu.threads += 1,
            "model name" => {
                cpu.model.get_or_insert_with(|| shown(value));
            }
            "CPU implementer" => {
                implementer.get_or_insert(value.trim());
            }
            "CPU part" => {
                part.get_or_insert(value.trim());
            }
            // x86 says flags, ARM says Features.
            "flags" | "Features" => flags.extend(value.split_whitespace()),
            _ => {}
        }
    }
    // ARM has no name there.
    let numbers = || Some(shown(&format!("ARM {}:{}", implementer?, part?)));
    cpu.model = cpu.model.or_else(numbers);
    let vectors = VECTORS.iter().filter(|(flag, _)| flags.contains(flag));
    cpu.vectors = vectors.map(|&(_, name)| name).collect();
    cpu
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::tree;

    #[test]
    fn amd_cards_have_the_name_and_memory_that_their_driver_reports() {
        const CARDS: &str = "sys/bus/pci/devices/0000:0";
        let mut files = Vec::new();
        for (card, vendor) in [(1, "0x1002"), (2, "0x8086"), (3, "0x1002")] {
            files.push((format!("{CARDS}{card}:00.0/vendor"), vendor));
            files.push((format!("{CARDS}{card}:00.0/device"), "0x744c\n"));
            files.push((format!("{CARDS}{card}:00.0/class"), "0x030000\n"));
        }
        for (path, text) in [
            ("1:00.0/product_name", "\n"),
            ("1:00.0/mem_info_vram_total", "25753026560\n"),
            ("1:00.0/mem_info_vram_used", "753026560\n"),
            ("2:00.0/mem_info_vram_total", "1\n"),
            ("3:00.0/mem_info_vram_total", "much\n"),
        ] {
            files.push((format!("{CARDS}{path}"), text));
        }
        let gpus = probe(tree(&files).path()).gpus;
        let reported = Reported {
            name: "AMD GPU 0x744c".into(),
            vram_total: 25_753_026_560,
            vram_free: 25_000_000_000,
        };
        let all: Vec<_> = gpus.into_iter().map(|gpu| gpu.reported).collect();
        assert_eq!(all, [Some(reported), None, None]);
    }

    #[test]
    fn processors_have_a_name() {
        let intel = cpu("processor: 0\nmodel name\t: Some CPU @ 2 GHz\n");
        assert_eq!(intel.model.as_deref(), Some("Some CPU @ 2 GHz"));
        let arm = cpu("CPU implementer : 0x41\nCPU part : 0xd0b\n");
        assert_eq!(arm.model.as_deref(), Some("ARM 0x41:0xd0b"));
        assert_eq!(cpu("").model, None);
    }
}
