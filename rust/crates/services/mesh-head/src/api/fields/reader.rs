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
    pub(crate) fn new(map: &'a Map<String, Value>) -> Self {
        Self { map, lists: None }
    }

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
        let bytes = text.map_or(0, str::len);
        if bytes > LONGEST_NAME {
            let text = format!("'{name}' has {bytes} bytes, more than the limit of {LONGEST_NAME}");
            return Err(Invalid::new(name, text));
        }
        Ok(text)
    }

    pub(crate) fn text(self, name: &str) -> Result<Option<&'a str>, Invalid> {
        self.typed(name, "a string", Value::as_str)
    }

    /// A truth value, false when absent.
    pub(crate) fn flag(self, name: &str) -> Result<bool, Invalid> {
        Ok(self.choice(name)?.unwrap_or(false))
    }

    pub(crate) fn choice(self, name: &str) -> Result<Option<bool>, Invalid> {
        self.typed(name, "a boolean", Value::as_bool)
    }

    pub(crate) fn object(self, name: &str) -> Result<Option<Fields<'a>>, Invalid> {
        let object = self.typed(name, "an object", Value::as_object)?;
        Ok(object.map(Fields::new))
    }

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
        let tokens = self.typed(name, "an array of token ids", token_ids)?;
        Ok(tokens.unwrap_or_default())
    }

    pub(crate) fn map(self) -> &'a Map<String, Value> {
        self.map
    }

    pub(crate) fn whole(
        self,
        name: &str,
        range: RangeInclusive<u32>,
    ) -> Result<Option<u32>, Invalid> {
        let Some(number) = self.typed(name, "an integer", whole_number)? else {
            return Ok(None);
        };
        match u32::try_from(number) {
            Ok(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(out_of_range(name, number, *range.start(), *range.end())),
        }
    }

    /// A value of a type; `None` when absent.
    pub(super) fn typed<T>(
        self,
        name: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Invalid> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let wrong = || Invalid::wrong_type(name, expected, value);
        read(value).ok_or_else(wrong).map(Some)
    }
}

pub(crate) fn token_ids(value: &Value) -> Option<Vec<u32>> {
    let ids = value.as_array()?.iter();
    ids.map(|id| u32::try_from(whole_number(id)?).ok())
        .collect()
}

/// A JSON number without a fraction: 3 and 3.0 alike.
pub(crate) fn whole_number(value: &Value) -> Option<i64> {
    let is_whole = |number: &f64| number.fract() == 0.0 && number.abs() < 9e15;
    let float = || value.as_f64().filter(is_whole);
    value.as_i64().or_else(|| float().map(|whole| whole as i64))
}

fn out_of_range(
    name: &str,
    value: impl std::fmt::Display,
    least: impl std::fmt::Display,
    most: impl std::fmt::Display,
) -> Invalid {
    let text = format!("Invalid value for '{name}': {value} is not between {least} and {most}");
    Invalid::new(name, text)
}

/// Bytes of a model's or a prompt's name.
const LONGEST_NAME: usize = 512;
