//! The precedence of text over images on a worker that serves both.
//!
//! Both share the processor's cores, caches and memory bandwidth, or a GPU. So an image makes no step while text is
//! being computed, but for one now and then, so that a worker that always has text makes images, too. Text is counted for
//! the whole process, as its threads are.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Requests for text or vectors that engines of this process have.
static RUNNING: AtomicUsize = AtomicUsize::new(0);

/// A request that has precedence over images, until it is dropped.
#[derive(Debug)]
pub(crate) struct Precedence(());

impl Precedence {
    pub(crate) fn take() -> Self {
        RUNNING.fetch_add(1, Ordering::Relaxed);
        Precedence(())
    }
}

impl Drop for Precedence {
    fn drop(&mut self) {
        RUNNING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// True while a request has precedence.
#[cfg_attr(not(feature = "images"), allow(dead_code))]
pub(crate) fn is_taken() -> bool {
    RUNNING.load(Ordering::Relaxed) > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_lasts_as_long_as_the_last_request() {
        // Other tests of this process may have some, too.
        let first = Precedence::take();
        let second = Precedence::take();
        drop(first);
        assert!(is_taken());
        let before = RUNNING.load(Ordering::Relaxed);
        drop(second);
        assert!(RUNNING.load(Ordering::Relaxed) < before + 1);
    }
}
