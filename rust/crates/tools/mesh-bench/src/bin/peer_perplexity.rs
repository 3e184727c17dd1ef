//! Perplexity of our engine, with exact and with compact weights, next to llama.cpp's on the same file and text.
//!
//! Both score the same tokens: windows of 512 (`--window`), each from an empty context, the second half counted, as
//! llama-perplexity does. Where a model wants its begin token, that takes the place of a window's first, as there.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use mesh_bench::{Anchor, Ours};
use mesh_engine_ort::{OrtOptions, WeightFormat};
use mesh_launcher::paths;
use mesh_model::{EncodeOptions, Model};

const TEXT: &str = include_str!("../../data/alice.txt");

/// Scores a fixed text with our engine and with llama.cpp
#[derive(Parser)]
struct Args {
    /// Model file; default SmolLM2-135M-Instruct
    model: Option<PathBuf>,
    /// Threads of each engine
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Tokens in a window
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(4..=2048))]
    window: u32,
    /// Windows to score at most; default all of the text
    #[arg(long)]
    windows: Option<usize>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let path = args.model.map_or_else(paths::smollm2, Ok)?;
    let model = Model::open(&path)?;
    let tokens = model.tokenizer().encode(TEXT, EncodeOptions::default())?;
    let length = args.window as usize;
    let mut windows: Vec<Vec<u32>> = tokens.chunks_exact(length).map(<[u32]>::to_vec).collect();
    windows.truncate(args.windows.unwrap_or(usize::MAX));
    let tokenizer = model.tokenizer();
    if let Some(begin) = tokenizer.bos().filter(|_| tokenizer.adds_bos()) {
        windows.iter_mut().for_each(|window| window[0] = begin);
    }
    println!(
        "{}: {} windows of {length} tokens; {} MiB in the file, {} MiB in memory",
        model.name(),
        windows.len(),
        model.tensors().file_len() >> 20,
        mesh_engine_ort::memory_bytes(&model, WeightFormat::File) >> 20,
    );

    let mut anchor = Anchor::start(&path, args.threads, args.window, 1, true, None)?;
    let theirs = perplexity(&windows, |window| {
        let ids: Vec<String> = window.iter().map(u32::to_string).collect();
        let answer = anchor.ask(&format!("ppl {length} {}", ids.join(" ")))?;
        let (sum, count) = answer.split_once(' ').context("llama.cpp's answer")?;
        Ok((sum.parse()?, count.parse()?))
    })?;
    println!("llama.cpp        {theirs:.4}");
    for compact in [false, true] {
        let options = OrtOptions {
            threads: args.threads,
            slots: 1,
            context: args.window,
            // Half a window is scored in one step.
            max_rows: args.window,
            compact,
            ..OrtOptions::default()
        };
        let mut ours = Ours::load(&model, options)?;
        let found = perplexity(&windows, |window| ours.perplexity(window))?;
        let name = match compact {
            true => "ours, compact",
            false => "ours, exact",
        };
        println!("{name:16} {found:.4}   ratio {:.4}", found / theirs);
    }
    Ok(())
}

fn perplexity(
    windows: &[Vec<u32>],
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
