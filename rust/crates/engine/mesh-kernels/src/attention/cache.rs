//! The keys and values of every slot, in f16 or f32.
//!
//! A slot is one contiguous region `[layer][keys of head 0, 1, …, values of head 0, 1, …]`. Keys lie in tiles
//! of 16 positions, transposed (`[position / 16][head_dim][16]`), so that 16 scores are made side by side;
//! values lie as rows (`[position][value_dim]`). Memory is reserved at once and taken from the system as
//! positions are written.
//!
//! Unsafe code: the mapping, and element addresses within it.

use std::ops::Range;

use crate::KernelError;
use crate::mem::Region;

/// Positions per tile of keys.
pub(super) const TILE: usize = 16;

/// Element format of keys and values in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum KvFormat {
    /// 16 bits, half the memory.
    #[default]
    F16,
    /// 32 bits: nothing is rounded.
    F32,
}

impl KvFormat {
    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            KvFormat::F16 => 2,
            KvFormat::F32 => 4,
        }
    }
}

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
    /// Elements of a head's key: a multiple of 16, at most 256.
    pub head_dim: usize,
    /// Elements of a head's value, within the same limits.
    pub value_dim: usize,
    /// Format of the elements.
    pub format: KvFormat,
}

/// Keys and values of `slots` sequences. It does not know how many positions of a slot are valid: its owner
/// does.
#[derive(Debug)]
pub struct KvCache {
    shape: KvShape,
    /// Elements of one head's keys.
    keys: usize,
    /// Elements of one head's values.
    values: usize,
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
        super::check_head_dim("head_dim", shape.head_dim)?;
        super::check_head_dim("value_dim", shape.value_dim)?;
        let positions = shape.context.next_multiple_of(TILE);
        let (keys, values) = (positions * shape.head_dim, positions * shape.value_dim);
        let size = (keys + values)
            .checked_mul(shape.kv_heads)
            .and_then(|layer| layer.checked_mul(shape.layers))
            .and_then(|slot| slot.checked_next_multiple_of(32 * 1024))
            .and_then(|slot| Some((slot, slot.checked_mul(shape.format.bytes() * shape.slots)?)));
        let Some((slot, bytes)) = size else {
            return Err(KernelError::NoMemory {
                what: "the KV cache",
                bytes: usize::MAX,
            });
        };
        Ok(KvCache {
            shape,
            keys,
            values,
            slot,
            memory: Region::reserve("the KV cache", bytes)?,
        })
    }

    /// Dimensions and element format of the cache.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Bytes that one position of one slot takes over all layers; also the size of an exported row.
    pub fn bytes_per_position(&self) -> usize {
        let KvShape {
            layers,
            kv_heads,
            head_dim,
            value_dim,
            ..
        } = self.shape;
        layers * kv_heads * (head_dim + value_dim) * self.width()
    }

    /// Gives the memory of a slot back to the system.
    ///
    /// # Errors
    /// When there is no such slot.
    pub fn release(&mut self, slot: usize) -> Result<(), KernelError> {
        self.check(slot, 0..0)?;
        let bytes = self.slot * self.width();
        self.memory.release(slot * bytes..(slot + 1) * bytes);
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
        let [key, value] =
            [self.shape.head_dim, self.shape.value_dim].map(|dim| dim * self.width());
        for layer in 0..self.shape.layers {
            for head in 0..self.shape.kv_heads {
                // SAFETY: both are whole heads of different slots; tiles and rows up to `len` are within
                // them.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        self.keys::<u8>(from, layer, head),
                        self.keys::<u8>(to, layer, head),
                        len.next_multiple_of(TILE) * key,
                    );
                    std::ptr::copy_nonoverlapping(
                        self.values::<u8>(from, layer, head),
                        self.values::<u8>(to, layer, head),
                        len * value,
                    );
                }
            }
        }
        Ok(())
    }

    /// The rows `positions` of a slot: per position, layer and head the key, then the value, as little-endian
    /// numbers of the cache's [`KvFormat`].
    ///
    /// # Errors
    /// When the slot or a position does not exist.
    pub fn export(&self, slot: usize, positions: Range<usize>) -> Result<Vec<u8>, KernelError> {
        self.check(slot, positions.clone())?;
        let mut out = Vec::with_capacity(positions.len() * self.bytes_per_position());
        for position in positions {
            match self.shape.format {
                KvFormat::F16 => self.for_each_element(slot, position, |at: *mut u16| {
                    // SAFETY: an element of the cache.
                    out.extend_from_slice(&unsafe { *at }.to_le_bytes());
                }),
                KvFormat::F32 => self.for_each_element(slot, position, |at: *mut f32| {
                    // SAFETY: as above.
                    out.extend_from_slice(&unsafe { *at }.to_le_bytes());
                }),
            }
        }
        Ok(out)
    }

    /// Writes exported rows at `position`; returns their number.
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
        for (index, bytes) in bytes.chunks_exact(row).enumerate() {
            let position = position + index;
            match self.shape.format {
                KvFormat::F16 => {
                    let (words, _) = bytes.as_chunks();
                    let mut words = words.iter();
                    self.for_each_element(slot, position, |at: *mut u16| {
                        if let Some(&word) = words.next() {
                            // SAFETY: an element of the cache; `self` is borrowed exclusively.
                            unsafe { *at = u16::from_le_bytes(word) };
                        }
                    });
                }
                KvFormat::F32 => {
                    let (words, _) = bytes.as_chunks();
                    let mut words = words.iter();
                    self.for_each_element(slot, position, |at: *mut f32| {
                        if let Some(&word) = words.next() {
                            // SAFETY: as above.
                            unsafe { *at = f32::from_le_bytes(word) };
                        }
                    });
                }
            }
        }
        Ok(rows)
    }

    /// Calls `f` with every element of each layer and head at `position`, a head's key before its value; `E`
    /// is the cache's.
    fn for_each_element<E>(&self, slot: usize, position: usize, mut f: impl FnMut(*mut E)) {
        let (dim, value_dim) = (self.shape.head_dim, self.shape.value_dim);
        for layer in 0..self.shape.layers {
            for head in 0..self.shape.kv_heads {
                // SAFETY: the position is within the context, and element d of a key lies in its tile.
                unsafe {
                    let key = self.keys::<E>(slot, layer, head);
                    let key = key.add(position / TILE * TILE * dim + position % TILE);
                    (0..dim).for_each(|d| f(key.add(d * TILE)));
                    let value = self.values::<E>(slot, layer, head);
                    let value = value.add(position * value_dim);
                    (0..value_dim).for_each(|d| f(value.add(d)));
                }
            }
        }
    }

    /// Bytes of an element.
    fn width(&self) -> usize {
        self.shape.format.bytes()
    }

    /// The keys of a head. Writing through the pointer needs exclusive access to the cache.
    pub(super) fn keys<E>(&self, slot: usize, layer: usize, head: usize) -> *mut E {
        let layers = layer * self.shape.kv_heads * (self.keys + self.values);
        self.element(slot, layers + head * self.keys)
    }

    /// The values of a head; as [`KvCache::keys`].
    pub(super) fn values<E>(&self, slot: usize, layer: usize, head: usize) -> *mut E {
        let heads = self.shape.kv_heads;
        let layers = layer * heads * (self.keys + self.values);
        self.element(slot, layers + heads * self.keys + head * self.values)
    }

    fn element<E>(&self, slot: usize, within: usize) -> *mut E {
        debug_assert!(slot < self.shape.slots && within < self.slot);
        // SAFETY: callers pass existing slots, layers and heads, so this is within the region, whose start is
        // that of a page.
        unsafe {
            self.memory
                .start()
                .cast::<u8>()
                .add((slot * self.slot + within) * self.width())
                .cast()
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
