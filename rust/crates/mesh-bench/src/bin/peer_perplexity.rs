//! Perplexity of our engine, with exact and with compact weights, next to llama.cpp's on the same file and text.
//!
//! Both score the same tokens: windows of 512, each from an empty context, the second half counted, as llama-perplexity does.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use mesh_bench::{Anchor, Ours};
use mesh_engine_ort::OrtOptions;
use mesh_model::{EncodeOptions, Model};
use mesh_testkit::paths;

const TEXT: &str = include_str!("../../data/alice.txt");
const WINDOW: usize = 512;

/// Scores a fixed text with our engine and with llama.cpp
#[derive(Parser)]
struct Args {
    /// Model file; default SmolLM2-135M-Instruct
    model: Option<PathBuf>,
    /// Threads of each engine
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let path = match args.model {
        Some(path) => path,
        None => paths::smollm2()?,
    };
    let model = Model::open(&path)?;
    let tokens = model.tokenizer().encode(TEXT, EncodeOptions::default())?;
    let windows: Vec<&[u32]> = tokens.chunks_exact(WINDOW).collect();
    println!(
        "{} windows of {WINDOW} tokens of {} bytes of text",
        windows.len(),
        TEXT.len()
    );

    let mut anchor = Anchor::start(&path, args.threads, WINDOW as u32, 1, true)?;
    let theirs = perplexity(&windows, |window| {
        let ids: Vec<String> = window.iter().map(u32::to_string).collect();
        let answer = anchor.ask(&format!("ppl {WINDOW} {}", ids.join(" ")))?;
        let (sum, count) = answer.split_once(' ').context("llama.cpp's answer")?;
        Ok((sum.parse()?, count.parse()?))
    })?;
    println!("llama.cpp        {theirs:.4}");
    for compact in [false, true] {
        let options = OrtOptions {
            threads: args.threads,
            slots: 1,
            context: WINDOW as u32,
            // Half a window is scored in one step.
            max_rows: WINDOW as u32,
            compact,
            ..OrtOptions::default()
        };
        let mut ours = Ours::load(&model, options)?;
        let found = perplexity(&windows, |window| ours.perplexity(window))?;
        let name = if compact {
            "ours, compact"
        } else {
            "ours, exact"
        };
        println!("{name:16} {found:.4}   ratio {:.4}", found / theirs);
    }
    Ok(())
}

fn perplexity(
    windows: &[&[u32]],
    mut score: impl FnMut(&[u32]) -> Result<(f64, usize)>,
) -> Result<f64> {
    let (mut sum, mut count) = (0.0, 0);
    for window in windows {
        let (part, tokens) = score(window)?;
        sum += part;
        count += tokens;
    }
    Ok((sum / count as f64).exp())
}
