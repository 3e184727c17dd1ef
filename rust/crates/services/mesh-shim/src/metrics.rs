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
        let stats = &self.0;
        family(
            &mut encoder,
            "datagrams",
            "Datagrams and tasks by what became of them",
            "kind",
            stats.traffic.iter(),
        )?;
        family(
            &mut encoder,
            "dropped",
            "Datagrams dropped and tasks given up, by reason",
            "reason",
            stats.drops.iter(),
        )?;
        let bytes = [
            ("in", &stats.client_bytes_in),
            ("out", &stats.client_bytes_out),
        ];
        family(
            &mut encoder,
            "client_bytes",
            "Bytes from and to clients",
            "direction",
            bytes.into_iter(),
        )?;
        for (name, help, counter) in [
            (
                "open_tasks",
                "Tasks that a head works on",
                &stats.open_tasks,
            ),
            ("live_heads", "Heads heard lately", &stats.live_heads),
            (
                "current_head",
                "Index of the head that gets the tasks, in the configured order",
                &stats.current_head,
            ),
        ] {
            let gauge = ConstGauge::new(counter.get());
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        Ok(())
    }
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
