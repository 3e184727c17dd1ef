//! A folder's metadata, under the keys of GGUF files.

use std::collections::HashMap;

use crate::gguf::{Array, Value};

/// Metadata keys with their values.
#[derive(Debug)]
pub(super) struct GgufKeys {
    /// Name of the architecture, which begins the names of its own keys.
    architecture: &'static str,
    values: HashMap<String, KeyValue>,
}

#[derive(Debug)]
enum KeyValue {
    Count(u64),
    Float(f64),
    Text(String),
    Flag(bool),
    /// Booleans, one byte each.
    Flags(Vec<u8>),
}

impl GgufKeys {
    pub(super) fn new(architecture: &'static str) -> Self {
        let mut keys = GgufKeys {
            architecture,
            values: HashMap::new(),
        };
        keys.general("general.architecture", architecture);
        keys
    }

    pub(super) fn get(&self, key: &str) -> Option<Value<'_>> {
        Some(match self.values.get(key)? {
            KeyValue::Count(count) => Value::Unsigned(*count),
            KeyValue::Float(float) => Value::Float(*float),
            KeyValue::Flag(flag) => Value::Bool(*flag),
            KeyValue::Text(text) => Value::String(text.as_bytes()),
            KeyValue::Flags(flags) => Value::Array(Array::of_flags(flags)),
        })
    }

    /// Text under a key that all architectures share.
    pub(super) fn general(&mut self, key: &str, text: &str) {
        let text = KeyValue::Text(text.to_owned());
        self.values.insert(key.to_owned(), text);
    }

    pub(super) fn count(&mut self, key: &str, count: u64) {
        self.put(key, KeyValue::Count(count));
    }

    pub(super) fn float(&mut self, key: &str, float: f64) {
        self.put(key, KeyValue::Float(float));
    }

    pub(super) fn text(&mut self, key: &str, text: &str) {
        self.put(key, KeyValue::Text(text.to_owned()));
    }

    pub(super) fn flag(&mut self, key: &str, flag: bool) {
        self.put(key, KeyValue::Flag(flag));
    }

    pub(super) fn flags(&mut self, key: &str, flags: &[bool]) {
        let flags = flags.iter().map(|&flag| u8::from(flag)).collect();
        self.put(key, KeyValue::Flags(flags));
    }

    fn put(&mut self, key: &str, value: KeyValue) {
        self.values
            .insert(format!("{}.{key}", self.architecture), value);
    }
}
