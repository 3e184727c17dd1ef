//! The graph of ONNX Runtime's own operators, on its CPU provider, or on the GPU's that `HYDRAMESH_TEST_GPU` names;
//! a part of the tests also on WebGPU with a software driver.

mod common;
mod reference;

use common::{last, logits, options, quiet, some_tokens, tiny, whole};
use mesh_engine::{LogitRows, Segment, Stage};
use mesh_engine_ort::{Device, DeviceStage, LoadError, OrtOptions, Precision, Provider};
use mesh_model::gguf::Writer;
use mesh_model::gguf::writer::OwnedValue;
use mesh_model::synth::{Shape, Tokens, random_model, random_model_bytes};
use mesh_model::{Architecture, GgmlType, Gguf, Model};
use mesh_testkit::lavapipe;

/// The families that execution providers run.
fn dense() -> impl Iterator<Item = Architecture> {
    let families = Architecture::ALL.into_iter();
    families.filter(|family| !family.is_mixture())
}

/// The device under test.
fn device() -> Device {
    Device::new(common::provider())
}

/// 1 − cosine that rows may differ by from a plain forward pass in f32.
fn tolerance(device: Device) -> f64 {
    match device.precision {
        Precision::F32 => 1e-9,
        Precision::F16 => 1e-3,
    }
}

/// The same where numbers of 16 bits come in anyway.
fn roughly() -> f64 {
    tolerance(device()).max(1e-5)
}

fn load(model: &Model, layers: std::ops::Range<u32>, options: OrtOptions) -> DeviceStage {
    DeviceStage::load(model, layers, options, device()).unwrap()
}

fn load_whole(model: &Model, options: OrtOptions) -> DeviceStage {
    load(model, 0..model.config().layers, options)
}

#[track_caller]
fn assert_close(ours: &[f32], theirs: &[f32], width: usize, tolerance: f64, what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (i, (ours, theirs)) in ours.chunks(width).zip(theirs.chunks(width)).enumerate() {
        let off = 1.0 - common::cosine(ours, theirs);
        assert!(off < tolerance, "{what} row {i}: 1 - cosine = {off:e}");
    }
}

fn all(slot: u32, position: u32, rows: usize) -> Segment {
    Segment {
        logits: LogitRows::All,
        ..last(slot, position, rows)
    }
}

#[test]
fn every_weight_type_of_every_architecture_agrees_with_both_references() {
    let tokens = some_tokens(40);
    for architecture in dense() {
        for ty in GgmlType::ALL {
            let model = tiny(architecture, ty);
            let what = format!("{architecture:?} {ty:?}");
            let vocab = model.config().vocab;
            let mut stage = load_whole(&model, options(1, 64));
            let ours = logits(&mut stage, &[all(0, 0, tokens.len())], &tokens);
            let plain = reference::forward(&model, &tokens);
            assert_close(&ours, &plain, vocab, tolerance(device()), &what);
            // The CPU's stage rounds activations to 8 bits where weights are quantised.
            let mut cpu = whole(&model, options(1, 64));
            let theirs = logits(&mut cpu, &[all(0, 0, tokens.len())], &tokens);
            assert_close(&ours, &theirs, vocab, 1e-3, &what);
        }
    }
}

/// The file of [`tiny`].
fn tiny_file(architecture: Architecture, ty: GgmlType) -> Gguf {
    let bytes = random_model_bytes(&Shape::tiny(architecture), ty, Tokens::Bytes);
    Gguf::from_bytes(bytes).unwrap()
}

/// `model` with other metadata, and with tensors of `others` where `from` says so.
fn rewritten(
    model: &Gguf,
    keys: &[(&str, OwnedValue)],
    others: &Gguf,
    from: impl Fn(&str) -> bool,
) -> Model {
    let mut writer = Writer::new();
    let given = |name: &str| keys.iter().any(|(key, _)| *key == name);
    for (name, value) in model.metadata_iter() {
        if !given(name) {
            writer.copy_key(name, value);
        }
    }
    for (name, value) in keys {
        writer.key(name, value.clone());
    }
    let pick = |name: &str| {
        let source = if from(name) { others } else { model };
        source.tensors().get(name).unwrap()
    };
    for tensor in model.tensors().iter() {
        writer.tensor(tensor.name, pick(tensor.name).ty, tensor.dims);
    }
    let bytes = writer
        .to_bytes(|name, _, _| pick(name).data.read().unwrap().into_owned())
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rewritten.gguf");
    std::fs::write(&path, bytes).unwrap();
    Model::open(&path).unwrap()
}

#[test]
fn rotations_are_those_of_the_cpus_stage() {
    let tokens = some_tokens(40);
    for (architecture, name) in [
        (Architecture::Llama, "llama"),
        (Architecture::Qwen2, "qwen2"),
    ] {
        let key = |key: &str| format!("{name}.rope.{key}");
        let text = |text: &str| OwnedValue::String(text.into());
        for keys in [
            vec![
                (key("scaling.type"), text("yarn")),
                (key("scaling.factor"), OwnedValue::F32(4.0)),
                (key("scaling.original_context_length"), OwnedValue::U32(32)),
            ],
            vec![
                (key("scaling.type"), text("linear")),
                (key("scaling.factor"), OwnedValue::F32(2.0)),
            ],
            vec![(key("dimension_count"), OwnedValue::U32(32))],
        ] {
            let plain = tiny(architecture, GgmlType::F32);
            let keys: Vec<_> = keys.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
            let file = tiny_file(architecture, GgmlType::F32);
            let model = rewritten(&file, &keys, &file, |_| false);
            let vocab = model.config().vocab;
            let step = [all(0, 0, tokens.len())];
            let ours = logits(&mut load_whole(&model, options(1, 64)), &step, &tokens);
            let theirs = logits(&mut whole(&model, options(1, 64)), &step, &tokens);
            // The CPU's KV cache is of 16 bits.
            assert_close(
                &ours,
                &theirs,
                vocab,
                roughly(),
                &format!("{name} {keys:?}"),
            );
            let other = logits(&mut load_whole(&plain, options(1, 64)), &step, &tokens);
            let last = |rows: &[f32]| rows[39 * vocab..].to_vec();
            assert!(
                1.0 - common::cosine(&last(&ours), &last(&other)) > 1e-4,
                "{keys:?}"
            );
        }
    }
}

#[test]
fn matrices_of_a_layer_may_differ_in_type() {
    let tokens = some_tokens(20);
    for architecture in dense() {
        // As in files called Q4_K_M.
        let model = rewritten(
            &tiny_file(architecture, GgmlType::Q4_K),
            &[],
            &tiny_file(architecture, GgmlType::Q6_K),
            |name| name.contains("attn_v") || name.contains("ffn_down"),
        );
        let ours = logits(
            &mut load_whole(&model, options(1, 64)),
            &[all(0, 0, 20)],
            &tokens,
        );
        let plain = reference::forward(&model, &tokens);
        let what = format!("{architecture:?}");
        assert_close(&ours, &plain, 300, tolerance(device()), &what);
    }
}

#[test]
fn streams_move_between_the_cpus_stage_and_a_device() {
    let tokens = some_tokens(12);
    // Rows are f32 where the weights are, and else f16.
    let kinds = dense();
    let kinds = kinds.flat_map(|of| [GgmlType::F32, GgmlType::F16].map(|ty| (of, ty)));
    for (architecture, ty) in kinds {
        let model = tiny(architecture, ty);
        let mut cpu = whole(&model, options(1, 64));
        let mut device = load_whole(&model, options(1, 64));
        let token = cpu.info().kv_bytes_per_token;
        assert_eq!(device.info().kv_bytes_per_token, token);
        let expected = logits(&mut cpu, &[last(0, 0, 12)], &tokens);

        let rows = cpu.kv_export(0, 0..11).unwrap();
        device.kv_import(0, 0, &rows).unwrap();
        let found = logits(&mut device, &[last(0, 11, 1)], &tokens[11..]);
        assert_close(&found, &expected, 300, roughly(), "to the device");

        let rows = device.kv_export(0, 0..11).unwrap();
        cpu.truncate(0, 0);
        cpu.kv_import(0, 0, &rows).unwrap();
        let found = logits(&mut cpu, &[last(0, 11, 1)], &tokens[11..]);
        assert_close(&found, &expected, 300, roughly(), "and back");
    }
}

#[test]
fn imported_rows_outgrow_a_slots_first_memory() {
    let model = tiny(Architecture::Llama, GgmlType::Q4_0);
    let mut stage = load_whole(&model, options(2, 400));
    let token = stage.info().kv_bytes_per_token as usize;
    // Ordinary numbers of 16 bits.
    let rows: Vec<u8> = (0..310 * token / 2)
        .flat_map(|i| half::f16::from_f32((i % 251) as f32 / 64.0).to_le_bytes())
        .collect();
    let (head, tail) = rows.split_at(250 * token);
    stage.kv_import(0, 0, head).unwrap();
    stage.kv_import(0, 250, tail).unwrap();
    assert_eq!(stage.kv_export(0, 0..310).unwrap(), rows);
    stage.copy_prefix(0, 1, 270).unwrap();
    stage.truncate(0, 0);
    assert_eq!(stage.kv_export(1, 0..270).unwrap(), rows[..270 * token]);
    assert_eq!((stage.kv_len(0), stage.kv_len(1)), (0, 270));
}

/// Bytes of this process in memory.
fn resident() -> i64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: i64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// A driver in software has the device's memory in the process.
#[test]
#[ignore = "a process of webgpu_with_a_software_driver"]
fn a_slot_that_ends_leaves_its_memory_to_others() {
    const SLOTS: u32 = 96;
    let model = tiny(Architecture::Llama, GgmlType::Q4_0);
    let mut stage = load_whole(&model, options(SLOTS, 512));
    let rows = vec![0; 500 * stage.info().kv_bytes_per_token as usize];
    let fill = |stage: &mut DeviceStage| {
        for slot in 0..SLOTS {
            stage.kv_import(slot, 0, &rows).unwrap();
        }
        resident()
    };
    let before = resident();
    let full = fill(&mut stage) - before;
    let least = i64::from(SLOTS) * rows.len() as i64;
    assert!(full > least / 2, "{full} bytes for {least}");
    (0..SLOTS).for_each(|slot| stage.truncate(slot, 0));
    // The driver keeps small buffers for the next ones.
    let again = fill(&mut stage) - before;
    assert!(again < full + full / 4, "{again} bytes, {full} at first");
}

/// A driver in software needs seconds for each new shader, so these are the tests with few of them.
#[test]
fn webgpu_with_a_software_driver() {
    lavapipe::run(&["imported_rows_outgrow_a_slots_first_memory"]);
    // It measures the memory of its whole process.
    lavapipe::run(&["a_slot_that_ends_leaves_its_memory_to_others"]);
}

#[test]
fn a_slot_grows_beyond_its_first_memory() {
    let model = tiny(Architecture::Llama, GgmlType::Q8_0);
    let vocab = model.config().vocab;
    let tokens = some_tokens(300);
    let wide = OrtOptions {
        max_rows: 300,
        ..options(1, 400)
    };
    let whole = logits(
        &mut load_whole(&model, wide.clone()),
        &[last(0, 0, 300)],
        &tokens,
    );
    let mut stage = load_whole(&model, wide);
    logits(&mut stage, &[quiet(0, 0, 250)], &tokens[..250]);
    logits(&mut stage, &[quiet(0, 250, 49)], &tokens[250..299]);
    let found = logits(&mut stage, &[last(0, 299, 1)], &tokens[299..]);
    assert_close(&found, &whole, vocab, tolerance(device()), "grown");
}

#[test]
fn padded_rows_change_nothing() {
    let model = tiny(Architecture::Qwen2, GgmlType::Q5_1);
    let vocab = model.config().vocab;
    let tokens = some_tokens(14);
    let expected = logits(
        &mut load_whole(&model, options(1, 16)),
        &[all(0, 0, 14)],
        &tokens,
    );
    let few_shapes = Device {
        few_shapes: true,
        ..device()
    };
    let mut stage = DeviceStage::load(&model, 0..2, options(1, 16), few_shapes).unwrap();
    let mut found = Vec::new();
    // The last piece is padded to 8 rows, beyond the context.
    for piece in [0..5u32, 5..6, 6..9, 9..14] {
        let segment = all(0, piece.start, piece.len());
        let tokens = &tokens[piece.start as usize..piece.end as usize];
        found.extend(logits(&mut stage, &[segment], tokens));
    }
    assert_close(&found, &expected, vocab, tolerance(device()), "padded");
}

#[test]
fn the_graph_of_16_bits_agrees_loosely() {
    let tokens = some_tokens(24);
    let half = Device {
        precision: Precision::F16,
        ..device()
    };
    let most = match half.provider {
        Provider::Cpu => 1e-4,
        _ => tolerance(half),
    };
    for architecture in dense() {
        for ty in GgmlType::ALL {
            let model = tiny(architecture, ty);
            let vocab = model.config().vocab;
            let mut stage = DeviceStage::load(&model, 0..2, options(1, 64), half).unwrap();
            // In the exported format, for any precision of the graph.
            let number = match ty {
                GgmlType::F32 => 4,
                _ => 2,
            };
            assert_eq!(stage.info().kv_bytes_per_token, 2 * 2 * 2 * 64 * number);
            let head = logits(&mut stage, &[all(0, 0, 20)], &tokens[..20]);
            let tail = logits(&mut stage, &[all(0, 20, 4)], &tokens[20..]);
            let ours = [head, tail].concat();
            let plain = reference::forward(&model, &tokens);
            assert_close(
                &ours,
                &plain,
                vocab,
                most,
                &format!("{architecture:?} {ty:?}"),
            );
        }
    }
}

#[test]
fn heads_that_the_operators_cannot_rotate_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("narrow.gguf");
    let shape = Shape {
        heads: 32,
        kv_heads: 32,
        head_dim: 8,
        ..Shape::tiny(Architecture::Llama)
    };
    random_model(&shape, GgmlType::Q8_0, Tokens::Bytes, &path).unwrap();
    let model = Model::open(&path).unwrap();
    let error = DeviceStage::load(&model, 0..2, options(1, 16), device())
        .err()
        .unwrap();
    assert!(matches!(error, LoadError::Unsupported { .. }));
    assert!(error.to_string().contains("heads of width 8"), "{error}");
}
