//! The merged layers before they become a typed value: every leaf knows where it was set.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::ConfigError;

/// Where a value was set.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// Nowhere: the default.
    Default,
    /// A line of a file.
    File {
        /// The file.
        path: Arc<PathBuf>,
        /// Line, from 1.
        line: usize,
    },
    /// An environment variable.
    Environment(String),
    /// A flag.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{}, line {line}", path.display()),
            Self::Environment(variable) => write!(f, "environment variable {variable}"),
            Self::Flag(flag) => write!(f, "flag {flag}"),
        }
    }
}

/// A value and where it was set.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) origin: Origin,
    pub(super) kind: Kind,
}

/// A value in the form it was given.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    Table(BTreeMap<String, Node>),
    Array(Vec<Node>),
    /// A TOML scalar.
    Scalar(toml::Value),
    /// Text from the environment or a flag, to be read as whatever its key asks for.
    Text(String),
}

/// All layers, merged.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    pub(super) root: Node,
}

impl Default for Tree {
    fn default() -> Self {
        Self {
            root: Node {
                origin: Origin::Default,
                kind: Kind::Table(BTreeMap::new()),
            },
        }
    }
}

impl Tree {
    pub(super) fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        let table = DeTable::parse(&text).map_err(|error| ConfigError::Syntax {
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
        let path = Arc::new(path.to_owned());
        let origin = |at: usize| Origin::File {
            path: path.clone(),
            line: 1 + text
                .as_bytes()
                .iter()
                .take(at)
                .filter(|&&byte| byte == b'\n')
                .count(),
        };
        Ok(Self {
            root: Node {
                origin: origin(0),
                kind: table_node(table.get_ref(), &origin),
            },
        })
    }

    /// Puts the variables that are meant for this service over the file's values.
    pub(super) fn merge_environment(
        &mut self,
        service: &str,
        named: &[(&str, &str)],
        variables: Vec<(OsString, OsString)>,
    ) -> Result<(), ConfigError> {
        let prefix = format!("HYDRAMESH_{}__", service.to_uppercase().replace('-', "_"));
        let mut generic = Vec::new();
        for (variable, value) in variables {
            let Some(variable) = variable.to_str() else {
                continue;
            };
            let generic_key = variable
                .strip_prefix(&prefix)
                .map(|rest| rest.to_lowercase().replace("__", "."));
            let named_key = named
                .iter()
                .find(|(name, _)| *name == variable)
                .map(|(_, key)| *key);
            if generic_key.is_none() && named_key.is_none() {
                continue;
            }
            let value = value.into_string().map_err(|_| ConfigError::NotUtf8 {
                variable: variable.to_owned(),
            })?;
            // An empty variable is how unit files and compose files spell "not set".
            if value.is_empty() {
                continue;
            }
            let origin = Origin::Environment(variable.to_owned());
            match (generic_key, named_key) {
                // The generic name is the more specific one, so it is applied last.
                (Some(key), _) => generic.push((key, value, origin)),
                (None, Some(key)) => self.set(key, value, origin)?,
                (None, None) => {}
            }
        }
        generic
            .into_iter()
            .try_for_each(|(key, value, origin)| self.set(&key, value, origin))
    }

    /// Sets a dotted key, over whatever was there.
    pub(super) fn set(
        &mut self,
        key: &str,
        value: String,
        origin: Origin,
    ) -> Result<(), ConfigError> {
        let mut node = &mut self.root;
        for segment in key.split('.') {
            if segment.is_empty() {
                let reason = "a key is a dotted path such as http.listen".to_owned();
                return Err(ConfigError::Value {
                    key: key.to_owned(),
                    origin,
                    reason,
                });
            }
            if !matches!(node.kind, Kind::Table(_)) {
                *node = Node {
                    origin: origin.clone(),
                    kind: Kind::Table(BTreeMap::new()),
                };
            }
            let Kind::Table(table) = &mut node.kind else {
                unreachable!("made a table above")
            };
            node = table.entry(segment.to_owned()).or_insert_with(|| Node {
                origin: origin.clone(),
                kind: Kind::Table(BTreeMap::new()),
            });
        }
        *node = Node {
            origin,
            kind: Kind::Text(value),
        };
        Ok(())
    }
}

/// `prefix.name`, or `name` at the root.
pub(crate) fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() {
        name.to_owned()
    } else {
        format!("{prefix}.{name}")
    }
}

/// Reads text as a TOML value: how lists and tables are given in one variable or flag.
pub(super) fn parse_inline(text: &str, origin: &Origin) -> Result<Node, String> {
    let value = DeValue::parse(text).map_err(|error| error.message().to_owned())?;
    Ok(node(&value, &|_| origin.clone()))
}

fn node(value: &Spanned<DeValue<'_>>, origin: &dyn Fn(usize) -> Origin) -> Node {
    let kind = match value.get_ref() {
        DeValue::Table(table) => table_node(table, origin),
        DeValue::Array(array) => Kind::Array(array.iter().map(|item| node(item, origin)).collect()),
        DeValue::String(text) => Kind::Scalar(toml::Value::String(text.to_string())),
        DeValue::Boolean(value) => Kind::Scalar(toml::Value::Boolean(*value)),
        DeValue::Datetime(value) => Kind::Scalar(toml::Value::Datetime(*value)),
        DeValue::Integer(value) => {
            let digits = value.as_str().replace('_', "");
            match i64::from_str_radix(&digits, value.radix()) {
                Ok(integer) => Kind::Scalar(toml::Value::Integer(integer)),
                // Beyond 64 bits: keep the text, the typed layer names the key when it refuses it.
                Err(_) => Kind::Text(digits),
            }
        }
        DeValue::Float(value) => match value.as_str().replace('_', "").parse() {
            Ok(float) => Kind::Scalar(toml::Value::Float(float)),
            Err(_) => Kind::Text(value.as_str().to_owned()),
        },
    };
    Node {
        origin: origin(value.span().start),
        kind,
    }
}

fn table_node(table: &DeTable<'_>, origin: &dyn Fn(usize) -> Origin) -> Kind {
    let entry = |(key, value): (&Spanned<std::borrow::Cow<'_, str>>, _)| {
        let mut child = node(value, origin);
        child.origin = origin(key.span().start);
        (key.get_ref().to_string(), child)
    };
    Kind::Table(table.iter().map(entry).collect())
}
