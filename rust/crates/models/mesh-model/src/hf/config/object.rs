//! Objects of `config.json`, read field by field.

use serde_json::{Map, Value};

use crate::hf::HfError;

/// Name of the file, for errors.
pub(super) const FILE: &str = "config.json";

/// An object of `config.json`. A key whose value is null counts as absent.
#[derive(Clone)]
pub(super) struct Object<'a> {
    pub(super) map: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// The value of a key as `convert` reads it; an error that asks for `wanted` if it cannot.
    fn typed<T>(
        &self,
        key: &str,
        wanted: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, HfError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let converted = convert(value).ok_or_else(|| {
            let short: String = value.to_string().chars().take(60).collect();
            bad(key, short, format!("{wanted} is needed"))
        });
        converted.map(Some)
    }

    pub(super) fn string(&self, key: &str) -> Result<Option<&'a str>, HfError> {
        self.typed(key, "text", Value::as_str)
    }

    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>, HfError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<Object<'a>>, HfError> {
        self.typed(key, "an object", |value| {
            let map = value.as_object()?;
            Some(Object { map })
        })
    }

    /// A whole number from 1 to `limit`. Some files have 4096.0.
    pub(super) fn count(&self, key: &str, limit: u64) -> Result<Option<u64>, HfError> {
        let wanted = format!("a whole number from 1 to {limit}");
        self.typed(key, &wanted, |value| {
            let whole = value.as_f64().filter(|x| x.fract() == 0.0 && *x >= 0.0);
            let count = value.as_u64().or(whole.map(|x| x as u64));
            count.filter(|count| (1..=limit).contains(count))
        })
    }

    /// A whole number from 0 to `limit`.
    pub(super) fn count_from_zero(&self, key: &str, limit: u64) -> Result<Option<u64>, HfError> {
        match self.get(key).and_then(Value::as_u64) {
            Some(0) => Ok(Some(0)),
            _ => self.count(key, limit),
        }
    }

    pub(super) fn required(&self, key: &str, limit: u64) -> Result<u64, HfError> {
        self.count(key, limit)?.ok_or_else(|| missing(key))
    }

    /// A finite number over 0, also as a 32-bit float.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>, HfError> {
        self.typed(key, "a number over 0", |value| {
            let float = |x: &f64| (*x as f32).is_finite() && *x as f32 > 0.0;
            value.as_f64().filter(float)
        })
    }

    /// A finite number from 0 on, also as a 32-bit float.
    pub(super) fn nonnegative(&self, key: &str) -> Result<Option<f64>, HfError> {
        self.typed(key, "a number from 0 on", |value| {
            let float = |x: &f64| (*x as f32).is_finite() && *x >= 0.0;
            value.as_f64().filter(float)
        })
    }

    /// Different numbers below `limit`, in ascending order; none if the key is absent.
    pub(super) fn numbers(&self, key: &str, limit: u64) -> Result<Vec<u64>, HfError> {
        let wanted = format!("a list of different numbers below {limit} in order");
        let numbers = self.typed(key, &wanted, |value| {
            let list = value.as_array()?;
            let numbers: Vec<u64> = list.iter().map(Value::as_u64).collect::<Option<_>>()?;
            let ascending = numbers.is_sorted_by(|a, b| a < b);
            (ascending && numbers.last().is_none_or(|last| *last < limit)).then_some(numbers)
        })?;
        Ok(numbers.unwrap_or_default())
    }

    /// One flag per layer: true if it has the window.
    pub(super) fn layer_types(&self, layers: u64) -> Result<Vec<bool>, HfError> {
        const KEY: &str = "layer_types";
        let wanted =
            format!("\"full_attention\" or \"sliding_attention\" for each of the {layers} layers");
        let types = self.typed(KEY, &wanted, |types| {
            let flag = |ty: &Value| match ty.as_str()? {
                "sliding_attention" => Some(true),
                "full_attention" => Some(false),
                _ => None,
            };
            let types: Vec<bool> = types.as_array()?.iter().map(flag).collect::<Option<_>>()?;
            (types.len() as u64 == layers).then_some(types)
        });
        types?.ok_or_else(|| missing(KEY))
    }
}

pub(super) fn bad(key: &str, value: impl ToString, reason: String) -> HfError {
    HfError::Value {
        file: FILE,
        key: key.into(),
        value: value.to_string(),
        reason,
    }
}

pub(super) fn missing(key: &str) -> HfError {
    bad(
        key,
        "missing",
        "the network cannot be told without it".into(),
    )
}
