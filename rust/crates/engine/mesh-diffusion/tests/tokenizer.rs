//! CLIP's tokens against transformers' CLIPTokenizer: tests/data/clip.json, which tests/reference/make_goldens.py writes.

use mesh_diffusion::{ClipTokenizer, Prompt};
use mesh_testkit::paths::fetched;
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Goldens {
    start: u32,
    end: u32,
    prompts: Vec<String>,
    ids: Vec<Vec<u32>>,
    a_cat: Vec<u32>,
}

fn goldens() -> Goldens {
    serde_json::from_str(include_str!("data/clip.json")).unwrap()
}

fn files() -> (Vec<u8>, Vec<u8>) {
    let read =
        |name: &str| std::fs::read(fetched(&format!("vocabs/clip/{name}")).unwrap()).unwrap();
    (read("vocab.json"), read("merges.txt"))
}

fn tokenizer() -> ClipTokenizer {
    let (vocab, merges) = files();
    ClipTokenizer::from_vocab(&vocab, &merges).unwrap()
}

fn check(tokenizer: &ClipTokenizer) {
    let goldens = goldens();
    assert_eq!(goldens.prompts.len(), 500);
    assert_eq!(
        (tokenizer.start(), tokenizer.end()),
        (goldens.start, goldens.end)
    );
    for (prompt, expected) in goldens.prompts.iter().zip(&goldens.ids) {
        let found = tokenizer.encode(prompt, 1000).unwrap();
        assert_eq!(&found, expected, "{prompt:?}");
    }
}

#[test]
fn tokens_are_those_of_transformers() {
    check(&tokenizer());
}

#[test]
fn a_tokenizer_json_gives_the_same_tokens() {
    let (vocab, merges) = files();
    let mut vocab: Value = serde_json::from_slice(&vocab).unwrap();
    let special = ["<|startoftext|>", "<|endoftext|>"];
    let added: Vec<Value> = special
        .iter()
        .map(|token| {
            let id = vocab.as_object_mut().unwrap().remove(*token).unwrap();
            json!({"id": id, "content": token, "special": true})
        })
        .collect();
    let merges = String::from_utf8(merges).unwrap();
    let lines = || merges.lines().skip(1);
    let pairs: Vec<Vec<&str>> = lines().map(|line| line.split(' ').collect()).collect();
    let with = |merges: Value| {
        let model = json!({"type": "BPE", "vocab": vocab, "merges": merges});
        let file = json!({"added_tokens": added, "model": model}).to_string();
        ClipTokenizer::from_json(file.as_bytes()).unwrap()
    };
    check(&with(json!(pairs)));
    check(&with(json!(lines().collect::<Vec<_>>())));
}

#[test]
fn a_folder_is_opened_by_its_files() {
    let path = fetched("vocabs/clip/vocab.json").unwrap();
    check(&ClipTokenizer::open(path.parent().unwrap()).unwrap());
    let error = ClipTokenizer::open("/nowhere".as_ref())
        .unwrap_err()
        .to_string();
    assert!(error.contains("/nowhere has neither vocab.json"), "{error}");
}

#[test]
fn a_prompt_is_padded_as_each_encoder_wants() {
    let goldens = goldens();
    let tokenizer = tokenizer();
    let prompt = Prompt::new(&tokenizer, "a cat").unwrap();
    assert_eq!(prompt.ids(prompt.end), [goldens.a_cat.as_slice()]);
    let with_zero = prompt.ids(0);
    assert_eq!(with_zero[0][3], prompt.end);
    assert!(with_zero[0][4..].iter().all(|&id| id == 0));
}

#[test]
fn text_never_becomes_a_control_token() {
    let tokenizer = tokenizer();
    let tokens = tokenizer
        .encode("<|endoftext|> a <|STARTOFTEXT|>", 100)
        .unwrap();
    assert!(tokens.iter().all(|&token| token < tokenizer.start()));
}

#[test]
fn long_prompts_become_chunks_up_to_a_limit() {
    let tokenizer = tokenizer();
    let prompt = Prompt::new(&tokenizer, &"cat ".repeat(76)).unwrap();
    assert_eq!(prompt.chunks.len(), 2);
    assert_eq!(prompt.chunks[1].tokens.len(), 1);
    let full = Prompt::new(&tokenizer, &"cat ".repeat(75)).unwrap();
    let ids = full.ids(0);
    assert_eq!((ids.len(), ids[0][76]), (1, full.end));
    assert!(Prompt::new(&tokenizer, &"cat ".repeat(600)).is_ok());
    let error = Prompt::new(&tokenizer, &"cat ".repeat(601))
        .unwrap_err()
        .to_string();
    assert_eq!(error, "it has over 600 tokens; shorten it");
    let weighted = Prompt::new(&tokenizer, "a (red:1.5) cat").unwrap();
    assert_eq!(weighted.chunks[0].weights, [1.0, 1.5, 1.0]);
    assert_eq!(
        weighted.chunks[0].tokens,
        tokenizer.encode("a red cat", 9).unwrap()
    );
}

#[test]
fn long_words_take_no_long_time() {
    let tokenizer = tokenizer();
    let started = std::time::Instant::now();
    for word in ["a", "ab", "!", "é", "ha"] {
        let text = word.repeat(16_000 / word.len());
        let _ = Prompt::new(&tokenizer, &text);
    }
    assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
}

#[test]
fn files_that_are_no_tokenizer_are_refused() {
    let (vocab, merges) = files();
    let refused = |vocab: &[u8], merges: &[u8]| {
        let error = ClipTokenizer::from_vocab(vocab, merges).unwrap_err();
        error.to_string()
    };
    assert!(refused(b"", &merges).contains("vocab.json"));
    assert!(refused(b"{\"a\": 7}", &merges).contains("id 7"));
    assert!(refused(b"{\"a\": 0}", &merges).contains("<|startoftext|>"));
    assert!(refused(&vocab, b"\xff").contains("UTF-8"));
    assert!(refused(&vocab, b"#version: 0.2\na b c\n").contains("line 2"));
    for length in [1, 100, vocab.len() / 2, vocab.len() - 2] {
        assert!(refused(&vocab[..length], &merges).contains("vocab.json"));
    }
    // Merges of tokens that do not exist are left out; what is left still gives tokens.
    let few = ClipTokenizer::from_vocab(&vocab, b"q\xc5\xbf \xc5\xbf\nc a\n").unwrap();
    assert!(few.encode("cat", 10).unwrap().len() < 4);
    let json = |text: &str| {
        ClipTokenizer::from_json(text.as_bytes())
            .unwrap_err()
            .to_string()
    };
    assert!(json("{}").contains("model"));
    assert!(json(r#"{"model": {"type": "WordPiece", "vocab": {}, "merges": []}}"#).contains("BPE"));
    let deep = "[".repeat(100_000);
    assert!(json(&deep).contains("tokenizer.json"));
}
