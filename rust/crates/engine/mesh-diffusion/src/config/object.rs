//! Typed and bounded values of a JSON object from a file.

use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use mesh_model::file::read_limited;
use serde_json::{Map, Value};

use crate::checkpoint::ModelError;

/// The largest known file of configuration has 2 KB.
const MAX_CONFIG: u64 = 1 << 20;
/// Characters of a value that an error shows.
const SHOWN: usize = 60;

/// A JSON object and where it is from.
#[derive(Debug)]
pub(crate) struct Object {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl Object {
    /// The object in the file at `path`, or `None` if the file does not exist.
    pub(crate) fn open(path: &Path) -> Result<Option<Self>, ModelError> {
        let bytes = read_limited(path, MAX_CONFIG).map_err(|source| ModelError::Read {
            path: path.into(),
            source: match source.kind() {
                io::ErrorKind::FileTooLarge => io::Error::other("it has more than 1 MiB"),
                _ => source,
            },
        })?;
        let Some(bytes) = bytes else { return Ok(None) };
        let fields = serde_json::from_slice(&bytes).map_err(|error| ModelError::Json {
            path: path.into(),
            message: error.to_string(),
        })?;
        Ok(Some(Object {
            path: path.into(),
            fields,
        }))
    }

    /// As [`Object::open`], for a file that must be there.
    pub(crate) fn require(path: &Path) -> Result<Self, ModelError> {
        Self::open(path)?.ok_or_else(|| ModelError::Missing {
            path: path.into(),
            remedy: "a model in diffusers' form has one in each of its folders; fetch the whole model",
        })
    }

    /// The value of `key`; null counts as absent.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.fields.get(key).filter(|value| !value.is_null())
    }

    /// An error about the value of `key`.
    pub(crate) fn refuse(&self, key: &str, reason: impl Into<String>) -> ModelError {
        let value = self.get(key).map_or("absent".into(), Value::to_string);
        let mut shown: String = value.chars().take(SHOWN).collect();
        if shown.len() < value.len() {
            shown.push('…');
        }
        ModelError::Value {
            path: self.path.clone(),
            key: key.into(),
            value: shown,
            reason: reason.into(),
        }
    }

    /// Checks that the number of groups of the norms divides the channels of every block.
    pub(super) fn check_groups(&self, groups: u32, channels: &[u32]) -> Result<(), ModelError> {
        match channels
            .iter()
            .find(|channels| !channels.is_multiple_of(groups))
        {
            None => Ok(()),
            Some(channels) => Err(self.refuse(
                "norm_num_groups",
                format!("but must divide {channels} channels"),
            )),
        }
    }

    /// A whole number within `range`.
    pub(crate) fn whole(&self, key: &str, range: RangeInclusive<u32>) -> Result<u32, ModelError> {
        self.optional_whole(key, range.clone())?
            .ok_or_else(|| self.refuse(key, expected(&range)))
    }

    /// As [`Object::whole`], with a value for files without the key.
    pub(crate) fn whole_or(
        &self,
        key: &str,
        range: RangeInclusive<u32>,
        default: u32,
    ) -> Result<u32, ModelError> {
        Ok(self.optional_whole(key, range)?.unwrap_or(default))
    }

    /// As [`Object::whole`]; `None` for files without the key.
    pub(crate) fn optional_whole(
        &self,
        key: &str,
        range: RangeInclusive<u32>,
    ) -> Result<Option<u32>, ModelError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match whole(value).filter(|value| range.contains(value)) {
            Some(value) => Ok(Some(value)),
            None => Err(self.refuse(key, expected(&range))),
        }
    }

    /// A list of `lengths` whole numbers within `range`.
    pub(crate) fn wholes(
        &self,
        key: &str,
        lengths: RangeInclusive<usize>,
        range: RangeInclusive<u32>,
    ) -> Result<Vec<u32>, ModelError> {
        let list = self.get(key).and_then(Value::as_array);
        let list = list.filter(|list| lengths.contains(&list.len()));
        let numbers: Option<Vec<u32>> = list.and_then(|list| {
            let numbers = list
                .iter()
                .map(|value| whole(value).filter(|value| range.contains(value)));
            numbers.collect()
        });
        numbers.ok_or_else(|| {
            let (least, most) = lengths.into_inner();
            let number = expected(&range);
            self.refuse(
                key,
                format!("but must be a list of {least} to {most} numbers; each {number}"),
            )
        })
    }

    /// `count` whole numbers: a list of as many, or one number for all; `default` for files without the key.
    pub(crate) fn each(
        &self,
        key: &str,
        count: usize,
        range: RangeInclusive<u32>,
        default: u32,
    ) -> Result<Vec<u32>, ModelError> {
        match self.get(key) {
            Some(Value::Array(_)) => self.wholes(key, count..=count, range),
            _ => Ok(vec![self.whole_or(key, range, default)?; count]),
        }
    }

    /// A list of `count` texts.
    pub(crate) fn texts(&self, key: &str, count: usize) -> Result<Vec<&str>, ModelError> {
        let list = self.get(key).and_then(Value::as_array);
        let texts: Option<Vec<&str>> = list
            .filter(|list| list.len() == count)
            .and_then(|list| list.iter().map(Value::as_str).collect());
        texts.ok_or_else(|| self.refuse(key, format!("but must be a list of {count} names")))
    }

    /// A finite number.
    pub(crate) fn number_or(&self, key: &str, default: f64) -> Result<f64, ModelError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_f64()
                .filter(|value| value.is_finite())
                .ok_or_else(|| self.refuse(key, "but must be a number")),
        }
    }

    /// True or false.
    pub(crate) fn flag_or(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| self.refuse(key, "but must be true or false")),
        }
    }

    /// A text; `None` for files without the key.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.refuse(key, "but must be a text")),
        }
    }

    /// Refuses any value but `only`; files without the key are taken.
    pub(crate) fn only(&self, key: &str, only: &Value) -> Result<(), ModelError> {
        match self.get(key) {
            Some(value) if value != only => {
                Err(self.refuse(key, format!("but only {only} is supported")))
            }
            _ => Ok(()),
        }
    }

    /// Refuses any value at all.
    pub(crate) fn absent(&self, key: &str) -> Result<(), ModelError> {
        match self.get(key) {
            None => Ok(()),
            Some(_) => Err(self.refuse(key, "which is not supported")),
        }
    }

    /// All of it, for a type that reads what it knows.
    pub(crate) fn parse<T: serde::de::DeserializeOwned>(&self) -> Result<T, ModelError> {
        // Null counts as absent here too.
        let fields = self.fields.iter().filter(|(_, value)| !value.is_null());
        let fields: Map<String, Value> = fields
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        serde_json::from_value(Value::Object(fields)).map_err(|error| ModelError::Json {
            path: self.path.clone(),
            message: error.to_string(),
        })
    }
}

fn whole(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|value| u32::try_from(value).ok())
}

fn expected(range: &RangeInclusive<u32>) -> String {
    format!(
        "but must be a whole number from {} to {}",
        range.start(),
        range.end()
    )
}
