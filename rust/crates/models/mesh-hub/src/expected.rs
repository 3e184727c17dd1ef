//! The hub's description of a model, to compare bytes from elsewhere with.

use mesh_store::{Manifest, ManifestFile};

use crate::client::Hub;
use crate::error::HubError;
use crate::listing::RepoFile;
use crate::name::HubName;
use crate::pull::{chosen, git_blob_id};
use crate::watch::Watch;

/// The files of a model at one commit of its repository, with their lengths and digests. A few kilobytes tell
/// it, none of the weights are needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Name of the model in the store, independent of its source.
    pub name: String,
    /// Repository name as the hub spells it.
    pub repo: String,
    /// Commit of the repository.
    pub commit: String,
    files: Vec<RepoFile>,
}

/// A file of a manifest for which the hub lists git's id but no SHA-256, so that its content must be
/// examined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unchecked {
    /// Index in [`Manifest::files`].
    pub file: u32,
    blob_id: String,
}

impl Hub {
    /// The model that `name` refers to on the hub now.
    ///
    /// # Errors
    /// If the hub cannot be asked, does not say, or has nothing of that name.
    pub async fn expected(&self, name: &HubName, watch: &dyn Watch) -> Result<Expected, HubError> {
        let repo = self.open(&name.repo, name.revision(), watch).await?;
        let chosen = chosen(self, &repo, name, watch).await?;
        Ok(Expected {
            files: chosen.files().cloned().collect(),
            name: chosen.name,
            repo: repo.id,
            commit: repo.commit,
        })
    }
}

impl Expected {
    /// Compares a manifest with it: the same name, the same files, of the same lengths and digests, no more
    /// and no fewer. Gives the files whose contents have to be compared, too, see [`Unchecked::is`].
    ///
    /// # Errors
    /// The first difference, as a message.
    pub fn check(&self, manifest: &Manifest) -> Result<Vec<Unchecked>, String> {
        if manifest.name != self.name {
            let (found, wanted) = (&manifest.name, &self.name);
            return Err(format!("it is called {found:?}, and the hub's {wanted:?}"));
        }
        let known = |path: &str| self.files.iter().find(|file| file.path == path);
        let mut unchecked = Vec::new();
        for (index, file) in (0..).zip(&manifest.files) {
            let listed = known(&file.path)
                .ok_or_else(|| format!("the hub's model has no file {:?}", file.path))?;
            unchecked.extend(compare(index, file, listed)?);
        }
        let has = |path: &str| manifest.files.iter().any(|file| file.path == path);
        match self.files.iter().find(|file| !has(&file.path)) {
            Some(missing) => Err(format!("it lacks the hub's file {:?}", missing.path)),
            None => Ok(unchecked),
        }
    }
}

fn compare(
    index: u32,
    file: &ManifestFile,
    listed: &RepoFile,
) -> Result<Option<Unchecked>, String> {
    let ManifestFile { path, bytes, .. } = file;
    if listed.bytes != Some(*bytes) {
        let wanted = listed.bytes.map(|bytes| bytes.to_string());
        let wanted = wanted.unwrap_or_else(|| "unknown".to_owned());
        return Err(format!(
            "its {path:?} has {bytes} bytes, and the hub's {wanted}"
        ));
    }
    match (&listed.sha256, &listed.blob_id) {
        (Some(sha256), _) if *sha256 == file.sha256 => Ok(None),
        (Some(sha256), _) => {
            let (found, wanted) = (file.sha256.short(), sha256.short());
            Err(format!(
                "SHA-256 of its {path:?} is {found}, and of the hub's {wanted}"
            ))
        }
        (None, Some(id)) if id.len() == SHA1_DIGITS => Ok(Some(Unchecked {
            file: index,
            blob_id: id.clone(),
        })),
        (None, _) => Err(format!(
            "the hub tells no digest of {path:?} that can be compared"
        )),
    }
}

impl Unchecked {
    /// True if `content` has the git id that the hub lists.
    pub fn is(&self, content: &[u8]) -> bool {
        git_blob_id(content).eq_ignore_ascii_case(&self.blob_id)
    }
}

/// Digits of git's ids, but for repositories that hash with SHA-256.
const SHA1_DIGITS: usize = 40;

#[cfg(test)]
mod tests {
    use mesh_store::Digest;

    use super::*;

    fn manifest(files: &[(&str, &[u8])]) -> Manifest {
        let folder = tempfile::tempdir().unwrap();
        let mut paths = Vec::new();
        for (path, content) in files {
            std::fs::write(folder.path().join(path), content).unwrap();
            paths.push(path.into());
        }
        Manifest::of_files("tiny", folder.path(), &paths, &|_| ()).unwrap()
    }

    fn listed(path: &str, content: &[u8], large: bool) -> RepoFile {
        RepoFile {
            path: path.to_owned(),
            bytes: Some(content.len() as u64),
            sha256: large.then(|| Digest::of(content)),
            blob_id: (!large).then(|| git_blob_id(content)),
        }
    }

    #[test]
    fn a_manifest_is_the_hubs_only_if_every_file_is() {
        let expected = Expected {
            name: "tiny".into(),
            repo: "acme/tiny".into(),
            commit: "0".repeat(40),
            files: vec![
                listed("config.json", b"{}", false),
                listed("weights.bin", b"12345678", true),
            ],
        };
        let check = |files: &[(&str, &[u8])]| expected.check(&manifest(files));
        let unchecked = check(&[("config.json", b"{}"), ("weights.bin", b"12345678")]).unwrap();
        assert_eq!(unchecked.len(), 1);
        assert!(unchecked[0].is(b"{}") && !unchecked[0].is(b"[]"));
        // As long as the hub's, and only told apart by the content.
        let altered = check(&[("config.json", b"[]"), ("weights.bin", b"12345678")]).unwrap();
        assert!(!altered[0].is(b"[]"));
        for (files, why) in [
            (
                &[("config.json", &b"{}"[..]), ("weights.bin", b"12345679")][..],
                "SHA-256",
            ),
            (&[("config.json", b"{}"), ("weights.bin", b"123")], "bytes"),
            (&[("weights.bin", b"12345678")], "lacks"),
            (
                &[
                    ("chat.jinja", b"x"),
                    ("config.json", b"{}"),
                    ("weights.bin", b"12345678"),
                ],
                "no file",
            ),
        ] {
            let error = check(files).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        let mut other = manifest(&[("config.json", b"{}"), ("weights.bin", b"12345678")]);
        other.name = "gpt".into();
        assert!(expected.check(&other).unwrap_err().contains("called"));
        let sha256_repo = Expected {
            files: vec![RepoFile {
                blob_id: Some("a".repeat(64)),
                ..listed("config.json", b"{}", false)
            }],
            ..expected.clone()
        };
        let error = sha256_repo
            .check(&manifest(&[("config.json", b"{}")]))
            .unwrap_err();
        assert!(error.contains("no digest"), "{error}");
    }
}
