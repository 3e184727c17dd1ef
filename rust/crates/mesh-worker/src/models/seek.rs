//! Finds a model by its name: in the store, at other workers, on the hub.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_proto::ModelSources;
use mesh_store::{Digest, SignedManifest, Store};

use super::held::Held;
use super::origin::{self, OriginError};
use super::{Models, lock, source, wanted};

impl Models {
    /// The model called `name`: from the store, else its manifest comes from another worker, or all of it from the hub. A short
    /// name is that of a model on the hub. Waits for as long as that takes; an error is one that waiting does not mend.
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
        let known = lock(&self.held)
            .values()
            .find(|held| held.is_called(name))
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
        // Until when the hub is left alone.
        let mut rest: Option<Instant> = None;
        loop {
            if rest.is_some_and(|until| until <= Instant::now()) {
                rest = None;
                self.seeks(name, |sought| sought.origin_error.clear());
            }
            let sources = told.borrow_and_update().get(name).cloned();
            if rest.is_none() && self.has_errand(name, sources.as_ref()) {
                match self.run_errand(name, store).await {
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
            if let Some(sources) = sources
                && let Ok(fingerprint) = sources.fingerprint.parse::<Digest>()
                && let Some(peers) = self.peers()
            {
                for seat in &sources.seats {
                    let signed = match source::manifest(&peers, seat, &fingerprint).await {
                        Ok(signed) => signed,
                        Err(reason) => {
                            tracing::warn!(model = name, worker = seat.name, reason, "no manifest");
                            continue;
                        }
                    };
                    match self.keep(name, signed, &seat.name, store).await {
                        Ok(held) => return Ok(held),
                        Err(reason) if reason != refused => {
                            tracing::error!(
                                model = name,
                                worker = seat.name,
                                reason,
                                "manifest refused"
                            );
                            let text = reason.clone();
                            self.seeks(name, |sought| sought.origin_error = text);
                            refused = reason;
                        }
                        Err(_) => {}
                    }
                }
            }
            if sources_empty(&told.borrow(), name)
                && let Some(text) = self.why_nowhere(name)
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

    /// Why a model that no worker has does not come from the hub either, if it does not.
    fn why_nowhere(&self, name: &str) -> Option<String> {
        if self.policy.requires_signature() {
            return Some(format!(
                "no worker has a manifest of {name} that is signed, which `store.require_signature` asks for: sign it with `hydramesh \
                 models sign` where it is"
            ));
        }
        if !origin::is_name(name) {
            let held: Vec<_> = lock(&self.held).values().cloned().collect();
            let close = wanted::like(name, &self.config, &held);
            return Some(format!("no worker has it yet, {}", wanted::unknown(&close)));
        }
        let hub = self.config.store.hub;
        (!hub).then(|| "no worker has it yet, and `store.hub` forbids to ask the hub".to_owned())
    }

    /// Whether this worker is the one that gets a model from outside the mesh.
    pub(super) fn has_errand(&self, name: &str, sources: Option<&ModelSources>) -> bool {
        let may = || {
            let state = lock(&self.state);
            state.sought.get(name).is_some_and(|sought| sought.origin)
        };
        // Who has no head, or may not take from others, asks nobody.
        let alone = !self.config.has_head() || !self.config.store.peers;
        (alone || sources.is_some_and(|sources| sources.origin)) && may()
    }

    /// Gets a model from the hub, for as long as the head wants this worker to. `None` if it no longer does; what has come by then
    /// is kept.
    async fn run_errand(
        self: &Arc<Self>,
        name: &str,
        store: &Store,
    ) -> Result<Option<Arc<Held>>, OriginError> {
        let mut told = self.told.subscribe();
        let fetching = origin::fetch(self, store, name, name);
        tokio::pin!(fetching);
        let fetched = loop {
            tokio::select! {
                fetched = &mut fetching => break fetched,
                _ = told.changed() => {
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

    /// Takes a manifest in, if the policy lets it pass.
    async fn keep(
        &self,
        name: &str,
        signed: SignedManifest,
        from: &str,
        store: &Store,
    ) -> Result<Arc<Held>, String> {
        self.policy
            .check(&signed)
            .map_err(|error| error.to_string())?;
        let (store, name, from) = (store.clone(), name.to_owned(), format!("worker {from}"));
        let kept = tokio::task::spawn_blocking(move || {
            let fingerprint = store.put_manifest(&signed)?;
            store.name(&name, &fingerprint, Some(&from))?;
            let held = Held::new(&store, fingerprint, signed);
            held.add_name(&name);
            Ok::<_, mesh_store::StoreError>(held)
        });
        let held = kept
            .await
            .map_err(|error| error.to_string())?
            .map_err(|error| error.to_string())?;
        Ok(self.hold(held))
    }
}

/// Whether the head answered, and knows of nobody with a model of that name.
fn sources_empty(told: &BTreeMap<String, ModelSources>, name: &str) -> bool {
    told.get(name)
        .is_some_and(|sources| sources.fingerprint.is_empty())
}

const SEEK_AGAIN: Duration = Duration::from_secs(2);
