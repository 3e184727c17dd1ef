//! Prometheus metrics: a registry per service, and what is worth knowing about any process.
//!
//! Names carry their unit (`_seconds`, `_bytes`, `_total`). A service's own metrics are prefixed
//! `hydramesh_<service>_`; the process metrics keep the names that Prometheus client libraries share.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

pub use prometheus_client;

/// MIME type of [`Metrics::encode`]'s text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The metrics of one service.
pub struct Metrics {
    registry: Mutex<Registry>,
    prefix: String,
}

impl Metrics {
    /// Metrics for `service` (`head`, `worker`, `shim`) of this version, with the process's own already in.
    pub fn new(service: &str, version: &str) -> Self {
        let mut registry = Registry::default();
        let labels = vec![
            ("service".to_owned(), service.to_owned()),
            ("version".to_owned(), version.to_owned()),
        ];
        registry.register(
            "hydramesh_build",
            "Which program this is",
            Info::new(labels),
        );
        registry.register_collector(Box::new(ProcessCollector {
            started: SystemTime::now(),
        }));
        Self {
            registry: Mutex::new(registry),
            prefix: format!("hydramesh_{service}"),
        }
    }

    /// Registers metrics: `register` gets a registry with the service's prefix.
    pub fn register<R>(&self, register: impl FnOnce(&mut Registry) -> R) -> R {
        let mut registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        register(registry.sub_registry_with_prefix(&self.prefix))
    }

    /// All metrics in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = prometheus_client::encoding::text::encode(&mut text, &registry) {
            tracing::error!(%error, "metrics cannot be encoded");
        }
        text
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics")
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

/// Resident memory of this process in bytes, where the system tells.
pub fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

#[derive(Debug)]
struct ProcessCollector {
    started: SystemTime,
}

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut gauge = |name, help, value: f64| {
            let metric = ConstGauge::new(value);
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        let started = self.started.duration_since(UNIX_EPOCH).unwrap_or_default();
        gauge(
            "process_start_time_seconds",
            "Start of the process since the Unix epoch",
            started.as_secs_f64(),
        )?;
        if let Some(bytes) = resident_bytes() {
            gauge(
                "process_resident_memory_bytes",
                "Resident memory",
                bytes as f64,
            )?;
        }
        if let Ok(entries) = std::fs::read_dir("/proc/self/fd") {
            gauge(
                "process_open_fds",
                "Open file descriptors",
                entries.count() as f64,
            )?;
        }
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
            let micros =
                usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
            let metric = ConstCounter::new(micros as f64 / 1e6);
            let help = "User and system processor time";
            metric.encode(encoder.encode_descriptor(
                "process_cpu_seconds",
                help,
                None,
                metric.metric_type(),
            )?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::metrics::counter::Counter;

    #[test]
    fn a_scrape_has_the_process_the_build_and_the_services_own_metrics() {
        let metrics = Metrics::new("head", "1.2.3");
        let requests = Counter::<u64>::default();
        metrics
            .register(|registry| registry.register("requests", "Requests taken", requests.clone()));
        requests.inc_by(7);
        let text = metrics.encode();
        assert!(text.contains("hydramesh_head_requests_total 7"), "{text}");
        assert!(
            text.contains("hydramesh_build_info{service=\"head\",version=\"1.2.3\"} 1"),
            "{text}"
        );
        for name in [
            "process_resident_memory_bytes",
            "process_open_fds",
            "process_start_time_seconds",
            "process_cpu_seconds_total",
        ] {
            let sample = text
                .lines()
                .find_map(|line| line.strip_prefix(&format!("{name} ")))
                .expect(name);
            assert!(
                sample.parse::<f64>().expect("a number") > 0.0,
                "{name} {sample}"
            );
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn resident_memory_is_plausible() {
        let bytes = resident_bytes().expect("Linux tells");
        assert!((100_000..64 << 30).contains(&bytes), "{bytes}");
    }
}
