//! The expert that computes every row of a mixture.

use crate::matrix::QMatrix;
use crate::mem::Buffer;
use crate::{Gate, KernelError, Linear, Pool, gate_up, linear};

/// An expert that computes every row: a dense network beside the mixture, over the same normed rows.
#[derive(Debug, Clone, Copy)]
pub struct SharedExpert<'a> {
    /// The gated first half.
    pub gate: Gate<'a>,
    /// The second half: its inputs are the first half's outputs.
    pub down: &'a QMatrix,
    /// Scores a row: the sigmoid of its one output is a factor on the expert's output.
    pub score: Option<&'a QMatrix>,
    /// Factor on the output.
    pub scale: f32,
}

impl SharedExpert<'_> {
    /// Fails unless the matrices fit rows of `width` numbers.
    pub(super) fn check(&self, width: usize) -> Result<(), KernelError> {
        let score = self
            .score
            .map_or((1, width), |score| (score.n(), score.k()));
        for (what, left, right) in [
            (
                "inputs of the shared expert's gate",
                self.gate.gate.k(),
                width,
            ),
            ("outputs of the shared expert", self.down.n(), width),
            (
                "outputs of the shared expert's gate and inputs of down",
                self.gate.gate.n(),
                self.down.k(),
            ),
            ("outputs of the shared expert's score", score.0, 1),
            ("inputs of the shared expert's score", score.1, width),
        ] {
            if left != right {
                return Err(KernelError::Mismatch { what, left, right });
            }
        }
        Ok(())
    }
}

/// Rows that the expert computes at once, as in dense layers.
const BLOCK: usize = 128;

/// Memory of the shared expert, kept between calls.
#[derive(Debug, Default)]
pub(super) struct SharedScratch {
    /// Rows between the halves.
    middle: Buffer,
    /// One for each row, each row's factor and output.
    factors: Vec<f32>,
    outputs: Buffer,
}

impl SharedScratch {
    /// Computes the expert over `normed` rows, for [`SharedScratch::add`].
    pub(super) fn compute(
        &mut self,
        pool: &Pool,
        expert: &SharedExpert<'_>,
        normed: &[f32],
        rows: usize,
    ) -> Result<(), KernelError> {
        let plain = Linear::default();
        self.factors.clear();
        self.factors.resize(rows, expert.scale);
        if let Some(score) = expert.score {
            linear(pool, score, normed, rows, &mut self.factors, &plain)?;
            for factor in &mut self.factors {
                *factor = expert.scale / (1.0 + (-*factor).exp());
            }
        }
        let (wide, width) = (expert.gate.gate.n(), expert.down.n());
        self.middle
            .reserve("the rows between", rows.min(BLOCK) * wide * 4)?;
        self.outputs
            .reserve("the shared expert's outputs", rows * width * 4)?;
        let outputs = &mut self.outputs.floats_mut()[..rows * width];
        let blocks = outputs.chunks_mut(BLOCK * width);
        for (normed, outputs) in normed.chunks(BLOCK * width).zip(blocks) {
            let rows = normed.len() / width;
            let middle = &mut self.middle.floats_mut()[..rows * wide];
            gate_up(pool, &expert.gate, normed, rows, None, middle)?;
            linear(pool, expert.down, middle, rows, outputs, &plain)?;
        }
        Ok(())
    }

    /// Adds each row's output times its factor.
    pub(super) fn add(&mut self, x: &mut [f32], width: usize) {
        let outputs = self.outputs.floats_mut().chunks_exact(width);
        for ((x, outputs), factor) in x.chunks_exact_mut(width).zip(outputs).zip(&self.factors) {
            for (x, output) in x.iter_mut().zip(outputs) {
                *x += factor * output;
            }
        }
    }
}
