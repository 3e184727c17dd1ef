//! A stage small enough to know every answer beforehand: its logits are a hash of the tokens in its KV cache.
//!
//! A scheduler that loses a row, computes one twice, mixes up slots or trusts rows that are not there changes that hash,
//! and with it every token that follows.

use std::ops::Range;

use crate::sampler::{Sampler, Scratch};
use crate::text::TextPipeline;
use crate::{
    LogitRows, ModelShape, Request, Segment, SlotId, Stage, StageError, StageInfo, StageInput,
    StageOutput, Vocabulary,
};

/// Tokens of the vocabulary; token 0 ends an answer.
pub(crate) const VOCAB: usize = 48;

pub(crate) struct HashStage {
    info: StageInfo,
    /// Hash of the tokens up to each row, by slot.
    slots: Vec<Vec<u64>>,
    logits: Vec<f32>,
    /// Fails or panics in this call of `forward`, counted from 0.
    pub(crate) fails_at: Option<usize>,
    pub(crate) panics_at: Option<usize>,
    pub(crate) calls: usize,
    /// Simulated duration of a step of some rows; `None` means no delay.
    pub(crate) step_time: Option<std::time::Duration>,
}

impl HashStage {
    pub(crate) fn new(slots: u32, context: u32, max_rows: u32) -> Self {
        HashStage {
            info: StageInfo {
                shape: ModelShape {
                    layers: 1,
                    hidden: 1,
                    vocab: VOCAB,
                    kv_heads: 1,
                    head_dim: 1,
                },
                layers: 0..1,
                slots,
                context,
                max_rows,
                kv_bytes_per_token: 8,
                weight_bytes: 0,
            },
            slots: vec![Vec::new(); slots as usize],
            logits: Vec::new(),
            fails_at: None,
            panics_at: None,
            calls: 0,
            step_time: None,
        }
    }

    /// KV rows in all slots.
    pub(crate) fn rows_held(&self) -> usize {
        self.slots.iter().map(Vec::len).sum()
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
        let StageInput::Tokens(mut tokens) = input else {
            return Err(StageError::Malformed("hidden rows".to_owned()));
        };
        let rows: u32 = segments.iter().map(|s| s.rows).sum();
        assert!(rows >= 1 && rows <= self.info.max_rows && rows as usize == tokens.len());
        self.logits.clear();
        for (i, segment) in segments.iter().enumerate() {
            assert!(segments[..i].iter().all(|other| other.slot != segment.slot));
            let slot = &mut self.slots[segment.slot as usize];
            let held = slot.len() as u32;
            if segment.position > held {
                return Err(StageError::Gap {
                    slot: segment.slot,
                    held,
                    position: segment.position,
                });
            }
            slot.truncate(segment.position as usize);
            let (own, rest) = tokens.split_at(segment.rows as usize);
            tokens = rest;
            for (r, &token) in own.iter().enumerate() {
                let history = extend(slot.last().copied().unwrap_or(0), token);
                slot.push(history);
                let wanted = match segment.logits {
                    LogitRows::None => false,
                    LogitRows::Last => r + 1 == own.len(),
                    LogitRows::All => true,
                };
                if wanted {
                    self.logits.extend(logits(history));
                }
            }
            assert!(
                slot.len() <= self.info.context as usize,
                "the context overflows"
            );
        }
        Ok(StageOutput::Logits(&self.logits))
    }

    fn kv_len(&self, slot: SlotId) -> u32 {
        self.slots[slot as usize].len() as u32
    }

    fn truncate(&mut self, slot: SlotId, len: u32) {
        self.slots[slot as usize].truncate(len as usize);
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
        self.slots[to as usize] = self.slots[from as usize][..len as usize].to_vec();
        Ok(())
    }

    fn kv_export(&self, _: SlotId, _: Range<u32>) -> Result<Vec<u8>, StageError> {
        Err(StageError::Malformed("not exported".to_owned()))
    }

    fn kv_import(&mut self, _: SlotId, _: u32, _: &[u8]) -> Result<(), StageError> {
        Err(StageError::Malformed("not imported".to_owned()))
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
    mix(history.rotate_left(17) ^ u64::from(token) ^ 0x5851_f42d_4c95_7f2d)
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
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
