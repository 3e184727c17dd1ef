//! Locks that a panic does not poison: what is behind them is whole after every single change.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks it, whether or not a holder has panicked.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
