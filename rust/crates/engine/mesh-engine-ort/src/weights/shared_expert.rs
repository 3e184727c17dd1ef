//! The expert of a mixture that computes every row.

use mesh_kernels::QMatrix;

use super::Loader;
use crate::options::LoadError;

/// Matrices of a shared expert.
pub(crate) struct SharedExpertWeights {
    pub(crate) gate: QMatrix,
    pub(crate) up: QMatrix,
    pub(crate) down: QMatrix,
    /// Scores rows, where the expert has a gate.
    pub(crate) score: Option<QMatrix>,
}

impl SharedExpertWeights {
    /// Bytes of packed matrices.
    pub(crate) fn bytes(&self) -> usize {
        let score = self.score.as_ref().map_or(0, QMatrix::bytes);
        self.gate.bytes() + self.up.bytes() + self.down.bytes() + score
    }
}

impl Loader<'_> {
    pub(super) fn shared_expert(
        &self,
        layer: u32,
        gated: bool,
    ) -> Result<SharedExpertWeights, LoadError> {
        let matrix = |which: &str| self.matrix(&format!("blk.{layer}.ffn_{which}_shexp.weight"));
        let score = format!("blk.{layer}.ffn_gate_inp_shexp.weight");
        Ok(SharedExpertWeights {
            gate: matrix("gate")?,
            up: matrix("up")?,
            down: matrix("down")?,
            score: gated.then(|| self.router(&score)).transpose()?,
        })
    }
}
