//! Files that hold secrets, and what killed processes leave in a service's folder.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Who may read a file with a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readers {
    /// Its owner alone: files that we write ourselves.
    Owner,
    /// Its owner and a group: files that an operator or systemd hands over.
    Group,
}

/// What is wrong with the mode of a file with a secret, and how to mend it; `None` if nothing is, or the file cannot be looked
/// at.
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

/// What is wrong with the mode of a state directory, and how to mend it; `None` if nothing is.
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

/// Names of files that are still being written: `.tmpAb12Cd`, `profile.json.4711`, `blk.7.4711-0.tmp`.
fn is_temporary(name: &str) -> bool {
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
    // Other numbered files may be somebody's copies.
    name.strip_prefix("profile.json.").is_some_and(digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of this test, removed when it is dropped.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let unique = format!("mesh-base-{name}-{}", std::process::id());
            let path = std::env::temp_dir().join(unique);
            fs::create_dir_all(&path).expect("created");
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn files_that_others_can_read_are_told_of_with_the_remedy() {
        let folder = Folder::new("modes");
        let path = folder.0.join("key");
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
        assert_eq!(exposure(&folder.0.join("none"), Readers::Owner), None);
        fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o770)).expect("set");
        assert!(writable_by_others(&folder.0).is_some());
        fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o755)).expect("set");
        assert_eq!(writable_by_others(&folder.0), None);
    }

    #[test]
    fn only_what_a_killed_process_left_is_removed() {
        let folder = Folder::new("leftovers");
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
            fs::write(folder.0.join(name), "x").expect("written");
        }
        std::os::unix::fs::symlink("root.key", folder.0.join(".tmpLINK00")).expect("linked");
        fs::create_dir(folder.0.join(".tmpFOLDER")).expect("created");
        let removed = remove_leftovers(&folder.0).expect("listed");
        assert_eq!(removed.len(), ours.len(), "{removed:?}");
        for name in others {
            assert!(folder.0.join(name).exists(), "{name}");
        }
        assert!(folder.0.join(".tmpLINK00").exists());
        assert!(folder.0.join(".tmpFOLDER").exists());
    }
}
