//! A model that is larger than the memory of its device: the first layers run there, the rest on the CPU.
//!
//! [`plan`] decides how many layers go to the device, from sizes, free memory and times. [`SplitStage`] joins
//! both parts. [`load`] plans and loads them, and takes fewer layers when the device turns out to have less
//! memory than it seemed.
//!
//! Layers are the unit, except for mixtures of experts: their experts go to the CPU first, all of them, and the
//! device has the rest of as many layers as fit (module `experts`).

mod experts;
pub mod plan;
mod split;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mesh_engine::Stage;
use mesh_model::Model;

use crate::device::{Device, DeviceMemory, DeviceSizes, DeviceStage, Parts, check_operators};
use crate::options::{LoadError, OrtOptions};
use crate::provider::Provider;
use crate::stage::OrtStage;
use plan::{CacheGrowth, SplitPlan, SplitRequest, StepTimes, after_failure, reserve};
pub use split::SplitStage;

/// Limits of a stage on a device.
#[derive(Debug, Clone, Default)]
pub struct DeviceOptions {
    /// The account of what the stage keeps on the device, with its limit.
    pub memory: DeviceMemory,
    /// Measures the free memory of a provider's device, in bytes; `None`, as its result or instead of it, where
    /// that is unknown. A part is left alone for activations ([`reserve`]).
    pub free: Option<fn(Provider) -> Option<u64>>,
    /// Bytes of KV cache in both parts together of which more are of no use.
    pub kv_memory: Option<u64>,
    /// Most layers on the device: fewer than the last time, after a failure there.
    pub most_layers: Option<u32>,
}

/// The parts of a loaded stage, and what they take.
#[derive(Debug, Clone)]
pub struct Split {
    /// Layers on the device, the first ones.
    pub device_layers: Range<u32>,
    /// Layers among those whose mixture of experts the CPU computes.
    pub expert_layers: u32,
    /// Layers on the CPU.
    pub cpu_layers: Range<u32>,
    /// KV tokens over all slots that fit the device; `None` if its memory is unknown and has no limit.
    pub kv_tokens: Option<u64>,
    /// Bytes of packed weights on the CPU, those of experts among them.
    pub cpu_weight_bytes: u64,
    /// Bytes of KV cache that one token takes on the CPU.
    pub cpu_kv_bytes_per_token: u64,
    /// The account of the device's part.
    pub memory: DeviceMemory,
    moved: Arc<AtomicU64>,
}

impl Split {
    /// Bytes of hidden rows that went from the device to the CPU's part.
    pub fn moved_bytes(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }
}

/// Loads `layers` of `model`, as many of them on `device` as fit, the rest on the CPU. `check` tests each part
/// that was loaded on the device, with the experts of its layers.
///
/// # Errors
/// [`LoadError::DeviceMemory`] if no layer fits. [`LoadError::Provider`] if by `times` the device is of no use,
/// or `check` fails. Otherwise those of [`DeviceStage::load`] and [`OrtStage::load`].
pub(crate) fn load(
    model: &Model,
    layers: Range<u32>,
    options: &OrtOptions,
    device: Device,
    times: Option<StepTimes>,
    check: impl Fn(&mut dyn Stage) -> Result<(), LoadError>,
) -> Result<(Box<dyn Stage>, Split), LoadError> {
    let limits = &options.device;
    let budget = || {
        let free = limits.free.and_then(|free| free(device.provider));
        let elsewhere = limits.memory.promised_to_others();
        let free = free.map(|free| free.saturating_sub(reserve(free)).saturating_sub(elsewhere));
        let left = limits.memory.left();
        free.into_iter().chain(left).min()
    };
    load_within(model, layers, options, device, times, budget, check)
}

/// [`load`] with a budget, in bytes, that is asked for before every attempt.
fn load_within(
    model: &Model,
    layers: Range<u32>,
    options: &OrtOptions,
    device: Device,
    times: Option<StepTimes>,
    budget: impl Fn() -> Option<u64>,
    check: impl Fn(&mut dyn Stage) -> Result<(), LoadError>,
) -> Result<(Box<dyn Stage>, Split), LoadError> {
    check_operators(model, layers.clone(), device)?;
    let parts = Parts::of(model.config(), layers.clone());
    let sizes = DeviceSizes::of(model, &layers, options, device, parts)?;
    let mut request = request(sizes, options, times);
    request.by_layer = parts == Parts::WithoutExperts;
    let mut failures = 0;
    let (part, plan) = loop {
        request.budget = budget();
        let plan = request.plan();
        match load_part(model, &layers, &request, plan, options, device, &check) {
            Ok(part) => break (part, plan),
            Err(error @ LoadError::DeviceMemory { .. }) if plan.device_layers > 0 => {
                failures += 1;
                request.most_layers = after_failure(plan.device_layers, failures);
                tracing::warn!(
                    provider = %device.provider,
                    reason = %error,
                    layers = plan.device_layers,
                    next = request.most_layers,
                    "the device has too little memory: fewer layers go there"
                );
                // The last error says more than that no layer is left to try.
                if request.most_layers == 0 {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
    };
    join(model, layers, options, device, (part, plan), &request)
}

fn load_part(
    model: &Model,
    layers: &Range<u32>,
    request: &SplitRequest,
    plan: SplitPlan,
    options: &OrtOptions,
    device: Device,
    check: &impl Fn(&mut dyn Stage) -> Result<(), LoadError>,
) -> Result<DevicePart, LoadError> {
    let provider = device.provider;
    if plan.too_slow {
        return Err(LoadError::Provider {
            provider,
            reason: match request.by_layer {
                true => "a layer with its experts on the CPU takes longer than on the CPU as a whole",
                false => {
                    "a step of one layer takes longer there than all layers that fit take on the CPU"
                }
            }
            .into(),
        });
    }
    if request.most_layers == 0 {
        let reason = "its allocations failed even with few layers".to_owned();
        return Err(LoadError::DeviceMemory { provider, reason });
    }
    if plan.device_layers == 0 {
        let layer = request.layers.first().copied().unwrap_or(0);
        let reason = format!(
            "no layer fits: one takes {} bytes besides its KV cache, and {} bytes are left for both",
            layer.saturating_add(request.fixed),
            request.budget.unwrap_or(0),
        );
        return Err(LoadError::DeviceMemory { provider, reason });
    }
    let part = layers.start..layers.start + plan.device_layers;
    let mut part = DevicePart::load(model, part, options, device)?;
    check(&mut *part.stage)?;
    Ok(part)
}

/// Layers on a device, with their experts on the CPU.
pub(crate) struct DevicePart {
    pub(crate) stage: Box<dyn Stage>,
    /// Bytes of experts.
    host_bytes: u64,
    moved: Arc<AtomicU64>,
}

impl DevicePart {
    /// Loads `layers` of `model`, whatever memory they take on the device within the limit of the options.
    ///
    /// # Errors
    /// Those of [`DeviceStage::load`] and [`OrtStage::load`].
    pub(crate) fn load(
        model: &Model,
        layers: Range<u32>,
        options: &OrtOptions,
        device: Device,
    ) -> Result<DevicePart, LoadError> {
        let moved = Arc::default();
        let (stage, host_bytes) = match Parts::of(model.config(), layers.clone()) {
            Parts::WithoutExperts => experts::load(model, layers, options, device, &moved)?,
            Parts::Whole => {
                let stage = DeviceStage::load(model, layers, options.clone(), device)?;
                (Box::new(stage) as Box<dyn Stage>, 0)
            }
        };
        Ok(DevicePart {
            stage,
            host_bytes,
            moved,
        })
    }
}

/// Loads the rest of `layers` and joins it with the part on the device.
fn join(
    model: &Model,
    layers: Range<u32>,
    options: &OrtOptions,
    device: Device,
    (part, plan): (DevicePart, SplitPlan),
    request: &SplitRequest,
) -> Result<(Box<dyn Stage>, Split), LoadError> {
    let cut = layers.start + plan.device_layers;
    // By an attempt before this one.
    options.device.memory.set_exhausted(false);
    if request.budget.is_some() {
        options.device.memory.promise(plan.device_bytes);
    }
    let config = model.config();
    let on_device = layers.start..cut;
    let with_experts = on_device
        .clone()
        .filter(|&layer| config.mixture_of(layer).is_some());
    let mut split = Split {
        expert_layers: with_experts.count() as u32,
        device_layers: on_device,
        cpu_layers: cut..layers.end,
        kv_tokens: request.budget.map(|_| plan.kv_tokens),
        cpu_weight_bytes: part.host_bytes,
        cpu_kv_bytes_per_token: 0,
        memory: options.device.memory.clone(),
        moved: part.moved,
    };
    if split.expert_layers > 0 {
        tracing::info!(
            provider = %device.provider,
            layers = split.expert_layers,
            mib = part.host_bytes >> 20,
            "the CPU computes the experts of the layers on the device"
        );
    }
    if cut == layers.end {
        return Ok((part.stage, split));
    }
    let rest = OrtStage::load(model, cut..layers.end, options.clone())?;
    split.cpu_weight_bytes += rest.info().weight_bytes;
    split.cpu_kv_bytes_per_token = rest.info().kv_bytes_per_token;
    tracing::info!(
        provider = %device.provider,
        device_layers = plan.device_layers,
        cpu_layers = split.cpu_layers.len(),
        device_mib = split.memory.used() >> 20,
        cpu_mib = split.cpu_weight_bytes >> 20,
        kv_tokens = plan.kv_tokens,
        "the model is larger than the device's memory: the CPU computes the last layers"
    );
    let joined = SplitStage::chain(vec![part.stage, Box::new(rest)]);
    let mut stage = joined.map_err(|error| LoadError::Model(error.to_string()))?;
    // Rows of layers with experts came to the CPU before, and were counted there.
    if split.expert_layers == 0 {
        stage = stage.counting(&split.moved);
    }
    Ok((Box::new(stage), split))
}

fn request(sizes: DeviceSizes, options: &OrtOptions, speeds: Option<StepTimes>) -> SplitRequest {
    let slots = u64::from(options.slots);
    let context = u64::from(sizes.context);
    let token = sizes
        .kv_row
        .saturating_mul(sizes.layers.len() as u64)
        .max(1);
    let in_slots = slots.saturating_mul(context);
    let most_tokens = match options.device.kv_memory {
        Some(bytes) => in_slots.min(bytes / token),
        None => in_slots,
    };
    SplitRequest {
        fixed: sizes.fixed,
        end: sizes.end,
        kv_row: sizes.kv_row,
        cache: CacheGrowth {
            slots,
            first: sizes.cache_rows.0,
            limit: sizes.cache_rows.1,
        },
        least_tokens: context.min(LEAST_TOKENS),
        most_tokens,
        budget: None,
        most_layers: options.device.most_layers.unwrap_or(u32::MAX),
        speeds,
        by_layer: false,
        layers: sizes.layers,
    }
}

/// KV tokens that layers make room for, where the context is longer: a few conversations.
const LEAST_TOKENS: u64 = 8192;

#[cfg(test)]
mod tests;
