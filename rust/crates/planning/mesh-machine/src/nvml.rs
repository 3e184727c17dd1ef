//! Name and memory of NVIDIA cards, from NVIDIA's management library. The library comes with the driver; its
//! absence is not an error.

use arcanum_profiler::gpu::{Gpu, Reported};
use nvml_wrapper::{Device, Nvml};

use crate::hardware::shown;

/// Adds the driver's reports to the cards in `gpus`, and adds cards that the PCI bus does not show (as under
/// WSL).
pub(crate) fn report(gpus: &mut Vec<Gpu>) {
    let found = LIBRARIES
        .iter()
        .map(|path| Nvml::builder().lib_path(path.as_ref()).init());
    let library = match found.reduce(Result::or) {
        Some(Ok(library)) => library,
        Some(Err(error)) => return tracing::debug!(%error, "no NVIDIA GPU"),
        None => return,
    };
    for index in 0..library.device_count().unwrap_or(0).min(MOST) {
        let read = library.device_by_index(index).ok();
        let Some(card) = read.and_then(|device| card(&device)) else {
            continue;
        };
        match gpus.iter_mut().find(|gpu| gpu.address == card.address) {
            Some(gpu) => gpu.reported = card.reported,
            None => gpus.push(card),
        }
    }
}

fn card(device: &Device<'_>) -> Option<Gpu> {
    let memory = device.memory_info().ok()?;
    let pci = device.pci_info().ok()?;
    let address = format!("{:04x}:{:02x}:{:02x}.0", pci.domain, pci.bus, pci.device);
    let (vendor_id, device_id) = (pci.pci_device_id as u16, (pci.pci_device_id >> 16) as u16);
    let mut gpu = Gpu::new(address, vendor_id, device_id, DISPLAY);
    let name = device.name().unwrap_or_else(|_| "NVIDIA GPU".into());
    gpu.reported = Some(Reported {
        name: shown(&name),
        vram_total: memory.total,
        vram_free: memory.free,
    });
    Some(gpu)
}

/// Paths of the library: the loader's own search, and NixOS, whose loader does not search that folder.
const LIBRARIES: [&str; 2] = [
    "libnvidia-ml.so.1",
    "/run/opengl-driver/lib/libnvidia-ml.so.1",
];
/// Cards in one machine.
const MOST: u32 = 32;
/// PCI class of a VGA controller.
const DISPLAY: u32 = 0x03_00_00;

#[cfg(test)]
mod tests {
    use std::path::Path;

    use arcanum_profiler::gpu::Vendor;

    use super::*;
    use crate::hardware::probe;

    #[test]
    fn every_card_that_the_library_knows_has_its_memory_once() {
        let mut gpus = probe(Path::new("/")).gpus;
        report(&mut gpus);
        let known = gpus.len();
        for gpu in gpus.iter().filter(|gpu| gpu.vendor == Vendor::Nvidia) {
            let Some(reported) = &gpu.reported else {
                continue;
            };
            assert!(
                reported.vram_free <= reported.vram_total && reported.vram_total > 0,
                "{gpu:?}"
            );
        }
        report(&mut gpus);
        assert_eq!(gpus.len(), known, "{gpus:?}");
    }
}
