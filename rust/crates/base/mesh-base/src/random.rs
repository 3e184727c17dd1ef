//! Random numbers from the system's generator, good enough for keys.

/// Returns `N` random bytes from the operating system.
///
/// # Panics
/// If the system returns none. Linux always does, once its generator is seeded at boot.
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the system's random number generator works");
    bytes
}

/// Returns a random number from the operating system.
///
/// # Panics
/// As [`bytes`].
pub fn number() -> u64 {
    u64::from_ne_bytes(bytes())
}

/// A random number in `0.0..1.0`.
///
/// # Panics
/// As [`bytes`].
pub fn fraction() -> f64 {
    // As many bits as an f64 has.
    (number() >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn numbers_do_not_repeat() {
        let numbers: HashSet<u64> = (0..1000).map(|_| number()).collect();
        assert_eq!(numbers.len(), 1000);
        assert_ne!(bytes::<32>(), bytes::<32>());
    }

    #[test]
    fn fractions_are_spread_over_their_range() {
        let fractions: Vec<f64> = (0..1000).map(|_| fraction()).collect();
        assert!(fractions.iter().all(|one| (0.0..1.0).contains(one)));
        // Missing one half of it by chance: 1 in 2^999.
        assert!(fractions.iter().any(|one| *one < 0.5));
        assert!(fractions.iter().any(|one| *one >= 0.5));
    }
}
