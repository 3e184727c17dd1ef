//! Checks the names of models in the configuration, and translates short names.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_store::names::{close_names, short_names};
use mesh_store::{Digest, local};

use super::held::Held;
use super::{is_at_hand, may_be_fetched, origin};
use crate::config::Config;
use crate::error::WorkerError;

/// The name on the hub that a short name stands for; other names are returned unchanged.
pub(super) fn long_name(name: &str) -> &str {
    short_names().get(name).map_or(name, String::as_str)
}

/// Checks the names in `config` against the models here; `held` are those in the store.
///
/// # Errors
/// If a name certainly means nothing: it is not here, and neither another worker nor the hub can have a model
/// of that name. Paths are checked when they are opened.
pub(super) fn check(
    config: &Config,
    held: &BTreeMap<Digest, Arc<Held>>,
) -> Result<(), WorkerError> {
    // Other workers may call a model as they like, but no file has the form of a short name.
    let others = config.store.peers && config.has_head();
    let may_be = |name: &String| {
        short_names().contains_key(name)
            || origin::is_name(name)
            || name.parse::<Digest>().is_ok()
            || (others && !name.contains(':'))
            || held.values().any(|held| held.is_called(name))
            || is_at_hand(name, config)
            || !may_be_fetched(name)
    };
    let mut names = config.models.iter().chain(&config.ring.models);
    let Some(name) = names.find(|name| !may_be(name)) else {
        return Ok(());
    };
    let held: Vec<Arc<Held>> = held.values().cloned().collect();
    Err(WorkerError::Unknown {
        name: name.clone(),
        hint: unknown(&like(name, config, &held)),
    })
}

/// Names that look like `name`, among the models here and the short names.
pub(super) fn like(name: &str, config: &Config, held: &[Arc<Held>]) -> Vec<String> {
    let locals = local::list(&config.folders()).unwrap_or_default();
    let locals = locals.iter().map(|model| model.name.as_str());
    let held = held.iter().map(|held| held.manifest().name.as_str());
    let short = short_names().keys().map(String::as_str);
    close_names(name, locals.chain(held).chain(short))
}

/// Message that a name is not known, with those that are `close` to it.
pub(super) fn unknown(close: &[String]) -> String {
    let close = match close {
        [] => String::new(),
        close => format!("; names like it are {}", close.join(", ")),
    };
    format!("and it is neither a short name nor one of the hub's, ORGANISATION/MODEL{close}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(name: &str) -> Config {
        Config {
            models: vec![name.to_owned()],
            head: Some("127.0.0.1:1".to_owned()),
            ..Config::default()
        }
    }

    fn refusal(config: &Config) -> Option<String> {
        let checked = check(config, &BTreeMap::new());
        checked.err().map(|error| error.to_string())
    }

    #[test]
    fn a_short_name_stands_for_one_on_the_hub() {
        let id = "bartowski/Qwen2.5-7B-Instruct-GGUF:Q4_K_M";
        assert_eq!(long_name("qwen2.5:7b"), id);
        assert_eq!(long_name(id), id);
        assert_eq!(refusal(&config("qwen2.5:7b")), None);
    }

    #[test]
    fn a_mistyped_short_name_is_refused_with_those_like_it() {
        let mistyped = config("qwen2.5:8b");
        let text = refusal(&mistyped).unwrap();
        assert!(text.contains("no model \"qwen2.5:8b\""), "{text}");
        assert!(text.contains("names like it are qwen2.5:"), "{text}");
        assert!(text.contains("qwen2.5:7b"), "{text}");
        let mut in_ring = config("org/model");
        in_ring.ring.models = vec!["qwne3:8b".to_owned()];
        let text = refusal(&in_ring).unwrap();
        assert!(text.contains("names like it are qwen3:8b"), "{text}");
    }

    #[test]
    fn a_name_that_only_other_workers_can_know_is_refused_where_there_are_none() {
        let plain = config("some-model");
        assert_eq!(refusal(&plain), None);
        let alone = Config {
            head: None,
            ..plain.clone()
        };
        let selfish = Config {
            store: crate::config::StoreConfig {
                peers: false,
                ..plain.store.clone()
            },
            ..plain
        };
        for config in [alone, selfish] {
            let text = refusal(&config).unwrap();
            assert!(text.contains("no model \"some-model\""), "{text}");
        }
        for name in [
            "org/model",
            "/srv/model.gguf",
            "model.gguf",
            &"a1".repeat(32),
        ] {
            let alone = Config {
                head: None,
                ..config(name)
            };
            assert_eq!(refusal(&alone), None, "{name}");
        }
    }
}
