//! Values with units in configuration files: durations (`"10s"`, `"500ms"`) and sizes (`"64MiB"`).
//!
//! Use them as `#[serde(with = "mesh_service::config::units::duration")]`; a bare number is in seconds or bytes.

/// A [`std::time::Duration`], as [`mesh_base::units::parse_duration`] reads it.
pub mod duration {
    use std::time::Duration;

    use mesh_base::units;
    use serde::de::{Deserializer, Error};
    use serde::ser::Serializer;

    use super::Quantity;

    /// For `#[serde(with)]`.
    pub fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&units::format_duration(*duration))
    }

    /// For `#[serde(with)]`.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let read = match deserializer
            .deserialize_any(Quantity("a duration such as \"10s\" or \"500ms\""))?
        {
            Ok(seconds) => units::seconds(seconds).ok_or_else(|| units::invalid_duration(seconds)),
            Err(text) => units::parse_duration(&text),
        };
        read.map_err(D::Error::custom)
    }
}

/// A number of bytes as `u64`, as [`mesh_base::units::parse_bytes`] reads it.
pub mod bytes {
    use mesh_base::units;
    use serde::de::{Deserializer, Error};
    use serde::ser::Serializer;

    use super::Quantity;

    /// For `#[serde(with)]`.
    pub fn serialize<S: Serializer>(bytes: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&units::format_bytes(*bytes))
    }

    /// For `#[serde(with)]`.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let read = match deserializer.deserialize_any(Quantity("a size such as \"64MiB\""))? {
            Ok(number) => units::bytes(number).ok_or_else(|| units::invalid_bytes(number)),
            Err(text) => units::parse_bytes(&text),
        };
        read.map_err(D::Error::custom)
    }
}

/// [`bytes`] for keys that may be absent.
pub mod optional_bytes {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Deserialize, Serialize)]
    struct Present(#[serde(with = "super::bytes")] u64);

    /// For `#[serde(with)]`.
    pub fn serialize<S: Serializer>(value: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
        value.map(Present).serialize(serializer)
    }

    /// For `#[serde(with)]`.
    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<u64>, D::Error> {
        Ok(Option::deserialize(deserializer)?.map(|Present(bytes)| bytes))
    }
}

/// Takes a bare number as `Ok`, text as `Err`.
struct Quantity(&'static str);

impl serde::de::Visitor<'_> for Quantity {
    type Value = Result<f64, String>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Ok(value as f64))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Ok(value as f64))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        Ok(Ok(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
        Ok(Err(value.to_owned()))
    }
}
