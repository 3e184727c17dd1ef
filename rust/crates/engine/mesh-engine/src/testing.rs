//! A stage small enough to know every answer beforehand: its logits are a hash of the tokens in its KV cache.
//!
//! A scheduler that loses a row, computes one twice, mixes up slots or trusts rows that are not there changes that hash,
//! and with it every token that follows. The tests of `mesh-pipeline` include this file, too.

use std::ops::Range;

use mesh_engine::sampler::{Sampler, Scratch};
use mesh_engine::text::TextPipeline;
use mesh_engine::{
    LogitRows, ModelShape, Request, Segment, SlotId, Stage, StageError, StageInfo, StageInput,
    StageOutput, Vocabulary,
};

/// Tokens of the vocabulary; token 0 ends an answer.
pub(crate) const VOCAB: usize = 48;

pub(crate) struct HashStage {
    info: StageInfo,
    /// For each slot, row by row, a hash for each layer of all its input up to that row.
    slots: Vec<Vec<u64>>,
    output: Vec<f32>,
    /// Fails or panics in this call of `forward`, counted from 0.
    pub(crate) fails_at: Option<usize>,
    /// The call that finds no memory.
    pub(crate) exhausted_at: Option<usize>,
    pub(crate) panics_at: Option<usize>,
    pub(crate) calls: usize,
    /// Simulated duration of a step of some rows; `None` means no delay.
    pub(crate) step_time: Option<std::time::Duration>,
}

impl HashStage {
    /// A whole model of one layer.
    pub(crate) fn new(slots: u32, context: u32, max_rows: u32) -> Self {
        HashStage::part(0..1, 1, slots, context, max_rows)
    }

    /// These layers of a model that has `of`.
    pub(crate) fn part(
        layers: Range<u32>,
        of: u32,
        slots: u32,
        context: u32,
        max_rows: u32,
    ) -> Self {
        HashStage {
            info: StageInfo {
                shape: ModelShape {
                    layers: of,
                    hidden: 2,
                    vocab: VOCAB,
                    kv_heads: 1,
                    head_dim: 1,
                },
                kv_bytes_per_token: 8 * u64::from(layers.end - layers.start),
                layers,
                slots,
                context,
                max_rows,
                weight_bytes: 0,
            },
            slots: vec![Vec::new(); slots as usize],
            output: Vec::new(),
            fails_at: None,
            exhausted_at: None,
            panics_at: None,
            calls: 0,
            step_time: None,
        }
    }

    /// KV rows in all slots.
    pub(crate) fn rows_held(&self) -> usize {
        (0..self.info.slots)
            .map(|slot| self.kv_len(slot) as usize)
            .sum()
    }

    fn layers(&self) -> usize {
        self.info.layers.len()
    }

    /// Computes one row of a slot, whose input is `x`.
    fn row(&mut self, slot: SlotId, mut x: u64, is_wanted: bool) {
        let layers = self.layers();
        let slot = &mut self.slots[slot as usize];
        let before = slot.len().checked_sub(layers);
        for layer in 0..layers {
            x = hash(before.map_or(0, |before| slot[before + layer]), x);
            slot.push(x);
        }
        if !self.info.is_last() {
            self.output.extend(split(x));
        } else if is_wanted {
            self.output.extend(logits(x));
        }
    }
}

impl Stage for HashStage {
    fn info(&self) -> &StageInfo {
        &self.info
    }

    fn forward(
        &mut self,
        segments: &[Segment],
        input: StageInput<'_>,
    ) -> Result<StageOutput<'_>, StageError> {
        let call = self.calls;
        self.calls += 1;
        if let Some(time) = self.step_time {
            std::thread::sleep(time);
        }
        assert!(self.panics_at != Some(call), "told to panic");
        if self.exhausted_at == Some(call) {
            return Err(StageError::OutOfMemory {
                backend: "hash",
                message: "told to find none".to_owned(),
            });
        }
        if self.fails_at == Some(call) {
            // After a backend's failure the slot's content is undefined.
            for segment in segments {
                self.slots[segment.slot as usize].clear();
            }
            return Err(StageError::Backend {
                backend: "hash",
                message: "told to fail".to_owned(),
            });
        }
        let (is_first, is_last) = (self.info.is_first(), self.info.is_last());
        let inputs: Vec<u64> = match input {
            StageInput::Tokens(tokens) if is_first => tokens.iter().map(|&t| t.into()).collect(),
            StageInput::Hidden(rows) if !is_first => rows.chunks(2).map(join).collect(),
            _ => return Err(StageError::Malformed("input of the wrong kind".to_owned())),
        };
        let rows: u32 = segments.iter().map(|s| s.rows).sum();
        assert!(rows <= self.info.max_rows && rows as usize == inputs.len());
        assert!(rows >= 1 || !(is_first && is_last), "an empty step");
        self.output.clear();
        let mut inputs = inputs.into_iter();
        for (i, segment) in segments.iter().enumerate() {
            assert!(segments[..i].iter().all(|other| other.slot != segment.slot));
            let held = self.kv_len(segment.slot);
            if segment.position > held {
                return Err(StageError::Gap {
                    slot: segment.slot,
                    held,
                    position: segment.position,
                });
            }
            let end = segment.position + segment.rows;
            assert!(end <= self.info.context, "the context overflows");
            self.truncate(segment.slot, segment.position);
            for (row, x) in (1..).zip(inputs.by_ref().take(segment.rows as usize)) {
                let is_wanted = match segment.logits {
                    LogitRows::None => false,
                    LogitRows::Last => row == segment.rows,
                    LogitRows::All => true,
                };
                self.row(segment.slot, x, is_wanted);
            }
        }
        Ok(match is_last {
            true => StageOutput::Logits(&self.output),
            false => StageOutput::Hidden(&self.output),
        })
    }

    fn kv_len(&self, slot: SlotId) -> u32 {
        (self.slots[slot as usize].len() / self.layers()) as u32
    }

    fn truncate(&mut self, slot: SlotId, len: u32) {
        let len = len as usize * self.layers();
        self.slots[slot as usize].truncate(len);
    }

    fn copy_prefix(&mut self, from: SlotId, to: SlotId, len: u32) -> Result<(), StageError> {
        let held = self.kv_len(from);
        if held < len {
            return Err(StageError::Gap {
                slot: from,
                held,
                position: len,
            });
        }
        let len = len as usize * self.layers();
        self.slots[to as usize] = self.slots[from as usize][..len].to_vec();
        Ok(())
    }

    fn kv_export(&self, slot: SlotId, rows: Range<u32>) -> Result<Vec<u8>, StageError> {
        let (first, last) = (rows.start as usize, rows.end as usize);
        let hashes = &self.slots[slot as usize][first * self.layers()..last * self.layers()];
        Ok(hashes.iter().flat_map(|hash| hash.to_le_bytes()).collect())
    }

    fn kv_import(&mut self, slot: SlotId, position: u32, bytes: &[u8]) -> Result<(), StageError> {
        assert!(position <= self.kv_len(slot));
        self.truncate(slot, position);
        let hashes = bytes.as_chunks().0.iter().copied().map(u64::from_le_bytes);
        self.slots[slot as usize].extend(hashes);
        Ok(())
    }
}

/// The vocabulary of [`HashStage`]: letters, spaces and halves of an "é".
pub(crate) struct Letters;

impl Vocabulary for Letters {
    fn size(&self) -> usize {
        VOCAB
    }

    fn text(&self, token: u32) -> &[u8] {
        const ALPHABET: &[u8; 26] = b"abcdefghijklmnopqrstuvwxyz";
        match token {
            0 => b"",
            1..=26 => &ALPHABET[token as usize - 1..token as usize],
            27..=30 => b"the ",
            31..=34 => &[0xc3],
            35..=38 => &[0xa9],
            _ => b" ",
        }
    }

    fn is_end(&self, token: u32) -> bool {
        token == 0
    }
}

/// The logits behind a history. Token 0 is unlikely, so that answers have some length.
pub(crate) fn logits(history: u64) -> impl Iterator<Item = f32> {
    (0..VOCAB as u64).map(move |token| {
        let noise = mix(history ^ token.wrapping_mul(0x9e37_79b9)) >> 40;
        let logit = noise as f32 / (1u32 << 24) as f32 * 8.0;
        if token == 0 { logit - 3.0 } else { logit }
    })
}

/// The hash of a history with one more token.
pub(crate) fn extend(history: u64, token: u32) -> u64 {
    hash(history, token.into())
}

fn hash(history: u64, x: u64) -> u64 {
    mix(history.rotate_left(17) ^ x ^ 0x5851_f42d_4c95_7f2d) & MASK
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A hash has 48 bits, so that two floats of 24 hold it exactly.
const MASK: u64 = (1 << 48) - 1;

fn split(hash: u64) -> [f32; 2] {
    [(hash >> 24) as f32, (hash & 0xff_ffff) as f32]
}

fn join(row: &[f32]) -> u64 {
    (row[0] as u64) << 24 | row[1] as u64
}

/// The whole answer to `request` with its text, computed token by token without scheduler or stage.
pub(crate) fn answer(request: &Request, context: u32) -> (Vec<u32>, String) {
    let room = context - request.prompt_tokens.len() as u32;
    let max_tokens = request.max_tokens.map_or(room, |n| n.min(room));
    let mut history = request
        .prompt_tokens
        .iter()
        .fold(0, |h, &token| extend(h, token));
    let mut sampler = Sampler::new(request.params.clone(), &request.prompt_tokens, &[]);
    let mut text = TextPipeline::new(request.stop.clone(), &request.echo, 0);
    let mut tokens = Vec::new();
    for index in 0..max_tokens {
        let row: Vec<f32> = logits(history).collect();
        let token = sampler
            .choose(&row, index, &mut Scratch::default())
            .unwrap()
            .token;
        if Letters.is_end(token) && !request.ignore_eos {
            break;
        }
        tokens.push(token);
        sampler.accept(token);
        history = extend(history, token);
        if text.push(Letters.text(token)) {
            break;
        }
    }
    text.finish();
    (tokens, text.take())
}
