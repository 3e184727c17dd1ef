//! Finds a model by its name: in the store, at other workers, on the hub.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_proto::ModelSources;
use mesh_store::{Digest, SignedManifest, Store, StoreError};

use super::held::Held;
use super::origin::{self, OriginError};
use super::vouch::Doubt;
use super::{Models, lock, source, wanted};

impl Models {
    /// The model called `name`: from the store, else its manifest comes from another worker, or all of it
    /// from the hub. A short name is that of a model on the hub. Waits for as long as that takes; an error is
    /// one that waiting does not mend.
    pub(crate) async fn obtain(self: &Arc<Self>, name: &str) -> Result<Arc<Held>, String> {
        let Some(store) = self.store.clone() else {
            return Err("there is no store to look it up in".to_owned());
        };
        let name = wanted::long_name(name);
        let turn = lock(&self.seeking)
            .entry(name.to_owned())
            .or_default()
            .clone();
        let _turn = turn.lock().await;
        // The store's names count before the manifest's, and present models before replaced ones.
        let known = lock(&self.held)
            .values()
            .filter(|held| held.is_called(name) && !self.is_disowned(&held.fingerprint()))
            .max_by_key(|held| {
                (
                    held.is_named(name),
                    held.pieces_here() > 0,
                    held.has_names(),
                )
            })
            .cloned();
        if let Some(held) = known {
            self.policy
                .check(&held.signed)
                .map_err(|error| error.to_string())?;
            return Ok(held);
        }
        tracing::info!(model = name, "the model is not here, looking for it");
        let signed_only = self.policy.requires_signature();
        // Nothing that comes from the hub is signed.
        let origin = self.config.store.hub && origin::is_name(name) && !signed_only;
        self.seeks(name, |sought| {
            sought.origin = origin;
            sought.signed_only = signed_only;
        });
        let found = self.seek(name, &store).await;
        self.no_longer_seeks(name);
        found
    }

    async fn seek(self: &Arc<Self>, name: &str, store: &Store) -> Result<Arc<Held>, String> {
        let mut told = self.told.subscribe();
        let mut refused = String::new();
        let mut nowhere = String::new();
        // Manifests that claim this name and are another model, and since when there is one.
        let mut others: BTreeMap<Digest, String> = BTreeMap::new();
        let mut since: Option<Instant> = None;
        // Time until which the hub is left alone.
        let mut rest: Option<Instant> = None;
        loop {
            if rest.is_some_and(|until| until <= Instant::now()) {
                rest = None;
                self.seeks(name, |sought| sought.origin_error.clear());
            }
            let sources = told.borrow_and_update().get(name).cloned();
            if let Some(pin) = sources.as_ref().and_then(operators_pin)
                && !self.is_disowned(&pin)
                && others.remove(&pin).is_some()
            {
                self.tell_others(name, &others);
            }
            // A head that does not know refusals would name the refused one again and again.
            let own = since.is_some_and(|since| since.elapsed() >= ON_ITS_OWN) && self.may_go(name);
            if rest.is_none() && (own || self.has_errand(name, sources.as_ref())) {
                match self.run_errand(name, store, own).await {
                    Ok(Some(held)) => return Ok(held),
                    // Another one has it now.
                    Ok(None) => continue,
                    Err(error) => {
                        tracing::error!(model = name, %error, "the hub does not give the model");
                        self.seeks(name, |sought| sought.origin_error = error.to_string());
                        rest = Some(Instant::now() + error.pause);
                        continue;
                    }
                }
            }
            let mut doubts = Vec::new();
            if let Some(held) = self.said_to_be(name, &others) {
                match self.name_stored(name, &held, sources.as_ref()).await {
                    Ok(()) => return Ok(held),
                    Err(doubt) => {
                        doubts.push((held.fingerprint(), "this worker's store".to_owned(), doubt))
                    }
                }
            }
            if let Some(sources) = &sources
                && let Ok(fingerprint) = sources.fingerprint.parse::<Digest>()
                && !others.contains_key(&fingerprint)
                && let Some(peers) = self.peers()
            {
                let disowned = self.is_disowned(&fingerprint);
                if disowned {
                    let reason = "its files are not what its manifest says".to_owned();
                    doubts.push((fingerprint, String::new(), Doubt::Other(reason)));
                }
                for seat in sources.holders.iter().filter(|_| !disowned) {
                    let signed = match source::manifest(&peers, seat, &fingerprint).await {
                        Ok(signed) => signed,
                        Err(reason) => {
                            tracing::warn!(model = name, worker = seat.name, reason, "no manifest");
                            continue;
                        }
                    };
                    match self.keep(name, signed, &seat.name, store, sources).await {
                        Ok(held) => return Ok(held),
                        Err(doubt) => {
                            doubts.push((fingerprint, seat.name.clone(), doubt));
                            // Others have the same one.
                            break;
                        }
                    }
                }
            }
            for (fingerprint, worker, doubt) in doubts {
                let (Doubt::Other(reason) | Doubt::Nobody(reason)) = doubt.clone();
                if reason != refused {
                    tracing::error!(model = name, worker, %fingerprint, reason, "manifest refused");
                }
                if let Doubt::Other(_) = doubt {
                    if others.len() < MOST_OTHERS {
                        others.insert(fingerprint, reason.clone());
                    }
                    since.get_or_insert_with(Instant::now);
                    self.tell_others(name, &others);
                    // The hub answers, so a worker has to download from it.
                    self.seeks(name, |sought| sought.origin_error.clear());
                } else {
                    self.seeks(name, |sought| sought.origin_error.clone_from(&reason));
                }
                refused = reason;
            }
            let sources = told.borrow().get(name).cloned();
            if let Some(sources) = sources.filter(|sources| sources.fingerprint.is_empty())
                && let Some(text) = self.why_nowhere(name, &sources, &others)
                && text != nowhere
            {
                tracing::warn!(model = name, reason = text, "the model is nowhere yet");
                self.seeks(name, |sought| sought.origin_error.clone_from(&text));
                nowhere = text;
            }
            // Others may come, and a link that could not be made may be made in a moment.
            let _ = tokio::time::timeout(SEEK_AGAIN, told.changed()).await;
        }
    }

    /// Reports to the head the manifests that are not taken under a name. This worker's findings about files
    /// count for itself only; the hub's word about the name counts for all.
    fn tell_others(&self, name: &str, others: &BTreeMap<Digest, String>) {
        let (unusable, refused): (Vec<&Digest>, Vec<&Digest>) =
            others.keys().partition(|other| self.is_disowned(other));
        let texts = |list: Vec<&Digest>| list.into_iter().map(Digest::to_string).collect();
        self.seeks(name, |sought| {
            (sought.unusable, sought.refused) = (texts(unusable), texts(refused));
        });
    }

    /// A model of the store that another worker once said is `name`.
    fn said_to_be(&self, name: &str, others: &BTreeMap<Digest, String>) -> Option<Arc<Held>> {
        let held = lock(&self.held);
        let mut said = held.values().filter(|held| held.is_said_to_be(name));
        said.find(|held| {
            !others.contains_key(&held.fingerprint()) && !self.is_disowned(&held.fingerprint())
        })
        .cloned()
    }

    /// Names a model of the store, if the name is vouched for by now.
    async fn name_stored(
        self: &Arc<Self>,
        name: &str,
        held: &Arc<Held>,
        told: Option<&ModelSources>,
    ) -> Result<(), Doubt> {
        let vouched = self.vouch(name, &held.signed, told).await?;
        self.check_contents(held, vouched.unchecked).await?;
        let (store, fingerprint) = (self.store.clone(), held.fingerprint());
        let (named, by) = (name.to_owned(), vouched.by);
        let kept = tokio::task::spawn_blocking(move || match store {
            Some(store) => store.name_from_worker(&named, &fingerprint, "unknown", &by),
            None => Ok(()),
        });
        if let Ok(Err(error)) = kept.await {
            tracing::warn!(model = name, %error, "who vouches for the model will be asked again after a restart");
        }
        held.add_name(name);
        self.changed();
        Ok(())
    }

    /// Returns true if this worker may get the model from the hub, asked to or not.
    fn may_go(&self, name: &str) -> bool {
        let state = lock(&self.state);
        state.sought.get(name).is_some_and(|sought| sought.origin)
    }

    /// Reason for which a model that no worker has does not come from the hub either; `None` if it may.
    fn why_nowhere(
        &self,
        name: &str,
        sources: &ModelSources,
        others: &BTreeMap<Digest, String>,
    ) -> Option<String> {
        if self.policy.requires_signature() {
            return Some(format!(
                "no worker has a manifest of {name} that is signed, which `store.require_signature` asks for: sign it with `hydramesh \
                 models sign` where it is"
            ));
        }
        let from_hub = origin::is_name(name) && self.config.store.hub;
        let pin = sources.pin.parse::<Digest>().ok();
        if let Some(pin) = pin.filter(|pin| !from_hub && !others.contains_key(pin)) {
            return Some(pinned_to_nothing(name, &pin));
        }
        if !origin::is_name(name) {
            let held: Vec<_> = lock(&self.held).values().cloned().collect();
            let close = wanted::like(name, &self.config, &held);
            return Some(format!("no worker has it yet, {}", wanted::unknown(&close)));
        }
        let hub = self.config.store.hub;
        (!hub).then(|| "no worker has it yet, and `store.hub` forbids to ask the hub".to_owned())
    }

    /// Returns true if this worker is the one that gets a model from outside the mesh.
    pub(super) fn has_errand(&self, name: &str, sources: Option<&ModelSources>) -> bool {
        let may = || self.may_go(name);
        // A worker without a head, or one that may not take from others, asks no one.
        let alone = !self.config.has_head() || !self.config.store.peers;
        (alone || sources.is_some_and(|sources| sources.origin)) && may()
    }

    /// Gets a model from the hub, for as long as the head wants this worker to, or on its `own` account.
    /// `None` if it no longer does; bytes that have arrived by then are kept.
    async fn run_errand(
        self: &Arc<Self>,
        name: &str,
        store: &Store,
        own: bool,
    ) -> Result<Option<Arc<Held>>, OriginError> {
        let mut told = self.told.subscribe();
        let fetching = origin::fetch(self, store, name, name);
        tokio::pin!(fetching);
        let fetched = loop {
            tokio::select! {
                fetched = &mut fetching => break fetched,
                _ = told.changed(), if !own => {
                    if !self.has_errand(name, told.borrow_and_update().get(name)) {
                        tracing::info!(model = name, "another worker gets the model from the hub");
                        return Ok(None);
                    }
                }
            }
        };
        let fingerprint = fetched?;
        let (store, name) = (store.clone(), name.to_owned());
        let policy = self.policy.clone();
        let kept = tokio::task::spawn_blocking(move || {
            let signed = store.manifest(&fingerprint).map_err(|e| e.to_string())?;
            let signed = signed.ok_or("its manifest is gone from the store")?;
            policy.check(&signed).map_err(|error| error.to_string())?;
            let held = Held::new(&store, fingerprint, signed);
            held.add_name(&name);
            Ok::<_, String>(held)
        });
        let held = kept
            .await
            .map_err(OriginError::other)?
            .map_err(OriginError::refused)?;
        Ok(Some(self.hold(held)))
    }

    /// Takes in a manifest from the worker `from`, if another party vouches that it is `name`.
    async fn keep(
        self: &Arc<Self>,
        name: &str,
        signed: SignedManifest,
        from: &str,
        store: &Store,
        told: &ModelSources,
    ) -> Result<Arc<Held>, Doubt> {
        let vouched = self.vouch(name, &signed, Some(told)).await?;
        let failed = |error: String| Doubt::Nobody(error);
        let kept_in = store.clone();
        let (called, said) = (name.to_owned(), format!("worker {from}"));
        let certain = vouched.unchecked.is_empty();
        let kept = tokio::task::spawn_blocking(move || {
            let was_here = kept_in.manifest(&signed.manifest.fingerprint());
            let was_here = matches!(was_here, Ok(Some(_)));
            let fingerprint = kept_in.put_manifest(&signed)?;
            if !certain && !was_here {
                // Should this end here, it is known for hearsay.
                kept_in.name(&called, &fingerprint, Some(&said))?;
            }
            let held = Held::new(&kept_in, fingerprint, signed);
            Ok::<_, mesh_store::StoreError>((held, was_here))
        });
        let kept = kept.await.map_err(|error| failed(error.to_string()))?;
        let (held, was_here) = kept.map_err(|error| failed(error.to_string()))?;
        let known = lock(&self.held).get(&held.fingerprint()).cloned();
        let held = known.unwrap_or_else(|| Arc::new(held));
        // The name is not reported before all of the model is known.
        if let Err(doubt) = self.check_contents(&held, vouched.unchecked).await {
            let (store, fingerprint) = (store.clone(), held.fingerprint());
            drop(held);
            // A model that was in the store before is that of another name.
            if !was_here {
                let _ = tokio::task::spawn_blocking(move || discard(&store, &fingerprint)).await;
            }
            return Err(doubt);
        }
        let (store, fingerprint) = (store.clone(), held.fingerprint());
        let (called, from, by) = (name.to_owned(), from.to_owned(), vouched.by.clone());
        let named = tokio::task::spawn_blocking(move || {
            store.name_from_worker(&called, &fingerprint, &from, &by)
        });
        let named = named.await.map_err(|error| failed(error.to_string()))?;
        named.map_err(|error| failed(error.to_string()))?;
        tracing::info!(model = name, vouched = vouched.by, %fingerprint, "the model is what its name says");
        let held = self.hold_shared(held);
        held.add_name(name);
        Ok(held)
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

/// Fingerprint to which an operator pinned the name, if one did.
fn operators_pin(sources: &ModelSources) -> Option<Digest> {
    let pin = sources.pinned_by_operator.then_some(&sources.pin)?;
    pin.parse().ok()
}

/// Message for a name that is pinned to a model that no worker has.
fn pinned_to_nothing(name: &str, pin: &Digest) -> String {
    format!(
        "the head pins {name} to {}, which no worker has: start a worker that has it, or let another model have the name (`hydramesh \
         models pins release {name}`)",
        pin.short()
    )
}

const DISCARD_ATTEMPTS: u32 = 50;
const DISCARD_PAUSE: Duration = Duration::from_millis(100);
const SEEK_AGAIN: Duration = Duration::from_secs(2);
/// Time for the head to give the download to another worker after a refusal.
const ON_ITS_OWN: Duration = Duration::from_secs(10);
/// Manifests that are refused under one name.
const MOST_OTHERS: usize = 16;

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
            let said = (Instant::now(), Ok(Arc::new(expected.clone())));
            lock(&models.hub.0).insert(NAME.to_owned(), said);
            let told = ModelSources::default();
            let kept = models
                .keep(NAME, signed.clone(), "peer", &store, &told)
                .await;
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

    #[tokio::test]
    async fn an_operators_pin_counts_before_the_hub() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        let signed = put(&store, "m", &files("{}"));
        let models = models(dir.path(), true);
        let said = (Instant::now(), Ok(Arc::new(expected(&files("{ }")).await)));
        lock(&models.hub.0).insert(NAME.to_owned(), said);
        let mut told = ModelSources {
            pin: signed.manifest.fingerprint().to_string(),
            ..ModelSources::default()
        };
        let doubt = models.vouch(NAME, &signed, Some(&told)).await.unwrap_err();
        assert!(matches!(doubt, Doubt::Other(_)), "{doubt:?}");
        told.pinned_by_operator = true;
        let vouched = models.vouch(NAME, &signed, Some(&told)).await.unwrap();
        assert_eq!(vouched.by, "the operator's pin at the head");
        told.pin = "a".repeat(64);
        let doubt = models.vouch(NAME, &signed, Some(&told)).await.unwrap_err();
        // The hub does not say otherwise: nobody is to hear that it refutes this model.
        assert!(matches!(doubt, Doubt::Nobody(_)), "{doubt:?}");
    }

    #[tokio::test]
    async fn a_name_that_is_pinned_to_what_nobody_has_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let models = models(dir.path(), false);
        let pin: Digest = "a".repeat(64).parse().unwrap();
        let mut told = ModelSources {
            pin: pin.to_string(),
            ..ModelSources::default()
        };
        let mut others = BTreeMap::new();
        for name in ["m", NAME] {
            let text = models.why_nowhere(name, &told, &others).unwrap();
            let release = format!("hydramesh models pins release {name}");
            assert!(
                text.contains("aaaaaaaaaaaa") && text.contains(&release),
                "{text}"
            );
        }
        // This worker refused it: that is another matter.
        others.insert(pin, String::new());
        let text = models.why_nowhere("m", &told, &others).unwrap();
        assert!(!text.contains("pins"), "{text}");
        others.clear();
        told.pin.clear();
        let text = models.why_nowhere("m", &told, &others).unwrap();
        assert!(!text.contains("pins"), "{text}");
    }
}
