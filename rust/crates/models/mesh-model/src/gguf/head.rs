//! The beginning of a file: its keys and its tensor list, read no further than they reach.

use super::error::GgufError;
use super::parse::GgufIndex;
use super::tensors::TensorEntry;
use super::value::Value;
use crate::file::ModelFile;

/// The keys and the tensor list of a file.
#[derive(Debug)]
pub(super) struct Head {
    /// The file's bytes before its tensors.
    pub(super) bytes: Vec<u8>,
    pub(super) index: GgufIndex,
    pub(super) entries: Vec<TensorEntry>,
}

impl Head {
    /// Reads as much of a file as its keys and its tensor list take.
    pub(super) fn read(file: &ModelFile) -> Result<Self, GgufError> {
        let mut bytes = Vec::new();
        let mut wanted = FIRST_READ;
        loop {
            let len = wanted.min(MAX_HEAD).min(file.len());
            file.lengthen(&mut bytes, len as usize)?;
            match GgufIndex::parse(&bytes, file.len()) {
                Ok((index, entries)) => {
                    let ends = entries.iter().map(|tensor| (tensor.at + tensor.len) as u64);
                    let end = ends.max().unwrap_or(index.data_start);
                    if file.len() > end.saturating_add(MAX_SURPLUS) {
                        return Err(GgufError::Surplus {
                            bytes: file.len(),
                            end,
                        });
                    }
                    bytes.truncate(index.data_start as usize);
                    bytes.shrink_to_fit();
                    return Ok(Head {
                        bytes,
                        index,
                        entries,
                    });
                }
                Err(GgufError::Truncated {
                    what,
                    at,
                    needed,
                    length,
                }) if length < file.len() => {
                    let end = at.saturating_add(needed);
                    if len == MAX_HEAD {
                        return Err(GgufError::Limit {
                            what: format!("the end of {what} in bytes"),
                            value: end,
                            limit: MAX_HEAD,
                        });
                    }
                    wanted = end.max(2 * len);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The value of a metadata key.
    pub(super) fn metadata(&self, key: &str) -> Option<Value<'_>> {
        self.index.value(&self.bytes, key)
    }
}

/// Size of a first read that holds the keys of most files.
const FIRST_READ: u64 = 1 << 20;
/// The largest known vocabularies take some 20 MB. It bounds the memory that a file's own counts can claim.
const MAX_HEAD: u64 = 256 << 20;
/// Padding is a few bytes. More is a file that was lengthened, which would take forever to read if it is a
/// hole.
const MAX_SURPLUS: u64 = 64 << 20;
