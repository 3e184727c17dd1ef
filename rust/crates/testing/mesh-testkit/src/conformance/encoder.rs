//! The contract of an [`Encoder`]: a vector depends on its sequence alone, and bad calls harm nothing.

use std::sync::Arc;

use futures::executor::block_on;
use mesh_engine::{EmbedRequest, Embedding, Encoder, Engine, StageError};

use super::same;

/// A way to compute an embedding model.
pub struct Subject<'a> {
    /// Name in messages.
    pub name: String,
    /// Opens the model with so many threads, and 64 rows of a call or as many as one sequence may have.
    pub open: &'a dyn Fn(usize) -> Box<dyn Encoder>,
}

/// Rows of a call.
pub const MAX_ROWS: u32 = 64;

impl Subject<'_> {
    /// Runs all checks.
    ///
    /// # Panics
    /// If one of them fails.
    pub fn check(&self) {
        let mut encoder = (self.open)(2);
        let info = encoder.info().clone();
        let sequences: Vec<Vec<u32>> = [1, 7, 2, 13]
            .into_iter()
            .map(|len| {
                (0..len)
                    .map(|i| (i * 7 + len) % info.vocab as u32)
                    .collect()
            })
            .collect();
        let together: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
        let vectors = self.encode(&mut *encoder, &together);
        let expected: Vec<&[f32]> = vectors.chunks(info.dimensions).collect();
        same(&self.name, "vectors", expected.len(), sequences.len());
        // Alone, in another order, with another number of threads.
        let mut other = (self.open)(1);
        for (sequence, expected) in together.iter().zip(&expected) {
            let alone = self.encode(&mut *other, &[sequence]);
            same(&self.name, "a vector alone", &alone[..], *expected);
        }
        let reversed: Vec<&[u32]> = together.iter().rev().copied().collect();
        let found = self.encode(&mut *encoder, &reversed);
        let found: Vec<&[f32]> = found.chunks(info.dimensions).rev().collect();
        same(&self.name, "vectors in another order", &found, &expected);
        self.refusals(&mut *encoder);
        same(
            &self.name,
            "no vectors",
            encoder.encode(&[]),
            Ok(Vec::new()),
        );
        let again = self.encode(&mut *encoder, &together);
        same(&self.name, "vectors after refusals", &again, &vectors);
        self.serving(encoder, &sequences, &vectors);
    }

    fn refusals(&self, encoder: &mut dyn Encoder) {
        let info = encoder.info().clone();
        let long = vec![1; info.max_tokens + 1];
        let token = info.vocab as u32;
        let rows = info.max_rows.max(info.max_tokens);
        let many = vec![&long[..info.max_tokens]; rows / info.max_tokens + 1];
        let cases: [(&[&[u32]], &str); 4] = [
            (&[&[1], &[]], "empty"),
            (&[&[1], &long], &format!("{} tokens", long.len())),
            (&[&[1], &[token]], &token.to_string()),
            (&many, "of a batch"),
        ];
        for (sequences, part) in cases {
            let found = encoder.encode(sequences);
            let named = |error: &StageError| {
                !matches!(error, StageError::Backend { .. }) && error.to_string().contains(part)
            };
            let name = &self.name;
            assert!(
                found.as_ref().is_err_and(named),
                "{name}: {part}: {found:?}"
            );
        }
    }

    /// Requests that are cancelled leave nothing behind.
    fn serving(&self, encoder: Box<dyn Encoder>, sequences: &[Vec<u32>], vectors: &[f32]) {
        let width = encoder.info().dimensions;
        let engine = Engine::start_with("conformance", |_| Ok(Embedding::new(encoder, 100)));
        let engine = engine.expect("the system gives a thread");
        let handle = engine.handle();
        let request = |sequences: Vec<Vec<u32>>| EmbedRequest {
            id: "conformance".into(),
            sequences,
            deadline: None,
        };
        let many = (0..100).flat_map(|_| sequences.to_vec()).collect();
        drop(handle.submit(request(many)));
        let found = block_on(handle.submit(request(sequences.to_vec())).last_event());
        let expected: Vec<Vec<f32>> = vectors.chunks(width).map(<[f32]>::to_vec).collect();
        let found = found.as_ref().map(Arc::new);
        same(
            &self.name,
            "vectors of an engine",
            found.map(|found| &**found),
            Ok(&expected),
        );
        let load = handle.load();
        let left = (load.running, load.queued, load.prefill_backlog);
        same(&self.name, "work in progress", left, (0, 0, 0));
    }

    #[track_caller]
    fn encode(&self, encoder: &mut dyn Encoder, sequences: &[&[u32]]) -> Vec<f32> {
        let vectors = encoder.encode(sequences);
        vectors.unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }
}
