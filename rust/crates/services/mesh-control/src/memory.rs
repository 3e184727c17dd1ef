//! Account of the head's memory for requests, in all and per client. Requests are charged before they
//! allocate.

use std::collections::HashMap;

use super::fair::Origin;

/// Bytes that requests hold, by origin.
#[derive(Debug)]
pub struct RequestMemory {
    /// Bytes for all requests; 0 is without limit.
    limit: u64,
    used: u64,
    by: HashMap<Origin, Held>,
}

/// Bytes that one client's requests hold.
#[derive(Debug, Clone, Copy, Default)]
struct Held {
    all: u64,
    /// Those of requests that are not small.
    large: u64,
}

/// A request that needs more memory than is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TooMuch {
    /// More than its client's share has left.
    #[error(
        "your requests hold {used} of the {limit} bytes of memory that one client may have; wait for one of them to end"
    )]
    Yours {
        /// Bytes that the client's requests hold.
        used: u64,
        /// Bytes that one client may hold.
        limit: u64,
    },
    /// More than is left.
    #[error(
        "requests hold {used} of {limit} bytes of memory (request_memory); ask again in a moment"
    )]
    All {
        /// Bytes that all requests hold.
        used: u64,
        /// Bytes that all requests may hold.
        limit: u64,
    },
}

impl RequestMemory {
    /// An empty account of `limit` bytes; 0 means no limit.
    pub fn new(limit: u64) -> Self {
        Self {
            limit,
            used: 0,
            by: HashMap::new(),
        }
    }

    /// The most that one client may hold, in bytes. It is more than half, so that a client may send the
    /// longest request while others do little.
    fn share(&self) -> u64 {
        self.limit / 3 * 2
    }

    /// True if a request of `bytes` may use what is kept for small ones.
    fn is_small(&self, bytes: u64) -> bool {
        bytes <= self.limit / SMALL
    }

    /// Takes `bytes` more for a request of `origin` that has `own` already. A request of an origin that holds
    /// no other large one counts as no more than the share, so that it is not refused on every attempt;
    /// returns the bytes taken.
    ///
    /// # Errors
    /// [`TooMuch`] says whose they are; then nothing is taken.
    pub fn take(&mut self, origin: Origin, own: u64, mut bytes: u64) -> Result<u64, TooMuch> {
        let mut yours = self.by.get(&origin).copied().unwrap_or_default();
        if !self.is_small(own) {
            yours.large = yours.large.saturating_sub(own);
        }
        if self.limit > 0 {
            if yours.large == 0 {
                bytes = bytes.min(self.share().saturating_sub(own));
            }
            self.check(yours, own, bytes)?;
        }
        let whole = own.saturating_add(bytes);
        if !self.is_small(whole) {
            yours.large = yours.large.saturating_add(whole);
        }
        yours.all = yours.all.saturating_add(bytes);
        self.used = self.used.saturating_add(bytes);
        self.by.insert(origin, yours);
        Ok(bytes)
    }

    /// Whether a client that holds `yours`, without a request's `own` among the large ones, may have `bytes`
    /// more for it. A twelfth of the memory is for small requests: an upload does not keep them out, and they
    /// do not end an upload of the same client.
    fn check(&self, yours: Held, own: u64, bytes: u64) -> Result<(), TooMuch> {
        let (used, limit, twelfth) = (self.used, self.limit, self.limit / 12);
        let small = self.is_small(own.saturating_add(bytes));
        let (held, share, room) = match small {
            true => (yours.all, self.share() + twelfth, limit),
            false => (yours.large + own, self.share(), limit - twelfth),
        };
        if held.saturating_add(bytes) > share {
            let (used, limit) = (held, share);
            return Err(TooMuch::Yours { used, limit });
        }
        if used.saturating_add(bytes) > room {
            return Err(TooMuch::All { used, limit });
        }
        Ok(())
    }

    /// Returns all `bytes` of a request of `origin` to the account.
    pub fn give(&mut self, origin: Origin, bytes: u64) {
        self.used = self.used.saturating_sub(bytes);
        let large = !self.is_small(bytes);
        if let Some(yours) = self.by.get_mut(&origin) {
            yours.all = yours.all.saturating_sub(bytes);
            if large {
                yours.large = yours.large.saturating_sub(bytes);
            }
            if yours.all == 0 {
                self.by.remove(&origin);
            }
        }
    }

    /// Bytes that are not taken.
    pub fn left(&self) -> u64 {
        match self.limit {
            0 => u64::MAX,
            limit => limit.saturating_sub(self.used),
        }
    }
}

/// The limit divided by it is the size of a small request.
const SMALL: u64 = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_client_has_a_share_and_all_have_a_limit() {
        let mut memory = RequestMemory::new(300);
        let (a, b, c) = (Origin::Key(1), Origin::Key(2), Origin::Unknown);
        assert_eq!(memory.take(a, 0, 201), Ok(200));
        memory.give(a, 200);
        assert_eq!(memory.take(a, 0, 150), Ok(150));
        assert_eq!(
            memory.take(a, 0, 51),
            Err(TooMuch::Yours {
                used: 150,
                limit: 200
            })
        );
        assert_eq!(memory.take(b, 0, 100), Ok(100));
        assert_eq!(
            memory.take(c, 0, 51),
            Err(TooMuch::All {
                used: 250,
                limit: 300
            })
        );
        memory.give(a, 150);
        assert_eq!(memory.take(c, 0, 51), Ok(51));
        memory.give(b, 100);
        memory.give(c, 51);
        assert_eq!((memory.used, memory.by.len()), (0, 0));
    }

    #[test]
    fn a_request_that_grows_alone_is_never_refused() {
        let mut memory = RequestMemory::new(300);
        let (a, b) = (Origin::Key(1), Origin::Key(2));
        assert_eq!(memory.take(a, 0, 130), Ok(130));
        assert_eq!(memory.take(a, 130, 130), Ok(70), "the share is its limit");
        assert_eq!(memory.take(a, 200, 130), Ok(0));
        // Another request of the same client waits.
        assert!(matches!(memory.take(a, 0, 2), Err(TooMuch::Yours { .. })));
        memory.give(a, 100);
        assert_eq!(memory.take(a, 0, 50), Ok(50));
        assert!(matches!(
            memory.take(a, 100, 51),
            Err(TooMuch::Yours { used: 150, .. })
        ));
        assert_eq!(memory.take(a, 100, 50), Ok(50), "what fits is had");
        assert!(matches!(memory.take(b, 0, 101), Err(TooMuch::All { .. })));
    }

    #[test]
    fn uploads_leave_room_for_small_requests_of_theirs_and_others() {
        let mut memory = RequestMemory::new(24 << 20);
        let (a, b) = (Origin::Key(1), Origin::Key(2));
        assert_eq!(memory.take(a, 0, 16 << 20), Ok(16 << 20));
        assert_eq!(memory.take(b, 0, 6 << 20), Ok(6 << 20));
        for origin in [a, b, Origin::Unknown] {
            assert_eq!(memory.take(origin, 0, 64 << 10), Ok(64 << 10));
        }
        let large = memory.take(Origin::Unknown, 0, 128 << 10);
        assert!(matches!(large, Err(TooMuch::All { .. })));
    }

    #[test]
    fn small_requests_of_a_client_do_not_end_its_longest() {
        let mut memory = RequestMemory::new(24 << 20);
        let a = Origin::Key(1);
        assert_eq!(memory.take(a, 0, 4 << 10), Ok(4 << 10));
        let mut own = 0;
        for _ in 0..16 {
            own += memory.take(a, own, 1 << 20).unwrap();
            assert_eq!(memory.take(a, 0, 4 << 10), Ok(4 << 10));
        }
        assert_eq!(own, 16 << 20);
        assert!(matches!(
            memory.take(a, 0, 1 << 20),
            Err(TooMuch::Yours { used, .. }) if used == own
        ));
        memory.give(a, own);
        for _ in 0..17 {
            memory.give(a, 4 << 10);
        }
        assert_eq!((memory.used, memory.by.len()), (0, 0));
    }

    #[test]
    fn without_a_limit_all_is_given() {
        let mut memory = RequestMemory::new(0);
        assert_eq!(
            memory.take(Origin::Admin, 0, u64::MAX / 2),
            Ok(u64::MAX / 2)
        );
    }
}
