//! The KV cache with the number of rows that each slot holds.

use std::ops::Range;

use mesh_kernels::{KernelError, KvCache, KvShape};

/// The cached keys and values of all slots of a stage.
pub(crate) struct Kv {
    pub(crate) cache: KvCache,
    lens: Vec<u32>,
}

impl Kv {
    pub(crate) fn new(shape: KvShape) -> Result<Kv, KernelError> {
        Ok(Kv {
            cache: KvCache::new(shape)?,
            lens: vec![0; shape.slots],
        })
    }

    /// Rows that `slot` holds; 0 for a slot that does not exist.
    pub(crate) fn len(&self, slot: u32) -> u32 {
        self.lens.get(slot as usize).copied().unwrap_or(0)
    }

    /// Sets the number of valid rows; `0` gives the memory back.
    pub(crate) fn set_len(&mut self, slot: u32, len: u32) {
        let Some(held) = self.lens.get_mut(slot as usize) else {
            return;
        };
        if len == 0 && *held > 0 {
            // A slot that exists can only fail to give pages back, which costs memory and nothing else.
            let _ = self.cache.release(slot as usize);
        }
        *held = len;
    }

    /// Copies the first `len` rows of `from`, which holds them, to `to`, which then holds exactly those.
    pub(crate) fn copy_prefix(&mut self, from: u32, to: u32, len: u32) -> Result<(), KernelError> {
        if from != to {
            self.set_len(to, 0);
            self.cache
                .copy_prefix(from as usize, to as usize, len as usize)?;
        }
        self.set_len(to, len);
        Ok(())
    }

    /// The rows `rows` of `slot`.
    pub(crate) fn export(&self, slot: u32, rows: Range<u32>) -> Result<Vec<u8>, KernelError> {
        self.cache
            .export(slot as usize, rows.start as usize..rows.end as usize)
    }

    /// Writes exported rows at `position`; the slot then ends behind them.
    pub(crate) fn import(
        &mut self,
        slot: u32,
        position: u32,
        bytes: &[u8],
    ) -> Result<(), KernelError> {
        let rows = self.cache.import(slot as usize, position as usize, bytes)?;
        self.set_len(slot, position + rows as u32);
        Ok(())
    }
}
