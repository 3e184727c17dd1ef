//! Errors between this machine and the hub, with their remedies.

use std::path::PathBuf;
use std::time::Duration;

use mesh_store::StoreError;

/// Errors of fetching from the hub. No message contains a token.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum HubError {
    /// The text is not the name of a model on the hub.
    #[error(
        "{name:?} does not name a model of the hub: {reason}; write ORGANISATION/MODEL, behind it @REVISION and :QUANTISATION where \
         they are wanted, such as Qwen/Qwen3-0.6B-GGUF:Q8_0"
    )]
    Name { name: String, reason: &'static str },
    /// A setting has an invalid value.
    #[error("{name} is {value:?}, which is {reason}")]
    Setting {
        name: &'static str,
        value: String,
        reason: &'static str,
    },
    /// The file with the token cannot be read.
    #[error("cannot read the hub's token from {}: {source}; correct {setting}, or take it away to go without a token", path.display())]
    TokenFile {
        setting: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    /// `HF_HUB_OFFLINE` is set.
    #[error(
        "{what} is not on this machine, and HF_HUB_OFFLINE forbids to fetch it; unset that to allow it"
    )]
    Offline { what: String },
    /// The repository does not exist, or is not visible without a token.
    #[error(
        "the hub shows no model {repo} to somebody without a token; check the name at {url}. If it is private, set HF_TOKEN (or \
         HF_TOKEN_FILE) to a token that may read it; tokens are made at {tokens_url}"
    )]
    NotFoundWithoutToken {
        repo: String,
        url: String,
        tokens_url: String,
    },
    /// The repository does not exist, or is not visible with the token.
    #[error(
        "the hub has no model {repo}, or the token from {token} may not see it; check the name at {url}, and what the token may \
         read at {tokens_url}"
    )]
    NotFound {
        repo: String,
        token: String,
        url: String,
        tokens_url: String,
    },
    /// The token is not valid.
    #[error(
        "the hub does not accept the token from {token}: it is mistyped, expired or revoked; make a new one at {tokens_url}"
    )]
    BadToken { token: String, tokens_url: String },
    /// The model is gated, and no token is set.
    #[error(
        "{repo} is given only to those who have accepted its licence: log in at {url}, accept it there, then set HF_TOKEN (or \
         HF_TOKEN_FILE) to a token with read access, made at {tokens_url}"
    )]
    GatedWithoutToken {
        repo: String,
        url: String,
        tokens_url: String,
    },
    /// The model is gated, and the token's account has not been admitted.
    #[error(
        "{repo} is given only to those who have accepted its licence, and the account of the token from {token} has not: open {url} with \
         that account, accept the licence, and try again (some owners answer by hand; a fine-grained token needs the right to \
         read public gated repositories, at {tokens_url})"
    )]
    LicenceNotAccepted {
        repo: String,
        token: String,
        url: String,
        tokens_url: String,
    },
    /// The hub refused for another reason.
    #[error(
        "the hub refuses {what} to the token from {token} (403): {message}; see what the token may do at {tokens_url}"
    )]
    Forbidden {
        what: String,
        token: String,
        message: String,
        tokens_url: String,
    },
    /// The repository has no such branch, tag or commit.
    #[error(
        "{repo} has no revision {revision:?}; its branches, tags and commits are listed at {url}"
    )]
    NoRevision {
        repo: String,
        revision: String,
        url: String,
    },
    /// The repository has no such file.
    #[error("{repo} has no file {path:?} at revision {revision}; its files are listed at {url}")]
    NoFile {
        repo: String,
        revision: String,
        path: String,
        url: String,
    },
    /// The hub limits the rate of requests for longer than we wait.
    #[error(
        "the hub limits the rate of requests and asks to wait {}; try again then, or set HF_TOKEN: requests with a token have a higher limit",
        wait(*.retry_after)
    )]
    RateLimited {
        /// Pause that the hub asked for, if any.
        retry_after: Option<Duration>,
    },
    /// The server does not answer, or breaks off, in all attempts.
    #[error(
        "{url} cannot be reached or breaks off ({reason}), {attempts} times in a row; what was fetched is kept: check the network and try again"
    )]
    Unreachable {
        url: String,
        reason: String,
        attempts: u32,
    },
    /// An HTTP status that has no error of its own here.
    #[error("{url} answers with status {status}: {message}")]
    Status {
        url: String,
        status: u16,
        message: String,
    },
    /// The answer is invalid.
    #[error(
        "{url} gives an answer that makes no sense: {reason}; is HF_ENDPOINT right, and no proxy in between?"
    )]
    Answer { url: String, reason: String },
    /// The file changed while it was fetched.
    #[error(
        "{path} of {repo} is another file than it was when the fetch began ({reason}); run the command again"
    )]
    Changed {
        repo: String,
        path: String,
        reason: String,
    },
    /// The bytes do not have the digest that the hub lists.
    #[error(
        "{path} of {repo} arrived damaged: its {kind} is {found}, {wanted} was expected; what was fetched of it is thrown away, run the command again"
    )]
    Damaged {
        repo: String,
        path: String,
        kind: &'static str,
        found: String,
        wanted: String,
    },
    /// No files of the repository fit the request.
    #[error("{repo}: {reason}")]
    Choice {
        repo: String,
        /// Files that exist, and names to use instead.
        reason: String,
    },
    /// A model file with an invalid header.
    #[error("{path} of {repo}: {reason}")]
    Header {
        repo: String,
        path: String,
        reason: String,
    },
    /// The fetched bytes cannot be written.
    #[error("cannot write {what}: {source}")]
    Write {
        what: String,
        source: std::io::Error,
    },
    /// A file in the cache of other programs cannot be read.
    #[error("cannot read {}: {source}; remove it from the hub's cache to have it fetched", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    /// An error of the store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// This machine cannot speak TLS: no root certificates, for instance.
    #[error(
        "cannot set up HTTPS: {reason}; are root certificates installed (package ca-certificates, or SSL_CERT_FILE)?"
    )]
    Tls { reason: String },
}

impl HubError {
    /// The error for a model file with an invalid header.
    pub(crate) fn header(repo: &str, path: &str, reason: String) -> Self {
        HubError::Header {
            repo: repo.to_owned(),
            path: path.to_owned(),
            reason,
        }
    }

    /// True if a key or a licence is missing.
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            HubError::NotFoundWithoutToken { .. }
                | HubError::BadToken { .. }
                | HubError::GatedWithoutToken { .. }
                | HubError::LicenceNotAccepted { .. }
                | HubError::Forbidden { .. }
        )
    }
}

fn wait(retry_after: Option<Duration>) -> String {
    match retry_after {
        Some(wait) => format!("{} s", wait.as_secs()),
        None => "some minutes".to_owned(),
    }
}

pub(crate) fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
