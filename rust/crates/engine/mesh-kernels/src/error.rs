//! Errors of invalid arguments to kernels.

/// A matrix, a cache or an operator was asked for something its shapes do not allow. Nothing was computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum KernelError {
    /// A buffer has the wrong number of elements.
    #[error("{what} holds {got} elements, but the shapes given need {need}")]
    Length {
        what: &'static str,
        /// Number of elements that it holds.
        got: usize,
        /// Elements it must have.
        need: usize,
    },
    /// A row of a quantised type must be a whole number of blocks.
    #[error("a row of {k} weights is not a whole number of {ty:?} blocks of {block}")]
    Block {
        /// Type of the weights.
        ty: crate::WeightType,
        /// Row length asked for.
        k: usize,
        /// Number of weights per block.
        block: usize,
    },
    /// A dimension that no kernel takes.
    #[error("{what} is {value}; {need}")]
    Dimension {
        what: &'static str,
        value: usize,
        /// Description of the allowed values.
        need: &'static str,
    },
    /// Two parts that must agree do not.
    #[error("{what}: {left} against {right}")]
    Mismatch {
        /// Name of the quantity that must agree.
        what: &'static str,
        /// Its value in the first part.
        left: usize,
        /// Its value in the second part.
        right: usize,
    },
    /// An index past the end.
    #[error("{what} {index} does not exist, there are {count}")]
    OutOfRange {
        /// Name of the indexed thing.
        what: &'static str,
        /// The index that does not exist.
        index: usize,
        /// Number of elements; valid indices are below it.
        count: usize,
    },
    /// The system gave no memory.
    #[error("no memory for {bytes} bytes of {what}")]
    NoMemory {
        /// Purpose of the memory.
        what: &'static str,
        /// Size of the failed allocation.
        bytes: usize,
    },
}

/// `Err(Length)` unless `got == need`.
pub(crate) fn expect_len(what: &'static str, got: usize, need: usize) -> Result<(), KernelError> {
    if got == need {
        Ok(())
    } else {
        Err(KernelError::Length { what, got, need })
    }
}
