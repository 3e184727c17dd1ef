//! A tokenizer from the parts of a `tokenizer.json`.

use std::collections::BTreeMap;

use serde_json::Value;
use tokenizers::models::bpe::{BPE, Vocab as BpeVocab};

use super::Hf;
use super::json::{AddedToken, File};
use super::steps::{self, PreTokenizerStep};
use crate::checkpoint::SpecialTokens;
use crate::tokenizer::codec::{Algorithm, Tokenizer};
use crate::tokenizer::error::{TokenizerError, malformed, unsupported};
use crate::tokenizer::merge::{LongWords, Unknown};
use crate::tokenizer::notation::{Notation, byte_char, byte_of, text_bytes};
use crate::tokenizer::special::SpecialFinder;
use crate::tokenizer::vocab::{TokenType, Vocab};

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
        let notation = notation(&file)?;
        let vocab = vocab(&file, notation, rows)?;
        let (model, long) = bpe(&file, &vocab)?;
        let pre = steps::pre_tokenizers(file.pre_tokenizer.as_ref())?;
        let known = |byte| long.knows(byte_char(byte));
        let all_bytes = || text_bytes().all(known);
        let drops = match notation {
            Notation::Bpe => !all_bytes(),
            Notation::Spm => long.drops(),
        };
        let drops = drops || pre.iter().any(PreTokenizerStep::drops);
        let hf = Hf {
            normalizers: steps::normalizers(file.normalizer.as_ref())?,
            pre,
            model,
            long,
            spans: (!drops).then(|| vocab.spans(notation)),
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
        let end_ids = vocab.ends(eos.into_iter().chain(listed));
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
            special: SpecialFinder::new(&vocab).stripping(&strips),
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
fn notation(file: &File) -> Result<Notation, TokenizerError> {
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
        Ok(Notation::Bpe)
    } else if model.byte_fallback || spaces(&file.normalizer) || spaces(&file.pre_tokenizer) {
        Ok(Notation::Spm)
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
fn vocab(file: &File, notation: Notation, rows: usize) -> Result<Vocab, TokenizerError> {
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
        let is_byte =
            notation == Notation::Spm && file.model.byte_fallback && byte_of(text).is_some();
        let ty = match unknown == Some(text) {
            _ if is_byte => TokenType::Byte,
            true if notation == Notation::Spm => TokenType::Unknown,
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
        notation,
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
