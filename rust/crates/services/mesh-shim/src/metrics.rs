//! The counters as Prometheus metrics.

use std::{fmt, sync::Arc};

use mesh_service::metrics::prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use crate::stats::{Counter, Stats};

/// Reads the counters at every scrape; the loop knows nothing of metrics.
#[derive(Debug)]
pub struct StatsCollector(pub Arc<Stats>);

impl Collector for StatsCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (stats, encoder) = (&*self.0, &mut encoder);
        let help = "Datagrams and tasks by what became of them";
        family(encoder, "datagrams", help, "kind", stats.traffic.iter())?;
        let help = "Datagrams dropped and tasks given up, by reason";
        family(encoder, "dropped", help, "reason", stats.drops.iter())?;
        let (bytes_in, bytes_out) = (&stats.client_bytes_in, &stats.client_bytes_out);
        let bytes = [("in", bytes_in), ("out", bytes_out)].into_iter();
        let help = "Bytes from and to clients";
        family(encoder, "client_bytes", help, "direction", bytes)?;
        let help = "Tasks that a head works on";
        gauge(encoder, "open_tasks", help, &stats.open_tasks)?;
        gauge(
            encoder,
            "live_heads",
            "Heads heard lately",
            &stats.live_heads,
        )?;
        let help = "Index of the head that gets the tasks, in the configured order";
        gauge(encoder, "current_head", help, &stats.current_head)
    }
}

fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    value: &Counter,
) -> fmt::Result {
    let gauge = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    ConstGauge::new(value.get()).encode(gauge)
}

fn family<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    label: &str,
    counters: impl Iterator<Item = (&'static str, &'a Counter)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (value, counter) in counters {
        let labels = [(label, value)];
        ConstCounter::new(counter.get()).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use mesh_service::metrics::Metrics;

    use super::*;

    #[test]
    fn every_counter_is_in_a_scrape_under_its_own_label() {
        let stats = Arc::new(Stats::default());
        stats.drops.truncated.add(3);
        stats.traffic.tasks.add(5);
        stats.live_heads.set(2);
        let metrics = Metrics::new("shim", "0");
        metrics.register(|registry| registry.register_collector(Box::new(StatsCollector(stats))));
        let text = metrics.encode(mesh_service::metrics::Format::OpenMetrics);
        for line in [
            "hydramesh_shim_dropped_total{reason=\"truncated\"} 3",
            "hydramesh_shim_datagrams_total{kind=\"tasks\"} 5",
            "hydramesh_shim_client_bytes_total{direction=\"in\"} 0",
            "hydramesh_shim_live_heads 2",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is not in\n{text}"
            );
        }
    }
}
