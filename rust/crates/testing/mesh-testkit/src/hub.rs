//! A small Hugging Face hub: the public HTTP interface over repositories made in a test, with everything that
//! can go wrong.
//!
//! Two servers on loopback, as on the real hub: one answers the API and `resolve`, the other is the store of
//! large files to which `resolve` redirects. The second refuses requests with an `Authorization` header and
//! counts them: a client must not send its token there. Both count requests and bytes per file, and simulate
//! failures on request: cut, stall, slow down, answer 429 or 503, send other bytes.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use mesh_testkit::hub::{Fault, Site, TestHub};
//!
//! let hub = TestHub::start().await?;
//! let commit = hub.publish("acme/tiny", &[("tiny.gguf", vec![0; 1 << 20])]);
//! hub.fail(Site::Store, "tiny.gguf", Fault::CutAfter(1000));
//! println!("HF_ENDPOINT={} {commit}", hub.endpoint());
//! # Ok(())
//! # }
//! ```
//!
//! The responses follow <https://huggingface.co/docs/hub/api> and the headers that the `huggingface_hub`
//! library reads.

mod repos;
mod serve;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub use repos::Access;
use repos::{Content, Repos};

/// A part of the hub's URL space, for faults and counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Site {
    /// `/api/models/…`; the "file" is the repository's id.
    Api,
    /// `/{id}/resolve/…`, which serves small files and redirects to the store for large ones.
    Resolve,
    /// The store of large files.
    Store,
}

/// A false response to one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// This status, and this `Retry-After` header.
    Status(u16, Option<String>),
    /// The connection is cut after so many bytes of the body.
    CutAfter(u64),
    /// After so many bytes of the body nothing more comes, and the connection stays open.
    StallAfter(u64),
    /// The byte at this offset of the file is another one.
    WrongByteAt(u64),
    /// The whole file with status 200, in place of the requested range.
    WholeFile,
    /// Another range than was asked for, one byte later.
    WrongRange,
    /// Another entity tag than before.
    OtherEtag,
}

/// Requests and bytes of one file at one [`Site`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Count {
    /// Number of HEAD requests.
    pub heads: u64,
    /// Number of GET requests.
    pub gets: u64,
    /// Bytes of bodies handed to the network.
    pub bytes: u64,
    /// The ranges that were asked for, in order of arrival; the whole file where none was.
    pub ranges: Vec<Range<u64>>,
}

/// A running hub. Dropping it stops it.
#[derive(Debug)]
pub struct TestHub {
    api: SocketAddr,
    shared: Arc<HubState>,
    servers: Vec<JoinHandle<()>>,
}

impl TestHub {
    /// Starts a hub without repositories, on ports that the system chooses.
    ///
    /// # Errors
    /// If no port can be bound.
    pub async fn start() -> Result<Self> {
        let bind = || TcpListener::bind(("127.0.0.1", 0));
        let api = bind().await.context("a port for the hub")?;
        let store = bind().await.context("a port for the hub's store")?;
        let (api_address, store_address) = (api.local_addr()?, store.local_addr()?);
        let shared = Arc::new(HubState {
            store: store_address,
            state: Mutex::default(),
            sent: watch::Sender::new(0),
        });
        let routers = [
            (api, serve::api(shared.clone())),
            (store, serve::store(shared.clone())),
        ];
        let servers = routers
            .into_iter()
            .map(|(listener, router)| {
                tokio::spawn(async move {
                    // Without a shutdown signal it ends only when the task does.
                    let _ = axum::serve(listener, router).await;
                })
            })
            .collect();
        Ok(Self {
            api: api_address,
            shared,
            servers,
        })
    }

    /// The value for `HF_ENDPOINT`: the hub's base URL.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.api)
    }

    /// A new commit of repository `id` (`organisation/name`) with these files, to which `main` points from now on; gives its
    /// hash. Files of 64 KiB or more, and all `.gguf` and `.safetensors`, are large files as the hub means it.
    pub fn publish<C: Into<Bytes> + Clone>(&self, id: &str, files: &[(&str, C)]) -> String {
        let files = files
            .iter()
            .map(|(path, content)| (*path, Content::Memory(content.clone().into())))
            .collect();
        self.state().repos.publish(id, files)
    }

    /// As [`TestHub::publish`], with files of this machine.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn publish_files(&self, id: &str, files: &[(&str, &Path)]) -> Result<String> {
        let files = files
            .iter()
            .map(|(path, file)| {
                let content = Content::open(file).with_context(|| file.display().to_string())?;
                Ok((*path, content))
            })
            .collect::<Result<_>>()?;
        Ok(self.state().repos.publish(id, files))
    }

    /// Points a branch or tag of `id` to a commit.
    ///
    /// # Panics
    /// If the repository does not exist.
    pub fn point(&self, id: &str, name: &str, commit: &str) {
        self.state().repos.point(id, name, commit);
    }

    /// Renames a repository; requests for the old name are redirected, as the hub does.
    pub fn rename(&self, old: &str, new: &str) {
        self.state().repos.rename(old, new);
    }

    /// Lists files without their lengths and hashes, as some mirrors do.
    pub fn list_names_only(&self, names_only: bool) {
        self.state().names_only = names_only;
    }

    /// Sets the access to `id` and its files.
    ///
    /// # Panics
    /// If the repository does not exist.
    pub fn restrict(&self, id: &str, access: Access) {
        self.state().repos.restrict(id, access);
    }

    /// Makes `token` valid, with access to the private or gated `repos`.
    pub fn admit(&self, token: &str, repos: &[&str]) {
        let repos = repos.iter().map(|&id| id.to_owned()).collect();
        self.state().tokens.insert(token.to_owned(), repos);
    }

    /// The next request for `file` (a path in its repository; at [`Site::Api`] the repository's id) meets this fault. Several wait
    /// for one request each.
    pub fn fail(&self, site: Site, file: &str, fault: Fault) {
        let mut state = self.state();
        let key = (site, file.to_owned());
        state.faults.entry(key).or_default().push(fault);
    }

    /// Answers every request for `file` from now on with this fault; `None` ends that.
    pub fn always_fail(&self, site: Site, file: &str, fault: Option<Fault>) {
        let mut state = self.state();
        let key = (site, file.to_owned());
        match fault {
            Some(fault) => state.lasting_faults.insert(key, fault),
            None => state.lasting_faults.remove(&key),
        };
    }

    /// Bodies go out in pieces of so many bytes with this pause before each; `None` sends as fast as it can.
    pub fn pace(&self, pace: Option<(usize, Duration)>) {
        self.state().pace = pace;
    }

    /// Requests for `file` at `site` so far.
    pub fn count(&self, site: Site, file: &str) -> Count {
        let key = (site, file.to_owned());
        self.state().counts.get(&key).cloned().unwrap_or_default()
    }

    /// Bytes of all bodies of files so far.
    pub fn bytes_sent(&self) -> u64 {
        *self.shared.sent.borrow()
    }

    /// Waits until [`TestHub::bytes_sent`] is at least `bytes`.
    pub async fn wait_for_bytes(&self, bytes: u64) {
        let mut sent = self.shared.sent.subscribe();
        // The sender lives as long as `self`.
        let _ = sent.wait_for(|&sent| sent >= bytes).await;
    }

    /// Number of requests that sent an `Authorization` header to the store.
    pub fn leaked_tokens(&self) -> u64 {
        self.state().leaked_tokens
    }

    /// Resets all counts to 0.
    pub fn reset_counts(&self) {
        let mut state = self.state();
        state.counts.clear();
        state.leaked_tokens = 0;
        self.shared.sent.send_replace(0);
    }

    fn state(&self) -> MutexGuard<'_, HubContents> {
        self.shared.lock()
    }
}

impl Drop for TestHub {
    fn drop(&mut self) {
        for server in &self.servers {
            server.abort();
        }
    }
}

/// State shared by the handlers and the test.
#[derive(Debug)]
struct HubState {
    store: SocketAddr,
    state: Mutex<HubContents>,
    sent: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct HubContents {
    repos: Repos,
    /// The repositories that a token opens.
    tokens: HashMap<String, Vec<String>>,
    faults: HashMap<(Site, String), Vec<Fault>>,
    lasting_faults: HashMap<(Site, String), Fault>,
    counts: HashMap<(Site, String), Count>,
    pace: Option<(usize, Duration)>,
    names_only: bool,
    leaked_tokens: u64,
}

impl HubState {
    fn lock(&self) -> MutexGuard<'_, HubContents> {
        self.state
            .lock()
            .expect("no handler panics with the lock held")
    }

    fn count(&self, site: Site, file: &str, change: impl FnOnce(&mut Count)) {
        let mut state = self.lock();
        change(state.counts.entry((site, file.to_owned())).or_default());
    }

    fn sent(&self, site: Site, file: &str, bytes: u64) {
        self.count(site, file, |count| count.bytes += bytes);
        self.sent.send_modify(|sent| *sent += bytes);
    }

    fn fault(&self, site: Site, file: &str) -> Option<Fault> {
        let mut state = self.lock();
        let key = (site, file.to_owned());
        if let Some(waiting) = state.faults.get_mut(&key)
            && !waiting.is_empty()
        {
            return Some(waiting.remove(0));
        }
        state.lasting_faults.get(&key).cloned()
    }
}
