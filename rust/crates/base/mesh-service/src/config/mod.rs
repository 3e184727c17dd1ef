//! Layered configuration: defaults < TOML file < environment < flags.
//!
//! A service has one configuration type `T: Default + Serialize + Deserialize` with `#[serde(default,
//! deny_unknown_fields)]` on every struct; its `Default` is the first layer. Keys are dotted paths (`http.listen`).
//! Text from the environment and from flags is read as the type its key has, so `8080`, `true` and `a,b` need no
//! quotes. A key that does not exist is an error that names the key, where it came from, and the nearest one that
//! does; nothing is ignored silently.
//!
//! ```
//! use mesh_service::config::Loader;
//!
//! #[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
//! #[serde(default, deny_unknown_fields)]
//! struct Config { workers: u16, name: Option<String> }
//!
//! let loaded = Loader::<Config>::new("demo")
//!     .environment([("HYDRAMESH_DEMO__WORKERS", "3")])
//!     .flag("--name", "name", Some("attic"))
//!     .load()?;
//! assert_eq!(loaded.value.workers, 3);
//! # Ok::<(), mesh_service::config::ConfigError>(())
//! ```

mod de;
mod error;
mod gossip;
mod layers;
mod tree;
pub mod units;

use std::ffi::OsString;
use std::fmt::Display;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use error::ConfigError;
pub use gossip::GossipConfig;
use layers::Layers;
use tree::Tree;
pub use tree::ValueOrigin;
pub(crate) use tree::join;

use crate::telemetry::LogFormat;

/// Directory of the files that are read when no `--config` is given.
pub const DEFAULT_DIRECTORY: &str = "/etc/hydramesh";

/// Flags that every service has; flatten it into the service's own `clap` struct.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct CommonArgs {
    /// Configuration file [default: /etc/hydramesh/<service>.toml, when it exists]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Directory for what the service keeps between runs: keys, certificates, bound addresses
    #[arg(long, global = true, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,

    /// Set one configuration key, for example --set http.listen=127.0.0.1:9000 (may be repeated)
    // `service` adds it to subcommands.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,

    /// Where to serve HTTP: /health, /ready, /metrics, and the API of a head [default: 127.0.0.1, port 8080 at the head and 8081 at
    /// the worker; nowhere at the shim]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub http: Option<SocketAddr>,

    /// What to log: a level (error, warn, info, debug, trace) or a filter such as info,mesh_net=debug
    /// [default: RUST_LOG, else `log_level` of the configuration, else info]
    #[arg(long, value_name = "FILTER")]
    pub log_level: Option<String>,

    /// How to log; auto is the journal when it is our stderr, else text
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub log_format: LogFormat,

    /// Check the configuration and exit: 0 when it is good
    #[arg(long)]
    pub check_config: bool,

    /// Print the configuration in effect, secrets redacted, then check it and exit: 0 when it is good
    #[arg(long)]
    pub print_config: bool,
}

/// Builds a `T` from its layers.
#[derive(Debug, Default)]
pub struct Loader<T> {
    service: String,
    file: Option<PathBuf>,
    default_file: PathBuf,
    named: Vec<(&'static str, &'static str)>,
    renamed: Vec<(&'static str, &'static str)>,
    environment: Option<Vec<(OsString, OsString)>>,
    flags: Vec<(String, String, String)>,
    warnings: Vec<String>,
    malformed: Option<String>,
    config: PhantomData<fn() -> T>,
}

impl<T: Default + Serialize + DeserializeOwned> Loader<T> {
    /// A loader for the service that is called `service` in file and environment names: `head`, `worker`, `shim`.
    pub fn new(service: &str) -> Self {
        Self {
            service: service.to_owned(),
            default_file: Path::new(DEFAULT_DIRECTORY).join(format!("{service}.toml")),
            ..Self::default()
        }
    }

    /// Maps an environment variable with a name of its own (`DCF_CLIENT_PORT`) to a key, or, as `http.listen:port`, to the port of the
    /// address that is set otherwise.
    #[must_use]
    pub fn env(mut self, variable: &'static str, key: &'static str) -> Self {
        self.named.push((variable, key));
        self
    }

    /// Accepts `old` as a name of the key or table `new`, or of a port as in [`env`](Self::env), with a warning.
    #[must_use]
    pub fn renamed(mut self, old: &'static str, new: &'static str) -> Self {
        self.renamed.push((old, new));
        self
    }

    /// Takes `--config`, `--state-dir`, `--http` and `--set` from the common flags.
    #[must_use]
    pub fn common(mut self, args: &CommonArgs) -> Self {
        self.file = args.config.clone().or(self.file);
        for assignment in &args.set {
            match assignment.split_once('=') {
                Some((key, value)) => self = self.flag("--set", key.trim(), Some(value.trim())),
                None => self.malformed = Some(assignment.clone()),
            }
        }
        let state_dir = args.state_dir.as_ref().map(|dir| dir.display());
        self.flag("--state-dir", "state_dir", state_dir)
            .flag("--http", "http.listen", args.http)
    }

    /// Sets `key` from a flag of the service's own, if the flag was given. Later flags win.
    #[must_use]
    pub fn flag(mut self, flag: &str, key: &str, value: Option<impl Display>) -> Self {
        if let Some(value) = value {
            let flag = (flag.to_owned(), key.to_owned(), value.to_string());
            self.flags.push(flag);
        }
        self
    }

    /// As [`flag`](Self::flag), for the old name of a flag that is now called `new`: with a warning.
    #[must_use]
    pub fn old_flag(
        mut self,
        old: &str,
        new: &str,
        key: &str,
        value: Option<impl Display>,
    ) -> Self {
        if value.is_some() {
            self.warnings
                .push(format!("{old} is an old name: use {new}"));
        }
        self.flag(old, key, value)
    }

    /// Reads this file, which must exist, instead of the default one.
    #[must_use]
    pub fn file(mut self, path: impl Into<PathBuf>) -> Self {
        self.file = Some(path.into());
        self
    }

    /// Reads these variables instead of the process's own.
    #[must_use]
    pub fn environment<K: Into<OsString>, V: Into<OsString>>(
        mut self,
        variables: impl IntoIterator<Item = (K, V)>,
    ) -> Self {
        let variables = variables.into_iter();
        self.environment = Some(variables.map(|(k, v)| (k.into(), v.into())).collect());
        self
    }

    /// Merges the layers and checks them against `T`.
    pub fn load(self) -> Result<Loaded<T>, ConfigError> {
        if let Some(assignment) = self.malformed {
            return Err(ConfigError::Assignment(assignment));
        }
        let file = match self.file {
            Some(path) => Some(path),
            None => Some(self.default_file).filter(|path| path.exists()),
        };
        let defaults = toml::Table::try_from(T::default()).unwrap_or_default();
        let mut layers = Layers {
            tree: Tree::default(),
            defaults: &defaults,
            renamed: &self.renamed,
            warnings: self.warnings,
        };
        if let Some(path) = &file {
            layers.file(path)?;
        }
        let own = || std::env::vars_os().collect();
        let variables = self.environment.unwrap_or_else(own);
        layers.environment(&self.service, &self.named, variables)?;
        for (flag, key, value) in self.flags {
            layers.set(&key, value, ValueOrigin::Flag(flag))?;
        }
        let value: T =
            de::from_tree(&layers.tree).map_err(|error| error.explain(&known_keys(&defaults)))?;
        Ok(Loaded {
            value,
            file,
            warnings: layers.warnings,
        })
    }
}

/// A checked configuration and the origin of its values.
#[derive(Clone, Debug)]
pub struct Loaded<T> {
    /// The merged and checked configuration.
    pub value: T,
    /// The file that was read; `None` without a file.
    pub file: Option<PathBuf>,
    /// One warning for each old name that was used, with its replacement.
    pub warnings: Vec<String>,
}

impl<T: Serialize> Loaded<T> {
    /// The configuration as TOML that can be put in a file, secrets replaced.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        let mut table = table(&self.value)?;
        redact(&mut table);
        Ok(toml::to_string_pretty(&table)?)
    }
}

/// A configuration as TOML.
pub(crate) fn table(config: &impl Serialize) -> Result<toml::Table, ConfigError> {
    Ok(toml::Table::try_from(config)?)
}

/// Every dotted path of the default configuration, to suggest from.
fn known_keys(defaults: &toml::Table) -> Vec<String> {
    fn collect(table: &toml::Table, prefix: &str, keys: &mut Vec<String>) {
        for (name, value) in table {
            let key = tree::join(prefix, name);
            if let toml::Value::Table(inner) = value {
                collect(inner, &key, keys);
            }
            keys.push(key);
        }
    }
    let mut keys = Vec::new();
    collect(defaults, "", &mut keys);
    keys
}

/// Replaces secrets; one that is not set stays visibly empty.
fn redact(table: &mut toml::Table) {
    for (name, value) in table.iter_mut() {
        match value {
            toml::Value::String(text) if text.is_empty() => {}
            _ if SECRET_NAMES.contains(&name.as_str()) => {
                *value = toml::Value::String("<redacted>".into());
            }
            toml::Value::Table(inner) => redact(inner),
            _ => {}
        }
    }
}

/// Names of keys that hold secrets wherever they stand.
const SECRET_NAMES: &[&str] = &[
    "token",
    "join_token",
    "hf_token",
    "secret",
    "password",
    "api_key",
    "api_keys",
    "admin_key",
];

#[cfg(test)]
mod tests;
