//! Layers whose attention a device computes, and whose mixture of experts the CPU does.
//!
//! Experts are most of a mixture's bytes, and a row reads few of them; attention is small and reads the whole
//! context. So the device takes the attention of as many layers as fit before it would take experts, for which
//! its graph has no operator anyway. Rows cross to the CPU and back once in every layer: `hidden` numbers of 32
//! bits each way.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mesh_engine::{
    LogitRows, Segment, SlotId, Stage, StageError, StageInfo, StageInput, StageOutput,
};
use mesh_kernels::{KernelError, Pool, in_background};
use mesh_model::Model;

use super::SplitStage;
use crate::check;
use crate::device::{Device, DeviceStage, Parts};
use crate::feed_forward::{FeedForwardHalf, FeedForwardParams, HeadWeights};
use crate::options::{LoadError, OrtOptions};
use crate::size::pack_options;
use crate::weights::HostWeights;

/// The CPU's part of the network, which all layers of a stage share.
struct Host {
    pool: Pool,
    params: FeedForwardParams,
    /// Bytes of hidden rows that came from the device.
    moved: Arc<AtomicU64>,
}

/// One layer: attention on a device, a mixture of experts on the CPU, and the output matrix there too if the layer
/// ends the model. A dense layer is on the device as a whole.
struct ExpertLayer {
    info: StageInfo,
    device: DeviceStage,
    half: Option<FeedForwardHalf>,
    head: Option<HeadWeights>,
    host: Arc<Host>,
    /// The step's segments without logits.
    segments: Vec<Segment>,
    rows: Vec<f32>,
    logits: Vec<f32>,
}

/// Loads `layers` of `model` with their mixtures on the CPU. Returns the stage and the bytes of its weights there.
/// `moved` counts the bytes of hidden rows that come from the device.
///
/// # Errors
/// Those of [`DeviceStage::load`] and [`OrtStage::load`](crate::OrtStage::load).
pub(super) fn load(
    model: &Model,
    layers: Range<u32>,
    options: &OrtOptions,
    device: Device,
    moved: &Arc<AtomicU64>,
) -> Result<(Box<dyn Stage>, u64), LoadError> {
    // The device first: it says soon if its memory is too small.
    let on_device = |layer| {
        let parts = Parts::WithoutExperts;
        DeviceStage::load_parts(model, layer..layer + 1, options.clone(), device, parts)
    };
    let stages = layers
        .clone()
        .map(on_device)
        .collect::<Result<Vec<_>, _>>()?;
    let threads = options.thread_count();
    let weights = in_background(threads, |pool| {
        let (layers, cache) = (layers.clone(), options.cache.as_ref());
        let packing = pack_options(options.compact);
        HostWeights::load(model, layers, pool, packing, options.weights, cache)
    })?;
    let host = Arc::new(Host {
        pool: Pool::new(threads),
        params: FeedForwardParams::of(model.config()),
        moved: Arc::clone(moved),
    });
    let HostWeights { halves, mut head } = weights;
    let mut bytes = 0;
    let mut parts: Vec<Box<dyn Stage>> = Vec::with_capacity(stages.len());
    for (stage, half) in stages.into_iter().zip(halves) {
        let head = if stage.info().is_last() {
            head.take()
        } else {
            None
        };
        let layer = ExpertLayer::new(stage, half, head, &host);
        bytes += layer.host_bytes();
        parts.push(Box::new(layer));
    }
    let stage = SplitStage::chain(parts).map_err(|error| LoadError::Model(error.to_string()))?;
    Ok((Box::new(stage), bytes))
}

impl ExpertLayer {
    fn new(
        device: DeviceStage,
        half: Option<FeedForwardHalf>,
        head: Option<HeadWeights>,
        host: &Arc<Host>,
    ) -> ExpertLayer {
        let mut layer = ExpertLayer {
            info: device.info().clone(),
            device,
            half,
            head,
            host: Arc::clone(host),
            segments: Vec::new(),
            rows: Vec::new(),
            logits: Vec::new(),
        };
        layer.info.weight_bytes += layer.host_bytes();
        layer
    }

    /// Bytes of the layer's weights on the CPU.
    fn host_bytes(&self) -> u64 {
        let half = self.half.as_ref().map_or(0, FeedForwardHalf::bytes);
        let head = self.head.as_ref().map_or(0, |head| head.output.bytes());
        (half + head) as u64
    }

    /// Computes the CPU's part of `self.rows`.
    fn finish(&mut self) -> Result<(), KernelError> {
        let (host, width) = (&self.host, self.info.shape.hidden);
        let count = self.rows.len() / width;
        if count == 0 {
            self.logits.clear();
            return Ok(());
        }
        if let Some(half) = &self.half {
            host.params
                .compute(&host.pool, half, &mut self.rows, count)?;
        }
        if let Some(head) = &self.head {
            self.logits.resize(count * self.info.shape.vocab, 0.0);
            let (x, out) = (&self.rows, &mut self.logits);
            host.params.logits(&host.pool, head, x, count, out)?;
        }
        Ok(())
    }
}

impl Stage for ExpertLayer {
    fn info(&self) -> &StageInfo {
        &self.info
    }

    fn forward(
        &mut self,
        segments: &[Segment],
        input: StageInput<'_>,
    ) -> Result<StageOutput<'_>, StageError> {
        check::step(&self.info, segments, &input, |slot| self.kv_len(slot))?;
        check::without_logits(segments, &mut self.segments);
        let StageOutput::Hidden(hidden) = self.device.forward(&self.segments, input)? else {
            let text = "a layer without its output matrix gave logits";
            return Err(StageError::Malformed(text.into()));
        };
        if self.half.is_some() || self.head.is_some() {
            let bytes = size_of_val(hidden) as u64;
            self.host.moved.fetch_add(bytes, Ordering::Relaxed);
        }
        self.rows.clear();
        match self.head {
            None => self.rows.extend_from_slice(hidden),
            // Only the rows that become logits matter after the last attention.
            Some(_) => keep(segments, hidden, self.info.shape.hidden, &mut self.rows),
        }
        self.finish().map_err(|error| StageError::Backend {
            backend: "the CPU's part",
            message: error.to_string(),
        })?;
        Ok(match self.head {
            None => StageOutput::Hidden(&self.rows),
            Some(_) => StageOutput::Logits(&self.logits),
        })
    }

    fn kv_len(&self, slot: SlotId) -> u32 {
        self.device.kv_len(slot)
    }

    fn truncate(&mut self, slot: SlotId, len: u32) {
        self.device.truncate(slot, len);
    }

    fn copy_prefix(&mut self, from: SlotId, to: SlotId, len: u32) -> Result<(), StageError> {
        self.device.copy_prefix(from, to, len)
    }

    fn kv_export(&self, slot: SlotId, rows: Range<u32>) -> Result<Vec<u8>, StageError> {
        self.device.kv_export(slot, rows)
    }

    fn kv_import(&mut self, slot: SlotId, position: u32, bytes: &[u8]) -> Result<(), StageError> {
        self.device.kv_import(slot, position, bytes)
    }
}

/// Appends the rows that become logits to `out`.
fn keep(segments: &[Segment], hidden: &[f32], width: usize, out: &mut Vec<f32>) {
    let mut rest = hidden;
    for segment in segments {
        let (own, behind) = rest.split_at(segment.rows as usize * width);
        rest = behind;
        match segment.logits {
            LogitRows::None => {}
            LogitRows::Last => out.extend_from_slice(&own[own.len() - width..]),
            LogitRows::All => out.extend_from_slice(own),
        }
    }
}
