use super::*;

/// Loads in simulated time.
struct Sim {
    loads: Loads,
    now: Instant,
    files: BTreeMap<PathBuf, Stamp>,
    free: Option<u64>,
}

fn stamp(bytes: u64, seconds: u64) -> Stamp {
    (
        bytes,
        Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)),
    )
}

fn failure(name: &str, location: Location) -> Failure {
    Failure {
        name: name.to_owned(),
        location,
        reason: "damaged".to_owned(),
    }
}

fn error(text: &str) -> LoadError {
    LoadError {
        text: text.to_owned(),
        same_name: false,
    }
}

impl Sim {
    fn new(whole: &[&str], parts: &[&str], failures: Vec<Failure>) -> Self {
        let now = Instant::now();
        let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        let named = [PathBuf::from("/models/named.gguf")];
        Sim {
            loads: Loads::new(names(whole), names(parts), failures, named, now),
            now,
            files: BTreeMap::new(),
            free: None,
        }
    }

    fn file(&mut self, name: &str, stamp: Option<Stamp>) {
        let path = PathBuf::from(format!("/models/{name}.gguf"));
        match stamp {
            Some(stamp) => self.files.insert(path, stamp),
            None => self.files.remove(&path),
        };
    }

    /// A look at the disk, and the steps that follow from it.
    fn look(&mut self) -> Vec<LoadStep> {
        let watched = self.loads.watched_files();
        let files = watched.into_iter().map(|(id, name, location)| {
            let path = match location {
                Location::At(path) => path,
                _ => PathBuf::from(format!("/models/{name}.gguf")),
            };
            (id, self.files.get(&path).copied())
        });
        let folder = self.files.iter().map(|(path, stamp)| LocalModel {
            path: path.clone(),
            name: path.file_stem().unwrap().to_string_lossy().into_owned(),
            stamp: *stamp,
        });
        let sight = Sight {
            files: files.collect(),
            folder: Some(Ok(folder.collect())),
            free_memory: self.free,
        };
        self.loads.seen(sight, self.now);
        self.steps()
    }

    fn steps(&mut self) -> Vec<LoadStep> {
        let mut steps = Vec::new();
        loop {
            match self.loads.poll(self.now) {
                LoadStep::Wait(until) => {
                    assert!(until > self.now);
                    return steps;
                }
                step => steps.push(step),
            }
        }
    }

    /// Looks once a second for that long; the orders of that time.
    fn wait(&mut self, seconds: u64) -> Vec<LoadStep> {
        let mut steps = Vec::new();
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            steps.extend(self.look());
        }
        steps
    }

    fn loaded(&mut self, order: &LoadOrder, result: Result<(), LoadError>) -> Vec<LoadStep> {
        self.loads.loaded(&order.id, result, self.now);
        self.steps()
    }
}

/// The only order in these steps.
fn order(steps: &[LoadStep]) -> LoadOrder {
    match steps {
        [LoadStep::Load(order)] => order.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn models_from_elsewhere_are_loaded_at_once_and_tried_again_ever_more_rarely() {
    let mut sim = Sim::new(&["m"], &["p"], Vec::new());
    let orders: Vec<_> = sim.steps();
    let [LoadStep::Load(whole), LoadStep::Load(parts)] = &orders[..] else {
        panic!("{orders:?}");
    };
    assert_eq!(whole.location, Location::Store("m".to_owned()));
    assert_eq!(parts.location, Location::StorePart("p".to_owned()));
    assert!(sim.loaded(parts, Ok(())).is_empty());
    let mut pauses = Vec::new();
    for _ in 0..9 {
        assert!(sim.loaded(whole, Err(error("no route"))).is_empty());
        let begun = sim.now;
        let steps = loop {
            let steps = sim.wait(1);
            if !steps.is_empty() {
                break steps;
            }
        };
        assert_eq!(order(&steps), *whole);
        pauses.push((sim.now - begun).as_secs());
    }
    assert_eq!(pauses, [5, 10, 20, 40, 80, 160, 300, 300, 300]);
    assert!(sim.loads.is_awaiting());
    sim.loaded(whole, Ok(()));
    assert!(!sim.loads.is_awaiting());
    assert!(sim.wait(1000).is_empty());
}

#[test]
fn a_reload_of_the_configuration_tries_again_at_once() {
    let mut sim = Sim::new(&["m"], &[], Vec::new());
    let whole = order(&sim.steps());
    sim.loaded(&whole, Err(error("no route")));
    assert!(sim.steps().is_empty());
    sim.loads.look_again(sim.now);
    assert_eq!(order(&sim.steps()), whole);
    // Also if it comes during an attempt.
    sim.loads.look_again(sim.now);
    assert!(sim.steps().is_empty());
    assert_eq!(order(&sim.loaded(&whole, Err(error("no route")))), whole);
}

#[test]
fn a_model_may_be_awaited_both_whole_and_in_parts() {
    let mut sim = Sim::new(&["m"], &["m"], Vec::new());
    let orders = sim.steps();
    let [LoadStep::Load(whole), LoadStep::Load(parts)] = &orders[..] else {
        panic!("{orders:?}");
    };
    assert_eq!(whole.location, Location::Store("m".to_owned()));
    assert_eq!(parts.location, Location::StorePart("m".to_owned()));
    sim.loaded(parts, Ok(()));
    assert!(sim.loads.is_awaiting());
    sim.loaded(whole, Err(error("no route")));
    assert_eq!(order(&sim.wait(5)), *whole);
    sim.loaded(whole, Ok(()));
    assert!(!sim.loads.is_awaiting());
}

#[test]
fn a_model_that_failed_is_loaded_when_its_file_has_changed_and_settled() {
    let mut sim = Sim::new(&[], &[], vec![failure("named", Location::Named)]);
    sim.file("named", Some(stamp(1, 1)));
    assert!(sim.wait(2).is_empty());
    sim.file("named", Some(stamp(2, 2)));
    assert!(sim.wait(1).is_empty(), "it may still be written to");
    sim.file("named", Some(stamp(3, 3)));
    assert!(sim.wait(1).is_empty());
    let again = order(&sim.wait(1));
    assert_eq!(again.location, Location::Named);
    assert!(sim.loaded(&again, Ok(())).is_empty());
    assert!(sim.wait(4000).is_empty());
}

#[test]
fn a_file_that_does_not_change_is_read_again_ever_more_rarely() {
    let mut sim = Sim::new(&[], &[], vec![failure("named", Location::NamedPart)]);
    let mut waited = Vec::new();
    for _ in 0..11 {
        let begun = sim.now;
        let again = loop {
            let steps = sim.wait(1);
            if !steps.is_empty() {
                break order(&steps);
            }
        };
        waited.push((sim.now - begun).as_secs());
        sim.loaded(&again, Err(error("damaged")));
        assert_eq!(sim.loads.faults()["named"], "damaged");
    }
    assert_eq!(waited, [5, 10, 20, 40, 80, 160, 320, 640, 1280, 1800, 1800]);
}

#[test]
fn a_model_that_another_load_serves_needs_no_retry() {
    let at = Location::At("/models/m.gguf".into());
    for (location, ends) in [(at, true), (Location::Named, false)] {
        let mut sim = Sim::new(&[], &[], vec![failure("m", location)]);
        let again = order(&sim.wait(5));
        let same_name = LoadError {
            same_name: true,
            ..error("two models are called m")
        };
        sim.loaded(&again, Err(same_name));
        assert_eq!(sim.wait(100).is_empty(), ends);
        assert_eq!(sim.loads.faults().is_empty(), ends);
    }
}

#[test]
fn models_of_the_folder_come_and_go_one_at_a_time() {
    let mut sim = Sim::new(&[], &[], Vec::new());
    for name in ["a", "b", "named"] {
        sim.file(name, Some(stamp(1, 1)));
    }
    assert!(sim.look().is_empty(), "they may still be written to");
    let a = order(&sim.wait(1));
    assert_eq!(a.location, Location::At("/models/a.gguf".into()));
    assert!(sim.wait(3).is_empty());
    let share = LoadStep::Share("a".to_owned(), "/models/a.gguf".into());
    assert_eq!(sim.loaded(&a, Ok(())), [share]);
    let b = order(&sim.wait(1));
    assert_eq!(b.name, "b");
    sim.loaded(&b, Ok(()));
    assert!(sim.wait(100).is_empty());
    sim.file("a", None);
    assert_eq!(sim.wait(1), [LoadStep::Unload("a".to_owned())]);
    sim.file("b", Some(stamp(2, 9)));
    assert_eq!(sim.wait(1), [LoadStep::Unload("b".to_owned())]);
    assert_eq!(order(&sim.wait(1)).name, "b");
}

#[test]
fn a_folders_model_that_is_refused_is_tried_again_when_it_changes_or_on_a_reload() {
    let mut sim = Sim::new(&[], &[], Vec::new());
    sim.file("qwen2.5", Some(stamp(1, 1)));
    let bad = order(&sim.wait(2));
    sim.loaded(&bad, Err(error("damaged")));
    assert_eq!(sim.loads.faults()["qwen2.5"], "damaged");
    assert!(sim.wait(1000).is_empty());
    sim.loads.look_again(sim.now);
    let bad = order(&sim.wait(1));
    sim.loaded(&bad, Err(error("damaged")));
    sim.file("qwen2.5", Some(stamp(1, 2)));
    assert_eq!(order(&sim.wait(2)), bad);
    sim.loaded(&bad, Err(error("damaged")));
    sim.file("qwen2.5", None);
    assert!(sim.wait(1).is_empty() && sim.loads.faults().is_empty());
}

#[test]
fn a_reload_during_the_load_of_a_folders_model_is_not_lost() {
    let mut sim = Sim::new(&[], &[], Vec::new());
    sim.file("a", Some(stamp(1, 1)));
    let a = order(&sim.wait(2));
    sim.loads.look_again(sim.now);
    sim.loaded(&a, Err(error("damaged")));
    assert_eq!(order(&sim.wait(1)), a);
    // It counts once.
    sim.loaded(&a, Err(error("damaged")));
    assert!(sim.wait(1000).is_empty());
    // A file that vanishes before it is tried again leaves no fault.
    sim.loads.look_again(sim.now);
    sim.file("a", None);
    assert!(sim.wait(1).is_empty() && sim.loads.faults().is_empty());
}

#[test]
fn a_model_that_memory_does_not_suffice_for_is_refused_and_not_read() {
    let mut sim = Sim::new(&[], &[], Vec::new());
    sim.free = Some(1000);
    sim.file("large", Some(stamp(801, 1)));
    sim.file("small", Some(stamp(800, 1)));
    assert_eq!(order(&sim.wait(2)).name, "small");
    let text = "model large: it takes 801 bytes and more, and 1000 bytes of memory are free";
    assert_eq!(sim.loads.faults()["large"], text);
    // It stays refused until somebody asks, or the file changes.
    sim.free = Some(1 << 20);
    assert!(sim.wait(100).is_empty());
}

#[test]
fn a_file_that_vanishes_or_changes_while_it_is_loaded_is_withdrawn_afterwards() {
    for after in [None, Some(stamp(7, 7))] {
        let mut sim = Sim::new(&[], &[], Vec::new());
        sim.file("a", Some(stamp(1, 1)));
        let a = order(&sim.wait(2));
        sim.file("a", after);
        assert!(sim.wait(5).is_empty());
        assert!(sim.loads.may_serve(&a.id));
        sim.loaded(&a, Ok(()));
        assert_eq!(sim.wait(1), [LoadStep::Unload("a".to_owned())]);
    }
}

#[test]
fn an_engine_that_dies_again_and_again_is_loaded_ever_more_rarely() {
    let mut sim = Sim::new(&["m"], &[], Vec::new());
    let whole = order(&sim.steps());
    sim.loaded(&whole, Ok(()));
    let mut waited = Vec::new();
    for _ in 0..9 {
        let location = Location::Store("m".to_owned());
        sim.loads.died(failure("m", location), sim.now);
        let begun = sim.now;
        let again = loop {
            let steps = sim.wait(1);
            if !steps.is_empty() {
                break order(&steps);
            }
        };
        waited.push((sim.now - begun).as_secs());
        sim.loaded(&again, Ok(()));
    }
    assert_eq!(waited, [5, 10, 20, 40, 80, 160, 300, 300, 300]);
}

#[test]
fn a_retry_of_a_folders_model_leaves_a_changed_file_to_the_folder() {
    let mut sim = Sim::new(&[], &[], Vec::new());
    sim.file("a", Some(stamp(1, 1)));
    let a = order(&sim.wait(2));
    sim.loaded(&a, Ok(()));
    let at = Location::At("/models/a.gguf".into());
    sim.loads.died(failure("a", at.clone()), sim.now);
    sim.file("a", Some(stamp(2, 2)));
    assert_eq!(sim.wait(1), [LoadStep::Unload("a".to_owned())]);
    let fresh = order(&sim.wait(1));
    assert_eq!(fresh.id, a.id, "the folder's own load, no retry");
    sim.loaded(&fresh, Ok(()));
    assert!(sim.wait(600).is_empty());
    // A file that stays as it is is the retry's.
    sim.loads.died(failure("a", at), sim.now);
    let again = order(&sim.wait(10));
    assert!(matches!(again.id, LoadId::Retry(_)));
    // It vanishes meanwhile: what was loaded is not served.
    sim.file("a", None);
    assert_eq!(sim.wait(1), [LoadStep::Unload("a".to_owned())]);
    assert!(!sim.loads.may_serve(&again.id));
    sim.loaded(&again, Ok(()));
    assert!(sim.wait(600).is_empty() && sim.loads.faults().is_empty());
    // The folder goes on.
    sim.file("b", Some(stamp(1, 1)));
    assert_eq!(order(&sim.wait(2)).name, "b");
}

#[test]
fn a_retry_and_the_folder_do_not_load_at_once() {
    let mut sim = Sim::new(&[], &[], Vec::new());
    sim.file("a", Some(stamp(1, 1)));
    let a = order(&sim.wait(2));
    sim.loaded(&a, Ok(()));
    let at = Location::At("/models/a.gguf".into());
    sim.loads.died(failure("a", at), sim.now);
    sim.file("b", Some(stamp(1, 1)));
    let b = order(&sim.wait(2));
    assert!(sim.wait(20).is_empty());
    assert!(matches!(
        order(&sim.loaded(&b, Ok(()))[1..]).id,
        LoadId::Retry(_)
    ));
}

#[test]
fn a_drain_begins_no_load_and_serves_none_that_ends() {
    let mut sim = Sim::new(&["m"], &[], vec![failure("named", Location::Named)]);
    let whole = order(&sim.steps());
    assert!(sim.loads.may_serve(&whole.id));
    sim.loads.drain();
    assert!(!sim.loads.may_serve(&whole.id));
    sim.file("a", Some(stamp(1, 1)));
    sim.loaded(&whole, Err(error("no route")));
    assert!(sim.wait(2000).is_empty());
}

#[test]
fn a_worker_is_ready_when_nothing_is_awaited_and_something_is_served() {
    let mut sim = Sim::new(&["m"], &[], Vec::new());
    let state = |sim: &Sim, serves| {
        let lacking = "m is being fetched".to_owned();
        sim.loads.readiness(serves, lacking).state
    };
    let lacks = |text: &str| ReadyState::Lacks(text.to_owned());
    assert_eq!(state(&sim, true), ReadyState::Elsewhere, "no link yet");
    sim.loads.linked(true);
    let text = "m is being fetched; m is not loaded yet";
    assert_eq!(state(&sim, true), lacks(text));
    let whole = order(&sim.steps());
    sim.loaded(&whole, Err(error("model m: no route")));
    let text = "m is being fetched; model m: no route";
    assert_eq!(state(&sim, true), lacks(text));
    order(&sim.wait(5));
    sim.loaded(&whole, Ok(()));
    assert_eq!(state(&sim, false), ReadyState::Ready);
    sim.loads.died(failure("x", Location::Named), sim.now);
    assert_eq!(state(&sim, true), ReadyState::Ready);
    let text = "m is being fetched; x is not served: damaged";
    assert_eq!(state(&sim, false), lacks(text));
    let readiness = sim.loads.readiness(true, String::new());
    assert_eq!(readiness.note.as_deref(), Some("x is not served: damaged"));
    // A new link has to show it again.
    sim.loads.linked(false);
    assert_eq!(state(&sim, true), ReadyState::Elsewhere);
    sim.loads.linked(true);
    assert_ne!(sim.loads.readiness(true, String::new()), readiness);
    sim.loads.drain();
    assert_eq!(state(&sim, true), ReadyState::Elsewhere);
}

#[test]
fn a_folder_that_cannot_be_listed_withdraws_nothing() {
    let mut sim = Sim::new(&[], &[], Vec::new());
    sim.file("a", Some(stamp(1, 1)));
    let a = order(&sim.wait(2));
    sim.loaded(&a, Ok(()));
    for _ in 0..3 {
        let sight = Sight {
            folder: Some(Err("permission denied".to_owned())),
            ..Sight::default()
        };
        sim.loads.seen(sight, sim.now);
        assert!(sim.steps().is_empty());
    }
}
