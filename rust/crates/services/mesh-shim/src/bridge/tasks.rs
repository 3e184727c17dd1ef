//! Table of tasks: the client and its sequence, the sequence toward the head, and the state of each.

use std::{
    hash::{BuildHasher, RandomState},
    net::SocketAddr,
    time::Instant,
};

use dcf::Version;

use super::retain::Chain;

/// All tasks, in slots that are allocated once.
///
/// A slot's index and its generation make up the sequence toward the head, so that an answer finds its slot
/// without a search, and an answer that comes after the slot was given to another task is recognised as
/// stale. Every slot is in one of three lists: free, open (a head works on it) or answered (kept a while, so
/// that a repeat has the same sequence again). All three are in the order in which their slots came, which is
/// also the order of their deadlines.
#[derive(Debug)]
pub(super) struct TaskTable {
    slots: Box<[Slot]>,
    /// First slot of each chain of equal hashes.
    buckets: Box<[u32]>,
    lists: [List; 3],
    index_bits: u32,
    hasher: RandomState,
}

/// An open or answered task.
#[derive(Clone, Debug)]
pub(super) struct Task {
    /// Address of the client.
    pub(super) client: SocketAddr,
    /// The version of the question and of the answer. The same sequence in another version is another task.
    pub(super) version: Version,
    /// The client's sequence.
    pub(super) sequence: u32,
    /// The timestamp of the question.
    pub(super) timestamp_us: u64,
    /// The head that it was last sent to.
    pub(super) head: usize,
    /// The version in which that head was asked.
    pub(super) upstream: Version,
    /// That head's epoch then.
    pub(super) epoch: u32,
    /// Time at which it is given up, or forgotten if it is answered.
    pub(super) deadline: Instant,
    /// Datagrams that were sent, to send them again.
    pub(super) retained: Chain,
    /// True if `retained` is all of it.
    pub(super) complete: bool,
    /// The answer comes, or came, as Chunks.
    pub(super) chunked_answer: bool,
    /// Its head was asked whether it still works on it, and has not said so yet.
    pub(super) asked: bool,
    /// A head that challenges it again is not sent it again before.
    pub(super) paced: Instant,
}

/// Index of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TaskId(u32);

impl TaskId {
    fn at(index: u32) -> Option<Self> {
        (index != NONE).then_some(Self(index))
    }
}

/// The list that a slot is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TaskState {
    Free = 0,
    Open = 1,
    Answered = 2,
}

#[derive(Clone, Debug)]
struct Slot {
    task: Task,
    state: TaskState,
    generation: u32,
    previous: u32,
    next: u32,
    bucket_next: u32,
}

#[derive(Clone, Copy, Debug)]
struct List {
    first: u32,
    last: u32,
    len: usize,
}

impl TaskTable {
    /// A table of at least `capacity` tasks. `generation` is where the generations begin, best chosen at
    /// random: the head may still know sequences of an earlier process.
    pub(super) fn new(capacity: usize, generation: u32, now: Instant) -> Self {
        let capacity = capacity.clamp(2, MAX_TASKS).next_power_of_two();
        let nobody = Task {
            client: SocketAddr::from(([0, 0, 0, 0], 0)),
            version: Version::default(),
            upstream: Version::default(),
            sequence: 0,
            timestamp_us: 0,
            head: 0,
            epoch: 0,
            deadline: now,
            retained: Chain::EMPTY,
            complete: false,
            chunked_answer: false,
            asked: false,
            paced: now,
        };
        let slot = Slot {
            task: nobody,
            state: TaskState::Free,
            generation,
            previous: NONE,
            next: NONE,
            bucket_next: NONE,
        };
        let mut table = Self {
            slots: vec![slot; capacity].into(),
            buckets: vec![NONE; capacity * 2].into(),
            lists: [List {
                first: NONE,
                last: NONE,
                len: 0,
            }; 3],
            index_bits: capacity.trailing_zeros(),
            hasher: RandomState::new(),
        };
        for index in 0..capacity as u32 {
            table.link(index, TaskState::Free);
        }
        table
    }

    /// The slot of the task of `client` in `version` under `sequence`.
    pub(super) fn find(
        &self,
        client: SocketAddr,
        version: Version,
        sequence: u32,
    ) -> Option<TaskId> {
        let first = TaskId::at(self.buckets[self.bucket(client, version, sequence)]);
        let behind = |id: &TaskId| TaskId::at(self.slots[id.0 as usize].bucket_next);
        std::iter::successors(first, behind).find(|id| {
            let task = self.get(*id);
            (task.client, task.version, task.sequence) == (client, version, sequence)
        })
    }

    /// The slot that an answer of the head with `sequence` is for.
    pub(super) fn find_upstream(&self, sequence: u32) -> Option<TaskId> {
        let id = TaskId(sequence & (self.slots.len() as u32 - 1));
        let known = self.state(id) != TaskState::Free && self.upstream_sequence(id) == sequence;
        known.then_some(id)
    }

    /// The sequence of the task toward the head.
    pub(super) fn upstream_sequence(&self, id: TaskId) -> u32 {
        let generation = self.slots[id.0 as usize].generation;
        // The upper bits of the generation fall off: it goes round.
        generation << self.index_bits | id.0
    }

    /// Opens a slot for `task`, the one answered longest ago if there is no free one. `None` if all are open.
    pub(super) fn open(&mut self, task: Task) -> Option<TaskId> {
        let id = match (self.first(TaskState::Free), self.first(TaskState::Answered)) {
            (Some(free), _) => free,
            (None, Some(answered)) => {
                self.close(answered);
                answered
            }
            (None, None) => return None,
        };
        let bucket = self.bucket(task.client, task.version, task.sequence);
        self.unlink(id.0);
        let slot = &mut self.slots[id.0 as usize];
        slot.generation = slot.generation.wrapping_add(1);
        slot.task = task;
        slot.bucket_next = self.buckets[bucket];
        self.buckets[bucket] = id.0;
        self.link(id.0, TaskState::Open);
        Some(id)
    }

    /// Puts an open task among the answered or back, as the newest there.
    pub(super) fn set_state(&mut self, id: TaskId, state: TaskState, deadline: Instant) {
        self.unlink(id.0);
        self.slots[id.0 as usize].task.deadline = deadline;
        self.link(id.0, state);
    }

    /// Frees the slot. What it retained must have been released before.
    pub(super) fn close(&mut self, id: TaskId) {
        let Slot {
            task, bucket_next, ..
        } = &self.slots[id.0 as usize];
        debug_assert_eq!(task.retained.len(), 0, "a closed task still holds memory");
        let after = *bucket_next;
        let bucket = self.bucket(task.client, task.version, task.sequence);
        let mut link = &mut self.buckets[bucket];
        while *link != id.0 {
            let before = *link as usize;
            link = &mut self.slots[before].bucket_next;
        }
        *link = after;
        self.unlink(id.0);
        self.link(id.0, TaskState::Free);
    }

    pub(super) fn get(&self, id: TaskId) -> &Task {
        &self.slots[id.0 as usize].task
    }

    pub(super) fn get_mut(&mut self, id: TaskId) -> &mut Task {
        &mut self.slots[id.0 as usize].task
    }

    pub(super) fn state(&self, id: TaskId) -> TaskState {
        self.slots[id.0 as usize].state
    }

    /// The slot longest in `state`.
    pub(super) fn first(&self, state: TaskState) -> Option<TaskId> {
        TaskId::at(self.lists[state as usize].first)
    }

    /// The slot that came to its list after `id`.
    pub(super) fn next(&self, id: TaskId) -> Option<TaskId> {
        TaskId::at(self.slots[id.0 as usize].next)
    }

    /// Number of slots in `state`.
    pub(super) fn count(&self, state: TaskState) -> usize {
        self.lists[state as usize].len
    }

    fn bucket(&self, client: SocketAddr, version: Version, sequence: u32) -> usize {
        self.hasher.hash_one((client, version, sequence)) as usize & (self.buckets.len() - 1)
    }

    fn link(&mut self, index: u32, state: TaskState) {
        let list = &mut self.lists[state as usize];
        let last = list.last;
        list.last = index;
        list.len += 1;
        if last == NONE {
            list.first = index;
        } else {
            self.slots[last as usize].next = index;
        }
        let slot = &mut self.slots[index as usize];
        (slot.state, slot.previous, slot.next) = (state, last, NONE);
    }

    fn unlink(&mut self, index: u32) {
        let Slot {
            state,
            previous,
            next,
            ..
        } = self.slots[index as usize];
        let list = &mut self.lists[state as usize];
        list.len -= 1;
        if previous == NONE {
            list.first = next;
        } else {
            self.slots[previous as usize].next = next;
        }
        if next == NONE {
            list.last = previous;
        } else {
            self.slots[next as usize].previous = previous;
        }
    }
}

const NONE: u32 = u32::MAX;
/// Most tasks that a table can hold: at least 12 bits are left for the generation.
pub(crate) const MAX_TASKS: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, time::Duration};

    use proptest::prelude::*;

    use super::*;

    fn task(port: u16, sequence: u32, now: Instant) -> Task {
        Task {
            client: SocketAddr::from(([127, 0, 0, 1], port)),
            version: Version::V5_0,
            upstream: Version::V5_0,
            sequence,
            timestamp_us: 0,
            head: 0,
            epoch: 0,
            deadline: now,
            retained: Chain::EMPTY,
            complete: true,
            chunked_answer: false,
            asked: false,
            paced: now,
        }
    }

    #[test]
    fn a_late_answer_does_not_find_the_slots_next_task() {
        let now = Instant::now();
        let mut table = TaskTable::new(2, 0, now);
        let first = table.open(task(1, 7, now)).unwrap();
        let upstream = table.upstream_sequence(first);
        assert_eq!(table.find_upstream(upstream), Some(first));
        table.close(first);
        assert_eq!(table.find_upstream(upstream), None);
        let second = table.open(task(1, 7, now)).unwrap();
        let third = table.open(task(2, 7, now)).unwrap();
        assert!(
            [second, third].contains(&first),
            "one of the two has the old slot"
        );
        assert_eq!(table.find_upstream(upstream), None);
    }

    #[test]
    fn answered_tasks_make_room_and_open_ones_do_not() {
        let now = Instant::now();
        let mut table = TaskTable::new(2, u32::MAX, now);
        let a = table.open(task(1, 1, now)).unwrap();
        let b = table.open(task(1, 2, now)).unwrap();
        assert_eq!(table.open(task(1, 3, now)), None);
        table.set_state(b, TaskState::Answered, now);
        assert!(table.open(task(1, 3, now)).is_some());
        assert_eq!(
            table.find(task(1, 1, now).client, Version::V5_0, 1),
            Some(a)
        );
        assert_eq!(table.find(task(1, 2, now).client, Version::V5_0, 2), None);
    }

    proptest! {
        #[test]
        fn the_table_agrees_with_a_plain_map(steps in prop::collection::vec((0u8..4, 0u16..4, 0u32..6), 0..300)) {
            let start = Instant::now();
            let mut table = TaskTable::new(8, 0xFFFF_FFF0, start);
            let mut model: HashMap<(u16, u32), (TaskId, TaskState)> = HashMap::new();
            for (step, (action, port, sequence)) in steps.into_iter().enumerate() {
                let now = start + Duration::from_millis(step as u64);
                let task = task(port, sequence, now);
                let known = model.get(&(port, sequence)).copied();
                prop_assert_eq!(table.find(task.client, Version::V5_0, sequence), known.map(|(id, _)| id));
                match (action, known) {
                    (0 | 1, None) => {
                        let had_room = table.count(TaskState::Open) < 8;
                        let oldest = table.first(TaskState::Answered).filter(|_| table.count(TaskState::Free) == 0);
                        let opened = table.open(task);
                        prop_assert_eq!(opened.is_some(), had_room);
                        if let Some(id) = opened {
                            if let Some(oldest) = oldest {
                                model.retain(|_, (id, _)| *id != oldest);
                            }
                            prop_assert_eq!(table.find_upstream(table.upstream_sequence(id)), Some(id));
                            model.insert((port, sequence), (id, TaskState::Open));
                        }
                    }
                    (2, Some((id, _))) => {
                        table.set_state(id, TaskState::Answered, now);
                        model.insert((port, sequence), (id, TaskState::Answered));
                    }
                    (3, Some((id, _))) => {
                        table.close(id);
                        model.remove(&(port, sequence));
                    }
                    _ => {}
                }
                for state in [TaskState::Open, TaskState::Answered] {
                    let expected = model.values().filter(|(_, of)| *of == state).count();
                    prop_assert_eq!(table.count(state), expected);
                    let ids: Vec<TaskId> = std::iter::successors(table.first(state), |id| table.next(*id)).collect();
                    prop_assert_eq!(ids.len(), expected);
                    prop_assert!(ids.iter().all(|id| table.state(*id) == state));
                    prop_assert!(ids.iter().is_sorted_by_key(|id| table.get(*id).deadline));
                }
                prop_assert_eq!(table.count(TaskState::Free), 8 - model.len());
            }
        }
    }
}
