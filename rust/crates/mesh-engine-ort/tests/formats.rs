//! Weights in other formats than the file's, on the real SmolLM2-135M-Instruct.

mod common;

use common::{options, pipeline};
use mesh_engine::{LogitRows, Segment, Stage};
use mesh_engine_ort::{OrtOptions, OrtStage, WeightFormat};
use mesh_model::{EncodeOptions, Model};
use mesh_testkit::paths;

const TEXT: &str = include_str!("../../mesh-bench/data/alice.txt");
const WINDOW: usize = 256;

fn smollm2() -> Model {
    Model::open(paths::smollm2().unwrap()).unwrap()
}

fn stages(model: &Model, cuts: &[(u32, u32, WeightFormat)]) -> Vec<OrtStage> {
    cuts.iter()
        .map(|&(start, end, weights)| {
            let options = OrtOptions {
                weights,
                max_rows: WINDOW as u32,
                // Exact scales: what is compared is the formats.
                compact: false,
                ..options(1, WINDOW as u32)
            };
            OrtStage::load(model, start..end, options).unwrap()
        })
        .collect()
}

/// Of the second half of each window, from an empty context.
fn perplexity(model: &Model, mut stages: Vec<OrtStage>, windows: usize) -> f64 {
    let tokens = model
        .tokenizer()
        .encode(TEXT, EncodeOptions::default())
        .unwrap();
    let (mut sum, mut count) = (0.0, 0);
    for window in tokens.chunks_exact(WINDOW).take(windows) {
        let segment = Segment {
            slot: 0,
            position: 0,
            rows: WINDOW as u32,
            logits: LogitRows::All,
        };
        let rows = pipeline(&mut stages, &[segment], window);
        let rows: Vec<&[f32]> = rows.chunks(model.config().vocab).collect();
        for at in WINDOW / 2..WINDOW - 1 {
            let most = rows[at].iter().copied().fold(f32::MIN, f32::max);
            let exp: f64 = rows[at].iter().map(|x| f64::from(x - most).exp()).sum();
            sum += exp.ln() - f64::from(rows[at][window[at + 1] as usize] - most);
            count += 1;
        }
        for stage in &mut stages {
            stage.truncate(0, 0);
        }
    }
    (sum / f64::from(count)).exp()
}

/// The file's layers have 4 bits already: `Int4` leaves them alone, and `Int8` cannot know better than they do. It rounds once
/// more, which costs about a third of a percent.
#[test]
fn int8_stages_and_stages_of_the_files_own_format_work_together() {
    let model = smollm2();
    let of = |cuts: &[(u32, u32, WeightFormat)]| perplexity(&model, stages(&model, cuts), 8);
    let file = of(&[(0, 30, WeightFormat::File)]);
    assert_eq!(of(&[(0, 30, WeightFormat::Int4)]), file);
    let int8 = of(&[(0, 30, WeightFormat::Int8)]);
    let mixed = of(&[(0, 15, WeightFormat::Int8), (15, 30, WeightFormat::File)]);
    assert_ne!(int8, file, "nothing was requantised");
    for (name, found) in [("int8", int8), ("mixed", mixed)] {
        let ratio = found / file;
        assert!(
            (0.99..1.01).contains(&ratio),
            "{name}: {found}, the file's own {file}"
        );
    }
    // So near to each other that the order of the three depends on the text: between, give or take half a percent.
    let (low, high) = (file.min(int8), file.max(int8));
    assert!(
        (low * 0.995..high * 1.005).contains(&mixed),
        "{mixed} is not between {low} and {high}"
    );
}

#[test]
fn int8_takes_the_memory_it_should() {
    let model = smollm2();
    let bytes = |weights| stages(&model, &[(3, 4, weights)])[0].info().weight_bytes as f64;
    // 34 bytes for 32 weights instead of 20.
    let ratio = bytes(WeightFormat::Int8) / bytes(WeightFormat::File);
    assert!((1.6..1.8).contains(&ratio), "{ratio}");
}
