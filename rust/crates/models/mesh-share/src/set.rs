//! Sets of pieces.

use std::fmt;

use mesh_proto::Pieces;

/// Pieces of a model, by their numbers: the pieces of all its files in the manifest's order, from 0.
///
/// It knows how many pieces the model has, so that a number or a bit beyond them is noticed.
#[derive(Clone, PartialEq, Eq)]
pub struct PieceSet {
    pieces: u32,
    words: Vec<u64>,
}

/// Errors of decoding a set of pieces.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum BadPieceSet {
    /// More pieces than any model has.
    #[error("a model of {pieces} pieces; at most {MOST_PIECES} are possible")]
    TooMany { pieces: u32 },
    /// The encoded set is longer than the pieces need.
    #[error("{bytes} bytes for a set of {pieces} pieces, which needs at most {}", pieces.div_ceil(8))]
    TooLong { bytes: usize, pieces: u32 },
    /// The set contains a piece that the model does not have.
    #[error("piece {piece} of a model with {pieces}")]
    Beyond { piece: u32, pieces: u32 },
}

/// Maximum number of pieces of a model: 4 TiB in pieces of 4 MiB.
pub const MOST_PIECES: u32 = 1 << 20;

impl PieceSet {
    /// The empty set, for a model of `pieces` pieces.
    pub fn none(pieces: u32) -> Self {
        PieceSet {
            pieces,
            words: vec![0; pieces.div_ceil(64) as usize],
        }
    }

    /// The set of all pieces.
    pub fn all(pieces: u32) -> Self {
        let mut set = PieceSet::none(pieces);
        set.words.fill(u64::MAX);
        set.clear_beyond();
        set
    }

    /// These of them; numbers beyond the model's pieces are left out.
    pub fn of(pieces: u32, numbers: impl IntoIterator<Item = u32>) -> Self {
        let mut set = PieceSet::none(pieces);
        for number in numbers {
            set.insert(number);
        }
        set
    }

    /// Number of pieces of the model.
    pub fn pieces(&self) -> u32 {
        self.pieces
    }

    /// Number of pieces in the set.
    pub fn len(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// True if the set is empty.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// True if the set has all pieces of the model.
    pub fn is_all(&self) -> bool {
        self.len() == self.pieces
    }

    /// True if this piece is in the set.
    pub fn contains(&self, piece: u32) -> bool {
        let word = self.words.get(piece as usize / 64);
        word.is_some_and(|word| word >> (piece % 64) & 1 == 1)
    }

    /// Adds a piece. True if it was not in the set before; pieces that the model does not have are ignored.
    pub fn insert(&mut self, piece: u32) -> bool {
        if piece >= self.pieces || self.contains(piece) {
            return false;
        }
        self.words[piece as usize / 64] |= 1 << (piece % 64);
        true
    }

    /// Removes a piece. True if it was in the set.
    pub fn remove(&mut self, piece: u32) -> bool {
        if !self.contains(piece) {
            return false;
        }
        self.words[piece as usize / 64] &= !(1 << (piece % 64));
        true
    }

    /// Adds all pieces of another set of the same model.
    pub fn union(&mut self, other: &PieceSet) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word |= other;
        }
        self.clear_beyond();
    }

    /// Takes all pieces of another set out.
    pub fn subtract(&mut self, other: &PieceSet) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word &= !other;
        }
    }

    /// The pieces in the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..).zip(&self.words).flat_map(|(index, &word)| {
            let mut left = word;
            std::iter::from_fn(move || {
                let bit = left.trailing_zeros();
                left &= left.wrapping_sub(1);
                (bit < 64).then_some(index * 64 + bit)
            })
        })
    }

    /// One bit for each piece, the lowest bit of the first byte for piece 0, without the zeros at the end.
    pub fn to_bytes(&self) -> Vec<u8> {
        let words = self.words.iter();
        let mut bytes: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
        let used = bytes.iter().rposition(|&byte| byte != 0);
        bytes.truncate(used.map_or(0, |last| last + 1));
        bytes
    }

    /// Decodes the output of [`PieceSet::to_bytes`], for a model of `pieces` pieces.
    ///
    /// # Errors
    /// If there are more bytes than that model needs, a bit for a piece that it has not, or too many pieces
    /// for any model.
    pub fn from_bytes(pieces: u32, bytes: &[u8]) -> Result<Self, BadPieceSet> {
        if pieces > MOST_PIECES {
            return Err(BadPieceSet::TooMany { pieces });
        }
        if bytes.len() > pieces.div_ceil(8) as usize {
            let bytes = bytes.len();
            return Err(BadPieceSet::TooLong { bytes, pieces });
        }
        let mut set = PieceSet::none(pieces);
        for (index, &byte) in bytes.iter().enumerate() {
            set.words[index / 8] |= u64::from(byte) << (index % 8 * 8);
        }
        match set.iter().last() {
            Some(piece) if piece >= pieces => Err(BadPieceSet::Beyond { piece, pieces }),
            _ => Ok(set),
        }
    }

    /// Encodes the set as a message.
    pub fn to_proto(&self) -> Pieces {
        let all = self.is_all();
        let bits = if all { Vec::new() } else { self.to_bytes() };
        Pieces {
            of: self.pieces,
            all,
            bits: bits.into(),
        }
    }

    /// Decodes the set of a message.
    ///
    /// # Errors
    /// As [`PieceSet::from_bytes`].
    pub fn from_proto(pieces: &Pieces) -> Result<Self, BadPieceSet> {
        let set = PieceSet::from_bytes(pieces.of, &pieces.bits)?;
        Ok(match pieces.all {
            true => PieceSet::all(pieces.of),
            false => set,
        })
    }

    fn clear_beyond(&mut self) {
        let used = self.pieces % 64;
        if used > 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << used) - 1;
        }
    }
}

impl fmt::Debug for PieceSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} pieces", self.len(), self.pieces)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn all_has_every_piece_and_no_other() {
        for pieces in [0, 1, 63, 64, 65, 1000] {
            let all = PieceSet::all(pieces);
            assert_eq!(all.len(), pieces);
            assert!(all.is_all());
            assert!(!all.contains(pieces));
            assert_eq!(PieceSet::from_bytes(pieces, &all.to_bytes()), Ok(all));
        }
    }

    #[test]
    fn bytes_that_are_no_set_are_refused_by_what_is_wrong() {
        assert_eq!(
            PieceSet::from_bytes(9, &[0, 2]),
            Err(BadPieceSet::Beyond {
                piece: 9,
                pieces: 9
            })
        );
        assert!(PieceSet::from_bytes(9, &[0, 1]).is_ok());
        assert_eq!(
            PieceSet::from_bytes(8, &[0, 0]),
            Err(BadPieceSet::TooLong {
                bytes: 2,
                pieces: 8
            })
        );
        assert_eq!(
            PieceSet::from_bytes(u32::MAX, &[]),
            Err(BadPieceSet::TooMany { pieces: u32::MAX })
        );
    }

    proptest! {
        #[test]
        fn a_set_does_what_a_list_of_numbers_does(
            pieces in 1u32..300,
            changes in prop::collection::vec((0u32..310, any::<bool>()), 0..100),
        ) {
            let mut set = PieceSet::none(pieces);
            let mut list = std::collections::BTreeSet::new();
            for (piece, put) in changes {
                let changed = if put { set.insert(piece) } else { set.remove(piece) };
                let expected = match put {
                    true => piece < pieces && list.insert(piece),
                    false => list.remove(&piece),
                };
                prop_assert_eq!(changed, expected);
            }
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), list.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(PieceSet::from_bytes(pieces, &set.to_bytes()), Ok(set));
        }

        #[test]
        fn any_bytes_are_a_set_of_that_many_pieces_or_refused(pieces: u32, bytes: Vec<u8>) {
            if let Ok(set) = PieceSet::from_bytes(pieces, &bytes) {
                prop_assert!(set.iter().all(|piece| piece < pieces));
            }
        }
    }
}
