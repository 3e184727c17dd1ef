//! The head's configuration: the keys, their defaults, and the checks before anything starts.

mod evidence;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use arcanum_profiler::Objective;
use mesh_base::listen::anywhere;
use mesh_service::config::{GossipConfig, units};
use mesh_service::http::{Connections, Origin, TlsConfig};
use mesh_service::network::Network;
use serde::{Deserialize, Serialize};

use arcanum_attestor::Approval;
use mesh_control::router::Capacity;
use mesh_control::{dedup, placement, request, rings};

pub use evidence::{EvidenceConfig, EvidenceFault};

/// All settings of the head.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Keys, certificates, tokens, and the addresses in use.
    pub state_dir: PathBuf,
    /// Name of the mesh, put into its root certificate at the first start.
    pub mesh_name: String,
    /// Silence after which a worker is pruned.
    #[serde(with = "units::duration")]
    pub worker_timeout: Duration,
    /// Most silence of a worker that has a request: neither a token nor a sign of life.
    #[serde(with = "units::duration")]
    pub request_timeout: Duration,
    /// Most time that a request waits for a worker with room.
    #[serde(with = "units::duration")]
    pub queue_timeout: Duration,
    /// Most time from a request's arrival to its last token; 0 is without limit.
    #[serde(with = "units::duration")]
    pub answer_limit: Duration,
    /// Requests that may wait for a worker; more are refused.
    pub queue_limit: usize,
    /// Memory that requests may take here: their bodies, prompts and answers. One client gets two thirds of
    /// it at most; 0 is without limit. At least three times `http.body_limit`, which the default is raised
    /// to.
    #[serde(with = "units::bytes")]
    pub request_memory: u64,
    /// Time for which running requests outlast the last worker for them.
    #[serde(with = "units::duration")]
    pub rejoin_grace: Duration,
    /// Most reruns of one request after workers failed on it.
    pub max_reruns: u32,
    /// Least silence within an answer that counts as its worker's death.
    #[serde(with = "units::duration")]
    pub silence_limit: Duration,
    /// The same before the first token, on top of ten times the expected time.
    #[serde(with = "units::duration")]
    pub first_token_limit: Duration,
    /// Requests given to a worker beyond its slots.
    pub worker_ahead: u32,
    /// Time limit for running answers after SIGTERM.
    #[serde(with = "units::duration")]
    pub drain_limit: Duration,
    /// Model for requests that name none; otherwise the first one by name.
    pub default_model: Option<String>,
    /// Networks whose plain DCF clients are served, besides loopback.
    pub trusted_networks: Vec<Network>,
    /// Those of `trusted_networks` whose clients need not prove their address: clients of DCF v5.0.0 cannot.
    /// An attacker who can forge an address there can have answers sent to it.
    pub unverified_networks: Vec<Network>,
    /// Settings of the OpenAI API.
    pub http: HttpConfig,
    /// Settings of DCF over UDP.
    pub dcf: DcfConfig,
    /// Settings of the links of workers.
    pub quic: QuicConfig,
    /// Admission of new nodes.
    pub trust: TrustConfig,
    /// Models that several workers hold together.
    pub ring: RingConfig,
    /// The audit trail.
    pub audit: AuditConfig,
    /// Signed gossip with the other nodes.
    pub gossip: GossipConfig,
    /// Let workers on the LAN find this head by multicast DNS.
    pub mdns: bool,
    /// Log level or filter, used if neither `--log-level` nor RUST_LOG is set.
    pub log_level: Option<String>,
}

/// Settings of the OpenAI API.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpConfig {
    /// Address and port of the HTTP API.
    pub listen: SocketAddr,
    /// File with one API key per line.
    pub api_keys_file: Option<PathBuf>,
    /// Listen beyond loopback without API keys.
    pub allow_unauthenticated: bool,
    /// Require an API key or a curtain token even if no API key is listed.
    pub require_key: bool,
    /// Largest request body, in bytes.
    #[serde(with = "units::bytes")]
    pub body_limit: u64,
    /// Requests of one API key (without keys: of one address) at a time; 0 is without limit.
    pub concurrent_requests: usize,
    /// Largest value of `n`.
    pub choices_limit: u32,
    /// Pause after which a streamed answer gets a sign of life.
    #[serde(with = "units::duration")]
    pub keep_alive: Duration,
    /// A whole answer that takes longer sends its status and headers, and then blanks until it is there; 0 is
    /// never.
    #[serde(with = "units::duration")]
    pub early_headers: Duration,
    /// Memory for images that clients asked for as URLs. When it is full, the client with the most of it loses its oldest image.
    #[serde(with = "units::bytes")]
    pub image_memory: u64,
    /// Time for which such an image can be fetched.
    #[serde(with = "units::duration")]
    pub image_lifetime: Duration,
    /// Refuse requests with unknown fields, instead of naming them in a header.
    pub strict: bool,
    /// Names, besides this machine's own, under which browsers may reach a head without API keys.
    pub hosts: Vec<String>,
    /// Certificate for HTTPS. Without one, HTTP is plain.
    pub tls: TlsConfig,
    /// Origins of web pages that may use this head: `https://chat.example.org`, or `*` for all.
    pub cors: Vec<Origin>,
    /// Time limits for clients, and the number of connections that they may have.
    pub connections: Connections,
    /// Information that is open without a key where keys are in use. `/health` and the bare status of
    /// `/ready` always are.
    pub open: Vec<Open>,
}

/// An endpoint that shows the mesh without using it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Open {
    /// `/ready` with its reasons, and for one model.
    Ready,
    /// `/metrics`.
    Metrics,
}

/// Settings of DCF over UDP.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DcfConfig {
    /// Address to which clients send Tasks.
    pub clients: SocketAddr,
    /// Address to which workers send heartbeats, and workers without an identity (DCF v5.0.0 and v5.1)
    /// Results.
    pub workers: SocketAddr,
    /// Admit workers without an identity: from this machine, and from `legacy_worker_networks`.
    pub legacy_workers: bool,
    /// Networks from which they are admitted, too. They get clients' prompts, and nothing proves their
    /// identity.
    pub legacy_worker_networks: Vec<Network>,
    /// Tasks given to one of them at a time.
    pub legacy_concurrency: u32,
    /// Answers kept for clients that repeat their Task.
    pub answers_kept: usize,
    /// Bytes of them; the newest is kept even if it alone has more.
    #[serde(with = "units::bytes")]
    pub answers_kept_bytes: u64,
    /// Time for which they are kept.
    #[serde(with = "units::duration")]
    pub answers_kept_for: Duration,
    /// Sessions of clients that hold a key or token, at a time; each key or token has an eighth of them. 0
    /// turns sealed DCF off.
    pub sessions: usize,
    /// Silence of a client after which its session ends.
    #[serde(with = "units::duration")]
    pub session_idle: Duration,
}

/// `[trust]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrustConfig {
    /// How a node with a valid join token becomes a member: `automatic`, or `manual`, after an operator has approved it.
    pub approval: ApprovalRule,
    /// Time for which the former mesh root is accepted after a rotation.
    #[serde(with = "units::duration")]
    pub root_overlap: Duration,
    /// Requirements on the evidence of nodes, and the rule for changes.
    pub evidence: EvidenceConfig,
}

impl Default for TrustConfig {
    fn default() -> Self {
        Self {
            approval: ApprovalRule::default(),
            evidence: EvidenceConfig::default(),
            root_overlap: Duration::from_secs(30 * 24 * 3600),
        }
    }
}

/// Value of `trust.approval`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ApprovalRule {
    /// A valid token is enough.
    #[default]
    Automatic,
    /// The node waits until an operator has approved it.
    Manual,
}

/// Settings of the links of workers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuicConfig {
    /// Address and port, QUIC over UDP.
    pub listen: SocketAddr,
    /// Interval at which an idle worker is asked for one token, as proof that it answers.
    #[serde(with = "units::duration")]
    pub probe_interval: Duration,
    /// Also accept nodes that can only exchange keys by X25519, without ML-KEM: whoever records their traffic can read
    /// it once there are quantum computers.
    pub classical: bool,
}

/// Models that several workers hold together: rings.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RingConfig {
    /// Form rings from the offers of workers.
    pub enabled: bool,
    /// Optimisation target of plans: the time of one token, or the tokens of many requests.
    pub objective: Objective,
    /// Number of stages; 0 is as many as needed.
    pub stages: u32,
    /// Give stages standbys where memory allows.
    pub standbys: bool,
    /// Requests that a ring runs at once.
    pub slots: u32,
    /// Most tokens of prompt and answer; 0 is the model's own limit, less where memory is short.
    pub context: u32,
    /// Fraction by which a fresh plan must beat a running ring to replace it.
    pub margin: f64,
    /// Time without new offers before a ring is formed of them.
    #[serde(with = "units::duration")]
    pub gather: Duration,
    /// Hidden rows travel as f16 rather than f32.
    pub half_rows: bool,
    /// Time for which a worker that did not answer is left alone at first; each repeat doubles it.
    #[serde(with = "units::duration")]
    pub suspect_pause: Duration,
    /// Make a ring even for a model that some worker serves whole.
    pub always: bool,
}

/// The audit trail: a signed log of what the head accepted and decided.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuditConfig {
    /// Write it.
    pub enabled: bool,
    /// Longest time between a record and the signature and sync of its group.
    #[serde(with = "units::duration")]
    pub sync_interval: Duration,
    /// Length of an epoch.
    #[serde(with = "units::duration")]
    pub epoch: Duration,
    /// Time over which like messages of one sender are counted into one record; 0 records each.
    #[serde(with = "units::duration")]
    pub message_interval: Duration,
    /// Most bytes of records that each tier keeps, besides their hashes; 0 is without limit.
    #[serde(with = "units::bytes")]
    pub limit: u64,
}

impl Default for AuditConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            sync_interval: Duration::from_secs(1),
            epoch: Duration::from_secs(3600),
            message_interval: Duration::from_secs(60),
            limit: 512 << 20,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/hydramesh/head".into(),
            mesh_name: "hydramesh".into(),
            worker_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(300),
            queue_timeout: Duration::from_secs(3600),
            answer_limit: Duration::ZERO,
            queue_limit: 1024,
            request_memory: REQUEST_MEMORY,
            rejoin_grace: Duration::from_secs(10),
            max_reruns: 4,
            silence_limit: Duration::from_secs(3),
            first_token_limit: Duration::from_secs(30),
            worker_ahead: 1,
            drain_limit: Duration::from_secs(30),
            default_model: None,
            trusted_networks: Vec::new(),
            unverified_networks: Vec::new(),
            http: HttpConfig::default(),
            dcf: DcfConfig::default(),
            quic: QuicConfig::default(),
            trust: TrustConfig::default(),
            ring: RingConfig::default(),
            audit: AuditConfig::default(),
            gossip: GossipConfig::default(),
            mdns: false,
            log_level: None,
        }
    }
}

impl Default for RingConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            objective: Objective::Latency,
            stages: 0,
            standbys: true,
            slots: 8,
            context: 0,
            margin: 0.15,
            gather: Duration::from_secs(2),
            half_rows: false,
            suspect_pause: Duration::from_secs(10),
            always: false,
        }
    }
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            listen: (Ipv4Addr::LOCALHOST, 8080).into(),
            api_keys_file: None,
            allow_unauthenticated: false,
            require_key: false,
            body_limit: 8 << 20,
            concurrent_requests: 0,
            choices_limit: 16,
            keep_alive: Duration::from_secs(5),
            early_headers: Duration::from_secs(30),
            image_memory: 64 << 20,
            image_lifetime: Duration::from_secs(3600),
            strict: false,
            hosts: Vec::new(),
            tls: TlsConfig::default(),
            cors: Vec::new(),
            connections: Connections::default(),
            open: vec![Open::Ready, Open::Metrics],
        }
    }
}

impl Default for DcfConfig {
    fn default() -> Self {
        Self {
            clients: anywhere(7777),
            workers: anywhere(7778),
            legacy_workers: false,
            legacy_worker_networks: Vec::new(),
            legacy_concurrency: 64,
            answers_kept: 4096,
            answers_kept_bytes: 16 << 20,
            answers_kept_for: Duration::from_secs(60),
            sessions: 1024,
            session_idle: Duration::from_secs(600),
        }
    }
}

impl Default for QuicConfig {
    fn default() -> Self {
        Self {
            listen: anywhere(7780),
            probe_interval: Duration::from_secs(300),
            classical: false,
        }
    }
}

impl From<ApprovalRule> for Approval {
    fn from(rule: ApprovalRule) -> Self {
        match rule {
            ApprovalRule::Automatic => Self::Automatic,
            ApprovalRule::Manual => Self::Manual,
        }
    }
}

impl Config {
    /// Checks rules that no single key can express.
    ///
    /// # Errors
    /// [`Unsound`] says which keys contradict each other.
    pub fn check(&self) -> Result<(), Unsound> {
        let http = &self.http;
        if !http.listen.ip().to_canonical().is_loopback()
            && http.api_keys_file.is_none()
            && !http.allow_unauthenticated
            && !http.require_key
        {
            return Err(Unsound::OpenToAll(http.listen));
        }
        let positive = [
            ("worker_timeout", self.worker_timeout),
            ("request_timeout", self.request_timeout),
            ("queue_timeout", self.queue_timeout),
            ("http.keep_alive", self.http.keep_alive),
            ("silence_limit", self.silence_limit),
            ("first_token_limit", self.first_token_limit),
            ("quic.probe_interval", self.quic.probe_interval),
            ("audit.epoch", self.audit.epoch),
            ("trust.root_overlap", self.trust.root_overlap),
            ("gossip.interval", self.gossip.interval),
            ("dcf.session_idle", self.dcf.session_idle),
        ];
        if let Some((key, _)) = positive.into_iter().find(|(_, value)| value.is_zero()) {
            return Err(Unsound::Zero(key));
        }
        let memory = self.memory_of_requests();
        if memory > 0 && memory < self.least_memory() {
            return Err(Unsound::RequestMemory {
                memory,
                body: http.body_limit,
            });
        }
        if !self.dcf.legacy_workers && !self.dcf.legacy_worker_networks.is_empty() {
            return Err(Unsound::LegacyWorkersOff);
        }
        if let Some(key) = http.connections.zero() {
            return Err(Unsound::Zero(key));
        }
        if http.choices_limit == 0 {
            return Err(Unsound::Zero("http.choices_limit"));
        }
        if self.ring.slots == 0 {
            return Err(Unsound::Zero("ring.slots"));
        }
        self.trust.evidence.policy()?;
        if !(0.0..1.0).contains(&self.ring.margin) {
            return Err(Unsound::Margin(self.ring.margin.to_string()));
        }
        Ok(())
    }

    /// Memory that requests may take: the default is more if bodies may be long.
    pub fn memory_of_requests(&self) -> u64 {
        match self.request_memory {
            REQUEST_MEMORY => REQUEST_MEMORY.max(self.least_memory()),
            said => said,
        }
    }

    /// Two thirds of it are one client's, whose body is held twice: as it is, and as what it says.
    fn least_memory(&self) -> u64 {
        self.http.body_limit.saturating_mul(3)
    }

    /// Limits of one answer.
    pub fn request_limits(&self) -> request::Limits {
        request::Limits {
            timeout: self.request_timeout,
            queue: self.queue_timeout,
            total: (!self.answer_limit.is_zero()).then_some(self.answer_limit),
            reruns: self.max_reruns,
            silence: self.silence_limit,
            first_token: self.first_token_limit,
        }
    }

    /// Interval at which a worker says that a request lives: a few signs may be late before any limit on
    /// silence is reached.
    pub fn progress_interval(&self) -> Duration {
        let before_token = self.first_token_limit.min(self.request_timeout);
        let shortest = self.silence_limit.min(before_token);
        (shortest / 4).clamp(Duration::from_millis(50), Duration::from_secs(1))
    }

    /// Limits for the placement core.
    pub fn placement_limits(&self) -> placement::Limits {
        placement::Limits {
            queue: self.queue_limit,
            rejoin_grace: self.rejoin_grace,
            capacity: Capacity {
                ahead: self.worker_ahead,
                plain: self.dcf.legacy_concurrency.max(1),
            },
        }
    }

    /// Settings for the core that forms and keeps rings.
    pub fn ring_settings(&self) -> rings::Settings {
        let ring = &self.ring;
        rings::Settings {
            enabled: ring.enabled,
            objective: ring.objective,
            stages: (ring.stages > 0).then_some(ring.stages),
            standbys: ring.standbys,
            slots: ring.slots,
            context: ring.context,
            half_rows: ring.half_rows,
            margin: ring.margin,
            gather: ring.gather,
            suspect_pause: ring.suspect_pause,
            always: ring.always,
            retire_limit: self.request_timeout,
            ..rings::Settings::default()
        }
    }

    /// Limits on the answers that are kept for repeats.
    pub fn dedup_limits(&self) -> dedup::Limits {
        dedup::Limits {
            answers: self.dcf.answers_kept,
            bytes: usize::try_from(self.dcf.answers_kept_bytes).unwrap_or(usize::MAX),
            age: self.dcf.answers_kept_for,
        }
    }

    /// True if a worker without an identity may register from there. Serving a network's clients does not
    /// admit its workers.
    pub fn admits_without_identity(&self, source: IpAddr) -> bool {
        self.dcf.legacy_workers && is_near(source, &self.dcf.legacy_worker_networks)
    }

    /// True if plain DCF clients there are served without proof that they are there. A loopback address
    /// cannot be forged from elsewhere: the system drops such datagrams.
    pub fn knows(&self, source: IpAddr) -> bool {
        self.trusts(source) && is_near(source, &self.unverified_networks)
    }

    /// True if plain DCF clients there are served, once they have shown that they are there.
    pub fn trusts(&self, source: IpAddr) -> bool {
        is_near(source, &self.trusted_networks)
    }
}

/// True if an address is this machine's own, or in one of these networks.
fn is_near(source: IpAddr, networks: &[Network]) -> bool {
    let source = source.to_canonical();
    source.is_loopback() || networks.iter().any(|network| network.contains(source))
}

/// Keys that are valid one by one and make no sense together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unsound {
    /// The policy on evidence.
    #[error(transparent)]
    Evidence(#[from] EvidenceFault),
    /// Anyone could use the mesh.
    #[error(
        "http.listen = \"{0}\" is reachable from other machines, and there are no API keys: set http.api_keys_file, \
         http.require_key = true if clients are to use curtain tokens (`hydramesh keys create`), or \
         http.allow_unauthenticated = true if everyone who can reach it may use the mesh"
    )]
    OpenToAll(SocketAddr),
    /// A zero where that means never or always.
    #[error("{0} must be greater than 0")]
    Zero(&'static str),
    /// Networks of workers that are not admitted at all.
    #[error(
        "dcf.legacy_worker_networks names networks, and dcf.legacy_workers is false: set dcf.legacy_workers = true to admit \
         workers of DCF v5.0.0 and v5.1, which cannot prove who they are, or leave the networks out"
    )]
    LegacyWorkersOff,
    /// `request_memory` is too small for the longest body, which would always be refused.
    #[error(
        "request_memory = {memory} is less than three times http.body_limit = {body}: raise it to {} or more, lower \
         http.body_limit, or set it to 0 for no limit",
        body.saturating_mul(3)
    )]
    RequestMemory {
        /// Memory for requests, in bytes.
        memory: u64,
        /// Longest body, in bytes.
        body: u64,
    },
    /// No part of anything.
    #[error("ring.margin = {0}: it must be at least 0 and less than 1, such as 0.15")]
    Margin(String),
}

/// Bytes of memory for requests, unless bodies may be longer than usual.
const REQUEST_MEMORY: u64 = 24 << 20;

#[cfg(test)]
mod tests {
    use mesh_service::config::{Loaded, Loader};

    use super::*;

    fn load(toml: &str) -> Loaded<Config> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), toml).unwrap();
        let loader = Loader::new("head").file(file.path());
        loader.environment::<&str, &str>([]).load().unwrap()
    }

    fn parse(toml: &str) -> Config {
        load(toml).value
    }

    #[test]
    fn the_longest_body_fits_what_one_client_may_have() {
        let mut config = Config::default();
        config.http.body_limit = 32 << 20;
        assert_eq!(config.check(), Ok(()));
        assert_eq!(config.memory_of_requests(), 96 << 20);
        config.request_memory = 95 << 20;
        let error = config.check().unwrap_err().to_string();
        assert!(error.contains("request_memory") && error.contains("http.body_limit"));
        config.request_memory = 0;
        assert_eq!(config.check(), Ok(()));
        config.request_memory = 96 << 20;
        assert_eq!(config.check(), Ok(()));
    }

    #[test]
    fn the_defaults_are_sound_and_survive_printing() {
        assert_eq!(Config::default().check(), Ok(()));
        let printed = load("").to_toml().unwrap();
        assert_eq!(load(&printed).to_toml().unwrap(), printed);
    }

    #[test]
    fn listening_beyond_loopback_wants_keys_or_an_explicit_no() {
        let open = parse("[http]\nlisten = \"0.0.0.0:8080\"");
        assert!(matches!(open.check(), Err(Unsound::OpenToAll(_))));
        let said = parse("[http]\nlisten = \"0.0.0.0:8080\"\nallow_unauthenticated = true");
        assert_eq!(said.check(), Ok(()));
        let keyed = parse("[http]\nlisten = \"0.0.0.0:8080\"\napi_keys_file = \"/etc/keys\"");
        assert_eq!(keyed.check(), Ok(()));
    }

    #[test]
    fn only_loopback_and_named_networks_are_trusted() {
        let config = parse("trusted_networks = [\"10.0.0.0/8\"]");
        for (address, trusted) in [
            ("127.0.0.1", true),
            ("::1", true),
            ("::ffff:127.0.0.1", true),
            ("10.9.8.7", true),
            ("11.0.0.1", false),
        ] {
            assert_eq!(
                config.trusts(address.parse().unwrap()),
                trusted,
                "{address}"
            );
        }
    }

    #[test]
    fn old_workers_are_admitted_by_their_own_switch_alone() {
        let admits = |toml: &str| {
            let config = parse(toml);
            ["127.0.0.1", "::ffff:10.9.8.7", "192.168.1.7"]
                .map(|address| config.admits_without_identity(address.parse().unwrap()))
        };
        assert_eq!(admits("trusted_networks = [\"0.0.0.0/0\"]"), [false; 3]);
        let on = "[dcf]\nlegacy_workers = true";
        assert_eq!(admits(on), [true, false, false]);
        let trusted = format!("trusted_networks = [\"0.0.0.0/0\"]\n{on}");
        assert_eq!(admits(&trusted), [true, false, false]);
        let networks = format!("{on}\nlegacy_worker_networks = [\"10.0.0.0/8\"]");
        assert_eq!(admits(&networks), [true, true, false]);
        let off = parse("[dcf]\nlegacy_worker_networks = [\"10.0.0.0/8\"]");
        assert_eq!(off.check(), Err(Unsound::LegacyWorkersOff));
    }

    #[test]
    fn rings_are_configured_by_their_own_keys() {
        let config = parse("[ring]\nobjective = \"throughput\"\nstages = 3\ngather = \"500ms\"");
        let settings = config.ring_settings();
        assert_eq!(settings.objective, arcanum_profiler::Objective::Throughput);
        assert_eq!(
            (settings.stages, settings.gather),
            (Some(3), Duration::from_millis(500))
        );
        assert_eq!(parse("").ring_settings().stages, None);
        for margin in ["1.0", "-0.1", "nan"] {
            let config = parse(&format!("[ring]\nmargin = {margin}"));
            assert!(
                matches!(config.check(), Err(Unsound::Margin(_))),
                "{margin}"
            );
        }
    }

    #[test]
    fn durations_of_zero_are_named() {
        assert_eq!(
            parse("request_timeout = 0").check(),
            Err(Unsound::Zero("request_timeout"))
        );
    }
}
