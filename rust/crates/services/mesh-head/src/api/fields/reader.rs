//! Typed reads of fields, with errors that name the field.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::api::invalid::Invalid;
use crate::api::json::{Lists, Object};

/// The fields of a JSON object. A `null` is an absent field.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fields<'a> {
    map: &'a Map<String, Value>,
    lists: Option<&'a BTreeMap<String, Lists>>,
}

impl<'a> Fields<'a> {
    /// The fields of this object.
    pub(crate) fn new(map: &'a Map<String, Value>) -> Self {
        Self { map, lists: None }
    }

    /// The fields of a body.
    pub(crate) fn of(object: &'a Object) -> Self {
        Self {
            map: &object.map,
            lists: Some(&object.lists),
        }
    }

    /// Token ids that a field of a body consists of.
    pub(crate) fn lists(self, name: &str) -> Option<&'a Lists> {
        self.lists?.get(name)
    }

    /// The raw value of a field.
    pub(crate) fn get(self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// The names of all fields, those that are `null` included.
    pub(crate) fn names(self) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str)
    }

    /// A name: text, and absent if it is empty.
    pub(crate) fn name(self, name: &str) -> Result<Option<&'a str>, Invalid> {
        let text = self.text(name)?.filter(|text| !text.is_empty());
        match text {
            Some(text) if text.len() > LONGEST_NAME => Err(Invalid::new(
                name,
                format!(
                    "'{name}' has {} bytes, more than the limit of {LONGEST_NAME}",
                    text.len()
                ),
            )),
            text => Ok(text),
        }
    }

    /// Reads a text field.
    pub(crate) fn text(self, name: &str) -> Result<Option<&'a str>, Invalid> {
        self.typed(name, "a string", Value::as_str)
    }

    /// A truth value, false when absent.
    pub(crate) fn flag(self, name: &str) -> Result<bool, Invalid> {
        Ok(self
            .typed(name, "a boolean", Value::as_bool)?
            .unwrap_or(false))
    }

    /// A truth value; `None` when absent.
    pub(crate) fn choice(self, name: &str) -> Result<Option<bool>, Invalid> {
        self.typed(name, "a boolean", Value::as_bool)
    }

    /// Reads a field that is an object.
    pub(crate) fn object(self, name: &str) -> Result<Option<Fields<'a>>, Invalid> {
        Ok(self
            .typed(name, "an object", Value::as_object)?
            .map(Fields::new))
    }

    /// A number within a range.
    pub(crate) fn number(
        self,
        name: &str,
        range: RangeInclusive<f64>,
    ) -> Result<Option<f32>, Invalid> {
        match self.typed(name, "a number", Value::as_f64)? {
            Some(value) if range.contains(&value) => Ok(Some(value as f32)),
            Some(value) => Err(out_of_range(name, value, *range.start(), *range.end())),
            None => Ok(None),
        }
    }

    /// A whole number of at least `least` for which -1 stands for "without limit": `None`, as when absent.
    pub(crate) fn limit(self, name: &str, least: u32) -> Result<Option<u32>, Invalid> {
        match self.get(name) {
            Some(value) if whole_number(value) == Some(-1) => Ok(None),
            _ => self.whole(name, least..=u32::MAX),
        }
    }

    /// Token ids, none when absent.
    pub(crate) fn tokens(self, name: &str) -> Result<Vec<u32>, Invalid> {
        let wrong = |value| Invalid::wrong_type(name, "an array of token ids", value);
        let Some(value) = self.get(name) else {
            return Ok(Vec::new());
        };
        let list = value.as_array().ok_or_else(|| wrong(value))?;
        let ids = list.iter().map(|id| u32::try_from(whole_number(id)?).ok());
        ids.collect::<Option<_>>().ok_or_else(|| wrong(value))
    }

    /// The underlying JSON object.
    pub(crate) fn map(self) -> &'a Map<String, Value> {
        self.map
    }

    /// A whole number within a range.
    pub(crate) fn whole(
        self,
        name: &str,
        range: RangeInclusive<u32>,
    ) -> Result<Option<u32>, Invalid> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let Some(number) = whole_number(value) else {
            return Err(Invalid::wrong_type(name, "an integer", value));
        };
        match u32::try_from(number) {
            Ok(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(out_of_range(name, number, *range.start(), *range.end())),
        }
    }

    fn typed<T>(
        self,
        name: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Invalid> {
        match self.get(name) {
            Some(value) => read(value)
                .map(Some)
                .ok_or_else(|| Invalid::wrong_type(name, expected, value)),
            None => Ok(None),
        }
    }
}

/// A JSON number without a fraction: 3 and 3.0 alike.
pub(crate) fn whole_number(value: &Value) -> Option<i64> {
    let whole = |number: f64| number.fract() == 0.0 && number.abs() < 9e15;
    value.as_i64().or_else(|| {
        value
            .as_f64()
            .filter(|number| whole(*number))
            .map(|number| number as i64)
    })
}

fn out_of_range(
    name: &str,
    value: impl std::fmt::Display,
    least: impl std::fmt::Display,
    most: impl std::fmt::Display,
) -> Invalid {
    Invalid::new(
        name,
        format!("Invalid value for '{name}': {value} is not between {least} and {most}"),
    )
}

/// Bytes of a model's or a prompt's name.
const LONGEST_NAME: usize = 512;
