//! The open connections, and the choice of the one to close when there are too many. Times go in, decisions
//! come out.
//!
//! A connection with an answer under way is never closed. Of the idle ones, the one that has waited longest
//! is closed, of the source that has the most. So neither silence nor a flood from one source keeps others
//! out.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::time::Instant;

use mesh_base::addresses::source;

use super::Connections;

/// Number of a connection; never reused.
pub(super) type Id = u64;

/// Limits on the number of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bounds {
    /// All connections together.
    pub total: usize,
    /// Connections of one source.
    pub per_source: usize,
    /// Connections above `total`, which may only ask for health.
    pub reserve: usize,
}

/// Outcome of admitting a connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Admitted {
    /// Number of the new connection.
    pub id: Id,
    /// The connection may only ask for health.
    pub restricted: bool,
    /// Connection that is evicted for it.
    pub evicted: Option<Id>,
}

/// The open connections and their limits.
#[derive(Debug)]
pub(super) struct Table {
    bounds: Bounds,
    entries: BTreeMap<Id, Connection>,
    sources: HashMap<IpAddr, usize>,
    restricted: usize,
    next: Id,
}

#[derive(Debug)]
struct Connection {
    source: IpAddr,
    restricted: bool,
    /// Requests whose answers are not complete.
    answering: usize,
    /// Requests whose bodies are not complete. Some may be answered: the rest of a refused body is read, too.
    reading: usize,
    /// Times since which pieces of answers wait to be taken, one per answer at most.
    offers: Vec<Instant>,
    /// The beginning of the present wait.
    since: Instant,
    wait: Wait,
}

/// The expected input while nothing is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// The rest of a request's head, or the first one.
    Head,
    /// The next request.
    Next,
    /// The next request on a connection with concurrent streams, where single bytes are not progress.
    Streams,
}

impl Table {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            entries: BTreeMap::new(),
            sources: HashMap::new(),
            restricted: 0,
            next: 0,
        }
    }

    /// Number of connections.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Enters a connection. The evicted one counts until it is [closed](Self::closed).
    pub(super) fn open(&mut self, address: IpAddr, now: Instant) -> Admitted {
        let source = source(address);
        let of_source = self.sources.get(&source).copied().unwrap_or(0);
        let (mut restricted, mut evicted) = (false, None);
        // A proxy on this machine speaks for many.
        if of_source >= self.bounds.per_source && !source.is_loopback() {
            evicted = self.longest_waiting(|entry| entry.source == source);
            restricted = evicted.is_none();
        }
        if !restricted && evicted.is_none() && self.len() - self.restricted >= self.bounds.total {
            let most = self.most_waiting_source();
            evicted = self.longest_waiting(|entry| Some(entry.source) == most);
            restricted = evicted.is_none();
        }
        if restricted && self.restricted >= self.bounds.reserve {
            let oldest = self.entries.iter().find(|(_, entry)| entry.restricted);
            evicted = oldest.map(|(&id, _)| id);
        }
        let id = self.next;
        self.next += 1;
        self.restricted += usize::from(restricted);
        *self.sources.entry(source).or_default() += 1;
        let entry = Connection {
            source,
            restricted,
            answering: 0,
            reading: 0,
            offers: Vec::new(),
            since: now,
            wait: Wait::Head,
        };
        self.entries.insert(id, entry);
        if let Some(evicted) = evicted {
            self.closed(evicted);
        }
        Admitted {
            id,
            restricted,
            evicted,
        }
    }

    /// The system has no room for another connection; returns an idle one to close.
    pub(super) fn exhausted(&mut self) -> Option<Id> {
        let most = self.most_waiting_source();
        let evicted = self.longest_waiting(|entry| Some(entry.source) == most)?;
        self.closed(evicted);
        Some(evicted)
    }

    /// Records that bytes arrived.
    pub(super) fn heard(&mut self, id: Id, now: Instant) {
        if let Some(entry) = self.entries.get_mut(&id)
            && entry.answering == 0
            && entry.reading == 0
            && entry.wait == Wait::Next
        {
            (entry.wait, entry.since) = (Wait::Head, now);
        }
    }

    /// The source of a connection of which the head of a request is awaited, and nothing else.
    pub(super) fn head_from(&self, id: Id) -> Option<IpAddr> {
        let entry = self.entries.get(&id)?;
        (entry.answering == 0 && entry.wait == Wait::Head).then_some(entry.source)
    }

    /// Records that the head of a request is complete; `body` is true if its body is still to come.
    pub(super) fn asked(&mut self, id: Id, body: bool, streams: bool, now: Instant) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.answering += 1;
            entry.reading += usize::from(body);
            entry.since = now;
            entry.wait = if streams { Wait::Streams } else { Wait::Next };
        }
    }

    /// Records that the body of a request is complete or given up.
    pub(super) fn read(&mut self, id: Id) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.reading = entry.reading.saturating_sub(1);
        }
    }

    /// Records that a piece of an answer is ready for the client.
    pub(super) fn offered(&mut self, id: Id, now: Instant) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.offers.push(now);
        }
    }

    /// The piece that was [offered](Self::offered) at that time has room on its way, or its answer is given up.
    pub(super) fn taken(&mut self, id: Id, offered: Instant) {
        if let Some(entry) = self.entries.get_mut(&id)
            && let Some(place) = entry.offers.iter().position(|&at| at == offered)
        {
            entry.offers.swap_remove(place);
        }
    }

    /// Records that an answer is complete or given up.
    pub(super) fn answered(&mut self, id: Id, now: Instant) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.answering = entry.answering.saturating_sub(1);
            entry.since = now;
        }
    }

    /// Removes a closed connection.
    pub(super) fn closed(&mut self, id: Id) {
        let Some(entry) = self.entries.remove(&id) else {
            return;
        };
        self.restricted -= usize::from(entry.restricted);
        if let Some(count) = self.sources.get_mut(&entry.source) {
            *count -= 1;
            if *count == 0 {
                self.sources.remove(&entry.source);
            }
        }
    }

    /// True if no answer is under way on the connection.
    pub(super) fn waits(&self, id: Id) -> bool {
        let entry = self.entries.get(&id);
        entry.is_none_or(|entry| entry.answering == 0)
    }

    /// Time at which a connection must be closed unless there is progress.
    pub(super) fn due(&self, id: Id, limits: &Connections) -> Option<Instant> {
        let entry = self.entries.get(&id)?;
        if let Some(&oldest) = entry.offers.iter().min() {
            return Some(oldest + limits.write_timeout);
        }
        if entry.answering > 0 {
            return None;
        }
        let limit = match entry.wait {
            Wait::Head => limits.header_timeout,
            Wait::Next | Wait::Streams => limits.idle_timeout,
        };
        Some(entry.since + limit)
    }

    /// The connection of them that has waited longest: for a request or, if none waits for one, for a body.
    fn longest_waiting(&self, of: impl Fn(&Connection) -> bool) -> Option<Id> {
        let candidates = self
            .entries
            .iter()
            .filter(|(_, entry)| of(entry) && entry.is_evictable());
        let longest = candidates.min_by_key(|(_, entry)| (entry.answering > 0, entry.since));
        longest.map(|(&id, _)| id)
    }

    fn most_waiting_source(&self) -> Option<IpAddr> {
        let mut counts: BTreeMap<IpAddr, usize> = BTreeMap::new();
        for entry in self.entries.values().filter(|entry| entry.is_evictable()) {
            *counts.entry(entry.source).or_default() += 1;
        }
        let most = counts.into_iter().max_by_key(|&(_, count)| count);
        most.map(|(source, _)| source)
    }
}

impl Connection {
    /// True if it has sent all that is answered on it.
    fn is_evictable(&self) -> bool {
        !self.restricted && self.answering <= self.reading
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn patience() -> Connections {
        Connections {
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(75),
            write_timeout: Duration::from_secs(60),
            ..Connections::default()
        }
    }

    fn table(total: usize, per_source: usize) -> Table {
        Table::new(Bounds {
            total,
            per_source,
            reserve: 2,
        })
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_full_table_gives_up_what_waits_longest_of_whoever_waits_most() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut table = table(4, 4);
        let honest = table.open(ip("10.0.0.1"), at(0)).id;
        let flood: Vec<Id> = (1..4)
            .map(|n| table.open(ip("10.0.0.2"), at(n)).id)
            .collect();
        let new = table.open(ip("10.0.0.3"), at(5));
        assert_eq!((new.evicted, new.restricted), (Some(flood[0]), false));
        table.asked(new.id, false, false, at(5));
        table.asked(flood[1], false, false, at(6));
        table.asked(flood[2], true, false, at(6));
        table.asked(honest, false, false, at(6));
        let new = table.open(ip("10.0.0.3"), at(7));
        assert_eq!(new.evicted, Some(flood[2]), "its body never came");
        assert_eq!(table.len(), 4);
    }

    #[test]
    fn when_all_are_answered_only_health_can_be_asked_for() {
        let now = Instant::now();
        let mut table = table(2, 2);
        for _ in 0..2 {
            let id = table.open(ip("10.0.0.1"), now).id;
            table.asked(id, false, false, now);
        }
        let first = table.open(ip("10.0.0.9"), now);
        let second = table.open(ip("10.0.0.9"), now);
        let third = table.open(ip("10.0.0.9"), now);
        assert!(first.restricted && second.restricted && third.restricted);
        assert_eq!(
            (first.evicted, second.evicted, third.evicted),
            (None, None, Some(first.id))
        );
        table.closed(0);
        assert!(!table.open(ip("10.0.0.8"), now).restricted);
    }

    #[test]
    fn one_source_has_its_limit_and_loopback_only_that_of_all() {
        let now = Instant::now();
        let mut table = table(100, 2);
        for address in ["2001:db8::1", "2001:db8::2"] {
            let id = table.open(ip(address), now).id;
            table.asked(id, false, false, now);
        }
        assert!(table.open(ip("2001:db8::3"), now).restricted);
        assert!(!table.open(ip("2001:db8:0:1::3"), now).restricted);
        for _ in 0..10 {
            let admitted = table.open(ip("::ffff:127.0.0.1"), now);
            assert!(!admitted.restricted && admitted.evicted.is_none());
        }
    }

    #[test]
    fn a_head_has_less_time_than_a_pause() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut table = table(10, 10);
        let id = table.open(ip("10.0.0.1"), at(0)).id;
        assert_eq!(table.due(id, &patience()), Some(at(10)));
        table.heard(id, at(3));
        assert_eq!(
            table.due(id, &patience()),
            Some(at(10)),
            "every byte buys no time"
        );
        table.asked(id, true, false, at(4));
        table.read(id);
        table.heard(id, at(5));
        assert_eq!((table.due(id, &patience()), table.waits(id)), (None, false));
        table.answered(id, at(20));
        assert_eq!(table.due(id, &patience()), Some(at(95)));
        table.heard(id, at(30));
        assert_eq!(table.due(id, &patience()), Some(at(40)));
        let streams = table.open(ip("10.0.0.1"), at(0)).id;
        table.asked(streams, false, true, at(1));
        table.answered(streams, at(2));
        table.heard(streams, at(3));
        assert_eq!(table.due(streams, &patience()), Some(at(77)));
        table.closed(streams);
        assert_eq!(table.due(streams, &patience()), None);
    }

    #[test]
    fn the_rest_of_a_refused_body_is_no_head() {
        let now = Instant::now();
        let mut table = table(1, 1);
        let id = table.open(ip("10.0.0.1"), now).id;
        table.asked(id, true, false, now);
        table.answered(id, now);
        table.heard(id, now);
        assert_eq!(table.head_from(id), None);
        assert_eq!(
            table.due(id, &patience()),
            Some(now + patience().idle_timeout)
        );
        table.read(id);
        table.heard(id, now);
        assert_eq!(table.head_from(id), Some(ip("10.0.0.1")));
        table.asked(id, true, false, now);
        table.answered(id, now);
        assert_eq!(table.open(ip("10.0.0.2"), now).evicted, Some(id));
    }

    #[test]
    fn an_answer_that_nobody_takes_has_its_time() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut table = table(10, 10);
        let id = table.open(ip("10.0.0.1"), at(0)).id;
        table.asked(id, false, true, at(1));
        table.asked(id, false, true, at(1));
        assert_eq!(table.due(id, &patience()), None, "the service is at work");
        table.offered(id, at(5));
        table.offered(id, at(7));
        table.heard(id, at(20));
        assert_eq!(
            table.due(id, &patience()),
            Some(at(65)),
            "bytes buy no time"
        );
        table.taken(id, at(5));
        assert_eq!(table.due(id, &patience()), Some(at(67)));
        table.offered(id, at(30));
        table.taken(id, at(7));
        assert_eq!(table.due(id, &patience()), Some(at(90)));
        table.taken(id, at(30));
        assert_eq!((table.due(id, &patience()), table.waits(id)), (None, false));
        table.answered(id, at(40));
        table.answered(id, at(41));
        assert_eq!(table.due(id, &patience()), Some(at(116)));
    }
}
