//! Measures the speed of this machine with layers of a real model.
//!
//! A stage of some layers from the model's middle is loaded as a ring would load it, and its steps are timed;
//! then the last layers with the output matrix. The number of layers is such that together they exceed the
//! processor's caches twice, up to [`MOST_WEIGHTS`]: two layers of a small model would stay in the cache, and
//! decode faster there than the same layers do in a stage of thirty. Of the times of equal steps the lower
//! quartile counts: placement stretches it by the machine's load, so it must be the time on an idle machine,
//! without being the luckiest one.
//!
//! A token reads only some experts of a mixture: those bytes count for the caches and for the time, all bytes for
//! memory. Weights that are not there yet (holes) choose the same experts for every row. A row decodes as fast
//! with them as with others, while the time of a prefill chunk is then lower than with the real weights.

use std::ops::Range;
use std::time::{Duration, Instant};

use arcanum_profiler::profile::LayerSpeed;
use mesh_engine::{LogitRows, Segment, Stage, StageError, StageInput};
use mesh_engine_ort::{LoadError, OrtOptions, OrtStage, WeightFormat, matrix_bytes};
use mesh_model::gguf::is_of_experts;
use mesh_model::{Model, ModelError};

use super::options::ProfileOptions;
use crate::memory::Memory;
use crate::processor::last_level_cache;

/// Errors of measuring layers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MeasureError {
    /// The layers could not be loaded.
    #[error("loading layers to measure them: {0}")]
    Load(#[from] LoadError),
    /// A step of the measurement failed.
    #[error("running layers to measure them: {0}")]
    Run(#[from] StageError),
    /// The model file cannot be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Not even one layer fits.
    #[error(
        "one layer of the model takes {needs} bytes as {format}, and {available} bytes of memory are available: stop something else, \
         or take a smaller model"
    )]
    Memory {
        /// Bytes of a layer with its embedding or output matrix.
        needs: u64,
        /// Bytes of memory available.
        available: u64,
        /// Name of the weight format.
        format: &'static str,
    },
}

/// Loads some layers of `model` as `format` and measures them. Takes about a second for a small model; for a
/// large one, loading the layers takes most of the time.
///
/// # Errors
/// If memory is short, or the layers cannot be loaded or run.
pub fn measure_layers(
    model: &Model,
    format: WeightFormat,
    options: &ProfileOptions,
) -> Result<LayerSpeed, MeasureError> {
    let config = model.config();
    let layers = config.layers;
    let sizes = Sizes::new(model, format);
    let available = Memory::read(&options.root).available.unwrap_or(0);
    let largest = sizes.layer + sizes.first.max(sizes.last);
    // Loading holds one matrix of the file and its new form besides the packed weights.
    if available > 0 && largest.saturating_mul(3) / 2 > available {
        return Err(MeasureError::Memory {
            needs: largest,
            available,
            format: format.name(),
        });
    }
    let cache = last_level_cache(&options.root, options.threads());
    let weights = (2 * cache).min(MOST_WEIGHTS).min(available / 4);
    let count = |bytes: u64, layer: u64| u32::try_from(bytes / layer.max(1)).unwrap_or(u32::MAX);
    // Of a mixture more is loaded than is read.
    let most = count(available.max(MOST_WEIGHTS) / 4, sizes.layer)
        .saturating_add(1)
        .max(2);
    let filling = |bytes: u64| count(bytes, sizes.active).saturating_add(1).min(most);
    let middle = match layers {
        // The first and last layers are slower by their additional work; a model without a middle has to be
        // measured with one.
        1 => 0..1,
        2 => 0..1,
        _ => 1..(layers - 1).min(filling(weights).max(2).saturating_add(1)),
    };
    let count = middle.len() as f64;
    let mut exercise = Exercise::new(model, middle.clone(), format, options)?;
    let prefill = exercise.prefill()? / count / f64::from(CHUNK);
    let decode = exercise.decode()? / count;
    let info = exercise.stage.info();
    let kv_bytes = info.kv_bytes_per_token / middle.len() as u64;
    // Packed weights are not exactly as large as the file's.
    let first = if info.is_first() { sizes.first } else { 0 };
    let last = if info.is_last() && !info.is_first() {
        sizes.last
    } else {
        0
    };
    let in_file = sizes.of(&middle) + first + last;
    let packed = info.weight_bytes as f64 / in_file.max(1) as f64;
    drop(exercise);
    let logits = match layers {
        1 => 0.0,
        _ => {
            let count = filling(weights.saturating_sub(sizes.last)).min(layers - 1);
            let mut exercise = Exercise::new(model, layers - count..layers, format, options)?;
            exercise.prefill()?;
            // Without logits the last layer's feed-forward part is left out, too.
            let skipped = decode * sizes.feed_forward_share();
            (exercise.head()? - skipped).max(0.0)
        }
    };
    let scaled = |bytes: u64| (bytes as f64 * packed).ceil() as u64;
    Ok(LayerSpeed {
        fingerprint: model.fingerprint()?.to_owned(),
        format: format.name().into(),
        layers,
        hidden: u32::try_from(config.hidden).unwrap_or(u32::MAX),
        layer_bytes: scaled(sizes.layer),
        first_bytes: scaled(sizes.first),
        last_bytes: scaled(sizes.last),
        kv_bytes,
        decode_us: rounded(decode),
        prefill_us: rounded(prefill),
        logits_us: rounded(logits),
    })
}

/// The chosen format for a model's layers, with the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormatChoice {
    /// The chosen format.
    pub format: WeightFormat,
    /// The reason in words.
    pub reason: String,
}

/// The format in which layers decode fastest, by measurement. One within a tenth of it that keeps the file's weights is
/// preferred, then the one that takes less memory. `None` if nothing was measured.
pub fn choose_format(speeds: &[LayerSpeed]) -> Option<FormatChoice> {
    let named: Vec<(WeightFormat, &LayerSpeed)> = speeds
        .iter()
        .filter(|speed| speed.is_known())
        .filter_map(|speed| Some((WeightFormat::from_name(&speed.format)?, speed)))
        .collect();
    let (_, fastest) = named
        .iter()
        .min_by(|(_, a), (_, b)| a.decode_us.total_cmp(&b.decode_us))?;
    let (format, chosen) = *named
        .iter()
        .filter(|(_, speed)| speed.decode_us <= fastest.decode_us * CLOSE)
        .min_by_key(|(format, speed)| (*format != WeightFormat::File, speed.layer_bytes))?;
    let others: Vec<String> = named
        .iter()
        .filter(|(other, _)| *other != format)
        .map(|(other, speed)| format!("{} takes {:.0} µs", other.name(), speed.decode_us))
        .collect();
    let others = match others.as_slice() {
        [] => "nothing else was measured".into(),
        others => others.join(", "),
    };
    let kept = match format == WeightFormat::File && chosen.decode_us > fastest.decode_us {
        true => "; the difference is not worth changing the weights",
        false => "",
    };
    Some(FormatChoice {
        format,
        reason: format!(
            "a row takes {:.0} µs a layer with {} weights, {others}{kept}",
            chosen.decode_us,
            format.name()
        ),
    })
}

/// Bytes in a format, estimated from the file.
pub(super) struct Sizes<'a> {
    model: &'a Model,
    format: WeightFormat,
    /// The mean over all layers.
    pub(super) layer: u64,
    /// Bytes of a layer that a token reads.
    pub(super) active: u64,
    pub(super) first: u64,
    pub(super) last: u64,
}

impl<'a> Sizes<'a> {
    pub(super) fn new(model: &'a Model, format: WeightFormat) -> Self {
        let mut sizes = Sizes {
            model,
            format,
            layer: 0,
            active: 0,
            first: 0,
            last: 0,
        };
        let layers = model.config().layers;
        sizes.layer = sizes.of(&(0..layers)) / u64::from(layers.max(1));
        let idle = sizes.idle() / u64::from(layers.max(1));
        sizes.active = sizes.layer.saturating_sub(idle);
        sizes.first = sizes.tensors(|name| name == "token_embd.weight");
        sizes.last = match model.config().tied_embeddings {
            true => sizes.first,
            false => sizes.tensors(|name| name == "output.weight"),
        };
        sizes
    }

    /// Bytes of the experts that a token does not use, in all layers.
    fn idle(&self) -> u64 {
        let Some(mixture) = &self.model.config().mixture else {
            return 0;
        };
        let experts = self.tensors(is_of_experts) as f64;
        let idle = mixture.experts.saturating_sub(mixture.used) as f64;
        (experts * idle / mixture.experts as f64) as u64
    }

    /// The part of the bytes of a layer that a token reads which its feed-forward half has.
    fn feed_forward_share(&self) -> f64 {
        let idle = self.idle();
        let half = self.tensors(|name| name.starts_with("blk.") && name.contains(".ffn_"));
        let all = self.of(&(0..self.model.config().layers));
        half.saturating_sub(idle) as f64 / all.saturating_sub(idle).max(1) as f64
    }

    /// The matrices of some layers.
    fn of(&self, layers: &Range<u32>) -> u64 {
        self.tensors(|name| {
            let number = name
                .strip_prefix("blk.")
                .and_then(|rest| rest.split('.').next());
            number
                .and_then(|number| number.parse().ok())
                .is_some_and(|layer| layers.contains(&layer))
        })
    }

    fn tensors(&self, wanted: impl Fn(&str) -> bool) -> u64 {
        let tensors = self.model.tensors().iter();
        tensors
            .filter(|tensor| wanted(tensor.name))
            .map(|tensor| matrix_bytes(&tensor, self.format))
            .fold(0, u64::saturating_add)
    }
}

/// A stage and rows to run through it.
struct Exercise {
    stage: OrtStage,
    hidden: Vec<f32>,
    tokens: Vec<u32>,
}

impl Exercise {
    fn new(
        model: &Model,
        layers: Range<u32>,
        weights: WeightFormat,
        options: &ProfileOptions,
    ) -> Result<Self, LoadError> {
        let context = model.config().context.min(2 * CHUNK);
        let stage = OrtStage::load(
            model,
            layers,
            OrtOptions {
                library: options.library.clone(),
                threads: options.threads(),
                slots: 1,
                context,
                max_rows: CHUNK,
                weights,
                ..OrtOptions::default()
            },
        )?;
        // Any rows of ordinary size will do: no kernel looks at values.
        let mut state = 1u32;
        let hidden = (0..CHUNK as usize * model.config().hidden)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect();
        let vocab = model.config().vocab.max(1) as u32;
        let tokens = (0..CHUNK).map(|i| i * 37 % vocab).collect();
        Ok(Exercise {
            stage,
            hidden,
            tokens,
        })
    }

    /// Microseconds of a chunk of [`CHUNK`] rows; the slot then holds them.
    fn prefill(&mut self) -> Result<f64, StageError> {
        quick(PREFILL_TIME, 1, || {
            self.stage.truncate(0, 0);
            self.step(0, self.chunk(), true)
        })
    }

    /// Microseconds of one row behind a chunk.
    fn decode(&mut self) -> Result<f64, StageError> {
        quick(DECODE_TIME, 3, || self.row(true))
    }

    /// Microseconds that one row takes longer with logits than without, measured in turn: other load slows
    /// both.
    fn head(&mut self) -> Result<f64, StageError> {
        let mut without = Vec::new();
        let mut with = Vec::new();
        let begin = Instant::now();
        self.row(true)?;
        while with.len() < 3 || begin.elapsed() < HEAD_TIME {
            for (logits, times) in [(false, &mut without), (true, &mut with)] {
                let start = Instant::now();
                self.row(logits)?;
                times.push(start.elapsed().as_secs_f64() * 1e6);
            }
        }
        let differences = with
            .iter()
            .zip(&without)
            .map(|(with, without)| with - without);
        // Half of them are below: a burst falls on either side.
        Ok(sorted_at(differences.collect(), 2))
    }

    /// Computes one row behind the slot's rows.
    fn row(&mut self, logits: bool) -> Result<(), StageError> {
        if self.stage.kv_len(0) >= self.stage.info().context {
            self.stage.truncate(0, self.chunk());
        }
        self.step(self.stage.kv_len(0), 1, logits)
    }

    /// Rows of a chunk, where a model with a tiny context leaves room for one more.
    fn chunk(&self) -> u32 {
        CHUNK
            .min(self.stage.info().context.saturating_sub(1))
            .max(1)
    }

    fn step(&mut self, position: u32, rows: u32, logits: bool) -> Result<(), StageError> {
        let (first, last) = (self.stage.info().is_first(), self.stage.info().is_last());
        let segment = Segment {
            slot: 0,
            position,
            rows,
            logits: if last && logits {
                LogitRows::Last
            } else {
                LogitRows::None
            },
        };
        let width = self.stage.info().shape.hidden;
        let input = match first {
            true => StageInput::Tokens(&self.tokens[..rows as usize]),
            false => StageInput::Hidden(&self.hidden[..rows as usize * width]),
        };
        self.stage.forward(&[segment], input).map(drop)
    }
}

/// Microseconds that a quarter of the runs of `once` stay below, repeated for `time` and at least `least` times, after one that does
/// not count (unless it alone takes longer than `time`).
fn quick(
    time: Duration,
    least: usize,
    mut once: impl FnMut() -> Result<(), StageError>,
) -> Result<f64, StageError> {
    let begin = Instant::now();
    let mut times: Vec<f64> = Vec::new();
    let mut first = true;
    while times.len() < least || begin.elapsed() < time {
        let start = Instant::now();
        once()?;
        let took = start.elapsed();
        if !first || took > time {
            times.push(took.as_secs_f64() * 1e6);
        }
        first = false;
    }
    Ok(sorted_at(times, 4))
}

/// Of `values` in order, the one with a `part`-th below it.
fn sorted_at(mut values: Vec<f64>, part: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / part).copied().unwrap_or(0.0)
}

/// In hundredths: a number that JSON gives back as it was.
fn rounded(us: f64) -> f64 {
    (us * 100.0).round() / 100.0
}

/// Formats whose speeds differ by less are equally fast: less is not worth another rounding of the weights.
const CLOSE: f64 = 1.1;
/// Rows of the prefill chunk that is timed.
const CHUNK: u32 = 64;
const PREFILL_TIME: Duration = Duration::from_millis(120);
const DECODE_TIME: Duration = Duration::from_millis(120);
const HEAD_TIME: Duration = Duration::from_millis(150);
/// Bytes of weights that are loaded to be timed, unless one layer is larger.
const MOST_WEIGHTS: u64 = 256 << 20;

#[cfg(test)]
mod tests {
    use mesh_model::synth::{Shape, Tokens, random_model};
    use mesh_model::{Architecture, GgmlType};

    use super::*;

    fn speed(format: WeightFormat, decode_us: f64, layer_bytes: u64) -> LayerSpeed {
        LayerSpeed {
            fingerprint: String::new(),
            format: format.name().into(),
            layers: 1,
            hidden: 1,
            layer_bytes,
            first_bytes: 0,
            last_bytes: 0,
            kv_bytes: 1,
            decode_us,
            prefill_us: 1.0,
            logits_us: 1.0,
        }
    }

    #[test]
    fn the_faster_format_is_chosen_and_the_files_own_among_equals() {
        use WeightFormat::{File, Int4, Int8};
        let choose = |speeds: &[LayerSpeed]| choose_format(speeds).expect("a choice");
        // A processor without instructions for nibbles.
        let choice = choose(&[speed(File, 400.0, 20), speed(Int8, 150.0, 34)]);
        assert_eq!(choice.format, Int8);
        assert_eq!(
            choice.reason,
            "a row takes 150 µs a layer with int8 weights, file takes 400 µs"
        );
        // One that is bound by memory.
        let choice = choose(&[speed(Int8, 150.0, 34), speed(File, 90.0, 20)]);
        assert_eq!(choice.format, File);
        let choice = choose(&[speed(File, 100.0, 34), speed(Int4, 97.0, 20)]);
        assert_eq!(choice.format, File);
        assert!(choice.reason.ends_with("not worth changing the weights"));
        let choice = choose(&[speed(Int8, 97.0, 34), speed(Int4, 99.0, 20)]);
        assert_eq!(choice.format, Int4);
        assert_eq!(choose_format(&[speed(File, f64::NAN, 1)]), None);
        assert_eq!(choose_format(&[]), None);
    }

    #[test]
    fn a_token_reads_only_the_experts_that_it_uses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mixture.gguf");
        let shape = Shape::tiny(Architecture::Qwen3Moe);
        random_model(&shape, GgmlType::Q8_0, Tokens::Bytes, &path).unwrap();
        let model = Model::open(&path).unwrap();
        let sizes = Sizes::new(&model, WeightFormat::File);
        // 3 of 8 experts of three matrices of 256 by 256.
        let expert = 3 * 256 * 256 / 32 * 34;
        assert_eq!(sizes.layer - sizes.active, 5 * expert);
        let attention = 2 * (256 * 256 + 256 * 128) / 32 * 34;
        // Packed for 16 outputs, although it has 8.
        let router = 16 * 256 * 4;
        assert_eq!(sizes.layer, attention + router + 8 * expert);
        let half = (3 * expert + router) as f64;
        assert!((sizes.feed_forward_share() - half / sizes.active as f64).abs() < 1e-6);
    }

    #[test]
    fn a_first_run_and_bursts_do_not_count() {
        let mut runs = 0;
        let us = quick(Duration::from_millis(100), 3, || {
            runs += 1;
            let time = if runs == 1 || runs % 4 == 0 { 40 } else { 1 };
            std::thread::sleep(Duration::from_millis(time));
            Ok(())
        });
        assert!((900.0..40_000.0).contains(&us.expect("a time")));
        assert!(runs >= 4, "{runs}");
    }
}
