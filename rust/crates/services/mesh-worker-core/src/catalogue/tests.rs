use super::*;
use crate::testing::{map, named, piece, rules, seat};

/// A catalogue whose steps are carried out by hand, in simulated time.
struct Sim {
    catalogue: Catalogue,
    map: Arc<PieceMap>,
    now: Instant,
}

impl Sim {
    /// A worker that has no piece of a model with these many.
    fn new(pieces: u32) -> Self {
        let map = map("m", pieces);
        let replica = Replica::new(map.clone(), PieceSet::none(pieces));
        let mut catalogue = Catalogue::new(rules(), [replica]);
        catalogue.connected("own".to_owned(), 7781);
        Sim {
            catalogue,
            map,
            now: Instant::now(),
        }
    }

    fn of(&self) -> Digest {
        self.map.fingerprint()
    }

    fn want(&mut self) -> u64 {
        let (of, all) = (self.of(), self.map.all());
        let wanted = self.catalogue.want(&of, all, 0, self.now);
        wanted.unwrap().expect("pieces are missing").0
    }

    fn told(&mut self, nodes: &[&str]) {
        let fingerprint = self.of().to_string();
        self.tell(|told| {
            told.fingerprint = fingerprint;
            told.holders = nodes.iter().map(|node| seat(node)).collect();
        });
    }

    fn tell(&mut self, change: impl FnOnce(&mut ModelSources)) {
        let mut told = ModelSources {
            name: self.catalogue.known.replicas[&self.of()].title(),
            ..ModelSources::default()
        };
        change(&mut told);
        self.catalogue.sources_told(Sources { models: vec![told] });
    }

    fn poll(&mut self) -> DownloadStep {
        let of = self.of();
        self.catalogue.poll_download(&of, self.now)
    }

    /// Steps until the next wait, each answered as a machine does on which all goes well.
    fn run(&mut self) -> Vec<DownloadStep> {
        let of = self.of();
        let mut steps = Vec::new();
        loop {
            let step = self.poll();
            match &step {
                DownloadStep::Prepare(_) => self.catalogue.prepared(&of, Ok(())),
                DownloadStep::Store { .. } => self.catalogue.stored(&of, Ok(())),
                DownloadStep::Wait(until) => {
                    assert!(*until >= self.now);
                    return steps;
                }
                DownloadStep::End | DownloadStep::FetchFromHub(..) => {
                    steps.push(step);
                    return steps;
                }
                _ => {}
            }
            assert!(steps.len() < 10_000, "no end: {step:?}");
            steps.push(step);
        }
    }

    fn later(&mut self, seconds: f64) -> Vec<DownloadStep> {
        self.now += Duration::from_secs_f64(seconds);
        self.run()
    }

    fn send(&mut self, node: &str, number: u32) {
        let wanted = self.map.wanted(number).unwrap();
        let verified = wanted.verify(&piece(number)).unwrap();
        self.event(node, SourceEvent::Piece(verified));
    }

    fn event(&mut self, node: &str, event: SourceEvent) {
        let of = self.of();
        self.catalogue
            .source_event(&of, node.to_owned(), event, self.now);
    }

    fn gone(&mut self, node: &str, reason: &str, refused: bool) {
        let reason = reason.to_owned();
        self.event(node, SourceEvent::Gone { reason, refused });
    }
}

fn opened(steps: &[DownloadStep]) -> Vec<&str> {
    let opened = steps.iter().filter_map(|step| match step {
        DownloadStep::Open(seat) => Some(&*seat.node_id),
        _ => None,
    });
    opened.collect()
}

fn asked(steps: &[DownloadStep]) -> Vec<(&str, u32)> {
    let asked = steps.iter().filter_map(|step| match step {
        DownloadStep::Ask(node, wanted) => Some((&**node, wanted.piece)),
        _ => None,
    });
    asked.collect()
}

/// The model, from the hub, under the name that it is sought by.
fn from_hub() -> DownloadStep {
    DownloadStep::FetchFromHub("acme/m".to_owned(), "acme/m".to_owned())
}

#[test]
fn a_download_uses_its_sources_and_ends_when_all_pieces_are_stored() {
    let mut sim = Sim::new(2);
    let want = sim.want();
    assert_eq!(opened(&sim.run()), [] as [&str; 0], "nobody has it");
    sim.told(&["a", "own"]);
    sim.catalogue.lan_found(vec![seat("a"), seat("b")]);
    assert_eq!(opened(&sim.later(0.1)), ["a", "b"]);
    sim.event("a", SourceEvent::Has(PieceSet::all(2)));
    let steps = sim.run();
    assert_eq!(asked(&steps).len(), 2, "{steps:?}");
    for piece in 0..2 {
        assert_eq!(sim.catalogue.take_result(want), None);
        sim.send("a", piece);
    }
    let steps = sim.run();
    assert!(steps.contains(&DownloadStep::Store { all: false }));
    assert_eq!(steps.last(), Some(&DownloadStep::End));
    assert_eq!(sim.catalogue.take_result(want), Some(Ok(())));
    assert_eq!(sim.catalogue.take_result(want), None, "it is told once");
    let (of, all) = (sim.of(), sim.map.all());
    assert_eq!(sim.catalogue.want(&of, all, 0, sim.now), Ok(None));
}

#[test]
fn a_source_that_fails_is_tried_again_after_a_pause_and_one_without_the_model_later() {
    let mut sim = Sim::new(1);
    sim.want();
    sim.told(&["a", "b"]);
    assert_eq!(opened(&sim.run()), ["a", "b"]);
    sim.gone("a", "no route", false);
    sim.gone("b", "it refused", true);
    assert!(opened(&sim.later(1.9)).is_empty());
    assert_eq!(opened(&sim.later(0.2)), ["a"]);
    assert!(opened(&sim.later(27.0)).is_empty());
    assert_eq!(opened(&sim.later(1.0)), ["b"]);
}

#[test]
fn a_source_that_the_head_no_longer_names_is_closed() {
    let mut sim = Sim::new(1);
    sim.want();
    sim.told(&["a"]);
    sim.run();
    sim.told(&["b"]);
    let steps = sim.later(0.1);
    let close = DownloadStep::Close {
        source: "a".to_owned(),
        bad: false,
    };
    assert!(steps.contains(&close));
    assert_eq!(opened(&steps), ["b"]);
}

#[test]
fn sources_are_bounded() {
    let mut sim = Sim::new(1);
    sim.want();
    let nodes: Vec<String> = (0..1000).map(|node| node.to_string()).collect();
    let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
    sim.told(&nodes);
    assert_eq!(opened(&sim.run()).len(), 16);
    assert!(opened(&sim.later(1.0)).is_empty());
}

#[test]
fn a_source_with_a_wrong_piece_is_accused_and_not_used_again() {
    let mut sim = Sim::new(2);
    sim.want();
    sim.told(&["a"]);
    sim.run();
    sim.event("a", SourceEvent::Has(PieceSet::all(2)));
    assert_eq!(asked(&sim.run()).len(), 2);
    let bad = sim.map.wanted(0).unwrap().verify(b"lies").unwrap_err();
    sim.event("a", SourceEvent::Bad(bad));
    let close = DownloadStep::Close {
        source: "a".to_owned(),
        bad: true,
    };
    assert!(sim.run().contains(&close));
    let (models, _) = sim.catalogue.report(None).unwrap();
    assert_eq!(models.bad.len(), 1);
    assert_eq!(models.bad[0].node_id, "a");
    assert!(opened(&sim.later(600.0)).is_empty());
}

#[test]
fn a_disk_that_is_full_fails_the_requests_and_the_next_request_begins_anew() {
    let mut sim = Sim::new(2);
    let want = sim.want();
    let of = sim.of();
    assert!(matches!(sim.poll(), DownloadStep::Prepare(_)));
    sim.catalogue.prepared(&of, Err("no space".to_owned()));
    let failed = Err("no space".to_owned());
    assert_eq!(sim.catalogue.take_result(want), Some(failed.clone()));
    assert_eq!(sim.run().last(), Some(&DownloadStep::End));
    // In the middle of it.
    let want = sim.want();
    sim.run();
    sim.event("a", SourceEvent::DiskFailed("no space".to_owned()));
    assert_eq!(sim.catalogue.take_result(want), Some(failed));
    assert_eq!(sim.run().last(), Some(&DownloadStep::End));
    // When whole files are stored: what is on the disk is looked up.
    let want = sim.want();
    sim.run();
    (0..2).for_each(|piece| sim.send("a", piece));
    assert_eq!(sim.poll(), DownloadStep::Store { all: false });
    sim.catalogue
        .stored(&of, Err(("no space".to_owned(), false)));
    assert_eq!(sim.poll(), DownloadStep::Look);
    sim.catalogue.look_result(&of, PieceSet::none(2));
    assert!(sim.catalogue.take_result(want).unwrap().is_err());
    assert_eq!(sim.run().last(), Some(&DownloadStep::End));
    sim.want();
}

#[test]
fn a_request_that_comes_while_a_download_ends_is_not_lost() {
    let mut sim = Sim::new(2);
    let of = sim.of();
    let headers = PieceSet::of(2, [0]);
    sim.catalogue.want(&of, headers, 0, sim.now).unwrap();
    sim.run();
    sim.send("a", 0);
    assert_eq!(sim.poll(), DownloadStep::Store { all: false });
    sim.catalogue.stored(&of, Ok(()));
    assert_eq!(sim.poll(), DownloadStep::Store { all: true });
    let rest = sim.want();
    sim.catalogue.stored(&of, Ok(()));
    assert!(matches!(sim.poll(), DownloadStep::Prepare(missing) if missing.len() == 1));
    sim.catalogue.prepared(&of, Ok(()));
    sim.run();
    sim.send("a", 1);
    assert_eq!(sim.run().last(), Some(&DownloadStep::End));
    assert_eq!(sim.catalogue.take_result(rest), Some(Ok(())));
}

#[test]
fn a_download_that_is_given_up_fails_all_its_requests() {
    let mut sim = Sim::new(1);
    let of = sim.of();
    let (waits, new) = (sim.want(), {
        sim.run();
        sim.want()
    });
    sim.catalogue.give_up_download(&of, "it panicked");
    for want in [waits, new] {
        assert!(sim.catalogue.take_result(want).unwrap().is_err());
    }
    assert_eq!(sim.poll(), DownloadStep::End);
}

#[test]
fn results_that_nobody_waits_for_are_not_kept() {
    let mut sim = Sim::new(1);
    let of = sim.of();
    for _ in 0..100 {
        let want = sim.want();
        sim.catalogue.forget_want(&of, want);
        sim.run();
    }
    sim.send("a", 0);
    sim.run();
    assert!(sim.catalogue.results.is_empty());
}

#[test]
fn a_false_manifest_is_forgotten_and_its_name_not_believed_again() {
    let mut sim = Sim::new(1);
    let of = sim.of();
    let want = sim.want();
    sim.run();
    sim.send("a", 0);
    assert_eq!(sim.poll(), DownloadStep::Store { all: false });
    sim.catalogue
        .stored(&of, Err(("another digest".to_owned(), true)));
    assert_eq!(sim.poll(), DownloadStep::Discard);
    assert!(sim.catalogue.take_result(want).unwrap().is_err());
    assert!(sim.catalogue.replica(&of).is_none());
    assert!(sim.catalogue.shared(&of.to_string()).is_none());
    assert!(sim.catalogue.report(None).unwrap().0.held.is_empty());
    assert!(sim.catalogue.want(&of, sim.map.all(), 0, sim.now).is_err());
    assert_eq!(sim.run().last(), Some(&DownloadStep::End));
    // Offered again, it is not what the search wants.
    let replica = Replica::new(sim.map.clone(), sim.map.all());
    sim.catalogue.add(replica, Some("m"));
    assert_eq!(sim.catalogue.search("m", Vec::new), Found::Search);
}

#[test]
fn what_no_worker_has_comes_from_the_hub_for_as_long_as_the_head_wants_it() {
    let mut sim = Sim::new(3);
    let of = sim.of();
    sim.catalogue.name(&of, "acme/m");
    let want = sim.want();
    sim.run();
    sim.tell(|told| told.origin = true);
    let steps = sim.later(0.1);
    let hub = from_hub();
    assert_eq!(steps.last(), Some(&hub), "{steps:?}");
    assert!(steps.contains(&DownloadStep::Store { all: true }));
    assert!(sim.catalogue.keeps_hub(&of));
    sim.tell(|told| told.origin = false);
    assert!(!sim.catalogue.keeps_hub(&of));
    // One piece had come by then; the others come from workers.
    sim.catalogue.look_result(&of, PieceSet::of(3, [1]));
    sim.catalogue.hub_ended(&of, None, sim.now);
    assert!(matches!(sim.poll(), DownloadStep::Prepare(missing) if missing.len() == 2));
    sim.catalogue.prepared(&of, Ok(()));
    sim.run();
    [0, 2].into_iter().for_each(|piece| sim.send("a", piece));
    sim.run();
    assert_eq!(sim.catalogue.take_result(want), Some(Ok(())));
}

#[test]
fn a_hub_that_fails_is_left_alone_for_a_while() {
    let mut sim = Sim::new(1);
    let of = sim.of();
    sim.catalogue.name(&of, "acme/m");
    sim.want();
    sim.run();
    sim.tell(|told| told.origin = true);
    sim.later(0.1);
    let failure = Some(("503".to_owned(), Duration::from_secs(30)));
    sim.catalogue.hub_ended(&of, failure, sim.now);
    sim.run();
    assert!(sim.catalogue.lacking().contains("(503)"));
    assert!(sim.later(29.0).is_empty());
    let hub = from_hub();
    assert_eq!(sim.later(1.1).last(), Some(&hub));
    assert!(!sim.catalogue.lacking().contains("503"));
}

#[test]
fn an_unlisted_replica_is_fetched_but_neither_found_nor_shared() {
    let mut sim = Sim::new(1);
    let other = map("other", 2);
    let of = other.fingerprint();
    let replica = Replica::new(other.clone(), PieceSet::none(2));
    sim.catalogue.add_unlisted(replica);
    assert!(sim.catalogue.shared(&of.to_string()).is_none());
    assert_eq!(sim.catalogue.search("other", Vec::new), Found::Search);
    let wanted = sim.catalogue.want(&of, other.all(), 0, sim.now);
    assert!(wanted.unwrap().is_some());
    assert!(
        !sim.catalogue
            .report(None)
            .unwrap()
            .0
            .held
            .iter()
            .any(|h| h.names == ["other"])
    );
    sim.catalogue.drop_unlisted(&of);
    assert!(sim.catalogue.replica(&of).is_none());
    // One that was here before stays.
    let own = sim.of();
    sim.catalogue.drop_unlisted(&own);
    assert!(sim.catalogue.replica(&own).is_some());
}

#[test]
fn one_search_for_a_name_at_a_time_and_none_for_what_is_here() {
    let mut sim = Sim::new(1);
    assert_eq!(sim.catalogue.search("m", Vec::new), Found::Here(sim.of()));
    assert_eq!(sim.catalogue.search("n", Vec::new), Found::Search);
    assert_eq!(sim.catalogue.search("n", Vec::new), Found::Busy);
    assert!(sim.catalogue.lacking().contains("n is being fetched"));
    sim.catalogue.end_search("n");
    assert_eq!(sim.catalogue.lacking(), "");
    assert_eq!(sim.catalogue.search("n", Vec::new), Found::Search);
    let named = named("short", None, None);
    let here = map("else", 2);
    let replica = Replica::new(here.clone(), here.all()).with_names([&named]);
    sim.catalogue.add(replica, None);
    assert_eq!(
        sim.catalogue.search("short", Vec::new),
        Found::Here(here.fingerprint())
    );
}

#[test]
fn the_hubs_answers_are_good_for_a_while() {
    let mut sim = Sim::new(1);
    sim.catalogue
        .hub_answered("acme/m", Err("no route".to_owned()), sim.now);
    let answer = |sim: &Sim, seconds| {
        let later = sim.now + Duration::from_secs(seconds);
        sim.catalogue.hub_answer("acme/m", later)
    };
    assert!(answer(&sim, 14).is_some_and(|answer| answer.is_err()));
    assert!(answer(&sim, 15).is_none());
    assert!(sim.catalogue.asks_hub("acme/m") && !sim.catalogue.asks_hub("m"));
}

#[test]
fn the_head_hears_of_changes_only() {
    let mut sim = Sim::new(1);
    let of = sim.of();
    let (_, version) = sim.catalogue.report(None).unwrap();
    assert!(sim.catalogue.report(Some(version)).is_none());
    // A look that finds the same pieces changes nothing.
    sim.catalogue.look_result(&of, PieceSet::none(1));
    assert!(sim.catalogue.report(Some(version)).is_none());
    sim.catalogue.look_result(&of, PieceSet::all(1));
    let (_, version) = sim.catalogue.report(Some(version)).unwrap();
    sim.catalogue.piece_lost(&of, 0);
    let (_, version) = sim.catalogue.report(Some(version)).unwrap();
    sim.catalogue.look_result(&of, PieceSet::none(1));
    assert!(sim.catalogue.report(Some(version)).is_none());
    sim.want();
    sim.run();
    let (models, version) = sim.catalogue.report(Some(version)).unwrap();
    assert_eq!(models.port, 7781);
    assert_eq!(models.sought.len(), 1);
    // The same answer of the head changes nothing.
    sim.told(&["a"]);
    let told = sim.catalogue.known.told_version;
    sim.told(&["a"]);
    assert_eq!(sim.catalogue.known.told_version, told);
    assert!(sim.catalogue.report(Some(version)).is_none());
    let alone = Rules {
        peers: false,
        ..rules()
    };
    assert!(Catalogue::new(alone, []).report(None).is_none());
}
