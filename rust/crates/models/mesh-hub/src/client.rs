//! Requests to the hub: contents of repositories, and the errors of unsuccessful answers.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mesh_base::random;
use reqwest::header;
use reqwest::{Method, Response, StatusCode, Url};
use time::OffsetDateTime;
use tokio::sync::Semaphore;

use crate::answer::{self, AttemptError, bare, read_limited, readable, redirected, shown, text};
use crate::error::HubError;
use crate::listing::{Repo, RepoFile, is_hash};
use crate::retry::Retry;
use crate::settings::Settings;
use crate::watch::Watch;

/// A client of one hub. Cheap to clone; clones share its connections.
#[derive(Debug, Clone)]
pub struct Hub {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    http: reqwest::Client,
    pub(crate) settings: Settings,
    /// One for each connection that may fetch files at once.
    pub(crate) connections: Semaphore,
}

/// Longest listing that is read.
const MAX_LISTING: usize = 64 << 20;
const MAX_REDIRECTS: usize = 10;
const CONNECT_LIMIT: Duration = Duration::from_secs(15);

/// Subject of a request, for messages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Subject<'a> {
    pub(crate) repo: &'a str,
    pub(crate) revision: &'a str,
    /// A file of it, or the listing.
    pub(crate) path: Option<&'a str>,
}

impl<'a> Subject<'a> {
    pub(crate) fn file(repo: &'a str, revision: &'a str, file: &'a RepoFile) -> Self {
        Subject {
            repo,
            revision,
            path: Some(&file.path),
        }
    }
}

/// A successful answer, with the hub's own headers before redirects.
pub(crate) struct HubResponse {
    pub(crate) response: Response,
    pub(crate) etag: Option<String>,
    pub(crate) size: Option<u64>,
    pub(crate) commit: Option<String>,
}

impl Hub {
    /// A client with these settings.
    ///
    /// # Errors
    /// If this machine cannot speak TLS, and the hub wants it.
    pub fn new(settings: Settings) -> Result<Self, HubError> {
        // A proxy from the environment leads to the world, not back to this machine.
        let loopback = match settings.endpoint.host_str() {
            Some("localhost") => true,
            Some(host) => host
                .trim_matches(['[', ']'])
                .parse::<std::net::IpAddr>()
                .is_ok_and(|address| address.is_loopback()),
            None => false,
        };
        let builder = || {
            let builder = reqwest::Client::builder()
                .user_agent(concat!("hydramesh/", env!("CARGO_PKG_VERSION")))
                .redirect(reqwest::redirect::Policy::none())
                .connect_timeout(CONNECT_LIMIT)
                .read_timeout(settings.stall);
            match loopback {
                true => builder.no_proxy(),
                false => builder,
            }
        };
        let mut http = builder().build();
        if http.is_err() && settings.endpoint.scheme() == "http" {
            // No root certificates on this machine, and none needed.
            http = builder().tls_certs_only([]).build();
        }
        let http = http.map_err(|error| HubError::Tls {
            reason: crate::error::causes(&error),
        })?;
        Ok(Self {
            inner: Arc::new(Inner {
                http,
                connections: Semaphore::new(settings.connections.max(1)),
                settings,
            }),
        })
    }

    /// As [`Hub::new`], with settings from this process's environment.
    ///
    /// # Errors
    /// If they make no sense, or as there.
    pub fn from_env() -> Result<Self, HubError> {
        Self::new(Settings::from_env()?)
    }

    /// Settings of this client.
    pub fn settings(&self) -> &Settings {
        &self.inner.settings
    }

    /// Lists the files of repository `id` at `revision` (a branch, tag or commit), pinned to its commit. With
    /// `HF_HUB_OFFLINE`, lists those in the cache of other programs.
    ///
    /// # Errors
    /// If it does not exist, is not visible with the token, or the hub cannot be reached.
    pub async fn open(
        &self,
        id: &str,
        revision: &str,
        watch: &dyn Watch,
    ) -> Result<Repo, HubError> {
        if self.settings().offline {
            return crate::cache::open(self.settings(), id, revision);
        }
        let mut url = self.url(["api", "models"].into_iter().chain(id.split('/')));
        push(&mut url, ["revision", revision]);
        url.set_query(Some("blobs=true"));
        let subject = Subject {
            repo: id,
            revision,
            path: None,
        };
        let json = self.get_all(&url, subject, MAX_LISTING, watch).await?;
        Repo::parse(&json, id).map_err(|reason| answer::invalid(&url, reason))
    }

    /// URL of a repository's page at its commit, which the store records as a model's source.
    pub fn source(&self, repo: &Repo) -> String {
        let mut url = self.url(repo.id.split('/'));
        push(&mut url, ["tree", &repo.commit]);
        url.into()
    }

    /// `file` with its length and digest, which hubs of other makes do not list.
    ///
    /// # Errors
    /// If it cannot be asked for.
    pub async fn complete(
        &self,
        repo: &Repo,
        file: &RepoFile,
        watch: &dyn Watch,
    ) -> Result<RepoFile, HubError> {
        if file.bytes.is_some() && file.etag().is_some() || self.settings().offline {
            return Ok(file.clone());
        }
        let url = self.file_url(repo, file);
        let subject = Subject::file(&repo.id, &repo.commit, file);
        let ask = async || self.exchange(&url, Method::HEAD, None, subject).await;
        let answer = self.patiently(&url, watch, ask).await?;
        let etag = answer.etag.unwrap_or_default();
        let mut file = file.clone();
        file.bytes = file.bytes.or(answer.size);
        if file.bytes.is_none() {
            return Err(answer::invalid(&url, "it does not tell the file's length"));
        }
        if file.etag().is_none() {
            file.sha256 = etag.parse().ok();
            file.blob_id = is_hash(&etag).then_some(etag);
        }
        Ok(file)
    }

    /// The whole body at `url`, of at most `limit` bytes.
    pub(crate) async fn get_all(
        &self,
        url: &Url,
        subject: Subject<'_>,
        limit: usize,
        watch: &dyn Watch,
    ) -> Result<Bytes, HubError> {
        self.patiently(url, watch, async || {
            let answer = self.exchange(url, Method::GET, None, subject).await?;
            match read_limited(answer.response, limit).await? {
                (body, false) => Ok(body),
                (_, true) => {
                    let reason = format!("it is longer than {limit} bytes");
                    Err(answer::invalid(url, reason).into())
                }
            }
        })
        .await
    }

    /// Repeats a request until it succeeds or retries are used up.
    async fn patiently<T>(
        &self,
        url: &Url,
        watch: &dyn Watch,
        mut attempt: impl AsyncFnMut() -> Result<T, AttemptError>,
    ) -> Result<T, HubError> {
        let mut retry = Retry::new(self.settings().retry);
        loop {
            match attempt().await {
                Ok(value) => return Ok(value),
                Err(failure) => self.pause(&mut retry, failure, url, watch).await?,
            }
        }
    }

    /// Waits before the next attempt, or fails if there are no more attempts.
    pub(crate) async fn pause(
        &self,
        retry: &mut Retry,
        failure: AttemptError,
        url: &Url,
        watch: &dyn Watch,
    ) -> Result<(), HubError> {
        let (reason, status, retry_after) = match failure {
            AttemptError::Final(error) => return Err(error),
            AttemptError::Transient {
                reason,
                status,
                retry_after,
            } => (reason, status, retry_after),
        };
        match retry.failed(retry_after, random::fraction()) {
            Some(pause) => {
                tracing::debug!(url = %shown(url), %reason, ?pause, "a request to the hub is repeated");
                watch.waiting(&reason, pause);
                tokio::time::sleep(pause).await;
                Ok(())
            }
            None if status == Some(429) => Err(HubError::RateLimited { retry_after }),
            None => Err(HubError::Unreachable {
                url: shown(url),
                reason,
                attempts: retry.failures(),
            }),
        }
    }

    /// One request, with its redirects. The token goes to the hub alone, not to where it redirects.
    pub(crate) async fn exchange(
        &self,
        url: &Url,
        method: Method,
        range: Option<&std::ops::Range<u64>>,
        subject: Subject<'_>,
    ) -> Result<HubResponse, AttemptError> {
        let settings = self.settings();
        let mut at = url.clone();
        let (mut etag, mut size, mut commit) = (None, None, None);
        for _ in 0..=MAX_REDIRECTS {
            let is_hub = at.origin() == settings.endpoint.origin();
            let mut request = self.inner.http.request(method.clone(), at.clone());
            if let Some((token, _)) = &settings.token
                && is_hub
            {
                request = request.bearer_auth(token.expose());
            }
            // Lengths and ranges are those of the file, not of some compressed form.
            request = request.header(header::ACCEPT_ENCODING, "identity");
            if let Some(range) = range {
                let range = format!("bytes={}-{}", range.start, range.end - 1);
                request = request.header(header::RANGE, range);
            }
            let response = request.send().await.map_err(AttemptError::network)?;
            let headers = response.headers();
            if is_hub {
                etag = etag.or_else(|| text(headers, &answer::LINKED_ETAG));
                size = size.or_else(|| text(headers, &answer::LINKED_SIZE)?.parse().ok());
                commit = commit.or_else(|| text(headers, &answer::REPO_COMMIT));
            }
            let status = response.status();
            // Where the hub redirects to, HEAD is often not allowed; nor needed, if the hub has said all.
            let is_told = method == Method::HEAD && etag.is_some() && size.is_some();
            if !is_told
                && status.is_redirection()
                && let Some(location) = text(headers, &header::LOCATION)
            {
                at = redirected(&at, &location)?;
                continue;
            }
            if !is_told && !status.is_success() {
                return Err(self.refused(response, &at, is_hub, subject).await);
            }
            // A small file comes from the hub itself, without a link.
            etag = etag.or_else(|| text(headers, &header::ETAG).filter(|_| is_hub));
            if size.is_none() && status == StatusCode::OK {
                size = text(headers, &header::CONTENT_LENGTH).and_then(|size| size.parse().ok());
            }
            return Ok(HubResponse {
                response,
                etag: etag.map(|etag| bare(&etag)),
                size,
                commit,
            });
        }
        let reason = format!("it redirects more than {MAX_REDIRECTS} times");
        Err(answer::invalid(url, reason).into())
    }

    /// Converts an unsuccessful answer to an error.
    async fn refused(
        &self,
        response: Response,
        at: &Url,
        is_hub: bool,
        subject: Subject<'_>,
    ) -> AttemptError {
        let status = response.status().as_u16();
        let headers = response.headers();
        let code = text(headers, &answer::ERROR_CODE).unwrap_or_default();
        let retry_after = answer::retry_after(headers, OffsetDateTime::now_utc());
        let message = match text(headers, &answer::ERROR_MESSAGE) {
            Some(message) => readable(&message),
            None => {
                let body = read_limited(response, answer::MAX_MESSAGE).await;
                let (body, _) = body.unwrap_or_default();
                readable(&String::from_utf8_lossy(&body))
            }
        };
        let transient = match status {
            408 | 425 | 429 | 500 | 502 | 503 | 504 => true,
            // A signed address has expired: the hub gives a new one.
            401 | 403 | 404 | 410 => !is_hub,
            _ => false,
        };
        if transient {
            return AttemptError::Transient {
                reason: format!("status {status}: {message}"),
                status: Some(status),
                retry_after,
            };
        }
        AttemptError::Final(self.refusal(status, &code, message, at, subject))
    }

    fn refusal(
        &self,
        status: u16,
        code: &str,
        message: String,
        at: &Url,
        subject: Subject<'_>,
    ) -> HubError {
        let repo = subject.repo.to_owned();
        let url = shown(&self.url(repo.split('/')));
        let tokens_url = shown(&self.url(["settings", "tokens"]));
        let token = self.settings().token.as_ref();
        let token = token.map(|(_, origin)| origin.clone());
        match (status, code, token) {
            (401 | 403, "GatedRepo", None) => HubError::GatedWithoutToken {
                repo,
                url,
                tokens_url,
            },
            (401 | 403, "GatedRepo", Some(token)) => HubError::LicenceNotAccepted {
                repo,
                token,
                url,
                tokens_url,
            },
            (401 | 403 | 404, "RepoNotFound", None) | (401 | 403, _, None) => {
                HubError::NotFoundWithoutToken {
                    repo,
                    url,
                    tokens_url,
                }
            }
            (401 | 403 | 404, "RepoNotFound", Some(token)) => HubError::NotFound {
                repo,
                token,
                url,
                tokens_url,
            },
            (401, _, Some(token)) => HubError::BadToken { token, tokens_url },
            (403, _, Some(token)) => HubError::Forbidden {
                what: match subject.path {
                    Some(path) => format!("{path} of {repo}"),
                    None => repo,
                },
                token,
                message,
                tokens_url,
            },
            (404, "RevisionNotFound", _) => HubError::NoRevision {
                url: format!("{url}/tree/main"),
                repo,
                revision: subject.revision.to_owned(),
            },
            (404, _, _) if subject.path.is_some() => HubError::NoFile {
                url: format!("{url}/tree/{}", subject.revision),
                repo,
                revision: subject.revision.to_owned(),
                path: subject.path.unwrap_or_default().to_owned(),
            },
            _ => HubError::Status {
                url: shown(at),
                status,
                message,
            },
        }
    }

    pub(crate) fn file_url(&self, repo: &Repo, file: &RepoFile) -> Url {
        let mut url = self.url(repo.id.split('/'));
        push(&mut url, ["resolve", &repo.commit]);
        push(&mut url, file.path.split('/'));
        url
    }

    fn url<'a>(&self, parts: impl IntoIterator<Item = &'a str>) -> Url {
        let mut url = self.settings().endpoint.clone();
        push(&mut url, parts);
        url
    }
}

/// Appends parts to a path, each escaped as one.
fn push<'a>(url: &mut Url, parts: impl IntoIterator<Item = &'a str>) {
    let mut path = url.path_segments_mut().expect("an http address has a path");
    path.pop_if_empty().extend(parts);
}
