//! The generation of an NVIDIA card, by its PCI device id.
//!
//! The ranges were taken from the chip names in pci.ids (<https://pci-ids.ucw.cz>, 2026-05-24).

use std::fmt;

use serde::Serialize;

/// Architecture generation of an NVIDIA card, oldest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Generation {
    /// Kepler, Fermi and before: no driver that still gets updates.
    Older,
    /// Maxwell or Pascal, 2014 to 2017.
    MaxwellOrPascal,
    /// Volta, 2017.
    Volta,
    /// Turing, 2018, or anything since.
    TuringOrNewer,
    /// An id that is not in the table.
    Unknown,
}

impl Generation {
    /// The generation that a PCI device id belongs to.
    pub fn of(device_id: u16) -> Self {
        let mut ranges = RANGES.iter();
        let range = ranges.find(|(first, last, _)| (*first..=*last).contains(&device_id));
        range.map_or(Self::Unknown, |&(_, _, generation)| generation)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Older => "Kepler or older",
            Self::MaxwellOrPascal => "Maxwell or Pascal",
            Self::Volta => "Volta",
            Self::TuringOrNewer => "Turing or newer",
            Self::Unknown => "unknown generation",
        })
    }
}

/// First and last device id of a range, with its generation. Chipsets and sound chips lie there, too; the PCI
/// class tells them apart.
const RANGES: &[(u16, u16, Generation)] = &[
    (0x0000, 0x133f, Generation::Older),
    (0x1340, 0x1d7f, Generation::MaxwellOrPascal),
    (0x1d80, 0x1dff, Generation::Volta),
    (0x1e00, 0x33ff, Generation::TuringOrNewer),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_fall_into_their_generation() {
        let cards = [
            (0x06c0, Generation::Older),           // GF100, GeForce GTX 480
            (0x0fc6, Generation::Older),           // GK107, GeForce GTX 650
            (0x1287, Generation::Older),           // GK208B, GeForce GT 730
            (0x1340, Generation::MaxwellOrPascal), // GM108M, GeForce 830M
            (0x1380, Generation::MaxwellOrPascal), // GM107, GeForce GTX 750 Ti
            (0x17fd, Generation::MaxwellOrPascal), // GM200GL, Tesla M40
            (0x1b80, Generation::MaxwellOrPascal), // GP104, GeForce GTX 1080
            (0x1d10, Generation::MaxwellOrPascal), // GP108M, GeForce MX150
            (0x1d81, Generation::Volta),           // GV100, TITAN V
            (0x1df6, Generation::Volta),           // GV100GL, Tesla V100S
            (0x1e02, Generation::TuringOrNewer),   // TU102, TITAN RTX
            (0x1f82, Generation::TuringOrNewer),   // TU117, GeForce GTX 1650
            (0x2204, Generation::TuringOrNewer),   // GA102, GeForce RTX 3090
            (0x2684, Generation::TuringOrNewer),   // AD102, GeForce RTX 4090
            (0x2b85, Generation::TuringOrNewer),   // GB202, GeForce RTX 5090
            (0xfff0, Generation::Unknown),
        ];
        for (id, generation) in cards {
            assert_eq!(Generation::of(id), generation, "{id:04x}");
        }
    }

    #[test]
    fn the_ranges_are_in_order_and_do_not_overlap() {
        for pair in RANGES.windows(2) {
            assert!(pair[0].0 <= pair[0].1 && pair[0].1 < pair[1].0);
        }
    }
}
