//! The cache of other programs' downloads from the hub on this machine, read with the layout of `hf-hub`.

use std::fs;
use std::path::{Path, PathBuf};

use hf_hub::{CacheRepo, RepoType};

use crate::error::HubError;
use crate::listing::{Repo, RepoFile, is_hash, is_sound};
use crate::settings::Settings;

/// Deepest folder of a repository that is looked into, and most files.
const MAX_DEPTH: usize = 6;
const MAX_FILES: usize = 10_000;

/// The cached files of `id` at `revision`.
///
/// # Errors
/// If the cache has none.
pub(crate) fn open(settings: &Settings, id: &str, revision: &str) -> Result<Repo, HubError> {
    let nothing = || HubError::Offline {
        what: format!("{id} at revision {revision}"),
    };
    let folder = cached(settings, id, revision).ok_or_else(nothing)?;
    let commit = match is_hash(revision) {
        true => revision.to_owned(),
        false => {
            // A branch or tag is a file with the commit that it meant when it was fetched.
            let refs = folder.pointer_path("x");
            let refs = refs.ancestors().nth(2).map(|repo| repo.join("refs"));
            let commit = refs.and_then(|refs| fs::read_to_string(refs.join(revision)).ok());
            let commit = commit.unwrap_or_default().trim().to_owned();
            Some(commit)
                .filter(|commit| is_hash(commit))
                .ok_or_else(nothing)?
        }
    };
    let root = folder.pointer_path(&commit);
    let mut files = Vec::new();
    walk(&root, "", 0, &mut files);
    if files.is_empty() {
        return Err(nothing());
    }
    files.sort_by(|a: &RepoFile, b| a.path.cmp(&b.path));
    Ok(Repo {
        id: id.to_owned(),
        commit,
        files,
    })
}

/// Path of `file` of `repo` in the cache, if it is there with the right length.
pub(crate) fn file(settings: &Settings, repo: &Repo, file: &RepoFile) -> Option<PathBuf> {
    let folder = cached(settings, &repo.id, &repo.commit)?;
    let path = folder.pointer_path(&repo.commit).join(&file.path);
    let found = fs::metadata(&path).ok()?;
    (found.is_file() && Some(found.len()) == file.bytes).then_some(path)
}

fn cached(settings: &Settings, id: &str, revision: &str) -> Option<CacheRepo> {
    let cache = settings.cache.as_ref()?;
    let (id, commit) = (id.to_owned(), revision.to_owned());
    let repo = hf_hub::Repo::with_revision(id, RepoType::Model, commit);
    // It becomes a path.
    is_sound(revision).then(|| cache.repo(repo))
}

fn walk(folder: &Path, prefix: &str, depth: usize, files: &mut Vec<RepoFile>) {
    let Ok(items) = fs::read_dir(folder) else {
        return;
    };
    for item in items.flatten() {
        let Ok(name) = item.file_name().into_string() else {
            continue;
        };
        let path = match prefix {
            "" => name,
            prefix => format!("{prefix}/{name}"),
        };
        let Ok(found) = fs::metadata(item.path()) else {
            continue;
        };
        if found.is_dir() && depth < MAX_DEPTH {
            walk(&item.path(), &path, depth + 1, files);
        } else if found.is_file() && is_sound(&path) && files.len() < MAX_FILES {
            // It is a link to a blob, which is called by its entity tag.
            let blob = fs::read_link(item.path()).unwrap_or_default();
            let blob = blob.file_name().unwrap_or_default().to_string_lossy();
            files.push(RepoFile {
                path,
                bytes: Some(found.len()),
                sha256: blob.parse().ok(),
                blob_id: (blob.len() == 40 && is_hash(&blob)).then(|| blob.into_owned()),
            });
        }
    }
}
