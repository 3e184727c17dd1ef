//! Times a model's steps for `scripts/bench_diffusers.py`: `steps FOLDER THREADS`, then for each line `step SIDE COUNT` or
//! `decode SIDE COUNT` on standard input the seconds that it took, and for `memory` the largest resident memory so far in bytes.

use std::io::{self, BufRead, Write};
use std::path::Path;
use std::time::Instant;

use mesh_diffusion::checkpoint::Checkpoint;
use mesh_diffusion::{Conditioning, Diffuser, TextEmbedding, synth};
use mesh_engine_tch::{Device, Options, TchDiffuser};

type Failed = Box<dyn std::error::Error>;

fn main() -> Result<(), Failed> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, threads] = arguments.as_slice() else {
        return Err("usage: steps FOLDER THREADS".into());
    };
    let options = Options {
        device: std::env::var("TORCH_DEVICE").map_or(Ok(Device::Cpu), |name| name.parse())?,
        threads: threads.parse()?,
        ..Options::default()
    };
    let started = Instant::now();
    let mut model = TchDiffuser::load(&Checkpoint::open(Path::new(folder))?, &options)?;
    println!("ready {}", started.elapsed().as_secs_f64());
    for line in io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        match *words.as_slice() {
            ["memory"] => println!("{}", peak_memory()?),
            [what, side, count] => {
                println!("{}", time(&mut model, what, side.parse()?, count.parse()?)?)
            }
            _ => return Err(format!("unknown line {line:?}").into()),
        }
        io::stdout().flush()?;
    }
    Ok(())
}

/// Seconds of `count` guided predictions or decodings of square pictures.
fn time(model: &mut TchDiffuser, what: &str, side: u32, count: u32) -> Result<f64, Failed> {
    let shape = model.info().latent_shape(side, side);
    let latents = synth::randoms("latents", shape.len());
    let width = 768;
    let text = |name: &str| TextEmbedding {
        hidden: synth::randoms(name, 77 * width),
        tokens: 77,
        width,
        pooled: Vec::new(),
    };
    let conditioning = Conditioning {
        prompt: text("prompt"),
        negative: Some(text("negative")),
    };
    let started = Instant::now();
    for step in 0..count {
        match what {
            "step" => {
                let timestep = (900 - 10 * step.min(80)) as f32;
                model.denoise(&latents, shape, timestep, &conditioning, 7.5)?;
            }
            "decode" => {
                model.decode(&latents, shape)?;
            }
            _ => return Err(format!("unknown work {what:?}").into()),
        }
    }
    Ok(started.elapsed().as_secs_f64())
}

/// The largest resident memory of this process so far, in bytes.
fn peak_memory() -> Result<u64, Failed> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next());
    Ok(1024
        * kilobytes
            .ok_or("no VmHWM in /proc/self/status")?
            .parse::<u64>()?)
}
