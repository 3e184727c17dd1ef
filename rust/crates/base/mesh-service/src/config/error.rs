//! Errors of a configuration, worded for the person who wrote it.

use std::path::PathBuf;

use strsim::osa_distance;

use super::tree::ValueOrigin;

/// Errors that make a configuration unusable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read configuration file {}: {source}", path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Error from the operating system.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{} is not valid TOML: {reason}", path.display())]
    Syntax {
        /// Path of the file.
        path: PathBuf,
        /// Position and reason, from the TOML parser.
        reason: String,
    },
    /// A key that the service does not have.
    #[error("unknown key `{key}` ({origin}){}", hint(nearest.as_deref(), valid))]
    UnknownKey {
        /// Dotted path of the key.
        key: String,
        /// Layer that set the key.
        origin: ValueOrigin,
        /// The most similar key that exists, if any is similar.
        nearest: Option<String>,
        /// The keys that exist at that place.
        valid: Vec<String>,
    },
    /// A value that the key cannot take.
    #[error("`{key}` ({origin}): {reason}")]
    Value {
        /// Dotted path of the key; empty for the whole configuration.
        key: String,
        /// Layer that set the value.
        origin: ValueOrigin,
        /// Description of the expected value.
        reason: String,
    },
    /// An argument of `--set` without `=`.
    #[error("--set takes KEY=VALUE, got `{0}`")]
    Assignment(String),
    /// An environment variable that is not UTF-8.
    #[error("environment variable {0} is not UTF-8")]
    NotUtf8(String),
    /// A configuration that TOML cannot express (a bug in the configuration type).
    #[error("the configuration cannot be written as TOML: {0}")]
    Unprintable(#[from] toml::ser::Error),
}

fn hint(nearest: Option<&str>, valid: &[String]) -> String {
    match nearest {
        Some(key) => format!("; did you mean `{key}`?"),
        None if valid.is_empty() => String::new(),
        None => format!("; valid keys here: {}", valid.join(", ")),
    }
}

/// The candidate most similar to `key`, when it is similar enough to be a slip of the pen or a misplaced name.
pub(super) fn nearest_key(key: &str, siblings: &[String], known: &[String]) -> Option<String> {
    let distance_in_place = |candidate: &&String| osa_distance(key, candidate);
    let close_enough = last_segment(key).len().div_ceil(3).max(2);
    let sibling = siblings.iter().min_by_key(distance_in_place);
    if let Some(best) = sibling.filter(|best| osa_distance(key, best) <= close_enough) {
        return Some(best.clone());
    }
    let distance_of_names =
        |candidate: &&String| osa_distance(last_segment(key), last_segment(candidate));
    let similar = known.iter().filter(|known| distance_of_names(known) <= 1);
    similar
        .min_by_key(|known| (distance_of_names(known), known.len()))
        .cloned()
}

fn last_segment(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_key_prefers_siblings_then_finds_misplaced_names() {
        let siblings = [
            "http".to_owned(),
            "quic".to_owned(),
            "worker_timeout".to_owned(),
        ];
        let known = ["http.listen".to_owned(), "worker_timeout".to_owned()];
        assert_eq!(
            nearest_key("worker_timout", &siblings, &known).as_deref(),
            Some("worker_timeout")
        );
        assert_eq!(
            nearest_key("htpt", &siblings, &known).as_deref(),
            Some("http"),
            "two letters swapped"
        );
        assert_eq!(
            nearest_key("listen", &siblings, &known).as_deref(),
            Some("http.listen")
        );
        assert_eq!(nearest_key("colour_of_the_sky", &siblings, &known), None);
    }
}
