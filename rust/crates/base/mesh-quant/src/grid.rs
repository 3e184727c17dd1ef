//! The grids of the IQ types: tables of the groups of values that occur.

/// One grid. An entry has 16 bits: the numbers of its values in the type's list of magnitudes, the first one
/// lowest.
pub(crate) struct Grid {
    /// Bits of one value.
    bits: u32,
    /// Values in an entry: a multiple of this grid's entry has as many weights.
    pub(crate) group: usize,
    entries: &'static [u8],
}

/// All grids, one after the other; `data/make_grids.py` writes the file.
const ALL: &[u8] = include_bytes!("../data/grids.bin");

pub(crate) const IQ2_XXS: Grid = Grid::new(2, 8, 0, 256);
pub(crate) const IQ2_XS: Grid = Grid::new(2, 8, 256, 512);
pub(crate) const IQ2_S: Grid = Grid::new(2, 8, 768, 1024);
pub(crate) const IQ3_XXS: Grid = Grid::new(3, 4, 1792, 256);
pub(crate) const IQ3_S: Grid = Grid::new(3, 4, 2048, 512);
pub(crate) const IQ1: Grid = Grid::new(2, 8, 2560, 2048);

impl Grid {
    const fn new(bits: u32, group: usize, first: usize, count: usize) -> Grid {
        let (entries, _) = ALL.split_at(2 * (first + count));
        Grid {
            bits,
            group,
            entries: entries.split_at(2 * first).1,
        }
    }

    /// The numbers of the values of entry `index`, which wraps around at the end of the grid.
    #[inline(always)]
    pub(crate) fn entry(&self, index: usize) -> impl Iterator<Item = u8> + use<> {
        let (bits, group) = (self.bits, self.group);
        let at = 2 * (index % (self.entries.len() / 2));
        let entry = u16::from_le_bytes([self.entries[at], self.entries[at + 1]]);
        (0..group).map(move |i| (entry >> (bits * i as u32)) as u8 & ((1 << bits) - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grids_fill_the_file_and_hold_only_numbers_that_have_a_magnitude() {
        let grids = [IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ1];
        let bytes: usize = grids.iter().map(|grid| grid.entries.len()).sum();
        assert_eq!(bytes, ALL.len());
        for grid in grids {
            let count = grid.entries.len() / 2;
            let most = if grid.bits == 2 { 2 } else { 7 };
            let highest = (0..count).flat_map(|index| grid.entry(index)).max();
            assert_eq!(highest, Some(most));
            let mut entries: Vec<Vec<u8>> = (0..count).map(|i| grid.entry(i).collect()).collect();
            entries.sort();
            entries.dedup();
            assert_eq!(entries.len(), count, "an entry is there twice");
        }
    }
}
