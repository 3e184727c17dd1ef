use super::*;
use crate::replica::Replica;
use crate::rules::Rules;
use crate::testing::{map, named, rules, seat};

const NAME: &str = "acme/m";

/// A search in simulated time.
struct Sim {
    now: Instant,
    known: Knowledge,
    search: Search,
}

impl Sim {
    fn new(name: &str, rules: Rules) -> Self {
        let mut known = Knowledge {
            rules,
            own: Some(("this worker".to_owned(), 9)),
            ..Knowledge::default()
        };
        Sim {
            now: Instant::now(),
            search: Search::new(name, vec!["near-m".to_owned()], &mut known),
            known,
        }
    }

    fn poll(&mut self) -> SearchStep {
        self.search.poll(self.now, &mut self.known)
    }

    fn waits(&mut self) -> bool {
        matches!(self.poll(), SearchStep::Wait(until) if until > self.now)
    }

    /// Goes on in time to the next round.
    fn next_round(&mut self) -> SearchStep {
        self.now += AGAIN;
        self.poll()
    }

    fn tell(&mut self, change: impl FnOnce(&mut ModelSources)) {
        change(self.known.told.entry(self.search.name.clone()).or_default());
        self.known.told_version += 1;
    }

    fn doubt(&mut self, fingerprint: Digest, doubt: Doubt) {
        let now = self.now;
        self.search
            .doubted(fingerprint, "a worker", doubt, now, &mut self.known);
    }

    fn sought(&self) -> &SoughtModel {
        &self.known.report.sought[&self.search.name]
    }
}

use mesh_proto::SoughtModel;

fn other() -> Doubt {
    Doubt::Other("the hub has another".to_owned())
}

#[test]
fn each_source_is_asked_for_the_manifest_in_turn_and_later_again() {
    let mut sim = Sim::new(NAME, rules());
    assert!(sim.waits());
    let fingerprint = map("m", 1).fingerprint();
    sim.tell(|told| {
        told.fingerprint = fingerprint.to_string();
        told.holders = vec![seat("a"), seat("b")];
    });
    for round in 0..3 {
        for node in ["a", "b"] {
            let asks = SearchStep::FetchManifest(fingerprint, seat(node));
            assert_eq!(sim.poll(), asks, "round {round}");
        }
        assert!(sim.waits());
        sim.now += AGAIN;
    }
    // A source that came meanwhile is asked without a wait, and one that went is not.
    assert!(matches!(sim.poll(), SearchStep::FetchManifest(..)));
    assert!(matches!(sim.poll(), SearchStep::FetchManifest(..)));
    assert!(sim.waits());
    sim.tell(|told| told.holders = vec![seat("c")]);
    assert_eq!(
        sim.poll(),
        SearchStep::FetchManifest(fingerprint, seat("c"))
    );
    assert!(sim.waits());
}

#[test]
fn a_refuted_manifest_is_not_asked_for_again_until_an_operator_pins_it() {
    let mut sim = Sim::new(NAME, rules());
    let fingerprint = map("m", 1).fingerprint();
    sim.tell(|told| {
        told.fingerprint = fingerprint.to_string();
        told.holders = vec![seat("a"), seat("b")];
    });
    assert!(matches!(sim.poll(), SearchStep::FetchManifest(..)));
    sim.doubt(fingerprint, other());
    // Others have the same one.
    assert!(sim.waits());
    assert_eq!(sim.sought().refused, [fingerprint.to_string()]);
    assert!(matches!(sim.next_round(), SearchStep::Wait(_)));
    sim.tell(|told| {
        told.pin = fingerprint.to_string();
        told.pinned_by_operator = true;
    });
    assert!(matches!(sim.poll(), SearchStep::FetchManifest(..)));
    assert!(sim.sought().refused.is_empty());
}

#[test]
fn a_manifest_that_nobody_vouches_for_is_tried_again() {
    let mut sim = Sim::new(NAME, rules());
    let fingerprint = map("m", 1).fingerprint();
    sim.tell(|told| {
        told.fingerprint = fingerprint.to_string();
        told.holders = vec![seat("a")];
    });
    for _ in 0..3 {
        assert!(matches!(sim.poll(), SearchStep::FetchManifest(..)));
        sim.doubt(fingerprint, Doubt::Nobody("no pin".to_owned()));
        assert!(sim.waits());
        assert_eq!(sim.sought().origin_error, "no pin");
        assert!(sim.sought().refused.is_empty());
        sim.now += AGAIN;
    }
}

#[test]
fn a_false_manifest_is_never_fetched_again() {
    let mut sim = Sim::new(NAME, rules());
    let fingerprint = map("m", 1).fingerprint();
    sim.known.false_manifests.insert(fingerprint);
    sim.tell(|told| {
        told.fingerprint = fingerprint.to_string();
        told.holders = vec![seat("a")];
    });
    assert!(sim.waits());
    assert_eq!(sim.sought().unusable, [fingerprint.to_string()]);
    assert!(sim.sought().refused.is_empty(), "others may use it");
    // Not even for an operator's pin.
    sim.tell(|told| {
        told.pin = fingerprint.to_string();
        told.pinned_by_operator = true;
    });
    assert!(sim.waits());
}

#[test]
fn the_hub_is_asked_by_the_worker_that_the_head_chooses_and_left_alone_after_a_failure() {
    let mut sim = Sim::new(NAME, rules());
    assert!(sim.waits() && sim.sought().origin);
    sim.tell(|told| told.origin = true);
    assert_eq!(sim.poll(), SearchStep::Download);
    assert!(sim.search.wants_download(&sim.known));
    let (now, pause) = (sim.now, Duration::from_secs(30));
    let failure = Some(("no route".to_owned(), pause));
    sim.search
        .download_ended(failure, now, &mut sim.known.report);
    assert!(sim.waits());
    assert_eq!(sim.sought().origin_error, "no route");
    sim.now += pause - Duration::from_secs(1);
    assert!(sim.waits());
    sim.now += Duration::from_secs(1) + AGAIN;
    assert_eq!(sim.poll(), SearchStep::Download);
    assert_eq!(sim.sought().origin_error, "");
    // The head gives it to another worker meanwhile.
    sim.tell(|told| told.origin = false);
    assert!(!sim.search.wants_download(&sim.known));
    let now = sim.now;
    sim.search.download_ended(None, now, &mut sim.known.report);
    assert!(sim.waits());
}

#[test]
fn after_a_refusal_a_worker_downloads_on_its_own_if_the_head_chooses_nobody() {
    let mut sim = Sim::new(NAME, rules());
    let fingerprint = map("m", 1).fingerprint();
    sim.tell(|told| {
        told.fingerprint = fingerprint.to_string();
        told.holders = vec![seat("a")];
    });
    assert!(matches!(sim.poll(), SearchStep::FetchManifest(..)));
    sim.doubt(fingerprint, other());
    assert!(sim.waits());
    sim.now += ON_ITS_OWN;
    assert_eq!(sim.poll(), SearchStep::Download);
    assert!(
        sim.search.wants_download(&sim.known),
        "whatever the head says"
    );
}

#[test]
fn a_worker_without_a_head_decides_alone_and_one_without_a_hub_never_downloads() {
    let alone = Rules {
        has_head: false,
        ..rules()
    };
    assert_eq!(Sim::new(NAME, alone.clone()).poll(), SearchStep::Download);
    let no_hub = Rules {
        hub: false,
        ..alone.clone()
    };
    for (name, rules) in [(NAME, no_hub), ("plain", alone)] {
        let mut sim = Sim::new(name, rules);
        assert!(sim.waits(), "{name}");
        assert!(!sim.sought().origin);
    }
}

#[test]
fn a_replica_that_is_said_to_have_the_name_is_vouched_for_before_others_are_asked() {
    let mut sim = Sim::new(NAME, rules());
    let map = map("m", 1);
    let fingerprint = map.fingerprint();
    let said = named(NAME, Some("worker liar"), None);
    let replica = Replica::new(map.clone(), map.all()).with_names([&said]);
    sim.known.replicas.insert(fingerprint, replica);
    assert_eq!(sim.poll(), SearchStep::Vouch(fingerprint));
    sim.doubt(fingerprint, other());
    assert!(sim.waits());
    assert!(
        matches!(sim.next_round(), SearchStep::Wait(_)),
        "it is another"
    );
}

#[test]
fn claims_of_a_name_are_bounded() {
    let mut sim = Sim::new(NAME, rules());
    for claim in 0..1000 {
        let fingerprint = Digest::of(u32::to_be_bytes(claim));
        sim.tell(|told| {
            told.fingerprint = fingerprint.to_string();
            told.holders = vec![seat("a")];
        });
        if let SearchStep::FetchManifest(..) = sim.poll() {
            sim.doubt(fingerprint, other());
        }
        assert!(sim.waits());
    }
    assert_eq!(sim.search.others.len(), MOST_OTHERS);
    assert_eq!(sim.sought().refused.len(), MOST_OTHERS);
}

#[test]
fn a_name_that_is_pinned_to_what_nobody_has_says_so() {
    let pin = Digest::of("nobody's");
    let no_hub = Rules {
        hub: false,
        ..rules()
    };
    for name in ["m", NAME] {
        let mut sim = Sim::new(name, no_hub.clone());
        sim.tell(|told| told.pin = pin.to_string());
        assert!(sim.waits());
        let text = sim.sought().origin_error.clone();
        let release = format!("hydramesh models pins release {name}");
        assert!(
            text.contains(&pin.short()) && text.contains(&release),
            "{text}"
        );
        // This worker refused it: that is another matter.
        sim.search.others.insert(pin, String::new());
        sim.tell(|told| told.origin = false);
        assert!(sim.waits());
        let text = sim.sought().origin_error.clone();
        assert!(!text.contains("pins"), "{text}");
    }
}

#[test]
fn what_hinders_a_search_is_told_to_people() {
    let mut sim = Sim::new("near-n", rules());
    sim.tell(|_| ());
    assert!(sim.waits());
    let text = &sim.sought().origin_error;
    assert!(
        text.contains("no worker has it yet") && text.contains("near-m"),
        "{text}"
    );
    let mut sim = Sim::new(
        NAME,
        Rules {
            hub: false,
            ..rules()
        },
    );
    sim.tell(|_| ());
    assert!(sim.waits());
    assert!(sim.sought().origin_error.contains("forbids to ask the hub"));
}
