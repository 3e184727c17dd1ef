//! What the tests of the stage share.

#![allow(dead_code, reason = "each test file uses a part")]

use mesh_engine::{LogitRows, Segment, SlotId, Stage, StageInput, StageOutput};
use mesh_engine_ort::{OrtOptions, OrtStage};
use mesh_model::Model;
use mesh_testkit::paths;

/// Options for tests: ONNX Runtime from the cache, two threads.
pub(crate) fn options(slots: u32, context: u32) -> OrtOptions {
    OrtOptions {
        library: Some(paths::ort_library().unwrap()),
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
pub(crate) fn logits(stage: &mut OrtStage, segments: &[Segment], tokens: &[u32]) -> Vec<f32> {
    match stage.forward(segments, StageInput::Tokens(tokens)).unwrap() {
        StageOutput::Logits(logits) => logits.to_vec(),
        StageOutput::Hidden(_) => panic!("a last stage gives logits"),
    }
}

/// Runs tokens through the stages of a split model; each takes what the one before gives.
pub(crate) fn pipeline(stages: &mut [OrtStage], segments: &[Segment], tokens: &[u32]) -> Vec<f32> {
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
        hidden = Some(match stage.forward(&asked, input).unwrap() {
            StageOutput::Hidden(rows) | StageOutput::Logits(rows) => rows.to_vec(),
        });
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
    let differing = a
        .iter()
        .zip(b)
        .filter(|(a, b)| a.to_bits() != b.to_bits())
        .count();
    assert_eq!(differing, 0, "{differing} of {} numbers differ", a.len());
}
