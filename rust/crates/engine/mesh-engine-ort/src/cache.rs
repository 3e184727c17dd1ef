//! Weights that were quantised at a load, kept on disk for the next one.
//!
//! ```text
//! <folder>/<fingerprint>-<format>-v1/blk.7.gguf     the matrices of a layer
//!                                   token_embd.gguf, output.gguf
//! ```
//!
//! One GGUF file for each layer, so that stages with other ranges of layers share them. The files are read
//! like any GGUF file: a second start is as fast as with a model that was quantised before. A file is written
//! under another name, synced and renamed, so that it is never incomplete. Before use its checksum is
//! verified; a damaged file is ignored. When the folder would outgrow its limit, the least recently used
//! files are removed.
//!
//! The fingerprint covers all files of the model. The checksum protects against accidents only: anybody who
//! can write to this folder can also write to the worker's state.

use std::fs::{self, File};
use std::hash::Hasher;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use mesh_base::files;
use mesh_model::data::Data;
use mesh_model::file::FileError;
use mesh_model::gguf::Writer;
use mesh_model::gguf::writer::OwnedValue;
use mesh_model::{Checkpoint, GgmlType, Gguf};
use twox_hash::XxHash3_64;

use crate::options::WeightFormat;

/// Changes when the same weights would be quantised to other bytes.
const VERSION: u32 = 1;

const CHECKSUM: &str = "hydramesh.checksum";
/// Free disk space that is left alone.
const SPARE: u64 = 1 << 30;

/// Folder of quantised weights and its size limit in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightCache {
    /// The folder; it is made when it is needed.
    pub folder: PathBuf,
    /// Most bytes of all files in it.
    pub limit: u64,
}

/// A matrix that was quantised.
#[derive(Debug, Clone)]
pub(crate) struct QuantisedMatrix {
    pub(crate) name: String,
    pub(crate) ty: GgmlType,
    pub(crate) dims: Vec<u64>,
    pub(crate) data: Vec<u8>,
}

/// The part of a [`WeightCache`] that belongs to one model in one format.
#[derive(Debug)]
pub(crate) struct CacheEntry {
    cache: WeightCache,
    folder: PathBuf,
}

impl CacheEntry {
    /// The entry of the model with this fingerprint.
    pub(crate) fn new(cache: &WeightCache, fingerprint: &str, format: WeightFormat) -> CacheEntry {
        let name = format!("{fingerprint}-{}-v{VERSION}", format.name());
        CacheEntry {
            folder: cache.folder.join(name),
            cache: cache.clone(),
        }
    }

    /// The matrices of a group (`blk.7`), if they are here and whole.
    pub(crate) fn read(&self, group: &str) -> Option<Gguf> {
        let path = self.path(group);
        let gguf = match path.exists() {
            true => Gguf::open(&path).map_err(|error| error.to_string()),
            false => return None,
        };
        let checked = gguf.and_then(|gguf| match gguf.unsigned(CHECKSUM) {
            Ok(Some(wanted)) => match checksum_of(&gguf) {
                Ok(found) if found == wanted => Ok(gguf),
                Ok(_) => Err("its checksum is another".to_owned()),
                Err(error) => Err(error.to_string()),
            },
            Ok(None) => Err("it has no checksum".to_owned()),
            Err(error) => Err(error.to_string()),
        });
        match checked {
            Ok(gguf) => {
                // Its time says when it was used.
                let now = SystemTime::now();
                let _ = File::open(&self.folder).and_then(|folder| folder.set_modified(now));
                Some(gguf)
            }
            Err(reason) => {
                tracing::warn!(path = %path.display(), reason, "quantised weights are damaged: they are made anew");
                None
            }
        }
    }

    /// Keeps the matrices of a group. A failure costs time at the next start only.
    pub(crate) fn write(&self, group: &str, matrices: &[QuantisedMatrix]) {
        let path = self.path(group);
        if let Err(error) = self.try_write(&path, matrices) {
            tracing::warn!(path = %path.display(), %error, "quantised weights are not kept");
        }
    }

    fn try_write(&self, path: &Path, matrices: &[QuantisedMatrix]) -> io::Result<()> {
        let bytes: u64 = matrices.iter().map(|matrix| matrix.data.len() as u64).sum();
        fs::create_dir_all(&self.folder)?;
        self.make_room(bytes)?;
        files::replace_with(path, None, files::PRIVATE, |file| {
            write_file(file, matrices)
        })
    }

    /// Removes the least recently used files until `bytes` more fit the limit; fails if they do not fit, or
    /// if the disk is full.
    fn make_room(&self, bytes: u64) -> io::Result<()> {
        let mut others = Vec::new();
        let mut total = 0;
        for item in fs::read_dir(&self.cache.folder)? {
            let folder = item?.path();
            let size = size(&folder);
            total += size;
            if folder != self.folder {
                let used = fs::metadata(&folder).and_then(|metadata| metadata.modified());
                others.push((used.unwrap_or(SystemTime::UNIX_EPOCH), folder, size));
            }
        }
        others.sort();
        let mut others = others.into_iter();
        while total.saturating_add(bytes) > self.cache.limit {
            let Some((_, folder, size)) = others.next() else {
                return Err(io::Error::new(
                    io::ErrorKind::StorageFull,
                    format!(
                        "{total} bytes are kept, and at most {} may be",
                        self.cache.limit
                    ),
                ));
            };
            tracing::info!(folder = %folder.display(), bytes = size, "quantised weights go that were not used for longest");
            fs::remove_dir_all(&folder)?;
            total -= size;
        }
        let disk = nix::sys::statvfs::statvfs(&self.cache.folder)?;
        let free = disk.blocks_available().saturating_mul(disk.fragment_size());
        if free < bytes.saturating_add(SPARE) {
            let text = format!("only {free} bytes are free on the disk");
            return Err(io::Error::new(io::ErrorKind::StorageFull, text));
        }
        Ok(())
    }

    fn path(&self, group: &str) -> PathBuf {
        self.folder.join(format!("{group}.gguf"))
    }
}

fn write_file(file: &mut File, matrices: &[QuantisedMatrix]) -> io::Result<()> {
    let mut writer = Writer::new();
    writer.key(
        CHECKSUM,
        OwnedValue::U64(
            checksum(matrices.iter().map(|matrix| {
                (
                    &*matrix.name,
                    matrix.ty,
                    &*matrix.dims,
                    (&*matrix.data).into(),
                )
            }))
            .map_err(io::Error::other)?,
        ),
    );
    for matrix in matrices {
        writer.tensor(&matrix.name, matrix.ty, &matrix.dims);
    }
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut data = matrices.iter();
    writer.write(&mut out, |_, _, _, out| {
        out.write_all(data.next().map_or(&[], |matrix| &matrix.data))
    })?;
    out.flush()
}

fn checksum_of(gguf: &Gguf) -> Result<u64, FileError> {
    checksum(
        gguf.tensors()
            .iter()
            .map(|tensor| (tensor.name, tensor.ty, tensor.dims, tensor.data)),
    )
}

fn checksum<'a>(
    matrices: impl Iterator<Item = (&'a str, GgmlType, &'a [u64], Data<'a>)>,
) -> Result<u64, FileError> {
    let mut hasher = XxHash3_64::new();
    for (name, ty, dims, data) in matrices {
        hasher.write(name.as_bytes());
        hasher.write(&ty.id().to_le_bytes());
        dims.iter().for_each(|dim| hasher.write(&dim.to_le_bytes()));
        data.each(|piece| hasher.write(piece))?;
    }
    Ok(hasher.finish())
}

/// Bytes of the files in a folder. Removes abandoned temporary files.
fn size(folder: &Path) -> u64 {
    let Ok(items) = fs::read_dir(folder) else {
        return 0;
    };
    let mut total = 0;
    for item in items.flatten() {
        let Ok(metadata) = item.metadata() else {
            continue;
        };
        let name = item.file_name();
        let temporary = name.to_str().is_some_and(files::is_temporary);
        let file = || mesh_model::file::open_regular(&item.path());
        if temporary && file().is_ok_and(|file| files::is_abandoned(&file)) {
            let _ = fs::remove_file(item.path());
            continue;
        }
        total += metadata.len();
    }
    total
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn matrix(name: &str, byte: u8) -> QuantisedMatrix {
        QuantisedMatrix {
            name: name.into(),
            ty: GgmlType::Q8_0,
            dims: vec![32, 2],
            data: vec![byte; 68],
        }
    }

    fn entry(folder: &Path, limit: u64, fingerprint: &str) -> CacheEntry {
        let cache = WeightCache {
            folder: folder.join("weights"),
            limit,
        };
        CacheEntry::new(&cache, fingerprint, WeightFormat::Int8)
    }

    #[test]
    fn what_was_kept_is_read_back_and_what_is_damaged_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let entry = entry(dir.path(), 1 << 20, "f");
        assert!(entry.read("blk.0").is_none());
        entry.write("blk.0", &[matrix("a", 1), matrix("b", 2)]);
        let read = entry.read("blk.0").expect("whole");
        assert_eq!(
            *read.tensors().get("b").unwrap().data.read().unwrap(),
            [2; 68]
        );
        assert_eq!(
            fs::read_dir(&entry.folder).unwrap().count(),
            1,
            "nothing else is left"
        );
        let mode = fs::metadata(entry.path("blk.0"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, files::PRIVATE, "only the worker reads it");

        let path = entry.path("blk.0");
        let whole = fs::read(&path).unwrap();
        // Every bit counts except those of the padding, which is never read.
        let data = read.tensors().get("a").unwrap().data.offset() as usize;
        for at in [0, 8, 30, data - 60, data, data + 67, whole.len() - 1] {
            let mut damaged = whole.clone();
            damaged[at] ^= 4;
            fs::write(&path, damaged).unwrap();
            let read = entry.read("blk.0");
            let same = read.is_some_and(|read| {
                let data = read
                    .tensors()
                    .get("a")
                    .map(|a| a.data.read().unwrap().into_owned());
                data.is_some_and(|data| data == [1; 68])
            });
            assert!(!same || (30..data).contains(&at), "byte {at}");
        }
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert!(entry.read("blk.0").is_none(), "cut short");
        fs::write(&path, b"").unwrap();
        assert!(entry.read("blk.0").is_none(), "empty");
        entry.write("blk.0", &[matrix("a", 1)]);
        assert!(entry.read("blk.0").is_some(), "made anew");
    }

    #[test]
    fn the_model_that_was_used_least_recently_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let limit = 800;
        let one = entry(dir.path(), limit, "one");
        one.write("blk.0", &[matrix("a", 1)]);
        let bytes = size(&one.folder);
        assert!((100..limit / 3).contains(&bytes), "{bytes}");
        let aged = |entry: &CacheEntry, seconds| {
            let time = SystemTime::now() - std::time::Duration::from_secs(seconds);
            File::open(&entry.folder)
                .unwrap()
                .set_modified(time)
                .unwrap();
        };
        let two = entry(dir.path(), limit, "two");
        two.write("blk.0", &[matrix("a", 2)]);
        aged(&one, 100);
        aged(&two, 200);
        assert!(one.read("blk.0").is_some());
        let three = entry(dir.path(), limit, "three");
        (0..3).for_each(|group| three.write(&format!("blk.{group}"), &[matrix("a", 3)]));
        let there = [&one, &two, &three].map(|entry| entry.folder.exists());
        assert_eq!(there, [true, false, true]);
        let total = [&one, &three]
            .map(|entry| size(&entry.folder))
            .iter()
            .sum::<u64>();
        assert!(total <= limit, "{total}");
        // Of its own files none goes for another.
        (3..9).for_each(|group| three.write(&format!("blk.{group}"), &[matrix("a", 3)]));
        assert!(size(&three.folder) <= limit && three.read("blk.0").is_some());
        assert!(three.read("blk.8").is_none());
    }

    #[test]
    fn what_a_killed_process_left_goes_and_what_is_being_written_stays() {
        let dir = tempfile::tempdir().unwrap();
        let entry = entry(dir.path(), 1 << 20, "f");
        entry.write("blk.0", &[matrix("a", 1)]);
        let whole = size(&entry.folder);
        let left = [".tmpAb12Cd", "blk.7.4711-0.tmp"].map(|name| entry.folder.join(name));
        left.iter()
            .for_each(|path| fs::write(path, "half").unwrap());
        let writer = File::open(&left[0]).unwrap();
        writer.lock().unwrap();
        assert_eq!(size(&entry.folder), whole + 4);
        drop(writer);
        assert_eq!(size(&entry.folder), whole);
        assert_eq!(fs::read_dir(&entry.folder).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_that_cannot_be_written_costs_time_only() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("weights"), "a file").unwrap();
        let entry = entry(dir.path(), 1 << 20, "f");
        entry.write("blk.0", &[matrix("a", 1)]);
        assert!(entry.read("blk.0").is_none());
    }
}
