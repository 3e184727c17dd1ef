//! Parts of answers besides their bodies: entity tags, pauses, redirects, reasons of refusals.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use reqwest::header::{self, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Response, Url};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;

use crate::error::HubError;

/// Most of an error's words that are shown.
pub(crate) const MAX_MESSAGE: usize = 300;

pub(crate) const ERROR_CODE: HeaderName = HeaderName::from_static("x-error-code");
pub(crate) const ERROR_MESSAGE: HeaderName = HeaderName::from_static("x-error-message");
pub(crate) const REPO_COMMIT: HeaderName = HeaderName::from_static("x-repo-commit");
pub(crate) const LINKED_ETAG: HeaderName = HeaderName::from_static("x-linked-etag");
pub(crate) const LINKED_SIZE: HeaderName = HeaderName::from_static("x-linked-size");
const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");

/// The error of one attempt of a request.
#[derive(Debug)]
pub(crate) enum AttemptError {
    /// A retry may succeed.
    Transient {
        reason: String,
        status: Option<u16>,
        retry_after: Option<Duration>,
    },
    /// A retry cannot succeed.
    Final(HubError),
}

impl From<HubError> for AttemptError {
    fn from(error: HubError) -> Self {
        AttemptError::Final(error)
    }
}

impl AttemptError {
    pub(crate) fn transient(reason: impl Into<String>) -> Self {
        AttemptError::Transient {
            reason: reason.into(),
            status: None,
            retry_after: None,
        }
    }

    /// The failure for `error`, without the address, which may be signed.
    pub(crate) fn network(error: reqwest::Error) -> Self {
        let timed_out = error.is_timeout();
        let error = error.without_url();
        let mut reason = match timed_out {
            true => "nothing came for too long".to_owned(),
            false => error.to_string(),
        };
        // The last cause is the most specific one: "connection refused".
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            if !timed_out && std::error::Error::source(cause).is_none() {
                reason = cause.to_string();
            }
            source = cause.source();
        }
        AttemptError::transient(with_clock(reason, SystemTime::now()))
    }
}

/// A server's certificate is rarely out of date; this machine's clock is more often wrong.
fn with_clock(reason: String, now: SystemTime) -> String {
    let about_dates = ["certificate expired", "certificate not valid yet"];
    if !about_dates.iter().any(|words| reason.contains(words)) {
        return reason;
    }
    format!(
        "{reason}; this machine's clock says {}: if that is wrong, set it, for example with `timedatectl set-ntp true`",
        mesh_base::clock::utc(now)
    )
}

pub(crate) fn redirected(from: &Url, location: &str) -> Result<Url, HubError> {
    let bad = |reason: &str| invalid(from, reason);
    let to = from.join(location);
    let to = to.map_err(|_| bad("it redirects to an invalid address"))?;
    match (from.scheme(), to.scheme()) {
        ("https", "https") | ("http", "http" | "https") => Ok(to),
        _ => Err(bad("it redirects away from HTTPS")),
    }
}

/// The error for an invalid answer.
pub(crate) fn invalid(url: &Url, reason: impl Into<String>) -> HubError {
    HubError::Answer {
        url: shown(url),
        reason: reason.into(),
    }
}

/// An address without what may be secret in it.
pub(crate) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    url.into()
}

pub(crate) fn text(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    let value: &HeaderValue = headers.get(name)?;
    Some(value.to_str().ok()?.trim().to_owned())
}

/// An entity tag without its quotes.
pub(crate) fn bare(etag: &str) -> String {
    etag.trim_start_matches("W/").trim_matches('"').to_owned()
}

/// The pause that a server asks for: `Retry-After` in seconds or as a date, or the seconds to the end of the
/// window in the hub's `RateLimit` (`"api";r=0;t=55`).
pub(crate) fn retry_after(headers: &HeaderMap, now: OffsetDateTime) -> Option<Duration> {
    if let Some(value) = text(headers, &header::RETRY_AFTER) {
        if let Ok(seconds) = value.parse() {
            return Some(Duration::from_secs(seconds));
        }
        if let Ok(date) = OffsetDateTime::parse(&value, &Rfc2822) {
            return Some((date - now).try_into().unwrap_or(Duration::ZERO));
        }
    }
    let limit = text(headers, &RATE_LIMIT)?;
    let fields = || limit.split(';').map(str::trim);
    if !fields().any(|field| field == "r=0") {
        return None;
    }
    let seconds = fields().find_map(|field| field.strip_prefix("t="))?;
    Some(Duration::from_secs(seconds.parse().ok()?))
}

/// A body's beginning, and whether there is more of it.
pub(crate) async fn read_limited(
    mut response: Response,
    limit: usize,
) -> Result<(Bytes, bool), AttemptError> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(AttemptError::network)? {
        let room = limit - body.len();
        body.extend_from_slice(&chunk[..chunk.len().min(room)]);
        if chunk.len() > room {
            return Ok((body.into(), true));
        }
    }
    Ok((body.into(), false))
}

/// A server's words as one short line.
pub(crate) fn readable(message: &str) -> String {
    let words: Vec<&str> = message.split_whitespace().collect();
    let line = words.join(" ");
    let line = line.chars().filter(|c| !c.is_control());
    let line: String = line.take(MAX_MESSAGE).collect();
    match line.is_empty() {
        true => "no reason given".to_owned(),
        false => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    #[test]
    fn a_certificate_that_seems_out_of_date_points_to_the_clock() {
        let text = |reason: &str| with_clock(reason.to_owned(), SystemTime::UNIX_EPOCH);
        let reason =
            "invalid peer certificate: certificate not valid yet: verification time 0 (UNIX)";
        assert!(text(reason).contains("this machine's clock says 1970-01-01"));
        assert_eq!(text("connection refused"), "connection refused");
    }

    #[test]
    fn a_pause_is_read_in_all_its_forms() {
        let now = OffsetDateTime::parse("Wed, 21 Oct 2015 07:28:00 GMT", &Rfc2822).unwrap();
        let seconds = |headers: &HeaderMap| retry_after(headers, now).map(|pause| pause.as_secs());
        let after = |value| seconds(&headers(header::RETRY_AFTER, value));
        assert_eq!(after("7"), Some(7));
        assert_eq!(after("Wed, 21 Oct 2015 07:28:30 GMT"), Some(30));
        assert_eq!(after("Wed, 21 Oct 2015 07:27:00 GMT"), Some(0));
        assert_eq!(after("soon"), None);
        assert_eq!(after("-1"), None);
        let limit = |value| seconds(&headers(RATE_LIMIT, value));
        assert_eq!(limit("\"resolvers\";r=0;t=55"), Some(55));
        assert_eq!(limit("\"resolvers\";r=12;t=55"), None);
    }

    #[test]
    fn a_redirect_does_not_leave_https() {
        let https = Url::parse("https://hub.test/a").unwrap();
        assert!(redirected(&https, "https://cdn.test/b").is_ok());
        assert!(redirected(&https, "/b").is_ok());
        assert!(redirected(&https, "http://cdn.test/b").is_err());
        assert!(redirected(&https, "file:///etc/passwd").is_err());
    }

    #[test]
    fn what_is_shown_has_no_signature() {
        let url = Url::parse("https://cdn.test/b?X-Amz-Signature=abc").unwrap();
        assert_eq!(shown(&url), "https://cdn.test/b");
    }
}
