//! Tokenizers as `tokenizer.json` against the same ones in GGUF files, on llama.cpp's test texts.

use mesh_model::hf::SpecialTokens;
use mesh_model::synth::tokenizer_json;
use mesh_model::{EncodeOptions, Gguf, Tokenizer};
use mesh_testkit::paths::{fetched, smollm2};

fn texts(name: &str) -> Vec<String> {
    let path = fetched(&format!("ggml-vocabs/ggml-vocab-{name}.gguf.inp")).unwrap();
    let texts = std::fs::read_to_string(path).unwrap();
    texts
        .split("\n__ggml_vocab_test__\n")
        .map(str::to_owned)
        .collect()
}

fn both(gguf: &Gguf) -> (Tokenizer, Tokenizer) {
    let theirs = Tokenizer::from_keys(gguf).unwrap();
    let json = tokenizer_json(gguf).unwrap().to_string();
    let name =
        |id: Option<u32>| id.map(|id| String::from_utf8_lossy(theirs.token_bytes(id)).into_owned());
    let special = SpecialTokens {
        bos: name(theirs.bos()),
        eos: name(theirs.eos()),
        add_bos: Some(theirs.adds_bos()),
        ..SpecialTokens::default()
    };
    let ours = Tokenizer::from_hugging_face(json.as_bytes(), &special, usize::MAX).unwrap();
    (ours, theirs)
}

#[test]
fn tokens_and_text_are_those_of_the_gguf_file() {
    let mut wrong = Vec::new();
    for name in ["gpt-2", "llama-bpe", "qwen2", "llama-spm", "smollm2"] {
        let path = match name {
            "smollm2" => smollm2().unwrap(),
            _ => fetched(&format!("ggml-vocabs/ggml-vocab-{name}.gguf")).unwrap(),
        };
        let (ours, theirs) = both(&Gguf::open(path).unwrap());
        assert_eq!(ours.vocab_size(), theirs.vocab_size());
        assert_eq!(ours.eos_ids(), theirs.eos_ids(), "{name}");
        assert_eq!(ours.adds_bos(), theirs.adds_bos(), "{name}");
        for id in 0..theirs.vocab_size() as u32 {
            assert_eq!(ours.is_special(id), theirs.is_special(id), "{name}: {id}");
            let (our, their) = (ours.token_bytes(id), theirs.token_bytes(id));
            assert_eq!(our, their, "{name}: {id}");
        }
        let mut texts = texts(if name == "smollm2" { "gpt-2" } else { name });
        texts.push("<|im_start|>user\nHi<|im_end|>\n<s> x</s><|eot_id|>".into());
        assert!(texts.len() > 40);
        for text in texts {
            for options in [EncodeOptions::PLAIN, EncodeOptions::RENDERED_CHAT] {
                let our = ours.encode(&text, options).unwrap();
                let their = theirs.encode(&text, options).unwrap();
                if our != their {
                    wrong.push(format!("{name}: {text:?}\n  is {our:?}\n not {their:?}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
