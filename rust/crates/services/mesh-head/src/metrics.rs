//! The head's Prometheus metrics.

use std::fmt;
use std::hash::Hash;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mesh_service::metrics::prometheus_client::collector::Collector;
use mesh_service::metrics::prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric,
};
use mesh_service::metrics::prometheus_client::metrics::counter::Counter;
use mesh_service::metrics::prometheus_client::metrics::family::Family;
use mesh_service::metrics::prometheus_client::metrics::gauge::Gauge;
use mesh_service::metrics::prometheus_client::metrics::histogram::Histogram;
use mesh_service::metrics::prometheus_client::registry::{Metric, Registry, Unit};

use mesh_audit::writer::Counts;
use mesh_control::fair::Ingress;
use mesh_control::rings::RingCounts;
use mesh_control::tracker::TrackerCounts;

use mesh_gossip::{Counts as GossipCounts, Member, MemberState, REFUSALS};

use crate::locks::lock;
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Front {
    Http,
    Dcf,
}

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
    Timeout,
    /// Workers failed on it.
    Failed,
}

/// Labels of the request metrics.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct RequestLabels {
    pub front: Front,
    pub outcome: Outcome,
}

/// One label, such as `("worker", "laptop")`.
type Label<T = String> = [(&'static str, T); 1];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PartLabels {
    model: String,
    part: &'static str,
    phase: String,
}

type Durations<L> = Family<L, Histogram, fn() -> Histogram>;

/// All of them. Clones share their values.
#[derive(Debug, Clone)]
pub(crate) struct HeadMetrics {
    requests: Family<RequestLabels, Counter>,
    duration: Durations<RequestLabels>,
    first_token: Histogram,
    pub tokens: Counter,
    /// Prompt tokens of complete answers.
    pub prompt_tokens: Counter,
    pub embedded: Counter,
    pub images: Counter,
    /// Denoising steps of all images, those of failed attempts included.
    pub image_steps: Counter,
    /// Prompt tokens of those that a worker found in its cache.
    pub cached_tokens: Counter,
    /// Attempts that failed and were run again.
    pub reruns: Counter,
    datagrams: Family<[(&'static str, &'static str); 2], Counter>,
    workers: Family<Label<&'static str>, Gauge>,
    pub queued: Gauge,
    pub running: Gauge,
    /// Sources that requests wait of.
    pub queue_sources: Gauge,
    ingress_queued: Family<Label<&'static str>, Gauge>,
    ingress_running: Family<Label<&'static str>, Gauge>,
    queue_refusals: Family<Label<&'static str>, Counter>,
    failovers: Family<Label, Counter>,
    suspicions: Family<Label<&'static str>, Counter>,
    gaps: Durations<Label>,
    rings: RingGauges,
    bad_sources: Family<Label, Counter>,
    pub name_conflicts: Gauge,
    /// Times that a second model claimed a name.
    pub name_conflicts_found: Counter,
    duplicates: Family<Label, Counter>,
    faults: Family<Label, Counter>,
    quarantines: Family<Label, Counter>,
    clocks: ClockGauges,
    evidence: Family<Label<&'static str>, Counter>,
    audit: Family<Label<&'static str>, Counter>,
    audit_waiting: Gauge,
    gossip: Family<Label<&'static str>, Counter>,
    gossip_refused: Family<Label<&'static str>, Counter>,
    gossip_members: Family<Label<&'static str>, Gauge>,
}

impl HeadMetrics {
    /// New ones, entered into this registry in the order in which they are shown.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let mut metrics = New(registry);
        Self {
            requests: metrics.plain("requests", "Requests by front end and end"),
            duration: metrics.durations("request_duration", "From arrival to the last token"),
            first_token: metrics.seconds(
                "time_to_first_token",
                "From arrival to the first token of complete answers",
                Histogram::new(DURATIONS),
            ),
            tokens: metrics.plain("generated_tokens", "Tokens generated for clients"),
            prompt_tokens: metrics.plain("prompt_tokens", "Prompt tokens of complete answers"),
            embedded: metrics.plain("embedded_texts", "Texts embedded"),
            images: metrics.plain("images", "Images made for clients"),
            image_steps: metrics.plain("image_steps", "Denoising steps of images"),
            cached_tokens: metrics.plain(
                "cached_prompt_tokens",
                "Prompt tokens found in a KV cache",
            ),
            reruns: metrics.plain("reruns", "Attempts that failed and were run again elsewhere"),
            datagrams: metrics.plain(
                "datagrams",
                "Datagrams received, by socket and what became of them",
            ),
            workers: metrics.plain("workers", "Workers in the registry"),
            queued: metrics.plain("queued_requests", "Requests that wait for a worker"),
            running: metrics.plain("running_requests", "Requests that run on a worker"),
            queue_sources: metrics.plain(
                "queue_sources",
                "Sources with requests that wait for a worker",
            ),
            ingress_queued: metrics.plain(
                "ingress_queued_requests",
                "Requests that wait for a worker, by ingress",
            ),
            ingress_running: metrics.plain(
                "ingress_running_requests",
                "Requests that run on a worker, by ingress",
            ),
            queue_refusals: metrics.plain(
                "queue_refusals",
                "Requests refused or displaced because their source had its share of a full queue, by ingress",
            ),
            failovers: metrics.plain(
                "ring_failovers",
                "Changes of a ring's members because some were lost",
            ),
            suspicions: metrics.plain(
                "ring_suspicions",
                "Members of rings that others did not reach: doubted, linked anew, or taken for lost",
            ),
            gaps: metrics.durations(
                "ring_gap",
                "From the last token before a change of a ring's members to the first one after it",
            ),
            rings: metrics.collector(),
            bad_sources: metrics.plain(
                "model_sources_reported",
                "Reports that a worker sent something else than a model's manifest says, by that worker",
            ),
            name_conflicts: metrics.plain(
                "model_name_conflicts",
                "Names that several different models claim now",
            ),
            name_conflicts_found: metrics.plain(
                "model_name_conflicts_found",
                "Times that a second model claimed a name",
            ),
            duplicates: metrics.plain(
                "duplicate_identities",
                "Connections refused because another machine is connected with the same identity, by worker",
            ),
            faults: metrics.plain(
                "worker_faults",
                "Attempts that failed by the worker's own fault, by worker",
            ),
            quarantines: metrics.plain(
                "worker_quarantines",
                "Quarantines of workers whose answers differ from those of others, by worker",
            ),
            clocks: metrics.collector(),
            evidence: metrics.plain(
                "evidence",
                "Decisions on evidence of nodes: first, changed, held (waits for approval), refused, expelled",
            ),
            audit: metrics.plain(
                "audit_records",
                "Records of the audit trail: written, synced (signed and on disk), lost; and groups that were signed, writes that failed",
            ),
            audit_waiting: metrics.plain(
                "audit_queue",
                "Records that wait to be written to the audit trail",
            ),
            gossip: metrics.plain(
                "gossip_events",
                "Frames of gossip that were accepted, signed, carried for workers or not carried, and records that were verified",
            ),
            gossip_refused: metrics.plain(
                "gossip_refused",
                "Frames, documents and records of gossip that were refused",
            ),
            gossip_members: metrics.plain("gossip_members", "Peers in the gossip by state"),
        }
    }

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
        let label = [("ingress", ingress.name())];
        set(&self.ingress_queued.get_or_create(&label), waiting);
        set(&self.ingress_running.get_or_create(&label), running);
    }

    /// A request found no place in the queue, or lost it.
    pub(crate) fn queue_refused(&self, ingress: Ingress) {
        let label = [("ingress", ingress.name())];
        self.queue_refusals.get_or_create(&label).inc();
    }

    /// The registry's size, by the kinds of workers.
    pub(crate) fn workers(&self, kinds: [(&'static str, usize); 3]) {
        for (kind, count) in kinds {
            set(&self.workers.get_or_create(&[("kind", kind)]), count);
        }
    }

    pub(crate) fn tracked(&self, counts: &TrackerCounts) {
        for (worker, reports) in &counts.bad_sources {
            count(&self.bad_sources, ("worker", worker), *reports);
        }
        self.name_conflicts_found.inc_by(counts.conflicts);
    }

    /// An attempt failed, by this worker's own fault.
    pub(crate) fn at_fault(&self, worker: &str) {
        count(&self.faults, ("worker", worker), 1);
    }

    pub(crate) fn quarantined(&self, worker: &str) {
        count(&self.quarantines, ("worker", worker), 1);
    }

    /// A second machine with the identity of this worker was refused.
    pub(crate) fn duplicate(&self, worker: &str) {
        count(&self.duplicates, ("worker", worker), 1);
    }

    /// Sets the lead of every worker's clock over this head's, in seconds.
    pub(crate) fn clocks(&self, offsets: impl Iterator<Item = (String, f64)>) {
        let fresh = ClockFamily::default();
        for (worker, offset) in offsets {
            fresh.get_or_create(&[("worker", worker)]).set(offset);
        }
        *lock(&self.clocks.0) = fresh;
    }

    /// There was a decision on evidence of a node.
    pub(crate) fn evidence(&self, decision: &'static str) {
        self.evidence.get_or_create(&[("decision", decision)]).inc();
    }

    /// Brings the numbers of the audit trail up to date.
    pub(crate) fn audited(&self, counts: &Counts) {
        for (state, count) in [
            ("written", &counts.written),
            ("synced", &counts.synced),
            ("lost", &counts.lost),
            ("groups", &counts.groups),
            ("failures", &counts.failures),
        ] {
            let counter = self.audit.get_or_create(&[("state", state)]);
            counter.inc_by(count.load(Ordering::Relaxed).saturating_sub(counter.get()));
        }
        let waiting = counts.waiting.load(Ordering::Relaxed);
        self.audit_waiting
            .set(i64::try_from(waiting).unwrap_or(i64::MAX));
    }

    /// `carried` has the frames that were carried for workers, and those that were not.
    pub(crate) fn gossiped(&self, counts: GossipCounts, carried: [u64; 2], members: &[Member]) {
        let raise = |counter: &Counter, to: u64| {
            counter.inc_by(to.saturating_sub(counter.get()));
        };
        for (event, count) in [
            ("accepted", counts.accepted),
            ("signed", counts.sent),
            ("records", counts.records),
            ("relayed", carried[0]),
            ("not_relayed", carried[1]),
        ] {
            raise(&self.gossip.get_or_create(&[("event", event)]), count);
        }
        for ((_, reason), count) in REFUSALS.iter().zip(counts.refused) {
            raise(
                &self.gossip_refused.get_or_create(&[("reason", *reason)]),
                count,
            );
        }
        for (name, state) in [
            ("alive", MemberState::Alive),
            ("suspect", MemberState::Suspect),
            ("down", MemberState::Down),
            ("unheard", MemberState::Unheard),
        ] {
            let same = members.iter().filter(|member| member.state == state);
            set(
                &self.gossip_members.get_or_create(&[("state", name)]),
                same.count(),
            );
        }
    }

    pub(crate) fn ring_events(&self, counts: &RingCounts) {
        for (model, failovers) in &counts.failovers {
            count(&self.failovers, ("model", model), *failovers);
        }
        for (verdict, times) in [
            ("Doubted", counts.doubted),
            ("Relinked", counts.relinked),
            ("Lost", counts.lost),
        ] {
            if times > 0 {
                let counter = self.suspicions.get_or_create(&[("verdict", verdict)]);
                counter.inc_by(times);
            }
        }
        for (model, gap) in &counts.gaps {
            self.ring_gap(model, *gap);
        }
    }

    /// Records the time for which an answer stood still because a ring's members changed.
    pub(crate) fn ring_gap(&self, model: &str, gap: Duration) {
        let histogram = self.gaps.get_or_create(&[("model", model.to_owned())]);
        histogram.observe(gap.as_secs_f64());
    }

    pub(crate) fn rings(&self, rings: &[mesh_api::Ring]) {
        self.rings.set(rings);
    }

    pub(crate) fn datagrams(&self, socket: &'static str) -> DatagramCounters {
        let counter = |outcome| {
            let labels = [("socket", socket), ("outcome", outcome)];
            self.datagrams.get_or_create_owned(&labels)
        };
        DatagramCounters {
            accepted: counter("accepted"),
            malformed: counter("malformed"),
            untrusted: counter("untrusted"),
            unexpected: counter("unexpected"),
        }
    }
}

/// Makes metrics and enters them into a registry.
struct New<'a>(&'a mut Registry);

impl New<'_> {
    fn plain<M: Metric + Clone + Default>(&mut self, name: &str, help: &str) -> M {
        let metric = M::default();
        self.0.register(name, help, metric.clone());
        metric
    }

    fn seconds<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.0
            .register_with_unit(name, help, Unit::Seconds, metric.clone());
        metric
    }

    fn durations<L>(&mut self, name: &str, help: &str) -> Durations<L>
    where
        Durations<L>: Metric + Clone,
        L: Clone + Hash + Eq,
    {
        self.seconds(
            name,
            help,
            Family::new_with_constructor(|| Histogram::new(DURATIONS)),
        )
    }

    fn collector<C: Collector + Clone + Default>(&mut self) -> C {
        let collector = C::default();
        self.0.register_collector(Box::new(collector.clone()));
        collector
    }
}

/// Sets a gauge to a count.
pub(crate) fn set(gauge: &Gauge, count: usize) {
    gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
}

fn count(family: &Family<Label, Counter>, (label, value): (&'static str, &str), more: u64) {
    family
        .get_or_create(&[(label, value.to_owned())])
        .inc_by(more);
}

/// Gauges of the rings. They are replaced together, so that no reader sees half of a change.
#[derive(Debug, Clone, Default)]
struct RingGauges(Arc<Mutex<RingFamilies>>);

#[derive(Debug, Default)]
struct RingFamilies {
    stages: Family<PartLabels, Gauge>,
    mirror_lag: Family<Label, Gauge>,
}

impl RingGauges {
    fn set(&self, rings: &[mesh_api::Ring]) {
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
                let label = [("model", ring.model.clone())];
                let lag = i64::try_from(stage.lag_rows).unwrap_or(i64::MAX);
                fresh.mirror_lag.get_or_create(&label).inc_by(lag);
            }
        }
        *lock(&self.0) = fresh;
    }
}

impl Collector for RingGauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let families = lock(&self.0);
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

type ClockFamily = Family<Label, Gauge<f64, std::sync::atomic::AtomicU64>>;

impl Collector for ClockGauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let family = lock(&self.0);
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
