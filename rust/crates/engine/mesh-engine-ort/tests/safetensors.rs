//! Models in Hugging Face's form: the same logits as the same weights in a GGUF file, as a plain
//! implementation of the checkpoint they come from, and, quantised at load, how far from it.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use common::{assert_same_bits, last, logits, options, pipeline, some_tokens, whole};
use mesh_engine::{LogitRows, Segment};
use mesh_engine_ort::{OrtOptions, OrtStage, WeightCache, WeightFormat};
use mesh_model::safetensors::Dtype;
use mesh_model::synth::{Shape, Tokens, random_model, write_folder, write_llama2c};
use mesh_model::{Architecture, EncodeOptions, GgmlType, Model};
use mesh_testkit::paths;

fn all(rows: usize) -> Segment {
    Segment {
        logits: LogitRows::All,
        ..last(0, 0, rows)
    }
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max)
}

#[test]
fn a_folder_gives_the_logits_of_the_same_weights_in_a_gguf_file() {
    let tokens = some_tokens(30);
    for architecture in Architecture::ALL {
        for (ty, dtype, shards) in [
            (GgmlType::F32, Dtype::F32, 3),
            (GgmlType::F16, Dtype::F16, 1),
            (GgmlType::BF16, Dtype::BF16, 2),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let (file, folder) = (dir.path().join("tiny.gguf"), dir.path().join("tiny"));
            random_model(&Shape::tiny(architecture), ty, Tokens::Bytes, &file).unwrap();
            let gguf = Model::open(&file).unwrap();
            write_folder(&gguf, dtype, shards, &folder).unwrap();
            let model = Model::open(&folder).unwrap();
            let of = |model: &Model, weights| {
                let options = OrtOptions {
                    weights,
                    ..options(1, 64)
                };
                logits(&mut whole(model, options), &[all(tokens.len())], &tokens)
            };
            for format in WeightFormat::ALL {
                let (ours, theirs) = (of(&model, format), of(&gguf, format));
                let scale = theirs.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                let difference = worst(&ours, &theirs);
                // Quantised rows may round the other way where the last bit of a float differs.
                let most = if format == WeightFormat::File {
                    1e-4
                } else {
                    3e-2
                };
                assert!(
                    difference <= most * scale,
                    "{architecture:?} {dtype} {format:?}: {difference} of {scale}"
                );
            }
        }
    }
}

#[test]
fn a_folder_can_be_cut_anywhere() {
    let dir = tempfile::tempdir().unwrap();
    let model = stories(dir.path());
    let tokens = some_tokens(9);
    for weights in WeightFormat::ALL {
        let options = OrtOptions {
            weights,
            ..options(1, 32)
        };
        let expected = logits(
            &mut whole(&model, options.clone()),
            &[last(0, 0, 9)],
            &tokens,
        );
        let mut stages: Vec<OrtStage> = [0..1, 1..4, 4..6]
            .into_iter()
            .map(|layers| OrtStage::load(&model, layers, options.clone()).unwrap())
            .collect();
        assert_same_bits(&pipeline(&mut stages, &[last(0, 0, 9)], &tokens), &expected);
    }
}

/// stories15M in a folder of its own.
fn stories(dir: &Path) -> Model {
    let folder = dir.join("stories15M");
    write_llama2c(&fs::read(paths::stories().unwrap()).unwrap(), &folder).unwrap();
    Model::open(folder).unwrap()
}

/// The checkpoint's forward pass as llama2.c computes it, in f32, without any of the tested code.
fn plain_forward(data: &[u8], tokens: &[u32]) -> Vec<f32> {
    const HIDDEN: usize = 288;
    const FFN: usize = 768;
    const LAYERS: usize = 6;
    const HEAD: usize = HIDDEN / 6;
    let (words, _) = data[28..60_816_028].as_chunks::<4>();
    let mut floats = words.iter().map(|word| f32::from_le_bytes(*word));
    let mut next = |count: usize| -> Vec<f32> { floats.by_ref().take(count).collect() };
    let square = HIDDEN * HIDDEN;
    let embedding = next(32_000 * HIDDEN);
    let attention_norm = next(LAYERS * HIDDEN);
    let [wq, wk, wv, wo] = [0; 4].map(|_| next(LAYERS * square));
    let ffn_norm = next(LAYERS * HIDDEN);
    let [w1, w2, w3] = [0; 3].map(|_| next(LAYERS * HIDDEN * FFN));
    let last_norm = next(HIDDEN);
    let times = |matrix: &[f32], x: &[f32]| -> Vec<f32> {
        let rows = matrix.chunks_exact(x.len());
        rows.map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum())
            .collect()
    };
    let norm = |x: &[f32], weight: &[f32]| -> Vec<f32> {
        let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
        let factor = 1.0 / (mean + 1e-5).sqrt();
        x.iter()
            .zip(weight)
            .map(|(x, weight)| weight * x * factor)
            .collect()
    };
    let (mut keys, mut values) = (vec![Vec::new(); LAYERS], vec![Vec::new(); LAYERS]);
    let mut out = Vec::new();
    for (position, &token) in tokens.iter().enumerate() {
        let mut x = embedding[token as usize * HIDDEN..][..HIDDEN].to_vec();
        for layer in 0..LAYERS {
            let part = |all: &[f32], size: usize| all[layer * size..][..size].to_vec();
            let normed = norm(&x, &part(&attention_norm, HIDDEN));
            let mut q = times(&part(&wq, square), &normed);
            let mut k = times(&part(&wk, square), &normed);
            for i in (0..HIDDEN).step_by(2) {
                let angle = position as f32 / 10_000f32.powf((i % HEAD) as f32 / HEAD as f32);
                let (sin, cos) = angle.sin_cos();
                for row in [&mut q, &mut k] {
                    let (a, b) = (row[i], row[i + 1]);
                    row[i] = a * cos - b * sin;
                    row[i + 1] = a * sin + b * cos;
                }
            }
            keys[layer].push(k);
            values[layer].push(times(&part(&wv, square), &normed));
            let mut gathered = vec![0.0; HIDDEN];
            for head in 0..HIDDEN / HEAD {
                let range = head * HEAD..(head + 1) * HEAD;
                let scores: Vec<f32> = keys[layer]
                    .iter()
                    .map(|k| {
                        let pairs = q[range.clone()].iter().zip(&k[range.clone()]);
                        pairs.map(|(a, b)| a * b).sum::<f32>() / (HEAD as f32).sqrt()
                    })
                    .collect();
                let peak = scores.iter().copied().fold(f32::MIN, f32::max);
                let weights: Vec<f32> = scores.iter().map(|score| (score - peak).exp()).collect();
                let total: f32 = weights.iter().sum();
                for (weight, v) in weights.iter().zip(&values[layer]) {
                    for i in range.clone() {
                        gathered[i] += weight / total * v[i];
                    }
                }
            }
            let output = times(&part(&wo, square), &gathered);
            x.iter_mut().zip(output).for_each(|(x, y)| *x += y);
            let normed = norm(&x, &part(&ffn_norm, HIDDEN));
            let gate = times(&part(&w1, HIDDEN * FFN), &normed);
            let up = times(&part(&w3, HIDDEN * FFN), &normed);
            let middle: Vec<f32> = gate
                .iter()
                .zip(up)
                .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
                .collect();
            let down = times(&part(&w2, HIDDEN * FFN), &middle);
            x.iter_mut().zip(down).for_each(|(x, y)| *x += y);
        }
        out.extend(times(&embedding, &norm(&x, &last_norm)));
    }
    out
}

const STORY: &str = "Once upon a time, there was a little boat that lived by the sea. Every morning the boat woke up when the sun \
    came over the hill and said hello to the birds. One day, a big storm came. The wind was loud and the waves were very high. \
    The little boat was scared, but it heard a small voice. It was a baby duck who was lost in the water. \"Please help me,\" \
    said the duck. \"I want to go home to my mom.\" The boat wanted to help. It went up and down on the big waves until it came \
    to the duck. \"Jump in,\" said the boat. The duck jumped in and sat very still. They went back to the beach together. The \
    duck's mom was so happy that she gave the boat a big hug. From that day on, the boat and the duck were best friends, and \
    they played in the sun every day.";

#[test]
fn stories15m_gives_the_logits_of_a_plain_f32_forward_pass_and_little_is_lost_quantised() {
    let dir = tempfile::tempdir().unwrap();
    let model = stories(dir.path());
    let tokens = model
        .tokenizer()
        .encode(STORY, EncodeOptions::PLAIN)
        .unwrap();
    assert!(
        (180..256).contains(&tokens.len()),
        "{} tokens",
        tokens.len()
    );
    let vocab = model.config().vocab;
    let of = |weights: WeightFormat| {
        let options = OrtOptions {
            weights,
            max_rows: 256,
            ..options(1, 256)
        };
        logits(&mut whole(&model, options), &[all(tokens.len())], &tokens)
    };
    let exact = of(WeightFormat::File);
    let data = fs::read(paths::stories().unwrap()).unwrap();
    let checked = 48;
    let plain = plain_forward(&data, &tokens[..checked]);
    let difference = worst(&exact[..checked * vocab], &plain);
    let scale = plain.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    println!("logits of up to {scale:.1} are off by {difference:.1e}");
    assert!(difference <= 1e-3, "{difference} of {scale}");

    let perplexity = |logits: &[f32]| {
        let rows = logits.chunks_exact(vocab).zip(&tokens[1..]);
        let lost: f64 = rows
            .map(|(row, &next)| {
                let peak = row.iter().copied().fold(f32::MIN, f32::max);
                let total: f64 = row.iter().map(|x| f64::from(x - peak).exp()).sum();
                total.ln() - f64::from(row[next as usize] - peak)
            })
            .sum();
        (lost / (tokens.len() - 1) as f64).exp()
    };
    let f32 = perplexity(&exact);
    let (int8, int4) = (of(WeightFormat::Int8), of(WeightFormat::Int4));
    let (int8, int4) = (perplexity(&int8), perplexity(&int4));
    println!(
        "stories15M, {} tokens: perplexity f32 {f32:.4}, int8 {int8:.4} ({:+.2} %), int4 {int4:.4} \
         ({:+.2} %)",
        tokens.len(),
        (int8 / f32 - 1.0) * 100.0,
        (int4 / f32 - 1.0) * 100.0
    );
    assert!((2.0..20.0).contains(&f32), "{f32}");
    assert!((int8 / f32 - 1.0).abs() < 0.01, "{int8} {f32}");
    assert!(int4 / f32 < 1.15, "{int4} {f32}");
}

/// The cache's files, each with when it was written.
fn kept(folder: &Path) -> Vec<(PathBuf, SystemTime)> {
    let mut files = Vec::new();
    for model in fs::read_dir(folder).unwrap() {
        for file in fs::read_dir(model.unwrap().path()).unwrap() {
            let path = file.unwrap().path();
            let time = fs::metadata(&path).unwrap().modified().unwrap();
            files.push((path, time));
        }
    }
    files.sort();
    files
}

#[test]
fn quantised_weights_are_kept_and_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let model = stories(dir.path());
    let tokens = some_tokens(12);
    let cache = WeightCache {
        folder: dir.path().join("weights"),
        limit: 1 << 30,
    };
    for format in [WeightFormat::Int8, WeightFormat::Int4] {
        let of = |cache: Option<&WeightCache>| {
            let options = OrtOptions {
                weights: format,
                cache: cache.cloned(),
                ..options(1, 64)
            };
            logits(&mut whole(&model, options), &[last(0, 0, 12)], &tokens)
        };
        let without = of(None);
        assert_same_bits(&of(Some(&cache)), &without);
        let files = kept(&cache.folder);
        // Six layers, and the embedding, which is the output matrix, too.
        assert_eq!(files.len(), 7);
        assert_same_bits(&of(Some(&cache)), &without);
        assert_eq!(kept(&cache.folder), files, "nothing is written twice");

        // The stage uses the files of the folder: other valid matrices give other logits.
        let (first, second) = (&files[0].0, &files[1].0);
        assert!(first.ends_with("blk.0.gguf") && second.ends_with("blk.1.gguf"));
        let own = fs::read(first).unwrap();
        let other = Model::open(stories_twin(dir.path())).unwrap();
        let options = OrtOptions {
            weights: format,
            cache: Some(cache.clone()),
            ..options(1, 64)
        };
        OrtStage::load(&other, 0..1, options).unwrap();
        let twin = kept(&cache.folder)
            .into_iter()
            .find(|(path, _)| path.ends_with("blk.0.gguf") && path != first)
            .expect("another model's");
        fs::copy(&twin.0, first).unwrap();
        assert!(worst(&of(Some(&cache)), &without) > 1e-3);

        // A damaged one is made anew.
        let mut damaged = own.clone();
        let middle = damaged.len() / 2;
        damaged[middle] ^= 1;
        fs::write(first, damaged).unwrap();
        assert_same_bits(&of(Some(&cache)), &without);
        assert!(fs::read(first).unwrap() == own);
        fs::remove_dir_all(&cache.folder).unwrap();
    }
}

/// The same model with one layer's matrix upside down.
fn stories_twin(dir: &Path) -> PathBuf {
    let folder = dir.join("twin");
    let mut data = fs::read(paths::stories().unwrap()).unwrap();
    // The first query matrix lies behind embedding and norms.
    let start = 28 + 4 * (32_000 * 288 + 6 * 288);
    data[start..start + 4 * 288 * 288].reverse();
    for word in data[start..start + 4 * 288 * 288].as_chunks_mut::<4>().0 {
        word.reverse();
    }
    write_llama2c(&data, &folder).unwrap();
    folder
}
