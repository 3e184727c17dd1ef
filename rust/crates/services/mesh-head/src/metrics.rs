//! The head's Prometheus metrics.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_service::metrics::prometheus_client::collector::Collector;
use mesh_service::metrics::prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric,
};
use mesh_service::metrics::prometheus_client::metrics::counter::Counter;
use mesh_service::metrics::prometheus_client::metrics::family::Family;
use mesh_service::metrics::prometheus_client::metrics::gauge::Gauge;
use mesh_service::metrics::prometheus_client::metrics::histogram::Histogram;
use mesh_service::metrics::prometheus_client::registry::{Registry, Unit};

use mesh_control::fair::Ingress;
use mesh_control::rings::{RingCounts, RingView};
use mesh_control::tracker::TrackerCounts;

/// Front end that a request came through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Front {
    /// The OpenAI API.
    Http,
    /// DCF over UDP.
    Dcf,
}

/// Outcome of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Outcome {
    /// With a whole answer.
    Complete,
    /// The client went away.
    Cancelled,
    /// No worker, or no room.
    Refused,
    /// The request itself was wrong.
    Rejected,
    /// It ran out of time.
    Timeout,
    /// Workers failed on it.
    Failed,
}

/// Labels of the request metrics.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct RequestLabels {
    /// Front end of the request.
    pub front: Front,
    /// Outcome of the request.
    pub outcome: Outcome,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DatagramLabels {
    socket: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct IngressLabel {
    ingress: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerdictLabel {
    verdict: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabel {
    model: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WorkerLabel {
    worker: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PartLabels {
    model: String,
    part: &'static str,
    phase: String,
}

/// All of them. Clones share their values.
#[derive(Debug, Clone)]
pub(crate) struct HeadMetrics {
    requests: Family<RequestLabels, Counter>,
    duration: Family<RequestLabels, Histogram, fn() -> Histogram>,
    first_token: Histogram,
    /// Tokens generated for clients.
    pub tokens: Counter,
    /// Prompt tokens of complete answers.
    pub prompt_tokens: Counter,
    /// Number of texts embedded.
    pub embedded: Counter,
    /// Prompt tokens of those that a worker found in its cache.
    pub cached_tokens: Counter,
    /// Attempts that failed and were run again.
    pub reruns: Counter,
    datagrams: Family<DatagramLabels, Counter>,
    workers: Family<KindLabel, Gauge>,
    /// Requests that wait for a worker.
    pub queued: Gauge,
    /// Requests that run on a worker.
    pub running: Gauge,
    /// Sources that requests wait of.
    pub queue_sources: Gauge,
    ingress_queued: Family<IngressLabel, Gauge>,
    ingress_running: Family<IngressLabel, Gauge>,
    queue_refusals: Family<IngressLabel, Counter>,
    failovers: Family<ModelLabel, Counter>,
    suspicions: Family<VerdictLabel, Counter>,
    gaps: Family<ModelLabel, Histogram, fn() -> Histogram>,
    rings: RingGauges,
    bad_sources: Family<WorkerLabel, Counter>,
    /// Names that several models claim now.
    pub name_conflicts: Gauge,
    /// Times that a second model claimed a name.
    pub name_conflicts_found: Counter,
    duplicates: Family<WorkerLabel, Counter>,
    faults: Family<WorkerLabel, Counter>,
    quarantines: Family<WorkerLabel, Counter>,
    clocks: ClockGauges,
}

impl HeadMetrics {
    /// New ones, entered into this registry.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            requests: Family::default(),
            duration: Family::new_with_constructor(|| Histogram::new(DURATIONS)),
            first_token: Histogram::new(DURATIONS),
            tokens: Counter::default(),
            prompt_tokens: Counter::default(),
            embedded: Counter::default(),
            cached_tokens: Counter::default(),
            reruns: Counter::default(),
            datagrams: Family::default(),
            workers: Family::default(),
            queued: Gauge::default(),
            running: Gauge::default(),
            queue_sources: Gauge::default(),
            ingress_queued: Family::default(),
            ingress_running: Family::default(),
            queue_refusals: Family::default(),
            failovers: Family::default(),
            suspicions: Family::default(),
            gaps: Family::new_with_constructor(|| Histogram::new(DURATIONS)),
            rings: RingGauges::default(),
            bad_sources: Family::default(),
            name_conflicts: Gauge::default(),
            name_conflicts_found: Counter::default(),
            duplicates: Family::default(),
            faults: Family::default(),
            quarantines: Family::default(),
            clocks: ClockGauges::default(),
        };
        let this = &metrics;
        registry.register(
            "requests",
            "Requests by front end and end",
            this.requests.clone(),
        );
        registry.register_with_unit(
            "request_duration",
            "From arrival to the last token",
            Unit::Seconds,
            this.duration.clone(),
        );
        registry.register_with_unit(
            "time_to_first_token",
            "From arrival to the first token of complete answers",
            Unit::Seconds,
            this.first_token.clone(),
        );
        registry.register(
            "generated_tokens",
            "Tokens generated for clients",
            this.tokens.clone(),
        );
        registry.register(
            "prompt_tokens",
            "Prompt tokens of complete answers",
            this.prompt_tokens.clone(),
        );
        registry.register("embedded_texts", "Texts embedded", this.embedded.clone());
        registry.register(
            "cached_prompt_tokens",
            "Prompt tokens found in a KV cache",
            this.cached_tokens.clone(),
        );
        registry.register(
            "reruns",
            "Attempts that failed and were run again elsewhere",
            this.reruns.clone(),
        );
        registry.register(
            "datagrams",
            "Datagrams received, by socket and what became of them",
            this.datagrams.clone(),
        );
        registry.register("workers", "Workers in the registry", this.workers.clone());
        registry.register(
            "queued_requests",
            "Requests that wait for a worker",
            this.queued.clone(),
        );
        registry.register(
            "running_requests",
            "Requests that run on a worker",
            this.running.clone(),
        );
        registry.register(
            "queue_sources",
            "Sources with requests that wait for a worker",
            this.queue_sources.clone(),
        );
        registry.register(
            "ingress_queued_requests",
            "Requests that wait for a worker, by ingress",
            this.ingress_queued.clone(),
        );
        registry.register(
            "ingress_running_requests",
            "Requests that run on a worker, by ingress",
            this.ingress_running.clone(),
        );
        registry.register(
            "queue_refusals",
            "Requests refused or displaced because their source had its share of a full queue, by ingress",
            this.queue_refusals.clone(),
        );
        registry.register(
            "ring_failovers",
            "Changes of a ring's members because some were lost",
            this.failovers.clone(),
        );
        registry.register(
            "ring_suspicions",
            "Members of rings that others did not reach: doubted, linked anew, or taken for lost",
            this.suspicions.clone(),
        );
        registry.register_with_unit(
            "ring_gap",
            "From the last token before a change of a ring's members to the first one after it",
            Unit::Seconds,
            this.gaps.clone(),
        );
        registry.register_collector(Box::new(this.rings.clone()));
        registry.register(
            "model_sources_reported",
            "Reports that a worker sent something else than a model's manifest says, by that worker",
            this.bad_sources.clone(),
        );
        registry.register(
            "model_name_conflicts",
            "Names that several different models claim now",
            this.name_conflicts.clone(),
        );
        registry.register(
            "model_name_conflicts_found",
            "Times that a second model claimed a name",
            this.name_conflicts_found.clone(),
        );
        registry.register(
            "duplicate_identities",
            "Connections refused because another machine is connected with the same identity, by worker",
            this.duplicates.clone(),
        );
        registry.register(
            "worker_faults",
            "Attempts that failed by the worker's own fault, by worker",
            this.faults.clone(),
        );
        registry.register(
            "worker_quarantines",
            "Quarantines of workers whose answers differ from those of others, by worker",
            this.quarantines.clone(),
        );
        registry.register_collector(Box::new(this.clocks.clone()));
        metrics
    }

    /// Counts a request that ended, and its duration.
    pub(crate) fn request_ended(&self, front: Front, outcome: Outcome, seconds: f64) {
        let labels = RequestLabels { front, outcome };
        self.requests.get_or_create(&labels).inc();
        self.duration.get_or_create(&labels).observe(seconds);
    }

    /// Records the time to the first token of a complete answer, in seconds.
    pub(crate) fn first_token(&self, seconds: f64) {
        self.first_token.observe(seconds);
    }

    /// Requests that came through `ingress`: those that wait, and those that run.
    pub(crate) fn ingress(&self, ingress: Ingress, waiting: usize, running: usize) {
        let ingress = ingress.name();
        for (family, count) in [
            (&self.ingress_queued, waiting),
            (&self.ingress_running, running),
        ] {
            family
                .get_or_create(&IngressLabel { ingress })
                .set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// A request found no place in the queue, or lost it.
    pub(crate) fn queue_refused(&self, ingress: Ingress) {
        let ingress = ingress.name();
        self.queue_refusals
            .get_or_create(&IngressLabel { ingress })
            .inc();
    }

    /// The registry's size, by the kinds of workers.
    pub(crate) fn workers(&self, kinds: [(&'static str, usize); 3]) {
        for (kind, count) in kinds {
            self.workers
                .get_or_create(&KindLabel { kind })
                .set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// Adds the tracker's counts.
    pub(crate) fn tracked(&self, counts: &TrackerCounts) {
        for (worker, reports) in &counts.bad_sources {
            let worker = worker.clone();
            let counter = self.bad_sources.get_or_create(&WorkerLabel { worker });
            counter.inc_by(*reports);
        }
        self.name_conflicts_found.inc_by(counts.conflicts);
    }

    /// An attempt failed, by this worker's own fault.
    pub(crate) fn at_fault(&self, worker: &str) {
        let worker = worker.to_owned();
        self.faults.get_or_create(&WorkerLabel { worker }).inc();
    }

    /// A worker is in quarantine.
    pub(crate) fn quarantined(&self, worker: &str) {
        let worker = worker.to_owned();
        self.quarantines
            .get_or_create(&WorkerLabel { worker })
            .inc();
    }

    /// A second machine with the identity of this worker was refused.
    pub(crate) fn duplicate(&self, worker: &str) {
        let worker = worker.to_owned();
        self.duplicates.get_or_create(&WorkerLabel { worker }).inc();
    }

    /// Sets the lead of every worker's clock over this head's, in seconds.
    pub(crate) fn clocks(&self, offsets: impl Iterator<Item = (String, f64)>) {
        let fresh = ClockFamily::default();
        for (worker, offset) in offsets {
            fresh.get_or_create(&WorkerLabel { worker }).set(offset);
        }
        *self.clocks.0.lock().unwrap_or_else(PoisonError::into_inner) = fresh;
    }

    /// Adds the rings' counts.
    pub(crate) fn ring_events(&self, counts: &RingCounts) {
        for (model, failovers) in &counts.failovers {
            let model = model.clone();
            let counter = self.failovers.get_or_create(&ModelLabel { model });
            counter.inc_by(*failovers);
        }
        for (verdict, count) in [
            ("Doubted", counts.doubted),
            ("Relinked", counts.relinked),
            ("Lost", counts.lost),
        ] {
            if count > 0 {
                let counter = self.suspicions.get_or_create(&VerdictLabel { verdict });
                counter.inc_by(count);
            }
        }
        for (model, gap) in &counts.gaps {
            self.ring_gap(model, *gap);
        }
    }

    /// Records the time for which an answer stood still because a ring's members changed.
    pub(crate) fn ring_gap(&self, model: &str, gap: Duration) {
        let model = model.to_owned();
        self.gaps
            .get_or_create(&ModelLabel { model })
            .observe(gap.as_secs_f64());
    }

    /// The rings as they are.
    pub(crate) fn rings(&self, rings: &[RingView]) {
        self.rings.set(rings);
    }

    /// Counters of one socket.
    pub(crate) fn datagrams(&self, socket: &'static str) -> DatagramCounters {
        let counter = |outcome| {
            self.datagrams
                .get_or_create_owned(&DatagramLabels { socket, outcome })
        };
        DatagramCounters {
            accepted: counter("accepted"),
            malformed: counter("malformed"),
            untrusted: counter("untrusted"),
            unexpected: counter("unexpected"),
        }
    }
}

/// Gauges of the rings. They are replaced together, so that no reader sees half of a change.
#[derive(Debug, Clone, Default)]
struct RingGauges(Arc<Mutex<RingFamilies>>);

#[derive(Debug, Default)]
struct RingFamilies {
    stages: Family<PartLabels, Gauge>,
    mirror_lag: Family<ModelLabel, Gauge>,
}

impl RingGauges {
    fn set(&self, rings: &[RingView]) {
        let fresh = RingFamilies::default();
        for ring in rings {
            for stage in &ring.stages {
                let parts = [
                    ("member", Some(&stage.member)),
                    ("standby", stage.standby.as_ref()),
                ];
                for (part, held) in parts {
                    let Some(held) = held else { continue };
                    let labels = PartLabels {
                        model: ring.model.clone(),
                        part,
                        phase: held.phase.to_string(),
                    };
                    fresh.stages.get_or_create(&labels).inc();
                }
                let model = ring.model.clone();
                fresh
                    .mirror_lag
                    .get_or_create(&ModelLabel { model })
                    .inc_by(i64::try_from(stage.lag_rows).unwrap_or(i64::MAX));
            }
        }
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = fresh;
    }
}

impl Collector for RingGauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let families = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        families.stages.encode(encoder.encode_descriptor(
            "ring_stages",
            "Stages of rings, by part (member or standby) and phase",
            None,
            families.stages.metric_type(),
        )?)?;
        families.mirror_lag.encode(encoder.encode_descriptor(
            "ring_mirror_lag_rows",
            "KV rows that the standbys of a ring do not have yet",
            None,
            families.mirror_lag.metric_type(),
        )?)
    }
}

/// Offsets of the workers' clocks, replaced together, so that those of workers that left are gone.
#[derive(Debug, Clone, Default)]
struct ClockGauges(Arc<Mutex<ClockFamily>>);

type ClockFamily = Family<WorkerLabel, Gauge<f64, std::sync::atomic::AtomicU64>>;

impl Collector for ClockGauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let family = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        family.encode(encoder.encode_descriptor(
            "worker_clock_offset",
            "How far a worker's clock is ahead of this head's",
            Some(&Unit::Seconds),
            family.metric_type(),
        )?)
    }
}

/// Counters of a socket's datagrams, by what became of them.
#[derive(Debug, Clone)]
pub(crate) struct DatagramCounters {
    /// Understood and acted upon.
    pub accepted: Counter,
    /// Not a DCF message.
    pub malformed: Counter,
    /// From a source that plain DCF is not accepted from, or with a seal that does not hold.
    pub untrusted: Counter,
    /// A message that has no business here.
    pub unexpected: Counter,
}

const DURATIONS: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];

#[cfg(test)]
mod tests {
    use mesh_service::metrics::Metrics;

    use super::*;

    #[test]
    fn the_names_carry_their_units() {
        let metrics = Metrics::new("head", "0");
        let head = metrics.register(HeadMetrics::register);
        head.request_ended(Front::Dcf, Outcome::Complete, 0.2);
        head.datagrams("clients").malformed.inc();
        head.workers([("mesh", 2), ("v5.0.0", 1), ("v5.1", 0)]);
        head.ring_events(&RingCounts {
            failovers: [("m".to_owned(), 1)].into(),
            doubted: 1,
            gaps: vec![("m".to_owned(), Duration::from_millis(300))],
            ..RingCounts::default()
        });
        head.duplicate("pi");
        head.clocks([("pi".to_owned(), -90.5)].into_iter());
        let text = metrics.encode(mesh_service::metrics::Format::OpenMetrics);
        for line in [
            "hydramesh_head_requests_total{front=\"Dcf\",outcome=\"Complete\"} 1",
            "hydramesh_head_request_duration_seconds_count{front=\"Dcf\",outcome=\"Complete\"} 1",
            "hydramesh_head_datagrams_total{socket=\"clients\",outcome=\"malformed\"} 1",
            "hydramesh_head_workers{kind=\"mesh\"} 2",
            "hydramesh_head_ring_failovers_total{model=\"m\"} 1",
            "hydramesh_head_ring_suspicions_total{verdict=\"Doubted\"} 1",
            "hydramesh_head_ring_gap_seconds_count{model=\"m\"} 1",
            "hydramesh_head_duplicate_identities_total{worker=\"pi\"} 1",
            "hydramesh_head_worker_clock_offset_seconds{worker=\"pi\"} -90.5",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
