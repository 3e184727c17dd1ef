//! Errors of successions of mesh roots.

/// Reasons for not accepting a succession.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SuccessionError {
    /// It cannot be read.
    #[error("the succession of mesh roots cannot be read: {0}")]
    Encoding(String),
    /// A key in it is not that of the root, or a signature does not fit.
    #[error(
        "the succession of mesh roots is not signed by its {0} root: it was altered or made up"
    )]
    Signature(&'static str),
    /// Neither root is one that this node knows, or a known root has another successor already.
    #[error(
        "the succession of mesh roots from {former} to {next} does not continue the root {known} that this node knows; if that one \
         was replaced while this node was away, it has to join again with a token (`hydramesh token create`)"
    )]
    Unrelated {
        /// Digest of its first root.
        former: String,
        /// Digest of its second root.
        next: String,
        /// Digest of this node's root.
        known: String,
    },
}
