//! The KV cache: per slot one anonymous mapping of f16, committed by the system only where it was written.
//!
//! A slot's memory is divided into planes, two (keys, values) per layer, each of `context` rows of `kv_heads * head_dim`
//! numbers. Exported rows are token-major instead: for each token, layer by layer, its keys and then its values, so that
//! exports of adjacent ranges can simply be joined.

use std::io;
use std::ops::Range;

use half::f16;
use memmap2::{Advice, MmapMut, MmapOptions, UncheckedAdvice};

/// The cached keys and values of all slots of a stage.
pub(crate) struct KvCache {
    slots: Vec<Slot>,
    layers: usize,
    width: usize,
    context: usize,
}

struct Slot {
    map: MmapMut,
    len: u32,
}

impl KvCache {
    /// Address space for `slots` slots of `context` tokens with `layers` layers, each row `width` numbers wide.
    pub(crate) fn new(slots: u32, layers: usize, context: u32, width: usize) -> io::Result<KvCache> {
        let context = context as usize;
        let bytes = slot_bytes(layers, context, width)
            .ok_or_else(|| io::Error::new(io::ErrorKind::OutOfMemory, "size overflow"))?;
        let slots = (0..slots)
            .map(|_| {
                let map = MmapOptions::new().len(bytes).no_reserve_swap().map_anon()?;
                // Every plane begins its own pages: huge ones would commit megabytes for the first token. Advice only.
                #[cfg(target_os = "linux")]
                let _ = map.advise(Advice::NoHugePage);
                Ok(Slot { map, len: 0 })
            })
            .collect::<io::Result<_>>()?;
        Ok(KvCache { slots, layers, width, context })
    }

    /// Bytes that one token takes over all layers.
    pub(crate) fn bytes_per_token(&self) -> usize {
        self.layers * 2 * self.row_bytes()
    }

    /// Rows that `slot` holds; 0 for a slot that does not exist.
    pub(crate) fn len(&self, slot: u32) -> u32 {
        self.slots.get(slot as usize).map_or(0, |slot| slot.len)
    }

    /// Sets the number of valid rows; `0` gives the memory back.
    pub(crate) fn set_len(&mut self, slot: u32, len: u32) {
        let Some(slot) = self.slots.get_mut(slot as usize) else { return };
        if len == 0 && slot.len > 0 {
            // SAFETY: the mapping is anonymous and exclusively borrowed: its pages read as zeros afterwards, and no row of
            // them is valid any more. Failure leaves the pages committed, which only costs memory.
            let _ = unsafe { slot.map.unchecked_advise(UncheckedAdvice::DontNeed) };
        }
        slot.len = len;
    }

    /// Keys and values of one layer: `context` rows each, of which the first [`KvCache::len`] are valid.
    pub(crate) fn layer(&self, slot: u32, layer: usize) -> (&[f16], &[f16]) {
        let plane = self.context * self.width;
        let numbers = as_f16(&self.slots[slot as usize].map);
        let keys = layer * 2 * plane;
        (&numbers[keys..keys + plane], &numbers[keys + plane..keys + 2 * plane])
    }

    /// As [`KvCache::layer`], to write to.
    pub(crate) fn layer_mut(&mut self, slot: u32, layer: usize) -> (&mut [f16], &mut [f16]) {
        let plane = self.context * self.width;
        let numbers = as_f16_mut(&mut self.slots[slot as usize].map);
        numbers[layer * 2 * plane..(layer * 2 + 2) * plane].split_at_mut(plane)
    }

    /// Copies the first `len` rows of `from` to `to`, which then holds exactly those.
    pub(crate) fn copy_prefix(&mut self, from: u32, to: u32, len: u32) {
        if from == to {
            return self.set_len(to, len);
        }
        self.set_len(to, 0);
        let bytes = len as usize * self.row_bytes();
        for plane in 0..self.layers * 2 {
            let start = self.plane_start(plane);
            let [from, to] = self
                .slots
                .get_disjoint_mut([from as usize, to as usize])
                .expect("both slots were checked and differ");
            to.map[start..start + bytes].copy_from_slice(&from.map[start..start + bytes]);
        }
        self.set_len(to, len);
    }

    /// The rows `rows` of `slot`, token-major.
    pub(crate) fn export(&self, slot: u32, rows: Range<u32>) -> Vec<u8> {
        let map = &self.slots[slot as usize].map;
        let row_bytes = self.row_bytes();
        let mut out = Vec::with_capacity(rows.len() * self.bytes_per_token());
        for row in rows {
            for plane in 0..self.layers * 2 {
                let start = self.plane_start(plane) + row as usize * row_bytes;
                out.extend_from_slice(&map[start..start + row_bytes]);
            }
        }
        out
    }

    /// Writes exported rows at `position`; the slot then ends behind them.
    pub(crate) fn import(&mut self, slot: u32, position: u32, bytes: &[u8]) {
        let row_bytes = self.row_bytes();
        let per_token = self.bytes_per_token();
        let mut row = position;
        for token in bytes.chunks_exact(per_token) {
            for (plane, source) in token.chunks_exact(row_bytes).enumerate() {
                let start = self.plane_start(plane) + row as usize * row_bytes;
                self.slots[slot as usize].map[start..start + row_bytes].copy_from_slice(source);
            }
            row += 1;
        }
        self.set_len(slot, row);
    }

    fn row_bytes(&self) -> usize {
        self.width * size_of::<f16>()
    }

    fn plane_start(&self, plane: usize) -> usize {
        plane * self.context * self.row_bytes()
    }
}

/// Bytes of address space of one slot.
pub(crate) fn slot_bytes(layers: usize, context: usize, width: usize) -> Option<usize> {
    layers.checked_mul(2 * size_of::<f16>())?.checked_mul(context)?.checked_mul(width)
}

fn as_f16(map: &MmapMut) -> &[f16] {
    // SAFETY: mappings are page-aligned, every bit pattern is an f16, and the length is rounded down to whole numbers.
    unsafe { std::slice::from_raw_parts(map.as_ptr().cast(), map.len() / size_of::<f16>()) }
}

fn as_f16_mut(map: &mut MmapMut) -> &mut [f16] {
    // SAFETY: as in `as_f16`, and the mapping is exclusively borrowed.
    unsafe { std::slice::from_raw_parts_mut(map.as_mut_ptr().cast(), map.len() / size_of::<f16>()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled() -> KvCache {
        let mut kv = KvCache::new(3, 2, 8, 4).unwrap();
        for layer in 0..2 {
            let (keys, values) = kv.layer_mut(1, layer);
            for (i, (k, v)) in keys.iter_mut().zip(values).enumerate() {
                *k = f16::from_f32((layer * 100 + i) as f32);
                *v = f16::from_f32(-((layer * 100 + i) as f32));
            }
        }
        kv.set_len(1, 5);
        kv
    }

    #[test]
    fn exported_rows_come_back_bit_for_bit() {
        let mut kv = filled();
        let bytes = kv.export(1, 1..5);
        assert_eq!(bytes.len(), 4 * kv.bytes_per_token());
        kv.import(2, 0, &kv.export(1, 0..1));
        kv.import(2, 1, &bytes);
        assert_eq!(kv.len(2), 5);
        assert_eq!(kv.export(2, 0..5), kv.export(1, 0..5));
        let joined = [kv.export(1, 0..2), kv.export(1, 2..5)].concat();
        assert_eq!(joined, kv.export(1, 0..5));
    }

    #[test]
    fn a_copied_prefix_holds_exactly_those_rows() {
        let mut kv = filled();
        kv.copy_prefix(1, 0, 3);
        assert_eq!(kv.len(0), 3);
        assert_eq!(kv.export(0, 0..3), kv.export(1, 0..3));
        assert!(kv.layer(0, 1).0[3 * 4..].iter().all(|x| x.to_bits() == 0));
    }

    #[test]
    fn truncating_to_nothing_gives_the_pages_back() {
        let mut kv = filled();
        kv.set_len(1, 2);
        assert_eq!(kv.layer(1, 0).0[5].to_f32(), 5.0);
        kv.set_len(1, 0);
        assert!(kv.layer(1, 0).0.iter().all(|x| x.to_bits() == 0));
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        assert!(KvCache::new(1, usize::MAX / 2, 8, 4).is_err());
    }
}
