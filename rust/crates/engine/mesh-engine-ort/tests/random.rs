//! Small networks with random weights: every architecture against a plain forward pass, and every error.

mod common;
mod reference;

use common::{assert_same_bits, cosine, last, logits, options, quiet, some_tokens, tiny, whole};
use mesh_engine::{LogitRows, Segment, Stage};
use mesh_engine_ort::{KvFormat, LoadError, OrtOptions, OrtStage, WeightFormat, memory_bytes};
use mesh_model::synth::{Shape, Tokens, Window, random_model};
use mesh_model::{Architecture, GgmlType, Model};

#[test]
fn every_architecture_agrees_with_a_plain_forward_pass() {
    let tokens = some_tokens(40);
    for architecture in Architecture::ALL {
        // Unquantised matrices take unquantised rows; the others see activations of 8 bits.
        for (ty, least) in [
            (GgmlType::F32, 0.999_999),
            (GgmlType::F16, 0.999_999),
            (GgmlType::Q8_0, 0.999),
            (GgmlType::Q4_0, 0.999),
            (GgmlType::Q4_1, 0.999),
            (GgmlType::Q5_1, 0.999),
            (GgmlType::Q4_K, 0.999),
            (GgmlType::Q6_K, 0.999),
        ] {
            // Rounding chooses another expert where two scores are almost equal.
            let least = match architecture {
                _ if ty.block_size() == 1 => least,
                // Its experts add more to a row.
                Architecture::GptOss => 0.8,
                _ if architecture.is_mixture() => 0.9,
                _ => least,
            };
            let model = tiny(architecture, ty);
            let options = OrtOptions {
                // So do rounded keys and values, which the plain pass does not have.
                kv: (architecture.is_mixture() && ty == GgmlType::F16).then_some(KvFormat::F32),
                ..options(1, 64)
            };
            let mut stage = whole(&model, options);
            assert_agrees(&model, &mut stage, &tokens, least);
        }
    }
}

#[test]
fn every_type_agrees_with_a_plain_forward_pass_and_takes_the_memory_foretold() {
    let tokens = some_tokens(20);
    for ty in GgmlType::ALL {
        let model = tiny(Architecture::Llama, ty);
        let mut stage = whole(&model, options(1, 64));
        assert_agrees(&model, &mut stage, &tokens, 0.999);
        let foretold = memory_bytes(&model, WeightFormat::File);
        assert_eq!(stage.info().weight_bytes, foretold, "{ty}");
    }
}

/// Compares the logits of all rows.
fn assert_agrees(model: &Model, stage: &mut OrtStage, tokens: &[u32], least: f64) {
    let all = Segment {
        logits: LogitRows::All,
        ..last(0, 0, tokens.len())
    };
    let ours = logits(stage, &[all], tokens);
    let plain = reference::forward(model, tokens);
    let vocab = model.config().vocab;
    for (i, (ours, plain)) in ours.chunks(vocab).zip(plain.chunks(vocab)).enumerate() {
        let found = cosine(ours, plain);
        let tensor = model.tensors().get("blk.0.attn_output.weight");
        assert!(
            found > least,
            "{:?} {:?} row {i}: cosine {found}",
            model.config().architecture,
            tensor.map(|tensor| tensor.ty)
        );
    }
}

/// A network with windows of `size` positions in all layers but every `period`th; in all of them for 0.
fn windowed(architecture: Architecture, size: u32, period: u32) -> Model {
    let shape = Shape {
        window: Some(Window { size, period }),
        layers: 3,
        ..Shape::tiny(architecture)
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("windowed.gguf");
    random_model(&shape, GgmlType::F32, Tokens::Bytes, &path).unwrap();
    Model::open(&path).unwrap()
}

#[test]
fn windows_of_every_family_hide_what_is_further_back() {
    let tokens = some_tokens(160);
    let wide = || OrtOptions {
        max_rows: 160,
        ..options(1, 160)
    };
    for (architecture, size, period) in [
        (Architecture::Llama, 20, 0),
        (Architecture::Qwen2, 1, 2),
        (Architecture::Qwen3, 130, 3),
        (Architecture::Gemma3, 33, 2),
    ] {
        let model = windowed(architecture, size, period);
        let step = [Segment {
            logits: LogitRows::All,
            ..last(0, 0, 160)
        }];
        let ours = logits(&mut whole(&model, wide()), &step, &tokens);
        let plain = reference::forward(&model, &tokens);
        let vocab = model.config().vocab;
        for (i, (ours, plain)) in ours.chunks(vocab).zip(plain.chunks(vocab)).enumerate() {
            let found = cosine(ours, plain);
            assert!(
                found > 0.999_999,
                "{architecture:?} row {i}: cosine {found}"
            );
        }
        // Without the window it is another network.
        let open = windowed(architecture, 512, 0);
        let other = logits(&mut whole(&open, wide()), &[last(0, 0, 160)], &tokens);
        assert!(
            cosine(&other, &plain[159 * vocab..]) < 0.999,
            "{architecture:?}"
        );
    }
}

#[test]
fn rows_with_windows_do_not_depend_on_cuts_and_their_kv_rows_move() {
    let tokens = some_tokens(300);
    let model = windowed(Architecture::Gemma3, 140, 3);
    let wide = |slots| OrtOptions {
        max_rows: 300,
        ..options(slots, 300)
    };
    let expected = logits(&mut whole(&model, wide(1)), &[last(0, 0, 300)], &tokens);
    let mut pieces = whole(&model, wide(2));
    for piece in [0..130, 130..131, 131..290, 290..298, 298..299] {
        let segment = quiet(1, piece.start as u32, piece.len());
        logits(&mut pieces, &[segment], &tokens[piece]);
    }
    let rows = pieces.kv_export(1, 0..299).unwrap();
    let found = logits(&mut pieces, &[last(1, 299, 1)], &tokens[299..]);
    assert_same_bits(&found, &expected);
    // All rows are kept, also those beyond every window: exported rows are as in a model without windows.
    let mut other = whole(&model, wide(1));
    other.kv_import(0, 0, &rows).unwrap();
    let found = logits(&mut other, &[last(0, 299, 1)], &tokens[299..]);
    assert_same_bits(&found, &expected);
    // Rewound, the rows before count again.
    other.truncate(0, 150);
    let found = logits(&mut other, &[last(0, 150, 150)], &tokens[150..]);
    assert_same_bits(&found, &expected);
}

#[test]
fn a_step_without_logits_and_one_with_all_of_them() {
    let model = tiny(Architecture::Llama, GgmlType::Q8_0);
    let tokens = some_tokens(6);
    let mut stage = whole(&model, options(2, 32));
    let none = Segment {
        logits: LogitRows::None,
        ..last(0, 0, 6)
    };
    assert!(logits(&mut stage, &[none], &tokens).is_empty());
    assert_eq!(stage.kv_len(0), 6);
    let mixed = [
        Segment {
            logits: LogitRows::All,
            ..last(1, 0, 3)
        },
        last(0, 0, 3),
    ];
    let vocab = model.config().vocab;
    let rows = logits(&mut stage, &mixed, &[&tokens[..3], &tokens[..3]].concat());
    assert_eq!(rows.len(), 4 * vocab);
    assert_same_bits(&rows[2 * vocab..3 * vocab], &rows[3 * vocab..]);
    // Slot 0 was rewound to 3 rows.
    assert_eq!(stage.kv_len(0), 3);
}

#[test]
fn bad_options_are_named() {
    let model = tiny(Architecture::Llama, GgmlType::Q4_0);
    let refused = |layers, options| OrtStage::load(&model, layers, options).err().unwrap();
    #[allow(clippy::reversed_empty_ranges)]
    for layers in [0..0, 1..3, 2..1] {
        assert!(matches!(
            refused(layers, options(1, 16)),
            LoadError::Layers { layers: 2, .. }
        ));
    }
    for (bad, name) in [
        (options(0, 16), "slots"),
        (options(1, 513), "context"),
        (
            OrtOptions {
                max_rows: 0,
                ..options(1, 16)
            },
            "max_rows",
        ),
    ] {
        let error = refused(0..2, bad).to_string();
        assert!(error.contains(name), "{error}");
    }
}
