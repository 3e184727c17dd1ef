//! Why a kernel refused its arguments.

/// A matrix, a cache or an operator was asked for something its shapes do not allow. Nothing was computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A buffer has the wrong number of elements.
    #[error("{what} holds {got} elements, but the shapes given need {need}")]
    Length {
        /// Which buffer.
        what: &'static str,
        /// Elements it has.
        got: usize,
        /// Elements it must have.
        need: usize,
    },
    /// A row of a quantised type must be a whole number of blocks.
    #[error("a row of {k} weights is not a whole number of {ty:?} blocks of {block}")]
    Block {
        /// The weight type.
        ty: crate::WeightType,
        /// Row length asked for.
        k: usize,
        /// Weights per block.
        block: usize,
    },
    /// A dimension that no kernel takes.
    #[error("{what} is {value}; {need}")]
    Dimension {
        /// Which dimension.
        what: &'static str,
        /// Its value.
        value: usize,
        /// What is allowed.
        need: &'static str,
    },
    /// Two parts that must agree do not.
    #[error("{what}: {left} against {right}")]
    Mismatch {
        /// What must agree.
        what: &'static str,
        /// One value.
        left: usize,
        /// The other.
        right: usize,
    },
    /// An index past the end.
    #[error("{what} {index} does not exist, there are {count}")]
    OutOfRange {
        /// What is indexed.
        what: &'static str,
        /// The index.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// The system gave no memory.
    #[error("no memory for {bytes} bytes of {what}")]
    NoMemory {
        /// What it was for.
        what: &'static str,
        /// How much was asked for.
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
