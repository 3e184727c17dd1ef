//! Prompts as the text encoders want them: chunks of 75 tokens, each token with a weight.

/// Tokens of a chunk without those that begin and end it.
pub const CHUNK_TOKENS: usize = 75;

/// A tokenised prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// At least one.
    pub chunks: Vec<Chunk>,
    /// Token that begins each chunk.
    pub start: u32,
    /// Token that ends each chunk.
    pub end: u32,
}

/// Up to [`CHUNK_TOKENS`] tokens of a prompt.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Chunk {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Weight of each token.
    pub weights: Vec<f32>,
}

impl Prompt {
    /// True if the prompt has no tokens.
    pub fn is_empty(&self) -> bool {
        self.chunks.iter().all(|chunk| chunk.tokens.is_empty())
    }

    /// True if every weight is 1.
    pub fn is_plain(&self) -> bool {
        let mut weights = self.chunks.iter().flat_map(|chunk| &chunk.weights);
        weights.all(|&weight| weight == 1.0)
    }

    /// The 77 ids of each chunk: start, tokens, end, and `pad` up to the end. Most text encoders pad with [`Prompt::end`],
    /// the second one of XL and the one of Stable Diffusion 2 with token 0, `!`.
    pub fn ids(&self, pad: u32) -> Vec<[u32; CHUNK_TOKENS + 2]> {
        let ids = |chunk: &Chunk| {
            let mut ids = [pad; CHUNK_TOKENS + 2];
            ids[0] = self.start;
            for (id, &token) in ids[1..=CHUNK_TOKENS].iter_mut().zip(&chunk.tokens) {
                *id = token;
            }
            ids[chunk.tokens.len().min(CHUNK_TOKENS) + 1] = self.end;
            ids
        };
        self.chunks.iter().map(ids).collect()
    }

    /// The weights of the 77 tokens of each chunk: 1 for start, end and padding.
    pub fn weights(&self) -> Vec<[f32; CHUNK_TOKENS + 2]> {
        let weights = |chunk: &Chunk| {
            let mut weights = [1.0; CHUNK_TOKENS + 2];
            for (weight, &of) in weights[1..=CHUNK_TOKENS].iter_mut().zip(&chunk.weights) {
                *weight = of;
            }
            weights
        };
        self.chunks.iter().map(weights).collect()
    }
}

/// Multiplies each hidden row by the weight of its token, then scales all of them so that their mean is as before: the emphasis of
/// AUTOMATIC1111's web interface. `hidden` is row-major `[weights, width]`; weights that are all 1 change no bit.
pub fn weigh(hidden: &mut [f32], weights: &[f32], width: usize) {
    if width == 0 || weights.iter().all(|&weight| weight == 1.0) {
        return;
    }
    let mean = |hidden: &[f32]| {
        let sum: f64 = hidden.iter().map(|&x| f64::from(x)).sum();
        sum / hidden.len().max(1) as f64
    };
    let before = mean(hidden);
    for (row, weight) in hidden.chunks_exact_mut(width).zip(weights) {
        row.iter_mut().for_each(|x| *x *= weight);
    }
    let factor = before / mean(hidden);
    if factor.is_finite() {
        let factor = factor as f32;
        hidden.iter_mut().for_each(|x| *x *= factor);
    }
}
