//! Chooses the engine for a stage: a GPU where one can be used and is faster, else the CPU.

mod speed;

use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::time::{Duration, Instant};

use mesh_engine::{LogitRows, Segment, Stage, StageInput, StageOutput};
use mesh_model::Model;

use crate::device::Device;
use crate::device::memory::says_exhausted;
use crate::options::{LoadError, OrtOptions};
use crate::overflow::plan::StepTimes;
use crate::overflow::{self, DevicePart, Split};
use crate::provider::Provider;
use crate::stage::OrtStage;
use crate::webgpu;

/// The requested backend of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// Whatever is fastest here: the CPU, or a GPU for which this program has a provider that works.
    #[default]
    Auto,
    /// The CPU, with our own kernels.
    Cpu,
    /// An NVIDIA GPU or nothing.
    Cuda,
    /// An AMD GPU or nothing.
    MiGraphX,
    /// The graph for GPUs on ONNX Runtime's own CPU kernels: slow, and a way to try the settings for GPUs
    /// without one.
    OrtCpu,
    /// A GPU with a Vulkan driver or nothing.
    WebGpu,
}

impl Backend {
    /// Every backend with its name in configuration files.
    const NAMES: [(Backend, &'static str); 6] = [
        (Backend::Auto, "auto"),
        (Backend::Cpu, "cpu"),
        (Backend::Cuda, "cuda"),
        (Backend::MiGraphX, "migraphx"),
        (Backend::OrtCpu, "ort-cpu"),
        (Backend::WebGpu, "webgpu"),
    ];

    /// The providers to try. The ones that are most likely the fastest come last: only one is loaded at a time.
    fn providers(self, options: &OrtOptions) -> Vec<Provider> {
        match self {
            Backend::Cpu => Vec::new(),
            Backend::Cuda => vec![Provider::Cuda],
            Backend::MiGraphX => vec![Provider::MiGraphX],
            Backend::WebGpu => vec![Provider::WebGpu],
            Backend::OrtCpu => vec![Provider::Cpu],
            Backend::Auto => [Provider::WebGpu, Provider::MiGraphX, Provider::Cuda]
                .into_iter()
                .filter(|provider| match provider {
                    // A plugin that nobody installed is not worth a word.
                    Provider::WebGpu => {
                        webgpu::library(options.webgpu_library.as_deref()).is_some()
                    }
                    _ => provider.is_compiled_in(),
                })
                .collect(),
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Backend::NAMES.iter().find(|(backend, _)| backend == self);
        f.write_str(name.map_or("", |(_, name)| name))
    }
}

/// A string that names no backend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no backend: it is auto, cpu, cuda, migraphx, webgpu or ort-cpu")]
pub struct NoSuchBackend(String);

impl FromStr for Backend {
    type Err = NoSuchBackend;

    /// Also reads `TORCH_DEVICE`'s names of devices, such as `cuda:0`: stages use the first one. Torch's `vulkan` is
    /// WebGPU's way to the same driver.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let name = text.trim().to_ascii_lowercase();
        let name = match name.strip_suffix(":0").unwrap_or(&name) {
            "vulkan" => "webgpu",
            name => name,
        };
        Backend::NAMES
            .iter()
            .find(|(_, known)| *known == name)
            .map(|(backend, _)| *backend)
            .ok_or_else(|| NoSuchBackend(text.to_owned()))
    }
}

/// A loaded stage with its provider.
pub struct Opened {
    /// The loaded stage.
    pub stage: Box<dyn Stage>,
    /// The provider that runs the stage or its first layers; [`Provider::Cpu`] stands for our own kernels.
    pub provider: Provider,
    /// The parts of the stage, if any of it runs on a provider.
    pub split: Option<Split>,
    /// The providers that were tried and are not used, each with the reason.
    pub refused: Vec<(Provider, String)>,
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opened")
            .field("provider", &self.provider)
            .field("split", &self.split)
            .field("refused", &self.refused)
            .finish_non_exhaustive()
    }
}

/// Loads `layers` of `model` on `backend`.
///
/// A GPU is used only if one layer gives the same result there as on the CPU, and if all layers there give
/// finite numbers that do not depend on how a prompt is cut. Layers that do not fit its memory run on the CPU
/// ([`OrtOptions::device`]); if none fits, all do, which is logged as a warning. [`Backend::Auto`] measures a few
/// decode steps and takes the fastest of the GPU's providers and the CPU.
///
/// # Errors
/// Those of [`OrtStage::load`]; for a backend requested by name also the reason why it cannot be used.
/// [`Backend::Auto`] logs that reason and uses another.
pub fn open(
    model: &Model,
    layers: Range<u32>,
    options: OrtOptions,
    backend: Backend,
) -> Result<Opened, LoadError> {
    // Without the library or the layers no provider can run, so their errors are not a provider's.
    crate::runtime::environment(options.library.as_deref())?;
    crate::check::layers(&layers, model.config().layers)?;
    crate::check::options(&options, model.config().context)?;
    let providers = backend.providers(&options);
    let (chosen, refused) = match (backend, providers.first()) {
        (Backend::Auto, _) | (_, None) => fastest(model, layers.clone(), &options, providers)?,
        (_, Some(&provider)) => named(model, layers.clone(), &options, provider)?,
    };
    let Some((provider, (stage, split))) = chosen else {
        // What was promised to a provider that is not used is free for other models.
        options.device.memory.promise(0);
        return Ok(Opened {
            stage: Box::new(OrtStage::load(model, layers, options)?),
            provider: Provider::Cpu,
            split: None,
            refused,
        });
    };
    Ok(Opened {
        stage,
        provider,
        split: Some(split),
        refused,
    })
}

/// A stage of which at least some layers are on a device.
type OnDevice = (Box<dyn Stage>, Split);

/// The provider that computes, with its stage; `None` is the CPU.
type Chosen = Option<(Provider, OnDevice)>;

/// The providers that are not used, each with the reason.
type Refused = Vec<(Provider, String)>;

/// The provider that was asked for by name, however slow it is; the CPU if no layer fits its device.
fn named(
    model: &Model,
    layers: Range<u32>,
    options: &OrtOptions,
    provider: Provider,
) -> Result<(Chosen, Refused), LoadError> {
    match on_device(model, layers, options, provider, false) {
        Ok(loaded) => Ok((Some((provider, loaded)), Vec::new())),
        Err(error @ LoadError::DeviceMemory { .. }) => {
            tracing::warn!(%provider, reason = %error, "no layer fits the device: the CPU computes all of them");
            Ok((None, vec![(provider, error.to_string())]))
        }
        Err(error) => Err(error),
    }
}

/// The provider that works and is faster than all others and the CPU.
fn fastest(
    model: &Model,
    layers: Range<u32>,
    options: &OrtOptions,
    providers: Vec<Provider>,
) -> Result<(Chosen, Refused), LoadError> {
    let mut refused = Vec::new();
    let mut best: Option<(Provider, Duration)> = None;
    let mut loaded = None;
    for provider in providers {
        // The device may not have room for two.
        loaded = None;
        let measured = on_device(model, layers.clone(), options, provider, true).and_then(
            |(mut stage, split)| {
                let step = speed::decode_step(&mut *stage);
                step.map(|step| ((stage, split), step))
                    .map_err(|reason| LoadError::Provider { provider, reason })
            },
        );
        let (on_device, step) = match measured {
            Ok(measured) => measured,
            Err(error) => {
                match provider {
                    // Packages bring its plugin to machines without a GPU, too.
                    Provider::WebGpu => {
                        tracing::info!(%provider, reason = %error, "no GPU computes through it");
                    }
                    _ => tracing::warn!(%provider, reason = %error, "no GPU computes through it"),
                }
                refused.push((provider, error.to_string()));
                continue;
            }
        };
        let (other, least) = match best {
            Some(best) => best,
            None => (
                Provider::Cpu,
                speed::cpu_step(model, layers.clone(), options)?,
            ),
        };
        let faster = step < least;
        tracing::info!(
            "{provider} computes a decode step in {step:.1?}, {other} in {least:.1?}: {} computes",
            if faster { provider } else { other }
        );
        if faster {
            if other != Provider::Cpu {
                refused.push((other, slower(other, least, provider, step)));
            }
            best = Some((provider, step));
            loaded = Some(on_device);
        } else {
            refused.push((provider, slower(provider, step, other, least)));
            best = Some((other, least));
        }
    }
    let Some((provider, _)) = best.filter(|(provider, _)| *provider != Provider::Cpu) else {
        return Ok((None, refused));
    };
    let stage = match loaded {
        Some(stage) => stage,
        // It made room for one that turned out slower.
        None => on_device(model, layers, options, provider, true)?,
    };
    Ok((Some((provider, stage)), refused))
}

fn slower(provider: Provider, step: Duration, other: Provider, least: Duration) -> String {
    format!("{provider} takes {step:.1?} for a decode step, {other} {least:.1?}")
}

/// Loads on the device what fits it, after a comparison of one layer. With `by_speed` a device on which a layer
/// takes longer than all of them on the CPU is refused before the rest is loaded.
fn on_device(
    model: &Model,
    layers: Range<u32>,
    options: &OrtOptions,
    provider: Provider,
    by_speed: bool,
) -> Result<OnDevice, LoadError> {
    let environment = crate::runtime::environment(options.library.as_deref())?;
    let device = Device::new(provider).supported(&environment, options)?;
    let times = compare_layer(model, &layers, options, device)?;
    let times = by_speed.then_some(times);
    let check = |stage: &mut dyn Stage| {
        check_whole(stage).map_err(|reason| refused(device.provider, reason))
    };
    overflow::load(model, layers, options, device, times, check)
}

fn refused(provider: Provider, reason: String) -> LoadError {
    match says_exhausted(&reason) {
        true => LoadError::DeviceMemory { provider, reason },
        false => LoadError::Provider { provider, reason },
    }
}

/// Compares one layer on the device with the same layer on the CPU, and returns the times of both. This takes a
/// small part of the loading time and detects a missing provider early.
fn compare_layer(
    model: &Model,
    layers: &Range<u32>,
    options: &OrtOptions,
    device: Device,
) -> Result<StepTimes, LoadError> {
    let config = model.config();
    let last = config.layers - 1;
    // Not the last one of the model, whose output matrix is large, if there is another. A dense layer at the
    // beginning says nothing of those with experts.
    let first = match layers.start {
        0 if layers.contains(&1) && last > 1 => 1,
        start => start,
    };
    let mut mixtures = (first..layers.end).filter(|&layer| config.mixture_of(layer).is_some());
    let layer = mixtures.next().unwrap_or(first);
    let options = OrtOptions {
        slots: 1,
        context: CHECK_ROWS.min(config.context),
        max_rows: CHECK_ROWS,
        profile: false,
        ..options.clone()
    };
    let refused = |reason: String| refused(device.provider, reason);
    let mut ours = DevicePart::load(model, layer..layer + 1, &options, device)?.stage;
    let mut cpu = OrtStage::load(model, layer..layer + 1, options)?;
    let rows = ours.info().context;
    let mut found = run(&mut *ours, 0, rows, rows).map_err(&refused)?;
    let mut expected = run(&mut cpu, 0, rows, rows).map_err(&refused)?;
    if layer > 0 && layer < last {
        // Compare the layers' contribution: the input rows alone would agree even if the layers were wrong.
        let input = hidden(0..rows, ours.info().shape.hidden);
        for out in [&mut found, &mut expected] {
            out.iter_mut().zip(&input).for_each(|(out, x)| *out -= x);
        }
    }
    agree(&found, &expected).map_err(|cosine| {
        refused(format!(
            "layer {layer} gives other numbers there than on the CPU (cosine {cosine:.4})"
        ))
    })?;
    Ok(StepTimes {
        device_step: step_time(&mut *ours, rows).map_err(refused)?,
        cpu_layer: step_time(&mut cpu, rows).map_err(refused)?,
    })
}

/// Shortest time of a step of one row, in seconds.
fn step_time(stage: &mut dyn Stage, rows: u32) -> Result<f64, String> {
    let mut least = f64::INFINITY;
    for _ in 0..TIMED_STEPS {
        let start = Instant::now();
        run(stage, rows - 1, rows, 1)?;
        least = least.min(start.elapsed().as_secs_f64());
    }
    Ok(least)
}

/// The same rows in one step and in several.
fn check_whole(stage: &mut dyn Stage) -> Result<(), String> {
    let rows = CHECK_ROWS
        .min(stage.info().context)
        .min(stage.info().max_rows);
    let at_once = run(stage, 0, rows, rows)?;
    stage.truncate(0, 0);
    let first = rows.div_ceil(2);
    let mut in_pieces = run(stage, 0, rows, first)?;
    for position in first..rows {
        in_pieces = run(stage, position, rows, 1)?;
    }
    stage.truncate(0, 0);
    let width = at_once.len().min(in_pieces.len());
    let (at_once, in_pieces) = (
        &at_once[at_once.len() - width..],
        &in_pieces[in_pieces.len() - width..],
    );
    agree(at_once, in_pieces).map_err(|cosine| {
        format!(
            "a prompt in pieces gives other numbers than the same prompt at once (cosine {cosine:.4}): its KV cache does not \
             hold"
        )
    })
}

/// Runs `count` of the check's rows from `position` on in slot 0 and returns the output: the last row's
/// logits, or hidden rows.
fn run(stage: &mut dyn Stage, position: u32, rows: u32, count: u32) -> Result<Vec<f32>, String> {
    let info = stage.info();
    let segment = Segment {
        slot: 0,
        position,
        rows: count.min(rows - position),
        logits: match info.is_last() {
            true => LogitRows::Last,
            false => LogitRows::None,
        },
    };
    let range = position..position + segment.rows;
    let vocab = info.shape.vocab as u32;
    let tokens: Vec<u32> = range.clone().map(|i| (i * 7919 + 5) % vocab).collect();
    let hidden = hidden(range, info.shape.hidden);
    let input = match info.is_first() {
        true => StageInput::Tokens(&tokens),
        false => StageInput::Hidden(&hidden),
    };
    let out = match stage.forward(&[segment], input) {
        Ok(StageOutput::Hidden(out) | StageOutput::Logits(out)) => out.to_vec(),
        Err(error) => return Err(error.to_string()),
    };
    match out.iter().position(|number| !number.is_finite()) {
        Some(at) => Err(format!(
            "it computes {} (number {at} of the check)",
            out[at]
        )),
        None => Ok(out),
    }
}

/// Hidden rows like those between layers in size, and different from each other.
fn hidden(positions: Range<u32>, width: usize) -> Vec<f32> {
    positions
        .flat_map(|position| {
            (0..width).map(move |i| ((i as f32 + 1.0) * (position as f32 + 1.3)).sin())
        })
        .collect()
}

/// The cosine, if it is too small.
fn agree(found: &[f32], expected: &[f32]) -> Result<(), f64> {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
        products.sum()
    };
    let norms = (dot(found, found) * dot(expected, expected)).sqrt();
    let cosine = match norms > 0.0 {
        true => dot(found, expected) / norms,
        // Nothing agrees with nothing only.
        false if found == expected => 1.0,
        false => 0.0,
    };
    match cosine >= LEAST_COSINE {
        true => Ok(()),
        false => Err(cosine),
    }
}

/// Rows of the checks.
const CHECK_ROWS: u32 = 8;

/// Steps of which the shortest counts: others have waited for something else.
const TIMED_STEPS: u32 = 5;

/// Rounding of 16 bits on the device and of 8-bit activations on the CPU stay far above this; another result
/// does not.
const LEAST_COSINE: f64 = 0.98;

#[cfg(test)]
mod tests {
    use mesh_model::synth::{Shape, Tokens, random_model};
    use mesh_model::{Architecture, GgmlType};
    use mesh_testkit::paths;

    use super::*;
    use crate::Precision;

    fn options() -> OrtOptions {
        OrtOptions {
            library: Some(paths::ort_library().unwrap()),
            threads: 2,
            slots: 1,
            context: 64,
            ..OrtOptions::default()
        }
    }

    fn half() -> Device {
        Device {
            precision: Precision::F16,
            ..Device::new(Provider::Cpu)
        }
    }

    fn check(model: &Model, layers: Range<u32>) {
        compare_layer(model, &layers, &options(), half()).unwrap();
        let part = DevicePart::load(model, layers, &options(), half()).unwrap();
        let mut stage = part.stage;
        check_whole(&mut *stage).unwrap();
        assert_eq!(stage.kv_len(0), 0);
    }

    #[test]
    fn a_provider_that_computes_what_it_should_passes_the_checks() {
        for (shape, ty) in [
            (Shape::tiny(Architecture::Llama), GgmlType::Q4_0),
            (Shape::tiny(Architecture::Qwen2), GgmlType::Q4_K),
            (Shape::tiny(Architecture::Qwen3), GgmlType::Q6_K),
            (Shape::tiny(Architecture::Gemma3), GgmlType::Q5_K),
            (Shape::tiny(Architecture::Qwen3Moe), GgmlType::Q4_K),
            (Shape::tiny(Architecture::Qwen2Moe), GgmlType::Q8_0),
            (Shape::tiny_mixtral(), GgmlType::Q4_0),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("tiny.gguf");
            let shape = Shape { layers: 4, ..shape };
            random_model(&shape, ty, Tokens::Bytes, &path).unwrap();
            let model = Model::open(&path).unwrap();
            for layers in [0..4, 0..1, 1..3, 3..4] {
                check(&model, layers);
            }
        }
        let model = Model::open(paths::smollm2().unwrap()).unwrap();
        check(&model, 0..30);
        check(&model, 12..20);
    }

    #[test]
    fn other_numbers_do_not_pass() {
        let right: Vec<f32> = hidden(0..2, 64);
        let wrong: Vec<f32> = right.iter().rev().copied().collect();
        assert_eq!(agree(&right, &right), Ok(()));
        assert!(agree(&wrong, &right).is_err_and(|cosine| cosine < 0.9));
        assert!(agree(&vec![0.0; 128], &right).is_err());
    }
}
