//! Workers that an operator drained. They stay drained when the head starts again.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

#[derive(Debug, Default, Serialize, Deserialize)]
struct Saved {
    /// Names by node ids; the names are for people who read the file.
    drained: BTreeMap<String, String>,
}

/// Reads the names of the drained workers by their node ids. If the file cannot be read, no worker is
/// drained, and the log says so.
pub(crate) fn load(state_dir: &Path) -> BTreeMap<String, String> {
    let path = state_dir.join(FILE);
    let saved = std::fs::read(&path).and_then(|text| Ok(serde_json::from_slice(&text)?));
    let saved: Saved = saved.unwrap_or_else(|error: io::Error| {
        if error.kind() != io::ErrorKind::NotFound {
            tracing::error!(
                path = %path.display(),
                %error,
                "which workers were drained cannot be read: none of them is; drain them again"
            );
        }
        Saved::default()
    });
    saved.drained
}

/// Keeps them, names by node ids, instead of those that were kept before.
///
/// # Errors
/// If the file cannot be written; the one before is still there then.
pub(crate) fn save(state_dir: &Path, drained: BTreeMap<String, String>) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(&Saved { drained })?;
    mesh_service::files::write_private(&state_dir.join(FILE), &text)
}

/// In the state directory.
const FILE: &str = "drained.json";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_kept_and_a_broken_file_drains_nobody() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(load(dir.path()).is_empty());
        let attic = BTreeMap::from([("2f".to_owned(), "attic".to_owned())]);
        save(dir.path(), attic.clone()).expect("saved");
        assert_eq!(load(dir.path()), attic);
        save(dir.path(), BTreeMap::new()).expect("saved");
        assert!(load(dir.path()).is_empty());
        for broken in ["", "{\"drained\": [1]}", "\u{0}"] {
            std::fs::write(dir.path().join(FILE), broken).expect("written");
            assert!(load(dir.path()).is_empty());
        }
    }
}
