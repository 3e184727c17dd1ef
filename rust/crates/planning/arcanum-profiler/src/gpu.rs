//! GPUs and their memory: AMD's from sysfs, NVIDIA's from its management library. No driver is no GPU, never an error.

use std::path::Path;

use nvml_wrapper::Nvml;
use serde::{Deserialize, Serialize};

use crate::machine::kernel_text;

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// As its driver calls it.
    pub name: String,
    /// `nvidia` or `amd`.
    pub vendor: String,
    /// Its memory, bytes.
    pub vram_total: u64,
    /// Of which free, bytes.
    pub vram_free: u64,
}

/// All GPUs whose memory their driver tells.
pub(crate) fn all(root: &Path) -> Vec<Gpu> {
    let mut gpus = nvidia().unwrap_or_default();
    gpus.extend(amd(root));
    gpus.truncate(MOST);
    gpus
}

/// NVML comes with the driver; without the driver there is no library to load.
fn nvidia() -> Option<Vec<Gpu>> {
    let found = LIBRARIES
        .iter()
        .map(|path| Nvml::builder().lib_path(path.as_ref()).init());
    let library = match found.reduce(Result::or) {
        Some(Ok(library)) => library,
        Some(Err(error)) => {
            tracing::debug!(%error, "no NVIDIA GPU");
            return None;
        }
        None => return None,
    };
    let count = library.device_count().ok()?.min(MOST as u32);
    let gpus = (0..count).filter_map(|index| {
        let device = library.device_by_index(index).ok()?;
        let memory = device.memory_info().ok()?;
        Some(Gpu {
            name: clean(&device.name().unwrap_or_else(|_| "NVIDIA GPU".into())),
            vendor: "nvidia".into(),
            vram_total: memory.total,
            vram_free: memory.free,
        })
    });
    Some(gpus.collect())
}

/// The amdgpu driver's files.
fn amd(root: &Path) -> Vec<Gpu> {
    let Ok(entries) = std::fs::read_dir(root.join("sys/class/drm")) else {
        return Vec::new();
    };
    let mut cards: Vec<String> = entries
        .flatten()
        .take(1024)
        .filter_map(|entry| entry.file_name().into_string().ok())
        // card0, not its outputs: card0-HDMI-A-1.
        .filter(|name| {
            let number = name.strip_prefix("card");
            number.is_some_and(|number| number.parse::<u16>().is_ok())
        })
        .collect();
    cards.sort();
    cards
        .iter()
        .filter_map(|card| {
            let text =
                |file: &str| kernel_text(root, &format!("sys/class/drm/{card}/device/{file}"));
            let number = |file: &str| text(file)?.trim().parse::<u64>().ok();
            if text("vendor")?.trim() != "0x1002" {
                return None;
            }
            let total = number("mem_info_vram_total")?;
            let name = text("product_name")
                .map(|name| clean(&name))
                .filter(|name| !name.is_empty())
                .unwrap_or_else(|| {
                    let device = text("device").unwrap_or_default();
                    clean(&format!("AMD GPU {}", device.trim()))
                });
            Some(Gpu {
                name,
                vendor: "amd".into(),
                vram_total: total,
                vram_free: total.saturating_sub(number("mem_info_vram_used").unwrap_or(0)),
            })
        })
        .collect()
}

fn clean(name: &str) -> String {
    name.trim()
        .chars()
        .filter(|c| !c.is_control())
        .take(80)
        .collect()
}

/// Where the system's loader finds it; and NixOS, whose loader does not look there by itself.
const LIBRARIES: [&str; 2] = [
    "libnvidia-ml.so.1",
    "/run/opengl-driver/lib/libnvidia-ml.so.1",
];
/// GPUs in one machine.
const MOST: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amd_cards_are_found_by_their_memory() {
        let root = tempfile::tempdir().expect("a folder");
        let file = |path: &str, text: &str| {
            let path = root.path().join("sys/class/drm").join(path);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            std::fs::write(path, text).expect("written");
        };
        file("card1/device/vendor", "0x1002\n");
        file("card1/device/device", "0x744c\n");
        file("card1/device/product_name", "\n");
        file("card1/device/mem_info_vram_total", "25753026560\n");
        file("card1/device/mem_info_vram_used", "753026560\n");
        file("card1-DP-1/status", "connected\n");
        file("card0/device/vendor", "0x8086\n");
        file("card0/device/mem_info_vram_total", "1\n");
        file("card2/device/vendor", "0x1002\n");
        file("card2/device/mem_info_vram_total", "much\n");
        assert_eq!(
            amd(root.path()),
            [Gpu {
                name: "AMD GPU 0x744c".into(),
                vendor: "amd".into(),
                vram_total: 25_753_026_560,
                vram_free: 25_000_000_000,
            }]
        );
        assert!(amd(Path::new("/nowhere")).is_empty());
    }

    #[test]
    fn a_machine_without_nvidias_library_has_no_nvidia_gpu() {
        for gpu in nvidia().unwrap_or_default() {
            assert!(
                gpu.vram_free <= gpu.vram_total && gpu.vram_total > 0,
                "{gpu:?}"
            );
        }
    }
}
