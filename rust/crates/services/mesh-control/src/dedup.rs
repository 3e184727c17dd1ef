//! Runs a repeated DCF task only once.
//!
//! A client that hears nothing sends its Task again: the same address, sequence and payload are the same
//! task. While it runs, the repeat is at most acknowledged; afterwards the kept answer is sent again. Kept
//! answers are bounded in count, bytes and time. The same address and sequence with *another* payload comes
//! from a client that started again: the old task is forgotten, because its answer would be a wrong one.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use dcf::{Message, Version};

/// Names a task. The same sequence in another version is another task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskKey {
    /// The client that sent it.
    pub client: SocketAddr,
    /// The version that it came in and is answered in.
    pub version: Version,
    /// Sequence of the task at that client.
    pub sequence: u32,
    /// The session that sealed it; `None` for plain DCF. A task of a session has the address at which that
    /// began, wherever its datagrams come from since.
    pub session: Option<u64>,
}

/// Bounds on the finished tasks that are kept.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Number of answers.
    pub answers: usize,
    /// Bytes of their payloads together. The newest answer is kept even if it alone has more: its client may
    /// still lack a part of it.
    pub bytes: usize,
    /// Time after which a finished task is forgotten.
    pub age: Duration,
}

/// State of a received Task at this head.
#[derive(Debug, Clone, PartialEq)]
pub enum Seen {
    /// New: run it, then call [`Dedup::finished`] or [`Dedup::forget`] with this number.
    New(Run),
    /// It runs already.
    Running,
    /// It is answered: send this again.
    Answered(Message),
}

/// Names one run of a task, so that the end of an old run does not touch a newer one under the same key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run(u64);

/// See the module's page.
#[derive(Debug)]
pub struct Dedup {
    limits: Limits,
    tasks: HashMap<TaskKey, Task>,
    /// Answered tasks, oldest first.
    answered: VecDeque<(TaskKey, Run, Instant)>,
    bytes: usize,
    next_run: u64,
}

#[derive(Debug)]
struct Task {
    run: Run,
    payload_hash: u64,
    answer: Option<Message>,
}

impl Dedup {
    /// An empty one.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            tasks: HashMap::new(),
            answered: VecDeque::new(),
            bytes: 0,
            next_run: 0,
        }
    }

    /// Looks up a Task that came in, and registers it if it is new.
    pub fn task(&mut self, key: TaskKey, payload: &[u8], now: Instant) -> Seen {
        self.expire(now);
        let payload_hash = hash(payload);
        if let Some(task) = self.tasks.get(&key)
            && task.payload_hash == payload_hash
        {
            return match &task.answer {
                Some(answer) => Seen::Answered(answer.clone()),
                None => Seen::Running,
            };
        }
        self.remove(key);
        let run = Run(self.next_run);
        self.next_run += 1;
        let task = Task {
            run,
            payload_hash,
            answer: None,
        };
        self.tasks.insert(key, task);
        Seen::New(run)
    }

    /// True if a task of that name runs.
    pub fn is_running(&self, key: TaskKey) -> bool {
        let task = self.tasks.get(&key);
        task.is_some_and(|task| task.answer.is_none())
    }

    /// Returns true if this run is still the one that its client waits for.
    pub fn is_current(&self, key: TaskKey, run: Run) -> bool {
        self.tasks.get(&key).is_some_and(|task| task.run == run)
    }

    /// A run ended with an answer to keep.
    pub fn finished(&mut self, key: TaskKey, run: Run, answer: Message, now: Instant) {
        let task = self.tasks.get_mut(&key);
        let Some(task) = task.filter(|task| task.run == run && task.answer.is_none()) else {
            return;
        };
        self.bytes += answer.payload.len();
        task.answer = Some(answer);
        self.answered.push_back((key, run, now));
        while self.answered.len() > self.limits.answers
            || (self.bytes > self.limits.bytes && self.answered.len() > 1)
        {
            self.drop_oldest();
        }
    }

    /// A run ended with an answer not to keep (the client had better try again).
    pub fn forget(&mut self, key: TaskKey, run: Run) {
        if self.is_current(key, run) {
            self.remove(key);
        }
    }

    /// Drops answers that are too old.
    pub fn expire(&mut self, now: Instant) {
        let age = self.limits.age;
        let is_old = |(_, _, at): &(_, _, Instant)| now.saturating_duration_since(*at) >= age;
        while self.answered.front().is_some_and(is_old) {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        if let Some((key, run, _)) = self.answered.pop_front() {
            self.forget(key, run);
        }
    }

    fn remove(&mut self, key: TaskKey) {
        if let Some(answer) = self.tasks.remove(&key).and_then(|task| task.answer) {
            self.bytes -= answer.payload.len();
        }
    }
}

fn hash(payload: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    payload.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use dcf::MsgType;

    use super::*;

    const LIMITS: Limits = Limits {
        answers: 3,
        bytes: 100,
        age: Duration::from_secs(60),
    };

    fn key(port: u16, sequence: u32) -> TaskKey {
        TaskKey {
            client: SocketAddr::from(([127, 0, 0, 1], port)),
            version: Version::V5_0,
            sequence,
            session: None,
        }
    }

    fn answer(text: &str) -> Message {
        Message::new(MsgType::RESULT, 1, 0, text.to_owned())
    }

    fn new_run(dedup: &mut Dedup, key: TaskKey, payload: &[u8], now: Instant) -> Run {
        match dedup.task(key, payload, now) {
            Seen::New(run) => run,
            other => panic!("not new: {other:?}"),
        }
    }

    #[test]
    fn a_repeat_runs_once_and_gets_the_kept_answer() {
        let now = Instant::now();
        let mut dedup = Dedup::new(LIMITS);
        let run = new_run(&mut dedup, key(1, 7), b"hi", now);
        assert_eq!(dedup.task(key(1, 7), b"hi", now), Seen::Running);
        dedup.finished(key(1, 7), run, answer("there"), now);
        assert_eq!(
            dedup.task(key(1, 7), b"hi", now),
            Seen::Answered(answer("there"))
        );
        // Another client with the same sequence is another task, and so is another version.
        new_run(&mut dedup, key(2, 7), b"hi", now);
        let newer = TaskKey {
            version: Version::V5_1,
            ..key(1, 7)
        };
        new_run(&mut dedup, newer, b"hi", now);
    }

    #[test]
    fn another_payload_is_a_new_task_and_the_old_run_leaves_no_trace() {
        let now = Instant::now();
        let mut dedup = Dedup::new(LIMITS);
        let old = new_run(&mut dedup, key(1, 7), b"one", now);
        let new = new_run(&mut dedup, key(1, 7), b"two", now);
        assert!(!dedup.is_current(key(1, 7), old));
        dedup.finished(key(1, 7), old, answer("to one"), now);
        assert_eq!(dedup.task(key(1, 7), b"two", now), Seen::Running);
        dedup.finished(key(1, 7), new, answer("to two"), now);
        assert_eq!(
            dedup.task(key(1, 7), b"two", now),
            Seen::Answered(answer("to two"))
        );
    }

    #[test]
    fn a_forgotten_task_runs_again() {
        let now = Instant::now();
        let mut dedup = Dedup::new(LIMITS);
        let run = new_run(&mut dedup, key(1, 7), b"hi", now);
        dedup.forget(key(1, 7), run);
        assert!(dedup.tasks.is_empty());
        new_run(&mut dedup, key(1, 7), b"hi", now);
    }

    #[test]
    fn what_is_kept_is_bounded_in_count_bytes_and_time() {
        let start = Instant::now();
        let mut dedup = Dedup::new(LIMITS);
        for sequence in 0..50 {
            let run = new_run(&mut dedup, key(1, sequence), b"hi", start);
            dedup.finished(key(1, sequence), run, answer("short"), start);
            assert!(dedup.tasks.len() <= 3);
        }
        let run = new_run(&mut dedup, key(1, 99), b"hi", start);
        dedup.finished(key(1, 99), run, answer(&"x".repeat(99)), start);
        assert_eq!((dedup.tasks.len(), dedup.bytes), (1, 99));
        let run = new_run(&mut dedup, key(1, 100), b"hi", start);
        dedup.finished(key(1, 100), run, answer(&"x".repeat(500)), start);
        assert_eq!(
            (dedup.tasks.len(), dedup.bytes),
            (1, 500),
            "the newest, however large"
        );
        dedup.expire(start + LIMITS.age);
        assert_eq!(
            (dedup.tasks.len(), dedup.bytes, dedup.answered.len()),
            (0, 0, 0)
        );
    }

    #[test]
    fn a_stale_entry_of_the_age_list_does_not_drop_a_newer_run() {
        let start = Instant::now();
        let mut dedup = Dedup::new(LIMITS);
        let run = new_run(&mut dedup, key(1, 7), b"one", start);
        dedup.finished(key(1, 7), run, answer("1"), start);
        let later = start + Duration::from_secs(50);
        let run = new_run(&mut dedup, key(1, 7), b"two", later);
        dedup.finished(key(1, 7), run, answer("2"), later);
        dedup.expire(start + LIMITS.age);
        assert_eq!(
            dedup.task(key(1, 7), b"two", later),
            Seen::Answered(answer("2"))
        );
    }
}
