//! Fetching some layers of a model: the headers first, then the ranges of the tensors that are needed.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use mesh_model::{Gguf, GgufError};
use mesh_store::{Layout, LayoutError, PartialFile, RangeSet, Selection, layout};

use crate::blocking::blocking;
use crate::client::Hub;
use crate::error::HubError;
use crate::listing::{Repo, RepoFile};
use crate::watch::Watch;

/// Bytes to read of a GGUF file at first. A header holds the vocabulary and usually has 1 to 8 MB. The length
/// grows by a quarter of itself plus this, so that little is fetched in vain.
const FIRST: u64 = 256 << 10;
/// Longest header that is fetched.
const MAX_HEADER: u64 = 128 << 20;

/// The ranges that a stage of `layers` needs of files with these layouts, which together are a model: one set
/// for each file, and the model's number of layers.
///
/// # Errors
/// A message, if the model has fewer layers or none.
pub fn wanted_ranges(
    layouts: &[Layout],
    layers: Range<u32>,
) -> Result<(Vec<RangeSet>, u32), String> {
    let tensors = || layouts.iter().flat_map(|layout| &layout.tensors);
    let names = || tensors().map(|tensor| tensor.name.as_str());
    let highest = names().filter_map(layout::layer).max();
    let Some(total) = highest.and_then(|highest| highest.checked_add(1)) else {
        return Err("it has no layers that could be told apart".to_owned());
    };
    check_layers(&layers, total)?;
    let selection = Selection::new(layers, total, names());
    let layouts = layouts.iter();
    let ranges = layouts.map(|layout| layout.ranges_for(&selection));
    Ok((ranges.collect(), total))
}

/// Checks that a model of `total` layers has `layers`; the error is a message.
pub(crate) fn check_layers(layers: &Range<u32>, total: u32) -> Result<(), String> {
    if layers.is_empty() || layers.end > total {
        return Err(format!(
            "it has {total} layers, 0..{total}; {}..{} are not among them (the end is the first that is not wanted)",
            layers.start, layers.end
        ));
    }
    Ok(())
}

/// Fetches the header of `file` into `partial`, and returns the positions of its tensors.
pub(crate) async fn header(
    hub: &Hub,
    repo: &Repo,
    file: &RepoFile,
    partial: &Arc<PartialFile>,
    watch: &Arc<dyn Watch>,
) -> Result<Layout, HubError> {
    let bytes = partial.bytes();
    let broken = |reason| HubError::header(&repo.id, &file.path, reason);
    let mut length = FIRST.min(bytes);
    loop {
        let missing = partial.have().missing(0..length);
        let fetched = hub.fetch(repo, file, missing, partial.clone(), watch.clone());
        fetched.await?;
        let (partial, path) = (partial.clone(), file.path.clone());
        match blocking(move || read(&partial, &path, length)).await? {
            HeaderRead::Whole(layout) => return Ok(layout),
            HeaderRead::Longer(longer) if longer > bytes => {
                return Err(broken(format!(
                    "its header tells of more than the file's {bytes} bytes: it is cut short"
                )));
            }
            HeaderRead::Longer(longer) if longer > MAX_HEADER => {
                return Err(broken(format!(
                    "its header has more than {MAX_HEADER} bytes: this is no model"
                )));
            }
            HeaderRead::Longer(longer) => length = longer,
            HeaderRead::Broken(reason) => return Err(broken(reason)),
        }
    }
}

/// Outcome of reading a header from the beginning of a file.
enum HeaderRead {
    Whole(Layout),
    /// So many bytes are needed, or at least more than there are.
    Longer(u64),
    Broken(String),
}

fn read(partial: &PartialFile, path: &str, length: u64) -> Result<HeaderRead, HubError> {
    let prefix = partial.read_at(0..length)?.unwrap_or_default();
    if !prefix.starts_with(b"GGUF") {
        // Eight bytes tell how long a safetensors header is.
        let Some(told) = prefix.first_chunk::<8>() else {
            return Ok(HeaderRead::Broken(format!("it has only {length} bytes")));
        };
        let end = u64::from_le_bytes(*told).saturating_add(8);
        return match end > length {
            true => Ok(HeaderRead::Longer(end)),
            false => whole(partial, path),
        };
    }
    // Cut short where the header goes on, or, being a whole header, where the tensors begin.
    match Gguf::from_bytes(prefix) {
        Ok(_) => whole(partial, path),
        Err(GgufError::Truncated { .. }) if length < partial.bytes() => {
            // Missing ranges of the file are holes, which read as zeros: a header that goes on in a hole is
            // malformed, or ends behind the fetched bytes.
            match whole(partial, path)? {
                HeaderRead::Whole(layout) if layout.header <= length => {
                    Ok(HeaderRead::Whole(layout))
                }
                _ => Ok(HeaderRead::Longer(
                    (length + length / 4 + FIRST).min(partial.bytes()),
                )),
            }
        }
        Err(error) => Ok(HeaderRead::Broken(error.to_string())),
    }
}

fn whole(partial: &PartialFile, path: &str) -> Result<HeaderRead, HubError> {
    Ok(match layout_of(&partial.path(), path)? {
        Ok(layout) => HeaderRead::Whole(layout),
        Err(reason) => HeaderRead::Broken(reason),
    })
}

/// Layout of the file at `file`, called `path` in its repository; the inner error describes an invalid file.
pub(crate) fn layout_of(file: &Path, path: &str) -> Result<Result<Layout, String>, HubError> {
    // The ending determines the format, but files of the store have none.
    let write = |source| HubError::Write {
        what: "a temporary link".to_owned(),
        source,
    };
    let dir = tempfile::tempdir().map_err(write)?;
    let name = Path::new(path).file_name().unwrap_or(path.as_ref());
    let link = dir.path().join(name);
    let target = std::path::absolute(file).map_err(write)?;
    std::os::unix::fs::symlink(target, &link).map_err(write)?;
    // The link's path would not help the reader.
    Ok(Layout::read(&link).map_err(|error| match error {
        LayoutError::Gguf { source, .. } => source.to_string(),
        LayoutError::Safetensors { source, .. } => source.to_string(),
        other => other.to_string(),
    }))
}
