//! Copies of tasks that are under way, for the case that their head goes silent.

use dcf::{HEADER_LEN, Header};

/// A fixed amount of memory in blocks. A task's datagrams lie in a chain of them, one after the other; their
/// own headers tell where each ends.
#[derive(Debug)]
pub(super) struct Arena {
    bytes: Box<[u8]>,
    next: Box<[u32]>,
    free: u32,
    free_blocks: usize,
}

/// One chain of an [`Arena`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Chain {
    first: u32,
    last: u32,
    len: u32,
}

impl Chain {
    pub(super) const EMPTY: Self = Self {
        first: NONE,
        last: NONE,
        len: 0,
    };

    /// Number of bytes in it.
    pub(super) fn len(&self) -> usize {
        self.len as usize
    }
}

impl Arena {
    pub(super) fn new(bytes: usize) -> Self {
        let blocks = (bytes / BLOCK).min(NONE as usize);
        Self {
            bytes: vec![0; blocks * BLOCK].into(),
            next: (1..blocks as u32).chain([NONE]).collect(),
            free: if blocks == 0 { NONE } else { 0 },
            free_blocks: blocks,
        }
    }

    /// Appends `datagram` to `chain`; false, and nothing changed, if there is no room.
    pub(super) fn append(&mut self, chain: &mut Chain, mut datagram: &[u8]) -> bool {
        let room_in_last = chain.len().next_multiple_of(BLOCK) - chain.len();
        let blocks = datagram.len().saturating_sub(room_in_last).div_ceil(BLOCK);
        if chain.len() + datagram.len() > MAX_CHAIN || blocks > self.free_blocks {
            return false;
        }
        while !datagram.is_empty() {
            let at = chain.len() % BLOCK;
            if at == 0 {
                self.extend(chain);
            }
            let start = chain.last as usize * BLOCK + at;
            let (now, later) = datagram.split_at(datagram.len().min(BLOCK - at));
            self.bytes[start..start + now.len()].copy_from_slice(now);
            chain.len += now.len() as u32;
            datagram = later;
        }
        true
    }

    /// Copies the datagram that begins at `offset` of `chain` to `out`; its length, or `None` at the chain's
    /// end.
    pub(super) fn datagram(&self, chain: &Chain, offset: usize, out: &mut [u8]) -> Option<usize> {
        if offset + HEADER_LEN > chain.len() {
            return None;
        }
        self.read(chain, offset, &mut out[..HEADER_LEN]);
        let header = Header::decode(out).ok()?;
        let len = HEADER_LEN + header.payload_len as usize;
        self.read(chain, offset, out.get_mut(..len)?);
        Some(len)
    }

    /// Gives the blocks of `chain` back.
    pub(super) fn release(&mut self, chain: &mut Chain) {
        if chain.first != NONE {
            self.next[chain.last as usize] = self.free;
            self.free = chain.first;
            self.free_blocks += chain.len().div_ceil(BLOCK);
        }
        *chain = Chain::EMPTY;
    }

    fn extend(&mut self, chain: &mut Chain) {
        let block = self.free;
        self.free = self.next[block as usize];
        self.free_blocks -= 1;
        self.next[block as usize] = NONE;
        if chain.first == NONE {
            chain.first = block;
        } else {
            self.next[chain.last as usize] = block;
        }
        chain.last = block;
    }

    fn read(&self, chain: &Chain, offset: usize, mut out: &mut [u8]) {
        let mut block = chain.first;
        for _ in 0..offset / BLOCK {
            block = self.next[block as usize];
        }
        let mut at = offset % BLOCK;
        while !out.is_empty() {
            let start = block as usize * BLOCK + at;
            let len = out.len().min(BLOCK - at);
            let (now, later) = out.split_at_mut(len);
            now.copy_from_slice(&self.bytes[start..start + now.len()]);
            out = later;
            block = self.next[block as usize];
            at = 0;
        }
    }
}

const BLOCK: usize = 512;
const NONE: u32 = u32::MAX;
/// Most that one task may hold; longer ones are not sent again.
const MAX_CHAIN: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use dcf::{Message, MsgType};
    use proptest::prelude::*;

    use super::*;

    fn datagram(seed: u8, len: usize) -> Vec<u8> {
        Message::new(MsgType::TASK, seed.into(), 0, vec![seed; len])
            .encode_datagram()
            .to_vec()
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        let mut arena = Arena::new(3 * BLOCK);
        let mut chain = Chain::EMPTY;
        assert!(arena.append(&mut chain, &datagram(1, BLOCK)));
        assert!(!arena.append(&mut chain, &datagram(2, 2 * BLOCK)));
        assert_eq!(chain.len(), BLOCK + HEADER_LEN);
        arena.release(&mut chain);
        assert!(arena.append(&mut chain, &datagram(3, 2 * BLOCK)));
    }

    #[test]
    fn an_arena_of_nothing_keeps_nothing() {
        let mut chain = Chain::EMPTY;
        assert!(!Arena::new(0).append(&mut chain, &datagram(1, 0)));
    }

    proptest! {
        #[test]
        fn chains_give_back_what_was_put_in(steps in prop::collection::vec((0usize..4, 0usize..1500, any::<bool>()), 0..60)) {
            let mut arena = Arena::new(20 * BLOCK);
            let mut chains = [Chain::EMPTY; 4];
            let mut expected: [Vec<Vec<u8>>; 4] = Default::default();
            for (seed, (which, len, release)) in steps.into_iter().enumerate() {
                if release {
                    arena.release(&mut chains[which]);
                    expected[which].clear();
                } else if arena.append(&mut chains[which], &datagram(seed as u8, len)) {
                    expected[which].push(datagram(seed as u8, len));
                }
                let mut buffer = [0; 2_000];
                for (chain, expected) in chains.iter().zip(&expected) {
                    let mut offset = 0;
                    for expected in expected {
                        let len = arena.datagram(chain, offset, &mut buffer).unwrap();
                        prop_assert_eq!(&buffer[..len], &expected[..]);
                        offset += len;
                    }
                    prop_assert_eq!(arena.datagram(chain, offset, &mut buffer), None);
                }
            }
            for chain in &mut chains {
                arena.release(chain);
            }
            prop_assert_eq!(arena.free_blocks, 20);
        }
    }
}
