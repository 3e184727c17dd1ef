//! Chooses the engine for a stage: a GPU where one can be used, else the CPU.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::time::Instant;

use mesh_engine::{LogitRows, Segment, Stage, StageInput, StageOutput};
use mesh_model::Model;

use crate::device::memory::says_exhausted;
use crate::device::{Device, DeviceStage};
use crate::options::{LoadError, OrtOptions};
use crate::overflow::plan::StepTimes;
use crate::overflow::{self, Split};
use crate::provider::Provider;
use crate::stage::OrtStage;

/// The requested backend of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// A GPU, if this program has a provider for it and the provider works; else the CPU.
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
}

impl Backend {
    /// Every backend with its name in configuration files.
    const NAMES: [(Backend, &'static str); 5] = [
        (Backend::Auto, "auto"),
        (Backend::Cpu, "cpu"),
        (Backend::Cuda, "cuda"),
        (Backend::MiGraphX, "migraphx"),
        (Backend::OrtCpu, "ort-cpu"),
    ];

    /// The providers to try, best first.
    fn providers(self) -> Vec<Provider> {
        match self {
            Backend::Cpu => Vec::new(),
            Backend::Cuda => vec![Provider::Cuda],
            Backend::MiGraphX => vec![Provider::MiGraphX],
            Backend::OrtCpu => vec![Provider::Cpu],
            Backend::Auto => [Provider::Cuda, Provider::MiGraphX]
                .into_iter()
                .filter(|provider| provider.is_compiled_in())
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
#[error("{0:?} is no backend: it is auto, cpu, cuda, migraphx or ort-cpu")]
pub struct NoSuchBackend(String);

impl FromStr for Backend {
    type Err = NoSuchBackend;

    /// Also reads `TORCH_DEVICE`'s names of devices, such as `cuda:0`: stages use the first one.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let name = text.trim().to_ascii_lowercase();
        let name = name.strip_suffix(":0").unwrap_or(&name);
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
    /// The providers that were tried and refused, each with the reason.
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
/// ([`OrtOptions::device`]); if none fits, all do, which is logged as a warning.
///
/// # Errors
/// Those of [`OrtStage::load`]; for a backend requested by name also the reason why it cannot be used.
/// [`Backend::Auto`] logs that reason as a warning and uses the CPU.
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
    let mut refused = Vec::new();
    for provider in backend.providers() {
        match on_device(model, layers.clone(), &options, provider, backend) {
            Ok((stage, split)) => {
                return Ok(Opened {
                    stage,
                    provider,
                    split: Some(split),
                    refused,
                });
            }
            Err(error @ LoadError::DeviceMemory { .. }) => {
                tracing::warn!(%provider, reason = %error, "no layer fits the device: the CPU computes all of them");
                refused.push((provider, error.to_string()));
            }
            Err(error) if backend == Backend::Auto => {
                tracing::warn!(%provider, reason = %error, "no GPU computes: the CPU does");
                refused.push((provider, error.to_string()));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Opened {
        stage: Box::new(OrtStage::load(model, layers, options)?),
        provider: Provider::Cpu,
        split: None,
        refused,
    })
}

fn on_device(
    model: &Model,
    layers: Range<u32>,
    options: &OrtOptions,
    provider: Provider,
    backend: Backend,
) -> Result<(Box<dyn Stage>, Split), LoadError> {
    let device = Device::new(provider);
    let times = compare_layer(model, &layers, options, device)?;
    // A backend that is asked for by name is used even if it is slow.
    let times = (backend == Backend::Auto).then_some(times);
    let check = |stage: &mut DeviceStage| {
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
    // Not the last one of the model, whose output matrix is large, if there is another.
    let last = model.config().layers - 1;
    let layer = match layers.start {
        0 if layers.contains(&1) && last > 1 => 1,
        start => start,
    };
    let options = OrtOptions {
        slots: 1,
        context: CHECK_ROWS.min(model.config().context),
        max_rows: CHECK_ROWS,
        profile: false,
        ..options.clone()
    };
    let refused = |reason: String| refused(device.provider, reason);
    let mut ours = DeviceStage::load(model, layer..layer + 1, options.clone(), device)?;
    let mut cpu = OrtStage::load(model, layer..layer + 1, options)?;
    let rows = ours.info().context;
    let mut found = run(&mut ours, 0, rows, rows).map_err(&refused)?;
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
        device_step: step_time(&mut ours, rows).map_err(refused)?,
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
fn check_whole(stage: &mut DeviceStage) -> Result<(), String> {
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
        let mut stage = DeviceStage::load(model, layers, options(), half()).unwrap();
        check_whole(&mut stage).unwrap();
        assert_eq!(stage.kv_len(0), 0);
    }

    #[test]
    fn a_provider_that_computes_what_it_should_passes_the_checks() {
        for (architecture, ty) in [
            (Architecture::Llama, GgmlType::Q4_0),
            (Architecture::Qwen2, GgmlType::Q4_K),
            (Architecture::Qwen3, GgmlType::Q6_K),
            (Architecture::Gemma3, GgmlType::Q5_K),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("tiny.gguf");
            let shape = Shape {
                layers: 4,
                ..Shape::tiny(architecture)
            };
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
