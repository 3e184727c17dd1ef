//! The models of this worker that come from its store: replicas, searches by name, downloads, and what the
//! head hears of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_hub::Expected;
use mesh_proto::{BadSource, ModelSources, Models, NodeAddr, Sources};
use mesh_share::PieceSet;
use mesh_store::Digest;

use crate::download::{Download, DownloadStep, Results, SourceEvent, Want};
use crate::knowledge::Knowledge;
use crate::names::long_name;
use crate::piece_map::PieceMap;
use crate::replica::{Replica, called, reported};
use crate::rules::Rules;
use crate::search::{Search, SearchStep};
use crate::vouch::{Doubt, needs_hub};

/// Replicas, searches and downloads.
#[derive(Default)]
pub struct Catalogue {
    known: Knowledge,
    searches: BTreeMap<String, Search>,
    downloads: BTreeMap<Digest, Download>,
    results: Results,
    next_want: u64,
    /// Recent answers of the hub, by name.
    hub: BTreeMap<String, (Instant, Result<Arc<Expected>, String>)>,
}

/// The beginning of a search.
#[derive(Debug, PartialEq)]
pub enum Found {
    /// The model is here.
    Here(Digest),
    /// A signature that the rules require is missing, or wrong.
    Refused(String),
    /// It is looked for: [`Catalogue::poll_search`] says how.
    Search,
    /// Another search for the name is under way.
    Busy,
}

impl Catalogue {
    /// A catalogue of the replicas that the store has.
    pub fn new(rules: Rules, replicas: impl IntoIterator<Item = Replica>) -> Self {
        let replicas = replicas.into_iter();
        let known = Knowledge {
            rules,
            replicas: replicas.map(|r| (r.fingerprint(), r)).collect(),
            ..Knowledge::default()
        };
        Catalogue {
            known,
            ..Catalogue::default()
        }
    }

    /// What the configuration says.
    pub fn rules(&self) -> &Rules {
        &self.known.rules
    }

    /// From now on this worker reaches others, and they reach it at `port`.
    pub fn connected(&mut self, node_id: String, port: u16) {
        self.known.own = Some((node_id, port));
        self.known.report.version += 1;
    }

    /// Workers that are found on the LAN are asked, too, whether the head names them or not.
    pub fn lan_found(&mut self, workers: Vec<NodeAddr>) {
        self.known.lan = workers;
    }

    /// The head names the sources of the models that are sought.
    pub fn sources_told(&mut self, sources: Sources) {
        let models = sources.models.into_iter();
        let by_name = models.map(|model| (model.name.clone(), model)).collect();
        if self.known.told != by_name {
            self.known.told = by_name;
            self.known.told_version += 1;
        }
    }

    /// Message for the head and its version; `None` if the version is still `known`.
    pub fn report(&self, known: Option<u64>) -> Option<(Models, u64)> {
        if !self.known.rules.is_sharing() || known == Some(self.known.report.version) {
            return None;
        }
        let models = Models {
            port: self.known.own.as_ref().map_or(0, |(_, port)| *port).into(),
            held: reported(&self.known.replicas, &self.known.report.sought),
            sought: self.known.report.sought.values().cloned().collect(),
            bad: self.known.report.bad.clone(),
        };
        Some((models, self.known.report.version))
    }

    /// Workers that sent something else than a manifest says, since the last call.
    pub fn take_accused(&mut self) -> Vec<BadSource> {
        self.known.report.take_accused()
    }

    /// Description of what is missing still; empty if nothing is.
    pub fn lacking(&self) -> String {
        self.known.report.lacking()
    }

    /// The replica with this fingerprint, if other workers may have it.
    pub fn shared(&self, fingerprint: &str) -> Option<&Replica> {
        let replica = self.known.replicas.get(&fingerprint.parse().ok()?)?;
        (self.known.rules.is_sharing() && replica.listed).then_some(replica)
    }

    /// The replica with this fingerprint.
    pub fn replica(&self, fingerprint: &Digest) -> Option<&Replica> {
        self.known.replicas.get(fingerprint)
    }

    /// All replicas whose manifests have this name.
    pub fn of_manifests_called(&self, name: &str) -> Vec<Arc<PieceMap>> {
        let all = self.known.replicas.values().map(Replica::map);
        let called = all.filter(|map| map.manifest().name == name);
        called.cloned().collect()
    }

    /// True if a replica goes by this name.
    pub fn has_called(&self, name: &str) -> bool {
        let mut all = self.known.replicas.values();
        all.any(|replica| replica.is_called(name))
    }

    /// Names in the manifests of all replicas.
    pub fn manifest_names(&self) -> impl Iterator<Item = &str> {
        let all = self.known.replicas.values();
        all.map(|replica| replica.map().manifest().name.as_str())
    }

    /// Pieces of a model are here, under `name` if it has one, and others may have them. What is known of it
    /// already stays.
    pub fn add(&mut self, replica: Replica, name: Option<&str>) {
        let known = self.known.replicas.entry(replica.fingerprint());
        let known = known.or_insert(replica);
        known.listed = true;
        if let Some(name) = name {
            known.add_name(name);
        }
        self.known.report.version += 1;
    }

    /// Adds a replica whose name is not vouched for yet, so that its pieces can be fetched. What is known of it
    /// already stays.
    pub fn add_unlisted(&mut self, mut replica: Replica) {
        replica.listed = false;
        let fingerprint = replica.fingerprint();
        self.known.replicas.entry(fingerprint).or_insert(replica);
    }

    /// These pieces of a model are on the disk.
    pub fn look_result(&mut self, fingerprint: &Digest, here: PieceSet) {
        if let Some(replica) = self.known.replicas.get_mut(fingerprint)
            && replica.here != here
        {
            replica.here = here;
            self.known.report.version += 1;
        }
    }

    /// A piece is damaged on this machine's disk.
    pub fn piece_lost(&mut self, fingerprint: &Digest, piece: u32) {
        if let Some(replica) = self.known.replicas.get_mut(fingerprint)
            && replica.here.contains(piece)
        {
            replica.here.remove(piece);
            self.known.report.version += 1;
        }
    }

    /// Begins to look for a model; a short name is that of a model on the hub. `nearby` are the names of
    /// models in the folders of this machine, for messages.
    pub fn search(&mut self, name: &str, nearby: impl FnOnce() -> Vec<String>) -> Found {
        let name = long_name(name);
        if self.searches.contains_key(name) {
            return Found::Busy;
        }
        let usable = self.known.replicas.values();
        let usable = usable.filter(|r| !self.known.false_manifests.contains(&r.fingerprint()));
        if let Some(replica) = called(name, usable) {
            return match self.known.rules.policy.check(replica.map().signed()) {
                Ok(_) => Found::Here(replica.fingerprint()),
                Err(error) => Found::Refused(error.to_string()),
            };
        }
        let search = Search::new(name, nearby(), &mut self.known);
        self.searches.insert(name.to_owned(), search);
        Found::Search
    }

    /// The next step of a search. It ends with [`Catalogue::end_search`].
    pub fn poll_search(&mut self, name: &str, now: Instant) -> SearchStep {
        let name = long_name(name);
        match self.searches.get_mut(name) {
            Some(search) => search.poll(now, &mut self.known),
            None => SearchStep::Wait(now),
        }
    }

    /// True if the download from the hub that a search began is still this worker's.
    pub fn wants_download(&self, name: &str) -> bool {
        let search = self.searches.get(long_name(name));
        search.is_some_and(|search| search.wants_download(&self.known))
    }

    /// The download of a search failed, and the hub is left alone for that time; `None` if it was broken off.
    pub fn search_download_ended(
        &mut self,
        name: &str,
        failure: Option<(String, Duration)>,
        now: Instant,
    ) {
        if let Some(search) = self.searches.get_mut(long_name(name)) {
            search.download_ended(failure, now, &mut self.known.report);
        }
    }

    /// The model with this manifest is not what a search looks for.
    pub fn doubted(
        &mut self,
        name: &str,
        fingerprint: Digest,
        worker: &str,
        doubt: Doubt,
        now: Instant,
    ) {
        if let Some(search) = self.searches.get_mut(long_name(name)) {
            search.doubted(fingerprint, worker, doubt, now, &mut self.known);
        }
    }

    /// Forgets a replica that was added by [`Catalogue::add_unlisted`] and not named since.
    pub fn drop_unlisted(&mut self, fingerprint: &Digest) {
        let replica = self.known.replicas.get(fingerprint);
        if replica.is_some_and(|replica| !replica.listed) {
            self.known.replicas.remove(fingerprint);
        }
    }

    /// A replica has this name, which is vouched for; others may have it.
    pub fn name(&mut self, fingerprint: &Digest, name: &str) {
        if let Some(replica) = self.known.replicas.get_mut(fingerprint) {
            replica.listed = true;
            replica.add_name(name);
            self.known.report.version += 1;
        }
    }

    /// A search is over.
    pub fn end_search(&mut self, name: &str) {
        let name = long_name(name);
        self.searches.remove(name);
        self.known.report.ends(name);
    }

    /// True if the hub has to be asked before [`crate::vouch::judge`].
    pub fn asks_hub(&self, name: &str) -> bool {
        needs_hub(name, self.known.told.get(name), &self.known.rules)
    }

    /// The hub's recent answer about a name.
    pub fn hub_answer(&self, name: &str, now: Instant) -> Option<Result<Arc<Expected>, String>> {
        let (at, answer) = self.hub.get(name)?;
        let good_for = if answer.is_ok() { SAID } else { SILENT };
        (now.saturating_duration_since(*at) < good_for).then(|| answer.clone())
    }

    /// The hub's list of the files of a model, or the reason why it does not answer.
    pub fn hub_answered(
        &mut self,
        name: &str,
        answer: Result<Arc<Expected>, String>,
        now: Instant,
    ) {
        let age = |at: &Instant| now.saturating_duration_since(*at);
        self.hub.retain(|_, (at, _)| age(at) < SAID);
        self.hub.insert(name.to_owned(), (now, answer));
    }

    /// The head's answer about a name.
    pub fn told(&self, name: &str) -> Option<&ModelSources> {
        self.known.told.get(name)
    }

    /// Requests pieces of a replica: the number of the request, for [`Catalogue::take_result`], and true if a
    /// download begins with it, for [`Catalogue::poll_download`]. `begin` is the number of the piece to begin
    /// with: another one on each worker. `None` if all pieces are here.
    ///
    /// # Errors
    /// If there is no store, or no such replica.
    pub fn want(
        &mut self,
        fingerprint: &Digest,
        pieces: PieceSet,
        begin: u32,
        now: Instant,
    ) -> Result<Option<(u64, bool)>, String> {
        let replica = self.known.replicas.get(fingerprint);
        let replica = replica.ok_or("its files are not what its manifest says")?;
        if replica.missing(&pieces).is_empty() {
            return Ok(None);
        }
        if !self.known.rules.store {
            return Err("there is no store".to_owned());
        }
        let id = self.next_want;
        self.next_want += 1;
        let begins = !self.downloads.contains_key(fingerprint);
        let new = || Download::new(replica.map().clone(), replica.title(), begin, now);
        let download = self.downloads.entry(*fingerprint).or_insert_with(new);
        download.want(Want {
            id: Some(id),
            pieces,
        });
        Ok(Some((id, begins)))
    }

    /// The result of a request, once it is known.
    pub fn take_result(&mut self, want: u64) -> Option<Result<(), String>> {
        self.results.remove(&want)
    }

    /// Nobody waits for the result of a request any more.
    pub fn forget_want(&mut self, fingerprint: &Digest, want: u64) {
        self.results.remove(&want);
        if let Some(download) = self.downloads.get_mut(fingerprint) {
            download.forget(want);
        }
    }

    /// The next step of a download. After [`DownloadStep::End`] the download is gone.
    pub fn poll_download(&mut self, fingerprint: &Digest, now: Instant) -> DownloadStep {
        let Some(download) = self.downloads.get_mut(fingerprint) else {
            return DownloadStep::End;
        };
        let step = download.poll(now, &mut self.known, &mut self.results);
        if step == DownloadStep::End {
            self.downloads.remove(fingerprint);
        }
        step
    }

    /// Nothing more comes of a download.
    pub fn give_up_download(&mut self, fingerprint: &Digest, error: &str) {
        if let Some(download) = self.downloads.remove(fingerprint) {
            download.give_up(error, &mut self.results);
        }
    }

    /// Result of [`DownloadStep::Prepare`].
    pub fn prepared(&mut self, fingerprint: &Digest, result: Result<(), String>) {
        if let Some(download) = self.downloads.get_mut(fingerprint) {
            download.prepared(result, &mut self.known, &mut self.results);
        }
    }

    /// Result of [`DownloadStep::Store`]; with an error, true if a file is not what the manifest says.
    pub fn stored(&mut self, fingerprint: &Digest, result: Result<(), (String, bool)>) {
        let reason = result.as_ref().err().map(|(reason, _)| reason.clone());
        let download = self.downloads.get_mut(fingerprint);
        if download.is_some_and(|download| download.stored(result, &self.known, &mut self.results))
        {
            self.disown(fingerprint, &reason.unwrap_or_default());
        }
    }

    /// Forgets a model whose files, all of them here, contradict its manifest: each piece matched, so the
    /// manifest is false.
    fn disown(&mut self, fingerprint: &Digest, reason: &str) {
        let model = self.known.replicas.remove(fingerprint);
        tracing::error!(
            model = model.map_or_else(|| fingerprint.to_string(), |model| model.title()),
            %fingerprint,
            reason,
            "the manifest that another worker gave contradicts itself: the model is forgotten, and looked for elsewhere"
        );
        if self.known.false_manifests.len() < MOST_FALSE {
            self.known.false_manifests.insert(*fingerprint);
        }
        self.known.report.version += 1;
    }

    /// True if the download from the hub is still this worker's.
    pub fn keeps_hub(&self, fingerprint: &Digest) -> bool {
        let download = self.downloads.get(fingerprint);
        download.is_some_and(|download| download.is_given(&self.known))
    }

    /// Result of [`DownloadStep::FetchFromHub`]: the error, for which the hub is left alone for that time.
    pub fn hub_ended(
        &mut self,
        fingerprint: &Digest,
        failure: Option<(String, Duration)>,
        now: Instant,
    ) {
        if let Some(download) = self.downloads.get_mut(fingerprint) {
            download.hub_ended(failure, now, &self.known);
        }
    }

    /// So much of the model that is sought as `name` has come from the hub.
    pub fn hub_progress(&mut self, name: &str, bytes: u64, total: u64) {
        self.known.report.seeks(name, |sought| {
            sought.origin_bytes = bytes;
            sought.bytes_total = sought.bytes_total.max(total);
        });
    }

    /// An event of a source of a download.
    pub fn source_event(&mut self, of: &Digest, source: String, event: SourceEvent, now: Instant) {
        if let SourceEvent::Piece(piece) = &event
            && let Some(replica) = self.known.replicas.get_mut(of)
        {
            replica.here.insert(piece.piece());
        }
        if let Some(download) = self.downloads.get_mut(of) {
            download.source_event(source, event, now, &mut self.results);
        }
    }
}

/// Time for which an answer of the hub is good, and for which its silence is.
const SAID: Duration = Duration::from_secs(60);
const SILENT: Duration = Duration::from_secs(15);

/// False manifests that are remembered.
const MOST_FALSE: usize = 64;

#[cfg(test)]
mod tests;
