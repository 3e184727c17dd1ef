//! Finds a model by its name, as the core's search wants it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_hub::{Expected, Unchecked};
use mesh_store::{Digest, SignedManifest, Store, StoreError};
use mesh_worker_core::names::{is_hub_name, long_name};
use mesh_worker_core::vouch::judge;
use mesh_worker_core::{Doubt, Found, HubAnswer, PieceMap, Replica, SearchStep, Vouched};

use super::context::{Models, blocking};
use super::files::{ReplicaFiles, pieces_in};
use super::hub::{self, HubFailure};
use super::names::nearby;
use super::source;
use crate::core::{Changes, CoreHandle};

impl Models {
    /// The model called `name`: from the store, else its manifest comes from another worker, or all of it
    /// from the hub. A short name is that of a model on the hub. Waits for as long as that takes; an error is
    /// one that waiting does not mend.
    pub(crate) async fn obtain(self: &Arc<Self>, name: &str) -> Result<Arc<ReplicaFiles>, String> {
        let Some(store) = self.store.clone() else {
            return Err("there is no store to look it up in".to_owned());
        };
        let name = long_name(name);
        let mut changes = self.core.changes();
        // Names of the hub are not compared with others. Listed before the core is asked: it reads folders.
        let near = match is_hub_name(name) {
            true => Vec::new(),
            false => {
                let config = self.config.clone();
                let listed = tokio::task::spawn_blocking(move || nearby(&config));
                listed.await.unwrap_or_default()
            }
        };
        loop {
            let near = || near.clone();
            match self.core.with(|core| core.catalogue.search(name, near)) {
                Found::Here(fingerprint) => {
                    let files = self.stored(&fingerprint);
                    return files.ok_or_else(|| "it is gone from the store".to_owned());
                }
                Found::Refused(reason) => return Err(reason),
                Found::Busy => changes.next().await,
                Found::Search => break,
            }
        }
        let searching = Searching {
            models: self,
            store,
            name,
        };
        searching.run(changes).await
    }

    fn stored(&self, fingerprint: &Digest) -> Option<Arc<ReplicaFiles>> {
        self.files_of(|catalogue| catalogue.replica(fingerprint))
    }
}

/// A search under way; the core's ends with it.
struct Searching<'a> {
    models: &'a Arc<Models>,
    store: Store,
    name: &'a str,
}

impl Drop for Searching<'_> {
    fn drop(&mut self) {
        self.core()
            .change(|core| core.catalogue.end_search(self.name));
    }
}

impl Searching<'_> {
    fn core(&self) -> &CoreHandle {
        &self.models.core
    }

    async fn run(&self, mut changes: Changes) -> Result<Arc<ReplicaFiles>, String> {
        let (core, name) = (self.core(), self.name);
        loop {
            let now = Instant::now();
            match core.with(|core| core.catalogue.poll_search(name, now)) {
                SearchStep::Download => {
                    if let Some(files) = self.download(&mut changes).await {
                        return Ok(files);
                    }
                }
                SearchStep::Vouch(fingerprint) => match self.name_stored(&fingerprint).await {
                    Ok(files) => return Ok(files),
                    Err(doubt) => self.doubt(fingerprint, "this worker's store", doubt),
                },
                SearchStep::FetchManifest(fingerprint, seat) => {
                    let Some(peers) = self.models.peers.get() else {
                        continue;
                    };
                    match source::manifest(peers, &seat, &fingerprint).await {
                        Ok(signed) => match self.take(signed, &seat.name).await {
                            Ok(files) => return Ok(files),
                            Err(doubt) => self.doubt(fingerprint, &seat.name, doubt),
                        },
                        Err(reason) => {
                            let worker = seat.name;
                            tracing::warn!(model = name, worker, reason, "no manifest");
                        }
                    }
                }
                SearchStep::Wait(until) => changes.next_until(until).await,
            }
        }
    }

    fn doubt(&self, fingerprint: Digest, worker: &str, doubt: Doubt) {
        let (now, name) = (Instant::now(), self.name);
        self.core().change(|core| {
            core.catalogue
                .doubted(name, fingerprint, worker, doubt, now);
        });
    }

    /// Gets the model from the hub, for as long as the core wants this worker to; bytes that have arrived by
    /// then are kept.
    async fn download(&self, changes: &mut Changes) -> Option<Arc<ReplicaFiles>> {
        let (core, name) = (self.core(), self.name);
        let fetching = hub::fetch(self.models, &self.store, name, name);
        tokio::pin!(fetching);
        let fetched = loop {
            tokio::select! {
                fetched = &mut fetching => break Some(fetched),
                () = changes.next() => {
                    if !core.with(|core| core.catalogue.wants_download(name)) {
                        break None;
                    }
                }
            }
        };
        let failure = match fetched {
            Some(Ok(fingerprint)) => match self.downloaded(fingerprint).await {
                Ok(files) => return Some(files),
                Err(failure) => Some(failure),
            },
            Some(Err(failure)) => Some(failure),
            None => None,
        };
        core.change(|core| {
            let now = Instant::now();
            core.catalogue.search_download_ended(name, failure, now);
        });
        None
    }

    async fn downloaded(&self, fingerprint: Digest) -> Result<Arc<ReplicaFiles>, HubFailure> {
        let store = self.store.clone();
        let rules = self.core().with(|core| core.catalogue.rules().clone());
        let found = tokio::task::spawn_blocking(move || {
            let signed = store.manifest(&fingerprint).map_err(|e| e.to_string())?;
            let signed = signed.ok_or("its manifest is gone from the store")?;
            let checked = rules.policy.check(&signed);
            checked.map_err(|error| error.to_string())?;
            let map = Arc::new(PieceMap::new(signed));
            let here = pieces_in(&store, &map);
            Ok::<_, String>((map, here))
        });
        let found = found.await.map_err(hub::hindered)?;
        let (map, here) = found.map_err(hub::unaccepted)?;
        let replica = Replica::new(map.clone(), here);
        self.core()
            .change(|core| core.catalogue.add(replica, Some(self.name)));
        Ok(ReplicaFiles::new(map, &self.store, self.core()))
    }

    /// Names a model of the store, if the name is vouched for by now.
    async fn name_stored(&self, fingerprint: &Digest) -> Result<Arc<ReplicaFiles>, Doubt> {
        let gone = || Doubt::Nobody("it is gone from the store".to_owned());
        let files = self.models.stored(fingerprint).ok_or_else(gone)?;
        let vouched = self.vouch(files.map().signed()).await?;
        self.check_contents(&files, vouched.unchecked).await?;
        if let Err(error) = self.record(fingerprint, "unknown", &vouched.by).await {
            let model = self.name;
            tracing::warn!(
                model,
                error,
                "who vouches for the model will be asked again after a restart"
            );
        }
        self.core()
            .change(|core| core.catalogue.name(fingerprint, self.name));
        Ok(files)
    }

    /// Takes in a manifest from the worker `from`, if another party vouches that it is of this name.
    async fn take(&self, signed: SignedManifest, from: &str) -> Result<Arc<ReplicaFiles>, Doubt> {
        let vouched = self.vouch(&signed).await?;
        let (store, name) = (self.store.clone(), self.name.to_owned());
        let (certain, said) = (vouched.unchecked.is_empty(), format!("worker {from}"));
        let taken = blocking(move || {
            let map = Arc::new(PieceMap::new(signed));
            let was_here = matches!(store.manifest(&map.fingerprint()), Ok(Some(_)));
            let fingerprint = store.put_manifest(map.signed())?;
            if !certain && !was_here {
                // Should this end here, it is known for hearsay.
                store.name(&name, &fingerprint, Some(&said))?;
            }
            let here = pieces_in(&store, &map);
            Ok::<_, StoreError>((map, here, was_here))
        });
        let (map, here, was_here) = taken.await.map_err(Doubt::Nobody)?;
        let fingerprint = map.fingerprint();
        // The name is not reported before all of the model is known.
        let replica = Replica::new(map.clone(), here);
        self.core()
            .with(|core| core.catalogue.add_unlisted(replica));
        let files = ReplicaFiles::new(map, &self.store, self.core());
        if let Err(doubt) = self.check_contents(&files, vouched.unchecked).await {
            self.core()
                .change(|core| core.catalogue.drop_unlisted(&fingerprint));
            // A model that was in the store before is that of another name.
            if !was_here {
                let store = self.store.clone();
                let _ = tokio::task::spawn_blocking(move || discard(&store, &fingerprint)).await;
            }
            return Err(doubt);
        }
        let recorded = self.record(&fingerprint, from, &vouched.by).await;
        recorded.map_err(Doubt::Nobody)?;
        tracing::info!(model = self.name, vouched = vouched.by, %fingerprint, "the model is what its name says");
        self.core()
            .change(|core| core.catalogue.name(&fingerprint, self.name));
        Ok(files)
    }

    async fn record(&self, fingerprint: &Digest, from: &str, by: &str) -> Result<(), String> {
        let (store, name, fingerprint) = (self.store.clone(), self.name.to_owned(), *fingerprint);
        let (from, by) = (from.to_owned(), by.to_owned());
        blocking(move || store.name_from_worker(&name, &fingerprint, &from, &by)).await
    }

    /// Finds a party that vouches that the model with this manifest has this name.
    async fn vouch(&self, signed: &SignedManifest) -> Result<Vouched<Unchecked>, Doubt> {
        let (core, name) = (self.core(), self.name);
        let (asks_hub, mut told, rules) = core.with(|core| {
            let catalogue = &core.catalogue;
            let told = catalogue.told(name).cloned();
            (catalogue.asks_hub(name), told, catalogue.rules().clone())
        });
        let hub = match asks_hub {
            true => {
                let answer = self.hub_answer().await;
                // The head may have said more meanwhile.
                told = core.with(|core| core.catalogue.told(name).cloned());
                Some(answer.map(|expected| HubAnswer {
                    commit: expected.commit.clone(),
                    compared: expected.check(&signed.manifest),
                }))
            }
            false => None,
        };
        judge(name, signed, told.as_ref(), hub, &rules)
    }

    /// The hub's list of the files of the model, asked for again after a while.
    async fn hub_answer(&self) -> Result<Arc<Expected>, String> {
        let (core, name) = (self.core(), self.name);
        let known = core.with(|core| core.catalogue.hub_answer(name, Instant::now()));
        if let Some(answer) = known {
            return answer;
        }
        let answer = hub::expected(name).await.map(Arc::new);
        let kept = answer.clone();
        core.with(|core| core.catalogue.hub_answered(name, kept, Instant::now()));
        answer
    }

    /// Gets the files for which the hub gives no SHA-256, and compares them with the hub's data.
    async fn check_contents(
        &self,
        files: &Arc<ReplicaFiles>,
        unchecked: Vec<Unchecked>,
    ) -> Result<(), Doubt> {
        if unchecked.is_empty() {
            return Ok(());
        }
        let pieces = files.map().files(unchecked.iter().map(|file| file.file));
        let fetched = self.models.fetch(files, pieces).await;
        fetched.map_err(Doubt::Nobody)?;
        let files = files.clone();
        let compared = tokio::task::spawn_blocking(move || {
            for file in unchecked {
                let content = files.content(file.file, LARGEST_SMALL);
                let content = content.map_err(|error| Doubt::Nobody(error.to_string()))?;
                if !file.is(&content) {
                    let path = &files.map().manifest().files[file.file as usize].path;
                    return Err(Doubt::Other(format!(
                        "the hub has another model under this name: {path:?} is another file"
                    )));
                }
            }
            Ok(())
        });
        let failed = |error: tokio::task::JoinError| Err(Doubt::Nobody(error.to_string()));
        compared.await.unwrap_or_else(failed)
    }
}

/// Removes a model as soon as the task that fetched of it has let go of it. Blocks.
fn discard(store: &Store, fingerprint: &Digest) {
    for _ in 0..DISCARD_ATTEMPTS {
        match store.remove(fingerprint) {
            Err(StoreError::Pinned { .. }) => std::thread::sleep(DISCARD_PAUSE),
            Err(error) => {
                tracing::warn!(%fingerprint, %error, "a model that is not what it says stays in the store");
                return;
            }
            Ok(_) => return,
        }
    }
}

const DISCARD_ATTEMPTS: u32 = 50;
const DISCARD_PAUSE: Duration = Duration::from_millis(100);
/// No file without a SHA-256 is larger.
const LARGEST_SMALL: u64 = 256 << 20;

#[cfg(test)]
mod tests {
    use mesh_hub::{Expected, Hub, HubName, Settings};
    use mesh_store::Manifest;
    use mesh_testkit::hub::TestHub;

    use super::*;
    use crate::config::{Config, StoreConfig};

    const NAME: &str = "acme/m";

    struct Quiet;

    impl mesh_hub::Watch for Quiet {
        fn planned(&self, _: u64, _: u64) {}
        fn arrived(&self, _: u64) {}
        fn waiting(&self, _: &str, _: Duration) {}
    }

    fn models(dir: &std::path::Path, hub: bool) -> Arc<Models> {
        let config = Config {
            state_dir: dir.to_owned(),
            head: Some("127.0.0.1:1".to_owned()),
            store: StoreConfig {
                dir: Some(dir.join("store")),
                hub,
                ..StoreConfig::default()
            },
            ..Config::default()
        };
        Models::open(&Arc::new(config)).unwrap()
    }

    /// Files of a model as the hub would list them.
    async fn expected(files: &[(&str, Vec<u8>)]) -> Expected {
        let hub = TestHub::start().await.unwrap();
        hub.publish(NAME, files);
        let client = Hub::new(Settings::at(&hub.endpoint()).unwrap()).unwrap();
        let name: HubName = NAME.parse().unwrap();
        client.expected(&name, &Quiet).await.unwrap()
    }

    fn files(config: &str) -> Vec<(&'static str, Vec<u8>)> {
        let config = config.as_bytes().to_vec();
        vec![
            ("config.json", config),
            ("model.safetensors", b"\x02\0\0\0\0\0\0\0{}".to_vec()),
            ("tokenizer.json", b"{}".to_vec()),
        ]
    }

    /// Puts a model with these files into the store.
    fn put(store: &Store, name: &str, files: &[(&str, Vec<u8>)]) -> SignedManifest {
        let folder = tempfile::tempdir().unwrap();
        for (path, bytes) in files {
            std::fs::write(folder.path().join(path), bytes).unwrap();
            store.put(bytes).unwrap();
        }
        let paths: Vec<_> = files.iter().map(|(path, _)| (*path).into()).collect();
        let manifest = Manifest::of_files(name, folder.path(), &paths, &|_| ()).unwrap();
        let signed = SignedManifest::unsigned(manifest);
        store.put_manifest(&signed).unwrap();
        signed
    }

    #[tokio::test]
    async fn a_model_of_the_store_outlasts_an_offer_of_it_under_another_name() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        // The branch has moved on: of its files one differs, and has the same length.
        let expected = expected(&files("{\"a\": 2}")).await;
        let signed = put(&store, &expected.name, &files("{\"a\": 1}"));
        let fingerprint = signed.manifest.fingerprint();
        let commit = format!("{NAME}@{}", "c".repeat(40));
        store
            .name(&commit, &fingerprint, Some("http://hub/acme/m/tree/c"))
            .unwrap();
        for was_here in [true, false] {
            let models = models(dir.path(), true);
            let said = Ok(Arc::new(expected.clone()));
            models.core.with(|core| {
                core.catalogue.hub_answered(NAME, said, Instant::now());
            });
            let searching = Searching {
                models: &models,
                store: store.clone(),
                name: NAME,
            };
            let kept = searching.take(signed.clone(), "peer").await;
            assert!(matches!(kept, Err(Doubt::Other(_) | Doubt::Nobody(_))));
            assert_eq!(store.manifest(&fingerprint).unwrap().is_some(), was_here);
            let names: Vec<String> = store.names().unwrap().into_iter().map(|n| n.name).collect();
            match was_here {
                true => {
                    assert!(matches!(kept, Err(Doubt::Other(_))));
                    assert_eq!(names, [commit.as_str()]);
                    store.remove(&fingerprint).unwrap();
                    for (_, bytes) in files("{\"a\": 1}") {
                        store.put(&bytes).unwrap();
                    }
                }
                false => assert_eq!(names, [] as [String; 0]),
            }
        }
    }
}
