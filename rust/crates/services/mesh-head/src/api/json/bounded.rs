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

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Lists {
    One(Vec<u32>),
    Many(Vec<Vec<u32>>),
}

/// Fields of a body that hold many token ids by right.
const COMPACT: [&str; 2] = ["prompt", "input"];

#[derive(Clone, Copy)]
enum Counted {
    Values,
    Objects,
    Ids,
    Lists,
}

/// The most of each in one body, in their order.
const LIMITS: [(usize, &str); 4] = [
    // 32 bytes each. A conversation of thousands of messages has tens of thousands.
    (1 << 17, "values"),
    // Those with fields: some 700 bytes each.
    (1 << 14, "objects"),
    (1 << 21, "token ids"),
    (1 << 12, "lists of token ids"),
];

#[derive(Debug, Default)]
pub(super) struct Budget {
    used: [usize; LIMITS.len()],
    /// Description of the limit that was exceeded.
    pub(super) exceeded: Option<String>,
}

impl Budget {
    fn take<E: Error>(&mut self, one: Counted) -> Result<(), E> {
        let (used, (limit, what)) = (&mut self.used[one as usize], LIMITS[one as usize]);
        *used += 1;
        if *used <= limit {
            return Ok(());
        }
        let text = format!("it holds over {limit} {what}");
        self.exceeded = Some(text.clone());
        Err(E::custom(text))
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
            let place = match COMPACT.contains(&&*name) {
                true => Place::Compact,
                false => Place::Anywhere,
            };
            let item = fields.next_value_seed(Reader(self.0, place))?;
            if let Item::Lists(lists) = item {
                object.map.insert(name.clone(), vec![lists.first()].into());
                object.lists.insert(name, lists);
            } else {
                object.map.insert(name, item.into_value());
            }
        }
        Ok(object)
    }
}

/// The place of a value.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    /// All is read as it is.
    Anywhere,
    /// A field in [`COMPACT`].
    Compact,
    /// An element of its list, or of a list in that.
    Element,
}

/// A value, or token ids instead of one.
enum Item {
    Value(Value),
    Id(u32),
    Lists(Lists),
}

impl Item {
    fn into_value(self) -> Value {
        match self {
            Self::Value(value) => value,
            Self::Id(id) => id.into(),
            Self::Lists(lists) => vec![lists.first()].into(),
        }
    }
}

impl Lists {
    /// The kind of their elements, as a value of that kind.
    fn first(&self) -> Value {
        match self {
            Self::One(_) => 0.into(),
            Self::Many(_) => vec![0].into(),
        }
    }
}

/// Reads the value at a place and counts it against the budget.
struct Reader<'b>(&'b mut Budget, Place);

impl Reader<'_> {
    fn value<E: Error>(self, value: Value) -> Result<Item, E> {
        if self.1 == Place::Element {
            self.0.take(Counted::Values)?;
        }
        Ok(Item::Value(value))
    }

    fn id<E: Error>(self, id: u32) -> Result<Item, E> {
        self.0.take(Counted::Ids)?;
        Ok(Item::Id(id))
    }

    fn any_list<'de, A: SeqAccess<'de>>(self, mut elements: A) -> Result<Item, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = elements.next_element_seed(Reader(self.0, Place::Anywhere))? {
            list.push(item.into_value());
        }
        Ok(Item::Value(list.into()))
    }

    fn compact_list<'de, A: SeqAccess<'de>>(self, mut elements: A) -> Result<Item, A::Error> {
        let (mut ids, mut lists, mut values) = (Vec::new(), Vec::new(), Vec::<Value>::new());
        while let Some(item) = elements.next_element_seed(Reader(self.0, Place::Element))? {
            match item {
                Item::Id(id) if lists.is_empty() && values.is_empty() => ids.push(id),
                Item::Lists(Lists::One(list)) if ids.is_empty() && values.is_empty() => {
                    lists.push(list);
                }
                other => {
                    if !matches!(other, Item::Value(_)) {
                        self.0.take(Counted::Values)?;
                    }
                    // Of a mixed list its kinds are enough to refuse it.
                    let of_ids = (!ids.is_empty()).then(|| Lists::One(std::mem::take(&mut ids)));
                    let of_lists =
                        (!lists.is_empty()).then(|| Lists::Many(std::mem::take(&mut lists)));
                    values.extend(of_ids.or(of_lists).map(|before| before.first()));
                    values.push(other.into_value());
                }
            }
        }
        Ok(match (ids.is_empty(), lists.is_empty()) {
            (false, _) => Item::Lists(Lists::One(ids)),
            (true, false) => Item::Lists(Lists::Many(lists)),
            (true, true) => Item::Value(values.into()),
        })
    }

    /// A list in a list. Where not all of it is token ids, one other element is enough to refuse it.
    fn inner_list<'de, A: SeqAccess<'de>>(self, mut elements: A) -> Result<Item, A::Error> {
        self.0.take(Counted::Lists)?;
        let (mut ids, mut other) = (Vec::new(), None);
        while let Some(item) = elements.next_element_seed(Reader(self.0, Place::Element))? {
            match item {
                Item::Id(id) => ids.push(id),
                item => other = Some(item.into_value()),
            }
        }
        Ok(match other {
            Some(value) => Item::Value(vec![value].into()),
            None => Item::Lists(Lists::One(ids)),
        })
    }
}

impl<'de> DeserializeSeed<'de> for Reader<'_> {
    type Value = Item;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Item, D::Error> {
        if self.1 == Place::Anywhere {
            self.0.take(Counted::Values)?;
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader<'_> {
    type Value = Item;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Item, E> {
        self.value(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Item, E> {
        self.value(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Item, E> {
        match u32::try_from(value) {
            Ok(id) if self.1 == Place::Element => self.id(id),
            _ => self.value(value.into()),
        }
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Item, E> {
        self.value(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Item, E> {
        // Some clients write whole numbers with a point.
        let is_id = value.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&value);
        match is_id && self.1 == Place::Element {
            true => self.id(value as u32),
            false => self.value(Number::from_f64(value).map_or(Value::Null, Value::Number)),
        }
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Item, E> {
        self.value(text.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Item, A::Error> {
        let mut map = Map::new();
        while let Some(name) = fields.next_key()? {
            // An empty object takes nothing; one with a field takes room for eleven.
            if map.is_empty() {
                self.0.take(Counted::Objects)?;
            }
            let item = fields.next_value_seed(Reader(self.0, Place::Anywhere))?;
            map.insert(name, item.into_value());
        }
        self.value(map.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, elements: A) -> Result<Item, A::Error> {
        match self.1 {
            Place::Anywhere => self.any_list(elements),
            Place::Compact => self.compact_list(elements),
            Place::Element => self.inner_list(elements),
        }
    }
}
