//! The models of this worker that are not files at hand, for the rest of the worker.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use dcf::{Message, MsgType};
use mesh_base::places::Room;
use mesh_net::discovery::Found;
use mesh_net::trust::Role;
use mesh_proto::NodeAddr;
use mesh_service::metrics::prometheus_client::registry::Registry;
use mesh_store::{Limits, Policy, Store, StoreError};
use mesh_worker_core::{Catalogue, PieceMap, Replica, Rules};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};

use super::context::{Counters, Models, blocking};
use super::files::{ReplicaFiles, pieces_in};
use super::names::{self, is_at_hand};
use crate::codec::message;
use crate::config::Config;
use crate::core::CoreHandle;
use crate::error::WorkerError;
use crate::peers::Peers;

impl Models {
    /// Opens the store if the configuration needs it, and checks that each configured name may exist
    /// somewhere.
    pub(crate) fn open(config: &Arc<Config>) -> Result<Arc<Self>, WorkerError> {
        let store_config = &config.store;
        let failed = |reason: String| WorkerError::ModelStore { reason };
        let policy = Policy::from_files(&store_config.trusted_keys, store_config.require_signature)
            .map_err(|error| failed(error.to_string()))?;
        let dir = config.store_dir();
        let mut names = config.models.iter().chain(&config.ring.models);
        let needed = store_config.dir.is_some()
            || dir.is_dir()
            || names.any(|name| !is_at_hand(name, config));
        let store = match needed {
            true => {
                let limits = Limits {
                    bytes: store_config.limit,
                    ..Limits::default()
                };
                let opened = Store::open_with(&dir, limits);
                Some(opened.map_err(|error| failed(error.to_string()))?)
            }
            false => None,
        };
        let mut replicas = Vec::new();
        if let Some(store) = &store {
            let models = store.models().map_err(|error| failed(error.to_string()))?;
            replicas.extend(models.into_iter().map(|model| {
                let map = Arc::new(PieceMap::new(model.signed));
                let here = pieces_in(store, &map);
                Replica::new(map, here).with_names(&model.names)
            }));
        }
        let rules = Rules {
            store: store.is_some(),
            peers: store_config.peers,
            hub: store_config.hub,
            has_head: config.has_head(),
            policy,
        };
        let catalogue = Catalogue::new(rules, replicas);
        names::check(config, &catalogue)?;
        Ok(Arc::new(Models {
            config: config.clone(),
            core: CoreHandle::new(catalogue),
            runtime: Handle::current(),
            store,
            peers: OnceLock::new(),
            reading: Semaphore::new(READERS),
            takers: Room::new(TAKERS, TAKERS_OF_ONE),
            counters: Counters::default(),
        }))
    }

    pub(crate) fn core(&self) -> &CoreHandle {
        &self.core
    }

    /// True if other workers may fetch from here and this worker from them.
    pub(crate) fn is_sharing(&self) -> bool {
        self.core.with(|core| core.catalogue.rules().is_sharing())
    }

    /// From now on others are reached through `peers`, and reach this worker at `port`.
    pub(crate) fn listen(&self, peers: Peers, node_id: &str, port: u16) {
        let _ = self.peers.set(peers);
        self.core.change(|core| core.connected(node_id, port));
    }

    /// Workers that are found on the LAN are asked, too, whether the head names them or not.
    pub(crate) fn search(&self, mut found: watch::Receiver<Vec<Found>>) {
        let core = self.core.clone();
        tokio::spawn(async move {
            loop {
                let mut nodes = found.borrow_and_update().clone();
                nodes.retain(|node| node.role == Role::Worker);
                let workers = nodes.into_iter().map(seat_of).collect();
                core.change(|core| core.catalogue.lan_found(workers));
                if found.changed().await.is_err() {
                    return;
                }
            }
        });
    }

    /// Message for the head and its version; `None` if the version is still `known`.
    pub(crate) fn report(&self, known: Option<u64>) -> Option<(Message, u64)> {
        let (models, version) = self.core.with(|core| core.catalogue.report(known))?;
        Some((message(MsgType::MODELS, &models), version))
    }

    pub(crate) fn register(&self, registry: &mut Registry) {
        let counters = &self.counters;
        let help = "Bytes of models that came from other workers";
        registry.register("model_peer_bytes", help, counters.from_peers.clone());
        let help = "Bytes of models that came from outside the mesh";
        registry.register("model_origin_bytes", help, counters.from_origin.clone());
        let help = "Bytes of models that other workers were sent";
        registry.register("model_sent_bytes", help, counters.sent.clone());
        let help = "Pieces of models that were not the manifest's";
        registry.register("model_bad_pieces", help, counters.bad.clone());
    }

    /// Lets others have a model that is a file or a folder at hand. Its bytes stay where they are; they are
    /// read once.
    pub(crate) async fn adopt(&self, name: &str, path: &Path) {
        let Some(store) = self.store.clone().filter(|_| self.is_sharing()) else {
            return;
        };
        let (called, path) = (name.to_owned(), path.to_owned());
        let adopted = blocking(move || {
            let map = Arc::new(PieceMap::new(store.adopt(&called, &path, &|_| ())?));
            let here = pieces_in(&store, &map);
            Ok::<_, StoreError>(Replica::new(map, here))
        });
        match adopted.await {
            Ok(replica) => {
                self.core
                    .change(|core| core.catalogue.add(replica, Some(name)));
                self.look_at(name).await;
                tracing::info!(model = name, "other workers may have this model from here");
            }
            Err(error) => tracing::warn!(model = name, %error, "the model is not shared"),
        }
    }

    /// Checks again which pieces are here of models whose manifests have this name: the file of one may have
    /// become another's.
    async fn look_at(&self, name: &str) {
        let Some(store) = self.store.clone() else {
            return;
        };
        let core = self.core.clone();
        let called = core.with(|core| core.catalogue.of_manifests_called(name));
        let looked = tokio::task::spawn_blocking(move || {
            let files = called.into_iter();
            files.for_each(|map| ReplicaFiles::new(map, &store, &core).look());
        });
        if let Err(error) = looked.await {
            tracing::warn!(model = name, %error, "it is not known what is left of a model that was replaced");
        }
    }

    pub(crate) async fn path(&self, files: &Arc<ReplicaFiles>) -> Result<PathBuf, String> {
        let files = files.clone();
        blocking(move || files.path()).await
    }
}

fn seat_of(worker: Found) -> NodeAddr {
    let mut all = worker.addresses.iter().map(ToString::to_string);
    NodeAddr {
        node_id: worker.node_id,
        name: worker.name,
        address: all.next().unwrap_or_default(),
        addresses: all.collect(),
    }
}

const READERS: usize = 4;

/// Streams that take pieces or manifests, and those of one worker. Each may have a piece in memory.
const TAKERS: usize = 64;
const TAKERS_OF_ONE: usize = 16;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use mesh_share::PieceSet;
    use mesh_store::Digest;

    use super::*;

    fn opened(dir: &Path) -> Arc<Models> {
        let config = Config {
            state_dir: dir.to_owned(),
            store: crate::config::StoreConfig {
                dir: Some(dir.join("store")),
                ..crate::config::StoreConfig::default()
            },
            ..Config::default()
        };
        Models::open(&Arc::new(config)).unwrap()
    }

    /// Report to the head: names, and true if all of the model is here.
    fn reported(models: &Models) -> Vec<(String, Vec<String>, bool)> {
        use prost::Message as _;

        let (message, _) = models.report(None).unwrap();
        let said = mesh_proto::Models::decode(message.payload.as_ref()).unwrap();
        let held = said.held.into_iter().map(|held| {
            let pieces = PieceSet::from_proto(&held.pieces.unwrap()).unwrap();
            (held.fingerprint, held.names, pieces.is_all())
        });
        held.collect()
    }

    #[tokio::test]
    async fn a_model_that_was_replaced_by_hand_is_one_model_and_stays_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.bin");
        let models = opened(dir.path());
        let names = vec!["m".to_owned()];
        let mut seen = BTreeSet::new();
        for content in ["one", "another", "one", "a third"] {
            std::fs::write(&path, content).unwrap();
            models.adopt("m", &path).await;
            let told = reported(&models);
            assert_eq!(told.len(), 1, "{told:?}");
            assert_eq!((&told[0].1, told[0].2), (&names, true));
            seen.insert(told[0].0.clone());
            let known = models.obtain("m").await.unwrap();
            assert_eq!(known.map().fingerprint().to_string(), told[0].0);
        }
        assert_eq!(seen.len(), 3);
        // Also after a restart.
        let told = reported(&opened(dir.path()));
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].2);
    }

    #[tokio::test]
    async fn of_two_models_with_one_name_the_one_goes_by_it_that_the_store_names() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        let mut put = Vec::new();
        for content in ["old", "new"] {
            store.put(content.as_bytes()).unwrap();
            std::fs::write(dir.path().join("m.bin"), content).unwrap();
            let files = ["m.bin".into()];
            let manifest = mesh_store::Manifest::of_files("m", dir.path(), &files, &|_| ());
            let signed = mesh_store::SignedManifest::unsigned(manifest.unwrap());
            put.push(store.put_manifest(&signed).unwrap());
            store
                .name("org/m-GGUF:m.bin", &put[put.len() - 1], None)
                .unwrap();
        }
        let models = opened(dir.path());
        let told = reported(&models);
        let names = |fingerprint: &Digest| {
            let mut told = told.iter().filter(|one| one.0 == fingerprint.to_string());
            told.next().map(|one| one.1.clone()).unwrap()
        };
        assert_eq!(names(&put[0]), [] as [String; 0]);
        assert_eq!(names(&put[1]), ["m", "org/m-GGUF:m.bin"]);
        assert_eq!(
            models.obtain("m").await.unwrap().map().fingerprint(),
            put[1]
        );
    }
}
