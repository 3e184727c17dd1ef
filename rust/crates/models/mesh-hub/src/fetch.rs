//! Fetching ranges of a file into a sink, over several connections, with retries.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use mesh_store::PartialFile;
use reqwest::header::{self, HeaderMap};
use reqwest::{Method, StatusCode, Url};

use crate::answer::{AttemptError, invalid, text};
use crate::blocking::blocking;
use crate::client::{Hub, Subject};
use crate::error::HubError;
use crate::listing::{Repo, RepoFile, is_hash};
use crate::retry::Retry;
use crate::watch::Watch;

/// Destination of fetched bytes. Called from several threads at once, which may be blocked.
pub trait Sink: Send + Sync + 'static {
    /// Takes the bytes at `offset` of the file.
    ///
    /// # Errors
    /// If they cannot be kept; that ends the fetch.
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), HubError>;
}

impl Sink for PartialFile {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), HubError> {
        Ok(PartialFile::write_at(self, offset, data)?)
    }
}

/// Maximum bytes of one request, so that several connections share a file; also the maximum to skip where a
/// server does not support ranges.
const SPAN: u64 = 32 << 20;
/// Wanted ranges with less than this between them are one request.
const GAP: u64 = 4 << 10;
/// Bytes to write at once, unless they arrive slowly.
const WRITE: usize = 256 << 10;
const WRITE_AFTER: Duration = Duration::from_millis(50);

impl Hub {
    /// Fetches `ranges` of `file` into `sink`, over several connections. Interrupted transfers continue where
    /// they were; slow ones are requested again, after growing pauses. On an error, everything that arrived
    /// has been written.
    ///
    /// # Errors
    /// If the hub refuses or cannot be reached for too long, if the file changed meanwhile, or the sink
    /// fails.
    pub async fn fetch(
        &self,
        repo: &Repo,
        file: &RepoFile,
        ranges: impl IntoIterator<Item = Range<u64>>,
        sink: Arc<dyn Sink>,
        watch: Arc<dyn Watch>,
    ) -> Result<(), HubError> {
        if self.settings().offline {
            return Err(HubError::Offline {
                what: format!("{} of {}", file.path, repo.id),
            });
        }
        let job = Arc::new(FileFetch {
            hub: self.clone(),
            url: self.file_url(repo, file),
            repo: repo.id.clone(),
            commit: repo.commit.clone(),
            file: file.clone(),
            sink,
            watch,
        });
        let spans = spans(ranges);
        let mut running = futures::stream::iter(spans)
            .map(|span| {
                let job = job.clone();
                async move {
                    let permit = job.hub.inner.connections.acquire().await;
                    let _permit = permit.expect("nobody closes it");
                    job.fetch(span).await
                }
            })
            .buffer_unordered(self.settings().connections.max(1));
        while let Some(done) = running.next().await {
            done?;
        }
        Ok(())
    }
}

/// Ranges in order, those that nearly touch as one, none longer than [`SPAN`].
fn spans(ranges: impl IntoIterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let ranges = ranges.into_iter().filter(|range| !range.is_empty());
    let mut ranges: Vec<_> = ranges.collect();
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end.saturating_add(GAP) => {
                last.end = last.end.max(range.end);
            }
            _ => joined.push(range),
        }
    }
    let cut = joined.into_iter().flat_map(|range| {
        let starts = (range.start..range.end).step_by(SPAN as usize);
        starts.map(move |start| start..range.end.min(start.saturating_add(SPAN)))
    });
    cut.collect()
}

struct FileFetch {
    hub: Hub,
    url: Url,
    repo: String,
    commit: String,
    file: RepoFile,
    sink: Arc<dyn Sink>,
    watch: Arc<dyn Watch>,
}

impl FileFetch {
    async fn fetch(&self, span: Range<u64>) -> Result<(), HubError> {
        let mut retry = Retry::new(self.hub.settings().retry);
        let mut at = span.start;
        while at < span.end {
            let before = at;
            let ended = self.stream(&mut at, span.end).await;
            retry.arrived(at - before);
            let failure = match ended {
                Ok(()) if at >= span.end => break,
                Ok(()) => AttemptError::transient("the connection was closed early"),
                Err(failure) => failure,
            };
            let (hub, watch) = (&self.hub, &*self.watch);
            hub.pause(&mut retry, failure, &self.url, watch).await?;
        }
        Ok(())
    }

    /// Makes one request; `at` advances with the bytes written.
    async fn stream(&self, at: &mut u64, end: u64) -> Result<(), AttemptError> {
        let wanted = *at..end;
        let subject = Subject::file(&self.repo, &self.commit, &self.file);
        let hub = &self.hub;
        let request = hub.exchange(&self.url, Method::GET, Some(&wanted), subject);
        let answer = match request.await {
            Err(AttemptError::Final(HubError::Status { status: 416, .. })) => {
                return Err(self.changed(format!("it ends before byte {end}")));
            }
            answer => answer?,
        };
        if let (Some(known), Some(found)) = (self.file.etag(), &answer.etag)
            && is_hash(found)
            // The manifest has the SHA-256 of a small file, but the hub lists git's id.
            && known.len() == found.len()
            && known != *found
        {
            return Err(self.changed(format!("its entity tag is {found}, it was {known}")));
        }
        if let Some(commit) = answer.commit.filter(|commit| *commit != self.commit) {
            return Err(self.changed(format!("it is of commit {commit}, not {}", self.commit)));
        }
        let mut response = answer.response;
        let starts = self.starts_at(response.status(), response.headers(), &wanted)?;
        let mut skip = wanted.start - starts;
        let mut buffer = BytesMut::new();
        let mut written = Instant::now();
        let ended = loop {
            let left = end - *at - buffer.len() as u64;
            if left == 0 {
                break Ok(());
            }
            let mut chunk = match response.chunk().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => break Ok(()),
                Err(error) => break Err(AttemptError::network(error)),
            };
            let skipped = skip.min(chunk.len() as u64);
            skip -= skipped;
            chunk = chunk.slice(skipped as usize..);
            // More than was asked for is not taken.
            chunk.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            buffer.extend_from_slice(&chunk);
            if buffer.len() >= WRITE || written.elapsed() >= WRITE_AFTER {
                self.write(at, buffer.split().freeze()).await?;
                written = Instant::now();
            }
        };
        // What arrived before it broke off counts, too.
        self.write(at, buffer.freeze()).await?;
        ended
    }

    /// Offset of an answer's body in the file: the requested one, or 0 if the server does not support ranges.
    fn starts_at(
        &self,
        status: StatusCode,
        headers: &HeaderMap,
        wanted: &Range<u64>,
    ) -> Result<u64, AttemptError> {
        let odd = |reason: String| invalid(&self.url, reason).into();
        if status != StatusCode::PARTIAL_CONTENT {
            if wanted.start > SPAN {
                return Err(odd(format!(
                    "it gives the whole file where bytes {}-{} were asked for",
                    wanted.start,
                    wanted.end - 1
                )));
            }
            return Ok(0);
        }
        let value = text(headers, &header::CONTENT_RANGE).unwrap_or_default();
        let Some((start, total)) = content_range(&value) else {
            return Err(odd(format!("its Content-Range is {value:?}")));
        };
        if start != wanted.start {
            return Err(odd(format!(
                "it gives bytes from {start} where bytes from {} were asked for",
                wanted.start
            )));
        }
        match (total, self.file.bytes) {
            (Some(total), Some(known)) if total != known => {
                Err(self.changed(format!("it has {total} bytes, it had {known}")))
            }
            _ => Ok(start),
        }
    }

    async fn write(&self, at: &mut u64, data: Bytes) -> Result<(), AttemptError> {
        if data.is_empty() {
            return Ok(());
        }
        let (sink, offset, bytes) = (self.sink.clone(), *at, data.len() as u64);
        blocking(move || sink.write_at(offset, &data)).await?;
        *at += bytes;
        self.watch.arrived(bytes);
        Ok(())
    }

    fn changed(&self, reason: String) -> AttemptError {
        AttemptError::Final(HubError::Changed {
            repo: self.repo.clone(),
            path: self.file.path.clone(),
            reason,
        })
    }
}

/// First byte and length of the whole of `bytes 0-99/1234`.
fn content_range(value: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = value.strip_prefix("bytes ")?.split_once('/')?;
    let (first, _) = range.split_once('-')?;
    Some((first.parse().ok()?, total.parse().ok()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    #[allow(clippy::single_range_in_vec_init, reason = "one range is meant")]
    fn ranges_that_nearly_touch_are_one_request() {
        assert_eq!(
            spans([200..300, 0..100, 100 + GAP..101 + GAP]),
            [0..101 + GAP]
        );
        assert_eq!(spans([0..10, 11 + GAP..20 + GAP]).len(), 2);
        assert_eq!(spans([5..5]), []);
        assert_eq!(spans([0..SPAN + 1]), [0..SPAN, SPAN..SPAN + 1]);
    }

    #[test]
    fn a_content_range_is_read() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, None)));
        assert_eq!(content_range("bytes */10"), None);
        assert_eq!(content_range("items 5-9/10"), None);
    }

    proptest! {
        #[test]
        fn spans_hold_all_that_is_wanted_and_little_more(wanted in prop::collection::vec((0u64..1 << 30, 0u64..1 << 20), 0..12)) {
            let wanted: Vec<_> = wanted.iter().map(|&(start, len)| start..start + len).collect();
            let spans = spans(wanted.clone());
            prop_assert!(spans.windows(2).all(|pair| pair[0].end <= pair[1].start));
            for range in wanted.iter().filter(|range| !range.is_empty()) {
                let mut at = range.start;
                for span in &spans {
                    prop_assert!(span.end - span.start <= SPAN);
                    if span.contains(&at) {
                        at = span.end;
                    }
                }
                prop_assert!(at >= range.end);
            }
            let bytes: u64 = spans.iter().map(|span| span.end - span.start).sum();
            let asked: u64 = wanted.iter().map(|range| range.end - range.start).sum();
            prop_assert!(bytes <= asked + GAP * wanted.len() as u64);
        }
    }
}
