//! Attention over cached keys and values.
//!
//! [`attention`] takes the QKV rows of any number of sequences, normalises (where the model does) and rotates
//! queries and keys, writes keys and values to the [`KvCache`], and attends causally.
//!
//! A query sees positions in chunks of 128, cut at absolute multiples of 128. Every chunk is summed on its
//! own, relative to its own peak, in the order of its positions; chunks are merged in order. A prompt's rows
//! take six queries at a time through a chunk and merge as they go; a single row of a long sequence has its
//! chunks computed by several threads and merged afterwards: the same operations in the same order.
//!
//! With a sliding window a row sees no position that is further back. Chunks without any such position are
//! left out, and of the first one those before the window weigh nothing; the cache keeps all.
//!
//! A sink is one more score in a query's sum of weights. It is added behind the last chunk, as it has no value.

mod cache;
mod kernel;
mod plan;

use std::cell::Cell;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use crate::error::expect_len;
use crate::mem::{Buffer, TaskPointer};
use crate::norm::normalise;
use crate::simd::{self, Kernel, LANES, Simd};
use crate::{KernelError, Pool, Rope};
use cache::TILE;
pub use cache::{KvCache, KvFormat, KvShape};
use kernel::{CHUNK, Chunk, Element, Finish, MAX_DIM, Partial, QUERIES, Query};
use plan::{AttentionTask, Cut, Split, TASK_ROWS, seen_from};

/// The attention of a layer, apart from its weights.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// Query heads; a multiple of the cache's key/value heads.
    pub heads: usize,
    /// Factor of the scores; `None` means `1 / sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// Number of positions a row sees, its own included: at least 1. `None` means all.
    pub window: Option<usize>,
    /// Rotation of queries and keys.
    pub rope: Option<&'a Rope>,
    /// RMS norm over each query head before rotation (qwen3): `head_dim` factors.
    pub q_norm: Option<&'a [f32]>,
    /// The same for key heads.
    pub k_norm: Option<&'a [f32]>,
    /// Epsilon of both norms.
    pub eps: f32,
    /// Of each query head a score of no position, which takes its part of the weights (gpt-oss).
    pub sinks: Option<&'a [f32]>,
}

/// Consecutive rows of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvSegment {
    /// Index of the cache's slot.
    pub slot: usize,
    /// Position of the first row; all positions before it are in the cache.
    pub position: usize,
    /// Number of consecutive rows.
    pub rows: usize,
}

/// Attends with all rows of `segments`.
///
/// `qkv` is `[rows, (heads + kv_heads) * head_dim + kv_heads * value_dim]`: queries, keys, values side by
/// side; rows of all segments back to back. `out` is `[rows, heads * value_dim]`. Keys and values of the rows
/// are written to `layer` of the cache first.
///
/// # Errors
/// When shapes do not fit, a slot or position does not exist, or a slot is named twice. Nothing is written
/// then.
pub fn attention(
    pool: &Pool,
    spec: &Attention<'_>,
    cache: &mut KvCache,
    layer: usize,
    segments: &[KvSegment],
    qkv: &[f32],
    out: &mut [f32],
) -> Result<(), KernelError> {
    let rows = check(spec, cache, layer, segments, qkv, out)?;
    if rows == 0 {
        return Ok(());
    }
    let mut scratch = SCRATCH.take();
    let result = Run::new(pool, spec, cache, layer, segments, &mut scratch, rows).map(|run| {
        match run.cache.shape().format {
            KvFormat::F16 => run.go::<u16>(qkv, out),
            KvFormat::F32 => run.go::<f32>(qkv, out),
        }
    });
    SCRATCH.set(scratch);
    result
}

pub(crate) fn check_head_dim(what: &'static str, head_dim: usize) -> Result<(), KernelError> {
    if head_dim == 0 || !head_dim.is_multiple_of(LANES) || head_dim > MAX_DIM {
        return Err(KernelError::Dimension {
            what,
            value: head_dim,
            need: "it must be a multiple of 16 and at most 256",
        });
    }
    Ok(())
}

/// Checks everything that the kernels rely on; gives the number of rows.
fn check(
    spec: &Attention<'_>,
    cache: &KvCache,
    layer: usize,
    segments: &[KvSegment],
    qkv: &[f32],
    out: &[f32],
) -> Result<usize, KernelError> {
    let shape = cache.shape();
    if layer >= shape.layers {
        return Err(KernelError::OutOfRange {
            what: "layer",
            index: layer,
            count: shape.layers,
        });
    }
    if spec.heads == 0 || !spec.heads.is_multiple_of(shape.kv_heads) || spec.heads > 1 << 16 {
        return Err(KernelError::Mismatch {
            what: "query heads must be a multiple of key/value heads",
            left: spec.heads,
            right: shape.kv_heads,
        });
    }
    if spec.window == Some(0) {
        return Err(KernelError::Dimension {
            what: "attention window",
            value: 0,
            need: "it must be at least 1",
        });
    }
    for norm in [spec.q_norm, spec.k_norm].into_iter().flatten() {
        expect_len("the head norm's weight", norm.len(), shape.head_dim)?;
    }
    if let Some(sinks) = spec.sinks {
        expect_len("the sinks", sinks.len(), spec.heads)?;
    }
    if let Some(rope) = spec.rope {
        if rope.dim() > shape.head_dim {
            return Err(KernelError::Mismatch {
                what: "rotated elements of a head",
                left: rope.dim(),
                right: shape.head_dim,
            });
        }
        if rope.positions() < shape.context {
            return Err(KernelError::Mismatch {
                what: "positions of the rotation table and of the cache",
                left: rope.positions(),
                right: shape.context,
            });
        }
    }
    let mut rows = 0_usize;
    for (i, segment) in segments.iter().enumerate() {
        let end = segment.position.saturating_add(segment.rows);
        cache.check(segment.slot, segment.position..end)?;
        if segments[..i].iter().any(|other| other.slot == segment.slot) {
            return Err(KernelError::Mismatch {
                what: "a KV slot is named by two segments",
                left: segment.slot,
                right: segment.slot,
            });
        }
        rows = rows.saturating_add(segment.rows);
    }
    let width = row_width(spec, shape);
    expect_len("the QKV rows", qkv.len(), rows.saturating_mul(width))?;
    let width = spec.heads * shape.value_dim;
    expect_len(
        "the attention output",
        out.len(),
        rows.saturating_mul(width),
    )?;
    Ok(rows)
}

/// Elements of a row of queries, keys and values.
#[inline(always)]
fn row_width(spec: &Attention<'_>, shape: KvShape) -> usize {
    (spec.heads + shape.kv_heads) * shape.head_dim + shape.kv_heads * shape.value_dim
}

/// Buffers reused from call to call.
#[derive(Default)]
struct Scratch {
    /// Rotated, scaled queries; then peaks and sums; then the results of single chunks.
    floats: Buffer,
    tasks: Vec<AttentionTask>,
    splits: Vec<Split>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

struct Run<'a> {
    pool: &'a Pool,
    spec: &'a Attention<'a>,
    cache: &'a KvCache,
    layer: usize,
    segments: &'a [KvSegment],
    tasks: &'a [AttentionTask],
    splits: &'a [Split],
    rows: usize,
    group: usize,
    queries: TaskPointer<f32>,
    states: TaskPointer<Partial>,
    /// `[results][Partial, value_dim values]`.
    results: TaskPointer<f32>,
}

impl<'a> Run<'a> {
    /// The cache is borrowed exclusively for as long as the run lives, so its pointers may be written
    /// through.
    fn new(
        pool: &'a Pool,
        spec: &'a Attention<'a>,
        cache: &'a mut KvCache,
        layer: usize,
        segments: &'a [KvSegment],
        scratch: &'a mut Scratch,
        rows: usize,
    ) -> Result<Run<'a>, KernelError> {
        let shape = cache.shape();
        let group = spec.heads / shape.kv_heads;
        let cut = Cut {
            threads: pool.threads(),
            kv_heads: shape.kv_heads,
            group,
            window: spec.window,
        };
        let results = cut.plan(segments, &mut scratch.tasks, &mut scratch.splits);
        let queries = rows * spec.heads * shape.head_dim;
        let states = rows * spec.heads * 2;
        let floats = queries + states + results * (shape.value_dim + 2);
        scratch.floats.reserve("attention scratch", floats * 4)?;
        let start = scratch.floats.floats_mut().as_mut_ptr();
        Ok(Run {
            pool,
            spec,
            cache,
            layer,
            segments,
            tasks: &scratch.tasks,
            splits: &scratch.splits,
            rows,
            group,
            queries: TaskPointer(start),
            // SAFETY: all three parts were just reserved, one behind the other.
            states: TaskPointer(unsafe { start.add(queries) }.cast()),
            // SAFETY: as above.
            results: TaskPointer(unsafe { start.add(queries + states) }),
        })
    }

    /// `E` is the element type of the cache.
    fn go<E: Element>(&self, qkv: &[f32], out: &mut [f32]) {
        let isa = self.pool.isa();
        let chunk = if self.rows < TASK_ROWS {
            self.rows
        } else {
            TASK_ROWS
        };
        self.pool.run(self.rows.div_ceil(chunk), &|task| {
            let rows = task * chunk..((task + 1) * chunk).min(self.rows);
            simd::run(
                isa,
                Prepare::<E> {
                    run: self,
                    qkv,
                    rows,
                    element: PhantomData,
                },
            );
        });
        let out = TaskPointer(out.as_mut_ptr());
        self.pool.run(self.tasks.len(), &|task| {
            let task = self.tasks[task];
            simd::run(
                isa,
                Attend::<E> {
                    run: self,
                    task,
                    first_row: self.first_row(task.segment),
                    out,
                    element: PhantomData,
                },
            );
        });
        self.pool.run(self.splits.len(), &|split| {
            let split = self.splits[split];
            simd::run(
                isa,
                Merge {
                    run: self,
                    split,
                    out,
                },
            );
        });
    }

    /// The segment of a row, and the row within it.
    fn locate(&self, row: usize) -> (KvSegment, usize) {
        let mut first = 0;
        for segment in self.segments {
            if row < first + segment.rows {
                return (*segment, row - first);
            }
            first += segment.rows;
        }
        unreachable!("a row beyond all segments")
    }

    fn first_row(&self, segment: usize) -> usize {
        self.segments[..segment].iter().map(|s| s.rows).sum()
    }

    /// The end of a query: all its chunks are merged into `state` and `out`.
    #[inline(always)]
    fn finish<'o>(&self, query: usize, state: Partial, out: &'o mut [f32]) -> Finish<'o> {
        let sinks = self.spec.sinks;
        Finish {
            state,
            sink: sinks.map(|sinks| sinks[query % self.spec.heads] * std::f32::consts::LOG2_E),
            out,
        }
    }
}

/// Norm, rotation and scaling of queries; norm, rotation and storing of keys; storing of values.
struct Prepare<'a, E> {
    run: &'a Run<'a>,
    qkv: &'a [f32],
    rows: Range<usize>,
    element: PhantomData<E>,
}

impl<E: Element> Kernel for Prepare<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (run, spec) = (self.run, self.run.spec);
        let shape = run.cache.shape();
        let (dim, value_dim) = (shape.head_dim, shape.value_dim);
        let scale = spec.scale.unwrap_or(1.0 / (dim as f32).sqrt());
        let scale = s.splat(scale * std::f32::consts::LOG2_E);
        let width = row_width(spec, shape);
        let mut head = [0.0_f32; MAX_DIM];
        let head = &mut head[..dim];
        for row in self.rows {
            let (segment, within) = run.locate(row);
            let position = segment.position + within;
            let (q, kv) = self.qkv[row * width..][..width].split_at(spec.heads * dim);
            let (k, v) = kv.split_at(shape.kv_heads * dim);
            for (h, q) in q.chunks_exact(dim).enumerate() {
                turned(s, spec, q, spec.q_norm, position, head);
                for d in (0..dim).step_by(LANES) {
                    // SAFETY: the scratch holds [rows, heads, dim] queries; this task alone writes this
                    // row's.
                    unsafe {
                        let to = run.queries.get().add((row * spec.heads + h) * dim + d);
                        s.store(to, s.mul(s.load(head.as_ptr().add(d)), scale));
                    }
                }
            }
            for (h, (k, v)) in k
                .chunks_exact(dim)
                .zip(v.chunks_exact(value_dim))
                .enumerate()
            {
                turned(s, spec, k, spec.k_norm, position, head);
                // SAFETY: slot, layer, head and position exist (checked); this task alone writes this
                // position of them.
                unsafe {
                    let keys = run.cache.keys::<E>(segment.slot, run.layer, h);
                    let key = keys.add(position / TILE * TILE * dim + position % TILE);
                    let mut elements = MaybeUninit::<[E; MAX_DIM]>::uninit();
                    let elements = elements.as_mut_ptr().cast::<E>();
                    for d in (0..dim).step_by(LANES) {
                        E::store(s, elements.add(d), s.load(head.as_ptr().add(d)));
                    }
                    for d in 0..dim {
                        *key.add(d * TILE) = *elements.add(d);
                    }
                    let value = run
                        .cache
                        .values::<E>(segment.slot, run.layer, h)
                        .add(position * value_dim);
                    for d in (0..value_dim).step_by(LANES) {
                        E::store(s, value.add(d), s.load(v.as_ptr().add(d)));
                    }
                }
            }
        }
    }
}

/// Normalises where there is a weight, and rotates.
#[inline(always)]
fn turned<S: Simd>(
    s: S,
    spec: &Attention<'_>,
    x: &[f32],
    norm: Option<&[f32]>,
    position: usize,
    head: &mut [f32],
) {
    match norm {
        Some(weight) => normalise(s, x, weight, spec.eps, head),
        None => head.copy_from_slice(x),
    }
    if let Some(rope) = spec.rope {
        rope.turn(head, position);
    }
}

/// A task of one attention call.
struct Attend<'a, E> {
    run: &'a Run<'a>,
    task: AttentionTask,
    /// First row of the task's segment.
    first_row: usize,
    out: TaskPointer<f32>,
    element: PhantomData<E>,
}

impl<E: Element> Attend<'_, E> {
    /// Query `q` of the task is row `q / group`, head `q % group` of its key/value head: its index, and the
    /// positions that it sees.
    #[inline(always)]
    fn place(&self, q: usize) -> (usize, Range<usize>) {
        let (run, task) = (self.run, &self.task);
        let row = task.row + q / run.group;
        let head = task.kv_head * run.group + q % run.group;
        let index = (self.first_row + row) * run.spec.heads + head;
        let position = run.segments[task.segment].position + row;
        (index, seen_from(run.spec.window, position)..position + 1)
    }
}

/// Receiver of one call's results: merges them into the output, or stores them to be merged later.
struct ChunkResults<'a, 'b, E> {
    attend: &'a Attend<'b, E>,
    /// Index of the chunk.
    index: usize,
    /// First query of the call.
    at: usize,
}

impl<E: Element> kernel::Results for ChunkResults<'_, '_, E> {
    #[inline(always)]
    fn take<S: Simd>(&mut self, s: S, i: usize, next: Partial, values: &[f32]) {
        let (run, task) = (self.attend.run, &self.attend.task);
        let dim = values.len();
        let (query, seen) = self.attend.place(self.at + i);
        let first_chunk = seen.start / CHUNK;
        if let Some(first) = task.split {
            let result = first + (self.index - first_chunk) * run.group + self.at + i;
            // SAFETY: one result per chunk that is seen and query was reserved; this task alone writes this
            // one.
            unsafe {
                let to = run.results.get().add(result * (dim + 2));
                to.cast::<Partial>().write_unaligned(next);
                to.add(2).copy_from_nonoverlapping(values.as_ptr(), dim);
            }
            return;
        }
        // SAFETY: this task alone has this query's state and output.
        let (state, out) = unsafe {
            let out = self.attend.out.get().add(query * dim);
            (
                &mut *run.states.get().add(query),
                std::slice::from_raw_parts_mut(out, dim),
            )
        };
        if self.index == first_chunk {
            *state = next;
            out.copy_from_slice(values);
        } else {
            kernel::merge(s, state, out, next, values);
        }
        if seen.end <= (self.index + 1) * CHUNK {
            s.apart(run.finish(query, *state, out));
        }
    }
}

impl<E: Element> Kernel for Attend<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (run, task) = (self.run, self.task);
        let segment = run.segments[task.segment];
        let KvShape {
            head_dim: dim,
            value_dim,
            ..
        } = run.cache.shape();
        let keys = run.cache.keys::<E>(segment.slot, run.layer, task.kv_head);
        let values = run.cache.values::<E>(segment.slot, run.layer, task.kv_head);
        let count = task.rows * run.group;
        let mut work = kernel::ChunkScratch::new();
        for index in task.first_chunk..task.end_chunk {
            let start = index * CHUNK;
            // SAFETY: the segment's last position, and so every chunk before it, is within the context.
            let chunk = unsafe {
                Chunk {
                    keys: keys.add(start * dim),
                    values: values.add(start * value_dim),
                    dim,
                    value_dim,
                }
            };
            // Rows whose last position is before the chunk are done with; those whose window begins behind it
            // do not see it.
            let position = |row: usize| segment.position + task.row + row;
            let first = (0..task.rows)
                .find(|&row| position(row) + 1 > start)
                .map_or(count, |row| row * run.group);
            let end = (0..task.rows)
                .rfind(|&row| seen_from(run.spec.window, position(row)) < start + CHUNK)
                .map_or(0, |row| (row + 1) * run.group);
            for at in (first..end).step_by(S::QUERIES) {
                let n = S::QUERIES.min(end - at);
                let mut queries = [Query {
                    vector: std::ptr::null(),
                    start: 0,
                    limit: 0,
                }; QUERIES];
                for (i, query) in queries[..n].iter_mut().enumerate() {
                    let (index, seen) = self.place(at + i);
                    // SAFETY: a query of this segment.
                    query.vector = unsafe { run.queries.get().add(index * dim) };
                    query.start = seen.start.saturating_sub(start);
                    query.limit = (seen.end - start).min(CHUNK);
                }
                let mut results = ChunkResults {
                    attend: &self,
                    index,
                    at,
                };
                // SAFETY: the vectors are `dim` long, every position below a limit is written, and each query
                // sees one.
                unsafe { kernel::attend(s, chunk, &queries[..n], &mut work, &mut results) };
            }
        }
    }
}

/// Merges the chunk results of a row.
struct Merge<'a> {
    run: &'a Run<'a>,
    split: Split,
    out: TaskPointer<f32>,
}

impl Kernel for Merge<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (run, split) = (self.run, self.split);
        let dim = run.cache.shape().value_dim;
        let row = run.first_row(split.segment);
        for q in 0..run.group {
            let query = row * run.spec.heads + split.kv_head * run.group + q;
            // SAFETY: this task alone has this query's output; its results were written before.
            let out =
                unsafe { std::slice::from_raw_parts_mut(self.out.get().add(query * dim), dim) };
            let result = |chunk: usize| {
                // SAFETY: as above.
                unsafe {
                    let at = run
                        .results
                        .get()
                        .add((split.first + chunk * run.group + q) * (dim + 2));
                    let values = std::slice::from_raw_parts(at.add(2).cast_const(), dim);
                    (at.cast::<Partial>().read_unaligned(), values)
                }
            };
            let (mut state, values) = result(0);
            out.copy_from_slice(values);
            for chunk in 1..split.chunks {
                let (next, values) = result(chunk);
                kernel::merge(s, &mut state, out, next, values);
            }
            s.apart(run.finish(query, state, out));
        }
    }
}
