use std::time::{Duration, Instant};

use mesh_proto::{BadSource, HeldModel, ModelSources, Models, SoughtModel};
use mesh_share::PieceSet;

use super::{Action, Tracker};
use crate::logs::Logs;

/// A head and workers, in simulated time.
struct World {
    tracker: Tracker,
    now: Instant,
    said: std::collections::BTreeMap<String, Models>,
    told: std::collections::BTreeMap<String, Vec<ModelSources>>,
}

fn fingerprint(letter: char) -> String {
    letter.to_string().repeat(64)
}

impl World {
    fn new(workers: &[&str]) -> Self {
        let mut world = World {
            tracker: Tracker::new(),
            now: Instant::now(),
            said: Default::default(),
            told: Default::default(),
        };
        for worker in workers {
            world.join(worker);
        }
        world
    }

    fn join(&mut self, worker: &str) {
        self.tracker.joined(worker, worker, None);
        self.said.insert(
            worker.to_owned(),
            Models {
                port: 7781,
                ..Models::default()
            },
        );
        self.say(worker, |_| {});
    }

    fn leave(&mut self, worker: &str) {
        self.tracker.left(worker);
        self.told.remove(worker);
        self.turn();
    }

    fn say(&mut self, worker: &str, change: impl FnOnce(&mut Models)) {
        let models = self.said.get_mut(worker).unwrap();
        change(models);
        let address = "10.0.0.1:7781".parse().ok();
        self.tracker.said(worker, address, models.clone(), self.now);
        self.turn();
    }

    fn seek(&mut self, worker: &str, name: &str) {
        self.say(worker, |models| {
            models.sought = vec![SoughtModel {
                name: name.to_owned(),
                origin: true,
                ..SoughtModel::default()
            }];
        });
    }

    fn hold(&mut self, worker: &str, letter: char, pieces: PieceSet) {
        self.say(worker, |models| {
            models.held = vec![HeldModel {
                fingerprint: fingerprint(letter),
                names: vec!["m".into()],
                bytes: 100,
                pieces: Some(pieces.to_proto()),
                signed: false,
            }];
        });
    }

    /// `worker` knows the manifest and lacks these pieces.
    fn lack(&mut self, worker: &str, letter: char, missing: PieceSet) {
        self.say(worker, |models| {
            models.sought = vec![SoughtModel {
                name: "m".into(),
                fingerprint: fingerprint(letter),
                missing: Some(missing.to_proto()),
                origin: true,
                ..SoughtModel::default()
            }];
        });
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.turn();
    }

    fn turn(&mut self) {
        for action in self.tracker.poll(self.now) {
            match action {
                Action::Tell { node, sources } => {
                    self.told.insert(node, sources.models);
                }
                Action::KeepPins => {}
            }
        }
    }

    fn told(&self, worker: &str) -> &ModelSources {
        &self.told[worker][0]
    }

    /// The worker that downloads from outside the mesh; at most one does.
    fn download(&self) -> Option<&str> {
        let told = self.told.iter();
        let mut on_it: Vec<&str> = told
            .filter(|(_, models)| models.iter().any(|model| model.origin))
            .map(|(worker, _)| worker.as_str())
            .collect();
        assert!(on_it.len() <= 1, "{on_it:?}");
        on_it.pop()
    }

    fn holders(&self, worker: &str) -> Vec<&str> {
        let holders = self.told(worker).holders.iter();
        holders.map(|holder| holder.node_id.as_str()).collect()
    }
}

#[test]
fn one_of_those_who_seek_a_model_goes_for_it_and_the_others_then_get_it_from_there() {
    let mut world = World::new(&["a", "b", "c"]);
    for worker in ["a", "b", "c"] {
        world.seek(worker, "m");
    }
    assert_eq!(world.download(), Some("a"));
    assert_eq!(world.told("b").origin_worker, "a");
    assert!(world.holders("b").is_empty());
    world.say("a", |models| models.sought.clear());
    world.hold("a", 'f', PieceSet::all(9));
    assert_eq!(world.download(), None);
    for worker in ["b", "c"] {
        assert_eq!(world.holders(worker), ["a"]);
        assert_eq!(world.told(worker).fingerprint, fingerprint('f'));
    }
}

#[test]
fn nothing_is_said_twice() {
    let mut world = World::new(&["a", "b"]);
    world.seek("a", "m");
    world.seek("b", "m");
    world.told.clear();
    world.seek("b", "m");
    world.pass(Duration::from_secs(1));
    assert!(world.told.is_empty());
}

#[test]
fn when_the_one_who_goes_dies_another_takes_over() {
    let logs = Logs::capture();
    let mut world = World::new(&["a", "b", "c"]);
    for worker in ["a", "b", "c"] {
        world.seek(worker, "m");
    }
    world.say("a", |models| models.sought[0].origin_bytes = 50);
    world.leave("a");
    assert_eq!(world.download(), Some("b"));
    let text = "another worker gets the model from outside the mesh model=\"m\" worker=\"b\"";
    assert!(logs.text().contains(text), "{}", logs.text());
    // It comes back with half of it, but the download has been given away.
    world.join("a");
    world.seek("a", "m");
    world.say("a", |models| models.sought[0].origin_bytes = 50);
    assert_eq!(world.download(), Some("b"));
}

#[test]
fn who_has_most_of_it_already_goes() {
    let mut world = World::new(&["a", "b", "c"]);
    world.seek("c", "m");
    world.seek("a", "m");
    world.say("b", |models| {
        models.sought = vec![SoughtModel {
            name: "m".into(),
            origin: true,
            origin_bytes: 10,
            ..SoughtModel::default()
        }];
    });
    assert_eq!(world.download(), Some("c"), "the first to ask has it");
    world.leave("c");
    assert_eq!(world.download(), Some("b"));
}

#[test]
fn who_cannot_or_may_not_does_not_go() {
    let logs = Logs::capture();
    let mut world = World::new(&["a", "b"]);
    world.seek("a", "m");
    world.say("a", |models| models.sought[0].origin = false);
    assert_eq!(world.download(), None);
    world.seek("b", "m");
    assert_eq!(world.download(), Some("b"));
    world.say("b", |models| {
        models.sought[0].origin_error = "401 Unauthorized".into();
    });
    assert_eq!(world.download(), None);
    let text = "outside the mesh model=\"m\" worker=\"b\" reason=\"401 Unauthorized\"";
    assert!(logs.text().contains(text), "{}", logs.text());
    // It tries again after a while, when it says that there is nothing in the way any more.
    world.say("b", |models| models.sought[0].origin_error.clear());
    assert_eq!(world.download(), None);
    world.pass(Duration::from_secs(11));
    assert_eq!(world.download(), Some("b"));
}

#[test]
fn who_brings_nothing_for_long_loses_the_download() {
    let mut world = World::new(&["a", "b"]);
    world.seek("a", "m");
    world.seek("b", "m");
    for bytes in 1..5 {
        world.pass(Duration::from_secs(20));
        world.say("a", |models| models.sought[0].origin_bytes = bytes);
        assert_eq!(world.download(), Some("a"), "it makes progress");
    }
    world.pass(Duration::from_secs(31));
    assert_eq!(world.download(), Some("b"));
    assert!(!world.told("a").origin);
}

#[test]
fn nobody_goes_for_what_workers_have_together() {
    let mut world = World::new(&["a", "b", "c"]);
    world.hold("a", 'f', PieceSet::of(10, 0..5));
    world.hold("b", 'f', PieceSet::of(10, 5..10));
    world.lack("c", 'f', PieceSet::all(10));
    assert_eq!(world.download(), None);
    assert_eq!(world.holders("c"), ["a", "b"]);
    world.leave("b");
    assert_eq!(world.download(), Some("c"));
}

#[test]
fn who_goes_gets_what_others_lack_as_well() {
    let mut world = World::new(&["a", "b", "c"]);
    world.hold("c", 'f', PieceSet::of(10, [9]));
    world.lack("a", 'f', PieceSet::of(10, 0..3));
    world.lack("b", 'f', PieceSet::of(10, 2..10));
    assert_eq!(world.download(), Some("a"));
    let for_others = world.told("a").for_others.as_ref().unwrap();
    let for_others = PieceSet::from_proto(for_others).unwrap();
    assert_eq!(for_others, PieceSet::of(10, 3..9));
    // Its own are here; it goes on for the others.
    world.lack("a", 'f', PieceSet::none(10));
    world.hold("a", 'f', PieceSet::of(10, 0..3));
    assert_eq!(world.download(), Some("a"));
}

#[test]
fn a_name_means_the_model_that_most_hold_and_case_does_not_matter() {
    let mut world = World::new(&["a", "b", "c", "d"]);
    world.hold("a", 'e', PieceSet::all(3));
    world.hold("b", 'f', PieceSet::all(3));
    world.hold("c", 'f', PieceSet::all(3));
    world.seek("d", "M");
    assert_eq!(world.told("d").fingerprint, fingerprint('f'));
    assert_eq!(world.holders("d"), ["b", "c"]);
}

#[test]
fn who_wants_signed_models_only_is_not_sent_to_others() {
    let mut world = World::new(&["a", "b"]);
    world.hold("a", 'f', PieceSet::all(3));
    world.seek("b", "m");
    world.say("b", |models| models.sought[0].signed_only = true);
    assert_eq!(world.told("b").fingerprint, "");
    world.say("a", |models| models.held[0].signed = true);
    assert_eq!(world.told("b").fingerprint, fingerprint('f'));
}

#[test]
fn who_sent_bad_pieces_is_not_named_to_the_accuser_and_with_two_accusers_to_nobody() {
    let mut world = World::new(&["bad", "good", "a", "b", "c"]);
    world.hold("bad", 'f', PieceSet::all(3));
    world.hold("good", 'f', PieceSet::all(3));
    for worker in ["a", "b", "c"] {
        world.lack(worker, 'f', PieceSet::all(3));
    }
    let accuse = |models: &mut Models| {
        models.bad = vec![BadSource {
            node_id: "bad".into(),
            fingerprint: fingerprint('f'),
            reason: "piece 2".into(),
        }];
    };
    world.say("a", accuse);
    assert_eq!(world.holders("a"), ["good"]);
    assert_eq!(world.holders("c"), ["bad", "good"]);
    world.say("b", accuse);
    world.say("b", accuse);
    assert_eq!(world.holders("c"), ["good"]);
    let counts = world.tracker.take_counts();
    assert_eq!(counts.bad_sources["bad"], 2, "each accuser is heard once");
    assert_eq!(world.tracker.take_counts().bad_sources.len(), 0);
    let model = &world.tracker.view()[0];
    let bad = model.holders.iter().find(|holder| holder.worker == "bad");
    assert_eq!(bad.unwrap().accused_by, ["a", "b"]);
    // Alone with it, somebody has to go outside.
    world.leave("good");
    assert_eq!(world.download(), Some("a"));
}

#[test]
fn a_worker_on_the_heads_machine_is_named_by_the_heads_address() {
    let mut tracker = Tracker::new();
    let now = Instant::now();
    tracker.joined("local", "local", None);
    tracker.joined("far", "far", Some([192, 168, 1, 10].into()));
    let held = HeldModel {
        fingerprint: fingerprint('f'),
        names: vec!["m".into()],
        pieces: Some(PieceSet::all(1).to_proto()),
        ..HeldModel::default()
    };
    let local = Models {
        port: 7781,
        held: vec![held],
        ..Models::default()
    };
    let sought = SoughtModel {
        name: "m".into(),
        ..SoughtModel::default()
    };
    let far = Models {
        port: 7781,
        sought: vec![sought],
        ..Models::default()
    };
    tracker.said("local", "127.0.0.1:7781".parse().ok(), local, now);
    tracker.said("far", "192.168.1.20:7781".parse().ok(), far, now);
    let told = tracker
        .poll(now)
        .into_iter()
        .find_map(|action| match action {
            Action::Tell { node, sources } if node == "far" => Some(sources),
            _ => None,
        });
    assert_eq!(
        told.unwrap().models[0].holders[0].address,
        "192.168.1.10:7781"
    );
}

#[test]
fn senseless_reports_are_left_out() {
    let logs = Logs::capture();
    let mut world = World::new(&["a", "b"]);
    world.say("a", |models| {
        let good = HeldModel {
            fingerprint: fingerprint('f'),
            names: vec!["m".into(), "x\n".into(), "y".repeat(10_000)],
            pieces: Some(PieceSet::all(3).to_proto()),
            ..HeldModel::default()
        };
        models.held = vec![
            HeldModel {
                fingerprint: "F".repeat(64),
                ..good.clone()
            },
            HeldModel {
                pieces: None,
                ..good.clone()
            },
            good,
        ];
        models.held[1].fingerprint = fingerprint('e');
        models.sought = vec![SoughtModel::default()];
        models.bad = vec![BadSource {
            node_id: "a".into(),
            ..BadSource::default()
        }];
    });
    let view = world.tracker.view();
    assert_eq!(view.len(), 1);
    assert_eq!(view[0].name, "m");
    assert_eq!(logs.text(), "", "nobody accuses himself");
    world.seek("b", "y");
    assert_eq!(world.told("b").fingerprint, "");
}

#[test]
fn at_every_moment_at_most_one_goes_and_in_the_end_all_have_it() {
    use proptest::prelude::*;
    proptest!(ProptestConfig::with_cases(64), |(
        faults in prop::collection::vec((0usize..4, 0u8..4, 0u64..40), 0..30)
    )| {
        let names = ["a", "b", "c", "d"];
        let mut world = World::new(&names);
        let mut bytes = [0u64; 4];
        for name in names {
            world.seek(name, "m");
        }
        for (who, what, seconds) in faults {
            let name = names[who];
            match what {
                0 => {
                    world.leave(name);
                    world.join(name);
                    world.seek(name, "m");
                    bytes[who] = 0;
                }
                1 => world.say(name, |models| models.sought[0].origin_error = "no".into()),
                2 => world.say(name, |models| models.sought[0].origin_error.clear()),
                _ => {}
            }
            world.pass(Duration::from_secs(seconds));
            if let Some(on_it) = world.download().map(str::to_owned) {
                let who = names.iter().position(|name| *name == on_it).unwrap();
                bytes[who] += 1;
                let now = bytes[who];
                world.say(&on_it, |models| models.sought[0].origin_bytes = now);
            }
        }
        for name in names {
            world.say(name, |models| models.sought[0].origin_error.clear());
        }
        // Pauses end.
        world.pass(Duration::from_secs(700));
        world.pass(Duration::from_secs(1));
        let on_it = world.download().map(str::to_owned).expect("somebody goes");
        world.say(&on_it, |models| models.sought.clear());
        world.hold(&on_it, 'f', PieceSet::all(4));
        prop_assert_eq!(world.download(), None);
        for name in names.iter().filter(|name| **name != on_it) {
            prop_assert_eq!(world.holders(name), [on_it.as_str()]);
        }
    });
}

#[test]
fn the_first_model_that_is_got_under_a_name_keeps_it() {
    let mut world = World::new(&["a", "b", "c", "d"]);
    world.hold("a", 'a', PieceSet::all(4));
    assert!(world.tracker.pins().get("m").is_none(), "nobody asked");
    world.seek("b", "M");
    assert_eq!(world.told("b").pin, fingerprint('a'));
    assert_eq!(world.told("b").fingerprint, fingerprint('a'));
    assert!(!world.told("b").disputed);
    // More workers have another one: it is not told, and nobody is told that the first one is sure.
    world.hold("c", 'b', PieceSet::all(4));
    world.hold("d", 'b', PieceSet::all(4));
    assert_eq!(world.told("b").fingerprint, fingerprint('a'));
    assert!(world.told("b").disputed);
    assert_eq!(world.tracker.counts.conflicts, 1);
    let advice = super::advice(&world.tracker.conflicts()[0]);
    for part in [
        "`M`",
        "2 different models",
        "(a)",
        "(c, d)",
        "models pins set",
    ] {
        assert!(advice.contains(part), "{part}: {advice}");
    }
    // With its holder gone it keeps the name: nothing else is told under it.
    world.leave("a");
    assert_eq!(world.told("b").fingerprint, "");
    // An operator decides.
    world.tracker.pin("m", &fingerprint('b')).unwrap();
    world.turn();
    assert_eq!(world.told("b").fingerprint, fingerprint('b'));
    assert!(!world.told("b").disputed);
    world.tracker.unpin("m").unwrap();
    assert!(world.tracker.unpin("m").is_err());
    assert!(world.tracker.pin("m", "b").is_err());
    assert!(world.tracker.pin("a\nb", &fingerprint('b')).is_err());
}

#[test]
fn a_model_that_a_worker_refuses_is_not_told_to_it_again() {
    let mut world = World::new(&["liar", "b", "c"]);
    world.hold("liar", 'f', PieceSet::all(4));
    world.seek("b", "m");
    assert_eq!(world.told("b").fingerprint, fingerprint('f'));
    // The hub has another one under that name: somebody gets it.
    world.say("b", |models| {
        models.sought[0].refused = vec![fingerprint('f'), "x".into()]
    });
    assert_eq!(world.told("b").fingerprint, "");
    assert_eq!(world.download(), Some("b"));
    // A worker that cannot ask the hub does not get a model that is in doubt.
    world.seek("c", "m");
    assert!(world.told("c").disputed);
    assert_eq!(world.tracker.conflicts()[0].refused_by, ["b"]);
    // An operator's word counts more than the hub's.
    world.tracker.pin("m", &fingerprint('f')).unwrap();
    world.turn();
    assert_eq!(world.told("b").fingerprint, fingerprint('f'));
    assert!(world.told("b").pinned_by_operator);
    world.tracker.unpin("m").unwrap();
    world.turn();
    world.hold("b", 'a', PieceSet::all(4));
    world.say("c", |models| {
        models.sought[0].refused = vec![fingerprint('f')]
    });
    assert_eq!(world.told("c").fingerprint, fingerprint('a'));
}

fn held(letter: char, name: &str, pieces: PieceSet) -> HeldModel {
    HeldModel {
        fingerprint: fingerprint(letter),
        names: vec![name.to_owned()],
        bytes: 100,
        pieces: Some(pieces.to_proto()),
        signed: false,
    }
}

#[test]
fn a_model_that_its_only_holder_replaced_is_no_conflict_and_takes_the_name_along() {
    let logs = Logs::capture();
    let mut world = World::new(&["a", "b", "c"]);
    world.hold("a", 'a', PieceSet::all(4));
    world.seek("b", "m");
    assert_eq!(world.told("b").pin, fingerprint('a'));
    // The manifest of the old one is left; the files are those of the new one.
    let replaced = |models: &mut Models| {
        models.held = vec![
            held('a', "m", PieceSet::none(4)),
            held('b', "m", PieceSet::all(4)),
        ];
    };
    world.say("a", replaced);
    assert_eq!(world.tracker.conflicts(), []);
    assert_eq!(world.told("b").fingerprint, fingerprint('b'));
    assert_eq!(world.told("b").pin, fingerprint('b'));
    assert!(!world.told("b").disputed);
    let now = format!("now=\"{}\"", fingerprint('b'));
    assert!(logs.text().contains(&now), "{}", logs.text());
    // Another worker that has something else under the name does not take it along.
    world.say("a", |models| models.held.clear());
    world.hold("c", 'c', PieceSet::all(4));
    assert_eq!(world.told("b").pin, fingerprint('b'));
    assert!(world.told("b").disputed);
    // Nor does the first one while somebody has the old one, or where an operator decided.
    world.hold("c", 'b', PieceSet::all(4));
    world.hold("a", 'd', PieceSet::all(4));
    assert_eq!(world.told("b").pin, fingerprint('b'));
    assert!(world.told("b").disputed);
    world.leave("c");
    world.tracker.pin("m", &fingerprint('e')).unwrap();
    world.turn();
    assert_eq!(world.told("b").pin, fingerprint('e'));
    assert!(world.told("b").pinned_by_operator);
    assert!(world.tracker.conflicts()[0].decided);
}

#[test]
fn two_models_of_one_worker_are_no_conflict() {
    let mut world = World::new(&["a", "b"]);
    let both = |models: &mut Models| {
        models.held = vec![
            held('a', "m", PieceSet::all(4)),
            held('b', "m", PieceSet::all(4)),
        ];
    };
    world.say("a", both);
    assert_eq!(world.tracker.conflicts(), []);
    world.hold("b", 'b', PieceSet::all(4));
    assert_eq!(world.tracker.conflicts().len(), 1);
}

#[test]
fn a_model_that_one_worker_cannot_use_is_not_disputed_for_others() {
    let mut world = World::new(&["a", "b", "c"]);
    world.hold("a", 'a', PieceSet::all(4));
    world.seek("b", "m");
    world.seek("c", "m");
    world.say("b", |models| {
        models.sought[0].unusable = vec![fingerprint('a'), "x".into()]
    });
    assert_eq!(world.told("b").fingerprint, "");
    assert_eq!(world.told("c").fingerprint, fingerprint('a'));
    assert!(!world.told("c").disputed);
    assert_eq!(world.tracker.conflicts(), []);
}

#[test]
fn a_few_workers_neither_hide_a_conflict_nor_fill_the_log() {
    let mut world = World::new(&["honest", "liar", "twin", "z"]);
    let names = |range: std::ops::Range<usize>, letter: char| {
        let names = range.map(move |i| held(letter, &format!("!{i:03}"), PieceSet::all(1)));
        names.enumerate().map(|(i, mut one)| {
            one.fingerprint.replace_range(..4, &format!("{i:04x}"));
            one
        })
    };
    world.say("honest", |models| {
        models.held = vec![held('a', "org/m", PieceSet::all(4))];
    });
    world.say("liar", |models| models.held = names(0..200, 'b').collect());
    world.say("twin", |models| {
        models.held = names(0..200, 'c').collect();
        models.held.push(held('b', "org/m", PieceSet::all(4)));
    });
    world.seek("z", "org/m");
    let told = world.tracker.conflicts();
    assert_eq!(told.len(), 64);
    assert!(told.iter().any(|conflict| conflict.name == "org/m"));
    // Unreported conflicts are disputed all the same.
    for i in 0..200 {
        assert!(world.tracker.is_disputed(&format!("!{i:03}")));
    }
    let noted = |world: &World| world.tracker.counts.conflicts;
    for i in 0..50 {
        world.say("liar", |models| {
            models.held = names(4 * (i % 2)..200, 'b').collect()
        });
    }
    assert!(noted(&world) <= 3 * 32, "{}", noted(&world));
    // One alone makes none at all.
    world.leave("twin");
    assert_eq!(world.tracker.conflicts(), []);
}

#[test]
fn who_has_the_download_gives_the_name_its_meaning() {
    let mut world = World::new(&["a", "b"]);
    world.seek("a", "m");
    assert_eq!(world.download(), Some("a"));
    world.hold("a", 'a', PieceSet::all(4));
    assert_eq!(
        world.tracker.pins().get("m").unwrap().fingerprint,
        fingerprint('a')
    );
}

#[test]
fn pins_have_bounds_for_each_node_and_in_all() {
    let mut world = World::new(&["a", "b"]);
    for i in 0..300 {
        world.say("a", |models| {
            models.held = vec![HeldModel {
                fingerprint: fingerprint('a'),
                names: vec![format!("m{i}")],
                bytes: 1,
                pieces: Some(PieceSet::all(1).to_proto()),
                signed: false,
            }];
        });
        world.seek("b", &format!("m{i}"));
    }
    assert_eq!(world.tracker.pins().list().count(), 256);
    for i in 0..5000 {
        let _ = world.tracker.pin(&format!("n{i}"), &fingerprint('a'));
    }
    assert_eq!(world.tracker.pins().list().count(), 4096);
    assert!(world.tracker.pin("one-more", &fingerprint('a')).is_err());
    world.tracker.pin("n1", &fingerprint('b')).unwrap();
}

#[test]
fn what_workers_say_of_themselves_breaks_no_advice() {
    let conflict = mesh_api::NameConflict {
        name: "a\nb".into(),
        claims: [("äöüäöüäöüäöüäöü".to_owned(), vec!["x\u{1b}".to_owned()])].into(),
        pinned: None,
        decided: false,
        refused_by: Vec::new(),
        served: false,
    };
    let advice = super::advice(&conflict);
    assert!(advice.contains("äöüäöüäöüäöü (x )"), "{advice}");
    assert!(!advice.chars().any(char::is_control), "{advice}");
    // A served model has the fingerprint of a file, and a pin is a manifest's.
    assert!(advice.contains("pins set"), "{advice}");
    let served = mesh_api::NameConflict {
        served: true,
        ..conflict
    };
    let advice = super::advice(&served);
    assert!(!advice.contains("pins set"), "{advice}");
    assert!(advice.contains("another name"), "{advice}");
}
