//! Making manifests of local files.

use std::collections::VecDeque;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::num::NonZero;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};

use mesh_model::Gguf;
use mesh_model::file::has_extension;
use mesh_model::gguf::split;

use super::{MAX_PIECE, Manifest, ManifestError, ManifestFile, Piece, TensorRange, VERSION};
use crate::digest::{Digest, Hasher};
use crate::layout::{self, Layout, LayoutError, Role};

/// Errors of making a manifest of files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum BuildError {
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// A model file is broken.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A file changed while it was read.
    #[error("{} changed while it was read: wait until it is written, and try again", path.display())]
    Changed { path: PathBuf },
    /// Nothing in a folder is a model.
    #[error("{} holds no model: neither a .gguf nor a .safetensors file is in it", path.display())]
    NoModel { path: PathBuf },
    /// A path that cannot stand in a manifest.
    #[error("the path {} cannot stand in a manifest: it is not UTF-8, or leaves the model's folder", path.display())]
    Path { path: PathBuf },
    /// A manifest cannot express these files.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}

/// Called with numbers of bytes that were read, from several threads.
pub type Progress<'a> = &'a (dyn Fn(u64) + Sync);

impl Manifest {
    /// The manifest of the files at `paths`, relative to `root`. Reads all of them once; blocks for about a
    /// second per gigabyte and core.
    ///
    /// # Errors
    /// If a file cannot be read, is a broken model file, or changes meanwhile; if the files are parts of a
    /// split one that do not belong together.
    pub fn of_files(
        name: &str,
        root: &Path,
        paths: &[PathBuf],
        progress: Progress<'_>,
    ) -> Result<Manifest, BuildError> {
        check_parts(root, paths)?;
        // Each file keeps three threads busy.
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        let at_once = (cores / 3).clamp(1, paths.len().max(1));
        let queue: Mutex<VecDeque<usize>> = Mutex::new((0..paths.len()).collect());
        let next = || queue.lock().expect("nobody panics with it").pop_front();
        let worker = || {
            let mut done = Vec::new();
            while let Some(i) = next() {
                let file = read_file(root, &paths[i], progress);
                if file.is_err() {
                    queue.lock().expect("nobody panics with it").clear();
                }
                done.push((i, file));
            }
            done
        };
        let mut files: Vec<(usize, Result<_, BuildError>)> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(worker)).collect();
            let done = workers.into_iter();
            done.flat_map(|worker| worker.join().expect("reading does not panic"))
                .collect()
        });
        files.sort_by_key(|(i, _)| *i);
        let files: Result<Vec<_>, _> = files.into_iter().map(|(_, file)| file).collect();
        let manifest = Manifest {
            version: VERSION,
            name: name.to_owned(),
            files: files?,
        };
        manifest.check()?;
        Ok(manifest)
    }

    /// The manifest of the model at `path`, called `name`: one file, all parts of a split one (see
    /// [`split::find`]), or a folder with a model in it (see [`model_files`]).
    ///
    /// # Errors
    /// As [`Manifest::of_files`].
    pub fn of_path(
        name: &str,
        path: &Path,
        progress: Progress<'_>,
    ) -> Result<Manifest, BuildError> {
        let first = split::find(path);
        let path = first.as_deref().unwrap_or(path);
        if path.is_dir() {
            return Self::of_files(name, path, &model_files(path)?, progress);
        }
        let bad = || BuildError::Path { path: path.into() };
        let file = path.file_name().ok_or_else(bad)?;
        let root = path.parent().unwrap_or(Path::new(""));
        let parts = split::parts(Path::new(file));
        let files = parts.unwrap_or_else(|| vec![file.into()]);
        Self::of_files(name, root, &files, progress)
    }
}

/// Checks that files which are called like the parts of a split one are these.
fn check_parts(root: &Path, paths: &[PathBuf]) -> Result<(), LayoutError> {
    let are_parts = !paths.is_empty() && paths.iter().all(|path| split::parts(path).is_some());
    match paths.iter().min().filter(|_| are_parts) {
        None => Ok(()),
        Some(first) => {
            let path = root.join(first);
            let opened = Gguf::open(&path).map(|_| ());
            opened.map_err(|source| LayoutError::Gguf { path, source })
        }
    }
}

/// The files in the folder `root` that make up a model: weights (`.safetensors`, `.gguf`) and descriptions
/// (`.json`, `.jinja`, `.txt`, `.model`), also one folder below, as sentence-transformers has them. Sorted,
/// relative to `root`.
///
/// # Errors
/// If the folder cannot be listed or has no weights.
pub fn model_files(root: &Path) -> Result<Vec<PathBuf>, BuildError> {
    let mut files = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let path = root.join(&folder);
        let failed = |source| BuildError::Read {
            path: path.clone(),
            source,
        };
        for item in std::fs::read_dir(&path).map_err(failed)? {
            let item = item.map_err(failed)?;
            let name = PathBuf::from(item.file_name());
            if name.as_os_str().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            // Follows links: the hub's cache is made of them.
            let Ok(metadata) = std::fs::metadata(item.path()) else {
                continue;
            };
            if metadata.is_dir() && folder.as_os_str().is_empty() {
                folders.push(name);
            } else if metadata.is_file() && belongs(&name) {
                files.push(folder.join(name));
            }
        }
    }
    if !files.iter().any(|file| is_weights(file)) {
        return Err(BuildError::NoModel { path: root.into() });
    }
    files.sort();
    Ok(files)
}

fn is_weights(path: &Path) -> bool {
    has_extension(path, "safetensors") || has_extension(path, "gguf")
}

fn belongs(path: &Path) -> bool {
    let described = ["json", "jinja", "txt", "model"];
    is_weights(path) || described.iter().any(|end| has_extension(path, end))
}

fn read_file(
    root: &Path,
    relative: &Path,
    progress: Progress<'_>,
) -> Result<ManifestFile, BuildError> {
    let bad = || BuildError::Path {
        path: relative.into(),
    };
    let parts: Option<Vec<&str>> = relative.iter().map(|part| part.to_str()).collect();
    let path = root.join(relative);
    let failed = |source| BuildError::Read {
        path: path.clone(),
        source,
    };
    let layout = Layout::read(&path)?;
    let file = mesh_model::file::open_regular(&path).map_err(failed)?;
    let before = file.metadata().map_err(failed)?;
    let cuts = cuts(&layout);
    let digests = digest(&file, &cuts, &layout, progress).map_err(failed)?;
    let after = file.metadata().map_err(failed)?;
    if stamp(&before) != stamp(&after) || before.len() != layout.bytes {
        return Err(BuildError::Changed { path });
    }
    let pieces = cuts.iter().zip(digests.pieces);
    let tensors = layout.tensors.into_iter().zip(digests.tensors);
    Ok(ManifestFile {
        path: parts.ok_or_else(bad)?.join("/"),
        bytes: layout.bytes,
        sha256: digests.whole,
        pieces: pieces
            .map(|(cut, sha256)| Piece {
                offset: cut.start,
                bytes: (cut.end - cut.start) as u32,
                sha256,
            })
            .collect(),
        tensors: tensors
            .map(|(tensor, sha256)| TensorRange {
                layer: layout::layer(&tensor.name),
                name: tensor.name,
                offset: tensor.offset,
                bytes: tensor.bytes,
                sha256,
            })
            .collect(),
    })
}

fn stamp(metadata: &Metadata) -> (u64, Option<std::time::SystemTime>) {
    (metadata.len(), metadata.modified().ok())
}

/// Pieces of a file: it is cut at the end of its header, wherever the next tensor has another role, and every
/// 4 MiB from there.
fn cuts(layout: &Layout) -> Vec<Range<u64>> {
    let mut starts = vec![0];
    let mut group: Option<Role> = None;
    for tensor in layout.tensors.iter().filter(|tensor| tensor.bytes > 0) {
        let role = layout::role(&tensor.name);
        if group != Some(role) {
            starts.push(tensor.offset);
            group = Some(role);
        }
    }
    starts.push(layout.bytes);
    let mut cuts = Vec::new();
    for pair in starts.windows(2) {
        let mut at = pair[0];
        while at < pair[1] {
            let end = (at + u64::from(MAX_PIECE)).min(pair[1]);
            cuts.push(at..end);
            at = end;
        }
    }
    cuts
}

struct Digests {
    whole: Digest,
    pieces: Vec<Digest>,
    tensors: Vec<Digest>,
}

/// A piece of the file in memory.
type Chunk = Arc<Vec<u8>>;

/// Chunks that are read ahead.
const AHEAD: usize = 4;

/// Reads the file once and computes the three kinds of digests side by side.
fn digest(
    mut file: &File,
    cuts: &[Range<u64>],
    layout: &Layout,
    progress: Progress<'_>,
) -> io::Result<Digests> {
    std::thread::scope(|scope| {
        let (to_whole, whole) = sync_channel::<Chunk>(AHEAD);
        let (to_pieces, pieces) = sync_channel::<Chunk>(AHEAD);
        let (to_tensors, tensors) = sync_channel::<Chunk>(AHEAD);
        let whole = scope.spawn(move || {
            let mut hasher = Hasher::default();
            whole.iter().for_each(|chunk| hasher.update(&chunk));
            hasher.finish()
        });
        let pieces = scope.spawn(move || pieces.iter().map(|chunk| Digest::of(&*chunk)).collect());
        let tensors = scope.spawn(move || digest_tensors(&tensors, layout));
        for cut in cuts {
            let mut chunk = vec![0; (cut.end - cut.start) as usize];
            file.read_exact(&mut chunk)?;
            progress(cut.end - cut.start);
            let chunk = Arc::new(chunk);
            for to in [&to_whole, &to_pieces, &to_tensors] {
                to.send(chunk.clone())
                    .expect("its thread lives until we are done");
            }
        }
        drop((to_whole, to_pieces, to_tensors));
        let ended = "a thread that only computes does not panic";
        Ok(Digests {
            whole: whole.join().expect(ended),
            pieces: pieces.join().expect(ended),
            tensors: tensors.join().expect(ended),
        })
    })
}

/// The tensors ascend and do not overlap, so that one walk over the chunks meets them one after the other.
fn digest_tensors(chunks: &Receiver<Chunk>, layout: &Layout) -> Vec<Digest> {
    let mut digests = Vec::with_capacity(layout.tensors.len());
    let mut hasher = Hasher::default();
    let mut position = 0u64;
    let mut tensors = layout.tensors.iter().peekable();
    let mut walk = |chunk: &[u8]| {
        let end = position + chunk.len() as u64;
        while let Some(tensor) = tensors.peek() {
            let tensor_end = tensor.offset + tensor.bytes;
            let from = tensor.offset.clamp(position, end);
            let to = tensor_end.clamp(position, end);
            hasher.update(&chunk[(from - position) as usize..(to - position) as usize]);
            if tensor_end > end {
                break;
            }
            digests.push(std::mem::take(&mut hasher).finish());
            tensors.next();
        }
        position = end;
    };
    for chunk in chunks {
        walk(&chunk);
    }
    // Empty tensors of an empty file.
    walk(&[]);
    digests
}
