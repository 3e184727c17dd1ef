//! Bounds the requests that are prepared for an engine at once: rendered and tokenised.
//!
//! Preparation takes a multiple of a request's bytes. Short requests have permits of their own, so that long
//! ones hold up only each other; of the long ones, one is prepared at a time and a few may wait with their
//! memory.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinError;

#[derive(Debug)]
pub(crate) struct Preparations {
    short: Arc<Semaphore>,
    long: Arc<Semaphore>,
    /// Places of long requests, waiting or being prepared.
    places: Arc<Semaphore>,
}

/// Permission to prepare a request; dropping it lets the next one in. The blocking part of the preparation
/// owns it, since that part goes on when its request is gone.
#[derive(Debug)]
pub(crate) struct Permit {
    _permit: OwnedSemaphorePermit,
    _place: Option<OwnedSemaphorePermit>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{MOST_LONG} requests of over {LONG} bytes wait to be prepared; ask again in a moment")]
pub(crate) struct Full;

impl Default for Preparations {
    fn default() -> Self {
        Self {
            short: Arc::new(Semaphore::new(SHORT_AT_ONCE)),
            long: Arc::new(Semaphore::new(1)),
            places: Arc::new(Semaphore::new(MOST_LONG)),
        }
    }
}

impl Preparations {
    /// Waits for the permit of a request of so many bytes.
    pub(crate) async fn enter(&self, bytes: usize) -> Result<Permit, Full> {
        let (permits, place) = match is_long(bytes) {
            false => (&self.short, None),
            true => {
                let place = self.places.clone().try_acquire_owned();
                (&self.long, Some(place.map_err(|_| Full)?))
            }
        };
        let permit = permits.clone().acquire_owned().await.map_err(|_| Full)?;
        Ok(Permit {
            _permit: permit,
            _place: place,
        })
    }
}

/// Does the part of a preparation that blocks. The permit is given back when it is done, even if its request is
/// gone by then.
pub(crate) async fn prepare<T: Send + 'static>(
    permit: Permit,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    let working = tokio::task::spawn_blocking(move || {
        let done = work();
        drop(permit);
        done
    });
    working.await
}

pub(crate) fn is_long(bytes: usize) -> bool {
    bytes > LONG
}

const LONG: usize = 256 << 10;
const SHORT_AT_ONCE: usize = 8;
/// Long requests that may be here at once.
const MOST_LONG: usize = 4;

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn long_requests_wait_for_each_other_and_short_ones_do_not_wait_for_them() {
        let places = Preparations::default();
        let first = places.enter(8 << 20).now_or_never().unwrap().unwrap();
        let mut waiting: Vec<_> = (1..MOST_LONG)
            .map(|_| Box::pin(places.enter(8 << 20)))
            .collect();
        for other in &mut waiting {
            assert!(other.now_or_never().is_none());
        }
        assert_eq!(
            places.enter(8 << 20).now_or_never().unwrap().unwrap_err(),
            Full
        );
        let short: Vec<_> = (0..SHORT_AT_ONCE)
            .map(|_| places.enter(1000).now_or_never().unwrap())
            .collect();
        assert!(
            places.enter(1000).now_or_never().is_none(),
            "they are bounded, too"
        );
        drop((first, short));
        assert!((&mut waiting[0]).now_or_never().is_some());
        // A request that gives up waiting makes room.
        waiting.clear();
        assert!(places.enter(8 << 20).now_or_never().unwrap().is_ok());
    }

    #[tokio::test]
    async fn work_that_nobody_waits_for_any_more_keeps_its_place_until_it_is_done() {
        let places = Preparations::default();
        let place = places.enter(8 << 20).await.unwrap();
        let (finish, finished) = std::sync::mpsc::channel::<()>();
        let work = prepare(place, move || finished.recv().is_ok());
        assert!(Box::pin(work).now_or_never().is_none(), "cancelled");
        let mut next = Box::pin(places.enter(8 << 20));
        assert!((&mut next).now_or_never().is_none());
        finish.send(()).unwrap();
        assert!(next.await.is_ok());
    }
}
