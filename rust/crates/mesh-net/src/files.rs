//! Files of the state directory: replaced whole, secrets for their owner only.

use std::fs::{DirBuilder, File, Permissions};
use std::io::{self, Write};
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
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TrustError::io("read", path, source)),
    }
}
