//! The speed of machines that are not there, by a model's header.

use arcanum_profiler::ModelSpec;
use mesh_engine_ort::WeightFormat;
use mesh_model::Model;

use super::layers::Sizes;

/// Dimensions of a model, and how fast a machine is expected to run it.
#[derive(Debug, Clone, PartialEq)]
pub struct Estimate {
    /// The dimensions that placement needs.
    pub model: ModelSpec,
    /// Microseconds of one layer for one decode row.
    pub decode_us: f64,
    /// Microseconds of one row of logits.
    pub logits_us: f64,
}

/// Estimates `model` in `format` on machines that read `bandwidth` bytes of memory in a second. Decoding is bound
/// by the bytes that a token reads: all of a dense layer, of a mixture only the experts that are used. Only the
/// header of the model is read.
pub fn estimate(model: &Model, format: WeightFormat, bandwidth: f64) -> Estimate {
    let config = model.config();
    let sizes = Sizes::new(model, format);
    let us = |bytes: u64| bytes as f64 / bandwidth.max(1.0) * 1e6;
    Estimate {
        model: ModelSpec {
            layers: config.layers,
            hidden: u32::try_from(config.hidden).unwrap_or(u32::MAX),
            layer_bytes: sizes.layer,
            first_bytes: sizes.first,
            last_bytes: sizes.last,
            // Keys and values in f16.
            kv_bytes: 2 * config.kv_elements() as u64,
        },
        decode_us: us(sizes.active),
        logits_us: us(sizes.last),
    }
}
