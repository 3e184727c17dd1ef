//! llama.cpp's own vocabularies with the token ids that it expects for a set of texts.

use mesh_model::{EncodeOptions, Gguf, Tokenizer, TokenizerError};
use mesh_testkit::paths::fetched;

/// Vocabularies with golden files that must match.
const GOLDEN: [&str; 12] = [
    "command-r",
    "deepseek-coder",
    "deepseek-llm",
    "falcon",
    "gpt-2",
    "llama-bpe",
    "llama-spm",
    "mpt",
    "phi-3",
    "qwen2",
    "refact",
    "starcoder",
];

fn open(name: &str) -> Gguf {
    let path = fetched(&format!("ggml-vocabs/ggml-vocab-{name}.gguf")).unwrap();
    Gguf::open(path).unwrap()
}

fn read(name: &str, kind: &str) -> String {
    let path = fetched(&format!("ggml-vocabs/ggml-vocab-{name}.gguf.{kind}")).unwrap();
    std::fs::read_to_string(path).unwrap()
}

/// Texts with the ids that llama.cpp gives for them, without begin and end tokens and with control tokens as
/// text.
fn golden(name: &str) -> Vec<(String, Vec<u32>)> {
    let inputs = read(name, "inp");
    let outputs = read(name, "out");
    let separator = "\n__ggml_vocab_test__\n";
    let inputs: Vec<&str> = inputs
        .strip_suffix(separator)
        .unwrap()
        .split(separator)
        .collect();
    let outputs: Vec<Vec<u32>> = outputs
        .lines()
        .map(|line| {
            line.split_whitespace()
                .map(|id| id.parse().unwrap())
                .collect()
        })
        .collect();
    assert_eq!(inputs.len(), outputs.len(), "{name}");
    inputs.into_iter().map(str::to_owned).zip(outputs).collect()
}

#[test]
fn every_supported_vocabulary_gives_llama_cpps_tokens() {
    let mut wrong = Vec::new();
    for name in GOLDEN {
        let tokenizer = Tokenizer::from_keys(&open(name)).unwrap();
        let cases = golden(name);
        assert!(cases.len() > 40, "{name} has only {} cases", cases.len());
        for (text, expected) in cases {
            let ids = tokenizer.encode(&text, EncodeOptions::default()).unwrap();
            if ids != expected {
                wrong.push(format!("{name}: {text:?}\n  is {ids:?}\n not {expected:?}"));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} differences:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

#[test]
fn vocabularies_of_other_families_are_refused_by_name() {
    // WordPiece (bert-bge) and unigram (nomic-bert-moe) belong to embedding models, which no engine here runs
    // yet.
    for (name, model) in [("bert-bge", "bert"), ("nomic-bert-moe", "t5")] {
        match Tokenizer::from_keys(&open(name)) {
            Err(TokenizerError::Model { found }) => assert_eq!(found, model),
            other => panic!("{name}: {other:?}"),
        }
    }
}
