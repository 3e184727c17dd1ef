//! Texts far longer than any context cost little time and memory, whatever they consist of, and what fits is
//! never refused.
//!
//! One test in a process of its own: it measures the process's memory.

use std::time::{Duration, Instant};

use mesh_base::tokens::ByteCounts;
use mesh_model::{EncodeOptions, Gguf, Tokenizer, TokenizerError};
use mesh_testkit::paths::fetched;

const NAMES: [&str; 6] = [
    "llama-bpe",
    "llama-spm",
    "qwen2",
    "gpt-2",
    "deepseek-llm",
    "falcon",
];

fn open(name: &str) -> Tokenizer {
    let path = fetched(&format!("ggml-vocabs/ggml-vocab-{name}.gguf")).unwrap();
    Tokenizer::from_keys(&Gguf::open(path).unwrap()).unwrap()
}

/// The most memory that the process ever had, in MiB.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() >> 10
}

#[test]
fn a_text_of_8_mib_costs_little_and_a_text_that_fits_is_tokenised() {
    let tokenizers: Vec<(&str, Tokenizer)> = NAMES.map(|name| (name, open(name))).into();
    let bytes = 8 << 20;
    let of = |unit: &str| unit.repeat(bytes / unit.len());
    for unit in [
        "1",
        " ",
        "a",
        "\n",
        "<",
        "\u{1f600}",
        "e\u{301}",
        "\u{301}",
        "ab ",
        "\u{4f60}\u{597d}",
        "<|im_start|>",
        "don't ",
        "Ab1.\n",
    ] {
        let text = of(unit);
        let before = peak();
        let begun = Instant::now();
        for (name, tokenizer) in &tokenizers {
            let refused = tokenizer.encode_within(&text, EncodeOptions::RAW_PROMPT, 8192);
            assert!(
                matches!(
                    refused,
                    Err(TokenizerError::TooLong { most: 8192 } | TokenizerError::Encode { .. })
                ),
                "{name}: {unit:?}: {refused:?}"
            );
        }
        // Six tokenizers, unoptimised.
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "{unit:?}: {:?}",
            begun.elapsed()
        );
        let grown = peak() - before;
        assert!(grown < 100, "{unit:?}: {grown} MiB");
    }
    for (name, tokenizer) in &tokenizers {
        let spans = tokenizer.spans();
        assert!(spans.is_some(), "{name}");
        for unit in [
            "1",
            " ",
            "a",
            "\n\n",
            "=",
            "---",
            "the ",
            "\u{1f600}",
            "\u{4f60}\u{597d}",
            "<|im_end|>",
            "Wie geht's? ",
            "\u{2581}",
        ] {
            let text = unit.repeat(3000);
            let ids = tokenizer.encode(&text, EncodeOptions::RAW_PROMPT).unwrap();
            let least = spans.map_or(0, |spans| spans.least_tokens(&ByteCounts::of(&text)));
            assert!(
                least <= ids.len() as u64,
                "{name}: {unit:?}: {least} > {}",
                ids.len()
            );
            let within = tokenizer.encode_within(&text, EncodeOptions::RAW_PROMPT, ids.len());
            assert_eq!(within.unwrap(), ids, "{name}: {unit:?}");
            let one_less = tokenizer.encode_within(&text, EncodeOptions::RAW_PROMPT, ids.len() - 1);
            assert!(
                matches!(one_less, Err(TokenizerError::TooLong { .. })),
                "{name}: {unit:?}"
            );
        }
    }
}
