//! The models of this worker that are not files at hand: finds them in the store, gets missing pieces from
//! other workers or from the hub, and gives others the pieces that are here.
//!
//! Names that cannot mean anything are refused at the start (`wanted`). [`Models::obtain`] finds a model by a
//! name and returns its [`Held`] (`seek`, `origin`); [`Models::fetch`] gets pieces of it (`fetch`, a task for
//! each model that is fetched; `source`, one for each worker that sends some). A model from another worker
//! must be vouched for by a third party before it is taken under its name (`vouch`). `serve` is the other
//! side. The head knows the holders of a model: this worker reports the models that it holds and seeks
//! ([`Models::report`]), and the head answers with [`Sources`].

mod fetch;
mod held;
mod origin;
mod seek;
mod serve;
mod source;
mod vouch;
mod wanted;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dcf::{Message, MsgType};
use mesh_base::places::Room;
use mesh_base::random;
use mesh_base::units::about_bytes;
use mesh_net::discovery::Found;
use mesh_net::quic::timestamp_us;
use mesh_net::trust::Role;
use mesh_proto::{BadSource, HeldModel, ModelSources, NodeAddr, SoughtModel, Sources};
use mesh_service::metrics::prometheus_client::metrics::counter::Counter;
use mesh_service::metrics::prometheus_client::registry::Registry;
use mesh_share::PieceSet;
use mesh_store::{Digest, Limits, Pin, Policy, Store};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use self::fetch::{Fetch, Want};
pub(crate) use self::held::Held;
pub(crate) use self::serve::{is_ours, serve};
use crate::config::Config;
use crate::error::WorkerError;
use crate::rings::Peers;

/// See the module's page.
pub(crate) struct Models {
    config: Arc<Config>,
    /// Runtime of the fetches, whichever thread asks for them: a ring's own thread has other work.
    runtime: Handle,
    /// None if nothing that this worker serves comes from it.
    store: Option<Store>,
    policy: Policy,
    /// Pieces that are read for others at once.
    reading: Semaphore,
    /// Streams of other workers, by their ids, that get pieces or a manifest.
    takers: Room<String>,
    counters: Counters,
    held: Mutex<BTreeMap<Digest, Arc<Held>>>,
    /// A task for each model that is fetched. Wants are sent with the lock held, so that none is lost when a
    /// task ends.
    fetches: Mutex<HashMap<Digest, mpsc::UnboundedSender<Want>>>,
    /// One at a time looks for a name.
    seeking: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    state: Mutex<State>,
    /// Sources of models from the head, by name.
    told: watch::Sender<BTreeMap<String, ModelSources>>,
    net: Mutex<Option<Net>>,
    /// Workers on the LAN.
    lan: Mutex<Option<watch::Receiver<Vec<Found>>>>,
    hub: vouch::HubWords,
    /// Models whose files contradict their manifests.
    false_manifests: Mutex<BTreeSet<Digest>>,
}

#[derive(Default)]
struct State {
    sought: BTreeMap<String, SoughtModel>,
    bad: Vec<BadSource>,
    /// Counts changes of the report to the head.
    version: u64,
}

#[derive(Clone)]
struct Net {
    peers: Peers,
    node_id: String,
    port: u16,
}

/// Bytes and faults, counted.
#[derive(Debug, Default)]
struct Counters {
    from_peers: Counter,
    from_origin: Counter,
    sent: Counter,
    bad: Counter,
}

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
        let mut held = BTreeMap::new();
        if let Some(store) = &store {
            let models = store.models().map_err(|error| failed(error.to_string()))?;
            for model in models {
                let known = Held::new(store, model.fingerprint, model.signed);
                for named in &model.names {
                    known.add_known(named);
                }
                held.insert(model.fingerprint, Arc::new(known));
            }
        }
        wanted::check(config, &held)?;
        Ok(Arc::new(Models {
            config: config.clone(),
            runtime: Handle::current(),
            store,
            policy,
            reading: Semaphore::new(READERS),
            takers: Room::new(TAKERS, TAKERS_OF_ONE),
            counters: Counters::default(),
            held: Mutex::new(held),
            fetches: Mutex::default(),
            seeking: Mutex::default(),
            state: Mutex::default(),
            told: watch::Sender::new(BTreeMap::new()),
            net: Mutex::default(),
            lan: Mutex::default(),
            hub: vouch::HubWords::default(),
            false_manifests: Mutex::default(),
        }))
    }

    /// Returns true if other workers may fetch from here and this worker from them.
    pub(crate) fn is_sharing(&self) -> bool {
        self.store.is_some() && self.config.store.peers
    }

    /// From now on others are reached through `peers`, and reach this worker at `port`.
    pub(crate) fn listen(&self, peers: Peers, node_id: String, port: u16) {
        *lock(&self.net) = Some(Net {
            peers,
            node_id,
            port,
        });
        self.changed();
    }

    /// Workers that are found on the LAN are asked, too, whether the head names them or not.
    pub(crate) fn search(&self, found: watch::Receiver<Vec<Found>>) {
        *lock(&self.lan) = Some(found);
    }

    /// Takes in the head's sources of the models that are sought.
    pub(crate) fn sources(&self, sources: Sources) {
        let models = sources.models.into_iter();
        let by_name = models.map(|model| (model.name.clone(), model)).collect();
        self.told.send_if_modified(|told| {
            let news = *told != by_name;
            *told = by_name;
            news
        });
    }

    /// Message for the head and its version; `None` if the version is still `known`.
    pub(crate) fn report(&self, known: Option<u64>) -> Option<(Message, u64)> {
        let state = lock(&self.state);
        if !self.is_sharing() || known == Some(state.version) {
            return None;
        }
        let port = lock(&self.net).as_ref().map_or(0, |net| net.port);
        let held = lock(&self.held);
        let models = mesh_proto::Models {
            port: port.into(),
            held: told_of(&held, &state.sought),
            sought: state.sought.values().cloned().collect(),
            bad: state.bad.clone(),
        };
        Some((message(MsgType::MODELS, &models), state.version))
    }

    /// Description of what is missing still; empty if nothing is.
    pub(crate) fn lacking(&self) -> String {
        let state = lock(&self.state);
        let texts = state.sought.values().map(|sought| {
            let (bytes, total) = (sought.bytes.max(sought.origin_bytes), sought.bytes_total);
            let mut text = format!("{} is being fetched", sought.name);
            if total > 0 {
                text += &format!(", {} of {}", about_bytes(bytes), about_bytes(total));
            }
            if !sought.origin_error.is_empty() {
                text += &format!(" ({})", sought.origin_error);
            }
            text
        });
        texts.collect::<Vec<_>>().join("; ")
    }

    /// Puts its counters into the registry.
    pub(crate) fn register(&self, registry: &mut Registry) {
        let counters = [
            (
                "model_peer_bytes",
                "Bytes of models that came from other workers",
                &self.counters.from_peers,
            ),
            (
                "model_origin_bytes",
                "Bytes of models that came from outside the mesh",
                &self.counters.from_origin,
            ),
            (
                "model_sent_bytes",
                "Bytes of models that other workers were sent",
                &self.counters.sent,
            ),
            (
                "model_bad_pieces",
                "Pieces of models that were not the manifest's",
                &self.counters.bad,
            ),
        ];
        for (name, help, counter) in counters {
            registry.register(name, help, counter.clone());
        }
    }

    /// Lets others have a model that is a file or a folder at hand. Its bytes stay where they are; they are
    /// read once.
    pub(crate) async fn adopt(&self, name: &str, path: &Path) {
        let Some(store) = self.store.clone().filter(|_| self.is_sharing()) else {
            return;
        };
        let (called, path) = (name.to_owned(), path.to_owned());
        let adopted = tokio::task::spawn_blocking(move || {
            let signed = store.adopt(&called, &path, &|_| ())?;
            let fingerprint = signed.manifest.fingerprint();
            Ok::<_, mesh_store::StoreError>(Held::new(&store, fingerprint, signed))
        });
        match adopted.await {
            Ok(Ok(held)) => {
                self.hold(held).add_name(name);
                self.look_at(name).await;
                tracing::info!(model = name, "other workers may have this model from here");
            }
            Ok(Err(error)) => tracing::warn!(model = name, %error, "the model is not shared"),
            Err(error) => tracing::warn!(model = name, %error, "the model is not shared"),
        }
    }

    /// Checks again which pieces are here of models whose manifests have this name: the file of one may have
    /// become another's.
    async fn look_at(&self, name: &str) {
        let all = lock(&self.held).values().cloned().collect::<Vec<_>>();
        let called = all.into_iter().filter(|held| held.manifest().name == name);
        let called: Vec<Arc<Held>> = called.collect();
        let looked =
            tokio::task::spawn_blocking(move || called.iter().for_each(|held| held.look()));
        if let Err(error) = looked.await {
            tracing::warn!(model = name, %error, "it is not known what is left of a model that was replaced");
        }
        self.changed();
    }

    /// Notes that pieces of a model are here, and lets others have them.
    fn hold(&self, held: Held) -> Arc<Held> {
        self.hold_shared(Arc::new(held))
    }

    fn hold_shared(&self, held: Arc<Held>) -> Arc<Held> {
        let mut all = lock(&self.held);
        let held = all.entry(held.fingerprint()).or_insert(held).clone();
        drop(all);
        self.changed();
        held
    }

    /// Gets all that is needed to know a model, but no weights.
    pub(crate) async fn fetch_headers(self: &Arc<Self>, held: &Arc<Held>) -> Result<(), String> {
        self.fetch(held, held.headers()).await
    }

    /// Gets all of a model.
    pub(crate) async fn fetch_all(self: &Arc<Self>, held: &Arc<Held>) -> Result<(), String> {
        self.fetch(held, held.all()).await
    }

    /// Gets the pieces that a stage of these layers, of `total`, needs.
    pub(crate) async fn fetch_layers(
        self: &Arc<Self>,
        held: &Arc<Held>,
        layers: Range<u32>,
        total: u32,
    ) -> Result<(), String> {
        self.fetch(held, held.layers(layers, total)).await
    }

    /// Resolves when all these pieces are here.
    async fn fetch(self: &Arc<Self>, held: &Arc<Held>, pieces: PieceSet) -> Result<(), String> {
        if held.missing(&pieces).is_empty() {
            return Ok(());
        }
        let store = self.store.clone().ok_or("there is no store")?;
        let (done, finished) = oneshot::channel();
        let want = Want { pieces, done };
        {
            let mut fetches = lock(&self.fetches);
            let fetch = fetches.entry(held.fingerprint()).or_insert_with(|| {
                let name = held.title();
                Fetch::spawn(self.clone(), store, held.clone(), name)
            });
            fetch
                .send(want)
                .map_err(|_| "the task that fetches it is gone".to_owned())?;
        }
        finished
            .await
            .map_err(|_| "the task that fetches it is gone".to_owned())?
    }

    /// Forgets a model whose files, all of them here, contradict its manifest: each piece matched, so the
    /// manifest is false.
    pub(super) fn disown(&self, held: &Held, reason: &str) {
        let fingerprint = held.fingerprint();
        tracing::error!(
            model = held.title(),
            %fingerprint,
            reason,
            "the manifest that another worker gave contradicts itself: the model is forgotten, and looked for elsewhere"
        );
        self.counters.bad.inc();
        let mut known = lock(&self.false_manifests);
        if known.len() < MOST_BAD {
            known.insert(fingerprint);
        }
        drop(known);
        lock(&self.held).remove(&fingerprint);
        self.changed();
    }

    fn is_disowned(&self, fingerprint: &Digest) -> bool {
        lock(&self.false_manifests).contains(fingerprint)
    }

    /// Ends a model's fetch task, unless a new request came by now.
    fn end_fetch(&self, fingerprint: &Digest, wants: &mpsc::UnboundedReceiver<Want>) -> bool {
        let mut fetches = lock(&self.fetches);
        let ends = wants.is_empty();
        if ends {
            fetches.remove(fingerprint);
        }
        ends
    }

    /// Path from which to load a model.
    pub(crate) async fn path(&self, held: &Arc<Held>) -> Result<PathBuf, String> {
        let held = held.clone();
        let path = tokio::task::spawn_blocking(move || held.path()).await;
        path.map_err(|error| error.to_string())?
            .map_err(|error| error.to_string())
    }

    /// Keeps a model from being evicted.
    pub(crate) fn pin(&self, held: &Held) -> Option<Pin> {
        let pinned = self.store.as_ref()?.pin(&held.fingerprint());
        pinned
            .inspect_err(
                |error| tracing::warn!(%error, "the model may be evicted while it is loaded"),
            )
            .ok()
    }

    /// The model with this fingerprint, if others may have it.
    fn shared(&self, fingerprint: &str) -> Option<Arc<Held>> {
        let fingerprint: Digest = fingerprint.parse().ok()?;
        self.is_sharing()
            .then(|| lock(&self.held).get(&fingerprint).cloned())?
    }

    /// Workers that may have pieces of a model, according to the head.
    fn seats(&self, told: &BTreeMap<String, ModelSources>, held: &Held) -> Vec<NodeAddr> {
        let fingerprint = held.fingerprint().to_string();
        let own = lock(&self.net)
            .as_ref()
            .map_or_else(String::new, |net| net.node_id.clone());
        let mut seats: Vec<NodeAddr> = Vec::new();
        let of_model = told.values().filter(|m| m.fingerprint == fingerprint);
        for seat in of_model.flat_map(|model| &model.holders) {
            let known = seats.iter().any(|other| other.node_id == seat.node_id);
            if !known && seat.node_id != own {
                seats.push(seat.clone());
            }
        }
        let lan = lock(&self.lan);
        let found = lan.as_ref().map(|found| found.borrow().clone());
        for worker in found.unwrap_or_default() {
            let known = seats.iter().any(|other| other.node_id == worker.node_id);
            if worker.role == Role::Worker && !known && worker.node_id != own {
                let mut all = worker.addresses.iter().map(|address| address.to_string());
                seats.push(NodeAddr {
                    node_id: worker.node_id,
                    name: worker.name,
                    address: all.next().unwrap_or_default(),
                    addresses: all.collect(),
                });
            }
        }
        seats
    }

    fn told(&self) -> watch::Receiver<BTreeMap<String, ModelSources>> {
        self.told.subscribe()
    }

    fn peers(&self) -> Option<Peers> {
        lock(&self.net).as_ref().map(|net| net.peers.clone())
    }

    /// Notes that a model is sought, with its progress.
    fn seeks(&self, name: &str, change: impl FnOnce(&mut SoughtModel)) {
        let mut state = lock(&self.state);
        let sought = state.sought.entry(name.to_owned()).or_default();
        let before = sought.clone();
        name.clone_into(&mut sought.name);
        change(sought);
        if *sought != before {
            state.version += 1;
        }
    }

    fn no_longer_seeks(&self, name: &str) {
        let mut state = lock(&self.state);
        if state.sought.remove(name).is_some() {
            state.version += 1;
        }
    }

    /// Tells the head of a worker that sent something else than the manifest says.
    fn accuse(&self, bad: BadSource) {
        let mut state = lock(&self.state);
        if !state.bad.contains(&bad) && state.bad.len() < MOST_BAD {
            state.bad.push(bad);
            state.version += 1;
        }
    }

    fn changed(&self) {
        lock(&self.state).version += 1;
    }

    /// Number of a piece to begin with: another one on each worker.
    fn begin_at(&self) -> u32 {
        random::number() as u32
    }
}

/// Models to report to the head: those with pieces here, and those that are being fetched. Where several have
/// the same own name and the store has names for some of them, only these keep the own name: the others were
/// replaced.
fn told_of(
    held: &BTreeMap<Digest, Arc<Held>>,
    sought: &BTreeMap<String, SoughtModel>,
) -> Vec<HeldModel> {
    let fetched: BTreeSet<&str> = sought.values().map(|s| s.fingerprint.as_str()).collect();
    let is_here = |held: &&Arc<Held>| {
        held.pieces_here() > 0 || fetched.contains(held.fingerprint().to_string().as_str())
    };
    let here: Vec<&Arc<Held>> = held.values().filter(is_here).collect();
    let named = here.iter().filter(|held| held.has_names());
    let named: BTreeSet<&str> = named.filter_map(|held| held.own_name()).collect();
    let models = here.iter().map(|held| {
        let replaced = held.own_name().is_some_and(|own| named.contains(own));
        held.to_proto(held.has_names() || !replaced)
    });
    models.collect()
}

/// Returns true if a name means a file or a folder on this machine.
pub(crate) fn is_at_hand(name: &str, config: &Config) -> bool {
    let folders = config.folders();
    mesh_model::encoder::find(name, &folders).is_some()
        || mesh_store::local::resolve(name, &folders).is_ok()
}

/// Returns true if a name without a meaning on this machine may mean a model of the mesh or of the hub. A
/// name that looks like a file's path does not: it is a mistake that should show at once.
pub(crate) fn may_be_fetched(name: &str) -> bool {
    let is_path = name.starts_with(['/', '.', '~']);
    let is_file = [".gguf", ".safetensors"]
        .iter()
        .any(|ending| name.to_ascii_lowercase().ends_with(ending));
    !is_path && (!is_file || name.contains(':'))
}

/// A message with this body.
fn message(kind: MsgType, body: &impl prost::Message) -> Message {
    Message::new(kind, 0, timestamp_us(), body.encode_to_vec())
}

/// Values behind these mutexes are replaced as a whole, so a panic elsewhere leaves them sound.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const READERS: usize = 4;

/// Streams that take pieces or manifests, and those of one worker. Each may have a piece in memory.
const TAKERS: usize = 64;
const TAKERS_OF_ONE: usize = 16;
const MOST_BAD: usize = 64;

#[cfg(test)]
mod tests {
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
            assert_eq!(known.fingerprint().to_string(), told[0].0);
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
        assert_eq!(models.obtain("m").await.unwrap().fingerprint(), put[1]);
    }

    #[test]
    fn names_of_models_are_told_from_paths() {
        for name in ["org/model", "org/model:Q4_K_M", "qwen2.5:7b", "smollm2"] {
            assert!(may_be_fetched(name), "{name}");
        }
        for path in [
            "/srv/m.gguf",
            "./m.gguf",
            "~/m",
            "m.gguf",
            "../m",
            "dir/M.GGUF",
        ] {
            assert!(!may_be_fetched(path), "{path}");
        }
    }
}
