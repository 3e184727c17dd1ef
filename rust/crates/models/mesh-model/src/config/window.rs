//! Layers whose rows see only the last positions.

use super::architecture::Architecture;
use super::error::ConfigError;
use super::keys::{ArchitectureKeys, MAX_CONTEXT, MAX_LAYERS};
use super::rope::Rope;
use crate::gguf::Value;

/// The layers with a sliding window, and their rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct SlidingWindow {
    /// Positions that a row sees, its own among them.
    pub size: u32,
    /// One entry per layer: true if it has the window.
    pub layers: Vec<bool>,
    /// The rotary embedding of the layers that have it.
    pub rope: Rope,
}

impl SlidingWindow {
    /// Flags of layers: all have the window, except every `period`th; for 0, all have it.
    pub fn all_but_every(period: u32, layers: u32) -> Vec<bool> {
        (1..=layers)
            .map(|number| period == 0 || !number.is_multiple_of(period))
            .collect()
    }

    /// True if `layer` has the window.
    pub fn has(&self, layer: u32) -> bool {
        self.layers.get(layer as usize).copied().unwrap_or(false)
    }

    /// Reads `attention.sliding_window` and its pattern, a period or a flag for each layer. Without a
    /// pattern, Gemma 3 and gpt-oss have their own, and other families have the window in all layers (Mistral).
    pub(super) fn from_keys(
        keys: &ArchitectureKeys<'_>,
        layers: u32,
        rope: &Rope,
    ) -> Result<Option<Self>, ConfigError> {
        const SIZE: &str = "attention.sliding_window";
        const PATTERN: &str = "attention.sliding_window_pattern";
        let size = match keys.checkpoint.unsigned(&keys.full(SIZE))? {
            None | Some(0) => return Ok(None),
            Some(size) if size <= MAX_CONTEXT => size as u32,
            Some(size) => {
                return Err(keys.bad(SIZE, size, format!("it must be at most {MAX_CONTEXT}")));
            }
        };
        let pattern = match keys.checkpoint.metadata(&keys.full(PATTERN)) {
            Some(Value::Array(flags)) => {
                let wrong = || {
                    let reason = format!("it must have a flag for each of the {layers} layers");
                    keys.bad(PATTERN, "an array", reason)
                };
                // Check the length before reading: the file determines it.
                if flags.len() != layers as usize {
                    return Err(wrong());
                }
                let flags = flags.iter().map(|flag| match flag {
                    Value::Bool(flag) => Some(flag),
                    other => other.as_unsigned().map(|flag| flag != 0),
                });
                flags.collect::<Option<Vec<bool>>>().ok_or_else(wrong)?
            }
            Some(_) => match keys.checkpoint.unsigned(&keys.full(PATTERN))? {
                Some(period) if period <= MAX_LAYERS => {
                    SlidingWindow::all_but_every(period as u32, layers)
                }
                period => {
                    let period = period.unwrap_or_default();
                    return Err(keys.bad(
                        PATTERN,
                        period,
                        format!("it must be at most {MAX_LAYERS}"),
                    ));
                }
            },
            None => match keys.architecture {
                Architecture::Gemma3 => SlidingWindow::all_but_every(GEMMA_PERIOD, layers),
                Architecture::GptOss => SlidingWindow::all_but_every(GPT_OSS_PERIOD, layers),
                _ => vec![true; layers as usize],
            },
        };
        Ok(Some(SlidingWindow {
            size,
            layers: pattern,
            rope: rope.of_windows(keys)?,
        }))
    }
}

/// Five layers with the window, then one without.
const GEMMA_PERIOD: u32 = 6;
/// One layer with the window, then one without.
const GPT_OSS_PERIOD: u32 = 2;
