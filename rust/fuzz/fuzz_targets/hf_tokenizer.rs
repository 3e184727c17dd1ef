//! Any `tokenizer.json` is a tokenizer or an error, and one that encodes in bounded time or says that it cannot.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_model::hf::SpecialTokens;
use mesh_model::{EncodeOptions, Tokenizer};

fuzz_target!(|data: (&[u8], &str)| {
    let (json, text) = data;
    let special = SpecialTokens::default();
    let Ok(tokenizer) = Tokenizer::from_hugging_face(json, &special, 1 << 20) else {
        return;
    };
    for options in [EncodeOptions::PLAIN, EncodeOptions::RENDERED_CHAT] {
        if let Ok(ids) = tokenizer.encode(text, options) {
            assert!(ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()));
            let _ = tokenizer.decode(&ids);
        }
    }
});
