//! The worker's Prometheus metrics.

use std::fmt;
use std::sync::Arc;

use mesh_engine::Load;
use mesh_engine_ort::Split;
use mesh_service::metrics::prometheus_client::collector::Collector;
use mesh_service::metrics::prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use mesh_service::metrics::prometheus_client::metrics::counter::{ConstCounter, Counter};
use mesh_service::metrics::prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use mesh_service::metrics::prometheus_client::registry::Registry;

use crate::host::Host;

/// Counters of the worker itself; the engines' figures are read when they are asked for.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) requests: Counter,
    pub(crate) tasks: Counter,
    pub(crate) dropped: Counter,
    connected: Gauge,
}

impl Counters {
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register("requests", "Requests of the head", self.requests.clone());
        registry.register("dcf_tasks", "Plain DCF tasks", self.tasks.clone());
        let help = "Plain DCF datagrams that were no task or came from a stranger";
        registry.register("dcf_datagrams_dropped", help, self.dropped.clone());
        registry.register(
            "head_connected",
            "1 while the link to the head is up",
            self.connected.clone(),
        );
    }

    pub(crate) fn set_connected(&self, connected: bool) {
        self.connected.set(connected.into());
    }
}

pub(crate) struct EngineCollector(pub(crate) Arc<Host>);

impl Collector for EngineCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let loads = self.0.loads();
        let kind = ConstGauge::new(0.0).metric_type();
        let help = "1 for what computes the model";
        let mut family = encoder.encode_descriptor("model_backend", help, None, kind)?;
        for served in self.0.models() {
            let labels = [
                ("model", served.card.name.as_str()),
                ("backend", served.backend),
            ];
            ConstGauge::new(1.0).encode(family.encode_family(&labels)?)?;
        }
        for (name, help, value) in PLACES {
            let kind = ConstGauge::new(0.0).metric_type();
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for served in self.0.models() {
                if let Some(split) = &served.split {
                    let labels = [("model", served.card.name.as_str())];
                    let value = value(split, &served.engine.load());
                    ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
                }
            }
        }
        let help = "Bytes of hidden rows that went from the layers on the GPU to those on the CPU";
        let kind = ConstCounter::new(0u64).metric_type();
        let mut family = encoder.encode_descriptor("model_moved_bytes", help, None, kind)?;
        for served in self.0.models() {
            if let Some(split) = &served.split {
                let labels = [("model", served.card.name.as_str())];
                let moved = split.moved_bytes();
                ConstCounter::new(moved).encode(family.encode_family(&labels)?)?;
            }
        }
        let help = "1 for a model that is not served because something is wrong with it";
        let mut family = encoder.encode_descriptor("model_failed", help, None, kind)?;
        let core = self.0.stored.core();
        let faults = core.with(|core| core.loads.faults().clone());
        for name in faults.keys() {
            let labels = [("model", name.as_str())];
            ConstGauge::new(1.0).encode(family.encode_family(&labels)?)?;
        }
        for (name, help, value) in GAUGES {
            let kind = ConstGauge::new(0.0).metric_type();
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for (model, load) in &loads {
                let labels = [("model", model.as_str())];
                ConstGauge::new(value(load)).encode(family.encode_family(&labels)?)?;
            }
        }
        for (name, help, value) in COUNTERS {
            let kind = ConstCounter::new(0u64).metric_type();
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for (model, load) in &loads {
                let labels = [("model", model.as_str())];
                ConstCounter::new(value(load)).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for EngineCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EngineCollector")
    }
}

type Place = (&'static str, &'static str, fn(&Split, &Load) -> f64);

/// Figures of a model that runs on a GPU, wholly or in part.
const PLACES: [Place; 5] = [
    (
        "model_device_layers",
        "Layers of the model on the GPU",
        |split, _| split.device_layers.len() as f64,
    ),
    (
        "model_expert_layers",
        "Layers of the model on the GPU whose experts the CPU computes",
        |split, _| split.expert_layers.into(),
    ),
    (
        "model_spilled_layers",
        "Layers of the model on the CPU because they do not fit the GPU",
        |split, _| split.cpu_layers.len() as f64,
    ),
    (
        "model_device_bytes",
        "Weights and KV cache of the model on the GPU",
        |split, _| split.memory.used() as f64,
    ),
    (
        "model_spilled_bytes",
        "Weights and KV cache in use of layers and experts that do not fit the GPU",
        |split, load| {
            let rows = load.kv_tokens_used as f64;
            split.cpu_weight_bytes as f64 + rows * split.cpu_kv_bytes_per_token as f64
        },
    ),
];

type Figure<T> = (&'static str, &'static str, fn(&Load) -> T);

const GAUGES: [Figure<f64>; 8] = [
    ("requests_running", "Requests that hold a slot", |l| {
        l.running.into()
    }),
    ("requests_queued", "Requests that wait for a slot", |l| {
        l.queued.into()
    }),
    ("kv_used_tokens", "KV cache that requests use", |l| {
        l.kv_tokens_used as f64
    }),
    (
        "kv_reserved_tokens",
        "KV cache that requests are expected to use",
        |l| l.kv_tokens_reserved as f64,
    ),
    ("kv_capacity_tokens", "KV cache there is", |l| {
        l.kv_tokens_total as f64
    }),
    (
        "prefill_backlog_tokens",
        "Prompt tokens not yet computed",
        |l| l.prefill_backlog as f64,
    ),
    (
        "decode_tokens_per_second",
        "Decode speed over all streams",
        |l| l.decode_tps.into(),
    ),
    ("prefill_tokens_per_second", "Prefill speed", |l| {
        l.prefill_tps.into()
    }),
];

const COUNTERS: [Figure<u64>; 8] = [
    ("steps", "Steps run", |l| l.totals.steps),
    ("decode_tokens", "Rows that continued answers", |l| {
        l.totals.decode_rows
    }),
    ("prefill_tokens", "Prompt tokens computed", |l| {
        l.totals.prefill_rows
    }),
    (
        "reused_tokens",
        "Prompt tokens found in the KV cache",
        |l| l.totals.reused_tokens,
    ),
    (
        "answers_finished",
        "Requests that ended with an answer",
        |l| l.totals.finished,
    ),
    ("answers_failed", "Requests that ended with an error", |l| {
        l.totals.failed
    }),
    ("answers_cancelled", "Requests that were cancelled", |l| {
        l.totals.cancelled
    }),
    (
        "answers_preempted",
        "How often a request gave its KV memory to older ones and went on later",
        |l| l.totals.preempted,
    ),
];
