//! Files that are whole or absent after a crash, and that belong to this store even if others can write to
//! its folder.
//!
//! Others may be able to write to the store's folder. A file under one of the store's names is therefore not
//! trusted by its name: a link would redirect the store's writes, and another user's file has contents of
//! that user's choice.

use std::fs::{DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use mesh_base::files;
pub(crate) use mesh_base::files::{create_private_dir, sync_parent};
pub(crate) use mesh_model::file::{read_all, read_limited};
use nix::fcntl::OFlag;
use nix::unistd::geteuid;
use serde::de::DeserializeOwned;

/// Replaces the file at `path` by one with these bytes; `tmp` is a folder on the same file system. After a
/// crash or a power loss it is the old or the new one. When this returns, the new one is on disk.
pub(crate) fn replace(path: &Path, tmp: &Path, bytes: &[u8]) -> io::Result<()> {
    files::replace_with(path, Some(tmp), files::PRIVATE, |file| {
        file.write_all(bytes)
    })
}

/// The JSON of a file of at most `limit` bytes; `None` where there is none, or it is not readable.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path, limit: u64) -> Option<T> {
    let json = read_limited(path, limit).ok()??;
    serde_json::from_slice(&json).ok()
}

/// Users whose files in a store count besides this process's user and root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owners {
    root: u32,
    folders: u32,
}

impl Owners {
    /// The owner of the store's root folder. Also one other user, if that user owns all folders in it that
    /// are not the root's owner's, and not everyone can create folders there: a service that fills a folder
    /// that root created, or the user to whom a file server attributes all files. `folders` are the owners of
    /// the folders in it, `me` is this process's user.
    ///
    /// # Errors
    /// The index of a folder whose owner is not trusted.
    pub(crate) fn of(root: &Metadata, folders: &[u32], me: u32) -> Result<Self, usize> {
        let mut owners = Self {
            root: root.uid(),
            folders: root.uid(),
        };
        let known = |owners: &Self, uid: u32| [0, me, owners.root, owners.folders].contains(&uid);
        for (index, &uid) in folders.iter().enumerate() {
            if known(&owners, uid) {
                continue;
            }
            if root.mode() & OTHERS_WRITE != 0 || owners.folders != owners.root {
                return Err(index);
            }
            owners.folders = uid;
        }
        Ok(owners)
    }

    /// The user that is neither root, the owner of the root folder, nor this process's, if there is one.
    pub(crate) fn other(&self) -> Option<u32> {
        (self.folders != self.root).then_some(self.folders)
    }

    fn have(&self, found: &Metadata) -> bool {
        [0, self.root, self.folders, geteuid().as_raw()].contains(&found.uid())
    }
}

/// Mode bit of a folder in which everyone may create and remove files.
pub(crate) const OTHERS_WRITE: u32 = 0o002;

/// Opens a file of the store's own to write to it, and creates it where it is not there.
pub(crate) fn open_own(path: &Path, owners: Owners) -> io::Result<File> {
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
    if !owners.have(&found) {
        return Err(planted("a file of another user lies there"));
    }
    Ok(file)
}

/// As [`open_own`], for a file to write to: it must not have another name, under which it could be another
/// user's.
pub(crate) fn open_to_write(path: &Path, owners: Owners) -> io::Result<File> {
    let file = open_own(path, owners)?;
    match file.metadata()?.nlink() {
        0 | 1 => Ok(file),
        _ => Err(planted(
            "a file lies there that has another name elsewhere, too",
        )),
    }
}

fn planted(what: &str) -> io::Error {
    io::Error::other(format!(
        "{what}, which the store did not create: remove it, and see who can write to the store's folder"
    ))
}

/// Bytes that a file takes on disk: less than its length where it has holes.
pub(crate) fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |found| found.blocks() * 512)
}

/// True if the file at `path` itself, not behind a link, belongs to one of `owners`.
pub(crate) fn is_own(path: &Path, owners: Owners) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|found| owners.have(&found))
}

/// Creates the folders of `relative` within `root`. None of them may be a link, or another user's: such a
/// link is removed.
pub(crate) fn create_within(root: &Path, relative: &Path, owners: Owners) -> io::Result<PathBuf> {
    let mut folder = root.to_owned();
    for part in relative.components() {
        let Component::Normal(part) = part else {
            return Err(io::Error::other("its path leads out of its folder"));
        };
        folder.push(part);
        match std::fs::symlink_metadata(&folder) {
            Ok(found) if found.is_dir() && owners.have(&found) => continue,
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
        let me = Owners::of(&std::fs::metadata(dir.path()).unwrap(), &[], 0).unwrap();
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
    fn one_other_user_may_fill_a_folder_that_not_everybody_can_write_to() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let root = |mode| {
            std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            std::fs::metadata(dir.path()).unwrap()
        };
        let here = root(0o700).uid();
        let (service, reader, stranger) = (70_001, 70_002, 70_003);
        let of = |mode, folders: &[u32]| {
            Owners::of(&root(mode), folders, reader).map(|owners| owners.other())
        };
        assert_eq!(of(0o777, &[0, here, reader]), Ok(None));
        // A service's store in a folder that root made; or a file server that knows one user only.
        assert_eq!(of(0o775, &[service, here, service]), Ok(Some(service)));
        assert_eq!(of(0o755, &[service, reader, 0]), Ok(Some(service)));
        assert_eq!(of(0o755, &[service, stranger]), Err(1));
        assert_eq!(of(0o777, &[here, stranger]), Err(1));
        assert_eq!(of(0o1777, &[stranger]), Err(0));
    }

    #[test]
    fn folders_are_made_where_they_belong() {
        let dir = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let me = Owners::of(&std::fs::metadata(dir.path()).unwrap(), &[], 0).unwrap();
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
