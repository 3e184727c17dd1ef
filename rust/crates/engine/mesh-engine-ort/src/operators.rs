//! The operators of the graph, as ONNX Runtime custom operators over `mesh-kernels`.
//!
//! | operator | input | output |
//! |---|---|---|
//! | `Embed` | tokens i32 `[rows]` | hidden `[rows, hidden]` |
//! | `Attention` | hidden | hidden + attention(norm(hidden)), having extended the layer's KV rows |
//! | `FeedForward` | hidden | hidden + feed-forward(norm(hidden)) |
//! | `Head` | hidden | logits `[kept, vocab]` |
//!
//! A node does a whole half layer because walking from node to node costs about a microsecond, and because
//! intermediate results (norm, rotation, quantised rows) then never leave the second-level cache.

use std::sync::PoisonError;
use std::time::Instant;

use mesh_kernels::{Attention, KernelError, Linear, attention, linear, rms_norm_columns};
use ort::operator::ComputeContext;
use ort::value::TensorElementType;

use crate::node::{Node, NodeKind};
use crate::shared::{StageContext, StageStep};
use crate::tensors;

/// The kinds of nodes in a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StageNode {
    Embed,
    Attention,
    FeedForward,
    Head,
}

impl NodeKind for StageNode {
    type Shared = StageContext;

    const ALL: &'static [Self] = &[
        StageNode::Embed,
        StageNode::Attention,
        StageNode::FeedForward,
        StageNode::Head,
    ];

    fn name(self) -> &'static str {
        match self {
            StageNode::Embed => "Embed",
            StageNode::Attention => "Attention",
            StageNode::FeedForward => "FeedForward",
            StageNode::Head => "Head",
        }
    }

    fn input(self) -> TensorElementType {
        match self {
            StageNode::Embed => TensorElementType::Int32,
            _ => TensorElementType::Float32,
        }
    }

    fn output(self, layer: usize, shared: &StageContext) -> (&'static str, usize) {
        let last_layer = layer + 1 == shared.weights.layers.len();
        match self {
            StageNode::Head => ("kept", shared.shape.vocab),
            StageNode::Attention | StageNode::FeedForward if last_layer && shared.is_last() => {
                ("kept", shared.shape.hidden)
            }
            _ => ("rows", shared.shape.hidden),
        }
    }

    fn layers(shared: &StageContext) -> usize {
        shared.weights.layers.len()
    }

    fn run(node: &Node<Self>, context: &ComputeContext) -> ort::Result<()> {
        let step = node.shared.step.lock();
        let step = &mut *step.unwrap_or_else(PoisonError::into_inner);
        match node.kind {
            StageNode::Embed => node.embed(context, step),
            StageNode::Attention => node.attention(context, step),
            StageNode::FeedForward => node.feed_forward(context, step),
            StageNode::Head => node.head(context, step),
        }
    }
}

impl Node<StageNode> {
    fn embed(&self, context: &ComputeContext, step: &mut StageStep) -> ort::Result<()> {
        let mut clock = step.clock();
        let width = self.shared.shape.hidden;
        // SAFETY: the operator declares an i32 input; the stage binds one token per row.
        let tokens: &[i32] = unsafe { tensors::input(context, 0, step.rows)? };
        // SAFETY: the operator declares an f32 output; inputs of another type are never shared with it.
        let out = unsafe { tensors::output(context, step.rows, width)? };
        let table = self
            .shared
            .weights
            .embedding()
            .ok_or_else(|| internal("no embedding"))?;
        for (token, row) in tokens.iter().zip(out.chunks_exact_mut(width)) {
            table.dequantize_row(*token as usize, row).map_err(kernel)?;
        }
        let scale = self.shared.embedding_scale;
        if scale != 1.0 {
            out.iter_mut().for_each(|x| *x *= scale);
        }
        step.lap("embed", &mut clock);
        Ok(())
    }

    fn attention(&self, context: &ComputeContext, step: &mut StageStep) -> ort::Result<()> {
        let width = self.shared.shape.hidden;
        // SAFETY: the operator declares an f32 input; every row of the step comes in as `width` numbers.
        let x: &[f32] = unsafe { tensors::input(context, 0, step.rows * width)? };
        let mut clock = step.clock();
        self.attend(step, x, &mut clock)?;
        let layer = &self.shared.weights.layers[self.layer];
        // After the last layer only the rows that become logits matter.
        let keep = self.shared.is_last() && self.layer + 1 == self.shared.weights.layers.len();
        if keep && step.kept.len() < step.rows {
            let rows = step.kept.len();
            step.gathered.clear();
            let heads = step.attended.len() / step.rows;
            for (i, &row) in step.kept.iter().enumerate() {
                step.gathered
                    .extend_from_slice(&x[row * width..(row + 1) * width]);
                step.attended
                    .copy_within(row * heads..(row + 1) * heads, i * heads);
            }
            step.attended.truncate(rows * heads);
            // SAFETY: the operator declares an f32 output, and `x` is not used any more.
            let out = unsafe { tensors::output(context, rows, width)? };
            out.copy_from_slice(&step.gathered);
            let (x, scratch) = (&step.attended, &mut step.projected);
            self.shared.project(layer, x, rows, scratch, out)?;
        } else {
            let rows = step.rows;
            let from = x.as_ptr();
            // SAFETY: as above; `x` is read below only where the output has memory of its own.
            let out = unsafe { tensors::output(context, rows, width)? };
            in_place(from, out);
            let (x, scratch) = (&step.attended, &mut step.projected);
            self.shared.project(layer, x, rows, scratch, out)?;
        }
        step.lap("attention output", &mut clock);
        Ok(())
    }

    /// Extends the layer's KV rows and fills `step.attended` with the output of the attention heads.
    fn attend(
        &self,
        step: &mut StageStep,
        x: &[f32],
        clock: &mut Option<Instant>,
    ) -> ort::Result<()> {
        let shared = &*self.shared;
        let layer = &shared.weights.layers[self.layer];
        let options = Linear {
            norm: Some(shared.feed_forward.norm(&layer.attention_norm)),
            bias: layer.qkv_bias.as_deref(),
            ..Linear::default()
        };
        step.qkv.resize(step.rows * layer.qkv.n(), 0.0);
        linear(
            &shared.pool,
            &layer.qkv,
            x,
            step.rows,
            &mut step.qkv,
            &options,
        )
        .map_err(kernel)?;
        if let (Some(shape), Some(weights)) = (&shared.latent, &layer.latent) {
            let (pool, eps) = (&shared.pool, shared.feed_forward.norm_eps);
            let expanded = shape.expand(pool, weights, eps, &mut step.qkv, &mut step.latent);
            expanded.map_err(kernel)?;
        }
        if shared.qk_norm_over_heads {
            self.norm_over_heads(&mut step.qkv)?;
        }
        step.lap("query, key, value", clock);
        let attending = shared.attending(self.layer);
        let by_head = !shared.qk_norm_over_heads;
        let spec = Attention {
            heads: shared.heads,
            scale: Some(attending.score_scale),
            window: attending.window,
            rope: Some(&attending.rope),
            q_norm: layer.query_norm.as_deref().filter(|_| by_head),
            k_norm: layer.key_norm.as_deref().filter(|_| by_head),
            eps: shared.feed_forward.norm_eps,
            sinks: layer.sinks.as_deref(),
        };
        step.attended
            .resize(step.rows * shared.heads * shared.value_dim, 0.0);
        attention(
            &shared.pool,
            &spec,
            &mut step.kv.cache,
            self.layer,
            &step.kv_segments,
            &step.qkv,
            &mut step.attended,
        )
        .map_err(kernel)?;
        step.lap("attention", clock);
        Ok(())
    }

    /// Norms query and key of each row of `qkv` over all their heads.
    fn norm_over_heads(&self, qkv: &mut [f32]) -> ort::Result<()> {
        let shared = &*self.shared;
        let layer = &shared.weights.layers[self.layer];
        let (stride, mut start) = (layer.qkv.n(), 0);
        for weight in [&layer.query_norm, &layer.key_norm].into_iter().flatten() {
            let columns = start..start + weight.len();
            start = columns.end;
            let (pool, eps) = (&shared.pool, shared.feed_forward.norm_eps);
            rms_norm_columns(pool, qkv, stride, columns, weight, eps).map_err(kernel)?;
        }
        Ok(())
    }

    fn feed_forward(&self, context: &ComputeContext, step: &mut StageStep) -> ort::Result<()> {
        let mut clock = step.clock();
        let width = self.shared.shape.hidden;
        let kept = self.shared.is_last() && self.layer + 1 == self.shared.weights.layers.len();
        let rows = if kept { step.kept.len() } else { step.rows };
        // SAFETY: the operator declares an f32 input; Attention before it gave `rows` rows.
        let x: &[f32] = unsafe { tensors::input(context, 0, rows * width)? };
        let from = x.as_ptr();
        // SAFETY: the operator declares an f32 output; `x` is read below only where the output has memory of
        // its own.
        let out = unsafe { tensors::output(context, rows, width)? };
        in_place(from, out);
        if rows > 0 {
            let shared = &*self.shared;
            let half = &shared.weights.layers[self.layer].feed_forward;
            let params = &shared.feed_forward;
            params
                .compute(&shared.pool, half, out, rows)
                .map_err(kernel)?;
        }
        step.lap("feed-forward", &mut clock);
        Ok(())
    }

    fn head(&self, context: &ComputeContext, step: &mut StageStep) -> ort::Result<()> {
        let mut clock = step.clock();
        let shape = &self.shared.shape;
        let rows = step.kept.len();
        // SAFETY: the operator declares an f32 input; the last FeedForward gave the kept rows.
        let x: &[f32] = unsafe { tensors::input(context, 0, rows * shape.hidden)? };
        // SAFETY: the operator declares an f32 output, wider than the input and so never the same memory.
        let out = unsafe { tensors::output(context, rows, shape.vocab)? };
        if rows > 0 {
            let head = self
                .shared
                .weights
                .head
                .as_ref()
                .ok_or_else(|| internal("no head"))?;
            let (params, pool) = (&self.shared.feed_forward, &self.shared.pool);
            params.logits(pool, head, x, rows, out).map_err(kernel)?;
        }
        step.lap("head", &mut clock);
        Ok(())
    }
}

/// Brings the residual into the output, unless ONNX Runtime gave the node its input's memory.
pub(crate) fn in_place(from: *const f32, out: &mut [f32]) {
    if !std::ptr::eq(from, out.as_ptr()) {
        // SAFETY: the input has as many numbers as the output, and where their addresses differ they are
        // separate tensors.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) };
    }
}

/// A kernel's refusal as ONNX Runtime's error.
pub(crate) fn kernel(error: KernelError) -> ort::Error {
    ort::Error::new(error.to_string())
}

fn internal(what: &str) -> ort::Error {
    ort::Error::new(format!("the graph does not fit the stage: {what}"))
}
