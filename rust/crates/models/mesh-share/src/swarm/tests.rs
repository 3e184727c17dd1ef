use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::simulation::{Outcome, PIECE, Simulated, contents, run, wanted};
use super::{Action, DropReason, Kind, Settings, Swarm};
use crate::PieceSet;

const LIMIT: Duration = Duration::from_secs(600);

fn get(pieces: u32, sources: &[Simulated]) -> Outcome {
    run(wanted(0..pieces), Settings::default(), sources, LIMIT)
}

#[test]
fn several_sources_send_at_once_each_as_fast_as_it_can() {
    let fast = Simulated::peer(0..300);
    let slow = Simulated {
        pace: 10e6,
        ..Simulated::peer(0..300)
    };
    let alone = get(300, std::slice::from_ref(&fast));
    let outcome = get(300, &[fast, slow]);
    assert!(outcome.done && alone.done);
    assert!(outcome.took < alone.took, "{outcome:?} {alone:?}");
    let (fast, slow) = (outcome.counted[&0], outcome.counted[&1]);
    assert!(fast > 3 * slow && slow > 20, "{outcome:?}");
    assert_eq!(outcome.bytes_twice, 0, "nothing needs to be sent twice");
}

#[test]
fn who_sends_a_bad_piece_is_dropped_and_reported_and_its_pieces_come_from_others() {
    let liar = Simulated {
        lies: Some(5),
        ..Simulated::peer(0..100)
    };
    let outcome = get(100, &[liar, Simulated::peer(0..100)]);
    assert!(outcome.done);
    assert!(
        matches!(outcome.dropped[..], [(0, DropReason::BadPiece { .. })]),
        "{outcome:?}"
    );
    assert!(
        outcome.asked[&0] < 30,
        "it was asked on after its lie: {outcome:?}"
    );
}

#[test]
fn liars_alone_never_make_it_done() {
    let liar = Simulated {
        lies: Some(1),
        ..Simulated::peer(0..10)
    };
    let outcome = get(10, &[liar.clone(), liar]);
    assert!(!outcome.done);
    assert_eq!(outcome.dropped.len(), 2);
    assert!(outcome.counted.is_empty());
}

#[test]
fn what_a_dead_source_owed_is_asked_of_others_at_once() {
    let dies = Simulated {
        dies_at: Some(Duration::from_millis(500)),
        ..Simulated::peer(0..200)
    };
    let outcome = get(200, &[dies, Simulated::peer(0..200)]);
    assert!(outcome.done);
    assert!(outcome.took < Duration::from_secs(5), "{outcome:?}");
    assert!(outcome.dropped.is_empty(), "whose link broke is not blamed");
}

#[test]
fn a_source_that_falls_silent_holds_nothing_up_for_long() {
    let silent = Simulated {
        silent_from: Some(Duration::from_millis(200)),
        ..Simulated::peer(0..100)
    };
    let outcome = get(100, &[silent.clone(), Simulated::peer(0..100)]);
    assert!(outcome.done);
    assert!(outcome.took < Duration::from_secs(6), "{outcome:?}");

    // Alone it is dropped, so that its link may be made anew.
    let outcome = get(100, &[silent]);
    assert!(!outcome.done);
    assert!(
        matches!(outcome.dropped[..], [(0, DropReason::Silent { .. })]),
        "{outcome:?}"
    );
}

#[test]
fn a_slow_source_that_is_the_only_one_is_waited_for() {
    let slow = Simulated {
        pace: 0.2e6,
        ..Simulated::peer(0..6)
    };
    let settings = Settings {
        silence: Duration::from_secs(30),
        ..Settings::default()
    };
    let outcome = run(wanted(0..6), settings, &[slow], LIMIT);
    assert!(outcome.done, "{outcome:?}");
    assert_eq!((outcome.bytes_twice, outcome.bytes_sent), (0, 24));
}

#[test]
fn the_last_pieces_do_not_wait_for_a_slow_source() {
    let slow = Simulated {
        pace: 0.05e6,
        ..Simulated::peer(0..50)
    };
    let outcome = get(50, &[slow, Simulated::peer(0..50)]);
    assert!(outcome.done);
    assert!(outcome.took < Duration::from_secs(6), "{outcome:?}");
    assert!(outcome.withdrawn >= 1, "{outcome:?}");
}

#[test]
fn outside_the_mesh_only_what_no_peer_has_is_asked_for() {
    let origin = Simulated {
        kind: Kind::Origin,
        ..Simulated::peer(0..90)
    };
    let outcome = get(
        90,
        &[origin, Simulated::peer(0..60), Simulated::peer(30..70)],
    );
    assert!(outcome.done);
    assert_eq!(outcome.counted[&0], 20, "{outcome:?}");
}

#[test]
fn when_the_only_peer_dies_the_origin_sends_the_rest() {
    let origin = Simulated {
        kind: Kind::Origin,
        ..Simulated::peer(0..90)
    };
    let peer = Simulated {
        dies_at: Some(Duration::from_millis(300)),
        ..Simulated::peer(0..90)
    };
    let outcome = get(90, &[origin, peer]);
    assert!(outcome.done);
    assert!(
        outcome.counted[&0] > 20 && outcome.counted[&1] > 2,
        "{outcome:?}"
    );
}

#[test]
fn no_more_is_under_way_than_the_limits_allow() {
    let settings = Settings {
        in_flight: 40,
        ..Settings::default()
    };
    let sources = vec![Simulated::peer(0..200); 5];
    let outcome = run(wanted(0..200), settings, &sources, LIMIT);
    assert!(outcome.done);
    assert!(outcome.most_in_flight <= 40, "{outcome:?}");
}

#[test]
fn urgent_pieces_come_first_then_those_that_fewest_have() {
    let mut pieces = wanted(0..6);
    pieces[5].urgent = true;
    let settings = Settings {
        window: 6,
        ..Settings::default()
    };
    let now = Instant::now();
    let mut swarm = Swarm::new(pieces, settings);
    swarm.source("a", Kind::Peer, PieceSet::all(6), now);
    let first: Vec<_> = swarm.poll(now);
    assert_eq!(
        first[0],
        Action::Ask {
            source: "a",
            piece: 5
        }
    );
    swarm.gone(&"a");
    swarm.source("b", Kind::Peer, PieceSet::of(6, [0, 1, 2, 3]), now);
    swarm.source("c", Kind::Peer, PieceSet::of(6, [0, 1, 3, 5]), now);
    let asked: Vec<_> = swarm.poll(now);
    assert_eq!(
        asked[..2],
        [
            Action::Ask {
                source: "b",
                piece: 2
            },
            Action::Ask {
                source: "c",
                piece: 5
            }
        ]
    );
}

#[test]
fn nodes_that_begin_elsewhere_ask_for_something_else() {
    let ask = |begin| {
        let settings = Settings {
            begin,
            ..Settings::default()
        };
        let now = Instant::now();
        let mut swarm = Swarm::new(wanted(0..100), settings);
        swarm.source(0, Kind::Peer, PieceSet::all(100), now);
        swarm.poll(now)[0].clone()
    };
    assert_eq!(
        ask(0),
        Action::Ask {
            source: 0,
            piece: 0
        }
    );
    assert_eq!(
        ask(140),
        Action::Ask {
            source: 0,
            piece: 40
        }
    );
}

#[test]
fn a_dropped_source_does_not_come_back_before_its_time() {
    let now = Instant::now();
    let mut swarm = Swarm::new(wanted(0..3), Settings::default());
    swarm.source("silent", Kind::Peer, PieceSet::all(3), now);
    swarm.source("liar", Kind::Peer, PieceSet::all(3), now);
    swarm.poll(now);
    let wrong = swarm
        .wanted(0)
        .unwrap()
        .verify(b"something else")
        .unwrap_err();
    swarm.bad(&"liar", &wrong);
    let later = now + Duration::from_secs(11);
    let dropped = |actions: Vec<Action<&'static str>>| {
        let drops = actions.into_iter();
        drops
            .filter_map(|action| match action {
                Action::Drop { source, .. } => Some(source),
                _ => None,
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(dropped(swarm.poll(later)), ["liar", "silent"]);
    for name in ["silent", "liar"] {
        assert!(!swarm.admits(&name, later));
        swarm.source(name, Kind::Peer, PieceSet::all(3), later);
    }
    assert_eq!(swarm.poll(later), []);
    let much_later = later + Duration::from_secs(60);
    for name in ["silent", "liar"] {
        swarm.source(name, Kind::Peer, PieceSet::all(3), much_later);
    }
    let asked = swarm.poll(much_later);
    assert!(!asked.is_empty());
    assert!(
        asked.iter().all(|action| matches!(
            action,
            Action::Ask {
                source: "silent",
                ..
            }
        )),
        "{asked:?}"
    );
}

#[test]
fn only_what_has_the_manifests_digest_and_length_is_verified() {
    let wanted = &wanted([7])[0];
    assert_eq!(wanted.verify(&contents(7)).unwrap().piece(), 7);
    assert!(wanted.verify(&contents(8)).is_err());
    assert!(wanted.verify(&[]).is_err());
    let longer = [contents(7), vec![0]].concat();
    assert!(wanted.verify(&longer).is_err());
}

#[test]
fn pieces_wanted_later_are_fetched_as_well() {
    let now = Instant::now();
    let mut swarm = Swarm::new(wanted(0..1), Settings::default());
    swarm.source(0, Kind::Peer, PieceSet::all(4), now);
    swarm.poll(now);
    let verified = swarm.wanted(0).unwrap().verify(&contents(0)).unwrap();
    assert!(swarm.arrived(&0, &verified, now));
    assert_eq!(swarm.missing().next(), None);
    swarm.want(wanted(0..3));
    assert_eq!(swarm.missing().collect::<Vec<_>>(), [1, 2]);
    assert_eq!(swarm.poll(now).len(), 2);
    assert!(!swarm.arrived(&0, &verified, now), "it is here already");
    assert_eq!(swarm.progress().bytes_twice, 4);
}

prop_compose! {
    fn any_source(pieces: u32)(
        origin in prop::bool::weighted(0.2),
        has in prop::collection::vec(0..pieces, 0..pieces as usize * 2),
        pace in 0.3e6..100e6,
        latency in 0u64..200,
        lies in prop::option::weighted(0.3, 1u32..10),
        silent in prop::option::weighted(0.2, 0u64..5_000),
        dies in prop::option::weighted(0.2, 0u64..5_000),
    ) -> Simulated {
        Simulated {
            kind: if origin { Kind::Origin } else { Kind::Peer },
            has,
            pace,
            latency: Duration::from_millis(latency),
            lies,
            silent_from: silent.map(Duration::from_millis),
            dies_at: dies.map(Duration::from_millis),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn it_is_done_whenever_honest_sources_have_everything_whatever_others_do(
        mut sources in prop::collection::vec(any_source(40), 0..6),
        cut in 0u32..=40,
        begin: u32,
    ) {
        sources.push(Simulated::peer(0..cut));
        sources.push(Simulated { pace: 0.5e6, ..Simulated::peer(cut..40) });
        let settings = Settings { begin, ..Settings::default() };
        let outcome = run(wanted(0..40), settings.clone(), &sources, LIMIT);
        prop_assert!(outcome.done, "{:?}", outcome);
        let honest = [sources.len() - 2, sources.len() - 1];
        for (source, reason) in &outcome.dropped {
            if let DropReason::BadPiece { .. } = reason {
                prop_assert!(sources[*source].lies.is_some(), "{:?}", outcome);
            }
            prop_assert!(!honest.contains(source), "an honest source was dropped: {:?}", outcome);
        }
        prop_assert!(outcome.most_in_flight <= settings.in_flight);
        prop_assert_eq!(outcome.counted.values().sum::<u32>(), 40);
        // In the worst case every piece waited for all slow and silent ones, one after the other.
        let alone = f64::from(40 * PIECE) / 0.5e6;
        prop_assert!(outcome.took.as_secs_f64() < alone + 120.0, "{:?}", outcome);
    }

    #[test]
    fn what_nobody_honest_has_never_counts(
        mut sources in prop::collection::vec(any_source(20), 0..5),
    ) {
        for source in &mut sources {
            source.lies = Some(1);
        }
        let outcome = run(wanted(0..20), Settings::default(), &sources, LIMIT);
        prop_assert!(!outcome.done);
        prop_assert!(outcome.counted.is_empty());
    }
}
