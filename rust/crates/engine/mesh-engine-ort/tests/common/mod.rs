//! Helpers shared by the tests of the stage.

#![allow(dead_code, reason = "each test file uses a part")]

use mesh_engine::{LogitRows, Segment, SlotId, Stage, StageInput, StageOutput};
use mesh_engine_ort::{OrtOptions, OrtStage, Provider};
use mesh_model::synth::{Shape, Tokens, random_model};
use mesh_model::{Architecture, EncodeOptions, GgmlType, Model};
use mesh_testkit::paths;

/// Options for tests: ONNX Runtime from the cache, or for a GPU the one that `ORT_DYLIB_PATH` names; two
/// threads.
pub(crate) fn options(slots: u32, context: u32) -> OrtOptions {
    OrtOptions {
        library: match provider() {
            Provider::Cpu => Some(paths::ort_library().unwrap()),
            _ => None,
        },
        threads: 2,
        slots,
        context,
        ..OrtOptions::default()
    }
}

/// A stage of the whole model.
pub(crate) fn whole(model: &Model, options: OrtOptions) -> OrtStage {
    OrtStage::load(model, 0..model.config().layers, options).unwrap()
}

/// A segment whose last row becomes logits.
pub(crate) fn last(slot: SlotId, position: u32, rows: usize) -> Segment {
    Segment {
        slot,
        position,
        rows: rows as u32,
        logits: LogitRows::Last,
    }
}

/// The same without logits.
pub(crate) fn quiet(slot: SlotId, position: u32, rows: usize) -> Segment {
    Segment {
        logits: LogitRows::None,
        ..last(slot, position, rows)
    }
}

/// Runs tokens through a stage that ends the model.
pub(crate) fn logits(stage: &mut impl Stage, segments: &[Segment], tokens: &[u32]) -> Vec<f32> {
    match stage.forward(segments, StageInput::Tokens(tokens)).unwrap() {
        StageOutput::Logits(logits) => logits.to_vec(),
        StageOutput::Hidden(_) => panic!("a last stage gives logits"),
    }
}

/// Runs tokens through the stages of a split model; the output of one stage is the input of the next.
pub(crate) fn pipeline(
    stages: &mut [impl Stage],
    segments: &[Segment],
    tokens: &[u32],
) -> Vec<f32> {
    pipeline_over(stages, segments, tokens, |_| {})
}

/// As [`pipeline`], with something done to the rows between two stages.
pub(crate) fn pipeline_over(
    stages: &mut [impl Stage],
    segments: &[Segment],
    tokens: &[u32],
    link: impl Fn(&mut [f32]),
) -> Vec<f32> {
    let mut hidden: Option<Vec<f32>> = None;
    for stage in stages {
        let input = match &hidden {
            None => StageInput::Tokens(tokens),
            Some(rows) => StageInput::Hidden(rows),
        };
        // Only the last stage is asked for logits.
        let asked: Vec<Segment> = segments
            .iter()
            .map(|segment| match stage.info().is_last() {
                true => *segment,
                false => Segment {
                    logits: LogitRows::None,
                    ..*segment
                },
            })
            .collect();
        let mut rows = match stage.forward(&asked, input).unwrap() {
            StageOutput::Hidden(rows) | StageOutput::Logits(rows) => rows.to_vec(),
        };
        if !stage.info().is_last() {
            link(&mut rows);
        }
        hidden = Some(rows);
    }
    hidden.unwrap()
}

/// Index of the largest logit, the first of equals.
pub(crate) fn arg_max(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// Panics unless both are the same, bit for bit.
#[track_caller]
pub(crate) fn assert_same_bits(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    let differing: Vec<(usize, (f32, f32))> = a
        .iter()
        .copied()
        .zip(b.iter().copied())
        .enumerate()
        .filter(|(_, (a, b))| a.to_bits() != b.to_bits())
        .collect();
    let most = differing.iter().map(|(_, (a, b))| (a - b).abs());
    assert!(
        differing.is_empty(),
        "{} of {} numbers differ, by {} at most; the first (index, values): {:?}",
        differing.len(),
        a.len(),
        most.fold(0.0, f32::max),
        &differing[..differing.len().min(4)]
    );
}

/// A small network with random weights.
pub(crate) fn tiny(architecture: Architecture, ty: GgmlType) -> Model {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    random_model(&Shape::tiny(architecture), ty, Tokens::Bytes, &path).unwrap();
    Model::open(&path).unwrap()
}

/// SmolLM2-135M-Instruct in Q4_1.
pub(crate) fn smollm2() -> Model {
    Model::open(paths::smollm2().unwrap()).unwrap()
}

/// Plain text as the model's tokens.
pub(crate) fn encode(model: &Model, text: &str) -> Vec<u32> {
    let tokenizer = model.tokenizer();
    tokenizer.encode(text, EncodeOptions::PLAIN).unwrap()
}

/// Tokens that are not all the same.
pub(crate) fn some_tokens(count: u32) -> Vec<u32> {
    (0..count).map(|i| (i * 37 + 11) % 256).collect()
}

/// Cosine of the angle between two rows.
pub(crate) fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// The provider under test: the CPU's, or the one that `HYDRAMESH_TEST_GPU` names.
pub(crate) fn provider() -> Provider {
    let name = std::env::var("HYDRAMESH_TEST_GPU").unwrap_or_default();
    if name.is_empty() {
        return Provider::Cpu;
    }
    [Provider::Cuda, Provider::MiGraphX, Provider::WebGpu]
        .into_iter()
        .find(|provider| provider.name() == name && provider.is_compiled_in())
        .expect(
            "HYDRAMESH_TEST_GPU is cuda, migraphx (each with the feature of that name) or webgpu",
        )
}
