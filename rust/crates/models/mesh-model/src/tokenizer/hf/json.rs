//! `tokenizer.json` read within limits: on the way to a structure no more memory is taken than a few times
//! the file.

use std::collections::HashSet;
use std::fmt;

use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::tokenizer::error::TokenizerError;

/// The largest known vocabulary has 262,145 tokens.
const MAX_TOKENS: usize = 1 << 20;
const MAX_MERGES: usize = 1 << 21;
const MAX_ADDED: usize = 1 << 16;
/// Values in a normalizer or the like; a template with all of a model's special tokens has the most.
const MAX_VALUES: usize = 1 << 18;

/// The parts of the file.
#[derive(Debug, Deserialize)]
pub(super) struct File {
    #[serde(default, deserialize_with = "added")]
    pub(super) added_tokens: Vec<AddedToken>,
    #[serde(default, deserialize_with = "bounded")]
    pub(super) normalizer: Option<Value>,
    #[serde(default, deserialize_with = "bounded")]
    pub(super) pre_tokenizer: Option<Value>,
    #[serde(default, deserialize_with = "bounded")]
    pub(super) post_processor: Option<Value>,
    #[serde(default, deserialize_with = "bounded")]
    pub(super) decoder: Option<Value>,
    pub(super) model: ModelPart,
}

/// A token that is matched in text literally.
#[derive(Debug, Deserialize)]
pub(super) struct AddedToken {
    pub(super) id: u32,
    pub(super) content: String,
    #[serde(default)]
    pub(super) special: bool,
    /// White space before it is part of it.
    #[serde(default)]
    pub(super) lstrip: bool,
    /// White space behind it is part of it.
    #[serde(default)]
    pub(super) rstrip: bool,
}

/// The model of a `tokenizer.json`, which splits words into tokens.
#[derive(Debug, Deserialize)]
pub(super) struct ModelPart {
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    #[serde(default, deserialize_with = "vocab")]
    pub(super) vocab: Vec<(String, u32)>,
    #[serde(default, deserialize_with = "merges")]
    pub(super) merges: Vec<(String, String)>,
    pub(super) unk_token: Option<String>,
    #[serde(default)]
    pub(super) fuse_unk: bool,
    #[serde(default)]
    pub(super) byte_fallback: bool,
    #[serde(default)]
    pub(super) ignore_merges: bool,
    pub(super) dropout: Option<f32>,
    pub(super) continuing_subword_prefix: Option<String>,
    pub(super) end_of_word_suffix: Option<String>,
}

impl File {
    pub(super) fn parse(json: &[u8]) -> Result<Self, TokenizerError> {
        serde_json::from_slice(json).map_err(|error| TokenizerError::Json {
            message: error.to_string(),
        })
    }
}

fn too_many<E: de::Error>(what: &str, limit: usize) -> E {
    E::custom(format!("there are over {limit} {what}"))
}

/// A list of at most a number of elements.
struct List<T> {
    what: &'static str,
    limit: usize,
    element: std::marker::PhantomData<T>,
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for List<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of {}", self.what)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut list = Vec::new();
        while let Some(element) = seq.next_element()? {
            if list.len() == self.limit {
                return Err(too_many(self.what, self.limit));
            }
            list.push(element);
        }
        Ok(list)
    }
}

fn list<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
    what: &'static str,
    limit: usize,
) -> Result<Vec<T>, D::Error> {
    deserializer.deserialize_seq(List {
        what,
        limit,
        element: std::marker::PhantomData,
    })
}

fn added<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<AddedToken>, D::Error> {
    list(deserializer, "added_tokens", MAX_ADDED)
}

fn merges<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<(String, String)>, D::Error> {
    let pairs: Vec<Pair> = list(deserializer, "merges", MAX_MERGES)?;
    Ok(pairs
        .into_iter()
        .map(|Pair(left, right)| (left, right))
        .collect())
}

/// Two tokens to merge: `"a b"`, or in newer files `["a", "b"]`.
struct Pair(String, String);

impl<'de> Deserialize<'de> for Pair {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Pair;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("two tokens, as a list or with a space between")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Pair, E> {
                let pair = text
                    .split_once(' ')
                    .filter(|(_, right)| !right.contains(' '));
                pair.map(|(left, right)| Pair(left.into(), right.into()))
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Pair, A::Error> {
                let (left, right) = (seq.next_element()?, seq.next_element()?);
                let more = seq.next_element::<IgnoredAny>()?;
                match (left, right, more) {
                    (Some(left), Some(right), None) => Ok(Pair(left, right)),
                    _ => Err(de::Error::custom("a merge is not of two tokens")),
                }
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// Reads tokens with their ids. A list belongs to another type of model and is skipped: the type's error is
/// more helpful.
fn vocab<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<(String, u32)>, D::Error> {
    struct Tokens;
    impl<'de> Visitor<'de> for Tokens {
        type Value = Vec<(String, u32)>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object of tokens with their ids")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut tokens = Vec::new();
            while let Some((text, id)) = map.next_entry::<String, u32>()? {
                if tokens.len() == MAX_TOKENS {
                    return Err(too_many("tokens", MAX_TOKENS));
                }
                if id as usize >= MAX_TOKENS {
                    return Err(de::Error::custom(format!(
                        "token {text:?} has id {id}, over the limit of {MAX_TOKENS}"
                    )));
                }
                tokens.push((text, id));
            }
            // The last of two would win without a word.
            let mut seen = HashSet::with_capacity(tokens.len());
            match tokens.iter().find(|(text, _)| !seen.insert(&**text)) {
                Some((text, _)) => Err(de::Error::custom(format!("token {text:?} appears twice"))),
                None => Ok(tokens),
            }
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            while seq.next_element::<IgnoredAny>()?.is_some() {}
            Ok(Vec::new())
        }
    }
    deserializer.deserialize_any(Tokens)
}

fn bounded<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    let value = Bounded(&mut 0).deserialize(deserializer)?;
    Ok((!value.is_null()).then_some(value))
}

/// A JSON value of a limited number of values; a value takes many times the bytes of its text.
struct Bounded<'a>(&'a mut usize);

impl<'de> DeserializeSeed<'de> for Bounded<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        *self.0 += 1;
        if *self.0 > MAX_VALUES {
            return Err(too_many("values in one part", MAX_VALUES));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Bounded<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(value) = seq.next_element_seed(Bounded(self.0))? {
            list.push(value);
        }
        Ok(list.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = map.next_key()? {
            let value = map.next_value_seed(Bounded(self.0))?;
            object.insert(key, value);
        }
        Ok(object.into())
    }
}
