//! Names of models on the hub.

use std::fmt;
use std::str::FromStr;

use mesh_store::names::{HUB_HOSTS, without_hub};

use crate::error::HubError;

/// A model on the hub: repository, revision, and which of its files.
///
/// `ORGANISATION/MODEL`, behind it `@REVISION` and `:WHICH`, the latter being a quantisation (`Q4_K_M`) or
/// the path of a file (`model-Q4_K_M.gguf`). `ORGANISATION/MODEL/FILE` is taken, too. `hf.co/`,
/// `huggingface.co/` and `https://…` before it are taken, too, as are addresses of a repository's pages
/// (`…/tree/REVISION`, `…/blob/REVISION/FILE`, `…/resolve/REVISION/FILE`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    /// Repository: `organisation/model`.
    pub repo: String,
    /// A branch, tag or commit; none is `main`.
    pub revision: Option<String>,
    /// A quantisation or a file.
    pub which: Option<String>,
}

const MAX_PART: usize = 96;
const MAX_REVISION: usize = 255;
const MAX_PATH: usize = 1024;

impl HubName {
    /// The revision to ask for.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

impl FromStr for HubName {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, HubError> {
        let failed = |reason| HubError::Name {
            name: text.chars().take(200).collect(),
            reason,
        };
        let (rest, on_hub) = without_hub(text);
        if !on_hub && rest.len() != text.len() {
            return Err(failed("another host is set with HF_ENDPOINT"));
        }
        let rest = rest.trim_end_matches('/');

        let plain = |model: &str| !model.contains(['@', ':']);
        let owned = |text: Option<&str>| text.map(str::to_owned);
        let named = |repo: String, revision, which| HubName {
            repo,
            revision: owned(revision),
            which: owned(which),
        };
        let mut name = match rest.splitn(4, '/').collect::<Vec<_>>()[..] {
            [org, model] => named(format!("{org}/{model}"), None, None),
            // A revision with slashes cannot be told from a path in an address; everywhere else it can.
            [org, model, "tree", revision] if on_hub && plain(model) => {
                named(format!("{org}/{model}"), Some(revision), None)
            }
            [org, model, "blob" | "resolve", page] if on_hub && plain(model) => {
                let (revision, path) = page
                    .split_once('/')
                    .ok_or_else(|| failed("the address of a file lacks its path"))?;
                let path = path.split(['?', '#']).next();
                named(format!("{org}/{model}"), Some(revision), path)
            }
            [org, model, ..] => {
                let behind = &rest[org.len() + 1..];
                // Slashes may stand in a revision or in a file's path, behind the model.
                match behind.split_once('/') {
                    Some((_, file)) if plain(model) && plain(file) => {
                        named(format!("{org}/{model}"), None, Some(file))
                    }
                    _ => named(format!("{org}/{behind}"), None, None),
                }
            }
            _ => return Err(failed("it has no organisation")),
        };
        for (mark, part) in [(':', &mut name.which), ('@', &mut name.revision)] {
            if let Some((before, behind)) = name.repo.split_once(mark) {
                *part = Some(behind.to_owned());
                name.repo = before.to_owned();
            }
        }

        let part = |part: &str| {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            !part.is_empty()
                && part.len() <= MAX_PART
                && part.bytes().all(allowed)
                && !part.starts_with(['.', '-'])
                && !part.contains("..")
        };
        let sound = name.repo.split('/').all(part) && name.repo.split('/').count() == 2;
        if !sound {
            return Err(failed(
                "organisation and model consist of letters, digits, '-', '_' and '.'",
            ));
        }
        // Printed and read again it would be the hub's address.
        if HUB_HOSTS.contains(&name.repo.split('/').next().unwrap_or_default()) {
            return Err(failed("the hub's address stands in it twice"));
        }
        let clean = |text: &str, limit| {
            !text.is_empty() && text.len() <= limit && !text.chars().any(char::is_control)
        };
        let is_bad =
            |part: &Option<String>, limit| part.as_ref().is_some_and(|part| !clean(part, limit));
        if is_bad(&name.revision, MAX_REVISION) {
            return Err(failed("the revision behind '@' is empty or too long"));
        }
        if is_bad(&name.which, MAX_PATH) {
            return Err(failed("what stands behind ':' is empty or too long"));
        }
        Ok(name)
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repo)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        if let Some(which) = &self.which {
            write!(f, ":{which}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parts(text: &str) -> (String, Option<String>, Option<String>) {
        let name: HubName = text.parse().unwrap_or_else(|error| panic!("{error}"));
        (name.repo, name.revision, name.which)
    }

    #[test]
    fn an_address_within_an_address_is_refused() {
        for text in ["hf.co/hf.co/a/b", "hf:huggingface.co/a", "hf.co/hf.co/a"] {
            let error = text.parse::<HubName>().unwrap_err();
            assert!(error.to_string().contains("twice"), "{error}");
        }
    }

    #[test]
    fn what_people_paste_is_understood() {
        let some = |text: &str| Some(text.to_owned());
        let repo = "Qwen/Qwen3-0.6B".to_owned();
        for (text, revision, which) in [
            ("Qwen/Qwen3-0.6B", None, None),
            ("hf.co/Qwen/Qwen3-0.6B", None, None),
            ("https://huggingface.co/Qwen/Qwen3-0.6B/", None, None),
            ("Qwen/Qwen3-0.6B:Q4_K_M", None, some("Q4_K_M")),
            ("Qwen/Qwen3-0.6B@v1.0", some("v1.0"), None),
            (
                "Qwen/Qwen3-0.6B@refs/pr/3:Q8_0",
                some("refs/pr/3"),
                some("Q8_0"),
            ),
            ("Qwen/Qwen3-0.6B:a/b.gguf", None, some("a/b.gguf")),
            ("Qwen/Qwen3-0.6B/a/b.gguf", None, some("a/b.gguf")),
            (
                "https://huggingface.co/Qwen/Qwen3-0.6B/tree/dev",
                some("dev"),
                None,
            ),
            (
                "https://huggingface.co/Qwen/Qwen3-0.6B/resolve/main/a/b.gguf?download=true",
                some("main"),
                some("a/b.gguf"),
            ),
        ] {
            assert_eq!(parts(text), (repo.clone(), revision, which), "{text}");
        }
    }

    #[test]
    fn other_text_is_refused_with_its_reason() {
        for text in [
            "",
            "qwen2.5:7b",
            "a/b/c:d",
            "a/",
            "/b",
            "../etc",
            "a/..",
            "a/b@",
            "a/b:",
            "a b/c",
            "https://example.org/a/b",
            "/srv/models/a.gguf",
            "a/b@x\ny",
        ] {
            let error = text.parse::<HubName>().expect_err(text).to_string();
            assert!(error.contains("ORGANISATION/MODEL"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn a_name_reads_back_as_it_is_written(text in ".{0,60}", plain in "[a-z]{1,4}/[a-z]{1,4}(@[a-z/]{1,5})?(:[a-z/@:]{1,5})?") {
            for text in [text, plain] {
                if let Ok(name) = text.parse::<HubName>() {
                    prop_assert_eq!(name.to_string().parse::<HubName>().unwrap(), name);
                }
            }
        }
    }
}
