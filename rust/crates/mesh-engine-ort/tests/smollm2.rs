//! The stage on the real SmolLM2-135M.

use mesh_engine::{LogitRows, Segment, Stage, StageInput, StageOutput};
use mesh_engine_ort::{OrtOptions, OrtStage};
use mesh_model::Model;
use mesh_testkit::paths;

fn options() -> OrtOptions {
    OrtOptions { library: Some(paths::ort_library().unwrap()), threads: 2, slots: 4, context: 1024, ..OrtOptions::default() }
}

fn arg_max(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, v) in logits.iter().enumerate() {
        if *v > logits[best] { best = i; }
    }
    best as u32
}

#[test]
fn greedy_smoke() {
    let model = Model::open(paths::smollm2().unwrap()).unwrap();
    let t = std::time::Instant::now();
    let mut stage = OrtStage::load(&model, 0..30, options()).unwrap();
    eprintln!("load {:?}", t.elapsed());
    let prompt: Vec<u32> = vec![1, 2, 3];
    let mut tokens = prompt.clone();
    let mut position = 0;
    let mut out = vec![];
    for _ in 0..10 {
        let rows = tokens.len() as u32;
        let segment = Segment { slot: 0, position, rows, logits: LogitRows::Last };
        let StageOutput::Logits(l) = stage.forward(&[segment], StageInput::Tokens(&tokens)).unwrap() else { panic!() };
        position += rows;
        let token = arg_max(l);
        out.push(token);
        tokens = vec![token];
    }
    eprintln!("{out:?}");
    assert_eq!(out, [79, 100, 43405, 30, 198, 198, 504, 2798, 1694, 314]);
}
