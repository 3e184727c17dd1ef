//! The hub's repositories: commits, branches, files with their hashes.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use aws_lc_rs::digest::{self, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use bytes::Bytes;
use data_encoding::HEXLOWER;

/// Files at least this large are stored as large files.
const LARGE: u64 = 64 << 10;

/// Visibility of a repository and its files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Access {
    /// Anybody may see it and read its files.
    #[default]
    Public,
    /// Only tokens that were admitted to it; to others it does not exist.
    Private,
    /// Everybody may see it; only tokens that were admitted to it, having accepted its licence, read its files.
    Gated,
}

/// The bytes of a file.
#[derive(Debug, Clone)]
pub(super) enum Content {
    Memory(Bytes),
    Disk(Arc<File>, u64),
}

impl Content {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let bytes = file.metadata()?.len();
        Ok(Content::Disk(Arc::new(file), bytes))
    }

    pub(super) fn len(&self) -> u64 {
        match self {
            Content::Memory(bytes) => bytes.len() as u64,
            Content::Disk(_, bytes) => *bytes,
        }
    }

    /// `len` bytes from `at`, which lie within.
    pub(super) fn read(&self, at: u64, len: usize) -> io::Result<Bytes> {
        match self {
            Content::Memory(bytes) => Ok(bytes.slice(at as usize..at as usize + len)),
            Content::Disk(file, _) => {
                let mut buffer = vec![0; len];
                file.read_exact_at(&mut buffer, at)?;
                Ok(buffer.into())
            }
        }
    }

    fn feed(&self, digest: &mut digest::Context) {
        let mut at = 0;
        while at < self.len() {
            let len = (self.len() - at).min(1 << 20) as usize;
            digest.update(&self.read(at, len).expect("a file that was just opened"));
            at += len as u64;
        }
    }
}

/// A file of a commit.
#[derive(Debug, Clone)]
pub(super) struct StoredFile {
    pub(super) content: Content,
    /// SHA-1 of git's blob: of the content, or of the pointer that stands in git for a large file.
    pub(super) blob_id: String,
    /// SHA-256 of a large file; `None` for small ones.
    pub(super) sha256: Option<String>,
    pub(super) pointer_bytes: usize,
}

impl StoredFile {
    fn new(path: &str, content: Content) -> Self {
        let large = content.len() >= LARGE
            || [".gguf", ".safetensors"]
                .iter()
                .any(|end| path.ends_with(end));
        if !large {
            let mut digest = digest::Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
            digest.update(format!("blob {}\0", content.len()).as_bytes());
            content.feed(&mut digest);
            return Self {
                blob_id: HEXLOWER.encode(digest.finish().as_ref()),
                content,
                sha256: None,
                pointer_bytes: 0,
            };
        }
        let mut digest = digest::Context::new(&SHA256);
        content.feed(&mut digest);
        let sha256 = HEXLOWER.encode(digest.finish().as_ref());
        let pointer = format!(
            "version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {}\n",
            content.len()
        );
        Self {
            blob_id: git_blob_id(pointer.as_bytes()),
            content,
            sha256: Some(sha256),
            pointer_bytes: pointer.len(),
        }
    }

    /// Value of `ETag` or `X-Linked-Etag`.
    pub(super) fn etag(&self) -> &str {
        self.sha256.as_deref().unwrap_or(&self.blob_id)
    }
}

pub(super) type Files = BTreeMap<String, StoredFile>;

#[derive(Debug, Default)]
pub(super) struct Repo {
    pub(super) access: Access,
    commits: HashMap<String, Arc<Files>>,
    /// Commit of each branch and tag.
    names: HashMap<String, String>,
}

impl Repo {
    /// The commit that a revision means, and its files.
    pub(super) fn at(&self, revision: &str) -> Option<(String, Arc<Files>)> {
        let commit = self
            .names
            .get(revision)
            .map_or(revision, |commit| commit.as_str());
        Some((commit.to_owned(), self.commits.get(commit)?.clone()))
    }
}

#[derive(Debug, Default)]
pub(super) struct Repos {
    repos: HashMap<String, Repo>,
    renamed: HashMap<String, String>,
    /// Large files by SHA-256, with the path they were published under.
    large: HashMap<String, (String, StoredFile)>,
}

impl Repos {
    pub(super) fn publish(&mut self, id: &str, files: Vec<(&str, Content)>) -> String {
        let repo = self.repos.entry(id.to_owned()).or_default();
        let mut digest = digest::Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
        digest.update(format!("{id} {}", repo.commits.len()).as_bytes());
        let mut stored = Files::new();
        for (path, content) in files {
            let file = StoredFile::new(path, content);
            digest.update(path.as_bytes());
            digest.update(file.blob_id.as_bytes());
            if let Some(sha256) = &file.sha256 {
                self.large
                    .insert(sha256.clone(), (path.to_owned(), file.clone()));
            }
            stored.insert(path.to_owned(), file);
        }
        let commit = HEXLOWER.encode(digest.finish().as_ref());
        repo.commits.insert(commit.clone(), Arc::new(stored));
        repo.names.insert("main".to_owned(), commit.clone());
        commit
    }

    pub(super) fn point(&mut self, id: &str, name: &str, commit: &str) {
        let repo = self.repos.get_mut(id).expect("a published repository");
        repo.names.insert(name.to_owned(), commit.to_owned());
    }

    pub(super) fn rename(&mut self, old: &str, new: &str) {
        if let Some(repo) = self.repos.remove(old) {
            self.repos.insert(new.to_owned(), repo);
        }
        self.renamed.insert(old.to_owned(), new.to_owned());
    }

    pub(super) fn restrict(&mut self, id: &str, access: Access) {
        let repo = self.repos.get_mut(id).expect("a published repository");
        repo.access = access;
    }

    pub(super) fn get(&self, id: &str) -> Option<&Repo> {
        self.repos.get(id)
    }

    /// The name that a repository has by now.
    pub(super) fn renamed(&self, id: &str) -> Option<&str> {
        self.renamed.get(id).map(String::as_str)
    }

    pub(super) fn large(&self, sha256: &str) -> Option<&(String, StoredFile)> {
        self.large.get(sha256)
    }
}

fn git_blob_id(content: &[u8]) -> String {
    let mut digest = digest::Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
    digest.update(format!("blob {}\0", content.len()).as_bytes());
    digest.update(content);
    HEXLOWER.encode(digest.finish().as_ref())
}
