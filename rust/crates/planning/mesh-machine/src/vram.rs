//! Free memory of graphics cards.

use std::path::Path;

use arcanum_profiler::gpu::{Gpu, Vendor};
use mesh_engine_ort::Provider;

use crate::hardware::probe;
use crate::nvml;

/// Free memory in bytes of the card that `provider` computes on, as the driver below `root` reports it; `None`
/// where it reports nothing. Of several cards of a maker the least counts: which one computes is the
/// provider's choice.
pub fn free_vram(root: &Path, provider: Provider) -> Option<u64> {
    let vendor = match provider.name() {
        "cuda" => Vendor::Nvidia,
        "migraphx" => Vendor::Amd,
        _ => return None,
    };
    let mut gpus = probe(root).gpus;
    nvml::report(&mut gpus);
    least(&gpus, vendor)
}

fn least(gpus: &[Gpu], vendor: Vendor) -> Option<u64> {
    let cards = gpus.iter().filter(|gpu| gpu.vendor == vendor);
    let free = cards.filter_map(|gpu| Some(gpu.reported.as_ref()?.vram_free));
    free.min()
}

#[cfg(test)]
mod tests {
    use arcanum_profiler::gpu::Reported;

    use super::*;

    #[test]
    fn of_several_cards_of_a_maker_the_one_with_the_least_counts() {
        let card = |vendor_id, free: Option<u64>| {
            let mut gpu = Gpu::new("0000:01:00.0".into(), vendor_id, 1, 0x03_00_00);
            gpu.reported = free.map(|vram_free| Reported {
                name: "card".into(),
                vram_total: 100,
                vram_free,
            });
            gpu
        };
        let gpus = [
            card(0x10de, Some(8)),
            card(0x10de, Some(6)),
            card(0x10de, None),
            card(0x1002, Some(3)),
        ];
        assert_eq!(least(&gpus, Vendor::Nvidia), Some(6));
        assert_eq!(least(&gpus, Vendor::Amd), Some(3));
        assert_eq!(least(&gpus, Vendor::Intel), None);
        assert_eq!(free_vram(Path::new("/nowhere"), Provider::Cpu), None);
    }
}
