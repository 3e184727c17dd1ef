//! The journal: the entries behind the last full bundle, in the order in which they were written, with the
//! signed checkpoints of the groups that were synced.
//!
//! A frame is `HMA1`, the length of its body (32 bits, little-endian), the body, and the first 8 bytes of the
//! SHA-256 over all before. The body is one byte for its kind, and the contents. The first frame is the
//! header.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::note::LONGEST_NOTE;

/// Contents of a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame<'a> {
    /// JSON of a [`Header`].
    Header(&'a [u8]),
    /// An entry.
    Entry(&'a [u8]),
    /// A signed checkpoint: all entries before are on disk and signed.
    Seal(&'a [u8]),
}

/// Beginning of a journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Header {
    /// Name of the trail.
    pub origin: String,
    /// Number of the first entry: a multiple of 256.
    pub base: u64,
    /// Code of the record before, in hexadecimal digits.
    pub last: String,
}

/// A journal as far as it can be read.
#[derive(Debug)]
pub(crate) struct Scan<'a> {
    /// The whole frames at the beginning, with their offsets.
    pub frames: Vec<(usize, Frame<'a>)>,
    /// Offset behind them.
    pub end: usize,
    /// Offset of a seal behind something that is no frame: what lies between was on disk once.
    pub seal_behind: Option<usize>,
}

/// Appends a frame.
pub(crate) fn push(frame: &Frame<'_>, journal: &mut Vec<u8>) {
    let (kind, contents) = match frame {
        Frame::Header(contents) => (0, contents),
        Frame::Entry(contents) => (1, contents),
        Frame::Seal(contents) => (2, contents),
    };
    let start = journal.len();
    let length = u32::try_from(contents.len() + 1).expect("frames are short");
    journal.extend_from_slice(MAGIC);
    journal.extend_from_slice(&length.to_le_bytes());
    journal.push(kind);
    journal.extend_from_slice(contents);
    let digest = Sha256::digest(&journal[start..]);
    journal.extend_from_slice(&digest[..CHECK_BYTES]);
}

/// Reads the frame at the beginning of these bytes, and its length; `None` if it is not whole.
fn first(bytes: &[u8]) -> Option<(Frame<'_>, usize)> {
    let body = bytes.strip_prefix(MAGIC)?;
    let (length, body) = body.split_first_chunk()?;
    let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
    if length > LONGEST_FRAME {
        return None;
    }
    let contents = body.get(..length)?;
    let framed = PREFIX_BYTES + length;
    let check = bytes.get(framed..framed + CHECK_BYTES)?;
    if Sha256::digest(&bytes[..framed])[..CHECK_BYTES] != *check {
        return None;
    }
    let (kind, contents) = contents.split_first()?;
    let frame = match kind {
        0 => Frame::Header(contents),
        1 => Frame::Entry(contents),
        2 => Frame::Seal(contents),
        _ => return None,
    };
    Some((frame, framed + CHECK_BYTES))
}

/// Reads all frames.
pub(crate) fn scan(bytes: &[u8]) -> Scan<'_> {
    let (mut frames, mut end) = (Vec::new(), 0);
    while let Some((frame, length)) = first(&bytes[end..]) {
        frames.push((end, frame));
        end += length;
    }
    let is_seal = |at: &usize| matches!(first(&bytes[*at..]), Some((Frame::Seal(_), _)));
    let seal_behind = (end + 1..bytes.len())
        .filter(|at| bytes[*at..].starts_with(MAGIC))
        .rfind(is_seal);
    Scan {
        frames,
        end,
        seal_behind,
    }
}

const MAGIC: &[u8; 4] = b"HMA1";
const PREFIX_BYTES: usize = 8;
const CHECK_BYTES: usize = 8;
const LONGEST_FRAME: usize = LONGEST_NOTE + 1;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_journal_is_read_up_to_what_is_not_whole() {
        let mut journal = Vec::new();
        push(&Frame::Header(b"{}"), &mut journal);
        push(&Frame::Entry(b"one"), &mut journal);
        let second = journal.len();
        push(&Frame::Seal(b"note"), &mut journal);
        for cut in 0..journal.len() {
            let scanned = scan(&journal[..cut]);
            assert!(scanned.end <= cut && scanned.seal_behind.is_none());
            assert_eq!(
                scanned.frames.len(),
                [19, 39, journal.len()]
                    .iter()
                    .filter(|end| cut >= **end)
                    .count()
            );
        }
        let whole = scan(&journal);
        assert_eq!(whole.frames[1], (19, Frame::Entry(b"one")));
        assert_eq!((whole.end, whole.seal_behind), (journal.len(), None));
        // Every changed byte is noticed, and one before a seal is told apart from a cut.
        for at in 0..journal.len() {
            let mut changed = journal.clone();
            changed[at] ^= 0x10;
            let scanned = scan(&changed);
            assert!(scanned.end <= at);
            assert_eq!(scanned.seal_behind, (at < second).then_some(second));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_scanning_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), huge: u32) {
            let _ = scan(&bytes);
            let mut claimed = MAGIC.to_vec();
            claimed.extend_from_slice(&huge.to_le_bytes());
            claimed.extend_from_slice(&bytes);
            prop_assert_eq!(scan(&claimed).end, 0);
        }
    }
}
