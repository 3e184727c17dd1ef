//! The operators of an encoder's graph.
//!
//! | operator | input | output |
//! |---|---|---|
//! | `Embed` | tokens i32 `[rows]` | norm(word + position + type) `[rows, hidden]` |
//! | `Attention` | hidden | norm(hidden + attention(hidden)) |
//! | `FeedForward` | hidden | norm(hidden + feed-forward(hidden)) |
//! | `Pool` | hidden | one vector per sequence `[sequences, hidden]` |

use mesh_kernels::{Activation, Linear, Residual, encode_attention, layer_norm, linear};
use mesh_model::encoder::{Activation as ModelActivation, Pooling};
use ort::operator::ComputeContext;
use ort::value::TensorElementType;

use super::weights::{Dense, LayerNorm};
use super::{EncoderContext, EncoderStep};
use crate::node::{Node, NodeKind};
use crate::operators::{in_place, kernel};
use crate::tensors;

/// The kinds of nodes in an encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EncoderNode {
    Embed,
    Attention,
    FeedForward,
    Pool,
}

impl NodeKind for EncoderNode {
    type Shared = EncoderContext;

    const ALL: &'static [Self] = &[
        EncoderNode::Embed,
        EncoderNode::Attention,
        EncoderNode::FeedForward,
        EncoderNode::Pool,
    ];

    fn name(self) -> &'static str {
        match self {
            EncoderNode::Embed => "Embed",
            EncoderNode::Attention => "Attention",
            EncoderNode::FeedForward => "FeedForward",
            EncoderNode::Pool => "Pool",
        }
    }

    fn input(self) -> TensorElementType {
        match self {
            EncoderNode::Embed => TensorElementType::Int32,
            _ => TensorElementType::Float32,
        }
    }

    fn output(self, _layer: usize, shared: &EncoderContext) -> (&'static str, usize) {
        let rows = match self {
            EncoderNode::Pool => "sequences",
            _ => "rows",
        };
        (rows, shared.config.hidden)
    }

    fn layers(shared: &EncoderContext) -> usize {
        shared.weights.layers.len()
    }

    fn run(node: &Node<Self>, context: &ComputeContext) -> ort::Result<()> {
        let step = &mut *node.shared.step();
        match node.kind {
            EncoderNode::Embed => node.embed(context, step),
            EncoderNode::Attention => node.attention(context, step),
            EncoderNode::FeedForward => node.feed_forward(context, step),
            EncoderNode::Pool => node.pool(context, step),
        }
    }
}

impl Node<EncoderNode> {
    fn embed(&self, context: &ComputeContext, step: &EncoderStep) -> ort::Result<()> {
        let shared = &*self.shared;
        let (width, weights) = (shared.config.hidden, &shared.weights);
        // SAFETY: the operator declares an i32 input; the encoder binds one token per row.
        let tokens: &[i32] = unsafe { tensors::input(context, 0, step.rows)? };
        // SAFETY: the operator declares an f32 output; inputs of another type are never shared with it.
        let out = unsafe { tensors::output(context, step.rows, width)? };
        let positions = step
            .lengths
            .iter()
            .flat_map(|&length| (0..length).map(|i| i + shared.config.first_position));
        for ((token, position), row) in tokens
            .iter()
            .zip(positions)
            .zip(out.chunks_exact_mut(width))
        {
            // Tokens and lengths were checked against the tables.
            let word = &weights.words[*token as usize * width..][..width];
            let position = &weights.positions[position * width..][..width];
            for ((x, word), position) in row.iter_mut().zip(word).zip(position) {
                *x = word + position;
            }
        }
        self.normalise(&weights.norm, out)
    }

    fn attention(&self, context: &ComputeContext, step: &mut EncoderStep) -> ort::Result<()> {
        let shared = &*self.shared;
        let config = &shared.config;
        let (rows, width) = (step.rows, config.hidden);
        let layer = &shared.weights.layers[self.layer];
        // SAFETY: the operator declares an f32 input; every row of the step comes in as `width` numbers.
        let x: &[f32] = unsafe { tensors::input(context, 0, rows * width)? };
        step.qkv.resize(rows * 3 * width, 0.0);
        self.product(&layer.qkv, x, rows, None, Residual::None, &mut step.qkv)?;
        step.attended.resize(rows * width, 0.0);
        encode_attention(
            &shared.pool,
            config.heads,
            config.head_dim(),
            &step.lengths,
            &step.qkv,
            &mut step.attended,
        )
        .map_err(kernel)?;
        let from = x.as_ptr();
        // SAFETY: the operator declares an f32 output; `x` is read below only where the output has memory of
        // its own.
        let out = unsafe { tensors::output(context, rows, width)? };
        in_place(from, out);
        let add = Residual::InPlace;
        self.product(
            &layer.attention_output,
            &step.attended,
            rows,
            None,
            add,
            out,
        )?;
        self.normalise(&layer.attention_norm, out)
    }

    fn feed_forward(&self, context: &ComputeContext, step: &mut EncoderStep) -> ort::Result<()> {
        let config = &self.shared.config;
        let (width, wide) = (config.hidden, config.intermediate);
        let layer = &self.shared.weights.layers[self.layer];
        // SAFETY: the operator declares an f32 input; every row of the step comes in as `width` numbers.
        let x: &[f32] = unsafe { tensors::input(context, 0, step.rows * width)? };
        let from = x.as_ptr();
        // SAFETY: the operator declares an f32 output; `x` is read below only where the output has memory of
        // its own.
        let out = unsafe { tensors::output(context, step.rows, width)? };
        in_place(from, out);
        let activation = Some(match config.activation {
            ModelActivation::Gelu => Activation::Gelu,
            ModelActivation::GeluTanh => Activation::GeluTanh,
            ModelActivation::Relu => Activation::Relu,
        });
        // Few enough rows that those between the halves, the widest of all, stay in the cache.
        for out in out.chunks_mut(BLOCK * width) {
            let rows = out.len() / width;
            step.middle.resize(rows * wide, 0.0);
            let middle = &mut step.middle;
            self.product(&layer.up, out, rows, activation, Residual::None, middle)?;
            self.product(&layer.down, middle, rows, None, Residual::InPlace, out)?;
        }
        self.normalise(&layer.output_norm, out)
    }

    fn pool(&self, context: &ComputeContext, step: &EncoderStep) -> ort::Result<()> {
        let width = self.shared.config.hidden;
        // SAFETY: the operator declares an f32 input; every row of the step comes in as `width` numbers.
        let x: &[f32] = unsafe { tensors::input(context, 0, step.rows * width)? };
        // The output may lie where the input does, so all rows are read before it is asked for.
        let mut vectors = Vec::with_capacity(step.lengths.len() * width);
        let mut at = 0;
        for &length in &step.lengths {
            let rows = &x[at * width..][..length * width];
            at += length;
            let start = vectors.len();
            vectors.extend_from_slice(&rows[..width]);
            let vector = &mut vectors[start..];
            if self.shared.sentences.pooling == Pooling::Mean {
                for row in rows.chunks_exact(width).skip(1) {
                    for (sum, x) in vector.iter_mut().zip(row) {
                        *sum += x;
                    }
                }
                for sum in vector.iter_mut() {
                    *sum /= length as f32;
                }
            }
            if self.shared.sentences.normalise {
                let square: f64 = vector.iter().map(|&x| f64::from(x).powi(2)).sum();
                let scale = (1.0 / square.sqrt().max(LEAST_LENGTH)) as f32;
                for x in vector {
                    *x *= scale;
                }
            }
        }
        // SAFETY: the operator declares an f32 output, and `x` is not used any more.
        let out = unsafe { tensors::output(context, step.lengths.len(), width)? };
        out.copy_from_slice(&vectors);
        Ok(())
    }

    fn product(
        &self,
        dense: &Dense,
        x: &[f32],
        rows: usize,
        activation: Option<Activation>,
        residual: Residual<'_>,
        out: &mut [f32],
    ) -> ort::Result<()> {
        let options = Linear {
            bias: Some(&dense.bias),
            activation,
            residual,
            ..Linear::default()
        };
        linear(&self.shared.pool, &dense.matrix, x, rows, out, &options).map_err(kernel)
    }

    fn normalise(&self, norm: &LayerNorm, x: &mut [f32]) -> ort::Result<()> {
        let eps = self.shared.config.norm_eps;
        layer_norm(&self.shared.pool, x, &norm.weight, &norm.bias, eps).map_err(kernel)
    }
}

/// Rows that a feed-forward layer takes at once.
const BLOCK: usize = 256;

/// PyTorch's `normalize` divides by no less.
const LEAST_LENGTH: f64 = 1e-12;
