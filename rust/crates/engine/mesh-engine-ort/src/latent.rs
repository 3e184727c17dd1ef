//! Latent attention: from a narrow row per token to queries, keys and values of all heads.
//!
//! Keys and values are expanded before they are stored, so that attention and its cache are those of other
//! networks: every head has a key and a value of its own. A cache of the narrow rows would be smaller by an
//! order of magnitude, but every step would have to read it through the matrix that expands it.
//!
//! A head's rotated part, which is its last in the file, comes first in the rows made here: the kernel rotates
//! the beginning of a head, and a product of two heads does not depend on the order of their elements.

use mesh_kernels::{KernelError, Linear, Pool, QMatrix, RmsNorm, linear};
use mesh_model::ModelConfig;

/// Matrices and norms behind the first projection of a layer.
pub(crate) struct LatentWeights {
    /// Norm and matrix that make queries of their narrow row, where they have one.
    pub(crate) query: Option<(Vec<f32>, QMatrix)>,
    /// Norm of the narrow row of keys and values.
    pub(crate) norm: Vec<f32>,
    /// Makes the unrotated part of keys, and values.
    pub(crate) expand: QMatrix,
    /// Each head's value follows its key in the outputs of `expand`; otherwise all values follow all keys.
    pub(crate) by_head: bool,
}

impl LatentWeights {
    /// Bytes of packed matrices.
    pub(crate) fn bytes(&self) -> usize {
        let query = self.query.as_ref().map_or(0, |(_, matrix)| matrix.bytes());
        query + self.expand.bytes()
    }
}

/// Widths of latent attention.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LatentShape {
    heads: usize,
    rank: usize,
    query_rank: Option<usize>,
    /// Elements of a key that do not turn, those that do, and elements of a value.
    plain: usize,
    rotated: usize,
    value: usize,
    /// Factor on the rotated part of keys: YaRN's, of queries and of keys.
    magnitude: f32,
}

/// Memory of the steps between a layer's first projection and its attention.
#[derive(Debug, Default)]
pub(crate) struct LatentScratch {
    narrow: Vec<f32>,
    queries: Vec<f32>,
    expanded: Vec<f32>,
    heads: Vec<f32>,
}

impl LatentShape {
    /// The widths of a network that has latent attention.
    pub(crate) fn of(config: &ModelConfig) -> Option<Self> {
        let latent = config.latent?;
        Some(LatentShape {
            heads: config.heads,
            rank: latent.rank,
            query_rank: latent.query_rank,
            plain: config.head_dim - config.rope.dim,
            rotated: config.rope.dim,
            value: config.value_dim,
            magnitude: config.rope.magnitude().powi(2),
        })
    }

    /// Replaces the outputs of the first projection in `rows` by rows of queries, keys and values.
    pub(crate) fn expand(
        &self,
        pool: &Pool,
        weights: &LatentWeights,
        eps: f32,
        rows: &mut Vec<f32>,
        scratch: &mut LatentScratch,
    ) -> Result<(), KernelError> {
        let key = self.plain + self.rotated;
        let first = self.query_rank.unwrap_or(self.heads * key);
        let stride = first + self.rank + self.rotated;
        let count = rows.len() / stride;
        let normed = |weight| Linear {
            norm: Some(RmsNorm { weight, eps }),
            ..Linear::default()
        };
        let columns = |narrow: &mut Vec<f32>, start: usize, width: usize| {
            narrow.clear();
            for row in rows.chunks_exact(stride) {
                narrow.extend_from_slice(&row[start..start + width]);
            }
        };
        let LatentScratch {
            narrow,
            queries,
            expanded,
            heads,
        } = scratch;
        if let Some((norm, matrix)) = &weights.query {
            columns(narrow, 0, first);
            queries.resize(count * matrix.n(), 0.0);
            linear(pool, matrix, narrow, count, queries, &normed(norm))?;
        }
        columns(narrow, first, self.rank);
        let (matrix, norm) = (&weights.expand, &weights.norm);
        expanded.resize(count * matrix.n(), 0.0);
        linear(pool, matrix, narrow, count, expanded, &normed(norm))?;

        heads.resize(count * self.heads * (2 * key + self.value), 0.0);
        let made = heads.chunks_exact_mut(self.heads * (2 * key + self.value));
        let expanded = expanded.chunks_exact(matrix.n());
        let rotated = first + self.rank;
        for (i, ((row, expanded), made)) in rows
            .chunks_exact(stride)
            .zip(expanded)
            .zip(made)
            .enumerate()
        {
            let queries = match weights.query {
                Some(_) => &queries[i * self.heads * key..][..self.heads * key],
                None => &row[..first],
            };
            self.put_heads(queries, &row[rotated..], expanded, weights.by_head, made);
        }
        std::mem::swap(rows, heads);
        Ok(())
    }

    /// Puts the parts of one row's heads into their places.
    fn put_heads(
        &self,
        queries: &[f32],
        shared: &[f32],
        expanded: &[f32],
        by_head: bool,
        out: &mut [f32],
    ) {
        let (plain, value, key) = (self.plain, self.value, self.plain + self.rotated);
        let (q, kv) = out.split_at_mut(self.heads * key);
        let (k, v) = kv.split_at_mut(self.heads * key);
        for (to, from) in q.chunks_exact_mut(key).zip(queries.chunks_exact(key)) {
            to[..self.rotated].copy_from_slice(&from[plain..]);
            to[self.rotated..].copy_from_slice(&from[..plain]);
        }
        let heads = k.chunks_exact_mut(key).zip(v.chunks_exact_mut(value));
        for (head, (k, v)) in heads.enumerate() {
            let (k_at, v_at) = match by_head {
                true => (head * (plain + value), head * (plain + value) + plain),
                false => (head * plain, self.heads * plain + head * value),
            };
            for (to, from) in k.iter_mut().zip(shared) {
                *to = from * self.magnitude;
            }
            k[self.rotated..].copy_from_slice(&expanded[k_at..][..plain]);
            v.copy_from_slice(&expanded[v_at..][..value]);
        }
    }
}
