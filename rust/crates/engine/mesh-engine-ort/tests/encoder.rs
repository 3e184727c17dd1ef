//! Embedding models: MiniLM against vectors of sentence-transformers, and small random models against the
//! definition.

mod bert;
mod common;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bert::Tiny;
use common::cosine;
use mesh_engine::Encoder;
use mesh_engine_ort::{LoadError, OrtEncoder, OrtOptions};
use mesh_model::EncoderModel;
use mesh_testkit::{conformance, paths};

fn options() -> OrtOptions {
    OrtOptions {
        library: Some(paths::ort_library().unwrap()),
        threads: 2,
        max_rows: 1024,
        ..OrtOptions::default()
    }
}

fn minilm() -> (EncoderModel, OrtEncoder) {
    let model = EncoderModel::open(paths::minilm().unwrap()).unwrap();
    let encoder = OrtEncoder::load(&model, &options()).unwrap();
    (model, encoder)
}

/// 200 texts of many lengths and languages, with their vectors by sentence-transformers
/// (scripts/embed_anchor.py).
fn references() -> Vec<(String, Vec<f32>)> {
    let texts: Vec<String> = serde_json::from_str(include_str!("data/texts.json")).unwrap();
    let vectors = include_str!("data/minilm.base64").lines().map(|line| {
        let bytes = STANDARD.decode(line).unwrap();
        let halves = bytes.as_chunks::<2>().0.iter();
        halves
            .map(|b| half::f16::from_le_bytes(*b).to_f32())
            .collect()
    });
    texts.into_iter().zip(vectors).collect()
}

fn batches<'a>(tokens: &'a [Vec<u32>], rows: usize) -> Vec<Vec<&'a [u32]>> {
    let mut batches: Vec<Vec<&'a [u32]>> = vec![Vec::new()];
    let mut filled = 0;
    for sequence in tokens {
        if filled + sequence.len() > rows {
            batches.push(Vec::new());
            filled = 0;
        }
        filled += sequence.len();
        batches.last_mut().unwrap().push(sequence);
    }
    batches
}

#[test]
fn minilm_is_that_of_sentence_transformers() {
    let (model, mut encoder) = minilm();
    let references = references();
    assert_eq!(references.len(), 200);
    let tokens: Vec<Vec<u32>> = references
        .iter()
        .map(|(text, _)| model.tokenise(text, None).unwrap().tokens)
        .collect();
    assert!(
        tokens.iter().any(|tokens| tokens.len() == 256),
        "some are cut"
    );
    let vectors: Vec<f32> = batches(&tokens, 1024)
        .iter()
        .flat_map(|batch| encoder.encode(batch).unwrap())
        .collect();
    let mut worst = (1.0, "");
    for ((text, want), got) in references.iter().zip(vectors.chunks_exact(384)) {
        let length: f32 = got.iter().map(|x| x * x).sum();
        assert!((length - 1.0).abs() < 1e-5);
        let cosine = cosine(got, want);
        if cosine < worst.0 {
            worst = (cosine, text);
        }
    }
    println!("least cosine {} for {:?}", worst.0, worst.1);
    // The references are rounded to 16 bits, which costs about 1e-7.
    assert!(worst.0 >= 0.9999, "cosine {} for {:?}", worst.0, worst.1);
    assert!(worst.0 >= 0.999_99, "it was better once: {}", worst.0);
}

fn encoder_keeps_the_contract(name: &str, model: &EncoderModel) {
    conformance::encoder::Subject {
        name: name.to_owned(),
        open: &|threads| {
            let options = OrtOptions {
                threads,
                max_rows: conformance::encoder::MAX_ROWS,
                ..options()
            };
            Box::new(OrtEncoder::load(model, &options).unwrap())
        },
    }
    .check();
}

#[test]
fn encoders_keep_the_contract() {
    let folder = tempfile::tempdir().unwrap();
    Tiny::default().write(folder.path());
    encoder_keeps_the_contract("a tiny BERT", &EncoderModel::open(folder.path()).unwrap());
    let model = EncoderModel::open(paths::minilm().unwrap()).unwrap();
    encoder_keeps_the_contract("MiniLM", &model);
}

#[test]
fn a_clients_own_tokens_are_wrapped_once() {
    let (model, _) = minilm();
    let text = model.tokenise("hello world", None).unwrap();
    assert_eq!(text.tokens, [101, 7592, 2088, 102]);
    assert_eq!(model.wrap_tokens(&[7592, 2088]).unwrap(), text);
    assert_eq!(model.wrap_tokens(&[101, 7592, 2088, 102]).unwrap(), text);
    assert!(model.wrap_tokens(&vec![7592; 300]).unwrap().truncated);
    assert!(
        model
            .wrap_tokens(&[30_522])
            .unwrap_err()
            .to_string()
            .contains("30522")
    );
    assert!(model.tokenise(&"x".repeat(1 << 20), None).is_err());
}

#[test]
fn small_models_of_each_kind_agree_with_the_definition() {
    for tiny in [
        Tiny::default(),
        Tiny {
            cls: true,
            normalise: true,
            ..Tiny::default()
        },
        Tiny {
            kind: "xlm-roberta",
            activation: "relu",
            prefix: "roberta.",
            ..Tiny::default()
        },
        Tiny {
            activation: "gelu_new",
            heads: 4,
            ..Tiny::default()
        },
    ] {
        let folder = tempfile::tempdir().unwrap();
        let reference = tiny.write(folder.path());
        let model = EncoderModel::open(folder.path()).unwrap();
        let mut encoder = OrtEncoder::load(&model, &options()).unwrap();
        let tokens: Vec<Vec<u32>> = [
            "w1",
            "w2 w3 w4",
            "w9 w9 w1 w7 w30 w11 w2 w3 w5 w8 w13 w21 w4",
        ]
        .iter()
        .map(|text| model.tokenise(text, None).unwrap().tokens)
        .collect();
        let sequences: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
        let got = encoder.encode(&sequences).unwrap();
        for (sequence, got) in tokens.iter().zip(got.chunks_exact(tiny.hidden)) {
            let want = reference.vector(sequence);
            for (got, want) in got.iter().zip(&want) {
                assert!(
                    (f64::from(*got) - want).abs() < 1e-4,
                    "{tiny:?}: {got} for {want}"
                );
            }
        }
    }
}

#[test]
fn weights_that_do_not_fit_the_configuration_are_named() {
    let folder = tempfile::tempdir().unwrap();
    Tiny::default().write(folder.path());
    let config = std::fs::read_to_string(folder.path().join("config.json")).unwrap();
    for (from, to, named) in [
        (
            "\"num_hidden_layers\":2",
            "\"num_hidden_layers\":3",
            "encoder.layer.2.",
        ),
        (
            "\"intermediate_size\":48",
            "\"intermediate_size\":64",
            "[64, 64]",
        ),
        (
            "\"vocab_size\":40",
            "\"vocab_size\":4000000",
            "word_embeddings",
        ),
    ] {
        assert!(config.contains(from), "{config}");
        std::fs::write(folder.path().join("config.json"), config.replace(from, to)).unwrap();
        let model = EncoderModel::open(folder.path()).unwrap();
        let Err(error) = OrtEncoder::load(&model, &options()) else {
            panic!("{to} was loaded");
        };
        assert!(
            matches!(
                error,
                LoadError::MissingTensor(_) | LoadError::Tensor { .. }
            ),
            "{error}"
        );
        assert!(error.to_string().contains(named), "{error}");
    }
    std::fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    let error = EncoderModel::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json is missing"), "{error}");
}
