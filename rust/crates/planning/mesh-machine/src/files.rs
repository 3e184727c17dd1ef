//! Reading small files that anyone may have written.

use std::io::{self, Read};
use std::path::Path;

use mesh_model::file::open_regular;

/// Largest file that is read, in bytes.
pub const LIMIT: u64 = 64 * 1024;

/// Errors of reading a small text file.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReadError {
    /// The file does not exist.
    #[error("there is no such file")]
    Absent,
    /// It is larger than [`LIMIT`].
    #[error("it is larger than {} KiB; this is not the file that is meant", LIMIT / 1024)]
    TooLarge,
    /// It is not UTF-8 text, or holds control characters.
    #[error("it is not text; write it with a plain text editor, as UTF-8")]
    NotText,
    /// An I/O error, as the operating system reports it.
    #[error("it cannot be read: {0}")]
    Io(String),
}

/// The text of a file of at most [`LIMIT`] bytes, without a byte order mark.
///
/// # Errors
/// [`ReadError`] where the file is absent, too large, a folder or device, or no text.
pub fn read_text(path: &Path) -> Result<String, ReadError> {
    // One byte more shows that there is more.
    let bytes = read_bytes(path, LIMIT + 1)?;
    if bytes.len() as u64 > LIMIT {
        return Err(ReadError::TooLarge);
    }
    let text = String::from_utf8(bytes).map_err(|_| ReadError::NotText)?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    if text.contains(|c: char| c.is_control() && !matches!(c, '\n' | '\r' | '\t')) {
        return Err(ReadError::NotText);
    }
    Ok(text.to_owned())
}

/// Text of a kernel file, cut at 1 MiB (/proc/cpuinfo grows with the processor); `None` where it cannot be
/// read.
pub(crate) fn kernel_text(path: &Path) -> Option<String> {
    let bytes = read_bytes(path, 1 << 20).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn read_bytes(path: &Path, limit: u64) -> Result<Vec<u8>, ReadError> {
    let mut bytes = Vec::new();
    // A pipe or device could make the reader wait for ever.
    let opened = open_regular(path);
    match opened.and_then(|file| file.take(limit).read_to_end(&mut bytes)) {
        Ok(_) => Ok(bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(ReadError::Absent),
        Err(error) => Err(ReadError::Io(error.to_string())),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A root folder with `files`, as paths below it and their text.
    pub(crate) fn tree(files: &[(impl AsRef<Path>, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a folder");
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            std::fs::write(path, text).expect("written");
        }
        root
    }

    #[test]
    fn only_small_text_files_are_read() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("file");
        let read = |content: &[u8]| {
            std::fs::write(&path, content).expect("written");
            read_text(&path)
        };
        assert_eq!(read(b"\xef\xbb\xbfa = 1\r\n"), Ok("a = 1\r\n".to_owned()));
        assert_eq!(read(&[0xff, 0xfe, 0x41]), Err(ReadError::NotText));
        assert_eq!(read(b"a\0b"), Err(ReadError::NotText));
        assert_eq!(
            read(&vec![b'x'; LIMIT as usize]).map(|text| text.len()),
            Ok(LIMIT as usize)
        );
        assert_eq!(
            read(&vec![b'x'; LIMIT as usize + 1]),
            Err(ReadError::TooLarge)
        );
        assert_eq!(read_text(&dir.path().join("no")), Err(ReadError::Absent));
        assert!(matches!(read_text(dir.path()), Err(ReadError::Io(_))));
    }
}
