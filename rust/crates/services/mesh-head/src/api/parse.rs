//! Parses bodies; large ones on another thread, where they hold up no other request.

use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::task::JoinError;

/// Returns the result of `parse` on a body. A large one is parsed on another thread, in its turn.
///
/// # Errors
/// If `parse` panics.
pub(crate) async fn parsed<T: Send + 'static>(
    turns: &Semaphore,
    body: Bytes,
    parse: impl FnOnce(&[u8]) -> T + Send + 'static,
) -> Result<T, JoinError> {
    if body.len() <= SMALL {
        return Ok(parse(&body));
    }
    in_turn(turns, move || parse(&body)).await
}

/// Returns the result of `work`, done on another thread in its turn.
///
/// # Errors
/// If `work` panics.
pub(crate) async fn in_turn<T: Send + 'static>(
    turns: &Semaphore,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    let _turn = turns.acquire().await;
    tokio::task::spawn_blocking(work).await
}

/// Bodies up to this length are parsed in less time than it takes to hand them over.
const SMALL: usize = 16 << 10;
