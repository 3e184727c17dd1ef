//! Tiles and bundles of entries as files (C2SP tlog-tiles).

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use mesh_base::files;

use crate::merkle::{Hash, Hashes, TILE_WIDTH, width};
use crate::record::LONGEST_ENTRY;

/// Path of a tile below the folder of its trail; `width` is 256 of a full one.
pub fn tile_path(level: u8, index: u64, width: usize) -> PathBuf {
    path(&level.to_string(), index, width)
}

/// Path of a bundle of entries below the folder of its trail.
pub fn bundle_path(index: u64, width: usize) -> PathBuf {
    path("entries", index, width)
}

fn path(kind: &str, index: u64, width: usize) -> PathBuf {
    let mut groups = vec![format!("{:03}", index % 1000)];
    let mut rest = index / 1000;
    while rest > 0 {
        groups.push(format!("x{:03}", rest % 1000));
        rest /= 1000;
    }
    let mut path = format!("tile/{kind}");
    for group in groups.iter().rev() {
        path.push('/');
        path.push_str(group);
    }
    if width < TILE_WIDTH {
        path.push_str(&format!(".p/{width}"));
    }
    path.into()
}

/// Contents of a bundle: entries with their lengths as 16 bits, big-endian.
pub fn bundle(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(entries.iter().map(|entry| entry.len() + 2).sum());
    for entry in entries {
        let length = u16::try_from(entry.len()).expect("entries are shorter than LONGEST_ENTRY");
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(entry);
    }
    bytes
}

/// The entries of a bundle with their offsets, as far as they are whole, and the offset behind the last one.
pub fn unbundle(bytes: &[u8]) -> (Vec<(usize, &[u8])>, usize) {
    let (mut entries, mut at) = (Vec::new(), 0);
    while let Some((length, rest)) = bytes[at..].split_first_chunk() {
        let Some(entry) = rest.get(..usize::from(u16::from_be_bytes(*length))) else {
            break;
        };
        if entries.len() == TILE_WIDTH {
            break;
        }
        entries.push((at + 2, entry));
        at += 2 + entry.len();
    }
    (entries, at)
}

/// Reads a file of at most `most` bytes; `None` if it does not exist.
///
/// # Errors
/// The system's; or if it is longer.
pub fn read(path: &Path, most: usize) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(named(path, "read", &error)),
    };
    let mut bytes = Vec::new();
    let read = file.take(most as u64 + 1).read_to_end(&mut bytes);
    read.map_err(|error| named(path, "read", &error))?;
    match bytes.len() > most {
        true => Err(io::Error::other(format!(
            "{} is longer than {most} bytes",
            path.display()
        ))),
        false => Ok(Some(bytes)),
    }
}

/// An error of the system with the path and the operation.
pub(crate) fn named(path: &Path, action: &str, error: &io::Error) -> io::Error {
    io::Error::new(
        error.kind(),
        format!("cannot {action} {}: {error}", path.display()),
    )
}

/// Most bytes of a file of a bundle.
pub const LONGEST_BUNDLE: usize = TILE_WIDTH * (LONGEST_ENTRY + 2);
/// Bytes of a full tile.
pub const TILE_BYTES: usize = TILE_WIDTH * 32;

/// The hashes of a file of a tile; `None` unless its length is a multiple of a hash's.
pub fn hashes(bytes: &[u8]) -> Option<Vec<Hash>> {
    let (hashes, rest) = bytes.as_chunks::<32>();
    rest.is_empty().then(|| hashes.to_vec())
}

/// Files that are written one by one and synced together.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    files: Vec<File>,
    folders: Vec<PathBuf>,
}

impl Batch {
    /// Writes a file whole, in place of one with this name.
    pub(crate) fn write(&mut self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let failed = |error: io::Error| named(path, "write", &error);
        let folder = path.parent().expect("files lie in a folder");
        self.create(folder).map_err(failed)?;
        let mut file = tempfile::Builder::new()
            .permissions(std::fs::Permissions::from_mode(MODE))
            .tempfile_in(folder)
            .map_err(failed)?;
        file.write_all(bytes).map_err(failed)?;
        let file = file.persist(path).map_err(|error| failed(error.error))?;
        self.files.push(file);
        self.changed(folder);
        Ok(())
    }

    fn create(&mut self, folder: &Path) -> io::Result<()> {
        if folder.is_dir() {
            return Ok(());
        }
        let missing = folder.ancestors().take_while(|folder| !folder.is_dir());
        let parents: Vec<PathBuf> = missing
            .filter_map(Path::parent)
            .map(Path::to_owned)
            .collect();
        files::create_private_dir(folder)?;
        parents.iter().for_each(|parent| self.changed(parent));
        Ok(())
    }

    /// Notes that names in this folder changed.
    fn changed(&mut self, folder: &Path) {
        let is_here = folder.as_os_str().is_empty();
        let folder = if is_here { Path::new(".") } else { folder };
        if !self.folders.iter().any(|known| known == folder) {
            self.folders.push(folder.to_owned());
        }
    }

    /// Waits until all of them are on disk.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        for file in self.files.drain(..) {
            file.sync_data()?;
        }
        for folder in self.folders.drain(..) {
            File::open(&folder)?.sync_all()?;
        }
        Ok(())
    }
}

/// Reads the hashes of a tree from its tiles.
#[derive(Debug)]
pub struct TileReader {
    dir: PathBuf,
    size: u64,
    /// The tile that was read last of each level.
    read: HashMap<u8, (u64, Vec<Hash>)>,
}

impl TileReader {
    /// Tiles below this folder, of the tree of `size` entries.
    pub fn new(dir: &Path, size: u64) -> Self {
        Self {
            dir: dir.to_owned(),
            size,
            read: HashMap::new(),
        }
    }

    /// The hashes of a tile: the full one if there is one, else the partial one of the tree's size.
    ///
    /// # Errors
    /// If neither can be read, or has another length.
    pub fn tile(&mut self, level: u8, index: u64) -> io::Result<&[Hash]> {
        if self
            .read
            .get(&level)
            .is_none_or(|(known, _)| *known != index)
        {
            let hashes = self.load(level, index)?;
            self.read.insert(level, (index, hashes));
        }
        Ok(&self.read[&level].1)
    }

    fn load(&self, level: u8, index: u64) -> io::Result<Vec<Hash>> {
        let complete = self
            .size
            .checked_shr(8 * (u32::from(level) + 1))
            .unwrap_or(0);
        let partial = width(self.size, level);
        let widths: &[usize] = match index < complete {
            true => &[TILE_WIDTH],
            // The full tile stands in for a partial one that was removed.
            false if index == complete && partial > 0 => &[partial, TILE_WIDTH],
            false => &[],
        };
        for width in widths {
            let path = self.dir.join(tile_path(level, index, *width));
            let Some(bytes) = read(&path, TILE_BYTES)? else {
                continue;
            };
            let hashes = hashes(&bytes).filter(|hashes| hashes.len() == *width);
            return hashes.ok_or_else(|| {
                let (path, found) = (path.display(), bytes.len());
                io::Error::other(format!(
                    "{path} has {found} bytes instead of {}",
                    width * 32
                ))
            });
        }
        let path = self.dir.join(tile_path(level, index, TILE_WIDTH));
        Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("{} is missing", path.display()),
        ))
    }
}

impl Hashes for TileReader {
    type Error = io::Error;

    fn hash(&mut self, level: u8, index: u64) -> io::Result<Hash> {
        let tile = self.tile(level, index / TILE_WIDTH as u64)?;
        let hash = tile.get((index % TILE_WIDTH as u64) as usize);
        hash.copied().ok_or_else(|| {
            io::Error::other(format!("the tree has no hash {index} at level {level}"))
        })
    }
}

/// Tiles are read by whoever may read the folder.
const MODE: u32 = 0o644;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_are_those_of_the_specification() {
        let shown = |path: PathBuf| path.to_str().unwrap().to_owned();
        assert_eq!(shown(tile_path(0, 1_234_067, 256)), "tile/0/x001/x234/067");
        assert_eq!(shown(tile_path(2, 0, 1)), "tile/2/000.p/1");
        assert_eq!(shown(bundle_path(273, 112)), "tile/entries/273.p/112");
        assert_eq!(shown(bundle_path(1000, 256)), "tile/entries/x001/000");
    }

    proptest! {
        #[test]
        fn bundles_hold_their_entries(entries in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..30)) {
            let bytes = bundle(&entries);
            let (read, end) = unbundle(&bytes);
            let read: Vec<Vec<u8>> = read.into_iter().map(|(_, entry)| entry.to_vec()).collect();
            prop_assert_eq!(read, entries);
            prop_assert_eq!(end, bytes.len());
        }

        #[test]
        fn no_bytes_make_reading_a_bundle_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let (entries, end) = unbundle(&bytes);
            let length: usize = entries.iter().map(|(_, entry)| entry.len() + 2).sum();
            prop_assert_eq!(length, end);
        }
    }
}
