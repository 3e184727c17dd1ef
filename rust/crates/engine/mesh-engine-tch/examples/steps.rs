//! Times a model's steps for `scripts/bench_diffusers.py`: `steps FOLDER THREADS [WEIGHTS] [OFFLOAD]`, then for each line
//! `step SIDE COUNT` or `decode SIDE COUNT` on standard input the seconds that it took, and for `memory` the
//! largest resident memory so far in bytes. `image SIDE STEPS FILE` writes a picture in the format PPM.

use std::io::{self, BufRead, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use mesh_diffusion::checkpoint::Checkpoint;
use mesh_diffusion::noise::Noise;
use mesh_diffusion::sampler::{Plan, PlanOptions, Sampler};
use mesh_diffusion::{Conditioning, Diffuser, Image, SamplerKind, TextEmbedding, synth};
use mesh_engine_tch::{Device, Offload, Options, TchDiffuser, WeightForm};

type Failed = Box<dyn std::error::Error>;

fn main() -> Result<(), Failed> {
    mesh_engine_tch::share_memory();
    // Models compute in a thread of their own, as in a worker.
    let work = std::thread::spawn(|| work().map_err(|error| error.to_string()));
    Ok(work.join().map_err(|_| "the thread of the model ended")??)
}

fn work() -> Result<(), Failed> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, threads, more @ ..] = arguments.as_slice() else {
        return Err(
            "usage: steps FOLDER THREADS [auto|full|file|int8] [none|modules|sequential]".into(),
        );
    };
    let word = |at: usize, default| more.get(at).map_or(default, String::as_str);
    let options = Options {
        device: std::env::var("TORCH_DEVICE").map_or(Ok(Device::Cpu), |name| name.parse())?,
        threads: threads.parse()?,
        weights: match word(0, "auto") {
            "auto" => WeightForm::Auto,
            "full" => WeightForm::Full,
            "file" => WeightForm::File,
            "int8" => WeightForm::Int8,
            other => return Err(format!("unknown form of weights {other:?}").into()),
        },
        offload: match word(1, "none") {
            "none" => Offload::None,
            "modules" => Offload::Modules,
            "sequential" => Offload::Sequential,
            other => return Err(format!("unknown offload {other:?}").into()),
        },
        ..Options::default()
    };
    let started = Instant::now();
    let mut model = TchDiffuser::load(&Arc::new(Checkpoint::open(Path::new(folder))?), &options)?;
    println!("ready {}", started.elapsed().as_secs_f64());
    for line in io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        match *words.as_slice() {
            ["image", side, steps, file] => {
                let image = paint(&mut model, side.parse()?, steps.parse()?)?;
                let head = format!("P6 {} {} 255\n", image.width, image.height);
                std::fs::write(file, [head.as_bytes(), &image.rgb].concat())?;
                println!("0");
            }
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

/// Conditioning of random numbers.
fn conditioning(model: &TchDiffuser, width: usize) -> Conditioning {
    let pooled = match model.info().family.contains("XL") {
        true => 1280,
        false => 0,
    };
    let text = |name: &str| TextEmbedding {
        hidden: synth::randoms(name, 77 * width),
        tokens: 77,
        width,
        pooled: synth::randoms(name, pooled),
    };
    Conditioning {
        prompt: text("prompt"),
        negative: Some(text("negative")),
        beside: Vec::new(),
    }
}

/// A square picture.
fn paint(model: &mut TchDiffuser, side: u32, steps: u32) -> Result<Image, Failed> {
    let shape = model.info().latent_shape(side, side);
    let width = if model.info().family.contains("XL") {
        2048
    } else {
        768
    };
    let conditioning = conditioning(model, width);
    let options = PlanOptions {
        kind: SamplerKind::DpmPlusPlus2M,
        karras: false,
        steps,
        strength: None,
    };
    let plan = Plan::new(&model.info().sampler, options)?;
    let mut sampler = Sampler::from_noise(plan, Noise::new(7).normal(shape.len()));
    while let Some(timestep) = sampler.timestep() {
        let predicted = model.denoise(&sampler.scaled(), shape, timestep, &conditioning, 7.5)?;
        sampler.advance(&predicted, None)?;
    }
    Ok(model.decode(sampler.latents(), shape)?)
}

/// Seconds of `count` guided predictions or decodings of square pictures.
fn time(model: &mut TchDiffuser, what: &str, side: u32, count: u32) -> Result<f64, Failed> {
    let shape = model.info().latent_shape(side, side);
    let latents = synth::randoms("latents", shape.len());
    let width = if model.info().family.contains("XL") {
        2048
    } else {
        768
    };
    let conditioning = conditioning(model, width);
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
