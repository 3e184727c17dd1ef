//! Identifiers and secrets.

use data_encoding::HEXLOWER;
use mesh_base::random;

/// 32 random bytes, in hexadecimal digits.
pub(crate) fn secret() -> String {
    HEXLOWER.encode(&random::bytes::<32>())
}

/// A number that no other request of this head has, and that other heads are unlikely to have.
pub(crate) fn unique() -> u64 {
    random::number()
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
        let (one, two) = (secret(), secret());
        assert_eq!(one.len(), 64);
        assert_ne!(one, two);
    }
}
