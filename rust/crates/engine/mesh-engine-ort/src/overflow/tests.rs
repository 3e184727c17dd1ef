//! The graph for devices on ONNX Runtime's CPU provider, with limits on the memory that it may take.

use mesh_engine::{LogitRows, Segment, StageError, StageInput, StageOutput};
use mesh_model::synth::{Shape, Tokens, random_model};
use mesh_model::{Architecture, GgmlType};
use mesh_testkit::paths;

use super::*;

const LAYERS: u32 = 6;

fn options(memory: &DeviceMemory, slots: u32, context: u32) -> OrtOptions {
    OrtOptions {
        library: Some(paths::ort_library().unwrap()),
        threads: 2,
        slots,
        context,
        device: DeviceOptions {
            memory: memory.clone(),
            ..DeviceOptions::default()
        },
        ..OrtOptions::default()
    }
}

fn device() -> Device {
    Device::new(Provider::Cpu)
}

fn model_of(architecture: Architecture, ty: GgmlType) -> Model {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    let shape = Shape {
        layers: LAYERS,
        ..Shape::tiny(architecture)
    };
    random_model(&shape, ty, Tokens::Bytes, &path).unwrap();
    Model::open(&path).unwrap()
}

fn model() -> Model {
    model_of(Architecture::Qwen2, GgmlType::Q4_K)
}

fn sizes(model: &Model, options: &OrtOptions) -> DeviceSizes {
    let parts = Parts::of(model.config(), 0..LAYERS);
    DeviceSizes::of(model, &(0..LAYERS), options, device(), parts).unwrap()
}

/// Loads with `budget` as what the plan believes.
fn loaded(
    model: &Model,
    options: &OrtOptions,
    budget: Option<u64>,
) -> Result<(Box<dyn Stage>, Split), LoadError> {
    load_within(
        model,
        0..LAYERS,
        options,
        device(),
        None,
        || budget,
        |_| Ok(()),
    )
}

fn segment(slot: u32, position: u32, rows: u32) -> Segment {
    Segment {
        slot,
        position,
        rows,
        logits: LogitRows::Last,
    }
}

fn tokens(rows: u32) -> Vec<u32> {
    (0..rows).map(|i| (i * 37 + 11) % 256).collect()
}

fn logits(stage: &mut dyn Stage, segment: Segment, tokens: &[u32]) -> Vec<f32> {
    match stage
        .forward(&[segment], StageInput::Tokens(tokens))
        .unwrap()
    {
        StageOutput::Logits(logits) => logits.to_vec(),
        StageOutput::Hidden(_) => panic!("a whole model gives logits"),
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
        products.sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn sizes_are_those_of_the_loaded_graph() {
    let families = Architecture::ALL.into_iter();
    for architecture in families.filter(|family| !family.is_mixture()) {
        for ty in [
            GgmlType::F32,
            GgmlType::BF16,
            GgmlType::Q4_1,
            GgmlType::Q6_K,
            GgmlType::Q4_K,
        ] {
            let model = model_of(architecture, ty);
            let memory = DeviceMemory::default();
            let options = options(&memory, 1, 64);
            // Without the embedding table, which is the host's.
            for layers in [1..3, 3..LAYERS] {
                let parts = Parts::Whole;
                let sizes = DeviceSizes::of(&model, &layers, &options, device(), parts).unwrap();
                let stage =
                    DeviceStage::load(&model, layers.clone(), options.clone(), device()).unwrap();
                let found = stage.info().weight_bytes;
                let expected = sizes.weights(layers.len());
                assert_eq!(expected, found, "{architecture:?} {ty:?} {layers:?}");
                assert_eq!(memory.used(), found);
            }
            assert_eq!(memory.used(), 0);
        }
    }
    let (model, memory) = (mixture(), DeviceMemory::default());
    let options = options(&memory, 1, 64);
    for layer in 1..LAYERS {
        let parts = Parts::WithoutExperts;
        let layers = layer..layer + 1;
        let expected = DeviceSizes::of(&model, &layers, &options, device(), parts).unwrap();
        let stage = DeviceStage::load_parts(&model, layers, options.clone(), device(), parts);
        assert_eq!(expected.weights(1), stage.unwrap().info().weight_bytes);
    }
}

#[test]
fn a_model_of_twice_the_limit_is_split_and_answers_as_one_stage() {
    let model = model();
    let whole = sizes(&model, &options(&DeviceMemory::default(), 2, 64));
    let cache = whole.kv_row * u64::from(LAYERS) * 2 * whole.cache_rows.1;
    let memory = DeviceMemory::new(Some((whole.weights(LAYERS as usize) + cache) / 2));
    let options = options(&memory, 2, 64);
    let check = |_: &mut dyn Stage| Ok(());
    let (mut split, parts) = load(&model, 0..LAYERS, &options, device(), None, check).unwrap();
    let Split {
        device_layers,
        cpu_layers,
        ..
    } = &parts;
    assert!(
        !device_layers.is_empty() && !cpu_layers.is_empty(),
        "{parts:?}"
    );
    assert_eq!(
        (device_layers.start, device_layers.end),
        (0, cpu_layers.start)
    );
    assert_eq!(cpu_layers.end, LAYERS);

    let mut cpu = OrtStage::load(&model, 0..LAYERS, options).unwrap();
    let info = split.info().clone();
    assert_eq!(info.layers, 0..LAYERS);
    assert_eq!(info.kv_bytes_per_token, cpu.info().kv_bytes_per_token);
    let text = tokens(40);
    let found = logits(&mut *split, segment(0, 0, 40), &text);
    let expected = logits(&mut cpu, segment(0, 0, 40), &text);
    assert!(cosine(&found, &expected) > 0.999);
    assert_eq!(parts.moved_bytes(), 40 * 4 * info.shape.hidden as u64);
    // One more layer would not have fitted, with the rows of both slots.
    let more = whole.layers[0] + whole.kv_row * 64 * (u64::from(device_layers.end) + 2);
    assert!(memory.left().is_some_and(|left| left < more), "{memory:?}");

    drop(split);
    assert_eq!(memory.used(), 0);
}

/// A model whose first layer is dense and whose others are mixtures.
fn mixture() -> Model {
    let mut shape = Shape {
        layers: LAYERS,
        ..Shape::tiny(Architecture::Qwen3Moe)
    };
    if let Some(mixture) = &mut shape.mixture {
        mixture.leading_dense = 1;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mixture.gguf");
    // Floats: where rows are rounded to 8 bits, a row may choose another expert.
    random_model(&shape, GgmlType::F16, Tokens::Bytes, &path).unwrap();
    Model::open(&path).unwrap()
}

#[test]
fn the_cpu_computes_experts_before_it_computes_whole_layers() {
    let model = mixture();
    let plain = options(&DeviceMemory::default(), 1, 64);
    let whole = sizes(&model, &plain);
    let in_file = model.tensors().file_len();
    assert!(whole.weights(LAYERS as usize) < in_file / 2, "{whole:?}");
    let mut cpu = OrtStage::load(&model, 0..LAYERS, plain.clone()).unwrap();
    let text = tokens(20);
    let expected = logits(&mut cpu, segment(0, 0, 20), &text);
    let next = logits(&mut cpu, segment(0, 20, 1), &[7]);
    let cache = |layers: u64| whole.kv_row * layers * whole.cache_rows.1;
    for on_device in [LAYERS, 3, 1] {
        let room = whole.weights(on_device as usize) + cache(on_device.into());
        let memory = DeviceMemory::new(Some(room));
        let options = options(&memory, 1, 64);
        let check = |_: &mut dyn Stage| Ok(());
        let loaded = load(&model, 0..LAYERS, &options, device(), None, check);
        let (mut stage, parts) = loaded.unwrap();
        assert_eq!(parts.device_layers, 0..on_device);
        assert_eq!(parts.cpu_layers, on_device..LAYERS);
        assert_eq!(parts.expert_layers, on_device - 1);
        assert_eq!(memory.used(), whole.weights(on_device as usize));
        let found = logits(&mut *stage, segment(0, 0, 20), &text);
        assert!(cosine(&found, &expected) > 0.9999, "{on_device}");
        let found = logits(&mut *stage, segment(0, 20, 1), &[7]);
        assert!(cosine(&found, &next) > 0.9999, "{on_device}");
        let crossings = match on_device {
            LAYERS => LAYERS - 1,
            // A dense layer before one on the CPU.
            1 => 1,
            on_device => on_device - 1,
        };
        let row = 4 * stage.info().shape.hidden as u64;
        assert_eq!(parts.moved_bytes(), u64::from(crossings) * 21 * row);
        assert_eq!(memory.used(), room, "all rows of the slot have room");
        drop(stage);
        assert_eq!(memory.used(), 0);
    }
    // Every byte of the weights is in one of the places, and in one only.
    let memory = DeviceMemory::default();
    let (stage, parts) = loaded(&model, &options(&memory, 1, 64), None).unwrap();
    let table = model.tensors().get("token_embd.weight").unwrap();
    let table = table.data.len() as u64;
    let all = memory.used() + parts.cpu_weight_bytes + table;
    assert_eq!(stage.info().weight_bytes, all);
}

#[test]
fn mixtures_that_the_operators_cannot_attend_are_refused_by_name() {
    for (architecture, feature) in [
        (Architecture::Deepseek2, "multi-head latent attention"),
        (Architecture::GptOss, "a bias on the output of attention"),
        (Architecture::Olmoe, "norms over all heads of a row"),
        (Architecture::GraniteMoe, "a factor on residual rows"),
    ] {
        let model = model_of(architecture, GgmlType::Q8_0);
        let options = options(&DeviceMemory::default(), 1, 64);
        let error = loaded(&model, &options, None).err().unwrap().to_string();
        assert!(error.contains(feature), "{error}");
    }
}

#[test]
fn fewer_layers_go_to_a_device_that_has_less_memory_than_it_seemed() {
    let model = model();
    let whole = sizes(&model, &options(&DeviceMemory::default(), 1, 64));
    for (room, expected) in [(6, 6), (4, 4), (3, 2), (2, 2), (1, 1)] {
        let memory = DeviceMemory::new(Some(whole.weights(room)));
        // The plan knows no limit, so it begins with all layers.
        let loaded = loaded(&model, &options(&memory, 1, 64), None);
        let (stage, parts) = loaded.unwrap();
        assert_eq!(parts.device_layers, 0..expected, "{room}");
        assert_eq!(stage.info().layers, 0..LAYERS);
        assert_eq!(parts.memory.used(), whole.weights(expected as usize));
    }
}

#[test]
fn where_no_layer_fits_the_error_names_what_is_missing() {
    let model = model();
    let memory = DeviceMemory::new(Some(1000));
    let unknown = loaded(&model, &options(&memory, 1, 64), None)
        .err()
        .unwrap();
    let known = loaded(&model, &options(&memory, 1, 64), Some(1000))
        .err()
        .unwrap();
    for (error, part) in [
        (unknown, "of the limit of 1000 bytes"),
        (known, "no layer fits"),
    ] {
        assert!(matches!(error, LoadError::DeviceMemory { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
    assert_eq!(memory.used(), 0);
}

#[test]
fn a_failed_allocation_in_a_step_is_an_error_that_leaves_the_parts_level() {
    let model = model();
    let whole = sizes(&model, &options(&DeviceMemory::default(), 2, 512));
    let part = 3;
    let row = whole.kv_row * part;
    // Room for two slots with their first rows, and not for a third time as much.
    let memory = DeviceMemory::new(Some(whole.weights(part as usize) + 2 * 256 * row));
    let mut options = options(&memory, 2, 512);
    options.max_rows = 512;
    options.device.most_layers = Some(part as u32);
    let (mut stage, parts) = loaded(&model, &options, None).unwrap();
    assert_eq!(parts.device_layers, 0..3);
    let text = tokens(300);
    let expected = logits(&mut *stage, segment(0, 0, 200), &text[..200]);
    logits(&mut *stage, segment(1, 0, 100), &text[..100]);
    assert!(!memory.is_exhausted());
    let error = stage
        .forward(&[segment(0, 200, 100)], StageInput::Tokens(&text[200..]))
        .unwrap_err();
    assert!(matches!(error, StageError::OutOfMemory { .. }), "{error}");
    assert!(memory.is_exhausted());
    // The slot that was to grow is empty, the other one is as it was.
    assert_eq!((stage.kv_len(0), stage.kv_len(1)), (0, 100));
    let again = logits(&mut *stage, segment(0, 0, 200), &text[..200]);
    assert!(cosine(&again, &expected) > 0.9999);
}

#[test]
fn slots_give_memory_back_that_others_were_planned_to_have() {
    let model = model();
    let plain = options(&DeviceMemory::default(), 3, 512);
    let whole = sizes(&model, &plain);
    let (part, rows) = (3, 1300);
    let budget = whole.weights(part) + rows * whole.kv_row * part as u64;
    let memory = DeviceMemory::new(Some(budget));
    let mut options = options(&memory, 3, 512);
    options.max_rows = 512;
    options.device.kv_memory = Some(266 * whole.kv_row * u64::from(LAYERS));
    let (mut stage, parts) = loaded(&model, &options, Some(budget)).unwrap();
    assert_eq!((parts.device_layers.end, parts.kv_tokens), (3, Some(266)));
    let text = tokens(260);
    let mut kept = Vec::new();
    for slot in 0..3 {
        // A slot of 512 rows, of which two stay.
        logits(&mut *stage, segment(slot, 0, 260), &text);
        stage.truncate(slot, 2);
        kept.push(stage.kv_export(slot, 0..2).unwrap());
    }
    for (slot, kept) in (0..).zip(&kept) {
        assert_eq!(stage.kv_export(slot, 0..2).unwrap(), *kept);
    }
    assert!(!memory.is_exhausted());
    // In one step, too: the first slot's memory shrinks to its rows, which are of this step.
    stage.truncate(2, 0);
    for slot in 0..2 {
        logits(&mut *stage, segment(slot, 0, 260), &text);
        stage.truncate(slot, 2);
    }
    let all = [segment(0, 2, 1), segment(2, 0, 260)];
    let both = [&text[2..3], &text[..]].concat();
    stage.forward(&all, StageInput::Tokens(&both)).unwrap();
    let numbers = |slot| -> Vec<f32> {
        let row = stage.kv_export(slot, 2..3).unwrap();
        let halves = row.as_chunks().0.iter().copied();
        halves
            .map(|half| half::f16::from_le_bytes(half).to_f32())
            .collect()
    };
    assert!(cosine(&numbers(0), &numbers(2)) > 0.9999);
    // The same by imported rows.
    for slot in 0..3 {
        stage.truncate(slot, 0);
        let rows = kept[0].repeat(130);
        stage.kv_import(slot, 0, &rows).unwrap();
        stage.truncate(slot, 2);
    }
    assert_eq!(stage.kv_export(0, 0..2).unwrap(), kept[0]);
}

#[test]
fn greedy_tokens_are_those_of_one_engine_up_to_a_near_tie() {
    /// As in tests/smollm2_device.rs: the CPU's stage rounds activations to 8 bits.
    const TIE: f32 = 0.5;
    let model = Model::open(paths::smollm2().unwrap()).unwrap();
    let layers = 0..model.config().layers;
    let greedy = |stage: &mut dyn Stage, prompt: &[u32]| -> Vec<(u32, f32)> {
        let mut row = logits(stage, segment(0, 0, prompt.len() as u32), prompt);
        let mut out = Vec::new();
        for _ in 0..24 {
            let best = |row: &[f32]| -> usize {
                (0..row.len())
                    .max_by(|&a, &b| row[a].total_cmp(&row[b]))
                    .unwrap()
            };
            let token = best(&row);
            let top = std::mem::replace(&mut row[token], f32::NEG_INFINITY);
            out.push((token as u32, top - row[best(&row)]));
            let position = stage.kv_len(0);
            row = logits(stage, segment(0, position, 1), &[token as u32]);
        }
        out
    };
    let plain = options(&DeviceMemory::default(), 1, 128);
    let whole = DeviceSizes::of(&model, &layers, &plain, device(), Parts::Whole).unwrap();
    let memory = DeviceMemory::new(Some(whole.weights(layers.len()) / 2));
    let limited = options(&memory, 1, 128);
    let check = |_: &mut dyn Stage| Ok(());
    let (mut split, parts) = load(&model, layers.clone(), &limited, device(), None, check).unwrap();
    assert!((5..=25).contains(&parts.device_layers.end), "{parts:?}");
    let mut cpu = OrtStage::load(&model, layers, plain).unwrap();
    let mut same = 0;
    for prompt in ["The capital of France is", "Water boils at"] {
        let encoded = model
            .tokenizer()
            .encode(prompt, mesh_model::EncodeOptions::PLAIN);
        let prompt = encoded.unwrap();
        split.truncate(0, 0);
        cpu.truncate(0, 0);
        let found = greedy(&mut *split, &prompt);
        let expected = greedy(&mut cpu, &prompt);
        let differs = found.iter().zip(&expected).position(|(a, b)| a.0 != b.0);
        if let Some(at) = differs {
            let gap = found[at].1.min(expected[at].1);
            assert!(gap < TIE, "token {at} differs by {gap}");
        }
        same += differs.unwrap_or(found.len());
    }
    assert!(
        same >= 12,
        "{same} of 48 tokens before the first difference"
    );
}
