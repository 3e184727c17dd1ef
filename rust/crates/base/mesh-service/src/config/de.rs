//! From the tree to the typed configuration, keeping track of the key and its origin for errors.

use std::collections::{BTreeMap, btree_map};
use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, IntoDeserializer, MapAccess, SeqAccess, Visitor,
};
use serde::forward_to_deserialize_any;

use super::ConfigError;
use super::error::nearest_key;
use super::tree::{NodeValue, Tree, TreeNode, ValueOrigin, join, parse_inline};

pub(super) fn from_tree<T: DeserializeOwned>(tree: &Tree) -> Result<T, Error> {
    T::deserialize(NodeDeserializer {
        node: tree.root.clone(),
    })
}

/// A refusal on its way up: each level adds its key.
#[derive(Debug)]
pub(super) struct Error {
    /// Keys from the innermost outwards.
    path: Vec<String>,
    origin: Option<ValueOrigin>,
    reason: Reason,
}

#[derive(Debug)]
enum Reason {
    UnknownField(&'static [&'static str]),
    Message(String),
}

impl Error {
    fn new(reason: Reason, origin: &ValueOrigin) -> Self {
        Self {
            path: Vec::new(),
            origin: Some(origin.clone()),
            reason,
        }
    }

    fn message(text: impl fmt::Display, origin: &ValueOrigin) -> Self {
        Self::new(Reason::Message(text.to_string()), origin)
    }

    fn below(mut self, key: &str, origin: &ValueOrigin) -> Self {
        self.path.push(key.to_owned());
        self.or_at(origin.clone())
    }

    /// The origin, where none is known yet.
    fn or_at(mut self, origin: ValueOrigin) -> Self {
        self.origin.get_or_insert(origin);
        self
    }

    /// The error as the user sees it; `known` are all keys of the configuration.
    pub(super) fn explain(mut self, known: &[String]) -> ConfigError {
        self.path.reverse();
        let key = self.path.join(".");
        let origin = self.origin.unwrap_or(ValueOrigin::Default);
        match self.reason {
            Reason::Message(reason) => ConfigError::Value {
                key,
                origin,
                reason,
            },
            Reason::UnknownField(fields) => {
                let parent = &self.path[..self.path.len().saturating_sub(1)].join(".");
                let valid = fields.iter().map(|field| join(parent, field));
                let valid: Vec<String> = valid.collect();
                let nearest = nearest_key(&key, &valid, known);
                ConfigError::UnknownKey {
                    key,
                    origin,
                    nearest,
                    valid,
                }
            }
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.reason)
    }
}

impl std::error::Error for Error {}

impl de::Error for Error {
    fn custom<T: fmt::Display>(text: T) -> Self {
        Self {
            path: Vec::new(),
            origin: None,
            reason: Reason::Message(text.to_string()),
        }
    }
}

struct NodeDeserializer {
    node: TreeNode,
}

impl NodeDeserializer {
    /// Reads a number or a truth value out of text; TOML scalars go on as they are.
    fn parsed<'de, P, V>(
        self,
        expected: &str,
        visitor: V,
        visit: impl FnOnce(V, P) -> Result<V::Value, Error>,
    ) -> Result<V::Value, Error>
    where
        P: std::str::FromStr,
        V: Visitor<'de>,
    {
        match &self.node.kind {
            NodeValue::Text(text) => match text.trim().replace('_', "").parse() {
                Ok(value) => visit(visitor, value),
                Err(_) => {
                    let text = format!("expected {expected}, got `{text}`");
                    Err(Error::message(text, &self.node.origin))
                }
            },
            _ => de::Deserializer::deserialize_any(self, visitor),
        }
    }

    /// Parses text that represents a list or a table into a node of that kind.
    fn expanded(self) -> Result<Self, Error> {
        let NodeValue::Text(text) = &self.node.kind else {
            return Ok(self);
        };
        let origin = &self.node.origin;
        let text = text.trim();
        if text.starts_with(['[', '{']) {
            let node =
                parse_inline(text, origin).map_err(|reason| Error::message(reason, origin))?;
            return Ok(Self { node });
        }
        let node = |kind| TreeNode {
            origin: origin.clone(),
            kind,
        };
        let items = text.split(',').filter(|_| !text.is_empty());
        let items = items.map(|item| node(NodeValue::Text(item.trim().to_owned())));
        let node = node(NodeValue::Array(items.collect()));
        Ok(Self { node })
    }
}

macro_rules! deserialize_parsed {
    ($($method:ident $visit:ident $type:ty, $expected:literal;)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            self.parsed($expected, visitor, |visitor, value: $type| visitor.$visit(value))
        }
    )*};
}

impl<'de> de::Deserializer<'de> for NodeDeserializer {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let origin = self.node.origin;
        let visited = match self.node.kind {
            NodeValue::Text(text) => visitor.visit_string(text),
            NodeValue::Scalar(value) => de::Deserializer::deserialize_any(value, visitor)
                .map_err(|error: toml::de::Error| Error::message(error.message(), &origin)),
            NodeValue::Array(items) => visitor.visit_seq(Items {
                items: items.into_iter().enumerate(),
            }),
            NodeValue::Table(table) => visitor.visit_map(Entries::of(table)),
        };
        visited.map_err(|error| error.or_at(origin))
    }

    deserialize_parsed! {
        deserialize_bool visit_bool bool, "true or false";
        deserialize_i8 visit_i8 i8, "an integer from -128 to 127";
        deserialize_i16 visit_i16 i16, "an integer from -32768 to 32767";
        deserialize_i32 visit_i32 i32, "an integer of 32 bits";
        deserialize_i64 visit_i64 i64, "an integer";
        deserialize_u8 visit_u8 u8, "an integer from 0 to 255";
        deserialize_u16 visit_u16 u16, "an integer from 0 to 65535";
        deserialize_u32 visit_u32 u32, "a positive integer of 32 bits";
        deserialize_u64 visit_u64 u64, "a positive integer";
        deserialize_f32 visit_f32 f32, "a number";
        deserialize_f64 visit_f64 f64, "a number";
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.node.kind {
            NodeValue::Text(text) if text.is_empty() => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.expanded()?.deserialize_any(visitor)
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.expanded()?.deserialize_any(visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let this = self.expanded()?;
        if let NodeValue::Table(table) = &this.node.kind {
            let mut entries = table.iter();
            if let Some((key, node)) = entries.find(|(key, _)| !fields.contains(&key.as_str())) {
                let origin = &node.origin;
                return Err(Error::new(Reason::UnknownField(fields), origin).below(key, origin));
            }
        }
        this.deserialize_any(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let origin = self.node.origin;
        let variant = match self.node.kind {
            NodeValue::Table(table) => {
                visitor.visit_enum(MapAccessDeserializer::new(Entries::of(table)))
            }
            NodeValue::Text(name) | NodeValue::Scalar(toml::Value::String(name)) => {
                visitor.visit_enum(name.into_deserializer())
            }
            NodeValue::Scalar(_) | NodeValue::Array(_) => {
                Err(Error::message("expected a name", &origin))
            }
        };
        variant.map_err(|error: Error| error.or_at(origin))
    }

    forward_to_deserialize_any! {
        i128 u128 char str string bytes byte_buf unit unit_struct tuple_struct identifier ignored_any
    }
}

struct Items {
    items: std::iter::Enumerate<std::vec::IntoIter<TreeNode>>,
}

impl<'de> SeqAccess<'de> for Items {
    type Error = Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Error> {
        let Some((index, node)) = self.items.next() else {
            return Ok(None);
        };
        let origin = node.origin.clone();
        seed.deserialize(NodeDeserializer { node })
            .map(Some)
            .map_err(|error| error.below(&index.to_string(), &origin))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.items.len())
    }
}

struct Entries {
    entries: btree_map::IntoIter<String, TreeNode>,
    value: Option<(String, TreeNode)>,
}

impl Entries {
    fn of(table: BTreeMap<String, TreeNode>) -> Self {
        Self {
            entries: table.into_iter(),
            value: None,
        }
    }
}

impl<'de> MapAccess<'de> for Entries {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let Some((key, node)) = self.entries.next() else {
            return Ok(None);
        };
        let origin = node.origin.clone();
        let result = seed.deserialize(key.as_str().into_deserializer());
        let result = result.map_err(|error: Error| error.below(&key, &origin));
        self.value = Some((key, node));
        result.map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Error> {
        let (key, node) = self.value.take().expect("serde asks for the key first");
        let origin = node.origin.clone();
        seed.deserialize(NodeDeserializer { node })
            .map_err(|error| error.below(&key, &origin))
    }
}
