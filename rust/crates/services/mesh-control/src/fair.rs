//! The queue of requests that wait for a worker: fair between ingresses, and between the sources of each.
//!
//! A source is the party to which a request can be traced: an API key, else an address. The next request is
//! chosen in three steps: the ingress with the fewest requests on workers, in it the source with the fewest,
//! in turns where they are equal, and of that source the oldest request. So a free slot goes to the source
//! that holds least, and a flood of one source delays the others only by its running requests.
//!
//! The queue is bounded. When it is full, a newcomer takes the place of the newest request of the ingress and
//! source with the most waiting, unless that would be the newcomer's own. There are never more sources than
//! requests, so memory is bounded, too.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

/// The interface through which requests enter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ingress {
    /// The OpenAI API, for text.
    #[default]
    Http,
    /// DCF over UDP, for text.
    Dcf,
    /// Parts of requests for embeddings, over either.
    Embeddings,
    /// Images, over either.
    Images,
}

impl Ingress {
    /// All ingresses.
    pub const ALL: [Self; 4] = [Self::Http, Self::Dcf, Self::Embeddings, Self::Images];

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Dcf => "dcf",
            Self::Embeddings => "embeddings",
            Self::Images => "images",
        }
    }
}

/// The client that a request can be traced to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    /// The source is not known.
    #[default]
    Unknown,
    /// The holder of the admin key.
    Admin,
    /// The holder of the API key with this number, counted from 1.
    Key(usize),
    /// The holders of the issued curtain token with this number, or of tokens that follow from it.
    Token(usize),
    /// An address: a client's, or that of the shim in front of it.
    Address(IpAddr),
}

impl Origin {
    /// The origin of requests from this address. An IPv6 network of 64 bits is one origin, because its owner
    /// has all of it.
    pub fn of(address: IpAddr) -> Self {
        Self::Address(match address.to_canonical() {
            IpAddr::V6(address) if !address.is_loopback() => {
                IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64))
            }
            address => address,
        })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("this source"),
            Self::Admin => f.write_str("the admin key"),
            Self::Key(number) => write!(f, "API key {number}"),
            Self::Token(_) => f.write_str("the token"),
            Self::Address(IpAddr::V6(address)) if !address.is_loopback() => {
                write!(f, "{address}/64")
            }
            Self::Address(address) => write!(f, "{address}"),
        }
    }
}

/// A party that gets its share.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Source {
    /// The interface through which its requests enter.
    pub ingress: Ingress,
    /// The client that they can be traced to.
    pub origin: Origin,
}

/// The queue is full, and the newcomer's source is the one with the most in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full {
    /// Requests of that source that wait.
    pub yours: usize,
    /// Sources that share the queue.
    pub sources: usize,
}

/// A request within placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

#[derive(Debug)]
pub(crate) struct FairQueue<T> {
    limit: usize,
    /// Requests that waited their turn already and lost their worker: first, and past the bound.
    again: VecDeque<(Source, T)>,
    shares: BTreeMap<Source, Share<T>>,
    /// Requests in `shares`.
    waiting: usize,
    /// Counts the requests taken.
    turn: u64,
    /// The last turn of each ingress.
    turns: BTreeMap<Ingress, u64>,
}

#[derive(Debug)]
struct Share<T> {
    waiting: VecDeque<T>,
    running: usize,
    last_turn: u64,
}

impl<T> FairQueue<T> {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            limit,
            again: VecDeque::new(),
            shares: BTreeMap::new(),
            waiting: 0,
            turn: 0,
            turns: BTreeMap::new(),
        }
    }

    /// Puts a request of `source` in. Returns the one that lost its place to it, if the queue was full.
    ///
    /// # Errors
    /// [`Full`] if no other source has more than its share.
    pub(crate) fn push(&mut self, source: Source, item: T) -> Result<Option<(Source, T)>, Full> {
        let mut displaced = None;
        if self.len() >= self.limit {
            let victim = self.largest(source).ok_or_else(|| Full {
                yours: self.waiting_of(source),
                sources: self.sources(),
            })?;
            let share = self.shares.get_mut(&victim);
            let newest = share.and_then(|share| share.waiting.pop_back());
            displaced = newest.map(|newest| (victim, newest));
            self.waiting -= usize::from(displaced.is_some());
            self.tidy(victim);
        }
        self.share(source).waiting.push_back(item);
        self.waiting += 1;
        Ok(displaced)
    }

    /// Puts a request back that has waited its turn before.
    pub(crate) fn push_again(&mut self, source: Source, item: T) {
        self.again.push_front((source, item));
    }

    /// Takes the next request that `may` go, asked in the order of turns.
    pub(crate) fn take_next(&mut self, mut may: impl FnMut(&T) -> bool) -> Option<(Source, T)> {
        if let Some(index) = self.again.iter().position(|(_, item)| may(item)) {
            return self.again.remove(index);
        }
        for source in self.order() {
            let share = self.shares.get_mut(&source)?;
            let Some(index) = share.waiting.iter().position(&mut may) else {
                continue;
            };
            self.turn += 1;
            share.last_turn = self.turn;
            self.turns.insert(source.ingress, self.turn);
            let item = share.waiting.remove(index)?;
            self.waiting -= 1;
            self.tidy(source);
            return Some((source, item));
        }
        None
    }

    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&mut T) -> bool) {
        self.again.retain_mut(|(_, item)| keep(item));
        for share in self.shares.values_mut() {
            share.waiting.retain_mut(&mut keep);
        }
        self.shares
            .retain(|_, share| !share.waiting.is_empty() || share.running > 0);
        self.waiting = self.shares.values().map(|share| share.waiting.len()).sum();
    }

    pub(crate) fn any(&self, is: impl FnMut(&T) -> bool) -> bool {
        let waiting = self.shares.values().flat_map(|share| &share.waiting);
        let again = self.again.iter().map(|(_, item)| item);
        again.chain(waiting).any(is)
    }

    pub(crate) fn started(&mut self, source: Source) {
        self.share(source).running += 1;
    }

    pub(crate) fn ended(&mut self, source: Source) {
        if let Some(share) = self.shares.get_mut(&source) {
            share.running = share.running.saturating_sub(1);
            self.tidy(source);
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.waiting + self.again.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Requests that came through `ingress`: those that wait, and those that run.
    pub(crate) fn of_ingress(&self, ingress: Ingress) -> (usize, usize) {
        let again = self.again.iter().filter(|(s, _)| s.ingress == ingress);
        let (mut waiting, mut running) = (again.count(), 0);
        for (_, share) in self.shares.iter().filter(|(s, _)| s.ingress == ingress) {
            waiting += share.waiting.len();
            running += share.running;
        }
        (waiting, running)
    }

    pub(crate) fn sources(&self) -> usize {
        let waiting = |share: &&Share<T>| !share.waiting.is_empty();
        self.shares.values().filter(waiting).count()
    }

    pub(crate) fn waiting_of(&self, source: Source) -> usize {
        self.shares.get(&source).map_or(0, |s| s.waiting.len())
    }

    fn share(&mut self, source: Source) -> &mut Share<T> {
        self.shares.entry(source).or_insert_with(|| Share {
            waiting: VecDeque::new(),
            running: 0,
            last_turn: 0,
        })
    }

    fn tidy(&mut self, source: Source) {
        let done = |share: &Share<T>| share.waiting.is_empty() && share.running == 0;
        if self.shares.get(&source).is_some_and(done) {
            self.shares.remove(&source);
        }
    }

    /// Sources with waiting requests, in the order of turns.
    fn order(&self) -> Vec<Source> {
        let mut running: BTreeMap<Ingress, usize> = BTreeMap::new();
        for (source, share) in &self.shares {
            *running.entry(source.ingress).or_default() += share.running;
        }
        let waiting = self.shares.iter().filter(|(_, s)| !s.waiting.is_empty());
        let mut order: Vec<Source> = waiting.map(|(source, _)| *source).collect();
        order.sort_unstable_by_key(|source| {
            let (ingress, share) = (source.ingress, &self.shares[source]);
            let last_turn = self.turns.get(&ingress).copied().unwrap_or(0);
            let of_ingress = (running[&ingress], last_turn, ingress);
            (of_ingress, share.running, share.last_turn, *source)
        });
        order
    }

    /// The source whose newest request makes room for one of `newcomer`: the largest source of the largest
    /// ingress, or of the newcomer's own where that has as many, unless the newcomer would then have as many.
    fn largest(&self, newcomer: Source) -> Option<Source> {
        let waiting = |ingress: Ingress| -> usize {
            let of = self.shares.iter().filter(|(s, _)| s.ingress == ingress);
            of.map(|(_, share)| share.waiting.len()).sum()
        };
        let largest = |ingress: Ingress| {
            let of = self.shares.iter().filter(|(s, _)| s.ingress == ingress);
            of.max_by_key(|(_, share)| share.waiting.len())
                .map(|(source, share)| (*source, share.waiting.len()))
        };
        let ingress = *Ingress::ALL.iter().max_by_key(|i| waiting(**i))?;
        if ingress != newcomer.ingress && waiting(newcomer.ingress) + 1 < waiting(ingress) {
            return largest(ingress).map(|(source, _)| source);
        }
        let (source, share) = largest(newcomer.ingress)?;
        (self.waiting_of(newcomer) + 1 < share).then_some(source)
    }
}

#[cfg(test)]
mod tests;
