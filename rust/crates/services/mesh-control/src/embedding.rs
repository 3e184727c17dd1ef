//! Cuts a request for embeddings into parts for several workers, and joins their vectors in order.
//!
//! One part is one Embed. Its life across worker deaths is that of an answer without tokens
//! ([`super::request::Lifecycle`]).

use std::ops::Range;

use mesh_proto::Embeddings;

/// Cuts texts of these token counts into ranges, in order and of similar weight: at least as many as there are
/// workers if there is enough to do. A part is a few batches of a worker, long enough to hide the round trip
/// and short enough that one worker's death costs little.
pub fn parts(workers: usize, tokens: &[u64]) -> Vec<Range<usize>> {
    let total: u64 = tokens.iter().sum();
    let for_workers = (workers as u64).min(total / LEAST_TOKENS);
    let wanted = total.div_ceil(MOST_TOKENS).max(for_workers).max(1);
    let aim = total.div_ceil(wanted).max(1);
    let mut parts = Vec::new();
    let (mut start, mut filled) = (0, 0);
    for (index, &tokens) in tokens.iter().enumerate() {
        let full = filled + tokens > aim || index - start >= MOST_TEXTS;
        if index > start && full {
            parts.push(start..index);
            (start, filled) = (index, 0);
        }
        filled += tokens;
    }
    if start < tokens.len() {
        parts.push(start..tokens.len());
    }
    parts
}

/// Least tokens (estimated) that are worth a part of their own.
const LEAST_TOKENS: u64 = 1024;
/// Most tokens (estimated) of one part.
const MOST_TOKENS: u64 = 16 * 1024;
/// Most texts of one part.
const MOST_TEXTS: usize = 512;

/// Checks that `part` answers a request for `texts` vectors; the error says what is wrong. Workers are not
/// trusted.
pub fn check(part: &Embeddings, texts: usize, dimensions: u32) -> Result<(), String> {
    let one = part.dimensions as usize * 4;
    if one == 0 || part.vectors.len() != one.saturating_mul(texts) || part.tokens.len() != texts {
        return Err(format!(
            "the worker sent {} bytes of vectors of {} numbers for {texts} texts",
            part.vectors.len(),
            part.dimensions
        ));
    }
    if dimensions != 0 && part.dimensions != dimensions {
        let sent = part.dimensions;
        return Err(format!(
            "the worker sent vectors of {sent} numbers instead of {dimensions}"
        ));
    }
    let mut numbers = part.vectors.as_chunks::<4>().0.iter();
    if !numbers.all(|bytes| f32::from_le_bytes(*bytes).is_finite()) {
        return Err("the worker sent a vector with a number that is not finite".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// First and last text of each part.
    fn parts(workers: usize, tokens: &[u64]) -> Vec<(usize, usize)> {
        let parts = super::parts(workers, tokens);
        parts.iter().map(|part| (part.start, part.end)).collect()
    }

    #[test]
    fn a_small_request_stays_whole_and_a_large_one_goes_to_all_workers() {
        assert_eq!(parts(4, &[10]), [(0, 1)]);
        assert_eq!(parts(4, &[10; 50]), [(0, 50)]);
        assert_eq!(parts(1, &[100; 100]), [(0, 100)]);
        let four = [(0, 25), (25, 50), (50, 75), (75, 100)];
        assert_eq!(parts(4, &[100; 100]), four);
        assert_eq!(parts(4, &[]), []);
        assert_eq!(parts(4, &[0; 3]), [(0, 3)]);
    }

    #[test]
    fn parts_cover_all_texts_in_order_within_the_limits() {
        for workers in [1, 3, 7] {
            let tokens: Vec<u64> = (0..2048).map(|i| (i * 37) % 300).collect();
            let parts = super::parts(workers, &tokens);
            let mut next = 0;
            for part in &parts {
                assert_eq!(part.start, next);
                assert!(part.len() <= 512 && !part.is_empty());
                let sum: u64 = tokens[part.clone()].iter().sum();
                assert!(sum <= 16 * 1024, "{sum}");
                next = part.end;
            }
            assert_eq!(next, 2048);
            assert!(parts.len() >= workers);
        }
        assert_eq!(parts(1, &[1_000_000, 1]), [(0, 1), (1, 2)]);
    }

    #[test]
    fn an_answer_that_is_none_is_refused() {
        let answer = |dimensions, bytes, tokens| Embeddings {
            dimensions,
            vectors: vec![0; bytes].into(),
            tokens: vec![1; tokens],
            total_us: 0,
        };
        assert_eq!(check(&answer(4, 32, 2), 2, 0), Ok(()));
        assert_eq!(check(&answer(4, 32, 2), 2, 4), Ok(()));
        for (part, texts, dimensions) in [
            (answer(4, 31, 2), 2, 0),
            (answer(4, 32, 1), 2, 0),
            (answer(4, 16, 1), 2, 0),
            (answer(0, 0, 2), 2, 0),
            (answer(u32::MAX, 0, 2), 2, 0),
            (answer(4, 32, 2), 2, 3),
        ] {
            assert!(check(&part, texts, dimensions).is_err(), "{part:?}");
        }
    }

    #[test]
    fn a_vector_with_a_number_that_is_not_finite_is_refused() {
        let answer = |last: f32| Embeddings {
            dimensions: 2,
            vectors: [0.5, last].into_iter().flat_map(f32::to_le_bytes).collect(),
            tokens: vec![1],
            total_us: 0,
        };
        assert_eq!(check(&answer(f32::MAX), 1, 2), Ok(()));
        for last in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(check(&answer(last), 1, 2).is_err(), "{last}");
        }
    }
}
