//! Places for futures.

use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex};

use tokio::sync::oneshot;

use super::Places;
use crate::sync::lock;

/// [`Places`] for work that ends when its place is given up.
#[derive(Debug)]
pub struct Room<K>(Arc<Mutex<Places<K, oneshot::Sender<()>>>>);

/// Error of work whose place was given up for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GivenUp;

impl<K: Clone + Eq + Hash> Room<K> {
    /// Creates `total` places, as [`Places::new`] does.
    pub fn new(total: usize, per_source: usize) -> Self {
        Self(Arc::new(Mutex::new(Places::new(total, per_source))))
    }

    /// Runs `work` as long as it has its place.
    pub async fn hold<T>(&self, source: K, work: impl Future<Output = T>) -> Result<T, GivenUp> {
        let (place, given_up) = oneshot::channel();
        let (id, other) = lock(&self.0).enter(source, place);
        // Ends the other's wait.
        drop(other);
        let _leaves = Leaves { room: self, id };
        tokio::select! {
            done = work => Ok(done),
            _ = given_up => Err(GivenUp),
        }
    }

    /// True if both are clones of the same room.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl<K> Clone for Room<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

struct Leaves<'a, K: Clone + Eq + Hash> {
    room: &'a Room<K>,
    id: u64,
}

impl<K: Clone + Eq + Hash> Drop for Leaves<'_, K> {
    fn drop(&mut self) {
        lock(&self.room.0).leave(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_stays_long_goes_first_and_others_notice_nothing() {
        let room: Room<u8> = Room::new(2, 2);
        let stay = |source| {
            let room = room.clone();
            tokio::spawn(async move { room.hold(source, std::future::pending::<()>()).await })
        };
        let (first, second) = (stay(1), stay(1));
        tokio::task::yield_now().await;
        let third = stay(2);
        assert_eq!(first.await.expect("no panic"), Err(GivenUp));
        assert!(!second.is_finished() && !third.is_finished());
        assert_eq!(room.hold(3, async { 7 }).await, Ok(7));
        second.abort();
        third.abort();
        let _ = (second.await, third.await);
        assert!(lock(&room.0).is_empty());
    }
}
