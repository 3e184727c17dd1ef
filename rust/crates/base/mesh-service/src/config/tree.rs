//! The merged layers before they become a typed value: every leaf knows where it was set.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::ConfigError;

/// The layer that set a value.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ValueOrigin {
    /// The built-in default; no layer set the value.
    Default,
    /// A line of a file.
    File {
        /// Path of the file.
        path: Arc<PathBuf>,
        /// Line number, from 1.
        line: usize,
    },
    /// An environment variable, by name.
    Environment(String),
    /// A command-line flag, by name.
    Flag(String),
}

impl fmt::Display for ValueOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{}, line {line}", path.display()),
            Self::Environment(variable) => write!(f, "environment variable {variable}"),
            Self::Flag(flag) => write!(f, "flag {flag}"),
        }
    }
}

/// A value and its origin.
#[derive(Clone, Debug)]
pub(super) struct TreeNode {
    pub(super) origin: ValueOrigin,
    pub(super) kind: NodeValue,
}

/// A value in the form it was given.
#[derive(Clone, Debug)]
pub(super) enum NodeValue {
    Table(BTreeMap<String, TreeNode>),
    Array(Vec<TreeNode>),
    /// A TOML value that is neither an array nor a table.
    Scalar(toml::Value),
    /// Text from the environment or a flag, to be parsed as the key's type.
    Text(String),
}

/// The merged layers of a configuration.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    pub(super) root: TreeNode,
}

impl Default for Tree {
    fn default() -> Self {
        Self {
            root: TreeNode::empty(&ValueOrigin::Default),
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
        let origin = |at: usize| {
            let before = text.bytes().take(at);
            ValueOrigin::File {
                path: path.clone(),
                line: 1 + before.filter(|byte| *byte == b'\n').count(),
            }
        };
        let root = TreeNode {
            origin: origin(0),
            kind: table_node(table.get_ref(), &origin),
        };
        Ok(Self { root })
    }

    /// Sets a dotted key and replaces its earlier value.
    pub(super) fn set(
        &mut self,
        key: &str,
        value: String,
        origin: ValueOrigin,
    ) -> Result<(), ConfigError> {
        let entry = self.entry(key, &origin)?;
        entry.kind = NodeValue::Text(value);
        entry.origin = origin;
        Ok(())
    }

    /// Puts a node at a dotted key, except the values that are set there.
    pub(super) fn fill(&mut self, key: &str, node: TreeNode) -> Result<(), ConfigError> {
        self.entry(key, &node.origin)?.fill(node);
        Ok(())
    }

    /// Removes a key and returns its node.
    pub(super) fn take(&mut self, key: &str) -> Option<TreeNode> {
        let (parents, name) = key.rsplit_once('.').unwrap_or(("", key));
        self.node(parents)?.table()?.remove(name)
    }

    /// The node of a key; of an empty one it is the root.
    pub(super) fn node(&mut self, key: &str) -> Option<&mut TreeNode> {
        let mut names = key.split('.').filter(|name| !name.is_empty());
        names.try_fold(&mut self.root, |node, name| node.table()?.get_mut(name))
    }

    /// Like [`node`](Self::node), but creates an empty table if the key is missing.
    fn entry(&mut self, key: &str, origin: &ValueOrigin) -> Result<&mut TreeNode, ConfigError> {
        let mut node = &mut self.root;
        for segment in key.split('.') {
            if segment.is_empty() {
                return Err(ConfigError::Value {
                    key: key.to_owned(),
                    origin: origin.clone(),
                    reason: "a key is a dotted path such as http.listen".to_owned(),
                });
            }
            if node.table().is_none() {
                *node = node
                    .inline_table()
                    .unwrap_or_else(|| TreeNode::empty(origin));
            }
            let NodeValue::Table(table) = &mut node.kind else {
                unreachable!("made a table above")
            };
            let entry = table.entry(segment.to_owned());
            node = entry.or_insert_with(|| TreeNode::empty(origin));
        }
        Ok(node)
    }
}

impl TreeNode {
    fn empty(origin: &ValueOrigin) -> Self {
        Self {
            origin: origin.clone(),
            kind: NodeValue::Table(BTreeMap::new()),
        }
    }

    fn table(&mut self) -> Option<&mut BTreeMap<String, TreeNode>> {
        match &mut self.kind {
            NodeValue::Table(table) => Some(table),
            _ => None,
        }
    }

    /// The table that the value is as text: a variable or flag may give a whole table.
    fn inline_table(&self) -> Option<TreeNode> {
        let NodeValue::Text(text) = &self.kind else {
            return None;
        };
        let node = parse_inline(text.trim(), &self.origin).ok()?;
        matches!(node.kind, NodeValue::Table(_)).then_some(node)
    }

    /// The value as text, if it has one.
    pub(super) fn text(&self) -> Option<String> {
        match &self.kind {
            NodeValue::Text(text) | NodeValue::Scalar(toml::Value::String(text)) => {
                Some(text.clone())
            }
            NodeValue::Scalar(value) => Some(value.to_string()),
            NodeValue::Table(_) | NodeValue::Array(_) => None,
        }
    }

    /// Takes over the values of `other` that are not set here.
    fn fill(&mut self, other: TreeNode) {
        match (&mut self.kind, other.kind) {
            (NodeValue::Table(table), NodeValue::Table(others)) => {
                for (name, node) in others {
                    let empty = Self::empty(&node.origin);
                    table.entry(name).or_insert(empty).fill(node);
                }
            }
            (NodeValue::Table(table), kind) if table.is_empty() => {
                (self.kind, self.origin) = (kind, other.origin);
            }
            _ => {}
        }
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
pub(super) fn parse_inline(text: &str, origin: &ValueOrigin) -> Result<TreeNode, String> {
    let value = DeValue::parse(text).map_err(|error| error.message().to_owned())?;
    Ok(node(&value, &|_| origin.clone()))
}

fn node(value: &Spanned<DeValue<'_>>, origin: &dyn Fn(usize) -> ValueOrigin) -> TreeNode {
    let kind = match value.get_ref() {
        DeValue::Table(table) => table_node(table, origin),
        DeValue::Array(array) => {
            NodeValue::Array(array.iter().map(|item| node(item, origin)).collect())
        }
        DeValue::String(text) => NodeValue::Scalar(toml::Value::String(text.to_string())),
        DeValue::Boolean(value) => NodeValue::Scalar(toml::Value::Boolean(*value)),
        DeValue::Datetime(value) => NodeValue::Scalar(toml::Value::Datetime(*value)),
        DeValue::Integer(value) => {
            let digits = value.as_str().replace('_', "");
            match i64::from_str_radix(&digits, value.radix()) {
                Ok(integer) => NodeValue::Scalar(toml::Value::Integer(integer)),
                // Beyond 64 bits: keep the text, the typed layer names the key when it refuses it.
                Err(_) => NodeValue::Text(digits),
            }
        }
        DeValue::Float(value) => match value.as_str().replace('_', "").parse() {
            Ok(float) => NodeValue::Scalar(toml::Value::Float(float)),
            Err(_) => NodeValue::Text(value.as_str().to_owned()),
        },
    };
    TreeNode {
        origin: origin(value.span().start),
        kind,
    }
}

fn table_node(table: &DeTable<'_>, origin: &dyn Fn(usize) -> ValueOrigin) -> NodeValue {
    let entry = |(key, value): (&Spanned<std::borrow::Cow<'_, str>>, _)| {
        let mut child = node(value, origin);
        child.origin = origin(key.span().start);
        (key.get_ref().to_string(), child)
    };
    NodeValue::Table(table.iter().map(entry).collect())
}
