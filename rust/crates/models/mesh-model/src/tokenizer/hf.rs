//! Hugging Face's `tokenizer.json`, as far as the supported families use it: BPE over bytes (Llama 3, Qwen, SmolLM) and over
//! SentencePiece's alphabet with byte fallback (Llama 2, Mistral, Gemma).
//!
//! The file is read within limits and its parts are built directly. What the `tokenizers` crate does with them is done here,
//! with two exceptions that make it safe for a file from anywhere: patterns are run by an engine that gives up instead of
//! running on, and every step may only lengthen the text so far. Merging is the crate's. Special tokens are found as in GGUF
//! files, so that a user's text cannot forge them.

mod json;
mod steps;

use std::collections::BTreeMap;

use mesh_base::tokens::ByteSpans;
use serde_json::Value;
use tokenizers::Model;
use tokenizers::models::bpe::{BPE, Vocab as BpeVocab};

use super::merge::{LongWords, Unknown};
use super::special::SpecialTokens as Finder;
use super::vocab::{TokenType, Vocab, malformed};
use super::{Algorithm, Family, Limit, Tokenizer, TokenizerError};
use crate::checkpoint::SpecialTokens;
use json::{AddedToken, File};
use steps::{Changes, Normalizer, PreTokenizer};

/// A tokenizer from `tokenizer.json`: the steps from text to words, and from words to tokens.
#[derive(Debug)]
pub(super) struct Hf {
    normalizers: Vec<Normalizer>,
    pre: Vec<PreTokenizer>,
    model: BPE,
    long: LongWords,
    /// Spans of normalized text; `None` if tokenizing may lose bytes.
    spans: Option<ByteSpans>,
}

impl Hf {
    /// Appends the tokens of `text`, which `begins` the whole text or follows a special token in it.
    pub(super) fn encode(
        &self,
        text: &str,
        begins: bool,
        ids: &mut Vec<u32>,
        limit: Limit,
    ) -> Result<(), TokenizerError> {
        let normal = steps::normalize(&self.normalizers, text)?;
        if let Some(spans) = &self.spans {
            limit.check_text(&normal, spans)?;
        }
        // Where characters are lost, a word need not become a token.
        let words = match self.spans {
            Some(_) => limit,
            None => Limit(usize::MAX),
        };
        for word in steps::split(&self.pre, &normal, begins, words)? {
            if self.long.takes(&word) {
                self.long.encode(word.chars(), ids);
                limit.check(ids)?;
                continue;
            }
            let tokens = self
                .model
                .tokenize(&word)
                .map_err(|error| TokenizerError::Encode {
                    reason: error.to_string(),
                })?;
            ids.extend(tokens.iter().map(|token| token.id));
            limit.check(ids)?;
        }
        Ok(())
    }

    /// Spans of the text before the normalizers.
    fn spans_before(&self) -> Option<ByteSpans> {
        let mut spans = self.spans.clone()?;
        for step in &self.normalizers {
            match step.changes() {
                Changes::Nothing => {}
                Changes::BeyondAscii => spans.forget_beyond_ascii(),
                Changes::Anything => return None,
            }
        }
        Some(spans)
    }
}

impl Tokenizer {
    /// Builds the tokenizer from the text of `tokenizer.json` and the special tokens of the other files.
    /// Tokens from `rows` on, for which the embedding has no row, are left out: some folders list tokens of a
    /// larger model.
    ///
    /// # Errors
    /// If the file is malformed, contradicts itself, or asks for what is not supported.
    pub fn from_hugging_face(
        json: &[u8],
        special: &SpecialTokens,
        rows: usize,
    ) -> Result<Self, TokenizerError> {
        let file = File::parse(json)?;
        let family = family(&file)?;
        let vocab = vocab(&file, family, rows)?;
        let (model, long) = bpe(&file, &vocab)?;
        let pre = steps::pre_tokenizers(file.pre_tokenizer.as_ref())?;
        let known = |byte| long.knows(super::byte_char(byte));
        let all_bytes = || super::bpe::text_bytes().all(known);
        let drops = match family {
            Family::Bpe => !all_bytes(),
            Family::Spm => long.drops(),
        };
        let drops = drops || pre.iter().any(PreTokenizer::drops);
        let hf = Hf {
            normalizers: steps::normalizers(file.normalizer.as_ref())?,
            pre,
            model,
            long,
            spans: (!drops).then(|| super::spans(&vocab, family)),
        };
        let by_text = |text: &Option<String>| text.as_deref().and_then(|text| vocab.find(text));
        let valid = |id: u64| {
            u32::try_from(id)
                .ok()
                .filter(|&id| (id as usize) < vocab.len())
        };
        let bos = by_text(&special.bos).or(special.bos_id.and_then(valid));
        let listed: Vec<u32> = special.eos_ids.iter().copied().filter_map(valid).collect();
        let eos = by_text(&special.eos).or(listed.first().copied());
        let end_ids = super::names::ends_of(&vocab, eos.into_iter().chain(listed));
        let around = |first: bool, id: Option<u32>| {
            let text = template_end(file.post_processor.as_ref()?, first)?;
            Some(id? == vocab.find(text)?)
        };
        let strips = file.added_tokens.iter();
        let strips = strips.filter(|token| token.lstrip || token.rstrip);
        let strips: BTreeMap<_, _> = strips
            .map(|token| (token.id, (token.lstrip, token.rstrip)))
            .collect();
        Ok(Tokenizer {
            // White space that goes away beside a token is covered by none.
            spans: hf.spans_before().filter(|_| strips.is_empty()),
            special: Finder::new(&vocab).stripping(&strips),
            add_bos: special.add_bos.or(around(true, bos)).unwrap_or(false),
            add_eos: special.add_eos.or(around(false, eos)).unwrap_or(false),
            bos,
            eos,
            end_ids,
            algorithm: Algorithm::Hf(Box::new(hf)),
            vocab,
        })
    }
}

/// Notation of token texts in the file.
fn family(file: &File) -> Result<Family, TokenizerError> {
    let model = &file.model;
    if model.kind.as_deref().is_some_and(|kind| kind != "BPE") {
        return Err(TokenizerError::Model {
            found: model.kind.clone().unwrap_or_default(),
        });
    }
    if model.vocab.is_empty() {
        return Err(malformed("model.vocab lists no tokens".into()));
    }
    for (what, used) in [
        (
            "dropout",
            model.dropout.is_some_and(|dropout| dropout > 0.0),
        ),
        (
            "continuing_subword_prefix",
            some_text(&model.continuing_subword_prefix),
        ),
        ("end_of_word_suffix", some_text(&model.end_of_word_suffix)),
    ] {
        if used {
            return Err(unsupported(format!("model.{what}")));
        }
    }
    let of_bytes = |part: &Option<Value>| {
        part.as_ref()
            .is_some_and(|part| mentions(part, "ByteLevel"))
    };
    let spaces =
        |part: &Option<Value>| part.as_ref().is_some_and(|part| mentions(part, "\u{2581}"));
    if of_bytes(&file.pre_tokenizer) || of_bytes(&file.decoder) {
        Ok(Family::Bpe)
    } else if model.byte_fallback || spaces(&file.normalizer) || spaces(&file.pre_tokenizer) {
        Ok(Family::Spm)
    } else {
        Err(unsupported(
            "BPE over neither bytes nor SentencePiece's alphabet".into(),
        ))
    }
}

fn some_text(text: &Option<String>) -> bool {
    text.as_deref().is_some_and(|text| !text.is_empty())
}

/// True if any value within `part` is the string `text`.
fn mentions(part: &Value, text: &str) -> bool {
    match part {
        Value::String(found) => found == text,
        Value::Array(parts) => parts.iter().any(|part| mentions(part, text)),
        Value::Object(map) => map.values().any(|part| mentions(part, text)),
        _ => false,
    }
}

/// All tokens by id. Ids that no token has are unused.
fn vocab(file: &File, family: Family, rows: usize) -> Result<Vocab, TokenizerError> {
    let added = file.added_tokens.iter().map(|token| token.id);
    let last = file
        .model
        .vocab
        .iter()
        .map(|(_, id)| *id)
        .chain(added)
        .max();
    let count = last.map_or(0, |last| last as usize + 1).min(rows);
    if count == 0 {
        return Err(malformed("tokenizer.json lists no tokens".into()));
    }
    let mut tokens: Vec<Option<(&str, TokenType)>> = vec![None; count];
    let unknown = file.model.unk_token.as_deref();
    for (text, id) in &file.model.vocab {
        let Some(slot) = tokens.get_mut(*id as usize) else {
            continue;
        };
        if let Some((other, _)) = slot {
            return Err(malformed(format!(
                "tokens {other:?} and {text:?} both have id {id}"
            )));
        }
        let is_byte = family == Family::Spm
            && file.model.byte_fallback
            && super::spm::byte_of(text).is_some();
        let ty = match unknown == Some(text) {
            _ if is_byte => TokenType::Byte,
            true if family == Family::Spm => TokenType::Unknown,
            _ => TokenType::Normal,
        };
        *slot = Some((text, ty));
    }
    for AddedToken {
        id,
        content,
        special,
        ..
    } in &file.added_tokens
    {
        let Some(slot) = tokens.get_mut(*id as usize) else {
            continue;
        };
        match slot {
            Some((text, _)) if text != content => {
                return Err(malformed(format!(
                    "tokens {text:?} and {content:?} both have id {id}"
                )));
            }
            Some((_, TokenType::Unknown)) => {}
            _ if *special => *slot = Some((content, TokenType::Control)),
            _ => *slot = Some((content, TokenType::UserDefined)),
        }
    }
    let tokens = tokens.into_iter();
    Vocab::new(
        family,
        tokens.map(|token| token.unwrap_or(("", TokenType::Unused))),
    )
}

fn bpe(file: &File, vocab: &Vocab) -> Result<(BPE, LongWords), TokenizerError> {
    let model = &file.model;
    let mut ids = BpeVocab::with_capacity_and_hasher(model.vocab.len(), Default::default());
    for (text, id) in &model.vocab {
        if (*id as usize) < vocab.len() {
            ids.insert(text.clone(), *id);
        }
    }
    // Pairs that name or make no token cannot be used.
    let mut merged = String::new();
    let usable = |(left, right): &&(String, String)| {
        merged.clear();
        merged.push_str(left);
        merged.push_str(right);
        ids.contains_key(left) && ids.contains_key(right) && ids.contains_key(&merged)
    };
    let merges: Vec<_> = model.merges.iter().filter(usable).cloned().collect();
    let mut builder = BPE::builder()
        .fuse_unk(model.fuse_unk)
        .byte_fallback(model.byte_fallback)
        .ignore_merges(model.ignore_merges);
    let unknown = model.unk_token.as_ref();
    let unknown = unknown.filter(|text| ids.contains_key(*text));
    if let Some(unknown) = unknown {
        builder = builder.unk_token(unknown.clone());
    }
    let long = LongWords::new(
        &ids,
        &merges,
        Unknown {
            token: unknown.and_then(|text| ids.get(text)).copied(),
            fuse: model.fuse_unk,
            byte_fallback: model.byte_fallback,
        },
    );
    let built = builder.vocab_and_merges(ids, merges).build();
    let built = built.map_err(|error| malformed(error.to_string()))?;
    Ok((built, long))
}

/// The special token that the post-processor's template puts first, or last.
fn template_end(processor: &Value, first: bool) -> Option<&str> {
    match processor.get("type")?.as_str()? {
        "Sequence" => {
            let all = processor.get("processors")?.as_array()?;
            all.iter()
                .find_map(|processor| template_end(processor, first))
        }
        "TemplateProcessing" => {
            let single = processor.get("single")?.as_array()?;
            let end = if first { single.first() } else { single.last() };
            end?.get("SpecialToken")?.get("id")?.as_str()
        }
        _ => None,
    }
}

fn unsupported(what: String) -> TokenizerError {
    TokenizerError::Unsupported { what }
}

#[cfg(test)]
mod tests;
