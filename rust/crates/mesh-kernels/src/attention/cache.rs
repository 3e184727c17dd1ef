//! The keys and values of every slot, in f16.
//!
//! A slot is one contiguous region `[layer][keys of head 0, 1, …, values of head 0, 1, …]`. Keys lie in tiles of 16 positions,
//! transposed (`[position / 16][head_dim][16]`), so that 16 scores are made side by side; values lie as rows
//! (`[position][head_dim]`). Memory is reserved at once and taken from the system as positions are written.
//!
//! Unsafe code: the mapping, and element addresses within it.

use std::ops::Range;

use crate::KernelError;
use crate::mem::Region;

/// Positions per tile of keys.
pub(super) const TILE: usize = 16;

/// The dimensions of a [`KvCache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Layers that share the cache.
    pub layers: usize,
    /// Sequences held at the same time.
    pub slots: usize,
    /// Most positions per slot.
    pub context: usize,
    /// Key/value heads per layer.
    pub kv_heads: usize,
    /// Elements per head: a multiple of 16, at most 256.
    pub head_dim: usize,
}

/// Keys and values of `slots` sequences. It does not know how many positions of a slot are valid: its owner does.
#[derive(Debug)]
pub struct KvCache {
    shape: KvShape,
    /// Elements of one head's keys, and of its values.
    head: usize,
    /// Elements of one slot.
    slot: usize,
    memory: Region,
}

impl KvCache {
    /// Reserves the address space.
    ///
    /// # Errors
    /// When a dimension is zero or out of bounds, or the system refuses.
    pub fn new(shape: KvShape) -> Result<KvCache, KernelError> {
        for (what, value, most) in [
            ("number of layers", shape.layers, 1 << 16),
            ("number of slots", shape.slots, 1 << 16),
            ("context", shape.context, 1 << 24),
            ("number of key/value heads", shape.kv_heads, 1 << 16),
        ] {
            if value == 0 || value > most {
                return Err(KernelError::Dimension {
                    what,
                    value,
                    need: "it must be at least 1 and within reason",
                });
            }
        }
        super::check_head_dim(shape.head_dim)?;
        let head = shape.context.next_multiple_of(TILE) * shape.head_dim;
        let size = head
            .checked_mul(2 * shape.kv_heads)
            .and_then(|layer| layer.checked_mul(shape.layers))
            .and_then(|slot| slot.checked_next_multiple_of(32 * 1024))
            .and_then(|slot| Some((slot, slot.checked_mul(2 * shape.slots)?)));
        let Some((slot, bytes)) = size else {
            return Err(KernelError::NoMemory {
                what: "the KV cache",
                bytes: usize::MAX,
            });
        };
        Ok(KvCache {
            shape,
            head,
            slot,
            memory: Region::reserve("the KV cache", bytes)?,
        })
    }

    /// The dimensions.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Bytes that one position of one slot takes over all layers; also the size of an exported row.
    pub fn bytes_per_position(&self) -> usize {
        self.shape.layers * self.shape.kv_heads * self.shape.head_dim * 4
    }

    /// Gives the memory of a slot back to the system.
    ///
    /// # Errors
    /// When there is no such slot.
    pub fn release(&mut self, slot: usize) -> Result<(), KernelError> {
        self.check(slot, 0..0)?;
        self.memory
            .release(slot * self.slot * 2..(slot + 1) * self.slot * 2);
        Ok(())
    }

    /// Copies positions `0..len` of `from` to `to`.
    ///
    /// # Errors
    /// When a slot or position does not exist.
    pub fn copy_prefix(&mut self, from: usize, to: usize, len: usize) -> Result<(), KernelError> {
        self.check(from, 0..len)?;
        self.check(to, 0..len)?;
        if from == to {
            return Ok(());
        }
        let dim = self.shape.head_dim;
        for layer in 0..self.shape.layers {
            for head in 0..self.shape.kv_heads {
                // SAFETY: both are whole heads of different slots; tiles and rows up to `len` are within them.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        self.keys(from, layer, head),
                        self.keys(to, layer, head),
                        len.next_multiple_of(TILE) * dim,
                    );
                    std::ptr::copy_nonoverlapping(
                        self.values(from, layer, head),
                        self.values(to, layer, head),
                        len * dim,
                    );
                }
            }
        }
        Ok(())
    }

    /// The rows `positions` of a slot: per position, layer and head the f16 key, then the f16 value, little-endian.
    ///
    /// # Errors
    /// When the slot or a position does not exist.
    pub fn export(&self, slot: usize, positions: Range<usize>) -> Result<Vec<u8>, KernelError> {
        self.check(slot, positions.clone())?;
        let mut out = Vec::with_capacity(positions.len() * self.bytes_per_position());
        for position in positions {
            self.for_each_row(slot, position, |key, value| {
                for d in 0..self.shape.head_dim {
                    // SAFETY: element d of the key, in its tile.
                    let bits = unsafe { *key.add(d * TILE) };
                    out.extend_from_slice(&bits.to_le_bytes());
                }
                for d in 0..self.shape.head_dim {
                    // SAFETY: element d of the value.
                    let bits = unsafe { *value.add(d) };
                    out.extend_from_slice(&bits.to_le_bytes());
                }
            });
        }
        Ok(out)
    }

    /// Writes exported rows at `position`; gives how many there were.
    ///
    /// # Errors
    /// When the slot or a position does not exist or `bytes` is not a whole number of rows.
    pub fn import(
        &mut self,
        slot: usize,
        position: usize,
        bytes: &[u8],
    ) -> Result<usize, KernelError> {
        let row = self.bytes_per_position();
        if !bytes.len().is_multiple_of(row) {
            return Err(KernelError::Length {
                what: "the exported KV rows (in bytes)",
                got: bytes.len(),
                need: bytes.len().next_multiple_of(row),
            });
        }
        let rows = bytes.len() / row;
        self.check(slot, position..position.saturating_add(rows))?;
        let mut words = bytes
            .chunks_exact(2)
            .map(|w| u16::from_le_bytes([w[0], w[1]]));
        for position in position..position + rows {
            self.for_each_row(slot, position, |key, value| {
                for (d, bits) in words.by_ref().take(self.shape.head_dim).enumerate() {
                    // SAFETY: element d of the key, in its tile; `self` is borrowed exclusively.
                    unsafe { *key.add(d * TILE) = bits };
                }
                for (d, bits) in words.by_ref().take(self.shape.head_dim).enumerate() {
                    // SAFETY: element d of the value; as above.
                    unsafe { *value.add(d) = bits };
                }
            });
        }
        Ok(rows)
    }

    /// Calls `f` with the first key element and the first value element of each layer and head at `position`.
    fn for_each_row(&self, slot: usize, position: usize, mut f: impl FnMut(*mut u16, *mut u16)) {
        let dim = self.shape.head_dim;
        for layer in 0..self.shape.layers {
            for head in 0..self.shape.kv_heads {
                // SAFETY: the position is within the context.
                unsafe {
                    let key = self.keys(slot, layer, head);
                    let key = key.add(position / TILE * TILE * dim + position % TILE);
                    f(key, self.values(slot, layer, head).add(position * dim));
                }
            }
        }
    }

    /// The keys of a head. The pointer may be written through only by who has the cache exclusively.
    pub(super) fn keys(&self, slot: usize, layer: usize, head: usize) -> *mut u16 {
        self.element(slot, (layer * 2 * self.shape.kv_heads + head) * self.head)
    }

    /// The values of a head; as [`KvCache::keys`].
    pub(super) fn values(&self, slot: usize, layer: usize, head: usize) -> *mut u16 {
        let head = head + self.shape.kv_heads;
        self.element(slot, (layer * 2 * self.shape.kv_heads + head) * self.head)
    }

    fn element(&self, slot: usize, within: usize) -> *mut u16 {
        debug_assert!(slot < self.shape.slots && within < self.slot);
        // SAFETY: callers pass existing slots, layers and heads, so this is within the region.
        unsafe {
            self.memory
                .start()
                .cast::<u16>()
                .add(slot * self.slot + within)
        }
    }

    pub(super) fn check(&self, slot: usize, positions: Range<usize>) -> Result<(), KernelError> {
        if slot >= self.shape.slots {
            return Err(KernelError::OutOfRange {
                what: "KV slot",
                index: slot,
                count: self.shape.slots,
            });
        }
        if positions.end > self.shape.context || positions.start > positions.end {
            return Err(KernelError::OutOfRange {
                what: "position",
                index: positions.end.max(positions.start),
                count: self.shape.context,
            });
        }
        Ok(())
    }
}
