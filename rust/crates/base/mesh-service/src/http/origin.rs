//! Origins of web pages, as operators name them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The origin of web pages that may use a service: `scheme://host[:port]`, or `*` for all pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(String);

/// Text that is not an origin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not an origin; write it as https://chat.example.org, without a path, or * for all pages"
)]
pub struct NotAnOrigin(String);

impl Origin {
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Origin {
    type Err = NotAnOrigin;

    fn from_str(text: &str) -> Result<Self, NotAnOrigin> {
        let origin = text.trim().trim_end_matches('/').to_ascii_lowercase();
        let is_one = match origin.split_once("://") {
            Some((scheme, host)) => {
                !scheme.is_empty()
                    && !host.is_empty()
                    && host
                        .bytes()
                        .all(|byte| byte.is_ascii_graphic() && !b"/?#@*".contains(&byte))
            }
            None => origin == "*" || origin == "null",
        };
        if is_one {
            Ok(Self(origin))
        } else {
            Err(NotAnOrigin(text.to_owned()))
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for Origin {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Origin {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_read_and_anything_else_is_refused() {
        for (text, origin) in [
            ("https://Chat.Example.org/", "https://chat.example.org"),
            ("http://localhost:3000", "http://localhost:3000"),
            ("tauri://localhost", "tauri://localhost"),
            ("*", "*"),
        ] {
            assert_eq!(text.parse::<Origin>().unwrap().to_string(), origin);
        }
        for wrong in [
            "",
            "chat.example.org",
            "https://",
            "https://a/b",
            "https://*.example.org",
            "://x",
        ] {
            assert!(wrong.parse::<Origin>().is_err(), "{wrong}");
        }
    }
}
