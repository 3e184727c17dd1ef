//! A model small enough to know every answer beforehand: a layer's output is a hash of all its input so far.

use std::ops::Range;

use mesh_engine::{
    LogitRows, ModelShape, Segment, SlotId, Stage, StageError, StageInfo, StageInput, StageOutput,
    Vocabulary,
};

pub(super) const LAYERS: u32 = 6;
pub(super) const VOCAB: usize = 40;
pub(super) const CONTEXT: u32 = 160;
pub(super) const SLOTS: u32 = 4;
pub(super) const MAX_ROWS: u32 = 16;

/// Layers of the toy model. A lost, doubled or misplaced row changes every logit after it.
pub(super) struct ToyStage {
    info: StageInfo,
    /// For each slot and row, the state of each layer.
    slots: Vec<Vec<Vec<u64>>>,
    output: Vec<f32>,
}

impl ToyStage {
    pub(super) fn new(layers: Range<u32>) -> Self {
        ToyStage {
            info: info(layers),
            slots: vec![Vec::new(); SLOTS as usize],
            output: Vec::new(),
        }
    }
}

pub(super) fn info(layers: Range<u32>) -> StageInfo {
    StageInfo {
        shape: ModelShape {
            layers: LAYERS,
            hidden: 2,
            vocab: VOCAB,
            kv_heads: 1,
            head_dim: 1,
        },
        kv_bytes_per_token: 8 * u64::from(layers.end - layers.start),
        layers,
        slots: SLOTS,
        context: CONTEXT,
        max_rows: MAX_ROWS,
        weight_bytes: 0,
    }
}

impl Stage for ToyStage {
    fn info(&self) -> &StageInfo {
        &self.info
    }

    fn forward(
        &mut self,
        segments: &[Segment],
        input: StageInput<'_>,
    ) -> Result<StageOutput<'_>, StageError> {
        let rows: Vec<u64> = match input {
            StageInput::Tokens(tokens) => {
                assert!(self.info.is_first());
                tokens
                    .iter()
                    .map(|&token| mix(u64::from(token) + 1))
                    .collect()
            }
            StageInput::Hidden(hidden) => {
                assert!(!self.info.is_first());
                hidden.chunks(2).map(|row| join(row[0], row[1])).collect()
            }
        };
        let mut rows = rows.into_iter();
        self.output.clear();
        for segment in segments {
            let slot = &mut self.slots[segment.slot as usize];
            let held = slot.len() as u32;
            if segment.position > held {
                return Err(StageError::Gap {
                    slot: segment.slot,
                    held,
                    position: segment.position,
                });
            }
            assert!(segment.position + segment.rows <= CONTEXT);
            slot.truncate(segment.position as usize);
            for row in 0..segment.rows {
                let mut x = rows.next().expect("as many rows as the segments say");
                let mut states = Vec::new();
                for layer in 0..self.info.layers.len() {
                    let before = slot.last().map_or(0, |states| states[layer]);
                    let state = mix(before.rotate_left(7) ^ x);
                    states.push(state);
                    x = mix(x ^ state) & MASK;
                }
                slot.push(states);
                if !self.info.is_last() {
                    self.output.extend(split(x));
                } else if match segment.logits {
                    LogitRows::None => false,
                    LogitRows::Last => row + 1 == segment.rows,
                    LogitRows::All => true,
                } {
                    self.output.extend(logits(x));
                }
            }
        }
        assert!(rows.next().is_none());
        Ok(if self.info.is_last() {
            StageOutput::Logits(&self.output)
        } else {
            StageOutput::Hidden(&self.output)
        })
    }

    fn kv_len(&self, slot: SlotId) -> u32 {
        self.slots[slot as usize].len() as u32
    }

    fn truncate(&mut self, slot: SlotId, len: u32) {
        self.slots[slot as usize].truncate(len as usize);
    }

    fn copy_prefix(&mut self, from: SlotId, to: SlotId, len: u32) -> Result<(), StageError> {
        self.slots[to as usize] = self.slots[from as usize][..len as usize].to_vec();
        Ok(())
    }

    fn kv_export(&self, slot: SlotId, rows: Range<u32>) -> Result<Vec<u8>, StageError> {
        let rows = &self.slots[slot as usize][rows.start as usize..rows.end as usize];
        Ok(rows
            .iter()
            .flatten()
            .flat_map(|s| s.to_le_bytes())
            .collect())
    }

    fn kv_import(&mut self, slot: SlotId, position: u32, bytes: &[u8]) -> Result<(), StageError> {
        let slot = &mut self.slots[slot as usize];
        assert!(position as usize <= slot.len());
        slot.truncate(position as usize);
        let states: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|b| u64::from_le_bytes(b.try_into().expect("8 bytes")))
            .collect();
        slot.extend(states.chunks(self.info.layers.len()).map(<[u64]>::to_vec));
        Ok(())
    }
}

/// The tokens of the toy model are their own text.
pub(super) struct Letters;

impl Vocabulary for Letters {
    fn size(&self) -> usize {
        VOCAB
    }

    fn text(&self, token: u32) -> &[u8] {
        const ALPHABET: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789.,!?";
        &ALPHABET[token as usize..=token as usize]
    }

    fn is_end(&self, _: u32) -> bool {
        false
    }
}

const MASK: u64 = (1 << 48) - 1;

/// A number of 48 bits as two floats of 24, which hold them exactly.
fn split(x: u64) -> [f32; 2] {
    [(x >> 24) as f32, (x & 0xff_ffff) as f32]
}

fn join(high: f32, low: f32) -> u64 {
    (high as u64) << 24 | low as u64
}

fn logits(x: u64) -> impl Iterator<Item = f32> {
    (0..VOCAB as u64).map(move |token| (mix(x ^ (token << 50)) >> 40) as f32 / 1e6)
}

fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) & MASK
}
