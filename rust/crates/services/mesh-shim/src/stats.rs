//! Counters, written by the one loop and read by anyone.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A number that only the loop changes. That makes a plain load and store enough to add to it.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Value of the counter.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }

    pub(crate) fn add(&self, amount: u64) {
        self.0
            .store(self.0.load(Relaxed).wrapping_add(amount), Relaxed);
    }

    pub(crate) fn count(&self) {
        self.add(1);
    }

    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }
}

macro_rules! counters {
    (
        $(#[$doc:meta])* $struct:ident, $label:literal:
        $($(#[doc = $help:literal])* $field:ident,)*
    ) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub struct $struct {
            $($(#[doc = $help])* pub $field: Counter,)*
        }

        impl $struct {
            #[doc = concat!("Each counter with its name, which is the value of the label `", $label, "` in the metrics.")]
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, &Counter)> {
                [$((stringify!($field), &self.$field),)*].into_iter()
            }
        }
    };
}

counters! {
    /// Good datagrams and tasks, counted by source, destination and kind.
    Traffic, "kind":
    /// From clients, all of them.
    from_clients,
    /// From heads, all of them.
    from_heads,
    /// Sent to heads, tasks and what belongs to them.
    to_heads,
    /// Sent to clients: answers of heads.
    to_clients,
    /// Sent to clients: answers of the shim itself.
    replies,
    /// Tasks that are new.
    tasks,
    /// Tasks that were repeated by their client.
    repeats,
    /// Tasks that were answered.
    answers,
    /// Datagrams of tasks sent again because their head was lost or came back.
    resent,
    /// Probes sent to heads.
    probes,
    /// Challenges sent to unverified sources.
    challenges,
    /// Sources that answered a challenge.
    verified,
    /// Times that another head took over.
    failovers,
}

counters! {
    /// Datagrams that were dropped, by reason.
    Drops, "reason":
    /// Shorter than a header.
    short_header,
    /// Shorter than the header says.
    truncated,
    /// Type that is not assigned.
    unknown_type,
    /// First byte that is neither a type nor the version byte of DCF v5.1.
    other_version,
    /// Type that has no business in this direction.
    unexpected_type,
    /// Chunk whose own header is wrong.
    bad_chunk,
    /// Source port 0, to which nothing can be sent.
    bad_source,
    /// Over the rate limit of its source.
    rate_limited,
    /// From a source outside of the trusted networks.
    untrusted,
    /// From a source without a valid cookie, and too short to be answered with a challenge.
    unverified,
    /// Cookie that is wrong or old.
    bad_cookie,
    /// Belongs to no known task.
    no_task,
    /// No head to send it to.
    no_head,
    /// All task slots are taken.
    table_full,
    /// New task while the shim shuts down.
    draining,
    /// From a head: not a message.
    head_malformed,
    /// From a head: type that no client gets.
    head_unexpected,
    /// From a head: for a task that is over or was never known.
    stale_answer,
    /// From a head: a second answer to a task.
    duplicate_answer,
    /// From a head: an answer that is too long for a datagram of its client's version, or for which no room
    /// was left while it was brought into that version's form.
    untranslated,
    /// Task that was not answered in time.
    timed_out,
    /// The kernel did not take it.
    send_failed,
}

/// All counters of a shim.
#[derive(Debug, Default)]
pub struct Stats {
    /// Datagrams that were sent on.
    pub traffic: Traffic,
    /// Datagrams that were dropped, by cause.
    pub drops: Drops,
    /// Bytes received from clients.
    pub client_bytes_in: Counter,
    /// Bytes sent to clients.
    pub client_bytes_out: Counter,
    /// Tasks that a head works on.
    pub open_tasks: Counter,
    /// Index of the head that gets the tasks.
    pub current_head: Counter,
    /// Heads that are live now.
    pub live_heads: Counter,
}

impl Stats {
    /// Datagrams from clients that went no further.
    pub fn dropped(&self) -> u64 {
        self.drops.iter().map(|(_, counter)| counter.get()).sum()
    }
}
