//! Reading a tokenizer: from a `tokenizer.json`, or from the `tokenizer.ggml` keys of GGUF files.

use super::bpe::Bpe;
use super::codec::{Algorithm, Tokenizer};
use super::error::TokenizerError;
use super::notation::Notation;
use super::special::SpecialFinder;
use super::spm::Spm;
use super::vocab::Vocab;
use crate::checkpoint::{Checkpoint, TokenizerJson};

impl Tokenizer {
    /// The tokenizer of a model whose embedding has `rows` rows.
    ///
    /// # Errors
    /// If tables are missing, malformed, or of a kind that is not supported.
    pub fn read(checkpoint: &dyn Checkpoint, rows: usize) -> Result<Self, TokenizerError> {
        match checkpoint.tokenizer_json() {
            Some(TokenizerJson { json, special }) => Self::from_hugging_face(json, special, rows),
            None => Self::from_keys(checkpoint),
        }
    }

    /// Builds the tokenizer from the `tokenizer.ggml` keys.
    ///
    /// # Errors
    /// If tables are missing, malformed, or of a kind that is not supported.
    pub fn from_keys(checkpoint: &dyn Checkpoint) -> Result<Self, TokenizerError> {
        let notation = match checkpoint.require_string("tokenizer.ggml.model")? {
            "gpt2" => Notation::Bpe,
            "llama" => Notation::Spm,
            other => {
                return Err(TokenizerError::Model {
                    found: other.into(),
                });
            }
        };
        let vocab = Vocab::from_keys(checkpoint, notation)?;
        let ids = SpecialIds::read(checkpoint, notation, vocab.len())?;
        let (algorithm, pre_adds_bos) = match notation {
            Notation::Bpe => {
                let bpe = Bpe::from_keys(checkpoint, &vocab)?;
                let adds_bos = bpe.adds_bos();
                (Algorithm::Bpe(Box::new(bpe)), adds_bos)
            }
            Notation::Spm => (
                Algorithm::Spm(Box::new(Spm::from_keys(checkpoint, &vocab)?)),
                true,
            ),
        };
        let all = || vocab.spans(notation);
        let spans = match &algorithm {
            Algorithm::Bpe(bpe) => {
                let mut spans = all();
                // Nothing is claimed of a text with those.
                bpe.lost().for_each(|byte| spans.cover(&[byte], usize::MAX));
                Some(spans)
            }
            Algorithm::Spm(spm) => (!spm.drops()).then(all),
            Algorithm::Hf(_) => None,
        };
        Ok(Tokenizer {
            special: SpecialFinder::new(&vocab),
            spans,
            end_ids: ids.ends(&vocab),
            bos: ids.bos,
            eos: ids.eos,
            add_bos: checkpoint
                .bool("tokenizer.ggml.add_bos_token")?
                .unwrap_or(pre_adds_bos),
            add_eos: checkpoint
                .bool("tokenizer.ggml.add_eos_token")?
                .unwrap_or(false),
            vocab,
            algorithm,
        })
    }
}

/// The tokens that the metadata names by id.
struct SpecialIds {
    bos: Option<u32>,
    eos: Option<u32>,
    /// End of turn and end of message.
    other_ends: Vec<u32>,
}

impl SpecialIds {
    fn read(
        checkpoint: &dyn Checkpoint,
        notation: Notation,
        vocab: usize,
    ) -> Result<Self, TokenizerError> {
        let read = |name: &str, default: Option<u32>| match checkpoint
            .unsigned(&format!("tokenizer.ggml.{name}_token_id"))?
        {
            // Converters write the largest number for "none".
            Some(id) if id >= u64::from(u32::MAX) => Ok(None),
            Some(id) if id < vocab as u64 => Ok(Some(id as u32)),
            Some(id) => Err(TokenizerError::Tables {
                reason: format!(
                    "tokenizer.ggml.{name}_token_id is {id}, but there are only {vocab} tokens"
                ),
            }),
            None => Ok(default.filter(|&id| (id as usize) < vocab)),
        };
        // SentencePiece's own numbers.
        let (bos, eos) = match notation {
            Notation::Bpe => (None, None),
            Notation::Spm => (Some(1), Some(2)),
        };
        Ok(SpecialIds {
            bos: read("bos", bos)?,
            eos: read("eos", eos)?,
            other_ends: [read("eot", None)?, read("eom", None)?]
                .into_iter()
                .flatten()
                .collect(),
        })
    }

    fn ends(&self, vocab: &Vocab) -> Vec<u32> {
        let listed = self.eos.into_iter().chain(self.other_ends.iter().copied());
        vocab.ends(listed)
    }
}
