//! Merkle trees as in RFC 6962, section 2.1, and their tiles as in C2SP's tlog-tiles.

use sha2::{Digest, Sha256};

/// SHA-256 of a leaf or of two subtrees.
pub type Hash = [u8; 32];

/// Hashes in a full tile: a subtree of height 8.
pub const TILE_WIDTH: usize = 256;
/// Levels of tiles of the largest tree: 2^64 leaves.
pub const MOST_LEVELS: usize = 8;

/// Hash of an entry.
pub fn leaf_hash(entry: &[u8]) -> Hash {
    let mut hasher = Sha256::new();
    hasher.update([0]);
    hasher.update(entry);
    hasher.finalize().into()
}

/// Hash of two neighbouring subtrees.
pub fn node_hash(left: &Hash, right: &Hash) -> Hash {
    let mut hasher = Sha256::new();
    hasher.update([1]);
    hasher.update(left);
    hasher.update(right);
    hasher.finalize().into()
}

/// Root of the empty tree.
pub fn empty_root() -> Hash {
    Sha256::digest([]).into()
}

/// Root over subtrees of the same size, of which the last may not be complete in its own tree.
pub fn root_of(hashes: &[Hash]) -> Hash {
    let mut stack = Stack::default();
    for hash in hashes {
        stack.push(0, *hash);
    }
    stack.root()
}

/// Complete subtrees from left to right, each higher than the next one.
#[derive(Debug, Default)]
struct Stack(Vec<(u32, Hash)>);

impl Stack {
    fn push(&mut self, height: u32, hash: Hash) {
        let (mut height, mut hash) = (height, hash);
        while let Some((_, left)) = self.0.pop_if(|(top, _)| *top == height) {
            hash = node_hash(&left, &hash);
            height += 1;
        }
        self.0.push((height, hash));
    }

    fn root(mut self) -> Hash {
        let Some((_, mut root)) = self.0.pop() else {
            return empty_root();
        };
        while let Some((_, left)) = self.0.pop() {
            root = node_hash(&left, &root);
        }
        root
    }
}

/// A full tile: its level, its index within the level, and its 256 hashes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tile {
    /// 0 has the hashes of leaves.
    pub level: u8,
    /// Place within the level.
    pub index: u64,
    /// The hashes, 256 of a full tile.
    pub hashes: Vec<Hash>,
}

/// The right edge of a growing tree: for each level the hashes of its last, partial tile.
#[derive(Debug, Clone, Default)]
pub struct Edge {
    size: u64,
    levels: Vec<Vec<Hash>>,
}

impl Edge {
    /// The edge of a tree of `size` leaves, by the hashes of its partial tiles from level 0 up. `None` if
    /// their numbers are not those of such a tree.
    pub fn from_partial_tiles(size: u64, levels: Vec<Vec<Hash>>) -> Option<Self> {
        let fits = |(level, hashes): (usize, &Vec<Hash>)| hashes.len() == width(size, level as u8);
        let known = levels.len() <= MOST_LEVELS && levels.iter().enumerate().all(fits);
        let above = (levels.len()..MOST_LEVELS).all(|level| width(size, level as u8) == 0);
        (known && above).then_some(Self { size, levels })
    }

    /// Number of leaves.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Adds a leaf; `full` gets the tiles that are complete with it.
    pub fn push(&mut self, leaf: Hash, full: &mut Vec<Tile>) {
        let (mut level, mut hash) = (0, leaf);
        self.size += 1;
        loop {
            if self.levels.len() == level {
                self.levels.push(Vec::with_capacity(TILE_WIDTH));
            }
            let hashes = &mut self.levels[level];
            hashes.push(hash);
            if hashes.len() < TILE_WIDTH {
                return;
            }
            let hashes = std::mem::replace(hashes, Vec::with_capacity(TILE_WIDTH));
            hash = root_of(&hashes);
            let leaves_shift = 8 * (level as u32 + 1);
            full.push(Tile {
                level: level as u8,
                index: self.size.checked_shr(leaves_shift).unwrap_or(0) - 1,
                hashes,
            });
            level += 1;
        }
    }

    /// Root of the tree.
    pub fn root(&self) -> Hash {
        let mut stack = Stack::default();
        for (level, hashes) in self.levels.iter().enumerate().rev() {
            for hash in hashes {
                stack.push(8 * level as u32, *hash);
            }
        }
        stack.root()
    }

    /// The partial tiles, from level 0 up; empty ones are left out.
    pub fn partial_tiles(&self) -> impl Iterator<Item = Tile> + '_ {
        let tiles = self.levels.iter().enumerate();
        let tiles = tiles.filter(|(_, hashes)| !hashes.is_empty());
        tiles.map(|(level, hashes)| Tile {
            level: level as u8,
            index: shifted(self.size, 8 * (level as u32 + 1)),
            hashes: hashes.clone(),
        })
    }
}

/// Hashes in the partial tile of a level of a tree of this size.
pub fn width(size: u64, level: u8) -> usize {
    (shifted(size, 8 * u32::from(level)) % TILE_WIDTH as u64) as usize
}

fn shifted(size: u64, by: u32) -> u64 {
    size.checked_shr(by).unwrap_or(0)
}

/// Hashes of complete subtrees of a tree, as its tiles have them.
pub trait Hashes {
    /// Reasons for which a hash is not there.
    type Error;

    /// Hash `index` of this level of tiles: the subtree of 256^`level` leaves that begins at leaf
    /// `index` * 256^`level`.
    ///
    /// # Errors
    /// If it cannot be read.
    fn hash(&mut self, level: u8, index: u64) -> Result<Hash, Self::Error>;
}

/// Hash of the leaves `start..end`; `start` is a multiple of the largest power of two below their number.
fn range_hash<H: Hashes>(hashes: &mut H, start: u64, end: u64) -> Result<Hash, H::Error> {
    let count = end - start;
    if count == 0 {
        return Ok(empty_root());
    }
    if count.is_power_of_two() && count.trailing_zeros().is_multiple_of(8) {
        let shift = count.trailing_zeros();
        return hashes.hash((shift / 8) as u8, start >> shift);
    }
    let split = start + largest_power_below(count);
    let left = range_hash(hashes, start, split)?;
    let right = range_hash(hashes, split, end)?;
    Ok(node_hash(&left, &right))
}

/// The largest power of two that is less than `count`, which is at least 2.
fn largest_power_below(count: u64) -> u64 {
    1 << (63 - (count - 1).leading_zeros())
}

/// Root of the first `size` leaves.
///
/// # Errors
/// If a hash cannot be read.
pub fn root<H: Hashes>(hashes: &mut H, size: u64) -> Result<Hash, H::Error> {
    range_hash(hashes, 0, size)
}

/// Inclusion proof of leaf `index` in the tree of `size` leaves, from the leaf's sibling up (RFC 6962,
/// section 2.1.1).
///
/// # Errors
/// If a hash cannot be read.
///
/// # Panics
/// If the tree has no such leaf.
pub fn inclusion_proof<H: Hashes>(
    hashes: &mut H,
    index: u64,
    size: u64,
) -> Result<Vec<Hash>, H::Error> {
    assert!(index < size, "leaf {index} of {size}");
    let (mut start, mut end) = (0, size);
    let mut proof = Vec::new();
    while end - start > 1 {
        let split = start + largest_power_below(end - start);
        if index < split {
            proof.push(range_hash(hashes, split, end)?);
            end = split;
        } else {
            proof.push(range_hash(hashes, start, split)?);
            start = split;
        }
    }
    proof.reverse();
    Ok(proof)
}

/// Consistency proof between the trees of `old` and of `new` leaves (RFC 6962, section 2.1.2).
///
/// # Errors
/// If a hash cannot be read.
///
/// # Panics
/// If the older tree is larger.
pub fn consistency_proof<H: Hashes>(
    hashes: &mut H,
    old: u64,
    new: u64,
) -> Result<Vec<Hash>, H::Error> {
    assert!(old <= new, "{old} leaves of {new}");
    let mut proof = Vec::new();
    if old == 0 || old == new {
        return Ok(proof);
    }
    let (mut start, mut end) = (0, new);
    while old != end {
        let split = start + largest_power_below(end - start);
        if old <= split {
            proof.push(range_hash(hashes, split, end)?);
            end = split;
        } else {
            proof.push(range_hash(hashes, start, split)?);
            start = split;
        }
    }
    if start != 0 {
        proof.push(range_hash(hashes, start, end)?);
    }
    proof.reverse();
    Ok(proof)
}

/// Root that an inclusion proof leads to; `None` if the proof has another length than such a leaf's (RFC
/// 9162, section 2.1.3.2).
pub fn root_by_inclusion(leaf: &Hash, index: u64, size: u64, proof: &[Hash]) -> Option<Hash> {
    if index >= size {
        return None;
    }
    let (mut at, mut last, mut root) = (index, size - 1, *leaf);
    for sibling in proof {
        if last == 0 {
            return None;
        }
        if at % 2 == 1 || at == last {
            root = node_hash(sibling, &root);
            while at % 2 == 0 && at != 0 {
                at >>= 1;
                last >>= 1;
            }
        } else {
            root = node_hash(&root, sibling);
        }
        at >>= 1;
        last >>= 1;
    }
    (last == 0).then_some(root)
}

/// True if the proof shows that the tree with `new_root` continues the one with `old_root` (RFC 9162, section
/// 2.1.4.2).
pub fn is_consistent(
    (old, old_root): (u64, &Hash),
    (new, new_root): (u64, &Hash),
    proof: &[Hash],
) -> bool {
    if old > new {
        return false;
    }
    if old == new {
        return proof.is_empty() && old_root == new_root;
    }
    if old == 0 {
        return proof.is_empty() && *old_root == empty_root();
    }
    let mut proof = proof.iter();
    let first = match old.is_power_of_two() {
        true => Some(old_root),
        false => proof.next(),
    };
    let Some(first) = first else { return false };
    let (mut at, mut last) = (old - 1, new - 1);
    while at % 2 == 1 {
        at >>= 1;
        last >>= 1;
    }
    let (mut old_side, mut new_side) = (*first, *first);
    for sibling in proof {
        if last == 0 {
            return false;
        }
        if at % 2 == 1 || at == last {
            old_side = node_hash(sibling, &old_side);
            new_side = node_hash(sibling, &new_side);
            while at % 2 == 0 && at != 0 {
                at >>= 1;
                last >>= 1;
            }
        } else {
            new_side = node_hash(&new_side, sibling);
        }
        at >>= 1;
        last >>= 1;
    }
    last == 0 && old_side == *old_root && new_side == *new_root
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use data_encoding::HEXLOWER;
    use proptest::prelude::*;

    use super::*;

    /// The definition of RFC 6962, word for word.
    fn defined(leaves: &[Hash]) -> Hash {
        match leaves {
            [] => empty_root(),
            [leaf] => *leaf,
            _ => {
                let (left, right) =
                    leaves.split_at(largest_power_below(leaves.len() as u64) as usize);
                node_hash(&defined(left), &defined(right))
            }
        }
    }

    struct Leaves(Vec<Hash>);

    impl Hashes for Leaves {
        type Error = Infallible;

        fn hash(&mut self, level: u8, index: u64) -> Result<Hash, Infallible> {
            let width = 1 << (8 * level);
            let start = index as usize * width;
            Ok(defined(&self.0[start..start + width]))
        }
    }

    fn leaves(count: usize) -> Vec<Hash> {
        (0..count as u64)
            .map(|n| leaf_hash(&n.to_be_bytes()))
            .collect()
    }

    #[test]
    fn roots_are_those_of_certificate_transparency() {
        // The example tree of RFC 6962's reference implementation.
        let entries = [
            "",
            "00",
            "10",
            "2021",
            "3031",
            "40414243",
            "5051525354555657",
        ];
        let leaves: Vec<Hash> = entries
            .iter()
            .map(|hex| leaf_hash(&HEXLOWER.decode(hex.as_bytes()).unwrap()))
            .collect();
        for (count, root) in [
            (
                1,
                "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            ),
            (
                2,
                "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
            ),
            (
                3,
                "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
            ),
            (
                7,
                "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
            ),
        ] {
            assert_eq!(HEXLOWER.encode(&root_of(&leaves[..count])), root);
        }
    }

    #[test]
    fn an_edge_has_the_root_and_the_tiles_of_its_leaves() {
        let leaves = leaves(70_000);
        let (mut edge, mut full) = (Edge::default(), Vec::new());
        for (count, leaf) in leaves.iter().enumerate() {
            if [0, 1, 2, 255, 256, 257, 511, 512, 65_535, 65_536, 65_537].contains(&count) {
                assert_eq!(edge.root(), defined(&leaves[..count]), "{count}");
            }
            edge.push(*leaf, &mut full);
        }
        assert_eq!(edge.root(), defined(&leaves));
        let of = |level| full.iter().filter(move |tile: &&Tile| tile.level == level);
        assert_eq!((of(0).count(), of(1).count(), of(2).count()), (273, 1, 0));
        let indices: Vec<u64> = of(0).map(|tile| tile.index).collect();
        assert_eq!(indices, (0..273).collect::<Vec<u64>>());
        // The example of the specification.
        let partial: Vec<Tile> = edge.partial_tiles().collect();
        let shape: Vec<_> = partial
            .iter()
            .map(|t| (t.level, t.index, t.hashes.len()))
            .collect();
        assert_eq!(shape, [(0, 273, 112), (1, 1, 17), (2, 0, 1)]);
        let levels = partial.into_iter().map(|tile| tile.hashes).collect();
        let again = Edge::from_partial_tiles(70_000, levels).unwrap();
        assert_eq!(again.root(), edge.root());
        assert!(Edge::from_partial_tiles(70_000, vec![vec![[0; 32]; 111]]).is_none());
        assert!(Edge::from_partial_tiles(70_000, vec![vec![[0; 32]; 112]]).is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn proofs_hold_for_what_they_prove_and_for_nothing_else(size in 1u64..700, a: u64, b: u64, flip: u8) {
            let mut tree = Leaves(leaves(size as usize));
            let (index, old) = (a % size, b % (size + 1));
            let root = root(&mut tree, size).unwrap();
            prop_assert_eq!(root, defined(&tree.0));
            let leaf = tree.0[index as usize];
            let mut proof = inclusion_proof(&mut tree, index, size).unwrap();
            prop_assert_eq!(root_by_inclusion(&leaf, index, size, &proof), Some(root));
            prop_assert_ne!(root_by_inclusion(&leaf, index ^ 1, size, &proof), Some(root));
            let old_root = defined(&tree.0[..old as usize]);
            let consistency = consistency_proof(&mut tree, old, size).unwrap();
            prop_assert!(is_consistent((old, &old_root), (size, &root), &consistency));
            prop_assert!(!is_consistent((old, &[flip; 32]), (size, &root), &consistency));
            if let Some(hash) = proof.get_mut(usize::from(flip) % 9) {
                hash[usize::from(flip) % 32] ^= 1;
                prop_assert_ne!(root_by_inclusion(&leaf, index, size, &proof), Some(root));
            }
            proof.push([flip; 32]);
            prop_assert_eq!(root_by_inclusion(&leaf, index, size, &proof), None);
        }
    }
}
