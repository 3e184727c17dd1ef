//! State that the operators of a stage share with it: weights, the thread pool, and the running step.

use std::ops::Range;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use mesh_engine::{LogitRows, ModelShape, Segment};
use mesh_kernels::{
    KernelError, KvSegment, Linear, Pool, Residual, Rope, RopeOptions, RopeStyle, add_rms_norm,
    linear,
};
use mesh_model::{ModelConfig, RopeScaling};

use crate::feed_forward::FeedForwardParams;
use crate::kv::Kv;
use crate::latent::{LatentScratch, LatentShape};
use crate::operators::kernel;
use crate::weights::{LayerWeights, StageWeights};

/// Everything the operators need besides their tensors.
pub(crate) struct StageContext {
    pub(crate) shape: ModelShape,
    pub(crate) layers: Range<u32>,
    pub(crate) heads: usize,
    /// Width of a head's value.
    pub(crate) value_dim: usize,
    /// Widths of latent attention, where the network has it.
    pub(crate) latent: Option<LatentShape>,
    pub(crate) feed_forward: FeedForwardParams,
    /// Parameters of layers that see all positions.
    global: Attending,
    /// Parameters of layers with a sliding window, and for each layer of the stage whether it has one.
    local: Option<(Attending, Vec<bool>)>,
    pub(crate) embedding_scale: f32,
    /// The norms of query and key go over all heads of a row at once.
    pub(crate) qk_norm_over_heads: bool,
    pub(crate) weights: StageWeights,
    pub(crate) pool: Pool,
    pub(crate) step: Mutex<StageStep>,
}

/// Attention parameters of a layer.
pub(crate) struct Attending {
    pub(crate) rope: Rope,
    /// Factor of the scores.
    pub(crate) score_scale: f32,
    /// Positions that a row sees; `None` means all.
    pub(crate) window: Option<usize>,
}

impl Attending {
    fn new(
        config: &ModelConfig,
        rotation: &mesh_model::Rope,
        window: Option<usize>,
        context: u32,
    ) -> Result<Attending, KernelError> {
        // The magnitude belongs to queries and keys alike, so the scores take it squared. In latent attention it
        // belongs to their rotated parts only, and keys take it (latent.rs).
        let magnitude = match config.latent {
            Some(_) => 1.0,
            None => rotation.magnitude(),
        };
        Ok(Attending {
            rope: rope(rotation, context)?,
            score_scale: magnitude * magnitude / config.query_scalar.sqrt(),
            window,
        })
    }
}

impl StageContext {
    pub(crate) fn new(
        shape: ModelShape,
        layers: Range<u32>,
        config: &ModelConfig,
        weights: StageWeights,
        pool: Pool,
        step: StageStep,
        context: u32,
    ) -> Result<StageContext, KernelError> {
        let local = match &config.window {
            Some(window) => {
                let attending =
                    Attending::new(config, &window.rope, Some(window.size as usize), context)?;
                let which = layers.clone().map(|layer| window.has(layer)).collect();
                Some((attending, which))
            }
            None => None,
        };
        Ok(StageContext {
            shape,
            layers,
            heads: config.heads,
            value_dim: config.value_dim,
            latent: LatentShape::of(config),
            feed_forward: FeedForwardParams::of(config),
            global: Attending::new(config, &config.rope, None, context)?,
            local,
            embedding_scale: config.embedding_scale,
            qk_norm_over_heads: config.qk_norm_over_heads,
            weights,
            pool,
            step: Mutex::new(step),
        })
    }

    /// True if the stage holds the model's last layer.
    pub(crate) fn is_last(&self) -> bool {
        self.layers.end == self.shape.layers
    }

    /// Attention parameters of `layer`, counted from the stage's first.
    pub(crate) fn attending(&self, layer: usize) -> &Attending {
        match &self.local {
            Some((attending, which)) if which[layer] => attending,
            _ => &self.global,
        }
    }

    /// `out += x · Wᵀ + bias` with the layer's output matrix, the product normed before where there is a weight
    /// for it, and scaled where the network scales residuals; `scratch` is then room for it.
    pub(crate) fn project(
        &self,
        layer: &LayerWeights,
        x: &[f32],
        rows: usize,
        scratch: &mut Vec<f32>,
        out: &mut [f32],
    ) -> ort::Result<()> {
        if rows == 0 {
            return Ok(());
        }
        let matrix = &layer.attention_output;
        let post_norm = layer.attention_post_norm.as_deref();
        let mut options = Linear {
            bias: layer.attention_output_bias.as_deref(),
            ..Linear::default()
        };
        let scale = self.feed_forward.residual_scale;
        if post_norm.is_none() && scale == 1.0 {
            options.residual = Residual::InPlace;
            return linear(&self.pool, matrix, x, rows, out, &options).map_err(kernel);
        }
        scratch.resize(out.len(), 0.0);
        linear(&self.pool, matrix, x, rows, scratch, &options).map_err(kernel)?;
        if scale != 1.0 {
            scratch.iter_mut().for_each(|x| *x *= scale);
        }
        match post_norm {
            Some(weight) => {
                let eps = self.feed_forward.norm_eps;
                add_rms_norm(&self.pool, scratch, weight, eps, out).map_err(kernel)?;
            }
            None => out.iter_mut().zip(scratch).for_each(|(out, x)| *out += *x),
        }
        Ok(())
    }
}

/// The step that is running, the KV cache it extends and the memory it works in. The stage fills it before a
/// run; the operators run one after the other, so each takes the lock uncontended.
pub(crate) struct StageStep {
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
    /// Scratch memory of latent attention.
    pub(crate) latent: LatentScratch,
    /// Output of the running layer's attention heads.
    pub(crate) attended: Vec<f32>,
    /// Residual rows that become logits.
    pub(crate) gathered: Vec<f32>,
    /// Output of attention, before its norm.
    pub(crate) projected: Vec<f32>,
    profile: Option<Vec<(&'static str, Duration, u64)>>,
}

impl StageStep {
    pub(crate) fn new(kv: Kv, profile: bool) -> StageStep {
        StageStep {
            kv,
            segments: Vec::new(),
            kv_segments: Vec::new(),
            rows: 0,
            kept: Vec::new(),
            qkv: Vec::new(),
            latent: LatentScratch::default(),
            attended: Vec::new(),
            gathered: Vec::new(),
            projected: Vec::new(),
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

    /// Ends the step and returns the number of logits rows. The slots grow by their rows, or, after a
    /// failure, lose the rows that may have been overwritten.
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
