//! The chain of message authentication codes, under a key that moves forward every epoch.
//!
//! The code of a record is HMAC-SHA256 under its epoch's key over the code before it and the record's text.
//! The first record's predecessor is the SHA-256 of the trail's origin. At the end of an epoch the key is
//! replaced by a one-way function of itself, so whoever steals the present key can compute no code of an
//! earlier epoch.

use aws_lc_rs::hmac::{self, HMAC_SHA256};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::merkle::Hash;

/// A code of the chain.
pub type Mac = [u8; 32];

/// The key of one epoch. Neither printed nor logged.
pub struct ChainKey {
    epoch: u64,
    bytes: Zeroizing<[u8; 32]>,
    key: hmac::Key,
}

impl std::fmt::Debug for ChainKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("ChainKey");
        shown.field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

impl ChainKey {
    /// The key of this epoch with these bytes.
    pub fn new(epoch: u64, bytes: [u8; 32]) -> Self {
        Self {
            epoch,
            key: hmac::Key::new(HMAC_SHA256, &bytes),
            bytes: Zeroizing::new(bytes),
        }
    }

    /// The epoch whose records it authenticates.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The secret.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.bytes
    }

    /// The key of the next epoch.
    #[must_use]
    pub fn next(&self) -> Self {
        let tag = hmac::sign(&self.key, NEXT);
        let bytes = tag.as_ref().try_into().expect("a code has 32 bytes");
        Self::new(self.epoch + 1, bytes)
    }

    /// Code of a record behind `previous`.
    pub fn mac(&self, previous: &Mac, text: &[u8]) -> Mac {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(previous);
        context.update(text);
        context
            .sign()
            .as_ref()
            .try_into()
            .expect("a code has 32 bytes")
    }
}

/// What the first record of a trail is chained to.
pub fn first_link(origin: &str) -> Mac {
    let hash: Hash = Sha256::digest(origin).into();
    hash
}

/// Begins with a byte that no record's text has, and has another length than a code and a text.
const NEXT: &[u8] = b"\0hydramesh audit: next epoch";

#[cfg(test)]
mod tests {
    use data_encoding::HEXLOWER;

    use super::*;

    #[test]
    fn codes_depend_on_key_predecessor_and_text() {
        let key = ChainKey::new(0, [7; 32]);
        let first = key.mac(&[0; 32], b"text");
        assert_eq!(first, key.mac(&[0; 32], b"text"));
        assert_ne!(first, key.mac(&[1; 32], b"text"));
        assert_ne!(first, key.mac(&[0; 32], b"texts"));
        assert_ne!(first, key.next().mac(&[0; 32], b"text"));
        assert_eq!(key.next().epoch(), 1);
        assert_ne!(key.next().bytes(), key.next().next().bytes());
        assert!(!format!("{key:?}").contains("7, 7"));
    }

    #[test]
    fn the_code_is_hmac_sha256() {
        // RFC 4231, test case 6: the key is longer than a block there, so its digest is the key here.
        let key: [u8; 32] = Sha256::digest([0xAA; 131]).into();
        let text = b"Test Using Larger Than Block-Size Key - Hash Key First";
        let (previous, rest) = text.split_at(32);
        let mac = ChainKey::new(0, key).mac(previous.try_into().unwrap(), rest);
        let known = "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54";
        assert_eq!(HEXLOWER.encode(&mac), known);
    }
}
