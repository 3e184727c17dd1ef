//! Finished images that clients fetch by a name, for a while and within a bounded memory.
//!
//! When the memory is full, the source that holds the most of it loses its oldest image: nobody can push out the
//! images of others by asking for many.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::fair::Origin;

/// Images by their names.
#[derive(Debug)]
pub struct ImageFiles {
    /// Most bytes of all images.
    limit: usize,
    /// Time for which an image can be fetched.
    kept_for: Duration,
    /// Oldest first.
    images: VecDeque<KeptImage>,
    held: HashMap<Origin, usize>,
    used: usize,
}

#[derive(Debug)]
struct KeptImage {
    name: String,
    origin: Origin,
    until: Instant,
    file: Bytes,
}

/// An image that is larger than the memory for all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "an image of {bytes} bytes does not fit the {limit} bytes that are kept for URLs (http.image_memory); ask for b64_json"
)]
pub struct TooLarge {
    bytes: usize,
    limit: usize,
}

impl ImageFiles {
    /// No images yet.
    pub fn new(limit: usize, kept_for: Duration) -> Self {
        Self {
            limit,
            kept_for,
            images: VecDeque::new(),
            held: HashMap::new(),
            used: 0,
        }
    }

    /// Keeps an image of `origin` under a name that nobody can guess.
    ///
    /// # Errors
    /// If it is larger than the memory.
    pub fn keep(
        &mut self,
        name: String,
        origin: Origin,
        file: Bytes,
        now: Instant,
    ) -> Result<(), TooLarge> {
        let (bytes, limit) = (file.len(), self.limit);
        if bytes > limit {
            return Err(TooLarge { bytes, limit });
        }
        self.expire(now);
        while self.used + bytes > limit {
            // The new image counts as held, so that its source's own go first among equals.
            let with_new = |(whose, held): &(&Origin, &usize)| {
                let new = if **whose == origin { bytes } else { 0 };
                (**held + new, **whose)
            };
            let most = self.held.iter().max_by_key(with_new);
            let Some(most) = most.map(|(whose, _)| *whose) else {
                break;
            };
            self.drop_oldest_of(most);
        }
        self.used += bytes;
        *self.held.entry(origin).or_default() += bytes;
        self.images.push_back(KeptImage {
            name,
            origin,
            until: now + self.kept_for,
            file,
        });
        Ok(())
    }

    /// The image of this name; `None` if there is none any more.
    pub fn get(&mut self, name: &str, now: Instant) -> Option<Bytes> {
        self.expire(now);
        let mut images = self.images.iter();
        let found = images.find(|image| image.name == name)?;
        Some(found.file.clone())
    }

    /// Forgets images whose time is over.
    pub fn expire(&mut self, now: Instant) {
        while self.images.front().is_some_and(|image| image.until <= now) {
            let gone = self.images.pop_front();
            self.forget(gone);
        }
    }

    /// Bytes of all images.
    pub fn used(&self) -> usize {
        self.used
    }

    fn drop_oldest_of(&mut self, origin: Origin) {
        let oldest = self.images.iter().position(|image| image.origin == origin);
        let gone = oldest.and_then(|index| self.images.remove(index));
        if gone.is_none() {
            self.held.remove(&origin);
        }
        self.forget(gone);
    }

    fn forget(&mut self, gone: Option<KeptImage>) {
        let Some(image) = gone else { return };
        self.used -= image.file.len();
        if let Some(held) = self.held.get_mut(&image.origin) {
            *held -= image.file.len();
            if *held == 0 {
                self.held.remove(&image.origin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const A: Origin = Origin::Key(1);
    const B: Origin = Origin::Key(2);

    fn file(bytes: usize) -> Bytes {
        vec![1; bytes].into()
    }

    #[test]
    fn an_image_is_there_until_its_time_is_over() {
        let now = Instant::now();
        let mut files = ImageFiles::new(100, HOUR);
        files.keep("a".into(), A, file(10), now).unwrap();
        assert_eq!(files.get("a", now + HOUR / 2), Some(file(10)));
        assert_eq!(files.get("b", now), None);
        assert_eq!(files.get("a", now + HOUR), None);
        assert_eq!((files.used(), files.held.len()), (0, 0));
    }

    #[test]
    fn who_holds_the_most_loses_the_oldest() {
        let now = Instant::now();
        let mut files = ImageFiles::new(100, HOUR);
        files.keep("b".into(), B, file(30), now).unwrap();
        for name in ["a1", "a2", "a3", "a4"] {
            files.keep(name.into(), A, file(30), now).unwrap();
        }
        assert_eq!(files.get("b", now), Some(file(30)));
        assert_eq!(files.get("a1", now), None);
        assert_eq!(files.get("a4", now), Some(file(30)));
        let error = files.keep("x".into(), A, file(101), now).unwrap_err();
        assert!(error.to_string().contains("b64_json"));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn memory_is_bounded_and_accounts_agree(
            kept in prop::collection::vec((0usize..4, 0usize..60, 0u64..2000), 0..80),
        ) {
            let mut now = Instant::now();
            let mut files = ImageFiles::new(100, HOUR);
            for (index, (origin, bytes, seconds)) in kept.into_iter().enumerate() {
                now += Duration::from_secs(seconds);
                let origin = Origin::Key(origin);
                files.keep(index.to_string(), origin, file(bytes), now).unwrap();
                prop_assert!(files.used() <= 100);
                let all: usize = files.images.iter().map(|image| image.file.len()).sum();
                prop_assert_eq!(all, files.used());
                prop_assert_eq!(files.held.values().sum::<usize>(), files.used());
                prop_assert_eq!(files.get(&index.to_string(), now), Some(file(bytes)));
            }
        }
    }
}
