//! The thread pool.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use mesh_kernels::{Pool, in_background};

#[test]
fn each_task_runs_exactly_once() {
    for threads in 1..5 {
        let pool = Pool::new(threads);
        for tasks in [0, 1, 2, 3, 7, 64, 1000] {
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..50 {
                pool.run(tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
            }
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 50));
        }
    }
}

#[test]
fn writes_of_tasks_are_seen_after_run() {
    let pool = Pool::new(3);
    let cells: Vec<AtomicUsize> = (0..97).map(|_| AtomicUsize::new(0)).collect();
    for round in 1..2000 {
        pool.run(97, &|i| cells[i].store(round, Ordering::Relaxed));
        assert!(cells.iter().all(|c| c.load(Ordering::Relaxed) == round));
    }
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
    let pool = Pool::new(3);
    let result = catch_unwind(AssertUnwindSafe(|| {
        pool.run(10, &|i| assert!(i != 6, "task six"));
    }));
    let panic = result.expect_err("the panic of task six");
    assert!(format!("{:?}", panic.downcast_ref::<&str>()).contains("task six"));
    let sum = AtomicUsize::new(0);
    pool.run(10, &|i| {
        sum.fetch_add(i, Ordering::Relaxed);
    });
    assert_eq!(sum.into_inner(), 45);
}

#[test]
fn a_nested_run_is_rejected() {
    let pool = Pool::new(2);
    let result = catch_unwind(AssertUnwindSafe(|| pool.run(2, &|_| pool.run(2, &|_| {}))));
    assert!(result.is_err());
    pool.run(2, &|_| {});
}

#[test]
fn sleeping_threads_wake_up() {
    let pool = Pool::new(4);
    for _ in 0..5 {
        // Threads go to sleep after less than a millisecond.
        std::thread::sleep(Duration::from_millis(2));
        let sum = AtomicUsize::new(0);
        pool.run(100, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 4950);
    }
}

#[test]
fn work_in_the_background_has_its_own_priority_and_leaves_the_callers() {
    let nice = || {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap_or_default();
        let fields = stat.rsplit(')').next().unwrap_or_default();
        fields.split_whitespace().nth(16)?.parse::<i32>().ok()
    };
    let before = nice();
    let inside = in_background(3, |pool| {
        let all: Mutex<Vec<_>> = Mutex::default();
        pool.run(64, &|_| {
            std::thread::sleep(Duration::from_millis(1));
            all.lock().expect("no panic").push(nice());
        });
        all.into_inner().unwrap_or_default()
    });
    assert_eq!(inside.len(), 64);
    assert_eq!(nice(), before);
    if cfg!(target_os = "linux") {
        let lower = before.map(|before| (before + 5).min(19));
        assert!(
            inside.iter().all(|nice| *nice == lower),
            "{inside:?} {before:?}"
        );
    }
}

#[test]
fn two_callers_take_turns() {
    let pool = Pool::new(2);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..500 {
                    let sum = AtomicUsize::new(0);
                    pool.run(8, &|i| {
                        sum.fetch_add(i, Ordering::Relaxed);
                    });
                    assert_eq!(sum.into_inner(), 28);
                }
            });
        }
    });
}
