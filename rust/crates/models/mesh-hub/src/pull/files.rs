//! Files of a download: flushed to disk at intervals, finally checked and made blobs.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::digest::{self, SHA1_FOR_LEGACY_USE_ONLY};
use data_encoding::HEXLOWER;
use mesh_store::{PartialFile, PartialKey, Store, StoreError};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::blocking::blocking;
use crate::error::HubError;
use crate::listing::RepoFile;
use crate::watch::Watch;

/// A file of the model in the store: complete, or open to write what is missing.
pub(super) enum FileState {
    Whole(PathBuf),
    Partial(Arc<PartialFile>),
}

/// Files of a model by their identities.
pub(super) type Held = BTreeMap<PartialKey, FileState>;

/// The files that are not complete.
pub(super) fn partials(held: &Held) -> Vec<Arc<PartialFile>> {
    let partials = held.values().filter_map(FileState::partial);
    partials.cloned().collect()
}

impl FileState {
    pub(super) fn partial(&self) -> Option<&Arc<PartialFile>> {
        match self {
            FileState::Partial(partial) => Some(partial),
            FileState::Whole(_) => None,
        }
    }
}

/// Interval of flushes to disk, or four times the duration of a flush if that is longer: the maximum loss
/// when the process is killed.
const FLUSH_AFTER: Duration = Duration::from_millis(100);

/// Brings what has arrived to disk now and then.
pub(super) struct Flusher {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), HubError>>,
}

impl Flusher {
    pub(super) fn start(held: &Held) -> Self {
        let partials = Arc::new(partials(held));
        let (stop, mut stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            let mut pause = FLUSH_AFTER;
            let mut last = false;
            while !last {
                last = tokio::time::timeout(pause, &mut stopped).await.is_ok();
                let partials = partials.clone();
                let started = Instant::now();
                blocking(move || partials.iter().try_for_each(|partial| partial.flush())).await?;
                pause = FLUSH_AFTER.max(started.elapsed() * 4);
            }
            Ok(())
        });
        Flusher { stop, task }
    }

    /// Brings the rest to disk.
    pub(super) async fn end(self) -> Result<(), HubError> {
        // It may have ended itself, with an error.
        let _ = self.stop.send(());
        self.task.await.expect("flushing does not panic")
    }
}

/// Writes `ranges` of a file of this machine into `partial`.
pub(super) fn copy(
    from: &Path,
    partial: &PartialFile,
    ranges: &[Range<u64>],
    watch: &dyn Watch,
) -> Result<(), HubError> {
    use std::os::unix::fs::FileExt;

    let read = |source| HubError::Read {
        path: from.into(),
        source,
    };
    let file = std::fs::File::open(from).map_err(read)?;
    let mut buffer = vec![0; 1 << 20];
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(buffer.len() as u64) as usize;
            file.read_exact_at(&mut buffer[..len], at).map_err(read)?;
            partial.write_at(at, &buffer[..len])?;
            watch.arrived(len as u64);
            at += len as u64;
        }
    }
    Ok(())
}

/// Makes a blob of a complete file; returns its path.
pub(super) fn complete(
    store: &Store,
    partial: Arc<PartialFile>,
    file: &RepoFile,
    repo: &str,
) -> Result<PathBuf, HubError> {
    let partial = Arc::try_unwrap(partial)
        .unwrap_or_else(|_| unreachable!("fetches and the flusher have ended"));
    let damaged = |kind, found: String, wanted: String| HubError::Damaged {
        repo: repo.to_owned(),
        path: file.path.clone(),
        kind,
        found,
        wanted,
    };
    if let (None, Some(wanted)) = (&file.sha256, &file.blob_id) {
        let content = partial.read_at(0..partial.bytes())?.unwrap_or_default();
        let found = git_blob_id(&content);
        // Ids of repositories that hash with SHA-256 are longer, and are not made here.
        if wanted.len() == found.len() && !found.eq_ignore_ascii_case(wanted) {
            partial.forget(0..partial.bytes())?;
            return Err(damaged("git blob id", found, wanted.clone()));
        }
    }
    let digest = match partial.complete() {
        Err(StoreError::Mismatch { found, wanted, .. }) => {
            return Err(damaged("SHA-256", found.to_string(), wanted.to_string()));
        }
        digest => digest?,
    };
    Ok(store
        .blob(&digest)
        .unwrap_or_else(|| store.root().join("blobs").join(digest.to_string())))
}

/// SHA-1 of a file as git stores it.
pub(crate) fn git_blob_id(content: &[u8]) -> String {
    let mut sha1 = digest::Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
    sha1.update(format!("blob {}\0", content.len()).as_bytes());
    sha1.update(content);
    HEXLOWER.encode(sha1.finish().as_ref())
}
