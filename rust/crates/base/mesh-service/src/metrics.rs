//! Prometheus metrics: a registry per service, and metrics of the process.
//!
//! Names carry their unit (`_seconds`, `_bytes`, `_total`). A service's own metrics are prefixed
//! `hydramesh_<service>_`; the process metrics keep the names that Prometheus client libraries share.

use std::fmt;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use mesh_base::sync::lock;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

pub use prometheus_client;

/// The text format of a scrape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The Prometheus text format, version 0.0.4.
    Text,
    /// OpenMetrics.
    OpenMetrics,
}

impl Format {
    /// The format that an `Accept` header prefers; the text format without a preference.
    pub fn accepted(accept: Option<&str>) -> Self {
        let quality = |wanted: &dyn Fn(&str) -> bool| {
            let ranges = accept.unwrap_or("*/*").split(',');
            let qualities = ranges.filter_map(|range| {
                let mut parts = range.split(';').map(str::trim);
                let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
                let mut quality = 1.0;
                for (name, value) in parts.filter_map(|part| part.split_once('=')) {
                    if name.trim().eq_ignore_ascii_case("q") {
                        quality = value.trim().parse().unwrap_or(0.0);
                    }
                }
                wanted(&kind).then_some(quality)
            });
            qualities.fold(0.0_f32, f32::max)
        };
        let open = quality(&|kind| kind == "application/openmetrics-text");
        let text = quality(&|kind| matches!(kind, "text/plain" | "text/*"));
        if open > 0.0 && open >= text {
            Self::OpenMetrics
        } else {
            Self::Text
        }
    }

    /// MIME type of the format.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// The metrics of one service.
#[derive(Debug)]
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
        let info = Info::new(labels);
        registry.register("hydramesh_build", "Which program this is", info);
        let started = SystemTime::now();
        registry.register_collector(Box::new(ProcessCollector { started }));
        Self {
            registry: Mutex::new(registry),
            prefix: format!("hydramesh_{service}"),
        }
    }

    /// Registers metrics: `register` gets a registry with the service's prefix.
    pub fn register<R>(&self, register: impl FnOnce(&mut Registry) -> R) -> R {
        let mut registry = lock(&self.registry);
        register(registry.sub_registry_with_prefix(&self.prefix))
    }

    /// Encodes all metrics as text in this format.
    pub fn encode(&self, format: Format) -> String {
        let mut text = String::new();
        let registry = lock(&self.registry);
        if let Err(error) = prometheus_client::encoding::text::encode(&mut text, &registry) {
            tracing::error!(%error, "metrics cannot be encoded");
        }
        match format {
            Format::Text => classic(&text),
            Format::OpenMetrics => text,
        }
    }
}

/// OpenMetrics in the older text format: there a family has the name of its samples, and units, information
/// and the mark of the end are absent.
fn classic(text: &str) -> String {
    let mut classic = String::with_capacity(text.len() + text.len() / 8);
    let mut help = "";
    for line in text.lines() {
        if let Some(described) = line.strip_prefix("# HELP ") {
            help = described;
        } else if let Some(typed) = line.strip_prefix("# TYPE ") {
            let (name, kind) = typed.rsplit_once(' ').unwrap_or((typed, "untyped"));
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                "stateset" => ("", "gauge"),
                kind => ("", kind),
            };
            if let Some(help) = help.strip_prefix(name) {
                classic += &format!("# HELP {name}{suffix}{help}\n");
            }
            classic += &format!("# TYPE {name}{suffix} {kind}\n");
        } else if !line.starts_with('#') {
            classic += line;
            classic.push('\n');
        }
    }
    classic
}

/// Resident memory of this process in bytes; `None` if the system does not report it.
pub fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let mut lines = status.lines();
    let line = lines.find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

#[derive(Debug)]
struct ProcessCollector {
    started: SystemTime,
}

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut encode = |name, help, metric: &dyn EncodeMetric| {
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        let started = self.started.duration_since(UNIX_EPOCH).unwrap_or_default();
        let started = ConstGauge::new(started.as_secs_f64());
        let help = "Start of the process since the Unix epoch";
        encode("process_start_time_seconds", help, &started)?;
        if let Some(bytes) = resident_bytes() {
            let bytes = ConstGauge::new(bytes as f64);
            encode("process_resident_memory_bytes", "Resident memory", &bytes)?;
        }
        if let Ok(entries) = std::fs::read_dir("/proc/self/fd") {
            let count = ConstGauge::new(entries.count() as f64);
            encode("process_open_fds", "Open file descriptors", &count)?;
        }
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
            let time = usage.user_time() + usage.system_time();
            let seconds = ConstCounter::new(time.num_microseconds() as f64 / 1e6);
            let help = "User and system processor time";
            encode("process_cpu_seconds", help, &seconds)?;
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
        let text = metrics.encode(Format::OpenMetrics);
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
    fn the_older_format_names_families_as_their_samples() {
        let metrics = Metrics::new("head", "1.2.3");
        let requests = Counter::<u64>::default();
        metrics
            .register(|registry| registry.register("requests", "Requests taken", requests.clone()));
        let text = metrics.encode(Format::Text);
        for line in [
            "# HELP hydramesh_head_requests_total Requests taken.",
            "# TYPE hydramesh_head_requests_total counter",
            "hydramesh_head_requests_total 0",
            "# TYPE hydramesh_build_info gauge",
            "# TYPE process_cpu_seconds_total counter",
            "# TYPE process_open_fds gauge",
        ] {
            assert!(text.lines().any(|there| there == line), "{line}\n{text}");
        }
        assert!(
            !text.contains("# EOF") && !text.contains("# UNIT"),
            "{text}"
        );
    }

    #[test]
    fn open_metrics_is_for_those_who_ask_for_it() {
        for (accept, format) in [
            (None, Format::Text),
            (Some("*/*"), Format::Text),
            (Some("text/plain"), Format::Text),
            (
                Some("text/plain;version=0.0.4;q=0.5,*/*;q=0.1"),
                Format::Text,
            ),
            (Some("application/openmetrics-text"), Format::OpenMetrics),
            (
                Some("application/openmetrics-text;q=0.2, text/plain"),
                Format::Text,
            ),
            (Some("application/openmetrics-text;q=0"), Format::Text),
            (
                Some(
                    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                ),
                Format::OpenMetrics,
            ),
        ] {
            assert_eq!(Format::accepted(accept), format, "{accept:?}");
        }
    }

    #[test]
    fn resident_memory_is_plausible() {
        let bytes = resident_bytes().expect("Linux tells");
        assert!((100_000..64 << 30).contains(&bytes), "{bytes}");
    }
}
