//! Files that are replaced whole, files that hold secrets, and what killed processes leave in a service's
//! folder.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Mode of a file that only its owner may read and write.
pub const PRIVATE: u32 = 0o600;
/// Mode of a file that everyone may read.
pub const PUBLIC: u32 = 0o644;

/// Replaces the file at `path` by one of this mode, regardless of the umask. After a crash or a loss of power
/// the file is the old or the new one, never a part; on return, the new one is on disk.
///
/// # Errors
/// If the folder of `path` does not exist or cannot be written to, or the disk fails.
pub fn replace(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    replace_with(path, None, mode, |file| file.write_all(contents))
}

/// Like [`replace`], with a file that `write` fills. Until then it is beside `path`, or in `tmp`, a folder on
/// the same file system. Its temporary name satisfies [`is_temporary`], and it is locked, to distinguish it
/// from the files of killed processes ([`is_abandoned`]).
///
/// # Errors
/// As [`replace`]; those of `write`.
pub fn replace_with(
    path: &Path,
    tmp: Option<&Path>,
    mode: u32,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    let permissions = Permissions::from_mode(mode);
    let mut file = tempfile::Builder::new()
        .permissions(permissions.clone())
        .tempfile_in(tmp.unwrap_or(parent(path)))?;
    // Some file systems have no locks. There nothing counts as abandoned.
    let _ = file.as_file().lock();
    write(file.as_file_mut())?;
    // The mode given at creation is subject to the umask.
    file.as_file().set_permissions(permissions)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    sync_parent(path)
}

/// Creates the file at `path` with this mode, whole and on disk on return, unless there is one: then it is left alone,
/// and the result is false.
///
/// # Errors
/// As [`replace`].
pub fn create_new(path: &Path, contents: &[u8], mode: u32) -> io::Result<bool> {
    let permissions = Permissions::from_mode(mode);
    let mut file = tempfile::Builder::new()
        .permissions(permissions.clone())
        .tempfile_in(parent(path))?;
    file.write_all(contents)?;
    file.as_file().set_permissions(permissions)?;
    file.as_file().sync_all()?;
    match file.persist_noclobber(path) {
        Ok(_) => sync_parent(path).map(|()| true),
        Err(failed) if failed.error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(failed) => Err(failed.error),
    }
}

/// Syncs the folder of `path` to disk, with the files that were renamed, created or removed in it.
///
/// # Errors
/// If the folder cannot be opened, or the disk fails.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    File::open(parent(path))?.sync_all()
}

fn parent(path: &Path) -> &Path {
    let parent = path.parent();
    parent
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// Creates `dir` and its parents; those that are new are for their owner only.
///
/// # Errors
/// The system's.
pub fn create_private_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// The users that may read a file with a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readers {
    /// The owner only: files that the program writes itself.
    Owner,
    /// The owner and a group: files from an operator or systemd.
    Group,
}

/// Describes a file with a secret whose mode is too open, and the remedy; `None` if the mode is right or the
/// file cannot be examined.
pub fn exposure(path: &Path, readers: Readers) -> Option<String> {
    let mode = fs::metadata(path).ok()?.permissions().mode() & 0o7777;
    let (allowed, wanted) = match readers {
        Readers::Owner => (0o700, "600"),
        Readers::Group => (0o750, "640"),
    };
    if mode & 0o777 & !allowed == 0 {
        return None;
    }
    let path = path.display();
    if path.to_string().starts_with("/nix/store/") {
        return Some(format!(
            "{path} lies in the Nix store, which everybody on this machine can read: name a file elsewhere"
        ));
    }
    Some(format!(
        "{path} holds a secret and is open to other users of this machine (mode {mode:04o}): chmod {wanted} {path}"
    ))
}

/// Describes a state directory whose mode is too open, and the remedy; `None` if the mode is right.
pub fn writable_by_others(dir: &Path) -> Option<String> {
    let mode = fs::metadata(dir).ok()?.permissions().mode() & 0o7777;
    (mode & 0o022 != 0).then(|| {
        let dir = dir.display();
        format!("other users of this machine can write to the state directory {dir} (mode {mode:04o}): chmod 700 {dir}")
    })
}

/// Removes the temporary files of processes that were killed while they replaced a file in `dir`, and gives their paths. For
/// the start of the one service that owns the folder.
///
/// # Errors
/// If the folder cannot be listed, or a file not be removed.
pub fn remove_leftovers(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        // Not what a link leads to.
        let is_ours = entry.file_name().to_str().is_some_and(is_temporary);
        if is_ours && entry.file_type()?.is_file() {
            fs::remove_file(entry.path())?;
            removed.push(entry.path());
        }
    }
    Ok(removed)
}

/// True if no process holds the lock of a temporary file: the process that wrote it was killed.
pub fn is_abandoned(file: &File) -> bool {
    file.try_lock().is_ok()
}

/// True for names of files that are still being written: `.tmpAb12Cd`; of earlier releases
/// `profile.json.4711` and `blk.7.4711-0.tmp`.
pub fn is_temporary(name: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if let Some(random) = name.strip_prefix(".tmp") {
        return random.len() == 6 && random.bytes().all(|byte| byte.is_ascii_alphanumeric());
    }
    if let Some(rest) = name.strip_suffix(".tmp") {
        let numbers = rest
            .rsplit_once('.')
            .and_then(|(_, last)| last.split_once('-'));
        return numbers.is_some_and(|(pid, number)| digits(pid) && digits(number));
    }
    // Other numbered files may be copies that people made.
    name.strip_prefix("profile.json.").is_some_and(digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::os::unix::fs::MetadataExt;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).expect("listed");
        let names = entries.map(|entry| entry.expect("listed").file_name());
        names
            .map(|name| name.into_string().expect("text"))
            .collect()
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).expect("there").mode() & 0o7777
    }

    #[test]
    fn files_are_replaced_whole_with_the_mode_that_was_asked_for() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("key");
        for (contents, wanted) in [("old, and longer", PRIVATE), ("new", PUBLIC), ("", PRIVATE)] {
            replace(&path, contents.as_bytes(), wanted).expect("replaced");
            assert_eq!(fs::read_to_string(&path).expect("read"), contents);
            assert_eq!(mode(&path), wanted);
            assert_eq!(names(folder.path()), ["key"], "no temporary file is left");
        }
    }

    #[test]
    fn a_failure_in_the_middle_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("state");
        replace(&path, b"old", PRIVATE).expect("written");
        let failed = replace_with(&path, None, PRIVATE, |file| {
            file.write_all(b"half of the n")?;
            Err(io::ErrorKind::StorageFull.into())
        });
        assert_eq!(failed.expect_err("full").kind(), io::ErrorKind::StorageFull);
        assert_eq!(fs::read(&path).expect("read"), b"old");
        assert_eq!(names(folder.path()), ["state"]);
        // Nor does one at the end: a folder lies where the file should.
        fs::create_dir(folder.path().join("taken")).expect("created");
        replace(&folder.path().join("taken"), b"new", PRIVATE).expect_err("a folder");
        assert_eq!(names(folder.path()).len(), 2);
        let nowhere = folder.path().join("none/state");
        let error = replace(&nowhere, b"new", PRIVATE).expect_err("no folder");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_process_that_is_killed_leaves_the_old_file_and_a_leftover_that_is_swept() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("state");
        replace(&path, b"old", PRIVATE).expect("written");
        // What the disk looks like at the moment of the kill: a copy of the folder while the file is being
        // written.
        let after = tempfile::tempdir().expect("a folder");
        replace_with(&path, None, PRIVATE, |file| {
            file.write_all(b"half of the n")?;
            for name in names(folder.path()) {
                let open = File::open(folder.path().join(&name))?;
                assert!(name == "state" || !is_abandoned(&open), "it is locked");
                fs::copy(folder.path().join(&name), after.path().join(&name))?;
            }
            Ok(())
        })
        .expect("replaced");
        assert_eq!(fs::read(after.path().join("state")).expect("read"), b"old");
        let removed = remove_leftovers(after.path()).expect("listed");
        assert_eq!(removed.len(), 1);
        assert!(is_temporary(
            &removed[0].file_name().expect("a name").to_string_lossy()
        ));
        assert_eq!(names(after.path()), ["state"]);
    }

    #[test]
    fn a_link_is_replaced_and_what_it_leads_to_is_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, other) = (folder.path().join("link"), folder.path().join("other"));
        fs::write(&other, "precious").expect("written");
        std::os::unix::fs::symlink(&other, &path).expect("linked");
        replace(&path, b"new", PRIVATE).expect("replaced");
        assert_eq!(fs::read(&other).expect("read"), b"precious");
        assert_eq!(fs::read(&path).expect("read"), b"new");
    }

    #[test]
    fn a_bare_name_lies_in_the_current_folder() {
        assert_eq!(parent(Path::new("name")), Path::new("."));
        assert_eq!(parent(Path::new("a/name")), Path::new("a"));
    }

    #[test]
    fn new_folders_are_for_their_owner_only() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().join("a/b");
        for _ in 0..2 {
            create_private_dir(&dir).expect("created");
        }
        assert_eq!((mode(&dir), mode(&folder.path().join("a"))), (0o700, 0o700));
    }

    #[test]
    fn files_that_others_can_read_are_told_of_with_the_remedy() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("key");
        fs::write(&path, "secret").expect("written");
        let told = |mode, readers| {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("set");
            exposure(&path, readers)
        };
        for mode in [0o600, 0o400, 0o700] {
            assert_eq!(told(mode, Readers::Owner), None);
        }
        assert_eq!(told(0o640, Readers::Group), None);
        let shown = path.display();
        for (mode, readers, remedy) in [
            (0o640, Readers::Owner, "chmod 600"),
            (0o604, Readers::Group, "chmod 640"),
            (0o660, Readers::Group, "chmod 640"),
            (0o644, Readers::Group, "chmod 640"),
        ] {
            let text = told(mode, readers).expect("told");
            assert!(text.contains(&format!("{remedy} {shown}")), "{text}");
            assert!(text.contains(&format!("{mode:04o}")), "{text}");
        }
        assert_eq!(exposure(&folder.path().join("none"), Readers::Owner), None);
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o770)).expect("set");
        assert!(writable_by_others(folder.path()).is_some());
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("set");
        assert_eq!(writable_by_others(folder.path()), None);
    }

    #[test]
    fn only_what_a_killed_process_left_is_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let ours = [".tmpAb12Cd", "profile.json.4711", "blk.7.4711-0.tmp"];
        let others = [
            "root.key",
            ".tmp",
            ".tmpAb12C",
            ".tmpAb12Cd7",
            "notes.tmp",
            "a-b.tmp",
            "tokens.json",
            "tokens.json.bak",
            "tokens.json.1",
            "profile.json.old",
        ];
        for name in ours.iter().chain(&others) {
            fs::write(folder.path().join(name), "x").expect("written");
        }
        std::os::unix::fs::symlink("root.key", folder.path().join(".tmpLINK00")).expect("linked");
        fs::create_dir(folder.path().join(".tmpFOLDER")).expect("created");
        let removed = remove_leftovers(folder.path()).expect("listed");
        assert_eq!(removed.len(), ours.len(), "{removed:?}");
        for name in others {
            assert!(folder.path().join(name).exists(), "{name}");
        }
        assert!(folder.path().join(".tmpLINK00").exists());
        assert!(folder.path().join(".tmpFOLDER").exists());
    }
}
