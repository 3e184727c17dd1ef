//! The models of this worker, each with its engine.

use std::collections::{BTreeMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Instant;

use futures::StreamExt;
use futures::future::join_all;
use mesh_engine::{Engine, EngineHandle, Event, Load as EngineLoad, Request, SchedulerConfig};
use mesh_engine_ort::{Opened, OrtOptions, Provider, Reclaim, WeightCache, WeightFormat};
use mesh_machine::Memory;
use mesh_model::{Model, Tokenizer, encoder};
use mesh_proto::{Load, ModelCard, ModelSpeed};
use mesh_store::{FingerprintCache, Pin, local};

use crate::config::Config;
use crate::encoder::HostedEncoder;
use crate::error::WorkerError;
use crate::models::{Models, may_be_fetched};
use crate::preparations::Preparations;
use crate::rings::Rings;
use crate::templates::{TemplateError, Templates};

/// All models of this worker.
pub(crate) struct Host {
    hosted: RwLock<Vec<Arc<Hosted>>>,
    encoders: RwLock<Vec<Arc<HostedEncoder>>>,
    models: Arc<Models>,
    rings: Arc<Rings>,
    templates: Templates,
    preparations: Preparations,
    /// Models that are not served because of a fault, each with the fault.
    failed: Mutex<BTreeMap<String, String>>,
    /// Models offered in parts whose templates were looked at.
    looked_at: Mutex<HashSet<String>>,
}

/// A model that is not served because something is wrong with it.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    /// The model's name in the configuration, or the one that it was served under.
    pub(crate) name: String,
    pub(crate) source: Source,
    pub(crate) reason: String,
}

/// The source that a model is loaded from.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// The file or folder that a name in the configuration means. A loaded model has [`Source::At`] its path.
    Named,
    /// The same, offered in parts.
    Shard,
    /// This file or folder.
    At(PathBuf),
    /// The store, under a name; files come from elsewhere if need be.
    Store(String),
}

/// A model that answers here.
pub(crate) struct Answering {
    /// For its tokenizer and template.
    pub(crate) model: Model,
    /// Takes requests.
    pub(crate) engine: EngineHandle,
}

/// A model of either kind, loaded while the worker is up.
pub(crate) enum Loaded {
    /// A chat model.
    Chat(Box<Hosted>),
    /// An embedding model.
    Embed(Box<HostedEncoder>),
}

/// A model of either kind that is served no longer.
pub(crate) enum Removed {
    /// A chat model.
    Chat(Arc<Hosted>),
    /// An embedding model.
    Embed(Arc<HostedEncoder>),
}

/// One model with its engine.
pub(crate) struct Hosted {
    pub(crate) model: Model,
    pub(crate) engine: EngineHandle,
    /// The model's description for the head.
    pub(crate) card: ModelCard,
    /// Device that computes it.
    pub(crate) backend: Provider,
    source: Source,
    /// Ends the engine's thread when dropped.
    _engine: Engine,
    /// Keeps its files in the store.
    _pin: Option<Pin>,
}

impl Host {
    /// Loads every model of `config` that is a file at hand, starts its engine and lets it answer once, which
    /// also measures its speed. Blocks for as long as that takes. A fault of one model becomes a [`Failure`]
    /// of that model alone.
    ///
    /// # Errors
    /// If names in the configuration contradict each other, or none of them stands for a model.
    pub(crate) fn load(
        config: &Arc<Config>,
        models: Arc<Models>,
        templates: Templates,
    ) -> Result<(Self, Vec<Failure>), WorkerError> {
        let found = find(config)?;
        let mut failures = Vec::new();
        let mut loaded = Vec::new();
        for (name, path) in found {
            let fail = |error: WorkerError| Failure {
                name: name.clone(),
                source: Source::Named,
                reason: error.to_string(),
            };
            match path.and_then(|path| Loaded::load(&path, None, None, config, Some(&templates))) {
                Ok(model) => loaded.push(model),
                Err(error) => failures.push(fail(error)),
            }
        }
        // Measured while nothing computes.
        let (rings, unusable) = Rings::open(config, models.clone());
        failures.extend(unusable);
        let host = Host {
            hosted: RwLock::default(),
            encoders: RwLock::default(),
            models,
            rings,
            templates,
            preparations: Preparations::default(),
            failed: Mutex::default(),
            looked_at: Mutex::default(),
        };
        for model in loaded {
            host.add(model)?;
        }
        host.look_at_shards();
        for failure in &failures {
            tracing::error!(
                model = failure.name,
                error = failure.reason,
                "model not served; other models are, and this one is tried again when its file changes, and later"
            );
            host.set_failed(&failure.name, Some(failure.reason.clone()));
        }
        Ok((host, failures))
    }

    /// Looks at the templates of models that are offered in parts. Blocks.
    pub(crate) fn look_at_shards(&self) {
        for (name, model) in self.rings.shard_models() {
            let mut looked_at = self
                .looked_at
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if looked_at.insert(name.clone()) {
                drop(looked_at);
                learn_turn_end(&model, &name, &self.templates);
            }
        }
    }

    /// Problems of the models that are not served.
    pub(crate) fn failed(&self) -> BTreeMap<String, String> {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.clone()
    }

    /// Notes a model's fault, or with `None` that it has none any more.
    pub(crate) fn set_failed(&self, name: &str, reason: Option<String>) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        match reason {
            Some(reason) => failed.insert(name.to_owned(), reason),
            None => failed.remove(name),
        };
    }

    /// True if anything is served or offered here.
    pub(crate) fn serves(&self) -> bool {
        !self.models().is_empty() || !self.encoders().is_empty() || self.rings.has_shards()
    }

    /// Serves one more model.
    pub(crate) fn add(&self, loaded: Loaded) -> Result<(), WorkerError> {
        let mut hosted = self.hosted.write().unwrap_or_else(PoisonError::into_inner);
        let mut encoders = self
            .encoders
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let name = loaded.name();
        let chat = hosted.iter().map(|other| &other.card);
        let mut cards = chat.chain(encoders.iter().map(|other| &other.card));
        if cards.any(|card| card.name == name) {
            return Err(WorkerError::SameName {
                name: name.to_owned(),
            });
        }
        match loaded {
            Loaded::Chat(loaded) => hosted.push(Arc::from(loaded)),
            Loaded::Embed(loaded) => encoders.push(Arc::from(loaded)),
        }
        Ok(())
    }

    /// Stops serving the model called `name`. Its running requests may finish as long as the result is held.
    pub(crate) fn remove(&self, name: &str) -> Option<Removed> {
        let mut hosted = self.hosted.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = hosted.iter().position(|other| other.card.name == name) {
            return Some(Removed::Chat(hosted.remove(index)));
        }
        let mut encoders = self
            .encoders
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let index = encoders.iter().position(|other| other.card.name == name)?;
        Some(Removed::Embed(encoders.remove(index)))
    }

    /// The store of models, and the fetches from elsewhere.
    pub(crate) fn stored(&self) -> &Arc<Models> {
        &self.models
    }

    /// Renderer of conversations to prompts.
    pub(crate) fn templates(&self) -> &Templates {
        &self.templates
    }

    /// Bounds on the requests that are prepared at once.
    pub(crate) fn preparations(&self) -> &Preparations {
        &self.preparations
    }

    /// Its parts in rings.
    pub(crate) fn rings(&self) -> &Arc<Rings> {
        &self.rings
    }

    /// Chat models that are served.
    pub(crate) fn models(&self) -> Vec<Arc<Hosted>> {
        self.hosted
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Embedding models that are served.
    pub(crate) fn encoders(&self) -> Vec<Arc<HostedEncoder>> {
        self.encoders
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Descriptions of all models for the head.
    pub(crate) fn cards(&self) -> Vec<ModelCard> {
        let (models, encoders) = (self.models(), self.encoders());
        let chat = models.iter().map(|hosted| &hosted.card);
        let embed = encoders.iter().map(|hosted| &hosted.card);
        chat.chain(embed).cloned().collect()
    }

    /// The embedding model called `name`; the first one if there is no name.
    pub(crate) fn find_encoder(&self, name: &str) -> Option<Arc<HostedEncoder>> {
        let of_name = |hosted: &&Arc<HostedEncoder>| name.is_empty() || hosted.card.name == name;
        self.encoders().iter().find(of_name).cloned()
    }

    /// The model called `name`, whole here or driven from here; the first one if there is no name.
    pub(crate) fn find(&self, name: &str) -> Option<Answering> {
        let of_name = |hosted: &&Arc<Hosted>| name.is_empty() || hosted.card.name == name;
        let models = self.models();
        let whole = models.iter().find(of_name).map(|hosted| Answering {
            model: hosted.model.clone(),
            engine: hosted.engine.clone(),
        });
        whole.or_else(|| self.rings.find(name))
    }

    /// Engines of whole models and of rings driven from here, each with its model's name.
    pub(crate) fn engines(&self) -> Vec<(String, EngineHandle)> {
        let models = self.models();
        let whole = models
            .iter()
            .map(|hosted| (hosted.card.name.clone(), hosted.engine.clone()));
        whole.chain(self.rings.engines()).collect()
    }

    /// Loads of engines and of encoders, each with its model's name.
    pub(crate) fn loads(&self) -> Vec<(String, EngineLoad)> {
        let engines = self.engines();
        let engines = engines.into_iter().map(|(name, engine)| {
            let load = engine.load();
            (name, load)
        });
        let encoders = self.encoders();
        let encoders = encoders
            .iter()
            .map(|hosted| (hosted.card.name.clone(), hosted.engine.load()));
        engines.chain(encoders).collect()
    }

    /// Load and speeds over all models.
    pub(crate) fn load_report(&self, draining: bool) -> Load {
        let mut report = Load {
            draining,
            resident_bytes: mesh_service::metrics::resident_bytes().unwrap_or(0),
            ..Load::default()
        };
        for (name, load) in self.loads() {
            report.running += load.running;
            report.queued += load.queued;
            report.kv_tokens_used += load.kv_tokens_used;
            report.kv_tokens_total += load.kv_tokens_total;
            report.prefill_backlog += load.prefill_backlog;
            report.draining |= load.draining;
            report.speeds.push(ModelSpeed {
                name,
                decode_tps: load.decode_tps,
                prefill_tps: load.prefill_tps,
                queued: Some(load.queued),
            });
        }
        report
    }

    /// Takes no new requests; resolves when the running ones have ended.
    pub(crate) async fn drain(&self) {
        let (engines, encoders) = (self.engines(), self.encoders());
        let finished = join_all(engines.iter().map(|(_, engine)| engine.drain()));
        let embedded = join_all(encoders.iter().map(|hosted| hosted.engine.drain()));
        // Parts that this worker runs for rings: the head moves them elsewhere when it hears of the drain.
        tokio::join!(finished, embedded, self.rings.emptied());
    }

    /// Takes models out of service whose engines are gone.
    pub(crate) fn bury(&self) -> Vec<Failure> {
        let (models, encoders) = (self.models(), self.encoders());
        let engines = models
            .iter()
            .map(|hosted| (&hosted.card, &hosted.source, hosted.engine.death()));
        let encoders = encoders
            .iter()
            .map(|hosted| (&hosted.card, &hosted.source, hosted.engine.death()));
        let dead = engines.chain(encoders).filter_map(|(card, source, death)| {
            let error = WorkerError::EngineDead {
                name: card.name.clone(),
                reason: death?.to_string(),
            };
            Some(Failure {
                name: card.name.clone(),
                source: source.clone(),
                reason: error.to_string(),
            })
        });
        let dead: Vec<Failure> = dead.collect();
        for failure in &dead {
            self.remove(&failure.name);
            self.set_failed(&failure.name, Some(failure.reason.clone()));
        }
        dead
    }
}

/// A model's name in the configuration, and where it lies or why it cannot be found.
pub(crate) type Resolved = (String, Result<PathBuf, WorkerError>);

/// The models that the names in the configuration stand for, without those that come from elsewhere.
pub(crate) fn find(config: &Config) -> Result<Vec<Resolved>, WorkerError> {
    let mut found = Vec::new();
    let mut names = HashSet::new();
    for name in &config.models {
        let folders = config.folders();
        let path = match encoder::find(name, &folders) {
            Some(folder) => Ok(folder),
            None => local::resolve(name, &folders),
        };
        match path {
            Ok(path) => {
                let called = mesh_model::model::model_name(&path);
                if !names.insert(called.clone()) {
                    return Err(WorkerError::SameName { name: called });
                }
                found.push((name.clone(), Ok(path)));
            }
            // It comes later, from elsewhere.
            Err(_) if may_be_fetched(name) => {}
            Err(error) => found.push((name.clone(), Err(error.into()))),
        }
    }
    // If no other model is available, a mistake in the configuration is best seen at once; and another try
    // costs nothing.
    let all_missing =
        found.len() == config.models.len() && found.iter().all(|(_, path)| path.is_err());
    let alone = config.ring.models.is_empty() && config.local_models.is_none();
    match found.iter_mut().next() {
        Some((_, Err(_))) if all_missing && alone => {
            let (_, error) = found.swap_remove(0);
            error.map(|_| Vec::new())
        }
        _ => Ok(found),
    }
}

impl Loaded {
    /// Loads the model at `path`, of either kind; see [`Hosted::load`]. Blocks. A panic is an error of this
    /// model.
    pub(crate) fn load(
        path: &Path,
        name: Option<&str>,
        known: Option<&str>,
        config: &Config,
        templates: Option<&Templates>,
    ) -> Result<Self, WorkerError> {
        let load = || {
            Ok(match path.is_dir() && encoder::is_encoder(path) {
                true => Loaded::Embed(Box::new(HostedEncoder::load(path, name, config)?)),
                false => {
                    let hosted = Hosted::load(path, name, known, config, templates)?;
                    Loaded::Chat(Box::new(hosted))
                }
            })
        };
        let panicked = |_| {
            Err(WorkerError::Internal(format!(
                "loading {} panicked; the lines before say where",
                path.display()
            )))
        };
        std::panic::catch_unwind(AssertUnwindSafe(load)).unwrap_or_else(panicked)
    }

    /// Sets the source that it was loaded from.
    pub(crate) fn from(mut self, source: Source) -> Self {
        match &mut self {
            Loaded::Chat(hosted) => hosted.source = source,
            Loaded::Embed(hosted) => hosted.source = source,
        }
        self
    }

    /// Keeps its files in the store for as long as it is loaded.
    pub(crate) fn pinned(mut self, pin: Option<Pin>) -> Self {
        match &mut self {
            Loaded::Chat(hosted) => hosted._pin = pin,
            Loaded::Embed(hosted) => hosted._pin = pin,
        }
        self
    }

    fn name(&self) -> &str {
        match self {
            Loaded::Chat(hosted) => &hosted.card.name,
            Loaded::Embed(hosted) => &hosted.card.name,
        }
    }
}

impl Removed {
    /// Resolves when its running requests have ended.
    pub(crate) async fn drain(&self) {
        match self {
            Removed::Chat(hosted) => hosted.engine.drain().await,
            Removed::Embed(hosted) => hosted.engine.drain().await,
        }
    }
}

impl Hosted {
    /// Loads the model at `path` and lets it answer once. It is called as its file is unless there is a
    /// `name`; its fingerprint is computed unless it is known. Blocks.
    pub(crate) fn load(
        path: &Path,
        name: Option<&str>,
        known: Option<&str>,
        config: &Config,
        templates: Option<&Templates>,
    ) -> Result<Self, WorkerError> {
        let started = Instant::now();
        // Loading takes a multiple of the memory that serving does.
        let _reclaim = Reclaim;
        let model = Model::open(path)?;
        let name = name.map_or_else(|| model.name(), str::to_owned);
        if let Some(known) = known {
            model.know_fingerprint(known);
        }
        let stop = AtomicBool::new(false);
        let cache = FingerprintCache::new(config.state_dir.join("fingerprints.json"));
        let fingerprint = std::thread::scope(|scope| {
            // Reading the whole file takes as long as packing its weights: side by side.
            let fingerprint = scope.spawn(|| match known {
                Some(known) => Ok(known.to_owned()),
                // Of a folder it is made of the digests of its files.
                None if path.is_dir() => model
                    .fingerprint()
                    .map(str::to_owned)
                    .map_err(std::io::Error::other),
                None => cache.fingerprint_until(path, &stop),
            });
            let stage = load_stage(&model, &name, config);
            if stage.is_err() {
                // No one needs it any more.
                stop.store(true, Ordering::Relaxed);
            }
            let stage = stage?;
            let fingerprint = fingerprint
                .join()
                .unwrap_or_else(|_| Err(std::io::Error::other("it panicked")));
            let fingerprint = fingerprint.map_err(|error| {
                WorkerError::Internal(format!("fingerprint of {}: {error}", path.display()))
            })?;
            Ok::<_, WorkerError>((stage, fingerprint))
        });
        let (opened, fingerprint) = fingerprint?;
        if let Some(templates) = templates {
            learn_turn_end(&model, &name, templates);
        }
        let info = opened.stage.info().clone();
        let scheduler = SchedulerConfig {
            kv_tokens: Some(kv_tokens(config, info.kv_bytes_per_token, Path::new("/"))),
            ..config.scheduler()
        };
        let start = |source| WorkerError::Start {
            name: name.clone(),
            source,
        };
        let stage = opened.stage;
        #[cfg(test)]
        let stage = crate::engine_death::stage_of(&name, stage);
        let engine =
            Engine::start(&name, stage, Arc::new(model.clone()), scheduler).map_err(start)?;
        let handle = engine.handle();
        warm_up(&handle, &name, model.tokenizer())?;
        let measured = handle.load();

        let context = u32::try_from(measured.kv_tokens_total).unwrap_or(u32::MAX);
        let context = context.min(info.context);
        if context < info.context {
            tracing::warn!(
                model = name,
                context,
                wanted = info.context,
                "memory for keys and values is short, so conversations are: set kv_memory, or give the worker more memory"
            );
        }
        let card = ModelCard {
            context,
            slots: info.slots,
            decode_tps: measured.decode_tps,
            prefill_tps: measured.prefill_tps,
            layer_start: info.layers.start,
            layer_end: info.layers.end,
            ..card(&name, path, &model, &fingerprint)
        };
        tracing::info!(
            model = card.name,
            backend = %opened.provider,
            seconds = started.elapsed().as_secs_f64(),
            weight_mib = info.weight_bytes >> 20,
            kv_tokens = measured.kv_tokens_total,
            decode_tokens_per_second = measured.decode_tps,
            prefill_tokens_per_second = measured.prefill_tps,
            "model loaded"
        );
        Ok(Hosted {
            model,
            engine: handle,
            card,
            backend: opened.provider,
            source: Source::At(path.into()),
            _engine: engine,
            _pin: None,
        })
    }
}

/// Logs the faults of a model's chat template once, and finds the token that it puts behind an answer.
pub(crate) fn learn_turn_end(model: &Model, name: &str, templates: &Templates) {
    let template = model.template();
    if template.is_fallback() {
        tracing::warn!(
            model = name,
            format = template.name(),
            "the model brings no chat template: conversations are written in a format that it may not know"
        );
    }
    match futures::executor::block_on(templates.render(template, Model::turn_probe())) {
        Ok(rendered) => {
            if let Some(token) = model.learn_turn_end(&rendered.text) {
                tracing::warn!(
                    model = name,
                    token,
                    "the model's file does not say so, but its chat template ends answers with this token"
                );
            }
        }
        Err(error @ TemplateError::Invalid(_)) => {
            tracing::error!(model = name, %error, "conversations with this model are refused");
        }
        Err(error) => tracing::debug!(model = name, %error, "the chat template has no answers"),
    }
    match futures::executor::block_on(templates.render(template, Model::text_probe())) {
        Ok(rendered) => model.learn_keeps_text(&rendered.text),
        Err(error) => {
            tracing::debug!(model = name, %error, "the chat template takes no long conversation")
        }
    }
}

/// Description of a model without loading it.
pub(crate) fn card(name: &str, path: &Path, model: &Model, fingerprint: &str) -> ModelCard {
    let spans = model.tokenizer().spans();
    ModelCard {
        name: name.to_owned(),
        architecture: model.config().architecture.name().to_owned(),
        fingerprint: fingerprint.to_owned(),
        context: model.config().context,
        file_bytes: match path.is_file() {
            true => std::fs::metadata(path).map_or(0, |metadata| metadata.len()),
            // Of a folder, its weights.
            false => model.tensors().file_len(),
        },
        quantization: quantization(model),
        byte_spans: spans.map_or_else(Vec::new, |spans| spans.as_bytes().to_vec()),
        keeps_text: model.keeps_text(),
        ..ModelCard::default()
    }
}

/// Options for loading stages on this worker.
pub(crate) fn options(config: &Config) -> OrtOptions {
    OrtOptions {
        library: config.ort_library.clone(),
        threads: config.threads,
        slots: config.slots,
        context: config.context,
        max_rows: config.step_rows,
        cache: (config.weights.cache > 0).then(|| WeightCache {
            folder: config.state_dir.join("weights"),
            limit: config.weights.cache,
        }),
        ..OrtOptions::default()
    }
}

fn load_stage(model: &Model, name: &str, config: &Config) -> Result<Opened, WorkerError> {
    let layers = 0..model.config().layers;
    let options = OrtOptions {
        weights: config.weights.format.of(model),
        ..options(config)
    };
    if options.weights != WeightFormat::File && model.known_fingerprint().is_none() {
        // Weights that were quantised before are found by it. If it cannot be had, the caller will say so.
        let cache = FingerprintCache::new(config.state_dir.join("fingerprints.json"));
        if let Ok(fingerprint) = cache.fingerprint(model.path()) {
            model.know_fingerprint(&fingerprint);
        }
    }
    // The log already has the reason for which a GPU is not used.
    let opened = mesh_engine_ort::open(model, layers, options, config.backend);
    opened.map_err(|error| WorkerError::Load {
        name: name.to_owned(),
        source: Box::new(error),
    })
}

/// Lets the engine answer once: proof that a token comes out, and the first measurement of its speed.
pub(crate) fn warm_up(
    engine: &EngineHandle,
    name: &str,
    tokenizer: &Tokenizer,
) -> Result<(), WorkerError> {
    let vocab = tokenizer.vocab_size().max(1) as u32;
    let length = WARM_UP_PROMPT.min(engine.info().context / 2).max(1);
    // Any tokens will do; spread over the vocabulary they touch as much of the embedding as text does.
    let prompt = (0..length).map(|i| i.wrapping_mul(7919) % vocab).collect();
    let request = Request {
        ignore_eos: true,
        ..Request::greedy("warm-up", prompt, WARM_UP_ANSWER)
    };
    let last = futures::executor::block_on(engine.submit(request).collect::<Vec<_>>()).pop();
    let reason = match last {
        Some(Event::Done(done)) if done.completion_tokens > 0 => return Ok(()),
        Some(Event::Failed(error)) => error.to_string(),
        other => format!("it ended with {other:?}"),
    };
    Err(WorkerError::Broken {
        name: name.to_owned(),
        reason,
    })
}

/// KV memory of one model, in tokens. `root` is `/` but in tests.
fn kv_tokens(config: &Config, bytes_per_token: u64, root: &Path) -> u64 {
    let models = config.models.len().max(1) as u64;
    let bytes = config
        .kv_memory
        .or_else(|| Some(Memory::read(root).available? / 2 / models));
    bytes.map_or(u64::MAX, |bytes| bytes / bytes_per_token.max(1))
}

/// The format of most bytes.
fn quantization(model: &Model) -> String {
    let mut bytes = std::collections::BTreeMap::<String, u64>::new();
    for tensor in model.tensors().iter() {
        *bytes.entry(format!("{:?}", tensor.ty)).or_default() += tensor.data.len() as u64;
    }
    let most = bytes.into_iter().max_by_key(|&(_, bytes)| bytes);
    most.map_or_else(String::new, |(name, _)| name)
}

/// Enough rows to measure prefill by, few enough to keep the start short.
const WARM_UP_PROMPT: u32 = 96;

/// Enough tokens to measure decode by.
const WARM_UP_ANSWER: u32 = 12;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kv_cache_takes_half_of_what_a_container_may_use() {
        let root = tempfile::tempdir().expect("a folder");
        for (path, text) in [
            (
                "proc/meminfo",
                "MemTotal: 64000 kB\nMemAvailable: 60000 kB\n",
            ),
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/memory.max", "8000000\n"),
            ("sys/fs/cgroup/memory.current", "5000000\n"),
            ("sys/fs/cgroup/memory.stat", "inactive_file 1000000\n"),
        ] {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            std::fs::write(path, text).expect("written");
        }
        let mut config = Config {
            models: vec!["one".into()],
            ..Config::default()
        };
        assert_eq!(kv_tokens(&config, 1000, root.path()), 2000);
        config.models.push("two".into());
        assert_eq!(kv_tokens(&config, 1000, root.path()), 1000);
        config.kv_memory = Some(1 << 20);
        assert_eq!(kv_tokens(&config, 1 << 10, root.path()), 1 << 10);
    }
}
