//! Values with units in configuration files: durations (`"10s"`, `"500ms"`) and sizes (`"64MiB"`).
//!
//! Use them as `#[serde(with = "mesh_service::config::units::duration")]`; a bare number is in seconds or bytes.

/// A [`std::time::Duration`]: `"250us"`, `"500ms"`, `"2.5s"`, `"10 min"`, `"1h"`, `"7d"`, or a number of seconds.
pub mod duration {
    use std::time::Duration;

    use serde::de::{Deserializer, Error};
    use serde::ser::Serializer;

    use super::{Quantity, split_unit};

    /// Parses the text form.
    pub fn parse(text: &str) -> Result<Duration, String> {
        let (number, unit) = split_unit(text).ok_or_else(|| expected(text))?;
        let seconds = match unit {
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "" | "s" | "sec" => 1.0,
            "m" | "min" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            _ => return Err(expected(text)),
        };
        Duration::try_from_secs_f64(number * seconds).map_err(|_| expected(text))
    }

    /// The shortest text form in one unit.
    pub fn format(duration: Duration) -> String {
        let micros = duration.as_micros();
        match micros {
            0 => "0s".to_owned(),
            _ if micros.is_multiple_of(1_000_000) => format!("{}s", micros / 1_000_000),
            _ if micros.is_multiple_of(1_000) => format!("{}ms", micros / 1_000),
            _ => format!("{micros}us"),
        }
    }

    /// For `#[serde(with)]`.
    pub fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format(*duration))
    }

    /// For `#[serde(with)]`.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        match deserializer.deserialize_any(Quantity("a duration such as \"10s\" or \"500ms\""))? {
            Ok(seconds) => Duration::try_from_secs_f64(seconds)
                .map_err(|_| D::Error::custom(expected(seconds))),
            Err(text) => parse(&text).map_err(D::Error::custom),
        }
    }

    fn expected(got: impl std::fmt::Display) -> String {
        format!("expected a duration such as \"10s\" or \"500ms\", got `{got}`")
    }
}

/// A number of bytes as `u64`: `"512KiB"`, `"64 MiB"`, `"1.5GiB"`, `"2GB"`, or a number.
pub mod bytes {
    use serde::de::{Deserializer, Error};
    use serde::ser::Serializer;

    use super::{Quantity, split_unit};

    /// Parses the text form.
    pub fn parse(text: &str) -> Result<u64, String> {
        let (number, unit) = split_unit(text).ok_or_else(|| expected(text))?;
        let factor = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 1.0,
            "k" | "kb" => 1e3,
            "m" | "mb" => 1e6,
            "g" | "gb" => 1e9,
            "t" | "tb" => 1e12,
            "ki" | "kib" => f64::from(1 << 10),
            "mi" | "mib" => f64::from(1 << 20),
            "gi" | "gib" => f64::from(1 << 30),
            "ti" | "tib" => f64::from(1 << 30) * 1024.0,
            _ => return Err(expected(text)),
        };
        whole(number * factor).ok_or_else(|| expected(text))
    }

    /// The shortest exact text form.
    pub fn format(bytes: u64) -> String {
        let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
        match units
            .iter()
            .find(|(size, _)| bytes >= *size && bytes.is_multiple_of(*size))
        {
            Some((size, unit)) => format!("{}{unit}", bytes / size),
            None => format!("{bytes}B"),
        }
    }

    /// For `#[serde(with)]`.
    pub fn serialize<S: Serializer>(bytes: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format(*bytes))
    }

    /// For `#[serde(with)]`.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        match deserializer.deserialize_any(Quantity("a size such as \"64MiB\""))? {
            Ok(number) => whole(number).ok_or_else(|| D::Error::custom(expected(number))),
            Err(text) => parse(&text).map_err(D::Error::custom),
        }
    }

    fn whole(number: f64) -> Option<u64> {
        // 2^53: beyond it an f64 no longer tells neighbouring integers apart.
        (0.0..=9_007_199_254_740_992.0)
            .contains(&number)
            .then_some(number.round() as u64)
    }

    fn expected(got: impl std::fmt::Display) -> String {
        format!("expected a size such as \"64MiB\", got `{got}`")
    }
}

/// The same units for keys that may be absent: `#[serde(with = "…::units::optional_duration")]`.
pub mod optional_duration {
    use std::time::Duration;

    use serde::de::{Deserialize, Deserializer};
    use serde::ser::Serializer;

    #[derive(serde::Deserialize)]
    struct Present(#[serde(with = "super::duration")] Duration);

    /// For `#[serde(with)]`.
    pub fn serialize<S: Serializer>(
        duration: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match duration {
            Some(duration) => serializer.serialize_some(&super::duration::format(*duration)),
            None => serializer.serialize_none(),
        }
    }

    /// For `#[serde(with)]`.
    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<Present>::deserialize(deserializer)?.map(|present| present.0))
    }
}

/// The same units for keys that may be absent: `#[serde(with = "…::units::optional_bytes")]`.
pub mod optional_bytes {
    use serde::de::{Deserialize, Deserializer};
    use serde::ser::Serializer;

    #[derive(serde::Deserialize)]
    struct Present(#[serde(with = "super::bytes")] u64);

    /// For `#[serde(with)]`.
    pub fn serialize<S: Serializer>(bytes: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
        match bytes {
            Some(bytes) => serializer.serialize_some(&super::bytes::format(*bytes)),
            None => serializer.serialize_none(),
        }
    }

    /// For `#[serde(with)]`.
    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<u64>, D::Error> {
        Ok(Option::<Present>::deserialize(deserializer)?.map(|present| present.0))
    }
}

/// `"1.5 GiB"` into 1.5 and `"GiB"`.
fn split_unit(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '_'))
        .unwrap_or(text.len());
    let number = text[..end].replace('_', "").parse().ok()?;
    Some((number, text[end..].trim()))
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    #[test]
    fn durations_are_read_in_every_unit_and_written_back() {
        for (text, expected) in [
            ("250us", Duration::from_micros(250)),
            ("500ms", Duration::from_millis(500)),
            ("2.5 s", Duration::from_millis(2500)),
            ("10", Duration::from_secs(10)),
            ("2min", Duration::from_secs(120)),
            ("7d", Duration::from_secs(604_800)),
            ("0s", Duration::ZERO),
        ] {
            let parsed = super::duration::parse(text).expect(text);
            assert_eq!(parsed, expected, "{text}");
            assert_eq!(
                super::duration::parse(&super::duration::format(parsed)),
                Ok(expected)
            );
        }
        for text in ["", "s", "-1s", "1 fortnight", "1e999s", "..s"] {
            assert!(super::duration::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_read_in_every_unit_and_written_back() {
        for (text, expected) in [
            ("17", 17),
            ("64MiB", 64 << 20),
            ("1.5 GiB", 3 << 29),
            ("2GB", 2_000_000_000),
            ("512k", 512_000),
        ] {
            let parsed = super::bytes::parse(text).expect(text);
            assert_eq!(parsed, expected, "{text}");
            assert_eq!(
                super::bytes::parse(&super::bytes::format(parsed)),
                Ok(expected)
            );
        }
        for text in ["", "MiB", "-1", "3 bananas", "99999999TiB"] {
            assert!(super::bytes::parse(text).is_err(), "{text}");
        }
    }
}
