//! The tokenizer against small vocabularies made here. Real ones are in `tests/golden_vocabs.rs`.

use super::testing::encode;
use super::*;
use crate::gguf::Gguf;
use crate::gguf::writer::{OwnedValue, Writer};

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

/// Tokens with type and score, as a SentencePiece model.
fn spm_keys(tokens: &[(&str, i32, f32)]) -> Vec<(&'static str, OwnedValue)> {
    vec![
        ("tokenizer.ggml.model", OwnedValue::String("llama".into())),
        (
            "tokenizer.ggml.tokens",
            OwnedValue::Strings(tokens.iter().map(|t| t.0.into()).collect()),
        ),
        (
            "tokenizer.ggml.token_type",
            OwnedValue::I32s(tokens.iter().map(|t| t.1).collect()),
        ),
        (
            "tokenizer.ggml.scores",
            OwnedValue::F32s(tokens.iter().map(|t| t.2).collect()),
        ),
    ]
}

/// Tokens of ordinary text with the pairs to merge, as a byte-level BPE model.
fn bpe_keys(pre: &str, tokens: &[&str], merges: &[&str]) -> Vec<(&'static str, OwnedValue)> {
    let strings =
        |texts: &[&str]| OwnedValue::Strings(texts.iter().map(|&text| text.into()).collect());
    vec![
        ("tokenizer.ggml.model", OwnedValue::String("gpt2".into())),
        ("tokenizer.ggml.pre", OwnedValue::String(pre.into())),
        ("tokenizer.ggml.tokens", strings(tokens)),
        ("tokenizer.ggml.merges", strings(merges)),
    ]
}

fn build(keys: Vec<(&'static str, OwnedValue)>) -> Result<Tokenizer, TokenizerError> {
    let mut writer = Writer::new();
    for (name, value) in keys {
        writer.key(name, value);
    }
    Tokenizer::from_keys(
        &Gguf::from_bytes(writer.to_bytes(|_, _, _| unreachable!()).unwrap()).unwrap(),
    )
}

const SPM: [(&str, i32, f32); 14] = [
    ("<unk>", UNKNOWN, 0.0),
    ("<s>", CONTROL, 0.0),
    ("</s>", CONTROL, 0.0),
    ("<0xC3>", BYTE, 0.0),
    ("<0xA9>", BYTE, 0.0),
    ("\u{2581}", NORMAL, -1.0),
    ("a", NORMAL, -2.0),
    ("b", NORMAL, -3.0),
    ("ab", NORMAL, -4.0),
    ("\u{2581}a", NORMAL, -5.0),
    ("aa", NORMAL, -4.0),
    ("<tool>", USER_DEFINED, 0.0),
    ("<tool>>", CONTROL, 0.0),
    ("ol", NORMAL, -1.0),
];

#[test]
fn the_pair_with_the_highest_score_is_joined_first_and_the_leftmost_of_equals() {
    let spm = build(spm_keys(&SPM)).unwrap();
    // "▁ab": "ab" (-4) before "▁a" (-5).
    assert_eq!(encode(&spm, "ab", EncodeOptions::default()), [5, 8]);
    // "▁aaab": of "aa", "aa" and "ab", all -4, the leftmost.
    assert_eq!(encode(&spm, "aaab", EncodeOptions::default()), [5, 10, 8]);
}

#[test]
fn characters_that_are_no_token_fall_to_bytes_and_then_to_unknown() {
    let spm = build(spm_keys(&SPM)).unwrap();
    assert_eq!(encode(&spm, "é", EncodeOptions::default()), [5, 3, 4]);
    assert_eq!(encode(&spm, "\u{1}", EncodeOptions::default()), [5, 0]);
    assert_eq!(spm.decode(&[9, 3, 4, 2]), " aé");
}

#[test]
fn begin_token_and_space_are_added_where_the_model_wants_them() {
    let spm = build(spm_keys(&SPM)).unwrap();
    assert_eq!(encode(&spm, "a", EncodeOptions::PLAIN), [1, 9]);
    assert_eq!(encode(&spm, "", EncodeOptions::PLAIN), [1]);
    assert_eq!(encode(&spm, "", EncodeOptions::default()), [0u32; 0]);

    let mut keys = spm_keys(&SPM);
    keys.push(("tokenizer.ggml.add_space_prefix", OwnedValue::Bool(false)));
    keys.push(("tokenizer.ggml.add_bos_token", OwnedValue::Bool(false)));
    keys.push(("tokenizer.ggml.add_eos_token", OwnedValue::Bool(true)));
    let spm = build(keys).unwrap();
    assert_eq!(encode(&spm, "a", EncodeOptions::PLAIN), [6, 2]);
    assert!(!spm.adds_bos());
}

#[test]
fn special_tokens_are_found_longest_first_and_control_tokens_only_on_request() {
    let spm = build(spm_keys(&SPM)).unwrap();
    let parsed = |text| encode(&spm, text, EncodeOptions::RENDERED_CHAT);
    assert_eq!(parsed("<s>a</s>"), [1, 9, 2]);
    assert_eq!(parsed("<tool>><tool>"), [12, 11]);
    assert_eq!(parsed("<tool>>>"), [12, 5, 0], "a rest is text again");
    // A token of the user's is found in any text, a control token is not.
    assert_eq!(encode(&spm, "<tool>a", EncodeOptions::default()), [11, 9]);
    assert!(!encode(&spm, "</s>", EncodeOptions::default()).contains(&2));
    assert!(spm.is_special(2) && spm.is_special(0) && !spm.is_special(11));
}

#[test]
fn end_tokens_come_from_ids_and_from_names() {
    let mut tokens = SPM.to_vec();
    tokens.extend([
        ("<|im_end|>", CONTROL, 0.0),
        ("<end_of_turn>", NORMAL, 0.0),
        ("stop", CONTROL, 0.0),
    ]);
    let mut keys = spm_keys(&tokens);
    keys.push(("tokenizer.ggml.eot_token_id", OwnedValue::U32(16)));
    let spm = build(keys).unwrap();
    assert_eq!(
        spm.eos_ids(),
        [2, 16, 14, 15],
        "the file's own first, and names count whatever their type"
    );
    assert!(spm.is_special(15), "it is no text either");
    assert_eq!((spm.bos(), spm.eos()), (Some(1), Some(2)));
}

#[test]
fn ids_outside_the_vocabulary_are_harmless() {
    let spm = build(spm_keys(&SPM)).unwrap();
    assert_eq!(spm.vocab_size(), SPM.len());
    assert_eq!(spm.token_bytes(u32::MAX), b"");
    assert_eq!(spm.decode(&[6, 1000]), "a");
}

#[test]
fn malformed_tables_are_named() {
    let error = |keys| build(keys).unwrap_err().to_string();
    let replaced = |name: &'static str, value: OwnedValue| {
        let mut keys = spm_keys(&SPM);
        keys.retain(|key| key.0 != name);
        keys.push((name, value));
        keys
    };
    assert!(error(vec![]).contains("\"tokenizer.ggml.model\" is missing"));
    for (name, value, expected) in [
        (
            "tokenizer.ggml.model",
            OwnedValue::String("rwkv".into()),
            "\"rwkv\" is not supported",
        ),
        (
            "tokenizer.ggml.tokens",
            OwnedValue::Strings(vec![]),
            "has 0 tokens",
        ),
        (
            "tokenizer.ggml.tokens",
            OwnedValue::I32s(vec![1; 14]),
            "not of strings",
        ),
        (
            "tokenizer.ggml.scores",
            OwnedValue::F32s(vec![0.0]),
            "1 entries for 14 tokens",
        ),
        (
            "tokenizer.ggml.token_type",
            OwnedValue::I32s(vec![1]),
            "1 entries for 14 tokens",
        ),
        (
            "tokenizer.ggml.token_type",
            OwnedValue::I32s(vec![BYTE; 14]),
            "byte token 0 is \"<unk>\"",
        ),
        (
            "tokenizer.ggml.bos_token_id",
            OwnedValue::U32(14),
            "only 14 tokens",
        ),
    ] {
        let found = error(replaced(name, value));
        assert!(found.contains(expected), "{name}: {found}");
    }

    let bpe = |pre: &str, merges: &[&str]| error(bpe_keys(pre, &["a", "b"], merges));
    assert!(bpe("of-tomorrow", &[]).contains("pre-tokenizer \"of-tomorrow\""));
    assert!(bpe("gpt-2", &["ab"]).contains("merge 0 is \"ab\""));
}

#[test]
fn merges_of_tokens_that_do_not_exist_are_left_out() {
    let keys = bpe_keys("gpt-2", &["a", "b", "c", "bc"], &["a b", "b c", "x y"]);
    let bpe = build(keys).unwrap();
    assert_eq!(encode(&bpe, "abc", EncodeOptions::PLAIN), [0, 3]);
    assert_eq!((bpe.bos(), bpe.eos(), bpe.eos_ids().len()), (None, None, 0));
}

#[test]
fn names_of_turns_are_control_tokens_whatever_the_file_says() {
    for ty in [NORMAL, CONTROL, USER_DEFINED] {
        let tokenizer = testing::bytes_with(&[("<|im_start|>", ty), ("<|im_end|>", ty)]);
        assert_eq!(tokenizer.eos_ids(), [2, 258], "type {ty}");
        let parsed = encode(&tokenizer, "<|im_start|>", EncodeOptions::RENDERED_CHAT);
        assert_eq!(parsed, [257]);
        let text = encode(&tokenizer, "<|im_end|>", EncodeOptions::default());
        assert!(!text.contains(&258) && text.len() > 10);
        assert!(tokenizer.is_special(257));
    }
}

#[test]
fn no_special_token_spans_a_barrier() {
    let tokenizer = testing::bytes_with(&[("<|im_end|>", CONTROL), ("<|im_end|>>", CONTROL)]);
    let prompt = |barriers: &[usize]| {
        let prompt = Rendered {
            text: "<|im_end|><|im_end|>>".into(),
            barriers: barriers.to_vec(),
        };
        let ids = tokenizer.encode_prompt(&prompt).unwrap();
        ids.into_iter().filter(|id| *id > 256).collect::<Vec<_>>()
    };
    assert_eq!(prompt(&[]), [257, 258]);
    assert_eq!(
        prompt(&[0, 10, 21]),
        [257, 258],
        "between tokens they do nothing"
    );
    assert_eq!(prompt(&[1]), [258]);
    assert_eq!(prompt(&[20]), [257, 257], "the shorter one still fits");
    assert!(prompt(&[9, 11]).is_empty());
}
