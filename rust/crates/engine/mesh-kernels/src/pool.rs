//! A thread pool for loops of a few microseconds.
//!
//! [`Pool::run`] publishes one word `tasks << 32 | next` and takes tasks off it together with its threads. A
//! thread that is not running just then (another process has its core) has claimed nothing, so no other
//! thread waits for it. Idle threads watch the word for some microseconds, then yield between looks, then
//! sleep: a machine shared with others keeps its cores.
//!
//! Unsafe code: the pointer to the caller's closure, which outlives every claimed task because `run` waits
//! for them; system calls that concern the calling thread alone.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::Isa;

/// A fixed set of threads that run the tasks of one loop at a time; the caller of [`Pool::run`] is one of
/// them.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<PoolState>,
    threads: usize,
    isa: Isa,
    turn: Mutex<()>,
    handles: Vec<JoinHandle<()>>,
}

/// Options for starting a [`Pool`].
#[derive(Debug, Clone, Default)]
pub struct PoolOptions {
    /// Threads including the caller; 0 means 1.
    pub threads: usize,
    /// The instruction set of every operator that is given this pool; default [`Isa::current`].
    pub isa: Option<Isa>,
    /// CPU numbers for the pool's own threads, one each (the caller's thread is left alone); Linux only.
    pub cpus: Vec<usize>,
}

type Job = *const (dyn Fn(usize) + Sync);

#[derive(Debug)]
struct PoolState {
    /// `tasks << 32 | next`.
    word: Padded<AtomicU64>,
    finished: Padded<AtomicUsize>,
    sleepers: Padded<AtomicUsize>,
    job: UnsafeCell<Option<Job>>,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleep: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is written only by the thread that holds `turn` while no task is claimed, and read only by
// threads that have claimed a task of it; the claim (acquire) orders the read after the write (release).
unsafe impl Sync for PoolState {}
// SAFETY: as above; the pointer is only ever followed while the closure's owner waits in `run`.
unsafe impl Send for PoolState {}

/// Own cache line pair, so that claiming does not disturb counting.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Padded<T>(T);

thread_local! {
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
}

/// Pure spinning before the first yield; covers the gap between two operators of one step.
const SPIN: Duration = Duration::from_micros(20);
/// Yielding before sleep; covers sampling and the scheduler between two steps.
const YIELD: Duration = Duration::from_micros(400);

impl Pool {
    /// A pool of `threads` threads, the caller included (0 means 1), with the instruction set of
    /// [`Isa::current`].
    pub fn new(threads: usize) -> Pool {
        Pool::with_options(PoolOptions {
            threads,
            ..PoolOptions::default()
        })
    }

    /// A pool as `options` say. An instruction set that this CPU lacks is replaced by [`Isa::detect`]; a
    /// thread that the system refuses is left out.
    pub fn with_options(options: PoolOptions) -> Pool {
        let isa = options
            .isa
            .map(|isa| {
                if isa.is_available() {
                    isa
                } else {
                    Isa::detect()
                }
            })
            .unwrap_or_else(Isa::current);
        let shared = Arc::new(PoolState {
            word: Padded::default(),
            finished: Padded::default(),
            sleepers: Padded::default(),
            job: UnsafeCell::new(None),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        });
        let handles: Vec<_> = (1..options.threads.max(1))
            .filter_map(|index| {
                let shared = Arc::clone(&shared);
                let cpu = options.cpus.get(index - 1).copied();
                std::thread::Builder::new()
                    .name(format!("kernel-{index}"))
                    .spawn(move || {
                        if let Some(cpu) = cpu {
                            pin(cpu);
                        }
                        shared.work();
                    })
                    .ok()
            })
            .collect();
        Pool {
            shared,
            threads: handles.len() + 1,
            isa,
            turn: Mutex::new(()),
            handles,
        }
    }

    /// Threads that share the tasks, the caller included.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// The instruction set of the operators that are given this pool.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Calls `task(i)` once for each `i` in `0..tasks`, on whichever thread is free, and returns when all are
    /// done.
    ///
    /// # Panics
    /// With the first panic of a task, after the others are done; and when called from inside a task.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        assert!(
            !IN_TASK.get(),
            "Pool::run was called from inside a task of a pool"
        );
        if tasks == 0 {
            return;
        }
        if self.threads == 1 || tasks == 1 {
            let _inside = Inside::enter();
            (0..tasks).for_each(task);
            return;
        }
        assert!(tasks < 1 << 30, "a loop of {tasks} tasks is too long");
        let panic = {
            let _turn = lock(&self.turn);
            self.shared.publish(tasks, task);
            let mine = self.shared.take_tasks();
            self.shared.wait_for(tasks - mine);
            lock(&self.shared.panic).take()
        };
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Calls `task(i)` once for each `i` in `0..threads()`: for loops that cut their work into one part per
    /// thread. Parts must not wait for each other: one thread may run several.
    pub fn run_static(&self, task: &(dyn Fn(usize) + Sync)) {
        self.run(self.threads, task);
    }
}

/// Runs `work` with a pool of its own at a low processor priority (nice 5, on Linux), for work that is less
/// urgent than answers, such as packing a model's weights.
///
/// # Panics
/// As `work` does.
pub fn in_background<T: Send>(threads: usize, work: impl Fn(&Pool) -> T + Sync) -> T {
    std::thread::scope(|scope| {
        let lowered = std::thread::Builder::new()
            .name("background".to_owned())
            .spawn_scoped(scope, || {
                give_way();
                // Its threads inherit the priority.
                work(&Pool::new(threads))
            });
        match lowered.map(std::thread::ScopedJoinHandle::join) {
            Ok(Ok(result)) => result,
            Ok(Err(panic)) => resume_unwind(panic),
            // Without another thread the work runs at this one's priority.
            Err(_) => work(&Pool::new(threads)),
        }
    })
}

/// Lowers the priority of the calling thread, for good.
fn give_way() {
    // SAFETY: it concerns the calling thread only, which is new. Without it all goes on at the usual
    // priority.
    #[cfg(target_os = "linux")]
    unsafe {
        libc::nice(BACKGROUND)
    };
}

/// Niceness, as nice(2) defines it.
#[cfg(target_os = "linux")]
const BACKGROUND: libc::c_int = 5;

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.sleep));
        self.shared.wake.notify_all();
        for handle in self.handles.drain(..) {
            // A worker never panics outside catch_unwind.
            let _ = handle.join();
        }
    }
}

impl PoolState {
    fn publish(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime changes; `run` does not return before every claimed task is done, and
        // nothing can be claimed after that.
        let job: Job = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(std::ptr::from_ref(task))
        };
        // SAFETY: the caller holds `turn` and the last loop is complete, so no thread reads `job`.
        unsafe { *self.job.get() = Some(job) };
        self.finished.0.store(0, Ordering::Relaxed);
        self.word.0.store((tasks as u64) << 32, Ordering::SeqCst);
        let sleepers = self.sleepers.0.load(Ordering::SeqCst);
        if sleepers > 0 {
            drop(lock(&self.sleep));
            for _ in 0..sleepers.min(tasks - 1) {
                self.wake.notify_one();
            }
        }
    }

    /// Runs tasks until none is left; gives how many.
    fn take_tasks(&self) -> usize {
        let mut count = 0;
        loop {
            let word = self.word.0.fetch_add(1, Ordering::AcqRel);
            let (tasks, next) = split(word);
            if next >= tasks {
                return count;
            }
            // SAFETY: the claim succeeded, so the loop it belongs to is not complete and its closure is
            // alive.
            let job = unsafe { (*self.job.get()).map(|job| &*job) };
            let _inside = Inside::enter();
            if let Some(job) = job
                && let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(next)))
            {
                lock(&self.panic).get_or_insert(panic);
            }
            count += 1;
        }
    }

    fn wait_for(&self, others: usize) {
        let mut looks = 0_u32;
        while self.finished.0.load(Ordering::Acquire) < others {
            looks += 1;
            if looks < 2_000 {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }

    fn work(&self) {
        loop {
            let count = self.take_tasks();
            if count > 0 {
                self.finished.0.fetch_add(count, Ordering::Release);
            }
            if !self.wait_for_work() {
                return;
            }
        }
    }

    /// Returns true when there are tasks, false when the pool ends.
    fn wait_for_work(&self) -> bool {
        let start = Instant::now();
        let mut waited = Duration::ZERO;
        while waited < YIELD {
            for _ in 0..32 {
                if self.has_tasks() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if self.stop.load(Ordering::Relaxed) {
                return false;
            }
            waited = start.elapsed();
            if waited > SPIN {
                std::thread::yield_now();
            }
        }
        let mut guard = lock(&self.sleep);
        self.sleepers.0.fetch_add(1, Ordering::SeqCst);
        while !self.has_tasks() && !self.stop.load(Ordering::SeqCst) {
            guard = self
                .wake
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.0.fetch_sub(1, Ordering::SeqCst);
        drop(guard);
        !self.stop.load(Ordering::SeqCst)
    }

    fn has_tasks(&self) -> bool {
        let (tasks, next) = split(self.word.0.load(Ordering::SeqCst));
        next < tasks
    }
}

/// Marks the thread as running a task until dropped.
struct Inside(bool);

impl Inside {
    fn enter() -> Inside {
        Inside(IN_TASK.replace(true))
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        IN_TASK.set(self.0);
    }
}

fn split(word: u64) -> (usize, usize) {
    ((word >> 32) as usize, (word & 0xffff_ffff) as usize)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(target_os = "linux")]
fn pin(cpu: usize) {
    if cpu >= libc::CPU_SETSIZE as usize {
        return;
    }
    // SAFETY: a zeroed cpu_set_t is valid and `cpu` is within it; the call touches only the calling thread.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
    }
}

#[cfg(not(target_os = "linux"))]
fn pin(_cpu: usize) {}
