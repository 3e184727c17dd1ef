//! Sends large answers at the pace of their receivers.
//!
//! A socket buffers 212,992 bytes on Linux unless a larger buffer is set, and a Chunk takes about 2,300 of
//! them with the kernel's bookkeeping. Datagrams beyond that are lost silently, so an answer of hundreds of
//! Chunks that is sent at once never arrives whole, however often it is repeated. Here each receiver gets a
//! few Chunks at a time. Several answers to one receiver take turns and share its pace: behind one address
//! there may be a shim with many clients.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use dcf::Message;
use dcf::chunk::Split;

use super::dedup::TaskKey;

/// Rate at which Chunks are sent, and bounds on those that wait.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Chunks that one receiver gets at a time.
    pub burst: usize,
    /// Time between two bursts to the same receiver.
    pub pause: Duration,
    /// Bytes of the answers under way, over all receivers.
    pub bytes: usize,
}

impl Default for Limits {
    /// At most 11 MB/s to one receiver, which may be busy elsewhere for 10 ms without a loss.
    fn default() -> Self {
        Self {
            burst: 16,
            pause: Duration::from_millis(2),
            bytes: 256 << 20,
        }
    }
}

/// Result of [`Outbox::add`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Added {
    /// It is the first: the caller has to start polling [`Outbox::due`].
    First,
    /// It goes with the others.
    Queued,
    /// There is no room for it.
    Full,
}

/// Answers that are being sent. See the module's page.
#[derive(Debug)]
pub struct Outbox {
    limits: Limits,
    queues: BTreeMap<Receiver, Queue>,
    bytes: usize,
}

/// An address, or a session of a client.
type Receiver = (SocketAddr, Option<u64>);

/// Answers that are being sent to one receiver.
#[derive(Debug)]
struct Queue {
    answers: VecDeque<Sending>,
    /// Time of the next burst.
    due: Instant,
}

#[derive(Debug)]
struct Sending {
    key: TaskKey,
    chunks: Split,
    /// Of the whole payload, as counted in [`Outbox::bytes`].
    bytes: usize,
}

impl Outbox {
    /// An empty one.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            queues: BTreeMap::new(),
            bytes: 0,
        }
    }

    /// Takes an answer of `bytes` bytes, in place of the rest of an earlier one to the same task.
    pub fn add(&mut self, key: TaskKey, chunks: Split, bytes: usize, now: Instant) -> Added {
        self.remove(key);
        if self.bytes.saturating_add(bytes) > self.limits.bytes {
            return Added::Full;
        }
        let first = self.queues.is_empty();
        let queue = self.queues.entry(receiver(key)).or_insert_with(|| Queue {
            answers: VecDeque::new(),
            due: now,
        });
        queue.answers.push_back(Sending { key, chunks, bytes });
        self.bytes += bytes;
        if first { Added::First } else { Added::Queued }
    }

    /// Returns true if the answer to this task is being sent.
    pub fn is_sending(&self, key: TaskKey) -> bool {
        let queue = self.queues.get(&receiver(key));
        queue.is_some_and(|queue| queue.answers.iter().any(|of| of.answers(key)))
    }

    /// Sends no more of the answer to this task.
    pub fn remove(&mut self, key: TaskKey) {
        let Some(queue) = self.queues.get_mut(&receiver(key)) else {
            return;
        };
        if let Some(at) = queue.answers.iter().position(|of| of.answers(key)) {
            let removed = queue.answers.remove(at);
            self.bytes -= removed.map_or(0, |sending| sending.bytes);
        }
    }

    /// Passes every Chunk that is due to `send`, with the task that it answers. Returns the time to ask
    /// again; `None` if nothing is left.
    pub fn due(&mut self, now: Instant, mut send: impl FnMut(TaskKey, Message)) -> Option<Instant> {
        let Limits { burst, pause, .. } = self.limits;
        for queue in self.queues.values_mut() {
            if queue.due > now || queue.answers.is_empty() {
                continue;
            }
            // Time that was missed is not made up for: that would be a larger burst.
            queue.due = now + pause;
            for _ in 0..burst {
                let Some(mut sending) = queue.answers.pop_front() else {
                    break;
                };
                if let Some(chunk) = sending.chunks.next() {
                    send(sending.key, chunk);
                }
                if sending.chunks.len() == 0 {
                    self.bytes -= sending.bytes;
                } else {
                    queue.answers.push_back(sending);
                }
            }
        }
        // A queue outlives its last burst by a pause, so that a new answer does not come right behind it.
        self.queues
            .retain(|_, queue| queue.due > now || !queue.answers.is_empty());
        self.queues.values().map(|queue| queue.due).min()
    }
}

impl Sending {
    /// True if it is an answer to this task of its receiver.
    fn answers(&self, key: TaskKey) -> bool {
        self.key == key
    }
}

fn receiver(key: TaskKey) -> Receiver {
    (key.client, key.session)
}

#[cfg(test)]
mod tests {
    use dcf::Version;
    use dcf::chunk::{self, Chunk, MAX_DATA};

    use super::*;

    const LIMITS: Limits = Limits {
        burst: 4,
        pause: Duration::from_millis(2),
        bytes: 100 * MAX_DATA,
    };

    fn key(port: u16, sequence: u32) -> TaskKey {
        TaskKey {
            client: SocketAddr::from(([127, 0, 0, 1], port)),
            version: Version::V5_0,
            sequence,
            session: None,
        }
    }

    fn add(outbox: &mut Outbox, key: TaskKey, chunks: usize, now: Instant) -> Added {
        let payload = vec![key.sequence as u8; chunks * MAX_DATA];
        let split = chunk::split(key.sequence, 0, payload.into()).expect("fits");
        outbox.add(key, split, chunks * MAX_DATA, now)
    }

    /// Chunks due at `now`, as port, sequence and index, and the time to ask again.
    fn due(outbox: &mut Outbox, now: Instant) -> (Vec<(u16, u32, u16)>, Option<Instant>) {
        let mut sent = Vec::new();
        let next = outbox.due(now, |key, message| {
            let chunk = Chunk::parse(&message.payload).expect("a Chunk");
            sent.push((key.client.port(), message.sequence, chunk.index));
        });
        (sent, next)
    }

    #[test]
    fn an_answer_goes_in_bursts_and_every_chunk_once() {
        let start = Instant::now();
        let mut outbox = Outbox::new(LIMITS);
        assert_eq!(add(&mut outbox, key(1, 7), 10, start), Added::First);
        let (mut now, mut indices) = (start, Vec::new());
        loop {
            assert_eq!(
                due(&mut outbox, now - Duration::from_nanos(1)).0,
                [],
                "too early"
            );
            let (sent, next) = due(&mut outbox, now);
            assert!(sent.len() <= LIMITS.burst);
            indices.extend(sent.iter().map(|(_, _, index)| *index));
            let Some(next) = next else { break };
            assert_eq!(next, now + LIMITS.pause);
            now = next;
        }
        assert_eq!(indices, (0..10).collect::<Vec<_>>());
        assert_eq!((outbox.bytes, outbox.queues.len()), (0, 0));
        assert_eq!(now, start + 3 * LIMITS.pause);
    }

    #[test]
    fn a_late_tick_sends_no_more_than_one_burst() {
        let start = Instant::now();
        let mut outbox = Outbox::new(LIMITS);
        add(&mut outbox, key(1, 7), 10, start);
        assert_eq!(due(&mut outbox, start + 9 * LIMITS.pause).0.len(), 4);
    }

    #[test]
    fn answers_to_one_receiver_share_its_pace_and_others_have_their_own() {
        let now = Instant::now();
        let mut outbox = Outbox::new(LIMITS);
        assert_eq!(add(&mut outbox, key(1, 7), 10, now), Added::First);
        assert_eq!(add(&mut outbox, key(1, 8), 10, now), Added::Queued);
        assert_eq!(add(&mut outbox, key(2, 7), 2, now), Added::Queued);
        let (sent, _) = due(&mut outbox, now);
        let expected = [
            (1, 7, 0),
            (1, 8, 0),
            (1, 7, 1),
            (1, 8, 1),
            (2, 7, 0),
            (2, 7, 1),
        ];
        assert_eq!(sent, expected);
    }

    #[test]
    fn a_new_answer_does_not_come_right_behind_the_last_burst() {
        let start = Instant::now();
        let mut outbox = Outbox::new(LIMITS);
        add(&mut outbox, key(1, 7), 4, start);
        assert_eq!(due(&mut outbox, start).0.len(), 4);
        assert_eq!(add(&mut outbox, key(1, 8), 4, start), Added::Queued);
        assert_eq!(due(&mut outbox, start).0, []);
        assert_eq!(due(&mut outbox, start + LIMITS.pause).0.len(), 4);
    }

    #[test]
    fn a_new_answer_to_the_same_task_takes_the_old_ones_place() {
        let now = Instant::now();
        let mut outbox = Outbox::new(LIMITS);
        add(&mut outbox, key(1, 7), 10, now);
        assert!(outbox.is_sending(key(1, 7)) && !outbox.is_sending(key(2, 7)));
        due(&mut outbox, now);
        assert_eq!(add(&mut outbox, key(1, 7), 2, now), Added::Queued);
        let (sent, _) = due(&mut outbox, now + LIMITS.pause);
        assert_eq!(sent, [(1, 7, 0), (1, 7, 1)]);
        assert!(!outbox.is_sending(key(1, 7)));
    }

    #[test]
    fn what_is_under_way_is_bounded_and_a_removed_answer_makes_room() {
        let now = Instant::now();
        let mut outbox = Outbox::new(LIMITS);
        assert_eq!(add(&mut outbox, key(1, 7), 60, now), Added::First);
        assert_eq!(add(&mut outbox, key(1, 8), 60, now), Added::Full);
        assert!(!outbox.is_sending(key(1, 8)));
        outbox.remove(key(1, 7));
        // The earlier poller has not noticed yet, and is still there.
        assert_eq!(add(&mut outbox, key(1, 8), 60, now), Added::Queued);
    }

    #[test]
    fn the_default_fits_the_smallest_usual_socket_many_times_over() {
        let held = 212_992 / 2_304;
        assert!(5 * Limits::default().burst <= held);
    }
}
