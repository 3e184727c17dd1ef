//! Putting the parts of a split file together: they are one model only if their keys agree with their order
//! and with each other.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::error::{GgufError, SplitError};
use super::head::Head;
use super::parse::{GgufIndex, MAX_TENSORS};
use super::tensors::TensorEntry;
use super::value::Value;
use crate::file::ModelFile;

/// Number of the part, from 0.
const NUMBER: &str = "split.no";
/// Number of parts. It is 0 in a file that was merged from parts.
const COUNT: &str = "split.count";
/// Number of tensors in all parts.
const TENSORS: &str = "split.tensors.count";
const ARCHITECTURE: &str = "general.architecture";

/// The keys of the first part, and the tensors of all.
pub(super) struct Assembled {
    pub(super) head: Vec<u8>,
    pub(super) index: GgufIndex,
    pub(super) files: Vec<ModelFile>,
    pub(super) entries: Vec<TensorEntry>,
}

/// Checks that a file whose name is that of no part is none.
pub(super) fn check_alone<'a>(
    path: &Path,
    metadata: impl Fn(&str) -> Option<Value<'a>>,
) -> Result<(), SplitError> {
    let number = |key| metadata(key).and_then(|value| value.as_unsigned());
    match number(COUNT) {
        Some(count @ 2..) => Err(SplitError::Name {
            path: path.into(),
            number: number(NUMBER).map_or(1, |number| number.saturating_add(1)),
            count,
        }),
        _ => Ok(()),
    }
}

/// Reads all parts, in order, each with its path.
pub(super) fn assemble(
    parts: impl ExactSizeIterator<Item = Result<(PathBuf, ModelFile), GgufError>>,
) -> Result<Assembled, GgufError> {
    let count = parts.len();
    let mut paths: Vec<PathBuf> = Vec::new();
    let mut files = Vec::new();
    let mut entries: Vec<TensorEntry> = Vec::new();
    let mut first: Option<(Head, u64)> = None;
    for (index, part) in parts.enumerate() {
        let (path, file) = part?;
        let within = |source| GgufError::Part {
            path: path.clone(),
            source: Box::new(source),
        };
        let mut head = Head::read(&file).map_err(within)?;
        check_place(&path, &head, index, count)?;
        let wanted = match &first {
            None => tensor_count(&head).map_err(within)?,
            Some((first, wanted)) => {
                check_same(&path, &head, first, *wanted)?;
                *wanted
            }
        };
        for entry in &mut head.entries {
            entry.file = index;
        }
        entries.append(&mut head.entries);
        files.push(file);
        paths.push(path);
        if entries.len() as u64 > MAX_TENSORS {
            return Err(GgufError::Limit {
                what: "the number of tensors in all parts".into(),
                value: entries.len() as u64,
                limit: MAX_TENSORS,
            });
        }
        first.get_or_insert((head, wanted));
    }
    let Some((head, wanted)) = first else {
        return Err(GgufError::NotGguf { found: Vec::new() });
    };
    check_names(&paths, &entries)?;
    if entries.len() as u64 != wanted {
        let found = entries.len() as u64;
        let path = paths.swap_remove(0);
        return Err(SplitError::Tensors {
            path,
            count,
            found,
            wanted,
        }
        .into());
    }
    Ok(Assembled {
        head: head.bytes,
        index: head.index,
        files,
        entries,
    })
}

/// Checks that a part says of itself that it is the one at `index` of `count`.
fn check_place(path: &Path, head: &Head, index: usize, count: usize) -> Result<(), SplitError> {
    let foreign = |reason: String| SplitError::Foreign {
        path: path.into(),
        reason,
    };
    let number = |key: &str| head.metadata(key).map(|value| (value.as_unsigned(), value));
    let wanted = index as u32 + 1;
    match number(COUNT) {
        None => {
            return Err(foreign(format!(
                "it has no {COUNT}, although its name says part {wanted} of {count}; rename it if it is a whole model"
            )));
        }
        Some((Some(0), _)) => {
            return Err(foreign(format!(
                "its {COUNT} is 0, as in a whole model that was merged from parts; give it a name without the numbers of a part"
            )));
        }
        Some((Some(found), _)) if found == count as u64 => {}
        Some((_, value)) => {
            return Err(foreign(format!(
                "its {COUNT} is {}, but its name says {count}; fetch all parts from one place",
                shown(&value)
            )));
        }
    }
    match number(NUMBER) {
        Some((Some(found), _)) if found == index as u64 => Ok(()),
        Some((Some(found), _)) if found < count as u64 => Err(SplitError::Duplicate {
            path: path.into(),
            found: found + 1,
            wanted,
        }),
        found => Err(foreign(format!(
            "its {NUMBER} is {}, but must be {index}, one less than the number in its name; fetch it again",
            found.map_or_else(|| "missing".to_owned(), |(_, value)| shown(&value))
        ))),
    }
}

/// The number itself; the type of any other value.
fn shown(value: &Value<'_>) -> String {
    match value.as_unsigned() {
        Some(number) => number.to_string(),
        None => value.describe(),
    }
}

/// The first part's number of tensors in all parts.
fn tensor_count(head: &Head) -> Result<u64, GgufError> {
    let value = head
        .metadata(TENSORS)
        .ok_or_else(|| GgufError::MissingKey {
            key: TENSORS.into(),
        })?;
    let count = value.as_unsigned().ok_or_else(|| GgufError::WrongType {
        key: TENSORS.into(),
        wanted: "a non-negative integer",
        found: value.describe(),
    })?;
    match count > MAX_TENSORS {
        true => Err(GgufError::Limit {
            what: TENSORS.into(),
            value: count,
            limit: MAX_TENSORS,
        }),
        false => Ok(count),
    }
}

/// Checks that what a later part repeats of the first one's keys is the same.
fn check_same(path: &Path, head: &Head, first: &Head, tensors: u64) -> Result<(), SplitError> {
    let foreign = |key: &str, found: String, wanted: String| {
        Err(SplitError::Foreign {
            path: path.into(),
            reason: format!(
                "its {key} is {found}, and the first part's {wanted}; fetch all parts from one place"
            ),
        })
    };
    if let Some(found) = head.metadata(TENSORS)
        && found.as_unsigned() != Some(tensors)
    {
        return foreign(TENSORS, shown(&found), tensors.to_string());
    }
    let architecture = |head: &Head| match head.metadata(ARCHITECTURE) {
        Some(Value::String(name)) => Some(String::from_utf8_lossy(name).into_owned()),
        _ => None,
    };
    if let (Some(found), Some(wanted)) = (architecture(head), architecture(first))
        && found != wanted
    {
        return foreign(ARCHITECTURE, format!("{found:?}"), format!("{wanted:?}"));
    }
    Ok(())
}

/// Checks that no tensor is in two parts.
fn check_names(paths: &[PathBuf], entries: &[TensorEntry]) -> Result<(), SplitError> {
    let mut places: HashMap<&str, usize> = HashMap::with_capacity(entries.len());
    for entry in entries {
        match places.insert(&entry.name, entry.file) {
            // Twice in one file is that file's own error.
            Some(first) if first != entry.file => {
                return Err(SplitError::Tensor {
                    tensor: entry.name.to_string(),
                    first: paths[first].clone(),
                    second: paths[entry.file].clone(),
                });
            }
            _ => {}
        }
    }
    Ok(())
}
