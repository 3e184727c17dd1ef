//! Files that are whole or absent, whatever happens, and that are this store's own, whatever others put beside them.
//!
//! A store may lie where others can write. What is there under a name of the store's is not the store's for that: a link would lead
//! its writes elsewhere, and another user's file is what that user says.

use std::fs::{DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use mesh_model::file::open_regular;
use nix::fcntl::OFlag;
use nix::unistd::geteuid;

/// Replaces the file at `path` by one with these bytes; `tmp` is a folder on the same file system. After a crash or a power
/// loss it is the old or the new one. When this returns, the new one is on disk.
pub(crate) fn replace(path: &Path, tmp: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(tmp)?;
    // As long as it is locked it is no leftover.
    file.as_file().lock()?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    sync_parent(path)
}

/// Opens a file of the store's own to write to it, and creates it where it is not there. `owner` is whose files count besides
/// this user's and the system's.
pub(crate) fn open_own(path: &Path, owner: u32) -> io::Result<File> {
    // A link is not followed, and a named pipe is not waited for.
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(flags.bits())
        .open(path);
    let file = opened.map_err(|error| match error.raw_os_error() {
        Some(code) if code == nix::errno::Errno::ELOOP as i32 => planted("a link lies there"),
        _ => error,
    })?;
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(planted("something else than a file lies there"));
    }
    if !is_trusted(&found, owner) {
        return Err(planted("a file of another user lies there"));
    }
    Ok(file)
}

/// As [`open_own`], for a file that is written to: it may have no other name, by which it would be somebody else's.
pub(crate) fn open_to_write(path: &Path, owner: u32) -> io::Result<File> {
    let file = open_own(path, owner)?;
    match file.metadata()?.nlink() {
        0 | 1 => Ok(file),
        _ => Err(planted(
            "a file lies there that has another name elsewhere, too",
        )),
    }
}

fn planted(what: &str) -> io::Error {
    io::Error::other(format!(
        "{what}, which is none of the store's: remove it, and see who can write to the store's folder"
    ))
}

/// Whether what lies at `path` itself, and not behind a link, is put there by somebody whose files count.
pub(crate) fn is_own(path: &Path, owner: u32) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|found| is_trusted(&found, owner))
}

fn is_trusted(found: &Metadata, owner: u32) -> bool {
    [0, owner, geteuid().as_raw()].contains(&found.uid())
}

/// Creates a folder for its owner alone, and its parents.
pub(crate) fn create_private(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Creates the folders of `relative` within `root`. None of them may be a link, or another user's: such a link is removed.
pub(crate) fn create_within(root: &Path, relative: &Path, owner: u32) -> io::Result<PathBuf> {
    let mut folder = root.to_owned();
    for part in relative.components() {
        let Component::Normal(part) = part else {
            return Err(io::Error::other("its path leads out of its folder"));
        };
        folder.push(part);
        match std::fs::symlink_metadata(&folder) {
            Ok(found) if found.is_dir() && is_trusted(&found, owner) => continue,
            Ok(found) if found.is_dir() => {
                return Err(planted("a folder of another user lies there"));
            }
            Ok(_) => std::fs::remove_file(&folder)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        DirBuilder::new().mode(0o700).create(&folder)?;
    }
    Ok(folder)
}

/// A rename, a new file or a removal is on disk once its folder is.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

/// The file at `path`, if it exists and has at most `limit` bytes.
pub(crate) fn read_limited(path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
    // Not a pipe that somebody put there, which would be waited for.
    match open_regular(path) {
        Ok(file) => read_all(file, limit).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// All bytes of `file`, if it has at most `limit`.
pub(crate) fn read_all(file: File, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::other(format!("it has more than {limit} bytes")));
    }
    Ok(bytes)
}

/// Removes a file that may be absent.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_planted_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("victim"), "precious").unwrap();
        let me = geteuid().as_raw();
        std::os::unix::fs::symlink(path("victim"), path("link")).unwrap();
        std::os::unix::fs::symlink(path("nowhere"), path("dangling")).unwrap();
        nix::unistd::mkfifo(&path("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::fs::create_dir(path("folder")).unwrap();
        std::fs::hard_link(path("victim"), path("other-name")).unwrap();
        for (name, why) in [
            ("link", "a link lies there"),
            ("dangling", "a link lies there"),
            ("pipe", "something else"),
            ("folder", ""),
            ("other-name", "another name"),
        ] {
            let error = open_to_write(&path(name), me).unwrap_err().to_string();
            assert!(error.contains(why), "{name}: {error}");
        }
        assert!(!path("nowhere").exists());
        assert!(open_to_write(&path("new"), me).is_ok());
        assert!(open_to_write(&path("new"), me).is_ok(), "again");
        assert_eq!(std::fs::read(path("victim")).unwrap(), b"precious");
        // A pipe is not waited for.
        assert!(read_limited(&path("pipe"), 10).is_err());
    }

    #[test]
    fn folders_are_made_where_they_belong() {
        let dir = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let me = geteuid().as_raw();
        std::os::unix::fs::symlink(elsewhere.path(), dir.path().join("a")).unwrap();
        let made = create_within(dir.path(), Path::new("a/b"), me).unwrap();
        assert_eq!(made, dir.path().join("a/b"));
        assert!(
            std::fs::symlink_metadata(dir.path().join("a"))
                .unwrap()
                .is_dir()
        );
        assert!(!elsewhere.path().join("b").exists());
        for bad in ["..", "/etc", "a/../../b"] {
            assert!(
                create_within(dir.path(), Path::new(bad), me).is_err(),
                "{bad}"
            );
        }
    }
}
