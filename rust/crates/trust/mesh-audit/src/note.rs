//! Signed notes and checkpoints (C2SP signed-note, tlog-checkpoint and tlog-cosignature).

use data_encoding::BASE64;

use crate::keys::{KeyKind, TrailKeys, Vkey, is_key_name};
use crate::merkle::Hash;

/// Most bytes of a note: several SLH-DSA signatures and 16 cosignatures.
pub const LONGEST_NOTE: usize = 256 << 10;
/// Most signatures of a note.
pub const MOST_SIGNATURES: usize = 64;

/// The head of a trail: a name, the number of records and the Merkle root over them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Name of the trail.
    pub origin: String,
    /// Number of records.
    pub size: u64,
    /// Root over their entries.
    pub root: Hash,
}

/// A checkpoint with its signatures, none of which was verified yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// The head of the trail.
    pub checkpoint: Checkpoint,
    text: String,
    signatures: Vec<Signature>,
}

/// A signature line of a note.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Signature {
    name: String,
    id: [u8; 4],
    bytes: Vec<u8>,
}

/// A text that is not a signed checkpoint, or not signed as needed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoteError {
    /// The form of a note.
    #[error("it is not a signed note: {0}")]
    Form(&'static str),
    /// The form of a checkpoint.
    #[error("it is not a checkpoint: {0}")]
    Checkpoint(&'static str),
    /// A line of the key is missing.
    #[error("it is not signed by {0}")]
    Unsigned(String),
    /// A line of the key does not hold.
    #[error("the signature of {0} does not hold")]
    Signature(String),
}

impl Checkpoint {
    /// The text that is signed.
    pub fn text(&self) -> String {
        let root = BASE64.encode(&self.root);
        format!("{}\n{}\n{root}\n", self.origin, self.size)
    }

    fn parse(text: &str) -> Result<Self, NoteError> {
        let failed = NoteError::Checkpoint;
        let mut lines = text.split('\n');
        let origin = lines.next().filter(|origin| is_key_name(origin));
        let origin = origin.ok_or(failed("its origin is empty, too long or has spaces"))?;
        let digits = lines.next().unwrap_or_default();
        let size: u64 = digits
            .parse()
            .map_err(|_| failed("its size is not a number"))?;
        let root = lines.next().unwrap_or_default();
        let root = BASE64.decode(root.as_bytes()).ok();
        let root = root.and_then(|root| Hash::try_from(root).ok());
        let root = root.ok_or(failed("its root is not a hash in base64"))?;
        let found = Self {
            origin: origin.to_owned(),
            size,
            root,
        };
        // Extension lines are not signed by cosignatures, and trails have none.
        match found.text() == text {
            true => Ok(found),
            false => Err(failed("it has more lines, or its size leading zeroes")),
        }
    }

    /// The message under an ML-DSA-44 cosignature of the whole tree.
    fn cosigned_message(&self, cosigner: &str, seconds: u64) -> Vec<u8> {
        let mut message = b"subtree/v1\n\0".to_vec();
        let mut text = |text: &str, number: u64| {
            message.push(u8::try_from(text.len()).expect("names of keys are short"));
            message.extend_from_slice(text.as_bytes());
            message.extend_from_slice(&number.to_be_bytes());
        };
        text(cosigner, seconds);
        text(&self.origin, 0);
        message.extend_from_slice(&self.size.to_be_bytes());
        message.extend_from_slice(&self.root);
        message
    }

    /// The signature line of an ML-DSA-44 key under this name, made at this time in seconds since the Unix
    /// epoch. Under the origin's name it is the trail's own signature, under another one a cosignature.
    pub fn cosign(&self, name: &str, keys: &TrailKeys, seconds: u64) -> String {
        let seconds = seconds.min(i64::MAX as u64);
        let message = self.cosigned_message(name, seconds);
        let signature = keys.sign_ml_dsa(&message);
        let id = keys.log_vkey(name).id();
        line(name, &[&id, &seconds.to_be_bytes(), &signature])
    }

    /// The signature line of an SLH-DSA key under this name.
    pub fn sign_epoch(&self, name: &str, keys: &TrailKeys) -> String {
        let signature = keys.sign_slh_dsa(self.text().as_bytes());
        line(name, &[&keys.epoch_vkey(name).id(), &signature])
    }

    /// The note with these signature lines.
    pub fn note(&self, lines: &[String]) -> String {
        format!("{}\n{}", self.text(), lines.concat())
    }
}

fn line(name: &str, signature: &[&[u8]]) -> String {
    format!("\u{2014} {name} {}\n", BASE64.encode(&signature.concat()))
}

impl Note {
    /// Reads a note.
    ///
    /// # Errors
    /// If it is not a checkpoint with at least one signature.
    pub fn parse(note: &[u8]) -> Result<Self, NoteError> {
        let failed = NoteError::Form;
        if note.len() > LONGEST_NOTE {
            return Err(failed("it is too long"));
        }
        let note = std::str::from_utf8(note).map_err(|_| failed("it is not UTF-8"))?;
        if note.bytes().any(|byte| byte < 0x20 && byte != b'\n') {
            return Err(failed("it has control characters"));
        }
        let end = note.rfind("\n\n").ok_or(failed("it has no signatures"))?;
        let (text, lines) = (&note[..=end], &note[end + 2..]);
        let lines = lines.strip_suffix('\n');
        let lines = lines.ok_or(failed("its last line has no end"))?;
        let signatures: Vec<Signature> = lines
            .split('\n')
            .map(Signature::parse)
            .collect::<Result<_, _>>()?;
        if signatures.len() > MOST_SIGNATURES {
            return Err(failed("it has too many signatures"));
        }
        Ok(Self {
            checkpoint: Checkpoint::parse(text)?,
            text: text.to_owned(),
            signatures,
        })
    }

    /// Checks the signature of this key. Lines of other keys do not matter.
    ///
    /// # Errors
    /// If it is missing or does not hold.
    pub fn verify(&self, key: &Vkey) -> Result<Verified, NoteError> {
        let mut lines = self.lines_of(key).peekable();
        if lines.peek().is_none() {
            return Err(NoteError::Unsigned(key.name().to_owned()));
        }
        let mut verified = Verified { seconds: None };
        for line in lines {
            let failed = || NoteError::Signature(key.name().to_owned());
            let (seconds, message, signature) = match key.kind() {
                KeyKind::SlhDsa => (None, self.text.clone().into_bytes(), &line.bytes[..]),
                KeyKind::MlDsa44 => {
                    let (time, signature) = line.bytes.split_first_chunk().ok_or_else(failed)?;
                    let seconds = u64::from_be_bytes(*time);
                    let message = self.checkpoint.cosigned_message(key.name(), seconds);
                    (Some(seconds), message, signature)
                }
            };
            if seconds.is_some_and(|seconds| seconds > i64::MAX as u64)
                || !key.verifies(&message, signature)
            {
                return Err(failed());
            }
            verified.seconds = seconds;
        }
        Ok(verified)
    }

    /// True if each of its lines is of one of these keys.
    pub(crate) fn is_only_of(&self, keys: &[&Vkey]) -> bool {
        let lines: usize = keys.iter().map(|key| self.lines_of(key).count()).sum();
        lines == self.signatures.len()
    }

    fn lines_of<'a>(&'a self, key: &Vkey) -> impl Iterator<Item = &'a Signature> + use<'a> {
        let (name, id) = (key.name().to_owned(), key.id());
        let lines = self.signatures.iter();
        lines.filter(move |line| line.name == name && line.id == id)
    }
}

/// A signature that holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verified {
    /// Time of the signature in seconds since the Unix epoch, where it tells.
    pub seconds: Option<u64>,
}

impl Signature {
    fn parse(line: &str) -> Result<Self, NoteError> {
        let failed = NoteError::Form("a line is not a signature");
        let parts = line
            .strip_prefix("\u{2014} ")
            .and_then(|line| line.split_once(' '));
        let (name, signature) = parts.ok_or(failed.clone())?;
        let bytes = BASE64.decode(signature.as_bytes()).ok();
        let bytes = bytes.filter(|_| is_key_name(name));
        let bytes = bytes.ok_or(failed.clone())?;
        let (id, bytes) = bytes.split_first_chunk().ok_or(failed)?;
        Ok(Self {
            name: name.to_owned(),
            id: *id,
            bytes: bytes.to_vec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keys() -> TrailKeys {
        TrailKeys::from_seeds(&[7; 32], &[9; 48])
    }

    fn checkpoint() -> Checkpoint {
        Checkpoint {
            origin: "mesh/audit".to_owned(),
            size: 20_852_163,
            root: [5; 32],
        }
    }

    #[test]
    fn the_message_of_a_cosignature_is_laid_out_as_specified() {
        let message = checkpoint().cosigned_message("w/1", 0x0102);
        let mut wanted = b"subtree/v1\n\0\x03w/1\0\0\0\0\0\0\x01\x02\x0amesh/audit".to_vec();
        wanted.extend_from_slice(&[0; 8]);
        wanted.extend_from_slice(&20_852_163_u64.to_be_bytes());
        wanted.extend_from_slice(&[5; 32]);
        assert_eq!(message, wanted);
    }

    #[test]
    fn a_note_carries_the_signatures_of_trail_epoch_and_witness() {
        let (keys, witness) = (keys(), TrailKeys::from_seeds(&[1; 32], &[2; 48]));
        let checkpoint = checkpoint();
        let lines = [
            checkpoint.cosign("mesh/audit", &keys, 1_795_910_400),
            checkpoint.sign_epoch("mesh/audit", &keys),
            checkpoint.cosign("witness/w1", &witness, 1_795_910_401),
        ];
        let note = Note::parse(checkpoint.note(&lines).as_bytes()).unwrap();
        assert_eq!(note.checkpoint, checkpoint);
        let own = keys.log_vkey("mesh/audit");
        assert_eq!(note.verify(&own).unwrap().seconds, Some(1_795_910_400));
        assert_eq!(
            note.verify(&keys.epoch_vkey("mesh/audit")).unwrap().seconds,
            None
        );
        let witnessed = note.verify(&witness.log_vkey("witness/w1")).unwrap();
        assert_eq!(witnessed.seconds, Some(1_795_910_401));
        // The same key under another name is another signer.
        let renamed = note.verify(&witness.log_vkey("witness/w2"));
        assert_eq!(renamed, Err(NoteError::Unsigned("witness/w2".to_owned())));
        let other = Checkpoint {
            size: 7,
            ..checkpoint
        };
        let forged = Note::parse(other.note(&lines).as_bytes()).unwrap();
        assert_eq!(
            forged.verify(&own),
            Err(NoteError::Signature("mesh/audit".to_owned()))
        );
        assert!(note.is_only_of(&[
            &own,
            &keys.epoch_vkey("mesh/audit"),
            &witness.log_vkey("witness/w1")
        ]));
        assert!(!note.is_only_of(&[&own]));
    }

    #[test]
    fn other_texts_are_no_checkpoints() {
        let keys = keys();
        let note = checkpoint().note(&[checkpoint().cosign("mesh/audit", &keys, 1)]);
        assert!(Note::parse(note.as_bytes()).is_ok());
        for (from, to) in [
            ("20852163", "020852163"),
            ("20852163", "+20852163"),
            ("20852163", "many"),
            ("mesh/audit\n", "mesh audit\n"),
            ("mesh/audit\n", "\n"),
            ("=\n", "=\nextension\n"),
            ("\u{2014} ", "- "),
            ("\n\n", "\n"),
            ("BQU", "BQ"),
        ] {
            let changed = note.replacen(from, to, 1);
            assert_ne!(changed, note);
            assert!(Note::parse(changed.as_bytes()).is_err(), "{from:?} {to:?}");
        }
        assert!(Note::parse(note.trim_end().as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_reading_a_note_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = Note::parse(&bytes);
        }

        #[test]
        fn no_text_makes_reading_a_note_panic(text in "[a-z/]{0,9}\n[0-9]{0,20}\n[A-Za-z=]{0,44}\n\n(\u{2014} [a-z+]{0,4} [A-Za-z+/=]{0,20}\n){0,3}") {
            let _ = Note::parse(text.as_bytes());
        }
    }
}
