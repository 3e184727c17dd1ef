//! Our engine next to llama.cpp on the same model file, the same exercises, taking turns.
//!
//! Each round asks both; the printed ratio is the median over the rounds of (our tokens per second / llama.cpp's), so that
//! what disturbs the machine disturbs both. llama.cpp runs with the better of its two attention modes for each exercise.
//! Each round also measures how fast as many threads can read memory: decoding large models, both are bound by that.
//! `--sets` compares every instruction set of this CPU with llama.cpp's builds for the same set.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use mesh_bench::{Anchor, Exercise, Ours, Ratios, median};
use mesh_engine_ort::OrtOptions;
use mesh_kernels::Isa;
use mesh_machine::read_bandwidth;
use mesh_model::Model;

/// Decodes and prefills with our engine and with llama.cpp in turn
#[derive(Parser)]
struct Args {
    /// Model file for our engine
    model: PathBuf,
    /// Model file for llama.cpp, if another form of the same model
    #[arg(long)]
    anchor_model: Option<PathBuf>,
    /// Threads of each engine
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Rounds, each of which gives one ratio
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Most rows of our engine in one step
    #[arg(long, default_value_t = OrtOptions::default().max_rows)]
    rows: u32,
    /// Shorter exercises, for large models
    #[arg(long)]
    short: bool,
    /// Keep every weight of the file exactly
    #[arg(long)]
    exact: bool,
    /// One run per instruction set of this CPU and build of llama.cpp for that set
    #[arg(long, conflicts_with = "anchor_cpu")]
    sets: bool,
    /// The CPU build of llama.cpp to load, such as `ivybridge`, instead of the one that it chooses
    #[arg(long)]
    anchor_cpu: Option<String>,
}

/// llama.cpp's CPU builds (`libggml-cpu-*.so`) that use what each of our instruction sets uses.
const BUILDS: [(&str, &[&str]); 7] = [
    ("sse2", &["x64"]),
    ("sse41", &["sse42"]),
    ("avx", &["sandybridge", "ivybridge"]),
    ("avx2", &["haswell"]),
    ("avxvnni", &["alderlake"]),
    ("avx512bw", &["skylakex"]),
    ("avx512", &["icelake", "zen4"]),
];

/// Memory that is read to measure its bandwidth, much more than caches hold.
const READ_BYTES: u64 = 512 << 20;

/// Runs this program once per set and build. The set of a process is chosen once.
fn each_set() -> Result<()> {
    let available = Isa::available();
    for (isa, builds) in BUILDS {
        if !available.iter().any(|set| set.name() == isa) {
            println!("{isa}: this CPU does not have it");
            continue;
        }
        for build in builds {
            println!("-- ours {isa}, llama.cpp {build}");
            let status = Command::new(std::env::current_exe()?)
                .args(std::env::args_os().skip(1).filter(|arg| arg != "--sets"))
                .args(["--anchor-cpu", build])
                .env("HYDRAMESH_ISA", isa)
                .status()?;
            // The CPU may lack what this build needs beyond the set.
            if !status.success() {
                println!("-- not compared: the run with {isa} and {build} ended with {status}");
            }
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let args = Args::parse();
    if args.sets {
        return each_set();
    }
    let anchor_model = args.anchor_model.as_ref().unwrap_or(&args.model);
    let name = |path: &Path| path.file_name().unwrap_or_default().display().to_string();
    println!(
        "ours: {}{}; llama.cpp: {}; {} threads",
        name(&args.model),
        if args.exact { "" } else { ", compact" },
        name(anchor_model),
        args.threads
    );
    let decode = Exercise::Decode(if args.short { 32 } else { 128 });
    let mut exercises = vec![decode, Exercise::Prefill(128), Exercise::Prefill(512)];
    if !args.short {
        exercises.push(Exercise::Parallel(8, 64));
    }
    let (context, sequences) = (1024, if args.short { 1 } else { 8 });
    let model = Model::open(&args.model)?;
    let options = OrtOptions {
        threads: args.threads,
        slots: sequences,
        context,
        compact: !args.exact,
        max_rows: args.rows,
        ..OrtOptions::default()
    };
    let mut ours = Ours::load(&model, options)?;
    let mut anchors = [false, true].map(|flash| {
        let cpu = args.anchor_cpu.as_deref();
        Anchor::start(anchor_model, args.threads, context, sequences, flash, cpu)
    });
    for exercise in exercises {
        let mut rows = [Vec::new(), Vec::new()];
        let mut memory = Vec::new();
        let mut ratios = Ratios::default();
        // The first round warms all of them up.
        for round in 0..=args.rounds {
            let speed = |time: Duration| f64::from(exercise.tokens()) / time.as_secs_f64();
            let our = speed(ours.time(exercise)?);
            let mut best = f64::MIN;
            for anchor in &mut anchors {
                let anchor = anchor
                    .as_mut()
                    .map_err(|error| anyhow::anyhow!("{error:#}"))?;
                best = best.max(speed(anchor.time(exercise)?));
            }
            if round > 0 {
                rows[0].push(our);
                rows[1].push(best);
                ratios.0.push(our / best);
                if exercise == decode {
                    memory.push(read_bandwidth(args.threads, READ_BYTES) / 1e9);
                }
            }
        }
        println!(
            "{:24} ours {:7.1} tok/s   llama.cpp {:7.1} tok/s   ratio {:.2} ({:.2} to {:.2})",
            exercise.to_string(),
            median(&rows[0]),
            median(&rows[1]),
            ratios.median(),
            ratios.least(),
            ratios.most(),
        );
        if exercise == decode {
            let gigabytes = median(&memory);
            println!("{:24} memory can be read at {gigabytes:.1} GB/s", "");
        }
    }
    Ok(())
}
