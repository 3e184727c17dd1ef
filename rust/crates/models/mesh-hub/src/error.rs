//! What can go wrong between here and the hub, and what to do about it.

use std::path::PathBuf;
use std::time::Duration;

use mesh_store::StoreError;

/// Why the hub did not give what was wanted. No message holds a token.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// Not the name of a model on the hub.
    #[error(
        "{name:?} does not name a model of the hub: {reason}; write ORGANISATION/MODEL, behind it @REVISION and :QUANTISATION where \
         they are wanted, such as Qwen/Qwen3-0.6B-GGUF:Q8_0"
    )]
    Name {
        /// What was written.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A setting that makes no sense.
    #[error("{name} is {value:?}, which is {reason}")]
    Setting {
        /// The environment variable.
        name: &'static str,
        /// What it is set to.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The file with the token cannot be read.
    #[error("cannot read the hub's token from {}: {source}; correct {setting}, or take it away to go without a token", path.display())]
    TokenFile {
        /// The environment variable that names it.
        setting: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// `HF_HUB_OFFLINE` is set.
    #[error(
        "{what} is not on this machine, and HF_HUB_OFFLINE forbids to fetch it; unset that to allow it"
    )]
    Offline {
        /// What was wanted.
        what: String,
    },
    /// No such repository, as far as one without a token can see.
    #[error(
        "the hub shows no model {repo} to somebody without a token; check the name at {url}. If it is private, set HF_TOKEN (or \
         HF_TOKEN_FILE) to a token that may read it; tokens are made at {tokens_url}"
    )]
    NotFoundWithoutToken {
        /// The repository.
        repo: String,
        /// Its page.
        url: String,
        /// Where tokens are made.
        tokens_url: String,
    },
    /// No such repository, as far as the token can see.
    #[error(
        "the hub has no model {repo}, or the token from {token} may not see it; check the name at {url}, and what the token may \
         read at {tokens_url}"
    )]
    NotFound {
        /// The repository.
        repo: String,
        /// Where the token came from.
        token: String,
        /// Its page.
        url: String,
        /// Where tokens are made.
        tokens_url: String,
    },
    /// The token is not valid.
    #[error(
        "the hub does not accept the token from {token}: it is mistyped, expired or revoked; make a new one at {tokens_url}"
    )]
    BadToken {
        /// Where the token came from.
        token: String,
        /// Where tokens are made.
        tokens_url: String,
    },
    /// A gated model, and no token.
    #[error(
        "{repo} is given only to those who have accepted its licence: log in at {url}, accept it there, then set HF_TOKEN (or \
         HF_TOKEN_FILE) to a token with read access, made at {tokens_url}"
    )]
    GatedWithoutToken {
        /// The repository.
        repo: String,
        /// Where the licence is accepted.
        url: String,
        /// Where tokens are made.
        tokens_url: String,
    },
    /// A gated model, and the token's account has not been let in.
    #[error(
        "{repo} is given only to those who have accepted its licence, and the account of the token from {token} has not: open {url} with \
         that account, accept the licence, and try again (some owners answer by hand; a fine-grained token needs the right to \
         read public gated repositories, at {tokens_url})"
    )]
    LicenceNotAccepted {
        /// The repository.
        repo: String,
        /// Where the token came from.
        token: String,
        /// Where the licence is accepted.
        url: String,
        /// Where tokens are made.
        tokens_url: String,
    },
    /// Forbidden for another reason.
    #[error(
        "the hub refuses {what} to the token from {token} (403): {message}; see what the token may do at {tokens_url}"
    )]
    Forbidden {
        /// What was asked for.
        what: String,
        /// Where the token came from.
        token: String,
        /// What the hub said.
        message: String,
        /// Where tokens are made.
        tokens_url: String,
    },
    /// No such branch, tag or commit.
    #[error(
        "{repo} has no revision {revision:?}; its branches, tags and commits are listed at {url}"
    )]
    NoRevision {
        /// The repository.
        repo: String,
        /// What was asked for.
        revision: String,
        /// Where they are listed.
        url: String,
    },
    /// No such file.
    #[error("{repo} has no file {path:?} at revision {revision}; its files are listed at {url}")]
    NoFile {
        /// The repository.
        repo: String,
        /// The commit.
        revision: String,
        /// What was asked for.
        path: String,
        /// Where they are listed.
        url: String,
    },
    /// Too many requests, for longer than we wait.
    #[error(
        "the hub limits the rate of requests and asks to wait {}; try again then, or set HF_TOKEN: requests with a token have a higher limit",
        wait(*.retry_after)
    )]
    RateLimited {
        /// What it asked to wait, if it said so.
        retry_after: Option<Duration>,
    },
    /// Nobody answers, or not as HTTP wants it, however often we ask.
    #[error(
        "{url} cannot be reached or breaks off ({reason}), {attempts} times in a row; what was fetched is kept: check the network and try again"
    )]
    Unreachable {
        /// What was asked for, without its query.
        url: String,
        /// What the last attempt met.
        reason: String,
        /// How many there were.
        attempts: u32,
    },
    /// An HTTP status that is none of the above.
    #[error("{url} answers with status {status}: {message}")]
    Status {
        /// What was asked for, without its query.
        url: String,
        /// The status.
        status: u16,
        /// What the server said.
        message: String,
    },
    /// An answer that makes no sense.
    #[error(
        "{url} gives an answer that makes no sense: {reason}; is HF_ENDPOINT right, and no proxy in between?"
    )]
    Answer {
        /// What was asked for, without its query.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The file became another while it was fetched.
    #[error(
        "{path} of {repo} is another file than it was when the fetch began ({reason}); run the command again"
    )]
    Changed {
        /// The repository.
        repo: String,
        /// The file.
        path: String,
        /// What differs.
        reason: String,
    },
    /// The bytes are not those that the hub told of.
    #[error(
        "{path} of {repo} arrived damaged: its {kind} is {found}, {wanted} was expected; what was fetched of it is thrown away, run the command again"
    )]
    Damaged {
        /// The repository.
        repo: String,
        /// The file.
        path: String,
        /// Which digest.
        kind: &'static str,
        /// The digest of what arrived.
        found: String,
        /// The digest that the hub tells.
        wanted: String,
    },
    /// Nothing in the repository fits what is wanted.
    #[error("{repo}: {reason}")]
    Choice {
        /// The repository.
        repo: String,
        /// What is there, and what to write.
        reason: String,
    },
    /// A model file whose header makes no sense.
    #[error("{path} of {repo}: {reason}")]
    Header {
        /// The repository.
        repo: String,
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// What was fetched cannot be written.
    #[error("cannot write {what}: {source}")]
    Write {
        /// Which file.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// What another program has fetched cannot be read.
    #[error("cannot read {}: {source}; remove it from the hub's cache to have it fetched", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// This machine cannot speak TLS: no root certificates, for instance.
    #[error(
        "cannot set up HTTPS: {reason}; are root certificates installed (package ca-certificates, or SSL_CERT_FILE)?"
    )]
    Tls {
        /// What the library said.
        reason: String,
    },
}

impl HubError {
    /// Whether a key or a licence is missing.
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

/// An error with its causes.
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
