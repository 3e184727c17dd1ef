//! Reading an architecture's keys within limits.

use super::architecture::Architecture;
use super::error::ConfigError;
use crate::checkpoint::Checkpoint;
use crate::gguf::{GgufError, Value};

/// Limits far above real models, that keep products of two of them well within a `u64` and an allocation
/// honest.
pub(crate) const MAX_LAYERS: u64 = 1 << 12;
pub(crate) const MAX_WIDTH: u64 = 1 << 20;
pub(crate) const MAX_VOCAB: u64 = 1 << 24;
pub(crate) const MAX_CONTEXT: u64 = 1 << 27;

/// The keys of one architecture: `<architecture>.<key>`.
pub(super) struct ArchitectureKeys<'a> {
    pub(super) checkpoint: &'a dyn Checkpoint,
    pub(super) architecture: Architecture,
}

impl ArchitectureKeys<'_> {
    pub(super) fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture.name())
    }

    /// A count from 1 to `limit` that must be there.
    pub(super) fn count(&self, key: &str, limit: u64) -> Result<u64, ConfigError> {
        self.optional_count(key, limit)?.ok_or_else(|| {
            GgufError::MissingKey {
                key: self.full(key),
            }
            .into()
        })
    }

    /// A count from 0 to `limit`; 0 if it is absent.
    pub(super) fn count_from_zero(&self, key: &str, limit: u64) -> Result<u64, ConfigError> {
        match self.checkpoint.unsigned(&self.full(key))? {
            Some(count) if count > limit => {
                Err(self.bad(key, count, format!("it must be at most {limit}")))
            }
            count => Ok(count.unwrap_or(0)),
        }
    }

    /// A count, or one count per layer that are all the same.
    pub(super) fn optional_count(&self, key: &str, limit: u64) -> Result<Option<u64>, ConfigError> {
        let full = self.full(key);
        let count = match self.checkpoint.metadata(&full) {
            None => return Ok(None),
            Some(Value::Array(array)) => {
                let mut counts = array.iter().map(|value| value.as_unsigned());
                let first = counts.next().flatten();
                if first.is_none() || counts.any(|count| count != first) {
                    return Err(self.bad(
                        key,
                        "an array",
                        "layers that differ from each other are not supported".into(),
                    ));
                }
                first
            }
            Some(_) => self.checkpoint.unsigned(&full)?,
        };
        match count {
            Some(count) if (1..=limit).contains(&count) => Ok(Some(count)),
            Some(count) => Err(self.bad(key, count, format!("it must be from 1 to {limit}"))),
            None => Ok(None),
        }
    }

    fn float(&self, key: &str) -> Result<Option<f32>, ConfigError> {
        Ok(self
            .checkpoint
            .float(&self.full(key))?
            .map(|value| value as f32))
    }

    /// A finite number over 0.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f32>, ConfigError> {
        match self.float(key)? {
            Some(value) if !(value.is_finite() && value > 0.0) => {
                Err(self.bad(key, value, "it must be a number over 0".into()))
            }
            other => Ok(other),
        }
    }

    /// The weight of the logarithm by which YaRN's factor on queries and keys is divided, where the file has
    /// one over 0: `mscale_all_dim` of `config.json`. DeepSeek's files have a tenth of it.
    pub(super) fn yarn_weight(&self) -> Result<Option<f32>, ConfigError> {
        const KEY: &str = "rope.scaling.yarn_log_multiplier";
        match self.float(KEY)? {
            Some(weight) if !(weight.is_finite() && weight >= 0.0) => {
                Err(self.bad(KEY, weight, "it must be a number from 0 on".into()))
            }
            other => {
                let unit = match self.architecture {
                    Architecture::Deepseek2 => 0.1,
                    _ => 1.0,
                };
                Ok(other
                    .filter(|weight| *weight > 0.0)
                    .map(|weight| weight / unit))
            }
        }
    }

    /// Widths of a head's key and value.
    pub(super) fn head_widths(
        &self,
        hidden: usize,
        heads: usize,
    ) -> Result<(usize, usize), ConfigError> {
        if self.architecture == Architecture::Deepseek2 {
            return self.latent_widths();
        }
        let head_dim = match self.optional_count("attention.key_length", MAX_WIDTH)? {
            Some(length) => length as usize,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let reason = format!("it must divide the embedding length {hidden}");
                return Err(self.bad("attention.head_count", heads, reason));
            }
        };
        if let Some(value) = self.optional_count("attention.value_length", MAX_WIDTH)?
            && value as usize != head_dim
        {
            let reason = format!("values as wide as keys are needed, and those have {head_dim}");
            return Err(self.bad("attention.value_length", value, reason));
        }
        Ok((head_dim, head_dim))
    }

    /// The same where keys and values come from a latent row. Files for the absorbed form have the widths of
    /// that row under the usual keys, and those of heads under others.
    fn latent_widths(&self) -> Result<(usize, usize), ConfigError> {
        let width = |absorbed: &str, plain: &str| match self.optional_count(absorbed, MAX_WIDTH)? {
            Some(width) => Ok(width as usize),
            None => self.count(plain, MAX_WIDTH).map(|width| width as usize),
        };
        Ok((
            width("attention.key_length_mla", "attention.key_length")?,
            width("attention.value_length_mla", "attention.value_length")?,
        ))
    }

    pub(super) fn vocab(&self, embedding_rows: u64) -> Result<usize, ConfigError> {
        if let Some(vocab) = self.optional_count("vocab_size", MAX_VOCAB)?
            && vocab != embedding_rows
        {
            return Err(self.bad(
                "vocab_size",
                vocab,
                format!("the embedding has {embedding_rows} rows"),
            ));
        }
        if embedding_rows > MAX_VOCAB {
            return Err(self.bad(
                "vocab_size",
                embedding_rows,
                format!("it must be from 1 to {MAX_VOCAB}"),
            ));
        }
        if let Some(tokens) = self.checkpoint.array("tokenizer.ggml.tokens")?
            && tokens.len() as u64 > embedding_rows
        {
            return Err(ConfigError::Value {
                key: "tokenizer.ggml.tokens".into(),
                value: format!("{} tokens", tokens.len()),
                reason: format!("the embedding has only {embedding_rows} rows"),
            });
        }
        Ok(embedding_rows as usize)
    }

    pub(super) fn norm_eps(&self) -> Result<f32, ConfigError> {
        const KEY: &str = "attention.layer_norm_rms_epsilon";
        match self.positive(KEY)? {
            Some(eps) if eps < 1.0 => Ok(eps),
            Some(eps) => Err(self.bad(KEY, eps, "it must be below 1".into())),
            None => Err(GgufError::MissingKey {
                key: self.full(KEY),
            }
            .into()),
        }
    }

    /// Bounds on scores, logits (Gemma 2) and projections (OLMo).
    pub(super) fn refuse_bounds(&self) -> Result<(), ConfigError> {
        for (key, what) in [
            ("attn_logit_softcapping", "soft capping"),
            ("final_logit_softcapping", "soft capping"),
            ("attention.clamp_kqv", "clamped queries, keys and values"),
        ] {
            if let Some(most) = self.float(key)?
                && most != 0.0
            {
                return Err(ConfigError::Unsupported {
                    feature: format!("{what} ({} = {most})", self.full(key)),
                });
            }
        }
        Ok(())
    }

    pub(super) fn query_scalar(
        &self,
        layers: u64,
        hidden: usize,
        heads: usize,
        head_dim: usize,
    ) -> Result<f32, ConfigError> {
        if let Some(scale) = self.positive("attention.scale")? {
            return Ok(1.0 / (scale * scale));
        }
        // Files of the 27B model do not say that it divides by more than its heads' width: readers know it by
        // its layers.
        Ok(
            match self.architecture == Architecture::Gemma3 && layers == 62 {
                true => hidden as f32 / heads as f32,
                false => head_dim as f32,
            },
        )
    }

    pub(super) fn bad(&self, key: &str, value: impl ToString, reason: String) -> ConfigError {
        ConfigError::Value {
            key: self.full(key),
            value: value.to_string(),
            reason,
        }
    }
}
