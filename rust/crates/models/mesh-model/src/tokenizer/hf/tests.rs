//! `tokenizer.json` files made here, against the same tables in a GGUF file, and hostile ones.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::*;
use crate::checkpoint::SpecialTokens;
use crate::tokenizer::testing::encode;
use crate::tokenizer::{EncodeOptions, Tokenizer};

fn special() -> SpecialTokens {
    SpecialTokens {
        bos: Some("<s>".into()),
        eos: Some("</s>".into()),
        ..SpecialTokens::default()
    }
}

fn build(file: &Value) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::from_hugging_face(file.to_string().as_bytes(), &special(), 1 << 20)
}

fn error(file: &Value) -> String {
    build(file).expect_err("hostile").to_string()
}

/// SentencePiece's alphabet, byte fallback, spaces marked.
fn pieces() -> Value {
    json!({
        "added_tokens": [
            {"id": 0, "content": "<unk>", "special": true},
            {"id": 1, "content": "<s>", "special": true},
            {"id": 2, "content": "</s>", "special": true},
            {"id": 10, "content": "<tool>", "special": false},
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        ]},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
            "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "<0xC3>": 3, "<0xA9>": 4, "▁": 5, "a": 6, "b": 7, "ab": 8, "▁a": 9},
            "merges": ["a b", ["▁", "a"]],
        },
    })
}

#[test]
fn pieces_bytes_and_special_tokens_are_those_of_the_file() {
    let tokenizer = build(&pieces()).unwrap();
    assert_eq!(encode(&tokenizer, "ab", EncodeOptions::PLAIN), [1, 5, 8]);
    assert_eq!(encode(&tokenizer, "é", EncodeOptions::default()), [5, 3, 4]);
    assert_eq!(tokenizer.decode(&[9, 3, 4, 2, 7]), " aéb");
    // A user cannot forge a control token; the user's own tokens are found anywhere.
    let forged = encode(&tokenizer, "</s><tool>", EncodeOptions::default());
    assert!(!forged.contains(&2) && forged.contains(&10));
    let rendered = encode(&tokenizer, "<s>a</s>", EncodeOptions::RENDERED_CHAT);
    assert_eq!(rendered, [1, 9, 2]);
    assert!(tokenizer.adds_bos() && tokenizer.is_special(0) && !tokenizer.is_special(10));
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), Some(2)));
    assert_eq!(tokenizer.vocab_size(), 11);
}

#[test]
fn tokens_without_a_row_of_the_embedding_are_left_out() {
    let file = pieces().to_string();
    let tokenizer = Tokenizer::from_hugging_face(file.as_bytes(), &special(), 8).unwrap();
    assert_eq!(tokenizer.vocab_size(), 8);
    assert_eq!(
        encode(&tokenizer, "ab<tool>", EncodeOptions::default())[..3],
        [5, 6, 7]
    );
}

#[test]
fn every_behavior_of_a_split_is_the_crates() {
    use tokenizers::SplitDelimiterBehavior as Theirs;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};
    let behaviors = [
        ("Removed", Theirs::Removed),
        ("Isolated", Theirs::Isolated),
        ("MergedWithPrevious", Theirs::MergedWithPrevious),
        ("MergedWithNext", Theirs::MergedWithNext),
        ("Contiguous", Theirs::Contiguous),
    ];
    for text in ["", "a", "--a--b-", "a--", "--", "a-b", "日本-語--é"] {
        for (name, theirs) in behaviors {
            for invert in [false, true] {
                for (key, pattern) in [
                    ("String", SplitPattern::String("-".into())),
                    ("Regex", SplitPattern::Regex("-+".into())),
                ] {
                    let text_of = if key == "String" { "-" } else { "-+" };
                    let ours = json!({
                        "type": "Split", "pattern": {key: text_of}, "behavior": name, "invert": invert
                    });
                    let steps = steps::pre_tokenizers(Some(&ours)).unwrap();
                    let ours = steps::split(&steps, text, true, Limit(usize::MAX)).unwrap();
                    let mut their = PreTokenizedString::from(text);
                    Split::new(pattern, theirs, invert)
                        .unwrap()
                        .pre_tokenize(&mut their)
                        .unwrap();
                    let splits = their.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
                    let their: Vec<&str> = splits
                        .iter()
                        .map(|split| split.0)
                        .filter(|s| !s.is_empty())
                        .collect();
                    assert_eq!(ours, their, "{text:?} {name} {invert} {key}");
                }
            }
        }
    }
}

#[test]
fn a_mark_is_put_where_the_scheme_says() {
    for (scheme, first, later) in [
        ("always", "▁a", "▁a"),
        ("first", "▁a", "a"),
        ("never", "a", "a"),
    ] {
        let part = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true});
        let steps = steps::pre_tokenizers(Some(&part)).unwrap();
        assert_eq!(
            steps::split(&steps, "a b", true, Limit(usize::MAX)).unwrap(),
            [first, "▁b"]
        );
        assert_eq!(
            steps::split(&steps, "a b", false, Limit(usize::MAX)).unwrap(),
            [later, "▁b"]
        );
    }
}

#[test]
fn text_is_composed_where_the_model_wants_it() {
    let part = json!({"type": "NFC"});
    let steps = steps::normalizers(Some(&part)).unwrap();
    assert_eq!(steps::normalize(&steps, "e\u{301}").unwrap(), "é");
    assert_eq!(steps::normalize(&steps, "abc").unwrap(), "abc");
}

#[test]
fn what_is_wrong_with_a_file_is_named() {
    let with = |path: &[&str], value: Value| {
        let mut file = pieces();
        let mut at = &mut file;
        for key in path {
            at = &mut at[*key];
        }
        *at = value;
        error(&file)
    };
    assert!(error(&json!([])).contains("malformed"));
    assert!(with(&["model", "type"], json!("Unigram")).contains("\"Unigram\" is not supported"));
    assert!(with(&["model", "vocab"], json!([["a", 0.0]])).contains("lists no tokens"));
    assert!(with(&["model", "vocab"], json!({"a": -1})).contains("malformed"));
    assert!(with(&["model", "vocab"], json!({"a": 4_000_000_000u32})).contains("over the limit"));
    assert!(with(&["model", "vocab"], json!({"a": 0, "b": 0})).contains("both have id 0"));
    assert!(with(&["model", "merges"], json!(["ab"])).contains("two tokens"));
    assert!(with(&["model", "merges"], json!([["a", "b", "c"]])).contains("two tokens"));
    assert!(with(&["model", "dropout"], json!(0.1)).contains("model.dropout"));
    assert!(with(&["model", "end_of_word_suffix"], json!("</w>")).contains("end_of_word_suffix"));
    assert!(with(&["normalizer"], json!({"type": "Precompiled"})).contains("\"Precompiled\""));
    assert!(with(&["pre_tokenizer"], json!({"type": "Bert"})).contains("\"Bert\""));
    assert!(with(&["pre_tokenizer"], json!({"type": "Sequence"})).contains("no pretokenizers"));
    let split = |pattern: &str| json!({"type": "Split", "behavior": "Isolated", "pattern": {"Regex": pattern}});
    assert!(with(&["pre_tokenizer"], split("(")).contains("invalid"));
    assert!(with(&["added_tokens"], json!([{"id": 6, "content": "x"}])).contains("both have id 6"));
    let twice = pieces()
        .to_string()
        .replace("\"ab\":8", "\"ab\":8,\"ab\":8");
    let twice = Tokenizer::from_hugging_face(twice.as_bytes(), &special(), 100).unwrap_err();
    assert!(twice.to_string().contains("\"ab\" appears twice"));
}

#[test]
fn a_file_made_to_exhaust_the_reader_is_refused_in_time() {
    let begun = Instant::now();
    let raw = |json: String| {
        let result = Tokenizer::from_hugging_face(json.as_bytes(), &special(), 1 << 20);
        result.expect_err("hostile").to_string()
    };
    assert!(raw("[".repeat(8 << 20)).contains("malformed"));
    assert!(raw(format!("{{\"normalizer\":{}", "[".repeat(8 << 20))).contains("malformed"));
    let wide = format!("{{\"decoder\":[{}0],\"model\":{{}}}}", "0,".repeat(4 << 20));
    assert!(raw(wide).contains("over 262144 values"));
    let merges = format!(
        "{{\"model\":{{\"merges\":[{}\"a b\"]}}}}",
        "\"a b\",".repeat(3 << 20)
    );
    assert!(raw(merges).contains("over 2097152 merges"));

    // Steps that make a text ever longer, and a pattern that tries every way to fail.
    let grows = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"});
    let mut file = pieces();
    file["normalizer"] = json!({"type": "Sequence", "normalizers": vec![grows; 30]});
    let tokenizer = build(&file).unwrap();
    let failed = tokenizer
        .encode("aaaaaaaaaaaaaaaa", EncodeOptions::PLAIN)
        .unwrap_err();
    assert!(failed.to_string().contains("longer than any real"));
    let mut file = pieces();
    file["pre_tokenizer"] = json!({
        "type": "Split", "behavior": "Isolated", "pattern": {"Regex": "(?:(a+)+\\1)+$"}
    });
    let tokenizer = build(&file).unwrap();
    let text = "a".repeat(5000) + "b";
    assert!(tokenizer.encode(&text, EncodeOptions::PLAIN).is_err());
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn added_tokens_take_the_white_space_with_them_that_the_file_says() {
    let with = |lstrip: bool, rstrip: bool| {
        let mut file = pieces();
        file["added_tokens"][3]["lstrip"] = lstrip.into();
        file["added_tokens"][3]["rstrip"] = rstrip.into();
        let tokenizer = build(&file).unwrap();
        encode(&tokenizer, "a \n<tool> \tb", EncodeOptions::default())
    };
    let (a, b, tool) = (9, 7, 10);
    let both = with(true, true);
    assert_eq!(both, [a, tool, 5, b]);
    let (none, left, right) = (with(false, false), with(true, false), with(false, true));
    assert_eq!(left[..2], [a, tool]);
    assert!(left.len() > both.len() && right.len() > both.len());
    assert_eq!(right[right.len() - 3..], [tool, 5, b]);
    assert!(none.len() > left.len() && none.len() > right.len());
}
