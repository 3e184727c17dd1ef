//! The worker's configuration: the keys, their defaults, and the checks before anything starts.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use mesh_base::addresses::host_and_port;
use mesh_engine::SchedulerConfig;
use mesh_engine_ort::{Backend, WeightFormat};
use mesh_model::Model;
use mesh_service::config::{GossipConfig, units};
use mesh_service::network::Network;
use mesh_store::FingerprintCache;
use serde::{Deserialize, Serialize};

/// All settings of the worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Key, certificate, the fingerprints of model files, and the addresses in use.
    pub state_dir: PathBuf,
    /// Name a person knows this node by; the host's name by default.
    pub node_name: Option<String>,
    /// The head's QUIC address, `host:7780`.
    pub head: Option<String>,
    /// Find the head, where `head` is not set, and other workers on the LAN by multicast DNS.
    pub mdns: bool,
    /// File with the join token; needed until the worker has joined.
    pub join_token_file: Option<PathBuf>,
    /// The join token itself, for deployments that hand secrets over in the environment.
    pub join_token: Option<String>,
    /// Models to serve whole: paths of GGUF files or of folders with safetensors, names looked up in
    /// `model_dirs`, names of models that other workers or the hub have, or short names such as `qwen2.5:7b`;
    /// for embeddings the folder of an encoder; for images a folder in diffusers' form or one `.safetensors` file.
    pub models: Vec<String>,
    /// Folders in which models are looked up by name.
    pub model_dirs: Vec<PathBuf>,
    /// Purposes that this node is reserved for: `chat`, `embeddings`, `images`; empty means any.
    pub reserved_for: Vec<String>,
    /// Settings of embedding models.
    pub embed: EmbedConfig,
    /// Settings of models that make images.
    pub images: ImagesConfig,
    /// Folder whose models are served whole as they appear, and withdrawn when they vanish.
    pub local_models: Option<PathBuf>,
    /// Models that come from elsewhere.
    pub store: StoreConfig,
    /// ONNX Runtime's library; `ORT_DYLIB_PATH` by default.
    pub ort_library: Option<PathBuf>,
    /// ONNX Runtime's WebGPU plugin; `ORT_WEBGPU_EP` by default, or the one beside ONNX Runtime's library.
    pub webgpu_library: Option<PathBuf>,
    /// Device that computes: `auto` (the fastest of the CPU and the GPUs that this build can use and that work),
    /// `cpu`, `cuda`, `migraphx`, `webgpu`, or `ort-cpu` (the graph for GPUs on the CPU, to try it).
    #[serde(with = "backend_name")]
    pub backend: Backend,
    /// Most memory of the GPU for the weights and KV cache of all models that are served whole; layers that do
    /// not fit run on the CPU. By default what is free at the load.
    #[serde(with = "units::optional_bytes")]
    pub vram_limit: Option<u64>,
    /// Threads that compute, for each model; 0 is one per core.
    pub threads: usize,
    /// Requests that one model runs at once.
    pub slots: u32,
    /// Most tokens of prompt and answer together; 0 is as many as the model was made for.
    pub context: u32,
    /// KV cache of each model; by default half of the memory that is free at the start, shared by the models.
    #[serde(with = "units::optional_bytes")]
    pub kv_memory: Option<u64>,
    /// Most rows of one step: larger is faster for long prompts and takes more memory.
    pub step_rows: u32,
    /// Time for which long prompts may make answers in progress wait for their next token.
    #[serde(with = "units::duration")]
    pub decode_stall: Duration,
    /// Requests that may wait for a slot of a model.
    pub queue_limit: usize,
    /// Time limit for running answers after SIGTERM.
    #[serde(with = "units::duration")]
    pub drain_limit: Duration,
    /// Networks whose plain DCF is accepted, besides loopback and the v5.0.0 head.
    pub trusted_networks: Vec<Network>,
    /// The HTTP listener for health and metrics.
    pub http: HttpConfig,
    /// Format of models' weights, and the cache of quantised weights.
    pub weights: WeightsConfig,
    /// Running models together with other workers.
    pub ring: RingConfig,
    /// Signed gossip with the other nodes.
    pub gossip: GossipConfig,
    /// Settings of DCF over UDP.
    pub dcf: DcfConfig,
    /// Serving a head of DCF v5.0.0 or v5.1.
    pub legacy: LegacyConfig,
    /// Defaults for requests that do not set these.
    pub sampling: SamplingDefaults,
    /// Tell the head about this node's system, hardware and models.
    pub evidence: bool,
    /// The TPM 2.0 that vouches for that: `auto` for /dev/tpmrm0 if it is there, `off`, or the path of
    /// another device or socket.
    pub tpm: TpmChoice,
    /// Log level or filter, used if neither `--log-level` nor RUST_LOG is set.
    pub log_level: Option<String>,
}

/// The TPM that vouches for the evidence.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum TpmChoice {
    /// The kernel's, if there is one.
    #[default]
    Auto,
    /// None.
    Off,
    /// That behind this device file or socket.
    At(PathBuf),
}

impl From<String> for TpmChoice {
    fn from(text: String) -> Self {
        match &*text {
            "auto" | "" => Self::Auto,
            "off" => Self::Off,
            _ => Self::At(text.into()),
        }
    }
}

impl From<TpmChoice> for String {
    fn from(choice: TpmChoice) -> Self {
        match choice {
            TpmChoice::Auto => "auto".to_owned(),
            TpmChoice::Off => "off".to_owned(),
            TpmChoice::At(path) => path.display().to_string(),
        }
    }
}

/// Settings of the HTTP listener for health and metrics.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpConfig {
    /// Address and port of the listener.
    pub listen: SocketAddr,
    /// Names, besides this machine's own, under which browsers may reach it on loopback.
    pub hosts: Vec<String>,
}

/// Settings of embedding models.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EmbedConfig {
    /// Most tokens that are computed at once, over all texts of a batch.
    pub batch_tokens: u32,
    /// Texts that a model wants in front of others, by model and by name, where its own files do not say
    /// them, such as `{ "e5-small-v2" = { query = "query: ", passage = "passage: " } }`.
    pub prompts: BTreeMap<String, BTreeMap<String, String>>,
}

impl Default for EmbedConfig {
    fn default() -> Self {
        EmbedConfig {
            batch_tokens: 1024,
            prompts: BTreeMap::new(),
        }
    }
}

/// Settings of models that make images. They need a build with the feature `images`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImagesConfig {
    /// One more of the `models`, for images: a path or a name.
    pub model: Option<String>,
    /// The same as a path, which comes before `model`.
    pub model_path: Option<String>,
    /// Steps of requests that set none; 0 is as many as the model was made for.
    pub steps: u32,
    /// Guidance of requests that set none; by default that which the model was made for.
    pub guidance: Option<f32>,
    /// Most memory that an image takes while it is made, besides the weights; by default three quarters of what is free when
    /// they are loaded. It decides the largest size.
    #[serde(with = "units::optional_bytes")]
    pub memory: Option<u64>,
    /// Form of an image model's weights in memory.
    pub weights: ImageWeights,
    /// Parts of an image model that are not in memory while they do not compute.
    pub offload: ImageOffload,
    /// Priority of the threads that make images, as a nice value that is added: text comes first.
    pub nice: i32,
    /// Longest wait of an image's step for text that this worker computes; zero waits for none.
    #[serde(with = "units::duration")]
    pub patience: Duration,
}

/// Form of an image model's weights in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageWeights {
    /// The fastest one for which there is memory; images are those of `full`.
    #[default]
    Auto,
    /// As the device computes.
    Full,
    /// As in the file where that takes less memory; images are those of `full`.
    File,
    /// Integers of 8 bits, with a scale for each output of a layer; images differ a little.
    Int8,
}

/// Parts of an image model that are not in memory while they do not compute. They are read from its files for their use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageOffload {
    /// The fewest for which there is memory; none on GPUs.
    #[default]
    Auto,
    /// None.
    None,
    /// Text encoders, UNet and autoencoder, of which one is in memory.
    Modules,
    /// Every layer: one is in memory.
    Sequential,
}

/// Format of models' weights, and the cache of quantised weights.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WeightsConfig {
    /// Format in memory of the weights of models that are served whole; `auto` is as in the file, or 8-bit
    /// integers where those are floats.
    pub format: Format,
    /// Most disk space, in the folder `weights` of the state directory, for weights that were quantised when
    /// they were loaded; 0 keeps none.
    #[serde(with = "units::bytes")]
    pub cache: u64,
}

/// Format of weights in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Depends on the setting: see [`WeightsConfig::format`] and [`RingConfig::format`].
    #[default]
    Auto,
    /// The types of the file, unchanged.
    File,
    /// 8-bit integers.
    Int8,
    /// 4-bit integers.
    Int4,
}

impl Format {
    /// The format for a model that is served whole.
    pub(crate) fn of(self, model: &Model) -> WeightFormat {
        match self.candidates() {
            [only] => *only,
            _ => WeightFormat::suited(model),
        }
    }

    /// The formats to measure for parts of a model.
    pub(crate) fn candidates(self) -> &'static [WeightFormat] {
        match self {
            Format::Auto => &[WeightFormat::File, WeightFormat::Int8],
            Format::File => &[WeightFormat::File],
            Format::Int8 => &[WeightFormat::Int8],
            Format::Int4 => &[WeightFormat::Int4],
        }
    }
}

/// Running models together with other workers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RingConfig {
    /// Models of which this worker holds a range of layers if the head wants it to; named like the `models` that
    /// it serves whole.
    pub models: Vec<String>,
    /// Address at which other workers reach this one, QUIC over UDP. Used only with `models` of
    /// its own, or with models that come from elsewhere.
    pub listen: SocketAddr,
    /// Most memory for parts and their KV cache; by default most of the memory that is free at the start.
    #[serde(with = "units::optional_bytes")]
    pub memory: Option<u64>,
    /// Format in memory of the weights; `auto` is as in the file or 8-bit integers, whichever is faster on
    /// this machine by measurement.
    pub format: Format,
}

/// Models that come from elsewhere: from other workers, from the hub.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// Folder of the store; `store` in `state_dir` by default.
    pub dir: Option<PathBuf>,
    /// Most bytes that they may take; the least recently used model goes first. By default all but 1 GiB of
    /// the disk.
    #[serde(with = "units::optional_bytes")]
    pub limit: Option<u64>,
    /// Get models from the Hugging Face hub that no worker has.
    pub hub: bool,
    /// Get models from other workers, and give them the models here.
    pub peers: bool,
    /// Take only models whose manifest is signed by one of `trusted_keys`.
    pub require_signature: bool,
    /// Files with the public keys of those whose signatures count.
    pub trusted_keys: Vec<PathBuf>,
}

/// Settings of DCF over UDP.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DcfConfig {
    /// Address that takes plain tasks.
    pub listen: SocketAddr,
}

/// Serving a head of DCF v5.0.0 or v5.1.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LegacyConfig {
    /// Its worker bus, `host:7778`; heartbeats go there.
    pub head: Option<String>,
    /// The version of DCF that it speaks.
    pub version: HeadVersion,
}

/// The version of DCF that a head speaks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HeadVersion {
    /// Found out: it gets heartbeats of both versions until it sends something.
    #[default]
    #[serde(rename = "auto")]
    Auto,
    /// DCF v5.0.0.
    #[serde(rename = "5.0")]
    V5_0,
    /// DCF v5.1.
    #[serde(rename = "5.1")]
    V5_1,
}

/// Defaults for requests that do not set these.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingDefaults {
    /// Temperature; 0 is greedy.
    pub temperature: f32,
    /// Number of likeliest tokens to choose from; 0 is all.
    pub top_k: u32,
    /// Total probability of the likeliest tokens to choose from; 1 is all.
    pub top_p: f32,
    /// Least probability of a token, relative to the likeliest one; 0 is all.
    pub min_p: f32,
    /// Penalty on tokens that occurred before; 1 is off.
    pub repetition_penalty: f32,
    /// Most tokens of an answer; 0 is as many as the context holds.
    pub max_tokens: u32,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            state_dir: "/var/lib/hydramesh/worker".into(),
            node_name: None,
            head: None,
            mdns: false,
            join_token_file: None,
            join_token: None,
            models: Vec::new(),
            model_dirs: vec!["/var/lib/hydramesh/models".into()],
            reserved_for: Vec::new(),
            embed: EmbedConfig::default(),
            images: ImagesConfig::default(),
            local_models: None,
            store: StoreConfig::default(),
            ort_library: None,
            webgpu_library: None,
            backend: Backend::Auto,
            vram_limit: None,
            threads: 0,
            slots: 8,
            context: 0,
            kv_memory: None,
            step_rows: 128,
            decode_stall: Duration::from_millis(100),
            queue_limit: 64,
            drain_limit: Duration::from_secs(30),
            trusted_networks: Vec::new(),
            http: HttpConfig::default(),
            weights: WeightsConfig::default(),
            ring: RingConfig::default(),
            gossip: GossipConfig::default(),
            dcf: DcfConfig::default(),
            legacy: LegacyConfig::default(),
            sampling: SamplingDefaults::default(),
            evidence: true,
            tpm: TpmChoice::Auto,
            log_level: None,
        }
    }
}

impl Default for HttpConfig {
    fn default() -> Self {
        HttpConfig {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 8081)),
            hosts: Vec::new(),
        }
    }
}

impl Default for ImagesConfig {
    fn default() -> Self {
        ImagesConfig {
            model: None,
            model_path: None,
            steps: 0,
            guidance: None,
            memory: None,
            weights: ImageWeights::Auto,
            offload: ImageOffload::Auto,
            nice: 19,
            patience: Duration::from_secs(20),
        }
    }
}

impl Default for WeightsConfig {
    fn default() -> Self {
        WeightsConfig {
            format: Format::default(),
            cache: 32 << 30,
        }
    }
}

impl Default for RingConfig {
    fn default() -> Self {
        RingConfig {
            models: Vec::new(),
            listen: mesh_base::listen::anywhere(7781),
            memory: None,
            format: Format::default(),
        }
    }
}

impl Default for StoreConfig {
    fn default() -> Self {
        StoreConfig {
            dir: None,
            limit: None,
            hub: true,
            peers: true,
            require_signature: false,
            trusted_keys: Vec::new(),
        }
    }
}

impl Default for DcfConfig {
    fn default() -> Self {
        DcfConfig {
            listen: mesh_base::listen::anywhere(7779),
        }
    }
}

impl Default for SamplingDefaults {
    fn default() -> Self {
        SamplingDefaults {
            temperature: 0.7,
            top_k: 0,
            top_p: 0.95,
            min_p: 0.05,
            repetition_penalty: 1.0,
            max_tokens: 0,
        }
    }
}

impl Config {
    /// Settings of the scheduler, except for the KV memory.
    pub(crate) fn scheduler(&self) -> SchedulerConfig {
        SchedulerConfig {
            queue_limit: self.queue_limit,
            decode_stall: self.decode_stall,
            ..SchedulerConfig::default()
        }
    }

    /// The same with the image model of `images` among the `models`.
    #[must_use]
    pub fn with_image_model(mut self) -> Self {
        let (path, name) = (self.images.model_path.take(), self.images.model.take());
        let new = path.or(name).filter(|model| !self.models.contains(model));
        self.models.extend(new);
        self
    }

    /// Checks rules that no single key can express.
    pub fn check(&self) -> Result<(), Unsound> {
        let images = &self.images;
        if images.steps > MOST_IMAGE_STEPS {
            return Err(Unsound::ImageSteps(images.steps));
        }
        if images.patience > MOST_PATIENCE {
            return Err(Unsound::ImagePatience(images.patience));
        }
        if images
            .guidance
            .is_some_and(|guidance| !(0.0..=50.0).contains(&guidance))
        {
            return Err(Unsound::ImageGuidance);
        }
        if self.models.is_empty()
            && images.model.is_none()
            && images.model_path.is_none()
            && self.ring.models.is_empty()
            && self.local_models.is_none()
        {
            return Err(Unsound::NoModels);
        }
        if !self.has_head() && self.legacy.head.is_none() {
            return Err(Unsound::NoHead);
        }
        for (key, head) in [("head", &self.head), ("legacy.head", &self.legacy.head)] {
            if let Some(head) = head.as_ref().filter(|head| host_and_port(head).is_none()) {
                return Err(Unsound::HeadAddress {
                    key,
                    value: head.clone(),
                });
            }
        }
        let mut purposes = self.reserved_for.iter();
        if let Some(purpose) = purposes.find(|purpose| !PURPOSES.contains(&purpose.as_str())) {
            return Err(Unsound::Purpose(purpose.clone()));
        }
        for (key, value) in [
            ("slots", self.slots),
            ("step_rows", self.step_rows),
            ("embed.batch_tokens", self.embed.batch_tokens),
            (
                "gossip.interval",
                u32::from(!self.gossip.interval.is_zero()),
            ),
        ] {
            if value == 0 {
                return Err(Unsound::Zero(key));
            }
        }
        Ok(())
    }

    /// Returns true if there is a head to link to, at an address or to be found on the LAN.
    pub(crate) fn has_head(&self) -> bool {
        self.head.is_some() || self.mdns
    }

    /// Folders in which models are looked up.
    pub fn folders(&self) -> Vec<PathBuf> {
        let local = self.local_models.iter().cloned();
        local.chain(self.model_dirs.iter().cloned()).collect()
    }

    /// Folder of the store of models.
    pub fn store_dir(&self) -> PathBuf {
        let own = || self.state_dir.join("store");
        self.store.dir.clone().unwrap_or_else(own)
    }

    /// The digests of model files that were computed before.
    pub(crate) fn fingerprints(&self) -> FingerprintCache {
        FingerprintCache::new(self.state_dir.join("fingerprints.json"))
    }

    /// Returns true if plain DCF from this address is accepted without further proof.
    pub fn trusts(&self, source: IpAddr) -> bool {
        let source = source.to_canonical();
        source.is_loopback() || self.trusted_networks.iter().any(|n| n.contains(source))
    }

    /// Name a person knows this node by.
    pub fn node_name(&self) -> String {
        let name = self.node_name.as_ref().map(|name| name.trim().to_owned());
        let name = name.filter(|name| !name.is_empty()).or_else(host_name);
        name.unwrap_or_else(|| "worker".to_owned())
    }
}

pub(crate) fn host_name() -> Option<String> {
    // A service may not see the first.
    let files = ["/proc/sys/kernel/hostname", "/etc/hostname"];
    let names = files.iter().flat_map(std::fs::read_to_string);
    let mut names = names.map(|name| name.trim().to_owned());
    names.find(|name| !name.is_empty())
}

/// Keys that are valid one by one and make no sense together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum Unsound {
    /// No model is configured.
    #[error(
        "`models` and `ring.models` are empty: name at least one GGUF file to serve whole, as models = [\"/path/model.gguf\"] or --model FILE, or to hold layers of, as ring.models = [\"/path/model.gguf\"] or --ring-model FILE, or a folder whose models are served, as local_models = \"/path\""
    )]
    NoModels,
    /// No head is set.
    #[error(
        "`head` is not set: give the head's QUIC address, as head = \"host:7780\" or --head HOST:PORT, or find it on the LAN with mdns = true"
    )]
    NoHead,
    /// An address without a port.
    #[error("`{key}` is {value:?}, which is not host:port; write it as \"head.example:7780\"")]
    HeadAddress { key: &'static str, value: String },
    /// A reservation for nothing that there is.
    #[error(
        "`reserved_for` names {0:?}; a node can be kept for \"chat\", \"embeddings\" or \"images\""
    )]
    Purpose(String),
    /// More steps than requests may ask for.
    #[error(
        "`images.steps` is {0}, but must be at most {MOST_IMAGE_STEPS}; 0 is the model's own number"
    )]
    ImageSteps(u32),
    /// A guidance that no request may ask for.
    /// A step that waits so long passes for one that hangs.
    #[error("`images.patience` is {0:?}, but must be at most {MOST_PATIENCE:?}")]
    ImagePatience(Duration),
    #[error("`images.guidance` must be between 0 and 50; leave it out for the model's own")]
    ImageGuidance,
    /// A zero where that makes no sense.
    #[error("`{0}` must be greater than 0")]
    Zero(&'static str),
}

/// Steps that a request may ask for.
const MOST_IMAGE_STEPS: u32 = 150;

/// Purposes that a node can be reserved for.
/// Longest wait of an image's step for text.
const MOST_PATIENCE: Duration = Duration::from_secs(120);
const PURPOSES: [&str; 3] = ["chat", "embeddings", "images"];

/// A backend by its name.
mod backend_name {
    use mesh_engine_ort::Backend;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(value: &Backend, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(value)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Backend, D::Error> {
        String::deserialize(d)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use mesh_service::config::Loader;
    use mesh_service::service::Service as _;

    use super::*;
    use crate::service::Flags;
    use crate::worker::Worker;

    fn parse(toml: &str) -> Config {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), toml).unwrap();
        let loader = Loader::new("worker").file(file.path());
        loader.environment::<&str, &str>([]).load().unwrap().value
    }

    #[test]
    fn a_tpm_is_found_left_out_or_named() {
        assert_eq!(parse("").tpm, TpmChoice::Auto);
        assert_eq!(parse("tpm = \"off\"").tpm, TpmChoice::Off);
        let named = TpmChoice::At("/run/tpm".into());
        assert_eq!(parse("tpm = \"/run/tpm\"").tpm, named);
        assert_eq!(String::from(named), "/run/tpm");
    }

    #[test]
    fn what_is_missing_is_named_with_its_remedy() {
        let error = |toml: &str| parse(toml).check().unwrap_err().to_string();
        assert!(error("head = \"h:1\"").contains("models = ["));
        assert!(error("models = [\"m\"]").contains("head = \"host:7780\""));
        assert!(error("models = [\"m\"]\nhead = \"h\"").contains("\"h\", which is not host:port"));
        assert!(error("models = [\"m\"]\nhead = \"h:1\"\nslots = 0").contains("`slots`"));
        assert!(
            error("models = [\"m\"]\nhead = \"h:1\"\nreserved_for = [\"embed\"]")
                .contains("\"embeddings\"")
        );
        assert_eq!(parse("models = [\"m\"]\nhead = \"h:1\"").check(), Ok(()));
        assert_eq!(
            parse("models = [\"m\"]\nlegacy.head = \"h:1\"").check(),
            Ok(())
        );
    }

    #[test]
    fn names_of_earlier_deployments_set_the_image_model_and_its_defaults() {
        let from = |variables: &[(&str, &str)]| {
            let loader = Worker::layers(Loader::new("worker"), &Flags::default());
            let loaded = loader.environment(variables.to_vec()).load();
            loaded.unwrap().value.with_image_model()
        };
        let config = from(&[
            ("SD_MODEL_ID", "org/sd"),
            ("SD_INFERENCE_STEPS", "30"),
            ("SD_GUIDANCE_SCALE", "6.5"),
        ]);
        assert_eq!(config.models, ["org/sd"]);
        assert_eq!(
            (config.images.steps, config.images.guidance),
            (30, Some(6.5))
        );
        let both = [("LOCAL_MODEL_PATH", "/srv/sd"), ("SD_MODEL_ID", "org/sd")];
        assert_eq!(from(&both).models, ["/srv/sd"]);
        assert_eq!(from(&[]).images.nice, 19);
        let small = parse("images.weights = \"int8\"\nimages.offload = \"modules\"").images;
        assert_eq!(
            (small.weights, small.offload),
            (ImageWeights::Int8, ImageOffload::Modules)
        );
        let error = |toml: &str| parse(toml).check().unwrap_err().to_string();
        assert!(error("images.steps = 200").contains("`images.steps` is 200"));
        assert!(error("images.patience = \"5m\"").contains("`images.patience` is 300s"));
        assert!(error("images.guidance = 99.0").contains("between 0 and 50"));
        let alone = parse("images.model = \"sd\"\nhead = \"h:1\"");
        assert_eq!(alone.check(), Ok(()));
    }

    #[test]
    fn sizes_and_times_take_units() {
        let config = parse("kv_memory = \"512MiB\"\ndecode_stall = \"50ms\"");
        assert_eq!(config.kv_memory, Some(512 << 20));
        assert_eq!(config.decode_stall, Duration::from_millis(50));
        assert_eq!(parse("").kv_memory, None);
        assert_eq!(parse("vram_limit = \"6GiB\"").vram_limit, Some(6 << 30));
    }

    #[test]
    fn the_backend_goes_by_its_name_or_by_torchs() {
        assert_eq!(parse("").backend, Backend::Auto);
        assert_eq!(parse("backend = \"migraphx\"").backend, Backend::MiGraphX);
        assert_eq!(parse("backend = \"webgpu\"").backend, Backend::WebGpu);
        let from = |variables: &[(&str, &str)]| {
            let file = tempfile::NamedTempFile::new().unwrap();
            Loader::<Config>::new("worker")
                .file(file.path())
                .env("TORCH_DEVICE", "backend")
                .environment(variables.to_vec())
                .load()
        };
        let torch = ("TORCH_DEVICE", "cuda:0");
        assert_eq!(from(&[torch]).unwrap().value.backend, Backend::Cuda);
        let vulkan = ("TORCH_DEVICE", "vulkan");
        assert_eq!(from(&[vulkan]).unwrap().value.backend, Backend::WebGpu);
        let own = ("HYDRAMESH_WORKER__BACKEND", "cpu");
        assert_eq!(from(&[torch, own]).unwrap().value.backend, Backend::Cpu);
        let error = from(&[("TORCH_DEVICE", "mps")]).unwrap_err().to_string();
        assert!(
            error.contains("mps") && error.contains("auto, cpu, cuda"),
            "{error}"
        );
    }

    #[test]
    fn only_loopback_and_named_networks_are_trusted() {
        let config = parse("trusted_networks = [\"10.0.0.0/8\"]");
        for (address, trusted) in [
            ("127.0.0.1", true),
            ("::ffff:127.0.0.1", true),
            ("10.1.2.3", true),
            ("192.168.0.1", false),
        ] {
            assert_eq!(
                config.trusts(address.parse().unwrap()),
                trusted,
                "{address}"
            );
        }
    }
}
