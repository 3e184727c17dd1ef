//! Weights in other formats than the file's, on the real SmolLM2-135M-Instruct.

mod common;

use common::{options, pipeline_over, smollm2};
use half::f16;
use mesh_engine::{LogitRows, Segment, Stage};
use mesh_engine_ort::{OrtOptions, OrtStage, WeightFormat};
use mesh_model::gguf::Writer;
use mesh_model::{EncodeOptions, GgmlType, Gguf, Model};

const TEXT: &str = include_str!("../../../tools/mesh-bench/data/alice.txt");
const WINDOW: usize = 256;

fn stages(model: &Model, cuts: &[(u32, u32, WeightFormat)]) -> Vec<OrtStage> {
    cuts.iter()
        .map(|&(start, end, weights)| {
            let options = OrtOptions {
                weights,
                max_rows: WINDOW as u32,
                // Exact scales: the test compares only the formats.
                compact: false,
                ..options(1, WINDOW as u32)
            };
            OrtStage::load(model, start..end, options).unwrap()
        })
        .collect()
}

/// Perplexity over the second half of each window, from an empty context.
fn perplexity(model: &Model, stages: Vec<OrtStage>, windows: usize) -> f64 {
    perplexity_over(model, stages, windows, |_| {})
}

fn perplexity_over(
    model: &Model,
    mut stages: Vec<OrtStage>,
    windows: usize,
    link: impl Fn(&mut [f32]),
) -> f64 {
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
        let rows = pipeline_over(&mut stages, &[segment], window, &link);
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

/// The file's layers have 4 bits already: `Int4` leaves them alone, and `Int8` cannot know better than they
/// do. It rounds once more, which costs about a third of a percent.
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
    // So near to each other that the order of the three depends on the text: between, give or take half a
    // percent.
    let (low, high) = (file.min(int8), file.max(int8));
    assert!(
        (low * 0.995..high * 1.005).contains(&mixed),
        "{mixed} is not between {low} and {high}"
    );
}

/// The loss of quality in a ring with `half_rows` is negligible.
#[test]
fn rows_that_travel_as_f16_keep_the_perplexity() {
    let model = smollm2();
    let thirds = || {
        let file = WeightFormat::File;
        stages(&model, &[(0, 10, file), (10, 20, file), (20, 30, file)])
    };
    let whole = perplexity(&model, thirds(), 4);
    let half = perplexity_over(&model, thirds(), 4, |rows| {
        for number in rows {
            *number = f16::from_f32(*number).to_f32();
        }
    });
    println!("f32 {whole:.4}, f16 {half:.4}, ratio {:.6}", half / whole);
    assert!((half / whole - 1.0).abs() < 0.002, "{whole}, {half}");
}

/// The model with weights that have more than 4 bits: each is put anywhere in the step that its 4 bits stand
/// for, as if it had been there before somebody rounded it, and stored as f16.
fn unrounded(model: &Model, path: &std::path::Path) -> Model {
    let gguf = Gguf::open(model.path()).unwrap();
    let mut writer = Writer::new();
    for (name, value) in gguf.metadata_iter() {
        writer.copy_key(name, value);
    }
    for tensor in gguf.tensors().iter() {
        let ty = match tensor.ty {
            GgmlType::Q4_1 => GgmlType::F16,
            ty => ty,
        };
        writer.tensor(tensor.name, ty, tensor.dims);
    }
    let mut state = 1u32;
    let mut file = std::io::BufWriter::new(std::fs::File::create(path).unwrap());
    writer
        .write(&mut file, |name, ty, _, out| {
            let tensor = gguf.tensors().get(name).unwrap();
            if ty == tensor.ty {
                return out.write_all(&tensor.data.read().unwrap());
            }
            let data = tensor.data.read().unwrap();
            let (blocks, _) = data.as_chunks::<20>();
            let weights = tensor.to_f32().unwrap();
            let (weights, _) = weights.as_chunks::<32>();
            let mut bytes = Vec::with_capacity(tensor.elements() as usize * 2);
            for (block, weights) in blocks.iter().zip(weights) {
                let step = f16::from_le_bytes([block[0], block[1]]).to_f32();
                for weight in weights {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let part = (state >> 8) as f32 / (1 << 24) as f32 - 0.5;
                    bytes.extend(f16::from_f32(weight + part * step).to_le_bytes());
                }
            }
            out.write_all(&bytes)
        })
        .unwrap();
    drop(file);
    Model::open(path).unwrap()
}

#[test]
fn half_int8_and_half_int4_lies_between_them() {
    let dir = tempfile::tempdir().unwrap();
    let model = unrounded(&smollm2(), &dir.path().join("unrounded.gguf"));
    let of = |cuts: &[(u32, u32, WeightFormat)]| perplexity(&model, stages(&model, cuts), 4);
    let int8 = of(&[(0, 30, WeightFormat::Int8)]);
    let int4 = of(&[(0, 30, WeightFormat::Int4)]);
    let mixed = of(&[(0, 15, WeightFormat::Int8), (15, 30, WeightFormat::Int4)]);
    println!("int8 {int8:.2}, half and half {mixed:.2}, int4 {int4:.2}");
    // 30.2, 34.3 and 37.0; as f16 it is 30.0.
    assert!(
        int8 < mixed * 0.95 && mixed < int4 * 0.97,
        "{int8}, {mixed}, {int4}"
    );
    assert!(int8 < 31.0, "{int8}");
}

#[test]
fn int8_takes_the_memory_it_should() {
    let model = smollm2();
    let bytes = |weights| stages(&model, &[(3, 4, weights)])[0].info().weight_bytes as f64;
    // 34 bytes for 32 weights instead of 20.
    let ratio = bytes(WeightFormat::Int8) / bytes(WeightFormat::File);
    assert!((1.6..1.8).contains(&ratio), "{ratio}");
}
