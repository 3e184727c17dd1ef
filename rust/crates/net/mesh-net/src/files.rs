//! Files of the state directory: replaced whole, secrets for their owner only.

use std::fs::{DirBuilder, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

use crate::trust::TrustError;

pub(crate) const PRIVATE: u32 = 0o600;
pub(crate) const PUBLIC: u32 = 0o644;

pub(crate) fn create_private_dir(dir: &Path) -> Result<(), TrustError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| TrustError::io("create", dir, source))
}

/// After a crash the file is the old or the new one, never a part; when this returns, the new one is on disk.
pub(crate) fn replace(path: &Path, contents: &[u8], mode: u32) -> Result<(), TrustError> {
    let write = || -> io::Result<()> {
        let dir = path
            .parent()
            .filter(|dir| !dir.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        let permissions = Permissions::from_mode(mode);
        let mut file = tempfile::Builder::new()
            .permissions(permissions.clone())
            .tempfile_in(dir)?;
        file.write_all(contents)?;
        file.as_file().set_permissions(permissions)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(|source| TrustError::io("write", path, source))
}

/// `None` when there is no such file.
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

/// No file of ours is larger.
const MOST_BYTES: u64 = 16 << 20;
