//! A tiny model against the contract of `mesh_testkit::conformance::diffuser`, on the CPU or on the
//! GPU if `HYDRAMESH_TEST_GPU` is `cuda`.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_diffusion::checkpoint::Checkpoint;
use mesh_diffusion::config::Family;
use mesh_diffusion::{ClipTokenizer, synth};
use mesh_engine_tch::{Device, Options, TchDiffuser};
use mesh_model::safetensors::Dtype;
use mesh_testkit::conformance::diffuser::Subject;

/// A vocabulary of single bytes, in words' ends and elsewhere, without merges.
fn tokenizer() -> Arc<ClipTokenizer> {
    let mut vocab = BTreeMap::new();
    for ending in ["", "</w>"] {
        for letter in byte_letters() {
            let id = vocab.len();
            vocab.insert(format!("{letter}{ending}"), id);
        }
    }
    // A vocabulary has no gaps, and the model's has 1,000 tokens.
    while vocab.len() < 998 {
        let id = vocab.len();
        vocab.insert(format!("filler{id}"), id);
    }
    vocab.insert("<|startoftext|>".to_owned(), 998);
    vocab.insert("<|endoftext|>".to_owned(), 999);
    let vocab = serde_json::to_vec(&vocab).unwrap();
    Arc::new(ClipTokenizer::from_vocab(&vocab, b"#version: 0.2\n").unwrap())
}

/// The characters that stand for bytes in GPT-2's vocabularies.
fn byte_letters() -> impl Iterator<Item = char> {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut others = 256u32..;
    let letter = move |byte: u32| match printable(byte) {
        true => char::from_u32(byte),
        false => others.next().and_then(char::from_u32),
    };
    (0..256).filter_map(letter)
}

#[test]
fn models_of_images_keep_the_contract() {
    let device = match std::env::var("HYDRAMESH_TEST_GPU").as_deref() {
        Ok("cuda") => Device::Gpu(0),
        _ => Device::Cpu,
    };
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model");
    synth::write_folder(&synth::tiny(Family::Sd1), &folder, Dtype::F32).unwrap();
    let options = Options {
        device,
        threads: 2,
        ..Options::default()
    };
    Subject {
        name: format!("Stable Diffusion 1 on {device:?}"),
        open: &|| {
            let checkpoint = Arc::new(Checkpoint::open(&folder).unwrap());
            Box::new(TchDiffuser::load(&checkpoint, &options).unwrap())
        },
        tokenizer: tokenizer(),
        size: (64, 64),
    }
    .check();
}
