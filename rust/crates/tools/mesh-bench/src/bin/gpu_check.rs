//! Figures of one execution provider with random weights, for scripts/gpu-check: one line for each, with tabs between
//! its name, its outcome (`ok`, `below`, `failed` or `not run`) and the text.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use mesh_engine::{LogitRows, Segment, Stage, StageInput, StageOutput};
use mesh_engine_ort::{
    Backend, DeviceMemory, DeviceOptions, Opened, OrtOptions, Provider, bandwidth, open,
};
use mesh_model::synth::{Shape, Tokens, random_model};
use mesh_model::{Architecture, GgmlType, Model};

/// Measures a model of random weights on a GPU
#[derive(Parser)]
struct Args {
    /// The provider: cuda, migraphx, webgpu or ort-cpu
    #[arg(long)]
    provider: Backend,
    /// The shape of the model
    #[arg(long, value_enum, default_value_t = Size::Qwen2_7b)]
    shape: Size,
    /// Folder for the model, which is kept there
    #[arg(long)]
    models: PathBuf,
    /// ONNX Runtime's library; default ORT_DYLIB_PATH
    #[arg(long)]
    library: Option<PathBuf>,
    /// Threads of the layers on the CPU; 0 is one per core
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Size {
    /// Qwen2 7B
    #[value(name = "qwen2-7b")]
    Qwen2_7b,
    /// A few layers of small matrices, to try the program itself
    Tiny,
}

impl Size {
    fn shape(self) -> Shape {
        match self {
            Size::Qwen2_7b => Shape::qwen2_7b(),
            Size::Tiny => Shape {
                layers: 6,
                ..Shape::tiny(Architecture::Qwen2)
            },
        }
    }

    /// A mixture of experts of about as many bytes.
    fn mixture(self) -> Shape {
        match self {
            Size::Qwen2_7b => Shape::qwen3_30b_a3b(12),
            Size::Tiny => Shape::tiny(Architecture::Qwen3Moe),
        }
    }

    /// Bytes of the tensor that a device copies.
    fn copied(self) -> usize {
        match self {
            Size::Qwen2_7b => 512 << 20,
            Size::Tiny => 8 << 20,
        }
    }

    /// Rows of a prompt, steps of an answer, and tokens of a slot.
    fn rows(self) -> (u32, u32, u32) {
        match self {
            Size::Qwen2_7b => (512, 64, 640),
            Size::Tiny => (64, 8, 96),
        }
    }
}

/// A figure: its outcome and its text.
type Figure = (&'static str, String);

const STREAMS: u32 = 32;
/// Share of the memory bandwidth that decoding should reach.
const LEAST_SHARE: f64 = 0.6;
/// Two logits nearer than this may be chosen in either order.
const TIE: f32 = 0.05;

fn main() -> Result<()> {
    let args = Args::parse();
    let mut failed = false;
    let mut print = |name: &str, figure: Result<Figure>| {
        let (outcome, text) = figure.unwrap_or_else(|error| ("failed", format!("{error:#}")));
        failed |= outcome == "failed";
        println!("{name}\t{outcome}\t{}", text.replace(char::is_control, " "));
    };
    let provider = provider(args.provider);
    let options = OrtOptions {
        library: args.library.clone(),
        threads: args.threads,
        ..OrtOptions::default()
    };
    let copied = provider.and_then(|provider| {
        let measured = bandwidth(&options, provider, args.shape.copied());
        measured.map_err(anyhow::Error::from)
    });
    let bandwidth = copied.as_ref().ok().copied();
    let text = |bytes| ("ok", format!("{:.0} GB/s by a copy", bytes / 1e9));
    print("bandwidth", copied.map(text));
    match language_model(&args, &options, bandwidth) {
        Ok(figures) => figures
            .into_iter()
            .for_each(|(name, figure)| print(name, figure)),
        Err(error) => {
            let text = format!("{error:#}");
            ["decode", "prefill", "batch", "overflow"]
                .into_iter()
                .for_each(|name| print(name, Err(anyhow::anyhow!("{text}"))));
        }
    }
    print("experts", experts(&args, &options));
    std::process::exit(failed.into());
}

/// The figures of the language model, by name; an error if it cannot be loaded.
fn language_model(
    args: &Args,
    options: &OrtOptions,
    bandwidth: Option<f64>,
) -> Result<[(&'static str, Result<Figure>); 4]> {
    let model = model(args, &args.shape.shape())?;
    let (mut opened, used) = whole(&model, args, options)?;
    let bytes = read_by_a_step(&model, &*opened.stage);
    let one = decode(&mut opened, args, bytes, bandwidth);
    let prompt = prefill(&mut opened, args);
    let many = batch(&mut opened, args);
    let answer = greedy(&mut *opened.stage, args);
    drop(opened);
    let half = answer.and_then(|answer| overflow(&model, args, options, used, &answer));
    Ok([
        ("decode", one),
        ("prefill", prompt),
        ("batch", many),
        ("overflow", half),
    ])
}

fn provider(backend: Backend) -> Result<Provider> {
    Ok(match backend {
        Backend::Cuda => Provider::Cuda,
        Backend::MiGraphX => Provider::MiGraphX,
        Backend::WebGpu => Provider::WebGpu,
        Backend::OrtCpu => Provider::Cpu,
        Backend::Auto | Backend::Cpu => bail!("name a provider: cuda, migraphx, webgpu or ort-cpu"),
    })
}

/// A model of this shape, which is made unless it is there.
fn model(args: &Args, shape: &Shape) -> Result<Model> {
    let name = format!("{:?}-{}x{}", shape.architecture, shape.layers, shape.hidden);
    let path = args.models.join(format!("{name}.gguf"));
    if !path.exists() {
        std::fs::create_dir_all(&args.models)?;
        let part = args.models.join(format!("{name}.part"));
        make(shape, &part).with_context(|| part.display().to_string())?;
        std::fs::rename(&part, &path)?;
    }
    Model::open(&path).with_context(|| path.display().to_string())
}

fn make(shape: &Shape, path: &Path) -> Result<()> {
    Ok(random_model(shape, GgmlType::Q4_0, Tokens::Bytes, path)?)
}

/// All layers on the device, and the bytes that they take there.
fn whole(model: &Model, args: &Args, options: &OrtOptions) -> Result<(Opened, u64)> {
    let memory = DeviceMemory::default();
    let opened = limited(model, args, options, memory.clone(), STREAMS)?;
    let split = opened.split.as_ref();
    let split = split.with_context(|| format!("no layer is on the device: {opened:?}"))?;
    ensure!(
        split.cpu_layers.is_empty(),
        "only {} layers fit the device",
        split.device_layers.len()
    );
    Ok((opened, memory.used()))
}

fn limited(
    model: &Model,
    args: &Args,
    options: &OrtOptions,
    memory: DeviceMemory,
    slots: u32,
) -> Result<Opened> {
    on(args.provider, model, args, options, memory, slots)
}

fn on(
    backend: Backend,
    model: &Model,
    args: &Args,
    options: &OrtOptions,
    memory: DeviceMemory,
    slots: u32,
) -> Result<Opened> {
    let (_, _, context) = args.shape.rows();
    let options = OrtOptions {
        slots,
        context,
        device: DeviceOptions {
            memory,
            ..DeviceOptions::default()
        },
        ..options.clone()
    };
    let layers = 0..model.config().layers;
    Ok(open(model, layers, options, backend)?)
}

/// Bytes of weights that a step of one row reads: all but the table of embeddings, of which it reads one row.
fn read_by_a_step(model: &Model, stage: &dyn Stage) -> u64 {
    let table = model.tensors().get("token_embd.weight");
    let table = table.map_or(0, |table| table.data.len() as u64);
    stage.info().weight_bytes.saturating_sub(table)
}

fn decode(opened: &mut Opened, args: &Args, bytes: u64, bandwidth: Option<f64>) -> Result<Figure> {
    let (_, steps, _) = args.shape.rows();
    let seconds = steps_of(&mut *opened.stage, 1, steps)?;
    let rate = f64::from(steps) / seconds;
    let text = format!("{rate:.1} tok/s");
    let Some(bandwidth) = bandwidth else {
        return Ok(("ok", text));
    };
    let share = rate * bytes as f64 / bandwidth;
    let text = format!("{text}, {share:.2} of the bandwidth (aim {LEAST_SHARE})");
    Ok((if share < LEAST_SHARE { "below" } else { "ok" }, text))
}

fn prefill(opened: &mut Opened, args: &Args) -> Result<Figure> {
    let (rows, ..) = args.shape.rows();
    let stage = &mut *opened.stage;
    let prompt: Vec<u32> = (0..rows).map(token).collect();
    let mut least = f64::INFINITY;
    // The first one compiles programs.
    for _ in 0..3 {
        stage.truncate(0, 0);
        let start = Instant::now();
        for chunk in prompt.chunks(stage.info().max_rows as usize) {
            let at = stage.kv_len(0);
            step(stage, &[(0, at, chunk)])?;
        }
        least = least.min(start.elapsed().as_secs_f64());
    }
    Ok(("ok", format!("{:.0} tok/s", f64::from(rows) / least)))
}

fn batch(opened: &mut Opened, args: &Args) -> Result<Figure> {
    let (_, steps, _) = args.shape.rows();
    let steps = steps / 4;
    let seconds = steps_of(&mut *opened.stage, STREAMS, steps)?;
    let rate = f64::from(STREAMS * steps) / seconds;
    Ok(("ok", format!("{rate:.1} tok/s")))
}

/// Seconds of so many steps of `streams` sequences, one token of each.
fn steps_of(stage: &mut dyn Stage, streams: u32, steps: u32) -> Result<f64> {
    (0..stage.info().slots).for_each(|slot| stage.truncate(slot, 0));
    let mut start = Instant::now();
    // The first two compile programs and make room for rows.
    for at in 0..steps + 2 {
        if at == 2 {
            start = Instant::now();
        }
        let tokens: Vec<[u32; 1]> = (0..streams).map(|slot| [token(at + 31 * slot)]).collect();
        let parts: Vec<(u32, u32, &[u32])> = (0..streams)
            .zip(&tokens)
            .map(|(slot, token)| (slot, at, &token[..]))
            .collect();
        step(stage, &parts)?;
    }
    let seconds = start.elapsed().as_secs_f64();
    (0..stage.info().slots).for_each(|slot| stage.truncate(slot, 0));
    Ok(seconds)
}

/// The greedy answer to a prompt: tokens, and how far the best logit lay above the second.
fn greedy(stage: &mut dyn Stage, args: &Args) -> Result<Vec<(u32, f32)>> {
    let (_, steps, _) = args.shape.rows();
    stage.truncate(0, 0);
    let prompt: Vec<u32> = (0..16).map(token).collect();
    let mut row = step(stage, &[(0, 0, &prompt)])?;
    let mut answer = Vec::new();
    for _ in 0..steps {
        let best = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
        let token = best(&row).context("no logits")?;
        let top = std::mem::replace(&mut row[token], f32::NEG_INFINITY);
        let second = best(&row).map_or(f32::NEG_INFINITY, |second| row[second]);
        answer.push((token as u32, top - second));
        let at = stage.kv_len(0);
        row = step(stage, &[(0, at, &[token as u32])])?;
    }
    Ok(answer)
}

/// Half of the memory that the whole model takes on the device.
fn overflow(
    model: &Model,
    args: &Args,
    options: &OrtOptions,
    used: u64,
    expected: &[(u32, f32)],
) -> Result<Figure> {
    let memory = DeviceMemory::new(Some(used / 2));
    let mut opened = limited(model, args, options, memory, 1)?;
    let split = opened.split.clone().context("no layer is on the device")?;
    let start = Instant::now();
    let found = greedy(&mut *opened.stage, args)?;
    let rate = found.len() as f64 / start.elapsed().as_secs_f64();
    let differs = found.iter().zip(expected).position(|(a, b)| a.0 != b.0);
    let tokens = match differs {
        None => format!("all {} tokens equal", found.len()),
        Some(at) => {
            let gap = found[at].1.min(expected[at].1);
            let text = format!("token {at} differs, at a distance of {gap:.3} to the next");
            ensure!(gap < TIE, text);
            format!("{at} tokens equal up to a near tie")
        }
    };
    let (device, cpu) = (split.device_layers.len(), split.cpu_layers.len());
    let text = format!("{rate:.1} tok/s with {device} layers there and {cpu} on the CPU; {tokens}");
    Ok(("ok", text))
}

/// Attention on the device and experts on the CPU, beside the CPU alone.
fn experts(args: &Args, options: &OrtOptions) -> Result<Figure> {
    let model = model(args, &args.shape.mixture())?;
    let (_, steps, _) = args.shape.rows();
    let rate = |backend| -> Result<(f64, u32)> {
        let memory = DeviceMemory::default();
        let mut opened = on(backend, &model, args, options, memory, 1)?;
        let layers = opened.split.as_ref().map_or(0, |split| split.expert_layers);
        let seconds = steps_of(&mut *opened.stage, 1, steps)?;
        Ok((f64::from(steps) / seconds, layers))
    };
    let (split, layers) = rate(args.provider)?;
    ensure!(layers > 0, "no layer has its attention on the device");
    let (cpu, _) = rate(Backend::Cpu)?;
    let text = format!(
        "{split:.1} tok/s with the attention of {layers} layers there; the CPU alone {cpu:.1} tok/s"
    );
    Ok(("ok", text))
}

/// Runs a step and returns its logits; each part is a slot, a position and tokens.
fn step(stage: &mut dyn Stage, parts: &[(u32, u32, &[u32])]) -> Result<Vec<f32>> {
    let segment = |&(slot, position, tokens): &(u32, u32, &[u32])| Segment {
        slot,
        position,
        rows: tokens.len() as u32,
        logits: LogitRows::Last,
    };
    let segments: Vec<Segment> = parts.iter().map(segment).collect();
    let tokens: Vec<u32> = parts.iter().flat_map(|part| part.2).copied().collect();
    match stage.forward(&segments, StageInput::Tokens(&tokens))? {
        StageOutput::Logits(logits) => Ok(logits.to_vec()),
        StageOutput::Hidden(_) => bail!("a whole model gave hidden rows"),
    }
}

/// Tokens that are not all the same.
fn token(number: u32) -> u32 {
    (number * 37 + 11) % 256
}
