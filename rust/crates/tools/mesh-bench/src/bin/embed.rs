//! Our embeddings against sentence-transformers: the same model, the same texts, the same threads, batches of 32, taking turns.
//!
//! Both begin with texts and end with vectors. The anchor is `scripts/embed_anchor.py` under the Python that
//! `scripts/fetch_sentence_transformers.py` installs; it sorts its texts by length, as it does by itself.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Parser;
use mesh_bench::{Ratios, Talker, median};
use mesh_engine::Encoder;
use mesh_engine_ort::{OrtEncoder, OrtOptions};
use mesh_launcher::paths;
use mesh_model::EncoderModel;

/// Compares with sentence-transformers
#[derive(Parser)]
struct Args {
    /// Folder of the model; default all-MiniLM-L6-v2
    model: Option<PathBuf>,
    /// Threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Rounds, each of which gives one ratio
    #[arg(long, default_value_t = 7)]
    rounds: usize,
}

/// Texts of one call, on both sides.
const BATCH: usize = 32;

fn main() -> Result<()> {
    let args = Args::parse();
    let folder = args.model.map_or_else(paths::minilm, Ok)?;
    let model = EncoderModel::open(&folder)?;
    let options = OrtOptions {
        threads: args.threads,
        max_rows: 32 * 512,
        ..OrtOptions::default()
    };
    let mut ours = OrtEncoder::load(&model, &options)?;
    let scratch = tempfile::tempdir()?;
    for (name, texts) in workloads()? {
        let file = scratch.path().join("texts.json");
        std::fs::write(&file, serde_json::to_vec(&texts)?)?;
        let vectors = embed(&model, &mut ours, &texts, args.threads)?;
        let least = least_cosine(&folder, &file, &vectors)?;
        let mut anchor = Talker::start(anchor(&folder, "speed", &file)?, "the anchor")?;
        let (mut ratios, mut speeds) = (Ratios::default(), [Vec::new(), Vec::new()]);
        for round in 0..=args.rounds {
            let started = Instant::now();
            embed(&model, &mut ours, &texts, args.threads)?;
            let mine = started.elapsed().as_secs_f64();
            let theirs: f64 = anchor.ask(&args.threads.to_string())?.parse()?;
            // The first round warms both up.
            if round > 0 {
                ratios.0.push(theirs / mine);
                speeds[0].push(texts.len() as f64 / mine);
                speeds[1].push(texts.len() as f64 / theirs);
            }
        }
        println!(
            "{name}: {:.0} texts/s, sentence-transformers {:.0}: ratio {:.2} ({:.2}–{:.2}) (wanted: at least 1.2); least cosine {least:.7} (wanted: at least 0.9999)",
            median(&speeds[0]),
            median(&speeds[1]),
            ratios.median(),
            ratios.least(),
            ratios.most(),
        );
    }
    Ok(())
}

/// Workloads by name: the texts to embed.
fn workloads() -> Result<Vec<(&'static str, Vec<String>)>> {
    let book = include_str!("../../data/alice.txt");
    let paragraphs: Vec<String> = book
        .split("\n\n")
        .map(|text| text.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|text| text.len() > 20)
        .collect();
    let sentences: Vec<String> = paragraphs
        .iter()
        .flat_map(|text| text.split_inclusive(['.', '!', '?']))
        .map(|text| text.trim().to_owned())
        .filter(|text| text.len() > 8)
        .take(512)
        .collect();
    let words: Vec<&str> = book.split_whitespace().collect();
    let equal = words
        .chunks_exact(90)
        .take(64)
        .map(|words| words.join(" "))
        .collect();
    let languages = include_str!("../../../../engine/mesh-engine-ort/tests/data/texts.json");
    let languages = serde_json::from_str(languages)?;
    Ok(vec![
        ("sentences of a book", sentences),
        ("its paragraphs", paragraphs),
        ("90 words each", equal),
        ("200 texts of many lengths and languages", languages),
    ])
}

/// From texts to vectors.
fn embed(
    model: &EncoderModel,
    encoder: &mut OrtEncoder,
    texts: &[String],
    threads: usize,
) -> Result<Vec<Vec<f32>>> {
    let share = texts.len().div_ceil(threads.max(1)).max(1);
    let tokens: Vec<Vec<u32>> = std::thread::scope(|scope| {
        let parts: Vec<_> = texts
            .chunks(share)
            .map(|texts| {
                let tokens = |text: &String| Ok(model.tokenise(text, None)?.tokens);
                scope.spawn(move || texts.iter().map(tokens).collect::<Result<Vec<_>>>())
            })
            .collect();
        let parts = parts.into_iter().map(|part| part.join().expect("no panic"));
        parts.collect::<Result<Vec<_>>>()
    })?
    .concat();
    let dimensions = encoder.info().dimensions;
    let mut vectors = Vec::with_capacity(texts.len());
    for batch in tokens.chunks(BATCH) {
        let sequences: Vec<&[u32]> = batch.iter().map(Vec::as_slice).collect();
        let flat = encoder.encode(&sequences)?;
        vectors.extend(flat.chunks_exact(dimensions).map(<[f32]>::to_vec));
    }
    Ok(vectors)
}

fn anchor(folder: &Path, what: &str, texts: &Path) -> Result<Command> {
    let python = paths::fetched("sentence-transformers/bin/python")
        .context("scripts/fetch_sentence_transformers.py installs it")?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../../scripts/embed_anchor.py");
    let mut command = Command::new(python);
    command.arg(script).arg(folder).arg(what).arg(texts);
    Ok(command)
}

/// The least cosine between our vectors and the anchor's.
fn least_cosine(folder: &Path, texts: &Path, ours: &[Vec<f32>]) -> Result<f64> {
    let output = anchor(folder, "exact", texts)?
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "the anchor failed");
    let text = String::from_utf8(output.stdout)?;
    let mut least = f64::INFINITY;
    let mut count = 0;
    for (line, ours) in text.lines().zip(ours) {
        let bytes = STANDARD.decode(line)?;
        let (theirs, _) = bytes.as_chunks::<4>();
        let theirs = theirs.iter().map(|b| f64::from(f32::from_le_bytes(*b)));
        let (mut dot, mut a, mut b) = (0.0, 0.0, 0.0);
        for (x, y) in ours.iter().map(|&x| f64::from(x)).zip(theirs) {
            dot += x * y;
            a += x * x;
            b += y * y;
        }
        least = least.min(dot / (a * b).sqrt());
        count += 1;
    }
    let wanted = ours.len();
    ensure!(
        count == wanted,
        "the anchor gave {count} vectors of {wanted}"
    );
    Ok(least)
}
