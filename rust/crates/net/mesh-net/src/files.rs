//! Files of the state directory: replaced whole, secrets for their owner only.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use mesh_base::files;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::trust::TrustError;

pub(crate) use files::{PRIVATE, PUBLIC};

pub(crate) fn create_private_dir(dir: &Path) -> Result<(), TrustError> {
    files::create_private_dir(dir).map_err(|source| TrustError::io("create", dir, source))
}

/// After a crash the file is the old or the new one, never a part; when this returns, the new one is on disk.
pub(crate) fn replace(
    path: &Path,
    contents: impl AsRef<[u8]>,
    mode: u32,
) -> Result<(), TrustError> {
    files::replace(path, contents.as_ref(), mode)
        .map_err(|source| TrustError::io("write", path, source))
}

/// Reads a text file; `None` if it does not exist.
pub(crate) fn read(path: &Path) -> Result<Option<String>, TrustError> {
    let failed = |source| TrustError::io("read", path, source);
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(failed(source)),
    };
    let mut bytes = Vec::new();
    file.take(MOST_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > MOST_BYTES {
        let reason = format!("it has more than {MOST_BYTES} bytes");
        return Err(TrustError::damaged(path, reason));
    }
    String::from_utf8(bytes)
        .map(Some)
        .map_err(|_| TrustError::damaged(path, "it is not text"))
}

/// Reads what [`write_json`] wrote; `None` if the file does not exist.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, TrustError> {
    let text = read(path)?;
    let value = text.map(|text| serde_json::from_str(&text));
    value
        .transpose()
        .map_err(|error| TrustError::damaged(path, error))
}

/// As [`replace`], readable by the owner only.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), TrustError> {
    let text =
        serde_json::to_vec_pretty(value).map_err(|error| TrustError::damaged(path, error))?;
    replace(path, text, PRIVATE)
}

/// No file of ours is larger.
const MOST_BYTES: u64 = 64 << 20;
