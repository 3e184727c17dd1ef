//! What the operators of a stage share with it: weights, the thread pool, and the step that is running.

use std::ops::Range;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use mesh_engine::{LogitRows, ModelShape, Segment};
use mesh_kernels::{
    KernelError, KvSegment, Linear, Pool, QMatrix, Residual, RmsNorm, Rope, RopeOptions, RopeStyle,
    linear,
};
use mesh_model::{ModelConfig, RopeScaling};

use crate::kv::Kv;
use crate::operators::kernel;
use crate::weights::Weights;

/// Everything the operators need besides their tensors.
pub(crate) struct Shared {
    pub(crate) shape: ModelShape,
    pub(crate) layers: Range<u32>,
    pub(crate) heads: usize,
    pub(crate) norm_eps: f32,
    pub(crate) rope: Rope,
    /// Factor of the attention scores.
    pub(crate) score_scale: f32,
    pub(crate) weights: Weights,
    pub(crate) pool: Pool,
    pub(crate) step: Mutex<Step>,
}

impl Shared {
    pub(crate) fn new(
        shape: ModelShape,
        layers: Range<u32>,
        config: &ModelConfig,
        weights: Weights,
        pool: Pool,
        step: Step,
        context: u32,
    ) -> Result<Shared, KernelError> {
        // The magnitude belongs to queries and keys alike, so the scores take it squared.
        let magnitude = config.rope.magnitude();
        let score_scale = magnitude * magnitude / (config.head_dim as f32).sqrt();
        Ok(Shared {
            shape,
            layers,
            heads: config.heads,
            norm_eps: config.norm_eps,
            rope: rope(&config.rope, context)?,
            score_scale,
            weights,
            pool,
            step: Mutex::new(step),
        })
    }

    /// Whether the stage ends the model.
    pub(crate) fn is_last(&self) -> bool {
        self.layers.end == self.shape.layers
    }

    pub(crate) fn norm<'a>(&self, weight: &'a [f32]) -> RmsNorm<'a> {
        RmsNorm {
            weight,
            eps: self.norm_eps,
        }
    }

    /// `out += x · matrixᵀ`.
    pub(crate) fn project(
        &self,
        matrix: &QMatrix,
        x: &[f32],
        rows: usize,
        out: &mut [f32],
    ) -> ort::Result<()> {
        let options = Linear {
            residual: Residual::InPlace,
            ..Linear::default()
        };
        if rows == 0 {
            return Ok(());
        }
        linear(&self.pool, matrix, x, rows, out, &options).map_err(kernel)
    }
}

/// The step that is running, the KV cache it extends and the memory it works in. The stage fills it before a run; the
/// operators run one after the other, so each takes the lock uncontended.
pub(crate) struct Step {
    pub(crate) kv: Kv,
    pub(crate) segments: Vec<Segment>,
    /// The same for the attention kernel.
    pub(crate) kv_segments: Vec<KvSegment>,
    /// Rows in the step.
    pub(crate) rows: usize,
    /// Rows that become logits, on a last stage.
    pub(crate) kept: Vec<usize>,
    /// Queries, keys and values of the running layer.
    pub(crate) qkv: Vec<f32>,
    /// What the running layer's heads gathered.
    pub(crate) attended: Vec<f32>,
    /// Residual rows that become logits.
    pub(crate) gathered: Vec<f32>,
    profile: Option<Vec<(&'static str, Duration, u64)>>,
}

impl Step {
    pub(crate) fn new(kv: Kv, profile: bool) -> Step {
        Step {
            kv,
            segments: Vec::new(),
            kv_segments: Vec::new(),
            rows: 0,
            kept: Vec::new(),
            qkv: Vec::new(),
            attended: Vec::new(),
            gathered: Vec::new(),
            profile: profile.then(Vec::new),
        }
    }

    /// Prepares the step for `segments`, which were checked.
    pub(crate) fn begin(&mut self, segments: &[Segment], last: bool) {
        self.segments.clear();
        self.segments.extend_from_slice(segments);
        self.kv_segments.clear();
        self.kv_segments
            .extend(segments.iter().map(|segment| KvSegment {
                slot: segment.slot as usize,
                position: segment.position as usize,
                rows: segment.rows as usize,
            }));
        self.kept.clear();
        self.rows = 0;
        for segment in segments {
            let rows = segment.rows as usize;
            match segment.logits {
                _ if !last => {}
                LogitRows::None => {}
                LogitRows::Last => self.kept.push(self.rows + rows - 1),
                LogitRows::All => self.kept.extend(self.rows..self.rows + rows),
            }
            self.rows += rows;
        }
    }

    /// Ends the step and returns the number of logits rows. The slots grow by their rows, or, after a failure, lose the
    /// rows that may have been overwritten.
    pub(crate) fn end(&mut self, ok: bool) -> usize {
        for segment in &self.segments {
            let end = if ok {
                segment.position + segment.rows
            } else {
                segment.position
            };
            self.kv.set_len(segment.slot, end);
        }
        self.kept.len()
    }

    /// Books the time since `start` on `name` and starts anew; does nothing unless profiling.
    pub(crate) fn lap(&mut self, name: &'static str, start: &mut Option<Instant>) {
        let (Some(profile), Some(since)) = (&mut self.profile, start.as_mut()) else {
            return;
        };
        let now = Instant::now();
        let spent = now - *since;
        *since = now;
        match profile.iter_mut().find(|(known, ..)| *known == name) {
            Some((_, total, count)) => {
                *total += spent;
                *count += 1;
            }
            None => profile.push((name, spent, 1)),
        }
    }

    /// The time an operator starts, if anybody wants to know.
    pub(crate) fn clock(&self) -> Option<Instant> {
        self.profile.as_ref().map(|_| Instant::now())
    }

    pub(crate) fn take_profile(&mut self) -> Vec<(&'static str, Duration, u64)> {
        self.profile
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }
}

/// The sines and cosines for `context` positions.
fn rope(rope: &mesh_model::Rope, context: u32) -> Result<Rope, KernelError> {
    let (scale, factors) = match rope.scaling {
        RopeScaling::None => (1.0, rope.freq_factors.clone()),
        RopeScaling::Linear { factor } => (1.0 / factor, rope.freq_factors.clone()),
        // Pairs are stretched one by one: as divisors of the plain frequencies.
        RopeScaling::Yarn { .. } | RopeScaling::Llama3 { .. } => {
            let plain = |i: usize| f64::from(rope.base).powf(-2.0 * i as f64 / rope.dim as f64);
            let frequencies = rope.frequencies();
            let divisors = frequencies.iter().enumerate();
            let divisors = divisors.map(|(i, &f)| (plain(i) / f64::from(f)) as f32);
            (1.0, Some(divisors.collect()))
        }
    };
    Rope::new(&RopeOptions {
        style: match rope.style {
            mesh_model::RopeStyle::Interleaved => RopeStyle::Interleaved,
            mesh_model::RopeStyle::Halves => RopeStyle::Halves,
        },
        dim: rope.dim,
        base: rope.base,
        scale,
        factors: factors.as_deref(),
        positions: context as usize,
    })
}
