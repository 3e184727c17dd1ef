//! Rotary position embedding: which pairs of a head turn together, and how fast.

use super::architecture::Architecture;
use super::error::ConfigError;
use super::keys::{ArchitectureKeys, MAX_CONTEXT, MAX_WIDTH};
use crate::checkpoint::RopeStyle;

/// Scaling of positions for contexts longer than the original one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
    None,
    /// All angles are divided by `factor`.
    Linear {
        /// At least 1 in any real model.
        factor: f32,
    },
    /// YaRN: slow pairs are divided by `factor`, fast ones stay, those between are blended.
    Yarn {
        /// At least 1 in any real model.
        factor: f32,
        /// Context the model had before it was stretched.
        original_context: u32,
        /// Turns over the original context above which a pair is fast.
        beta_fast: f32,
        /// Turns over the original context below which a pair is slow.
        beta_slow: f32,
        /// Factor on queries and keys: [`RopeScaling::yarn_attention_factor`], unless the model has its own.
        attention_factor: f32,
        /// The blend begins and ends at whole pairs, rounded outwards; gpt-oss rounds nothing.
        truncate: bool,
    },
    /// Llama 3.1's: pairs with long waves are divided by `factor`, those with short ones stay, those between
    /// are blended. GGUF files have the outcome instead, as [`Rope::freq_factors`].
    Llama3 {
        /// At least 1 in any real model.
        factor: f32,
        /// Turns over the original context below which a pair is divided.
        low_freq_factor: f32,
        /// Turns over the original context above which a pair stays; over `low_freq_factor`.
        high_freq_factor: f32,
        /// Context the model had before it was stretched.
        original_context: u32,
    },
}

impl RopeScaling {
    /// YaRN's default factor on queries and keys: `1 + 0.1 ln(factor)` (equation 22 of
    /// <https://arxiv.org/abs/2309.00071>).
    pub fn yarn_attention_factor(factor: f32) -> f32 {
        RopeScaling::yarn_mscale(factor, 1.0)
    }

    /// `1 + 0.1 weight ln(factor)`: what Hugging Face's configurations weigh by `mscale` and `mscale_all_dim`.
    pub fn yarn_mscale(factor: f32, weight: f32) -> f32 {
        1.0 + 0.1 * weight * factor.max(1.0).ln()
    }
}

/// Rotary position embedding of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the geometric sequence of frequencies.
    pub base: f32,
    /// Elements of each head that turn, from its first on; even. With latent attention they are its last.
    pub dim: usize,
    /// Arrangement of pairs within a head.
    pub style: RopeStyle,
    /// Scaling of positions for long contexts.
    pub scaling: RopeScaling,
    /// Divisors of the frequencies, one per pair (Llama 3's `rope_freqs.weight`).
    pub freq_factors: Option<Vec<f32>>,
}

impl Rope {
    /// The angle in radians by which each pair turns from one position to the next: `dim / 2` values.
    ///
    /// Pair i turns by base^(-2i/dim), divided by its frequency factor, then scaled.
    pub fn frequencies(&self) -> Vec<f32> {
        let ramp = self.yarn_ramp();
        (0..self.dim / 2)
            .map(|i| {
                let plain = f64::from(self.base).powf(-2.0 * i as f64 / self.dim as f64);
                let plain = match &self.freq_factors {
                    Some(factors) => plain / f64::from(factors[i]),
                    None => plain,
                };
                let frequency = match self.scaling {
                    RopeScaling::None => plain,
                    RopeScaling::Linear { factor } => plain / f64::from(factor),
                    RopeScaling::Yarn { factor, .. } => {
                        let keep = ramp(i);
                        plain / f64::from(factor) * (1.0 - keep) + plain * keep
                    }
                    RopeScaling::Llama3 {
                        factor,
                        low_freq_factor,
                        high_freq_factor,
                        original_context,
                    } => {
                        let turns = f64::from(original_context) * plain / std::f64::consts::TAU;
                        let (low, high) = (f64::from(low_freq_factor), f64::from(high_freq_factor));
                        let keep = ((turns - low) / (high - low).max(1e-6)).clamp(0.0, 1.0);
                        plain / f64::from(factor) * (1.0 - keep) + plain * keep
                    }
                };
                frequency as f32
            })
            .collect()
    }

    /// Factor on the rotated queries and keys: 1 except with YaRN.
    pub fn magnitude(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn {
                attention_factor, ..
            } => attention_factor,
            _ => 1.0,
        }
    }

    /// YaRN's blend of each pair, from slow (0) to fast (1) (<https://arxiv.org/abs/2309.00071>).
    fn yarn_ramp(&self) -> impl Fn(usize) -> f64 {
        let (mut low, mut high) = (0.0, 0.0);
        if let RopeScaling::Yarn {
            original_context,
            beta_fast,
            beta_slow,
            truncate,
            ..
        } = self.scaling
        {
            // The pair that makes `turns` turns over the original context.
            let pair = |turns: f32| {
                let wave = f64::from(original_context) / (f64::from(turns) * std::f64::consts::TAU);
                self.dim as f64 * wave.ln() / (2.0 * f64::from(self.base).ln())
            };
            let ends = (pair(beta_fast), pair(beta_slow));
            let (first, last) = match truncate {
                true => (ends.0.floor(), ends.1.ceil()),
                false => ends,
            };
            low = first.max(0.0);
            high = last.min(self.dim as f64 - 1.0);
        }
        move |i| 1.0 - ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0)
    }

    pub(super) fn from_keys(
        keys: &ArchitectureKeys<'_>,
        head_dim: usize,
    ) -> Result<Self, ConfigError> {
        let dim = keys
            .optional_count("rope.dimension_count", MAX_WIDTH)?
            .map_or(head_dim, |dim| dim as usize);
        if dim > head_dim || !dim.is_multiple_of(2) {
            let reason = format!("it must be even and at most the head's width {head_dim}");
            return Err(keys.bad("rope.dimension_count", dim, reason));
        }
        let base = keys
            .positive("rope.freq_base")?
            .unwrap_or(match keys.architecture {
                Architecture::Gemma3 => 1_000_000.0,
                _ => 10_000.0,
            });
        if base <= 1.0 {
            return Err(keys.bad("rope.freq_base", base, "it must be over 1".into()));
        }
        Ok(Rope {
            base,
            dim,
            style: match keys.architecture {
                Architecture::Llama | Architecture::GraniteMoe => keys.checkpoint.row_order(),
                Architecture::Qwen2
                | Architecture::Qwen3
                | Architecture::Gemma3
                | Architecture::Qwen3Moe
                | Architecture::Qwen2Moe
                | Architecture::Olmoe
                | Architecture::GptOss => RopeStyle::Halves,
                // Pairs are neighbours in folders, too.
                Architecture::Deepseek2 => RopeStyle::Interleaved,
            },
            scaling: scaling(keys)?,
            freq_factors: freq_factors(keys, dim / 2)?,
        })
    }

    /// The embedding of layers with a window. Gemma 3's turn faster than the others' and are not stretched;
    /// other families have one for all.
    pub(super) fn of_windows(&self, keys: &ArchitectureKeys<'_>) -> Result<Self, ConfigError> {
        const BASE: &str = "rope.freq_base_swa";
        let mut rope = self.clone();
        if keys.architecture == Architecture::Gemma3 {
            rope.base = 10_000.0;
            rope.scaling = RopeScaling::None;
            rope.freq_factors = None;
        }
        if let Some(base) = keys.positive(BASE)? {
            if base <= 1.0 {
                return Err(keys.bad(BASE, base, "it must be over 1".into()));
            }
            rope.base = base;
        }
        Ok(rope)
    }
}

fn scaling(keys: &ArchitectureKeys<'_>) -> Result<RopeScaling, ConfigError> {
    let key = keys.full("rope.scaling.type");
    let factor = keys.positive("rope.scaling.factor")?;
    let kind = match keys.checkpoint.string(&key)? {
        Some(kind) => kind,
        // Files older than the key have only a factor.
        None => match keys.positive("rope.scale_linear")?.or(factor) {
            Some(factor) => return Ok(RopeScaling::Linear { factor }),
            None => "none",
        },
    };
    match kind {
        "none" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear {
            factor: factor.unwrap_or(1.0),
        }),
        "yarn" => yarn(keys, factor.unwrap_or(1.0)),
        other => Err(ConfigError::Unsupported {
            feature: format!("rope scaling {other:?} ({key})"),
        }),
    }
}

fn yarn(keys: &ArchitectureKeys<'_>, factor: f32) -> Result<RopeScaling, ConfigError> {
    // The file's factor is one on what follows from the formula.
    let own = keys.positive("rope.scaling.attn_factor")?.unwrap_or(1.0);
    let plain = RopeScaling::yarn_attention_factor(factor);
    let formula = match keys.yarn_weight()? {
        None => plain,
        // DeepSeek's weights of both logarithms are the same.
        Some(_) if keys.architecture == Architecture::Deepseek2 => 1.0,
        Some(weight) => plain / RopeScaling::yarn_mscale(factor, weight),
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_context: match keys
            .optional_count("rope.scaling.original_context_length", MAX_CONTEXT)?
        {
            Some(context) => context as u32,
            None => keys.count("context_length", MAX_CONTEXT)? as u32,
        },
        beta_fast: keys
            .positive("rope.scaling.yarn_beta_fast")?
            .unwrap_or(32.0),
        beta_slow: keys.positive("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
        attention_factor: own * formula,
        // GGUF has no key for it; this one comes from config.json. gpt-oss was trained without it.
        truncate: keys
            .checkpoint
            .bool(&keys.full("rope.scaling.yarn_truncate"))?
            .unwrap_or(keys.architecture != Architecture::GptOss),
    })
}

fn freq_factors(
    keys: &ArchitectureKeys<'_>,
    pairs: usize,
) -> Result<Option<Vec<f32>>, ConfigError> {
    let Some(tensor) = keys.checkpoint.tensors().get("rope_freqs.weight") else {
        return Ok(None);
    };
    if tensor.dims != [pairs as u64] {
        return Err(ConfigError::Shape {
            tensor: tensor.name.into(),
            found: tensor.dims.into(),
            wanted: vec![pairs as u64],
        });
    }
    let factors = tensor.to_f32()?;
    match factors
        .iter()
        .find(|factor| !(factor.is_finite() && **factor > 0.0))
    {
        Some(factor) => Err(ConfigError::Value {
            key: tensor.name.into(),
            value: factor.to_string(),
            reason: "every frequency factor must be a number over 0".into(),
        }),
        None => Ok(Some(factors)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> Rope {
        Rope {
            base: 10_000.0,
            dim: 64,
            style: RopeStyle::Halves,
            scaling,
            freq_factors: None,
        }
    }

    fn close(a: f32, b: f32) -> bool {
        (a - b).abs() <= 1e-6 * b.abs()
    }

    #[test]
    fn the_first_pair_turns_by_one_radian_and_the_rest_ever_slower() {
        let frequencies = rope(RopeScaling::None).frequencies();
        assert_eq!(frequencies.len(), 32);
        assert_eq!(frequencies[0], 1.0);
        assert!(close(frequencies[16], 0.01));
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        let plain = rope(RopeScaling::None).frequencies();
        let scaled = rope(RopeScaling::Linear { factor: 4.0 }).frequencies();
        assert!(plain.iter().zip(&scaled).all(|(p, s)| close(*s, p / 4.0)));
    }

    #[test]
    fn frequency_factors_divide_their_pair() {
        let mut with_factors = rope(RopeScaling::None);
        let mut factors = vec![1.0; 32];
        factors[31] = 8.0;
        with_factors.freq_factors = Some(factors);
        let (plain, scaled) = (
            rope(RopeScaling::None).frequencies(),
            with_factors.frequencies(),
        );
        assert_eq!(plain[..31], scaled[..31]);
        assert!(close(scaled[31], plain[31] / 8.0));
    }

    /// Frequencies at some pairs, computed in double precision from the formulas as they were published.
    #[track_caller]
    fn expect(rope: &Rope, pairs: &[(usize, f64)]) {
        let frequencies = rope.frequencies();
        for &(i, expected) in pairs {
            let off = (f64::from(frequencies[i]) / expected - 1.0).abs();
            assert!(off < 1e-6, "pair {i}: {} is not {expected}", frequencies[i]);
        }
    }

    /// The formula is that of <https://github.com/jquesnelle/yarn>, by the authors of
    /// <https://arxiv.org/abs/2309.00071>.
    #[test]
    fn yarn_gives_the_published_frequencies() {
        let yarn = |factor, original_context| RopeScaling::Yarn {
            factor,
            original_context,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: RopeScaling::yarn_attention_factor(factor),
            truncate: true,
        };
        // Qwen2.5 with 131,072 tokens; Llama 2 with 65,536.
        let qwen = Rope {
            base: 1e6,
            dim: 128,
            ..rope(yarn(4.0, 32_768))
        };
        expect(
            &qwen,
            &[
                (0, 1.0),
                (23, 0.006978305848598663),
                (24, 0.005375321490790102),
                (30, 0.0010643609812470017),
                (39, 6.490394320837028e-5),
                (40, 4.445698525097307e-5),
                (63, 3.102344401879299e-7),
            ],
        );
        assert!(close(qwen.magnitude(), 1.138_629_4));
        let llama = Rope {
            dim: 128,
            ..rope(yarn(16.0, 4096))
        };
        expect(
            &llama,
            &[
                (20, 0.056234132519034905),
                (21, 0.046940859997959404),
                (40, 0.000881788962931567),
                (45, 0.00015177160473182487),
                (46, 8.334508951020775e-5),
                (63, 7.217387404309114e-6),
            ],
        );
        assert!(close(llama.magnitude(), 1.277_258_9));
        assert_eq!(rope(RopeScaling::Linear { factor: 4.0 }).magnitude(), 1.0);
    }

    /// Computed by `ROPE_INIT_FUNCTIONS["yarn"]` of `transformers` 5.24 for the default configuration of gpt-oss
    /// and for that of DeepSeek-V2-Lite, in single precision.
    #[test]
    fn yarn_gives_the_frequencies_of_transformers_with_and_without_rounded_ends() {
        let yarn = |factor, truncate| RopeScaling::Yarn {
            factor,
            original_context: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: RopeScaling::yarn_attention_factor(factor),
            truncate,
        };
        let oss = Rope {
            base: 150_000.0,
            ..rope(yarn(32.0, false))
        };
        expect(
            &oss,
            &[
                (0, 1.0),
                (8, 0.050_813_272_6),
                (9, 0.031_705_696_1),
                (12, 0.006_794_959_31),
                (16, 0.000_456_483_918),
                (17, 0.000_129_318_694),
                (18, 3.830_881_18e-5),
                (31, 3.023_511_4e-7),
            ],
        );
        assert!(close(oss.magnitude(), 1.346_573_6));
        let deepseek = rope(yarn(40.0, true));
        expect(
            &deepseek,
            &[
                (10, 0.056_234_128_8),
                (11, 0.039_006_926_1),
                (16, 0.005_500_000_44),
                (21, 0.000_414_990_413),
                (22, 0.000_177_827_94),
                (23, 3.333_803_4e-5),
                (31, 3.333_803_53e-6),
            ],
        );
        // With mscale 1 and mscale_all_dim 0.707.
        let ratio = RopeScaling::yarn_mscale(40.0, 1.0) / RopeScaling::yarn_mscale(40.0, 0.707);
        assert!(close(ratio, 1.085_726_4));
    }

    /// The formula is `apply_scaling` of <https://github.com/meta-llama/llama-models>.
    #[test]
    fn llama_3_gives_the_published_frequencies_from_the_formula_and_from_factors() {
        let llama3 = |factor| RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        };
        // Llama 3.1 8B and Llama 3.2 1B.
        let large = Rope {
            base: 5e5,
            dim: 128,
            ..rope(llama3(8.0))
        };
        let pairs = [
            (0, 1.0),
            (20, 0.016560440080994446),
            (28, 0.0032114459947525913),
            (29, 0.002166570763503359),
            (31, 0.0008567514129196321),
            (34, 0.00017850781276799638),
            (35, 9.556212353964683e-5),
            (63, 3.068925988914511e-7),
        ];
        expect(&large, &pairs);
        let small = Rope {
            base: 5e5,
            dim: 64,
            ..rope(llama3(32.0))
        };
        expect(
            &small,
            &[
                (14, 0.0032114459947525913),
                (15, 0.001290547928209264),
                (17, 9.70828780262767e-5),
                (31, 9.418306725434909e-8),
            ],
        );
        // As GGUF files have it: one divisor for each pair.
        let plain = Rope {
            scaling: RopeScaling::None,
            ..large.clone()
        };
        let scaled = large.frequencies();
        let factors = plain.frequencies().into_iter().zip(scaled);
        let from_factors = Rope {
            freq_factors: Some(factors.map(|(plain, scaled)| plain / scaled).collect()),
            ..plain
        };
        expect(&from_factors, &pairs);
    }
}
