//! Our engine against itself: streams together against one alone, a second turn against the first, memory
//! against the model file, and the time from a started program to the first token.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use futures::StreamExt;
use mesh_bench::{Exercise, Ours, median};
use mesh_engine::{Engine, EngineHandle, Event, Request, SchedulerConfig, Stage};
use mesh_engine_ort::OrtOptions;
use mesh_launcher::paths;
use mesh_launcher::process::resident_bytes;
use mesh_model::Model;

/// Measures the engine without any service around it
#[derive(Parser)]
struct Args {
    /// Model file; default SmolLM2-135M-Instruct
    model: Option<PathBuf>,
    /// Threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Rounds, each of which gives one ratio
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Only load, compute one token and print the resident memory; the program starts itself with this
    #[arg(long, hide = true)]
    child: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let path = args.model.clone().map_or_else(paths::smollm2, Ok)?;
    if args.child {
        return child(&path, args.threads);
    }
    streams(&path, &args)?;
    second_turn(&path, &args)?;
    start(&path, &args)
}

fn options(threads: usize, slots: u32) -> OrtOptions {
    OrtOptions {
        threads,
        slots,
        context: 2048,
        compact: true,
        ..OrtOptions::default()
    }
}

fn streams(path: &Path, args: &Args) -> Result<()> {
    let mut ours = Ours::load(&Model::open(path)?, options(args.threads, 8))?;
    let mut ratios = Vec::new();
    let mut speeds = [Vec::new(), Vec::new()];
    for round in 0..=args.rounds {
        let mut speed = |exercise: Exercise| -> Result<f64> {
            Ok(f64::from(exercise.tokens()) / ours.time(exercise)?.as_secs_f64())
        };
        let one = speed(Exercise::Decode(64))?;
        let eight = speed(Exercise::Parallel(8, 64))?;
        if round > 0 {
            speeds[0].push(one);
            speeds[1].push(eight);
            ratios.push(eight / one);
        }
    }
    println!(
        "8 streams / 1 stream: {:.1} / {:.1} tok/s, ratio {:.2} (wanted: at least 2.0)",
        median(&speeds[1]),
        median(&speeds[0]),
        median(&ratios)
    );
    Ok(())
}

fn second_turn(path: &Path, args: &Args) -> Result<()> {
    let model = Model::open(path)?;
    let mut ratios = Vec::new();
    for _ in 0..args.rounds {
        // A new engine each time: nothing of the conversation may be cached in the first turn.
        let ours = Ours::load(&model, options(args.threads, 2))?;
        let (stage, config) = (Box::new(ours.stage), SchedulerConfig::default());
        let engine = Engine::start("bench", stage, Arc::new(model.clone()), config)?;
        let handle = engine.handle();
        let mut chat: Vec<u32> = (0..1000).map(|i| 200 + (i * 7919) % 40_000).collect();
        let (first, answer) = turn(&handle, &chat)?;
        chat.extend(answer);
        chat.extend((0..30).map(|i| 300 + i * 11));
        let (second, _) = turn(&handle, &chat)?;
        ratios.push(second.as_secs_f64() / first.as_secs_f64());
    }
    println!(
        "first token of the second turn / of the first, 1,000 tokens: ratio {:.3} (wanted: at most 0.333)",
        median(&ratios)
    );
    Ok(())
}

/// Time to the first token, and the answer of 24 tokens.
fn turn(engine: &EngineHandle, prompt: &[u32]) -> Result<(Duration, Vec<u32>)> {
    let start = Instant::now();
    let mut stream = engine.submit(Request::greedy("bench", prompt.to_vec(), 24));
    let mut first = None;
    let mut answer = Vec::new();
    loop {
        match futures::executor::block_on(stream.next()) {
            Some(Event::Tokens(tokens)) => {
                first.get_or_insert_with(|| start.elapsed());
                answer.extend(tokens.tokens);
            }
            Some(Event::Done(_)) => break,
            Some(Event::Failed(error)) => bail!(error),
            Some(Event::Scored(_)) | None => bail!("the engine ended"),
        }
    }
    Ok((first.unwrap_or_else(|| start.elapsed()), answer))
}

fn start(path: &Path, args: &Args) -> Result<()> {
    let mut seconds = Vec::new();
    let mut ratios = Vec::new();
    for _ in 0..args.rounds {
        let start = Instant::now();
        let output = Command::new(std::env::current_exe()?)
            .arg(path)
            .args(["--child", "--threads", &args.threads.to_string()])
            .output()?;
        seconds.push(start.elapsed().as_secs_f64());
        let text = String::from_utf8(output.stdout)?;
        let ratio = text.trim().parse();
        ratios.push(ratio.with_context(|| format!("the child said {text:?}"))?);
    }
    println!(
        "start to first token: {:.2} s (wanted: at most 2)",
        median(&seconds)
    );
    println!(
        "resident memory / (model file + KV cache in use): ratio {:.2} (wanted: at most 1.5 of the file plus the cache)",
        median(&ratios)
    );
    Ok(())
}

/// Loads, fills 512 tokens of KV cache, and prints (resident memory - KV cache) / model file.
fn child(path: &Path, threads: usize) -> Result<()> {
    let model = Model::open(path)?;
    let mut ours = Ours::load(&model, options(threads, 8))?;
    ours.time(Exercise::Prefill(512))?;
    ours.time(Exercise::Decode(1))?;
    let kv = 512 * ours.stage.info().kv_bytes_per_token;
    let resident = resident_bytes(std::process::id())?.saturating_sub(kv);
    println!("{:.3}", resident as f64 / model.tensors().file_len() as f64);
    Ok(())
}
