//! Records: what the trail says, and their form as entries of a log.
//!
//! An entry is text: a JSON object on one line, then the code of the chain as 64 hexadecimal digits on a
//! second line without an end. So any reader of C2SP tiles shows what happened.

use std::fmt;

use data_encoding::HEXLOWER;
use serde::{Deserialize, Deserializer, Serialize};

use crate::chain::Mac;

/// Most bytes of an entry. The format of bundles allows 65,535.
pub const LONGEST_ENTRY: usize = 16_384;

/// Text of a record: at most 200 characters, none of them a control character. Longer text is cut.
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash, Serialize)]
pub struct Text(String);

impl<T: AsRef<str>> From<T> for Text {
    fn from(text: T) -> Self {
        let shown = text.as_ref().chars().filter(|c| !c.is_control());
        Self(shown.take(LONGEST_TEXT).collect())
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::from)
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Something that the trail records. Optional fields are left out of the text when they are not known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// A service began to write the trail.
    Start {
        /// Name of the mesh.
        mesh: Text,
        /// Version of the program.
        version: Text,
    },
    /// The service stopped in order.
    Stop,
    /// A node joined the mesh with a token, or a member connected.
    Join {
        /// Id of the node.
        node: Text,
        /// Its name.
        name: Text,
        /// Its address.
        from: Text,
        /// `joined`, `renewed` or `connected`; `without identity` for workers of DCF v5.
        how: Text,
        /// Id of the token.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        token: Option<Text>,
    },
    /// A node was lost or left.
    Leave {
        /// Id of the node.
        node: Text,
        /// Its name.
        name: Text,
        /// The reason.
        reason: Text,
    },
    /// A node was not admitted.
    Refuse {
        /// Id of the node, as far as known.
        node: Text,
        /// Its name.
        name: Text,
        /// Its address.
        from: Text,
        /// The reason.
        reason: Text,
    },
    /// A node was expelled, or readmitted.
    Revoke {
        /// Id of the node.
        node: Text,
        /// Its name.
        name: Text,
        /// `approved`, `expelled` or `readmitted`; `replaced` where the node has rotated its identity.
        decision: Text,
        /// The operator's reason.
        reason: Text,
    },
    /// Evidence of a node was judged.
    Evidence {
        /// Id of the node.
        node: Text,
        /// Its name.
        name: Text,
        /// `first`, `changed`, `held`, `refused` or `expelled`.
        decision: Text,
        /// The changes, or the reason.
        texts: Vec<Text>,
    },
    /// A token was created, used or withdrawn.
    Token {
        /// Id of the token, or of a refused API key; never its secret. Empty for a refused one that is not
        /// known.
        token: Text,
        /// `created`, `used`, `withdrawn`, `revoked` or `refused`.
        decision: Text,
        /// The operator's note, or the door, the reason and the source of a refusal.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        note: Option<Text>,
    },
    /// A node reported an attack.
    Sighting {
        /// Id of the node that reports it.
        reporter: Text,
        /// Kind of the attack.
        attack: Text,
        /// The node or address that it is about.
        subject: Text,
        /// Its description.
        detail: Text,
    },
    /// The mesh root was rotated.
    Root {
        /// Digest of the new root's certificate.
        root: Text,
        /// `rotated`, or `alone` when the former one is not accepted any more.
        decision: Text,
    },
    /// A worker loaded models or withdrew them, or an operator decided what a name means.
    Model {
        /// Id of the node; empty for an operator's decision.
        node: Text,
        /// Its name.
        name: Text,
        /// `serves` or `pinned`, `unpinned`.
        decision: Text,
        /// Names of the models.
        models: Vec<Text>,
    },
    /// Members of a ring were replaced because some were lost, or a request goes on with another worker.
    Failover {
        /// Name of the model.
        model: Text,
        /// Number of changes.
        times: u64,
    },
    /// A node was drained, or taken back.
    Drain {
        /// Id of the node.
        node: Text,
        /// Its name.
        name: Text,
        /// `drained` or `undrained`.
        decision: Text,
    },
    /// A request ended. Its text is in no record.
    Request {
        /// Id of the request in the logs of all services.
        request: Text,
        /// `http` or `dcf`.
        front: Text,
        /// `generate`, `embed` or `image`.
        task: Text,
        /// Name of the model; empty if none was found.
        model: Text,
        /// Digest of the key or token that it came with.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        key: Option<Text>,
        /// The client's address, where there is no key.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<Text>,
        /// How it ended.
        outcome: Text,
        /// Time from its arrival to its end, in milliseconds.
        milliseconds: u64,
    },
    /// The envelope of an accepted message, or of several that differ in nothing but time and length.
    Message {
        /// `http`, `dcf`, `bus` or `link`.
        carrier: Text,
        /// Type of the messages.
        message: Text,
        /// Id of the node, or address of the client.
        from: Text,
        /// Number of messages.
        count: u64,
        /// Payload bytes of all of them.
        bytes: u64,
        /// Time of the first one, in milliseconds since the Unix epoch.
        since: u64,
    },
    /// Records were lost because the queue was full.
    Lost {
        /// Number of records.
        count: u64,
    },
    /// An epoch ended here; the next record is of the next one.
    EpochEnd {
        /// Records of all epochs so far, with this one.
        size: u64,
        /// True if the next epoch's key does not follow from this one's.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        fresh_key: bool,
    },
    /// The trail was opened after a crash.
    Recovered {
        /// Records that were found behind the last signed group and kept.
        unsigned: u64,
        /// Bytes of an incomplete record that were cut off.
        cut_bytes: u64,
    },
    /// An earlier trail of this node is damaged and was set aside.
    SetAside {
        /// Origin of that trail.
        origin: Text,
        /// The damage.
        reason: Text,
    },
    /// Entries before this one may be missing: they were deleted to keep within the limit.
    Prune {
        /// The first entry that is kept.
        first: u64,
    },
    /// The head of another trail, after a partition. The other trail has such a record of this one.
    Merge {
        /// Origin of the other trail.
        origin: Text,
        /// Its size.
        size: u64,
        /// Its root, in base64.
        root: Text,
    },
}

/// A record with its place, as it is written.
#[derive(Debug, Serialize)]
struct Written<'a> {
    n: u64,
    at: u64,
    epoch: u64,
    #[serde(flatten)]
    event: &'a Event,
}

/// A record as it is read. Kinds of later versions have no event.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Record {
    /// Number of the record in its trail, from 0.
    pub n: u64,
    /// Time of the record by the node's clock, in milliseconds since the Unix epoch.
    pub at: u64,
    /// Epoch of the record.
    pub epoch: u64,
    /// Kind of the event.
    pub kind: String,
}

/// An entry that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EntryError {
    /// It is too long, or has no code.
    #[error("it is not a record and its code: {0} bytes")]
    Form(usize),
    /// Its first line is not a record.
    #[error("its text is not a record: {0}")]
    Json(String),
}

/// Text of a record, without its code.
pub fn text(n: u64, at: u64, epoch: u64, event: &Event) -> Vec<u8> {
    let written = Written {
        n,
        at,
        epoch,
        event,
    };
    serde_json::to_vec(&written).expect("records have nothing that JSON lacks")
}

/// Appends the code to the text of a record.
pub fn entry(mut text: Vec<u8>, mac: &Mac) -> Vec<u8> {
    text.reserve_exact(MAC_BYTES);
    text.push(b'\n');
    text.extend_from_slice(HEXLOWER.encode(mac).as_bytes());
    text
}

/// Text and code of an entry.
///
/// # Errors
/// If it has another form.
pub fn split(entry: &[u8]) -> Result<(&[u8], Mac), EntryError> {
    let wrong = || EntryError::Form(entry.len());
    if entry.len() > LONGEST_ENTRY {
        return Err(wrong());
    }
    let at = entry.len().checked_sub(MAC_BYTES).ok_or_else(wrong)?;
    let (text, mac) = entry.split_at(at);
    let mac = HEXLOWER.decode(&mac[1..]).map_err(|_| wrong())?;
    if entry[at] != b'\n' {
        return Err(wrong());
    }
    Ok((text, mac.try_into().map_err(|_| wrong())?))
}

impl Record {
    /// Reads the text of a record.
    ///
    /// # Errors
    /// If it is not one.
    pub fn read(text: &[u8]) -> Result<Self, EntryError> {
        serde_json::from_slice(text).map_err(|error| EntryError::Json(error.to_string()))
    }
}

/// Reads the event of a record; `None` if it is of a kind that this version does not know.
pub fn event(text: &[u8]) -> Option<Event> {
    serde_json::from_slice(text).ok()
}

const LONGEST_TEXT: usize = 200;
/// A line end and the code.
const MAC_BYTES: usize = 65;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_entry_is_two_lines_of_text() {
        let event = Event::Token {
            token: "a1".into(),
            decision: "created".into(),
            note: None,
        };
        let entry = entry(text(3, 1_795_910_400_123, 1, &event), &[0xAB; 32]);
        let shown = String::from_utf8(entry.clone()).unwrap();
        let wanted = format!(
            r#"{{"n":3,"at":1795910400123,"epoch":1,"kind":"token","token":"a1","decision":"created"}}{}{}"#,
            '\n',
            "ab".repeat(32)
        );
        assert_eq!(shown, wanted);
        let (text, mac) = split(&entry).unwrap();
        assert_eq!(mac, [0xAB; 32]);
        let record = Record::read(text).unwrap();
        assert_eq!(
            (record.n, record.at, record.epoch),
            (3, 1_795_910_400_123, 1)
        );
        assert_eq!(record.kind, "token");
        assert_eq!(super::event(text), Some(event));
        let later = br#"{"n":0,"at":1,"epoch":0,"kind":"telepathy","with":"pi"}"#;
        assert_eq!(Record::read(later).unwrap().kind, "telepathy");
        assert_eq!(super::event(later), None);
    }

    #[test]
    fn the_longest_record_fits_an_entry() {
        let text = Text::from("\u{10FFFF}\"\\\n".repeat(500));
        assert_eq!(text.0.chars().count(), LONGEST_TEXT);
        let event = Event::Request {
            request: text.clone(),
            front: text.clone(),
            task: text.clone(),
            model: text.clone(),
            key: Some(text.clone()),
            from: Some(text.clone()),
            outcome: text,
            milliseconds: u64::MAX,
        };
        let length = super::text(u64::MAX, u64::MAX, u64::MAX, &event).len();
        assert!(length + MAC_BYTES < LONGEST_ENTRY, "{length}");
    }

    proptest! {
        #[test]
        fn no_bytes_make_reading_an_entry_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok((text, _)) = split(&bytes) {
                let _ = Record::read(text);
            }
        }

        #[test]
        fn texts_survive_and_control_nothing(text in ".{0,300}", n: u64, at: u64) {
            let event = Event::Leave { node: "a".into(), name: Text::from(&text), reason: Text::from(&text) };
            let entry = entry(super::text(n, at, 0, &event), &[1; 32]);
            let (text, _) = split(&entry).unwrap();
            prop_assert!(text.iter().all(|byte| *byte >= 0x20));
            prop_assert_eq!(super::event(text), Some(event));
        }
    }
}
