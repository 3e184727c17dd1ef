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

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use mesh_kernels::{
    Attention, FeedForward, Gate, KernelError, Linear, attention, feed_forward, linear,
};
use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput,
    ShapeInferenceContext,
};
use ort::value::{Shape, SymbolicDimensions, TensorElementType, ValueType};

use crate::shared::{Shared, Step};
use crate::tensors;

/// The custom operators of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Embed,
    Attention,
    FeedForward,
    Head,
}

impl Kind {
    /// All operators of the domain.
    pub(crate) const ALL: [Kind; 4] = [Kind::Embed, Kind::Attention, Kind::FeedForward, Kind::Head];

    /// The operator's name in the graph.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Embed => "Embed",
            Kind::Attention => "Attention",
            Kind::FeedForward => "FeedForward",
            Kind::Head => "Head",
        }
    }
}

/// One of our operators, bound to a stage.
pub(crate) struct StageOperator {
    kind: Kind,
    shared: Arc<Shared>,
}

impl StageOperator {
    pub(crate) fn new(kind: Kind, shared: Arc<Shared>) -> StageOperator {
        StageOperator { kind, shared }
    }
}

impl Operator for StageOperator {
    type Kernel<'attr> = StageKernel;

    /// Layers work in place where ONNX Runtime can give them the same memory.
    const INPLACES: &[(u32, u32)] = &[(0, 0)];

    fn name(&self) -> &str {
        self.kind.name()
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(match self.kind {
            Kind::Embed => TensorElementType::Int32,
            _ => TensorElementType::Float32,
        })]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel<'attr>(&self, context: &KernelContext<'attr>) -> ort::Result<StageKernel> {
        let layer = context
            .get::<i64>("layer")
            .and_then(|layer| usize::try_from(layer).ok())
            .filter(|&layer| layer < self.shared.weights.layers.len())
            .ok_or_else(|| ort::Error::new("attribute `layer` is missing or out of range"))?;
        Ok(StageKernel {
            kind: self.kind,
            layer,
            shared: Arc::clone(&self.shared),
        })
    }

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        let shared = &*self.shared;
        // Rows that have the same name have the same number, so the planner may let them share memory.
        let last_layer = context.attr::<i64>("layer")? as usize + 1 == shared.weights.layers.len();
        let (symbol, width) = match self.kind {
            Kind::Head => ("kept", shared.shape.vocab),
            Kind::Attention | Kind::FeedForward if last_layer && shared.is_last() => {
                ("kept", shared.shape.hidden)
            }
            _ => ("rows", shared.shape.hidden),
        };
        context.set_output(
            0,
            &ValueType::Tensor {
                ty: TensorElementType::Float32,
                shape: Shape::new([-1, width as i64]),
                dimension_symbols: SymbolicDimensions::new([symbol.to_owned(), String::new()]),
            },
        )
    }
}

/// A node of the graph.
pub(crate) struct StageKernel {
    kind: Kind,
    layer: usize,
    shared: Arc<Shared>,
}

impl Kernel for StageKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        // Unwinding into ONNX Runtime would end the process.
        catch_unwind(AssertUnwindSafe(|| self.run(context)))
            .unwrap_or_else(|_| Err(ort::Error::new("a kernel panicked; see the log")))
    }
}

impl StageKernel {
    fn run(&self, context: &ComputeContext) -> ort::Result<()> {
        let mut step = self
            .shared
            .step
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let step = &mut *step;
        match self.kind {
            Kind::Embed => self.embed(context, step),
            Kind::Attention => self.attention(context, step),
            Kind::FeedForward => self.feed_forward(context, step),
            Kind::Head => self.head(context, step),
        }
    }

    fn embed(&self, context: &ComputeContext, step: &mut Step) -> ort::Result<()> {
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

    fn attention(&self, context: &ComputeContext, step: &mut Step) -> ort::Result<()> {
        let width = self.shared.shape.hidden;
        // SAFETY: the operator declares an f32 input; every row of the step comes in as `width` numbers.
        let x: &[f32] = unsafe { tensors::input(context, 0, step.rows * width)? };
        let mut clock = step.clock();
        self.attend(step, x, &mut clock)?;
        let layer = &self.shared.weights.layers[self.layer];
        let (matrix, post_norm) = (
            &layer.attention_output,
            layer.attention_post_norm.as_deref(),
        );
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
            self.shared
                .project(matrix, post_norm, x, rows, scratch, out)?;
        } else {
            let rows = step.rows;
            let from = x.as_ptr();
            // SAFETY: as above; `x` is read below only where the output has memory of its own.
            let out = unsafe { tensors::output(context, rows, width)? };
            in_place(from, out);
            let (x, scratch) = (&step.attended, &mut step.projected);
            self.shared
                .project(matrix, post_norm, x, rows, scratch, out)?;
        }
        step.lap("attention output", &mut clock);
        Ok(())
    }

    /// Extends the layer's KV rows and fills `step.attended` with the output of the attention heads.
    fn attend(&self, step: &mut Step, x: &[f32], clock: &mut Option<Instant>) -> ort::Result<()> {
        let shared = &*self.shared;
        let layer = &shared.weights.layers[self.layer];
        let options = Linear {
            norm: Some(shared.norm(&layer.attention_norm)),
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
        step.lap("query, key, value", clock);
        let attending = shared.attending(self.layer);
        let spec = Attention {
            heads: shared.heads,
            scale: Some(attending.score_scale),
            window: attending.window,
            rope: Some(&attending.rope),
            q_norm: layer.query_norm.as_deref(),
            k_norm: layer.key_norm.as_deref(),
            eps: shared.norm_eps,
        };
        step.attended
            .resize(step.rows * shared.heads * shared.shape.head_dim, 0.0);
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

    fn feed_forward(&self, context: &ComputeContext, step: &mut Step) -> ort::Result<()> {
        let mut clock = step.clock();
        let width = self.shared.shape.hidden;
        let kept = self.shared.is_last() && self.layer + 1 == self.shared.weights.layers.len();
        let rows = if kept { step.kept.len() } else { step.rows };
        // SAFETY: the operator declares an f32 input; Attention before it gave `rows` rows.
        let x: &[f32] = unsafe { tensors::input(context, 0, rows * width)? };
        let from = x.as_ptr();
        // SAFETY: the operator declares an f32 output; `x` is read below only where the output has memory of its own.
        let out = unsafe { tensors::output(context, rows, width)? };
        in_place(from, out);
        if rows > 0 {
            let layer = &self.shared.weights.layers[self.layer];
            let matrices = FeedForward {
                norm: self.shared.norm(&layer.ffn_norm),
                gate: Gate {
                    gate: &layer.gate,
                    up: &layer.up,
                    activation: self.shared.activation,
                },
                down: &layer.down,
                post_norm: layer
                    .ffn_post_norm
                    .as_deref()
                    .map(|weight| self.shared.norm(weight)),
            };
            feed_forward(&self.shared.pool, &matrices, out, rows).map_err(kernel)?;
        }
        step.lap("feed-forward", &mut clock);
        Ok(())
    }

    fn head(&self, context: &ComputeContext, step: &mut Step) -> ort::Result<()> {
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
            let options = Linear {
                norm: Some(self.shared.norm(&head.norm)),
                ..Linear::default()
            };
            linear(&self.shared.pool, &head.output, x, rows, out, &options).map_err(kernel)?;
        }
        step.lap("head", &mut clock);
        Ok(())
    }
}

/// Brings the residual into the output, unless ONNX Runtime gave the node its input's memory.
pub(crate) fn in_place(from: *const f32, out: &mut [f32]) {
    if !std::ptr::eq(from, out.as_ptr()) {
        // SAFETY: the input has as many numbers as the output, and where their addresses differ they are separate tensors.
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
