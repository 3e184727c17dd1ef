//! Identifiers and secrets.

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// 32 bytes from the system's generator, in hex.
///
/// # Errors
/// When the system gives none.
pub(crate) fn secret() -> io::Result<String> {
    let mut bytes = [0; 32];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A number that no other request of this head has, and that other heads are unlikely to have. It is no secret.
pub(crate) fn unique() -> u64 {
    static KEYS: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    static NEXT: AtomicU64 = AtomicU64::new(0);
    KEYS.hash_one(NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A fresh id such as `req-5f0c9d2be1a34477`.
pub(crate) fn fresh(prefix: &str) -> String {
    format!("{prefix}-{:016x}", unique())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn ids_do_not_repeat() {
        let ids: HashSet<String> = (0..10_000).map(|_| fresh("req")).collect();
        assert_eq!(ids.len(), 10_000);
    }

    #[test]
    fn secrets_are_long_and_differ() {
        let (one, two) = (secret().unwrap(), secret().unwrap());
        assert_eq!(one.len(), 64);
        assert_ne!(one, two);
    }
}
