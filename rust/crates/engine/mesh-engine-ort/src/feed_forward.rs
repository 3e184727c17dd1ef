//! The feed-forward half of a layer, dense or a mixture of experts, on the CPU's kernels.

use mesh_kernels::{
    Activation, Experts, FeedForward, Gate, KernelError, Linear, MixtureLayer, Pool, QMatrix,
    RmsNorm, SharedExpert, feed_forward, linear, mixture,
};
use mesh_model::{Mixture, ModelConfig};

use crate::weights::SharedExpertWeights;

/// Parameters of a network's feed-forward halves and of its output.
#[derive(Debug, Clone)]
pub(crate) struct FeedForwardParams {
    pub(crate) norm_eps: f32,
    pub(crate) residual_scale: f32,
    logit_divisor: f32,
    activation: Activation,
    mixture: Option<Mixture>,
}

/// Weights of the feed-forward half of a layer.
pub(crate) struct FeedForwardHalf {
    pub(crate) norm: Vec<f32>,
    pub(crate) matrices: FeedForwardWeights,
    /// Norm of the output, before the residual is added.
    pub(crate) post_norm: Option<Vec<f32>>,
}

/// Matrices of the feed-forward half of a layer.
pub(crate) enum FeedForwardWeights {
    Dense {
        gate: QMatrix,
        up: QMatrix,
        down: QMatrix,
    },
    Mixture {
        router: QMatrix,
        router_bias: Option<Vec<f32>>,
        experts: Experts,
        /// The expert that computes every row, if there is one.
        shared: Option<SharedExpertWeights>,
    },
}

/// The final norm and the output matrix.
pub(crate) struct HeadWeights {
    pub(crate) norm: Vec<f32>,
    pub(crate) output: QMatrix,
}

impl FeedForwardHalf {
    /// Bytes of packed matrices.
    pub(crate) fn bytes(&self) -> usize {
        match &self.matrices {
            FeedForwardWeights::Dense { gate, up, down } => {
                gate.bytes() + up.bytes() + down.bytes()
            }
            FeedForwardWeights::Mixture {
                router,
                experts,
                shared,
                ..
            } => {
                let shared = shared.as_ref().map_or(0, SharedExpertWeights::bytes);
                router.bytes() + experts.bytes() + shared
            }
        }
    }
}

impl FeedForwardParams {
    pub(crate) fn of(config: &ModelConfig) -> FeedForwardParams {
        FeedForwardParams {
            norm_eps: config.norm_eps,
            residual_scale: config.residual_scale,
            logit_divisor: config.logit_divisor,
            activation: match config.activation {
                mesh_model::Activation::Silu => Activation::Silu,
                mesh_model::Activation::GeluTanh => Activation::GeluTanh,
                mesh_model::Activation::ClampedSwiglu => Activation::ClampedSwiglu,
            },
            mixture: config.mixture.clone(),
        }
    }

    pub(crate) fn norm<'a>(&self, weight: &'a [f32]) -> RmsNorm<'a> {
        RmsNorm {
            weight,
            eps: self.norm_eps,
        }
    }

    /// `x += feed-forward(norm(x))`; `x` has so many rows, at least one.
    pub(crate) fn compute(
        &self,
        pool: &Pool,
        half: &FeedForwardHalf,
        x: &mut [f32],
        rows: usize,
    ) -> Result<(), KernelError> {
        let norm = self.norm(&half.norm);
        let activation = self.activation;
        match &half.matrices {
            FeedForwardWeights::Dense { gate, up, down } => {
                let post_norm = half.post_norm.as_deref();
                let matrices = FeedForward {
                    norm,
                    gate: Gate {
                        gate,
                        up,
                        activation,
                    },
                    down,
                    post_norm: post_norm.map(|weight| self.norm(weight)),
                };
                feed_forward(pool, &matrices, x, rows)
            }
            FeedForwardWeights::Mixture {
                router,
                router_bias,
                experts,
                shared: beside,
            } => {
                let config = self.mixture.as_ref();
                let config = config.expect("a network without a mixture has no weights of one");
                let matrices = MixtureLayer {
                    norm,
                    router,
                    router_bias: router_bias.as_deref(),
                    experts,
                    activation,
                    used: config.used,
                    normalised: config.normalised,
                    scale: config.scale * self.residual_scale,
                    shared: beside.as_ref().map(|expert| SharedExpert {
                        gate: Gate {
                            gate: &expert.gate,
                            up: &expert.up,
                            activation,
                        },
                        down: &expert.down,
                        score: expert.score.as_ref(),
                        scale: self.residual_scale,
                    }),
                };
                mixture(pool, &matrices, x, rows)
            }
        }
    }

    /// `out = norm(x) · Wᵀ`, scaled as the network says: logits of so many rows, at least one.
    pub(crate) fn logits(
        &self,
        pool: &Pool,
        head: &HeadWeights,
        x: &[f32],
        rows: usize,
        out: &mut [f32],
    ) -> Result<(), KernelError> {
        let options = Linear {
            norm: Some(self.norm(&head.norm)),
            ..Linear::default()
        };
        linear(pool, &head.output, x, rows, out, &options)?;
        if self.logit_divisor != 1.0 {
            out.iter_mut()
                .for_each(|logit| *logit /= self.logit_divisor);
        }
        Ok(())
    }
}
