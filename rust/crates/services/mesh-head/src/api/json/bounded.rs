//! JSON values in memory that is bounded by more than the length of their text: a value takes up to a hundred
//! times the bytes that spell it.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// A JSON object. Long lists of token ids in it are no values.
#[derive(Debug, Default)]
pub(crate) struct Object {
    /// Its fields. One that is in `lists`, too, stands here with the kind of its content only.
    pub map: Map<String, Value>,
    /// The fields [`COMPACT`] that consist of token ids.
    pub lists: BTreeMap<String, Lists>,
}

/// Lists of token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Lists {
    /// One list of ids.
    One(Vec<u32>),
    /// Several lists of ids.
    Many(Vec<Vec<u32>>),
}

/// Fields of a body that hold many token ids by right.
const COMPACT: [&str; 2] = ["prompt", "input"];

/// Remaining counts that may still be read.
#[derive(Debug)]
pub(super) struct Budget {
    values: usize,
    objects: usize,
    ids: usize,
    lists: usize,
    /// Description of the limit that was exceeded.
    pub(super) exceeded: Option<String>,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            values: MOST_VALUES,
            objects: MOST_OBJECTS,
            ids: MOST_IDS,
            lists: MOST_LISTS,
            exceeded: None,
        }
    }
}

impl Budget {
    fn value<E: Error>(&mut self) -> Result<(), E> {
        match self.values.checked_sub(1) {
            Some(left) => self.values = left,
            None => return Err(self.over(MOST_VALUES, "values")),
        }
        Ok(())
    }

    fn object<E: Error>(&mut self) -> Result<(), E> {
        match self.objects.checked_sub(1) {
            Some(left) => self.objects = left,
            None => return Err(self.over(MOST_OBJECTS, "objects")),
        }
        Ok(())
    }

    fn id<E: Error>(&mut self) -> Result<(), E> {
        match self.ids.checked_sub(1) {
            Some(left) => self.ids = left,
            None => return Err(self.over(MOST_IDS, "token ids")),
        }
        Ok(())
    }

    fn list<E: Error>(&mut self) -> Result<(), E> {
        match self.lists.checked_sub(1) {
            Some(left) => self.lists = left,
            None => return Err(self.over(MOST_LISTS, "lists of token ids")),
        }
        Ok(())
    }

    fn over<E: Error>(&mut self, limit: usize, what: &str) -> E {
        let text = format!("it holds over {limit} {what}");
        self.exceeded = Some(text.clone());
        E::custom(text)
    }
}

/// Reads an [`Object`] within a budget.
pub(super) struct Body<'b>(pub(super) &'b mut Budget);

impl<'de> DeserializeSeed<'de> for Body<'_> {
    type Value = Object;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Object, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Body<'_> {
    type Value = Object;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Object, A::Error> {
        let mut object = Object::default();
        while let Some(name) = fields.next_key::<String>()? {
            // Of two fields with one name the last counts.
            object.lists.remove(&name);
            if !COMPACT.contains(&&*name) {
                let value = fields.next_value_seed(Bounded(self.0))?;
                object.map.insert(name, value);
                continue;
            }
            match fields.next_value_seed(Compact(self.0))? {
                Content::Value(value) => {
                    object.map.insert(name, value);
                }
                Content::Lists(lists) => {
                    let kind = match lists {
                        Lists::One(_) => vec![Value::from(0)],
                        Lists::Many(_) => vec![one_list()],
                    };
                    object.map.insert(name.clone(), kind.into());
                    object.lists.insert(name, lists);
                }
            }
        }
        Ok(object)
    }
}

fn one_list() -> Value {
    Value::Array(vec![Value::from(0)])
}

/// Reads a value and counts it against the budget.
struct Bounded<'b>(&'b mut Budget);

impl<'de> DeserializeSeed<'de> for Bounded<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.0.value()?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Bounded<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(value) = elements.next_element_seed(Bounded(self.0))? {
            list.push(value);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(name) = fields.next_key()? {
            // An empty object takes nothing; one with a field takes room for eleven.
            if map.is_empty() {
                self.0.object()?;
            }
            let value = fields.next_value_seed(Bounded(self.0))?;
            map.insert(name, value);
        }
        Ok(map.into())
    }
}

/// Value of a field in [`COMPACT`].
enum Content {
    Value(Value),
    Lists(Lists),
}

struct Compact<'b>(&'b mut Budget);

impl<'de> DeserializeSeed<'de> for Compact<'_> {
    type Value = Content;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Content, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Compact<'_> {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text or a list")
    }

    fn visit_unit<E: Error>(self) -> Result<Content, E> {
        Ok(Content::Value(Value::Null))
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Content, E> {
        Ok(Content::Value(value.into()))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Content, E> {
        Ok(Content::Value(value.into()))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Content, E> {
        Ok(Content::Value(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Content, E> {
        Bounded(self.0).visit_f64(value).map(Content::Value)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Content, E> {
        Ok(Content::Value(text.into()))
    }

    fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<Content, A::Error> {
        Bounded(self.0).visit_map(fields).map(Content::Value)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Content, A::Error> {
        let mut content = Content::Value(Value::Array(Vec::new()));
        let mut first = true;
        while let Some(element) = elements.next_element_seed(Place(self.0))? {
            content = match (content, element) {
                (Content::Value(_), Element::Id(id)) if first => {
                    Content::Lists(Lists::One(vec![id]))
                }
                (Content::Value(_), Element::Ids(ids)) if first => {
                    Content::Lists(Lists::Many(vec![ids]))
                }
                (Content::Lists(Lists::One(mut list)), Element::Id(id)) => {
                    list.push(id);
                    Content::Lists(Lists::One(list))
                }
                (Content::Lists(Lists::Many(mut lists)), Element::Ids(ids)) => {
                    lists.push(ids);
                    Content::Lists(Lists::Many(lists))
                }
                // Of a mixed list its kinds are enough to refuse it.
                (Content::Lists(lists), other) => {
                    let before = match lists {
                        Lists::One(_) => Value::from(0),
                        Lists::Many(_) => one_list(),
                    };
                    Content::Value(vec![before, other.into_value()].into())
                }
                (Content::Value(Value::Array(mut list)), other) => {
                    if !matches!(other, Element::Value(_)) {
                        self.0.value()?;
                    }
                    list.push(other.into_value());
                    Content::Value(Value::Array(list))
                }
                (content @ Content::Value(_), _) => content,
            };
            first = false;
        }
        Ok(content)
    }
}

/// An element of such a list.
enum Element {
    Id(u32),
    Ids(Vec<u32>),
    Value(Value),
}

impl Element {
    fn into_value(self) -> Value {
        match self {
            Self::Id(id) => id.into(),
            Self::Ids(_) => one_list(),
            Self::Value(value) => value,
        }
    }
}

struct Place<'b>(&'b mut Budget);

impl Place<'_> {
    fn other<E: Error>(self, value: Value) -> Result<Element, E> {
        self.0.value()?;
        Ok(Element::Value(value))
    }
}

impl<'de> DeserializeSeed<'de> for Place<'_> {
    type Value = Element;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Element, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Place<'_> {
    type Value = Element;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, a token id, or a list of token ids")
    }

    fn visit_unit<E: Error>(self) -> Result<Element, E> {
        self.other(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Element, E> {
        self.other(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Element, E> {
        match u32::try_from(value) {
            Ok(id) => {
                self.0.id()?;
                Ok(Element::Id(id))
            }
            Err(_) => self.other(value.into()),
        }
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Element, E> {
        self.other(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Element, E> {
        // Some clients write whole numbers with a point.
        match value.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&value) {
            true => {
                self.0.id()?;
                Ok(Element::Id(value as u32))
            }
            false => self.other(Number::from_f64(value).map_or(Value::Null, Value::Number)),
        }
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Element, E> {
        self.other(text.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<Element, A::Error> {
        self.0.value()?;
        Bounded(self.0).visit_map(fields).map(Element::Value)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Element, A::Error> {
        self.0.list()?;
        let mut ids = Vec::new();
        let mut other = None;
        while let Some(element) = elements.next_element_seed(Place(self.0))? {
            match element {
                Element::Id(id) => ids.push(id),
                Element::Ids(_) => other = Some(one_list()),
                Element::Value(value) => other = Some(value),
            }
        }
        Ok(match other {
            Some(value) => Element::Value(vec![value].into()),
            None => Element::Ids(ids),
        })
    }
}

/// Values of all kinds in one body: 32 bytes each. A conversation of thousands of messages has tens of
/// thousands.
const MOST_VALUES: usize = 1 << 17;
/// Objects with fields: some 700 bytes each.
const MOST_OBJECTS: usize = 1 << 14;
/// Token ids in `prompt` or `input`.
const MOST_IDS: usize = 1 << 21;
/// Lists of them.
const MOST_LISTS: usize = 1 << 12;
