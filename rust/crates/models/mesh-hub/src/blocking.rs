//! Work that blocks, on threads of its own.

/// Runs `work` where it may block.
///
/// # Panics
/// If `work` panics.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work)
        .await
        .expect("what blocks does not panic")
}
