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
mod tree;
pub mod units;

use std::ffi::OsString;
use std::fmt::Display;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use error::ConfigError;
pub use tree::Origin;
use tree::Tree;
pub(crate) use tree::join;

use crate::telemetry::LogFormat;

/// Directory of the files that are read when no `--config` is given.
pub const DEFAULT_DIRECTORY: &str = "/etc/hydramesh";

/// Flags that every service has; flatten it into the service's own `clap` struct.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct CommonArgs {
    /// Configuration file [default: /etc/hydramesh/<service>.toml, when it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Directory for what the service keeps between runs: keys, certificates, bound addresses
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,

    /// Set one configuration key, for example --set http.listen=127.0.0.1:9000 (may be repeated)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,

    /// What to log: a level (error, warn, info, debug, trace) or a filter such as info,mesh_net=debug
    /// [default: RUST_LOG, else info]
    #[arg(long, value_name = "FILTER")]
    pub log_level: Option<String>,

    /// How to log; auto is the journal when it is our stderr, else text
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub log_format: LogFormat,

    /// Check the configuration and exit: 0 when it is good
    #[arg(long)]
    pub check_config: bool,

    /// Print the configuration in effect, secrets redacted, and exit
    #[arg(long)]
    pub print_config: bool,
}

/// Builds a `T` from its layers.
#[derive(Debug)]
pub struct Loader<T> {
    service: String,
    file: Option<PathBuf>,
    default_file: PathBuf,
    named: Vec<(&'static str, &'static str)>,
    environment: Option<Vec<(OsString, OsString)>>,
    flags: Vec<(String, String, String)>,
    malformed: Option<String>,
    secrets: Vec<&'static str>,
    config: PhantomData<fn() -> T>,
}

impl<T: Default + Serialize + DeserializeOwned> Loader<T> {
    /// A loader for the service that is called `service` in file and environment names: `head`, `worker`, `shim`.
    pub fn new(service: &str) -> Self {
        Self {
            service: service.to_owned(),
            file: None,
            default_file: Path::new(DEFAULT_DIRECTORY).join(format!("{service}.toml")),
            named: Vec::new(),
            environment: None,
            flags: Vec::new(),
            malformed: None,
            secrets: Vec::new(),
            config: PhantomData,
        }
    }

    /// Maps an environment variable with a name of its own (`DCF_CLIENT_PORT`) to a key.
    #[must_use]
    pub fn env(mut self, variable: &'static str, key: &'static str) -> Self {
        self.named.push((variable, key));
        self
    }

    /// Takes `--config`, `--state-dir` and `--set` from the common flags.
    #[must_use]
    pub fn common(mut self, args: &CommonArgs) -> Self {
        self.file = args.config.clone().or(self.file);
        for assignment in &args.set {
            match assignment.split_once('=') {
                Some((key, value)) => {
                    self.flags
                        .push(("--set".into(), key.trim().into(), value.trim().into()))
                }
                None => self.malformed = Some(assignment.clone()),
            }
        }
        let state_dir = args.state_dir.as_ref().map(|dir| dir.display());
        self.flag("--state-dir", "state_dir", state_dir)
    }

    /// Sets `key` from a flag of the service's own, if the flag was given. Later flags win.
    #[must_use]
    pub fn flag(mut self, flag: &str, key: &str, value: Option<impl Display>) -> Self {
        if let Some(value) = value {
            self.flags
                .push((flag.to_owned(), key.to_owned(), value.to_string()));
        }
        self
    }

    /// Redacts `key` in `--print-config`, besides the keys whose names say that they are secret.
    #[must_use]
    pub fn secret(mut self, key: &'static str) -> Self {
        self.secrets.push(key);
        self
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
        self.environment = Some(
            variables
                .into_iter()
                .map(|(k, v)| (k.into(), v.into()))
                .collect(),
        );
        self
    }

    /// Merges the layers and checks them against `T`.
    pub fn load(self) -> Result<Loaded<T>, ConfigError> {
        if let Some(assignment) = self.malformed {
            return Err(ConfigError::Assignment { assignment });
        }
        let mut tree = Tree::default();
        let file = match self.file {
            Some(path) => Some(path),
            None => Some(self.default_file).filter(|path| path.exists()),
        };
        if let Some(path) = &file {
            tree = Tree::read(path)?;
        }
        let variables = self
            .environment
            .unwrap_or_else(|| std::env::vars_os().collect());
        tree.merge_environment(&self.service, &self.named, variables)?;
        for (flag, key, value) in self.flags {
            tree.set(&key, value, Origin::Flag(flag))?;
        }
        let value: T = de::from_tree(&tree).map_err(|error| error.explain(&known_keys::<T>()))?;
        Ok(Loaded {
            value,
            file,
            secrets: self.secrets,
        })
    }
}

/// A checked configuration.
#[derive(Clone, Debug)]
pub struct Loaded<T> {
    /// The configuration.
    pub value: T,
    /// The file that was read.
    pub file: Option<PathBuf>,
    secrets: Vec<&'static str>,
}

impl<T: Serialize> Loaded<T> {
    /// The configuration as TOML that can be put in a file, secrets replaced.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        let mut table =
            toml::Table::try_from(&self.value).map_err(|error| ConfigError::Unprintable {
                reason: error.to_string(),
            })?;
        redact(&mut table, "", &self.secrets);
        toml::to_string_pretty(&table).map_err(|error| ConfigError::Unprintable {
            reason: error.to_string(),
        })
    }

    /// Does what `--check-config` and `--print-config` ask for; true means that the service shall exit.
    pub fn report(&self, args: &CommonArgs) -> Result<bool, ConfigError> {
        if args.print_config {
            print!("{}", self.to_toml()?);
        }
        if args.check_config {
            let source = self
                .file
                .as_ref()
                .map_or("no file".into(), |path| path.display().to_string());
            eprintln!("configuration is good ({source}, environment and flags)");
        }
        Ok(args.print_config || args.check_config)
    }
}

/// Every dotted path of the default configuration, to suggest from.
fn known_keys<T: Default + Serialize>() -> Vec<String> {
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
    if let Ok(table) = toml::Table::try_from(T::default()) {
        collect(&table, "", &mut keys);
    }
    keys
}

/// Replaces secrets; one that is not set stays visibly empty.
fn redact(table: &mut toml::Table, prefix: &str, secrets: &[&str]) {
    for (name, value) in table.iter_mut() {
        let key = tree::join(prefix, name);
        let is_secret = secrets.contains(&key.as_str()) || SECRET_NAMES.contains(&name.as_str());
        match value {
            toml::Value::String(text) if text.is_empty() => {}
            _ if is_secret => *value = toml::Value::String("<redacted>".into()),
            toml::Value::Table(inner) => redact(inner, &key, secrets),
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
