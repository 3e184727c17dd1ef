//! A split GGUF file gives the logits of the file that was cut, bit for bit, whole and in stages.

mod common;

use common::{assert_same_bits, last, logits, options, pipeline, some_tokens, whole};
use mesh_engine::{LogitRows, Segment};
use mesh_engine_ort::{OrtOptions, OrtStage, WeightFormat};
use mesh_model::synth::{Shape, Split, Tokens, random_model, write_split};
use mesh_model::{Architecture, GgmlType, Gguf, Model};

#[test]
fn the_logits_of_parts_are_those_of_the_whole_file() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = some_tokens(20);
    for (architecture, ty, keys_first) in [
        (Architecture::Llama, GgmlType::Q4_K, false),
        (Architecture::Qwen3, GgmlType::Q8_0, true),
        (Architecture::Gemma3, GgmlType::Q4_1, false),
    ] {
        let file = dir.path().join("whole.gguf");
        random_model(&Shape::tiny(architecture), ty, Tokens::Bytes, &file).unwrap();
        let split = Split {
            tensors: 6,
            keys_first,
        };
        let gguf = Gguf::open(&file).unwrap();
        let parts = write_split(&gguf, split, dir.path(), architecture.name()).unwrap();
        let (cut, uncut) = (Model::open(&parts[1]).unwrap(), Model::open(&file).unwrap());
        for weights in WeightFormat::ALL {
            let options = OrtOptions {
                weights,
                ..options(1, 64)
            };
            let all = Segment {
                logits: LogitRows::All,
                ..last(0, 0, tokens.len())
            };
            let of = |model: &Model| {
                let mut stage = whole(model, options.clone());
                logits(&mut stage, &[all], &tokens)
            };
            assert_same_bits(&of(&cut), &of(&uncut));
            let mut stages: Vec<OrtStage> = [0..1, 1..2]
                .into_iter()
                .map(|layers| OrtStage::load(&cut, layers, options.clone()).unwrap())
                .collect();
            let last = [last(0, 0, tokens.len())];
            let staged = pipeline(&mut stages, &last, &tokens);
            assert_same_bits(
                &staged,
                &logits(&mut whole(&uncut, options), &last, &tokens),
            );
        }
    }
}

#[test]
fn a_part_that_changes_while_it_is_loaded_is_an_error_of_this_model() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("whole.gguf");
    let shape = Shape::tiny(Architecture::Llama);
    random_model(&shape, GgmlType::Q8_0, Tokens::Bytes, &file).unwrap();
    let split = Split {
        tensors: 8,
        keys_first: false,
    };
    let parts = write_split(&Gguf::open(&file).unwrap(), split, dir.path(), "m").unwrap();
    let model = Model::open(&parts[0]).unwrap();
    let mut bytes = std::fs::read(&parts[2]).unwrap();
    bytes.extend([0; 32]);
    std::fs::write(&parts[2], bytes).unwrap();
    let error = OrtStage::load(&model, 0..2, options(1, 64)).err().unwrap();
    let error = error.to_string();
    assert!(error.contains("m-00003-of-"), "{error}");
    assert!(error.contains("changed while it was read"), "{error}");
}
