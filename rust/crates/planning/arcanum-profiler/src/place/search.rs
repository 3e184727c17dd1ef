//! The search for the best layout. The page of [`super`] says why it is exact where it is.

use std::cell::Cell;
use std::cmp::Ordering;

use super::cost::Mesh;
use super::types::Objective;

/// Constraints and objective of a search.
#[derive(Debug, Clone, Copy)]
pub(super) struct Demand {
    pub(super) objective: Objective,
    /// Exactly so many stages.
    pub(super) stages: Option<usize>,
    pub(super) kv_tokens: u64,
    /// A node that must have a stage.
    pub(super) must: Option<usize>,
}

/// Nodes in order, their numbers of layers, and the cost by the objective, microseconds.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    pub(super) order: Vec<usize>,
    pub(super) counts: Vec<u32>,
    pub(super) value: f64,
    /// Decides between equal values.
    token_us: f64,
}

/// A mesh with values computed once for the search.
pub(super) struct Search<'a> {
    mesh: &'a Mesh<'a>,
    /// Cheapest paths, and those with the least busy worst link; where the search is exact.
    paths: Option<(Paths, Paths)>,
    /// Layouts that local searches may still look at.
    left: Cell<u32>,
}

impl<'a> Search<'a> {
    pub(super) fn new(mesh: &'a Mesh<'a>) -> Self {
        let paths = (mesh.nodes.len() <= EXACT_NODES).then(|| {
            (
                Paths::new(mesh, Sum::Time, f64::INFINITY),
                Paths::new(mesh, Sum::Busiest, f64::INFINITY),
            )
        });
        Search {
            mesh,
            paths,
            left: Cell::new(MOST_LAYOUTS),
        }
    }

    /// The best layout, if any holds the model.
    pub(super) fn best(&self, demand: &Demand) -> Option<Layout> {
        match (&self.paths, demand.objective) {
            (None, _) => self.local(demand),
            (Some((times, _)), Objective::Latency) => self.fastest(times, demand, f64::INFINITY),
            (Some((_, busiest)), Objective::Throughput) => {
                let limit = self.bottleneck(busiest, demand)? * (1.0 + TIE);
                let times = Paths::new(self.mesh, Sum::Time, limit);
                self.fastest(&times, demand, limit)
            }
        }
    }

    /// The best layout in which `node` has a stage; where the search is not exact, the best that one change of `layout` gives.
    pub(super) fn best_with(
        &self,
        node: usize,
        layout: &Layout,
        demand: &Demand,
    ) -> Option<Layout> {
        if self.paths.is_some() {
            return self.best(&Demand {
                must: Some(node),
                ..*demand
            });
        }
        let inserted = (0..=layout.order.len()).map(|at| {
            let mut order = layout.order.clone();
            order.insert(at, node);
            order
        });
        let replaced = (0..layout.order.len()).map(|at| {
            let mut order = layout.order.clone();
            order[at] = node;
            order
        });
        self.best_of(inserted.chain(replaced), demand)
    }

    /// The least possible time of the slowest stage or link, over all layouts.
    fn bottleneck(&self, busiest: &Paths, demand: &Demand) -> Option<f64> {
        let mut best = f64::INFINITY;
        self.for_ends(demand, |set, first, last| {
            let back = self.back(first, last).busy_us;
            let links = busiest.cost(first, set, last).max(back);
            if links >= best {
                return;
            }
            let nodes: Vec<usize> = members(set).collect();
            let span = Span {
                first,
                last,
                kv_tokens: demand.kv_tokens,
            };
            if let Some(stages) = self.least_limit(&nodes, span, best) {
                best = best.min(stages.max(links));
            }
        });
        best.is_finite().then_some(best)
    }

    /// The fastest layout whose stages and links each take `limit` at most; so must those of `paths`.
    fn fastest(&self, paths: &Paths, demand: &Demand, limit: f64) -> Option<Layout> {
        let mut best: Option<(f64, u32, usize, usize)> = None;
        self.for_ends(demand, |set, first, last| {
            let back = self.back(first, last);
            let hops = paths.cost(first, set, last) + back.us;
            if back.busy_us > limit || !hops.is_finite() {
                return;
            }
            let span = Span {
                first,
                last,
                kv_tokens: demand.kv_tokens,
            };
            let Some(compute) = self.least_compute(members(set), span, limit) else {
                return;
            };
            let value = hops + compute;
            if best.is_none_or(|(least, ..)| value < least * (1.0 - TIE)) {
                best = Some((value, set, first, last));
            }
        });
        let (_, set, first, last) = best?;
        self.layout(paths.order(first, set, last), demand, limit)
    }

    /// Every set of nodes that the demand allows, smallest first, with every pair of ends.
    fn for_ends(&self, demand: &Demand, mut visit: impl FnMut(u32, usize, usize)) {
        let nodes = self.mesh.nodes.len();
        let mut sets: Vec<u32> = (1..1u32 << nodes)
            .filter(|set| {
                let size = set.count_ones() as usize;
                size <= self.mesh.model.layers as usize
                    && demand.stages.is_none_or(|stages| size == stages)
                    && demand.must.is_none_or(|node| set & (1 << node) != 0)
            })
            .collect();
        sets.sort_by_key(|set| set.count_ones());
        for set in sets {
            for first in members(set) {
                for last in members(set) {
                    if (first == last) == (set.count_ones() == 1) {
                        visit(set, first, last);
                    }
                }
            }
        }
    }

    /// From the last node of a ring to the first.
    fn back(&self, first: usize, last: usize) -> super::cost::Hop {
        self.mesh.tokens[last][first]
    }

    /// Most layers that a node takes within its memory and `limit`.
    fn most(&self, node: usize, span: Span, limit: f64) -> u32 {
        let last = node == span.last;
        let memory = self
            .mesh
            .capacity(node, span.kv_tokens, node == span.first, last);
        let left = limit - self.mesh.compute(node, 0, last);
        let time = left / self.mesh.nodes[node].layer_us * (1.0 + TIE);
        memory.min(if time > 0.0 { time as u32 } else { 0 })
    }

    /// The least time that `nodes`, fastest first, compute together: one layer each, the rest to the fastest.
    fn least_compute(
        &self,
        nodes: impl Iterator<Item = usize>,
        span: Span,
        limit: f64,
    ) -> Option<f64> {
        let mut sum = self.mesh.nodes[span.last].logits_us;
        let mut room: [(u32, f64); EXACT_NODES] = [(0, 0.0); EXACT_NODES];
        let mut left = self.mesh.model.layers;
        let mut count = 0;
        for node in nodes {
            let most = self.most(node, span, limit);
            let layer_us = self.mesh.nodes[node].layer_us;
            room[count] = (most.checked_sub(1)?, layer_us);
            count += 1;
            sum += layer_us;
            left = left.checked_sub(1)?;
        }
        for (most, layer_us) in &room[..count] {
            let taken = left.min(*most);
            sum += f64::from(taken) * layer_us;
            left -= taken;
        }
        (left == 0).then_some(sum)
    }

    /// The least limit that lets `nodes` hold the model, to a relative [`TIE`]; `None` if it is not below `bound`.
    fn least_limit(&self, nodes: &[usize], span: Span, bound: f64) -> Option<f64> {
        let layers = u64::from(self.mesh.model.layers);
        let holds = |limit: f64| {
            let mut sum = 0;
            for &node in nodes {
                let most = self.most(node, span, limit);
                if most == 0 {
                    return false;
                }
                sum += u64::from(most);
            }
            sum >= layers
        };
        let slowest = nodes
            .iter()
            .map(|&node| self.mesh.compute(node, self.mesh.model.layers, true))
            .fold(0.0, f64::max);
        let (mut low, mut high) = (0.0, slowest.min(bound * (1.0 - TIE)));
        if nodes.len() as u64 > layers || !holds(high) {
            return None;
        }
        while high - low > high * TIE / 8.0 {
            let middle = (low + high) / 2.0;
            if holds(middle) {
                high = middle;
            } else {
                low = middle;
            }
        }
        Some(high)
    }

    /// The best split of the layers over nodes in order. Nodes of the same speed share evenly.
    fn layout(&self, order: Vec<usize>, demand: &Demand, limit: f64) -> Option<Layout> {
        let span = Span {
            first: *order.first()?,
            last: *order.last()?,
            kv_tokens: demand.kv_tokens,
        };
        let most: Vec<u32> = order
            .iter()
            .map(|&node| self.most(node, span, limit))
            .collect();
        let mut left = self.mesh.model.layers.checked_sub(order.len() as u32)?;
        if most.contains(&0) {
            return None;
        }
        let mut counts = vec![1; order.len()];
        let speed = |at: usize| self.mesh.nodes[order[at]].layer_us;
        let mut fastest: Vec<usize> = (0..order.len()).collect();
        fastest.sort_by(|&a, &b| speed(a).total_cmp(&speed(b)).then(a.cmp(&b)));
        for group in fastest.chunk_by(|&a, &b| speed(a) == speed(b)) {
            while left > 0 {
                let open = group.iter().filter(|&&at| counts[at] < most[at]);
                let Some(&at) = open.min_by_key(|&&at| counts[at]) else {
                    break;
                };
                counts[at] += 1;
                left -= 1;
            }
        }
        if left > 0 {
            return None;
        }
        let estimate = self.mesh.estimate(&order, &counts);
        Some(Layout {
            value: match demand.objective {
                Objective::Latency => estimate.token_us,
                Objective::Throughput => estimate.slowest_us,
            },
            token_us: estimate.token_us,
            order,
            counts,
        })
    }

    /// The best layout of nodes in this order.
    fn ordered(&self, order: Vec<usize>, demand: &Demand) -> Option<Layout> {
        let limit = match demand.objective {
            Objective::Latency => f64::INFINITY,
            Objective::Throughput => {
                let span = Span {
                    first: *order.first()?,
                    last: *order.last()?,
                    kv_tokens: demand.kv_tokens,
                };
                let links = (0..order.len())
                    .map(|at| self.mesh.hop_after(&order, at).1)
                    .fold(0.0, f64::max);
                self.least_limit(&order, span, f64::INFINITY)?.max(links) * (1.0 + TIE)
            }
        };
        self.layout(order, demand, limit)
    }

    fn best_of(&self, orders: impl Iterator<Item = Vec<usize>>, demand: &Demand) -> Option<Layout> {
        let mut best: Option<Layout> = None;
        for layout in orders
            .filter(|order| fits(order, demand))
            .filter_map(|order| self.ordered(order, demand))
        {
            if best
                .as_ref()
                .is_none_or(|best| layout.compare(best).is_lt())
            {
                best = Some(layout);
            }
        }
        best
    }

    /// Local search from several starts.
    pub(super) fn local(&self, demand: &Demand) -> Option<Layout> {
        let speed: Vec<usize> = (0..self.mesh.nodes.len()).collect();
        let mut memory = speed.clone();
        memory.sort_by_key(|&node| std::cmp::Reverse(self.mesh.nodes[node].memory));
        let few = [&speed, &memory].map(|nodes| self.start(nodes, demand));
        // Many nodes are good for throughput, and the way there from few of them may lead over worse layouts.
        let sizes = (1..).map(|i| 1usize << i).take_while(|size| {
            let most = speed.len().min(self.mesh.model.layers as usize);
            demand.objective == Objective::Throughput && *size / 2 < most
        });
        let many = sizes.map(|size| {
            let size = size.min(speed.len()).min(self.mesh.model.layers as usize);
            let orders = [self.chain(&speed[..size])].into_iter();
            self.best_of(orders, demand)
        });
        let ends = few
            .into_iter()
            .chain(many)
            .flatten()
            .map(|start| self.improve(start, demand));
        ends.min_by(Layout::compare)
    }

    /// The fewest of `nodes`, from the front, that hold the model, each next to its nearest.
    fn start(&self, nodes: &[usize], demand: &Demand) -> Option<Layout> {
        let most = nodes.len().min(self.mesh.model.layers as usize);
        let sizes = match demand.stages {
            Some(stages) if stages <= most => stages..=stages,
            Some(_) => return None,
            None => 1..=most,
        };
        sizes
            .into_iter()
            .find_map(|size| self.ordered(self.chain(&nodes[..size]), demand))
    }

    /// From the first of `nodes` always on to the nearest.
    fn chain(&self, nodes: &[usize]) -> Vec<usize> {
        let mut left = nodes.to_vec();
        let mut order = vec![left.remove(0)];
        while let Some(&last) = order.last() {
            let time = |node: usize| self.mesh.rows[last][node].us;
            let next = (0..left.len()).min_by(|&a, &b| time(left[a]).total_cmp(&time(left[b])));
            let Some(next) = next else { break };
            order.push(left.remove(next));
        }
        order
    }

    /// Repeatedly applies a single change that improves the layout, until there is none or the limit of
    /// layouts is reached. They are counted, not timed, so that the same numbers give the same plan on every
    /// machine.
    fn improve(&self, mut layout: Layout, demand: &Demand) -> Layout {
        let mut share = (self.left.get() / 8).max(LEAST_LAYOUTS);
        let mut spend = || {
            self.left.set(self.left.get().saturating_sub(1));
            share = share.saturating_sub(1);
            share > 0
        };
        loop {
            let order = &layout.order;
            let size = order.len();
            let outside: Vec<usize> = (0..self.mesh.nodes.len())
                .filter(|node| !order.contains(node))
                .collect();
            let change = |edit: &dyn Fn(&mut Vec<usize>)| {
                let mut changed = order.clone();
                edit(&mut changed);
                changed
            };
            let removed = (0..size).map(|at| {
                change(&|order| {
                    order.remove(at);
                })
            });
            let moved = (0..size * size).map(|pair| {
                change(&|order| {
                    let node = order.remove(pair / size);
                    order.insert(pair % size, node);
                })
            });
            let replaced = (0..size).flat_map(|at| {
                let change = &change;
                outside
                    .iter()
                    .map(move |&node| change(&|order| order[at] = node))
            });
            let added = (0..=size).flat_map(|at| {
                let change = &change;
                outside
                    .iter()
                    .map(move |&node| change(&|order| order.insert(at, node)))
            });
            let changes = removed.chain(added).chain(replaced).chain(moved);
            let mut better = changes
                .take_while(|_| spend())
                .filter(|order| fits(order, demand))
                .filter_map(|order| self.ordered(order, demand))
                .filter(|changed| changed.compare(&layout).is_lt());
            // The best change leads further than the first one, where trying them all costs little.
            let better = match self.mesh.nodes.len() {
                ..=MANY_NODES => better.min_by(Layout::compare),
                _ => better.next(),
            };
            match better {
                Some(better) => layout = better,
                None => break,
            }
        }
        layout
    }
}

impl Layout {
    /// Less is better: the value, then the time of a token, then the number of stages.
    fn compare(&self, other: &Layout) -> Ordering {
        let times = |a: f64, b: f64| match (a - b).abs() <= b.abs() * TIE {
            true => Ordering::Equal,
            false => a.total_cmp(&b),
        };
        times(self.value, other.value)
            .then(times(self.token_us, other.token_us))
            .then(self.order.len().cmp(&other.order.len()))
    }
}

fn fits(order: &[usize], demand: &Demand) -> bool {
    demand.stages.is_none_or(|stages| order.len() == stages)
        && demand.must.is_none_or(|node| order.contains(&node))
}

/// First and last node of a layout, and the KV rows that every node holds.
#[derive(Debug, Clone, Copy)]
struct Span {
    first: usize,
    last: usize,
    kv_tokens: u64,
}

/// Rule for combining the hops of a path.
#[derive(Debug, Clone, Copy)]
enum Sum {
    /// The sum of their times.
    Time,
    /// The one whose link is busy longest.
    Busiest,
}

/// The best path from `first` through every set to `last`.
struct Paths {
    nodes: usize,
    /// Cost by first node, set and last node; infinite where there is no path.
    cost: Vec<f64>,
    /// The node before last.
    before: Vec<u8>,
}

impl Paths {
    /// Paths over links that are busy for `limit` at most.
    fn new(mesh: &Mesh<'_>, sum: Sum, limit: f64) -> Self {
        let nodes = mesh.nodes.len();
        let size = (nodes * nodes) << nodes;
        let mut paths = Paths {
            nodes,
            cost: vec![f64::INFINITY; size],
            before: vec![0; size],
        };
        for first in 0..nodes {
            let start = paths.index(first, 1 << first, first);
            paths.cost[start] = 0.0;
            // A larger set has a larger number.
            for set in 1..1u32 << nodes {
                for last in members(set) {
                    let cost = paths.cost(first, set, last);
                    if !cost.is_finite() {
                        continue;
                    }
                    for next in (0..nodes).filter(|next| set & (1 << next) == 0) {
                        let hop = mesh.rows[last][next];
                        let cost = match sum {
                            _ if hop.busy_us > limit => continue,
                            Sum::Time => cost + hop.us,
                            Sum::Busiest => cost.max(hop.busy_us),
                        };
                        let at = paths.index(first, set | 1 << next, next);
                        if cost < paths.cost[at] {
                            paths.cost[at] = cost;
                            paths.before[at] = last as u8;
                        }
                    }
                }
            }
        }
        paths
    }

    fn index(&self, first: usize, set: u32, last: usize) -> usize {
        (first << self.nodes | set as usize) * self.nodes + last
    }

    fn cost(&self, first: usize, set: u32, last: usize) -> f64 {
        self.cost[self.index(first, set, last)]
    }

    fn order(&self, first: usize, mut set: u32, mut last: usize) -> Vec<usize> {
        let mut order = vec![last];
        while last != first {
            let before = self.before[self.index(first, set, last)].into();
            set &= !(1 << last);
            last = before;
            order.push(last);
        }
        order.reverse();
        order
    }
}

/// The nodes of a set, fastest first.
fn members(set: u32) -> impl Iterator<Item = usize> {
    (0..u32::BITS as usize).filter(move |node| set & (1 << node) != 0)
}

/// Times that differ by less, relatively, are the same.
pub(super) const TIE: f64 = 1e-9;
/// Up to so many nodes a local search tries all changes and takes the best, beyond it the first that is better.
const MANY_NODES: usize = 24;
/// Layouts that the local searches of one plan look at, about; each takes some microseconds.
const MOST_LAYOUTS: u32 = 40_000;
/// Layouts that each of them may look at in any case.
const LEAST_LAYOUTS: u32 = 400;

/// Largest number of usable nodes for which the search is exact.
pub const EXACT_NODES: usize = 8;
