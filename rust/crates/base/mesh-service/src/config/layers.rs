//! The layers on their way into one tree, with the names that a key has besides its own.

use std::ffi::OsString;
use std::path::Path;

use super::ConfigError;
use super::tree::{Tree, ValueOrigin};

/// Behind the name of a key with an address: its port.
const PORT: &str = ":port";

/// Merges layers; each overrides those before it.
#[derive(Debug)]
pub(super) struct Layers<'a> {
    pub(super) tree: Tree,
    pub(super) defaults: &'a toml::Table,
    /// Old names of keys and tables, each with the new one.
    pub(super) renamed: &'a [(&'static str, &'static str)],
    /// Old names that were used.
    pub(super) warnings: Vec<String>,
}

impl Layers<'_> {
    /// The first layer: a file. A key that it sets by its old and its new name has the value of the new one.
    pub(super) fn file(&mut self, path: &Path) -> Result<(), ConfigError> {
        self.tree = Tree::read(path)?;
        for (old, new) in self.renamed {
            let Some(node) = self.tree.take(old) else {
                continue;
            };
            if new.ends_with(PORT) {
                let port = node.text().ok_or_else(|| ConfigError::Value {
                    key: (*old).to_owned(),
                    origin: node.origin.clone(),
                    reason: "expected a port".to_owned(),
                })?;
                self.set(old, port, node.origin)?;
            } else {
                self.warn(old, new, &node.origin);
                self.tree.fill(new, node)?;
            }
        }
        Ok(())
    }

    /// Merges the environment variables of this service. A variable of a key takes precedence over one of a
    /// table around it. For one key, `HYDRAMESH_<SERVICE>__<KEY>` takes precedence over a variable with a name
    /// of its own, except that a port is merged into the address.
    pub(super) fn environment(
        &mut self,
        service: &str,
        named: &[(&str, &str)],
        variables: Vec<(OsString, OsString)>,
    ) -> Result<(), ConfigError> {
        let prefix = format!("HYDRAMESH_{}__", service.to_uppercase().replace('-', "_"));
        let mut found = Vec::new();
        for (variable, value) in variables {
            let Some(variable) = variable.to_str() else {
                continue;
            };
            let by_name = named.iter().find(|(name, _)| *name == variable);
            let key = match (variable.strip_prefix(&prefix), by_name) {
                (Some(rest), _) => rest.to_lowercase().replace("__", "."),
                (None, Some((_, key))) => (*key).to_owned(),
                (None, None) => continue,
            };
            let not_utf8 = |_| ConfigError::NotUtf8(variable.to_owned());
            let value = value.into_string().map_err(not_utf8)?;
            // An empty variable is how unit files and compose files spell "not set".
            if !value.is_empty() {
                // Tables before keys in them, and old names before new ones, so that the latter win.
                let renamed = self.renamed(&key);
                let effective = renamed.as_ref().unwrap_or(&key);
                let depth = effective.matches('.').count();
                let is_port = effective.ends_with(PORT);
                let rank = (depth, is_port, by_name.is_none(), renamed.is_none());
                found.push((rank, key, value, variable.to_owned()));
            }
        }
        found.sort_by_key(|(rank, ..)| *rank);
        found.into_iter().try_for_each(|(_, key, value, variable)| {
            self.set(&key, value, ValueOrigin::Environment(variable))
        })
    }

    /// Sets one key, by its own name or an old one, or the port of one.
    pub(super) fn set(
        &mut self,
        key: &str,
        value: String,
        origin: ValueOrigin,
    ) -> Result<(), ConfigError> {
        let renamed = self.renamed(key);
        if let Some(new) = &renamed {
            self.warn(key, new, &origin);
        }
        let key = renamed.as_deref().unwrap_or(key);
        let Some(key) = key.strip_suffix(PORT) else {
            return self.tree.set(key, value, origin);
        };
        // Empty is "not set", as in variables.
        if value.is_empty() {
            return Ok(());
        }
        let set = self.tree.node(key).and_then(|node| node.text());
        let default = || {
            let mut names = key.split('.');
            let first = self.defaults.get(names.next()?)?;
            let value = names.try_fold(first, |value, name| value.get(name))?;
            value.as_str().map(str::to_owned)
        };
        let address = set.or_else(default).unwrap_or_default();
        let host = address.rsplit_once(':').map_or("", |(host, _)| host);
        // As text: a port that is not valid is refused with its origin.
        self.tree
            .set(key, format!("{host}:{}", value.trim()), origin)
    }

    /// The current name of `key`, if it is an old name or is in a table with an old name.
    fn renamed(&self, key: &str) -> Option<String> {
        self.renamed.iter().find_map(|(old, new)| {
            let rest = key.strip_prefix(old)?;
            let is_it = rest.is_empty() || rest.starts_with('.');
            is_it.then(|| format!("{new}{rest}"))
        })
    }

    fn warn(&mut self, old: &str, new: &str, origin: &ValueOrigin) {
        let remedy = match new.strip_suffix(PORT) {
            None => format!("use `{new}`"),
            Some(address) => format!("set the port in `{address}`"),
        };
        let warning = format!("`{old}` ({origin}) is an old name: {remedy}");
        self.warnings.push(warning);
    }
}
