//! Files in the state directory: replaced whole, secrets readable by their owner only. Also the limit on open
//! files.

use std::io;
use std::path::Path;

use mesh_base::files;
pub use mesh_base::files::Readers;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Prepares a service's state directory at its start: creates it, removes temporary files of killed
/// processes, and warns if the mode of the directory or of the files called `secrets` is too open.
pub fn open_state_dir(dir: &Path, secrets: &[&str]) -> io::Result<()> {
    create_private_dir(dir)?;
    sweep(dir);
    if let Some(text) = files::writable_by_others(dir) {
        tracing::warn!("{text}");
    }
    for name in secrets {
        warn_if_exposed(&dir.join(name), Readers::Owner);
    }
    Ok(())
}

/// Logs a warning about a file with a secret that others can read.
pub fn warn_if_exposed(path: &Path, readers: Readers) {
    if let Some(text) = files::exposure(path, readers) {
        tracing::warn!("{text}");
    }
}

/// Removes temporary files of a process that was killed. What cannot be removed stays: it does no harm.
pub fn sweep(dir: &Path) {
    match files::remove_leftovers(dir) {
        Ok(removed) if removed.is_empty() => {}
        Ok(removed) => tracing::info!(?removed, "removed what a killed process left"),
        Err(error) => tracing::debug!(dir = %dir.display(), %error, "leftovers not removed"),
    }
}

/// Creates `dir` and its parents; a new `dir` is accessible to its owner only.
pub fn create_private_dir(dir: &Path) -> io::Result<()> {
    files::create_private_dir(dir).map_err(|error| named(error, "create directory", dir))
}

/// Raises the number of files that this process may have open as far as it may, and returns it.
pub fn raise_open_files() -> usize {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return USUAL_FILES;
    };
    let raised = soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok();
    usize::try_from(if raised { hard } else { soft }).unwrap_or(usize::MAX)
}

/// Replaces `path` with a file that only its owner can read (mode 0600). After a crash the file is the old or the new
/// one, never a part.
pub fn write_private(path: &Path, contents: &[u8]) -> io::Result<()> {
    write(path, contents, files::PRIVATE)
}

/// Replaces `path` with a file that everyone can read (mode 0644), as atomically as [`write_private`].
pub fn write_public(path: &Path, contents: &[u8]) -> io::Result<()> {
    write(path, contents, files::PUBLIC)
}

fn write(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    files::replace(path, contents, mode).map_err(|error| named(error, "write", path))
}

fn named(error: io::Error, action: &str, path: &Path) -> io::Error {
    io::Error::new(
        error.kind(),
        format!("cannot {action} {}: {error}", path.display()),
    )
}

/// Limit on open files to assume if the system reports none.
const USUAL_FILES: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_path() {
        let error =
            write_private(Path::new("/nonexistent/dir/file"), b"").expect_err("no such directory");
        assert!(
            error.to_string().contains("/nonexistent/dir/file"),
            "{error}"
        );
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
