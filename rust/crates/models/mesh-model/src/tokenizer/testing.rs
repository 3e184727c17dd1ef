//! Tokenizers for tests.

use crate::gguf::Gguf;
use crate::gguf::writer::{OwnedValue, Writer};
use crate::tokenizer::{EncodeOptions, Tokenizer};

/// A vocabulary of bytes with these tokens besides, each with its type.
pub(crate) fn bytes_with(more: &[(&str, i32)]) -> Tokenizer {
    let mut tokens = vec![("<unk>".to_owned(), 2)];
    tokens.extend((0..=255).map(|byte| (format!("<0x{byte:02X}>"), 6)));
    tokens.extend(more.iter().map(|(name, ty)| ((*name).to_owned(), *ty)));
    let mut writer = Writer::new();
    writer
        .key("tokenizer.ggml.model", OwnedValue::String("llama".into()))
        .key(
            "tokenizer.ggml.scores",
            OwnedValue::F32s(vec![0.0; tokens.len()]),
        )
        .key(
            "tokenizer.ggml.token_type",
            OwnedValue::I32s(tokens.iter().map(|token| token.1).collect()),
        )
        .key(
            "tokenizer.ggml.tokens",
            OwnedValue::Strings(tokens.into_iter().map(|token| token.0).collect()),
        );
    let bytes = writer.to_bytes(|_, _, _| Vec::new()).unwrap();
    Tokenizer::from_keys(&Gguf::from_bytes(bytes).unwrap()).unwrap()
}

/// The tokens of `text`, which the tokenizer takes.
pub(crate) fn encode(tokenizer: &Tokenizer, text: &str, options: EncodeOptions) -> Vec<u32> {
    tokenizer.encode(text, options).unwrap()
}
