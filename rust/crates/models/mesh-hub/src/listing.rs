//! The files of a repository.

use mesh_store::Digest;
use serde::Deserialize;

/// A repository at one commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repo {
    /// `organisation/model`, as the hub spells it.
    pub id: String,
    /// The commit that the revision meant when it was asked for.
    pub commit: String,
    /// All its files, by path.
    pub files: Vec<RepoFile>,
}

/// A file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepoFile {
    /// Relative to the repository, with `/` between the parts; it does not lead out of it.
    pub path: String,
    /// Length in bytes; see [`Hub::complete`] for hubs that do not list it.
    pub bytes: Option<u64>,
    /// SHA-256, which the hub knows of large files.
    pub sha256: Option<Digest>,
    /// Git's id of the blob (SHA-1 in hexadecimal), which it knows of all others.
    pub blob_id: Option<String>,
}

impl Repo {
    /// Reads what `GET /api/models/{id}/revision/{revision}?blobs=true` answers; `asked` is the id that was
    /// asked for.
    ///
    /// # Errors
    /// If it names no commit, or a file that leads out of the repository: as a message.
    pub fn parse(json: &[u8], asked: &str) -> Result<Self, String> {
        let listing: Listing = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        listing.repo(asked)
    }

    /// The file at `path`.
    pub fn file(&self, path: &str) -> Option<&RepoFile> {
        self.files.iter().find(|file| file.path == path)
    }
}

impl RepoFile {
    /// Entity tag that the hub gives for the file.
    pub(crate) fn etag(&self) -> Option<String> {
        match &self.sha256 {
            Some(sha256) => Some(sha256.to_string()),
            None => self.blob_id.clone(),
        }
    }
}

const MAX_FILES: usize = 100_000;
const MAX_PATH: usize = 1024;

/// Answer to `GET /api/models/{id}/revision/{revision}?blobs=true`; its other fields are ignored.
#[derive(Debug, Deserialize)]
struct Listing {
    #[serde(default)]
    id: Option<String>,
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Debug, Deserialize)]
struct Sibling {
    rfilename: String,
    #[serde(default)]
    size: Option<u64>,
    #[serde(default, rename = "blobId")]
    blob_id: Option<String>,
    #[serde(default)]
    lfs: Option<Large>,
}

#[derive(Debug, Deserialize)]
struct Large {
    #[serde(default, alias = "oid")]
    sha256: Option<String>,
    #[serde(default)]
    size: Option<u64>,
}

impl Listing {
    fn repo(self, asked: &str) -> Result<Repo, String> {
        if !is_hash(&self.sha) {
            return Err("it names no commit".to_owned());
        }
        if self.siblings.len() > MAX_FILES {
            return Err(format!("it lists more than {MAX_FILES} files"));
        }
        let mut files = Vec::with_capacity(self.siblings.len());
        for sibling in self.siblings {
            let path = sibling.rfilename;
            if !is_sound(&path) {
                let shown: String = path.chars().take(100).collect();
                return Err(format!(
                    "it lists the file {shown:?}, which leads elsewhere"
                ));
            }
            let large = sibling.lfs;
            let sha256 = large.as_ref().and_then(|large| large.sha256.as_ref());
            files.push(RepoFile {
                bytes: large.as_ref().and_then(|large| large.size).or(sibling.size),
                sha256: sha256.and_then(|sha256| sha256.parse().ok()),
                // Of a large file it is the pointer's.
                blob_id: sibling.blob_id.filter(|id| large.is_none() && is_hash(id)),
                path,
            });
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        files.dedup_by(|a, b| a.path == b.path);
        // After a rename the hub returns the new name. Anything that is not a valid name is ignored.
        let id = self.id.filter(|id| {
            id.parse::<crate::HubName>()
                .is_ok_and(|name| name.repo == *id)
        });
        Ok(Repo {
            id: id.unwrap_or_else(|| asked.to_owned()),
            commit: self.sha,
            files,
        })
    }
}

/// True if a path stays within the folder it is put in.
pub(crate) fn is_sound(path: &str) -> bool {
    let part = |part: &str| !matches!(part, "" | "." | "..") && part.len() <= 255;
    path.len() <= MAX_PATH
        && path.split('/').all(part)
        && !path.contains(['\\', '\0'])
        && !path.chars().any(char::is_control)
}

pub(crate) fn is_hash(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        for path in ["config.json", "1_Pooling/config.json", "a b/ü.gguf"] {
            assert!(is_sound(path), "{path}");
        }
        for path in [
            "",
            "/etc/passwd",
            "../x",
            "a/../b",
            "a//b",
            "a\\b",
            "a\0",
            "./a",
            "a/",
        ] {
            assert!(!is_sound(path), "{path:?}");
        }
    }

    #[test]
    fn a_listing_is_read_with_what_is_known_of_its_files() {
        let commit = "0".repeat(40);
        let sha256 = "a".repeat(64);
        let json = format!(
            r#"{{"id":"acme/Tiny","sha":"{commit}","siblings":[
                {{"rfilename":"b.gguf","size":134,"blobId":"{commit}","lfs":{{"sha256":"{sha256}","size":5000000000,"pointerSize":134}}}},
                {{"rfilename":"a.json","size":7,"blobId":"{commit}"}},
                {{"rfilename":"bare"}}],"tags":[1,null]}}"#
        );
        let repo = Repo::parse(json.as_bytes(), "acme/tiny").unwrap();
        assert_eq!((&*repo.id, &repo.commit), ("acme/Tiny", &commit));
        let file = |path| repo.file(path).unwrap();
        assert_eq!(file("b.gguf").bytes, Some(5_000_000_000));
        assert_eq!(file("b.gguf").etag(), Some(sha256));
        assert_eq!(
            (file("a.json").bytes, file("a.json").etag()),
            (Some(7), Some(commit.clone()))
        );
        assert_eq!((file("bare").bytes, file("bare").etag()), (None, None));
        for bad in [
            r#"{"siblings":[]}"#.to_owned(),
            r#"{"sha":"main","siblings":[]}"#.to_owned(),
            format!(r#"{{"sha":"{commit}","siblings":[{{"rfilename":"../../x"}}]}}"#),
            format!(r#"{{"sha":"{commit}","siblings":[{{"rfilename":"x","size":-1}}]}}"#),
            format!(r#"{{"sha":"{commit}","siblings":{}"#, "[".repeat(100_000)),
        ] {
            assert!(
                Repo::parse(bad.as_bytes(), "acme/tiny").is_err(),
                "{bad:.80}"
            );
        }
        // Invalid names are ignored; the requested name is used.
        let json = format!(r#"{{"id":"../../admin","sha":"{commit}"}}"#);
        assert_eq!(
            Repo::parse(json.as_bytes(), "acme/tiny").unwrap().id,
            "acme/tiny"
        );
    }
}
