//! Checks the names of models in the configuration.

use std::path::PathBuf;

use mesh_store::{Digest, LocalError, local};
use mesh_worker_core::Catalogue;
use mesh_worker_core::names::{is_hub_name, is_short_name, may_be_fetched, unknown};

use crate::config::Config;
use crate::error::WorkerError;

/// The file or folder that a name in the configuration means.
pub(crate) fn path_of(name: &str, config: &Config) -> Result<PathBuf, LocalError> {
    let folders = config.folders();
    let encoder = mesh_model::encoder::find(name, &folders);
    let found = encoder.or_else(|| mesh_model::image::find(name, &folders));
    found.map_or_else(|| local::resolve(name, &folders), Ok)
}

pub(crate) fn is_at_hand(name: &str, config: &Config) -> bool {
    path_of(name, config).is_ok()
}

/// Checks the names in `config` against the models here; `catalogue` has those in the store.
///
/// # Errors
/// If a name certainly means nothing: it is not here, and neither another worker nor the hub can have a model
/// of that name. Paths are checked when they are opened.
pub(super) fn check(config: &Config, catalogue: &Catalogue) -> Result<(), WorkerError> {
    // Other workers may call a model as they like, but no file has the form of a short name.
    let others = config.store.peers && config.has_head();
    let may_be = |name: &String| {
        is_short_name(name)
            || is_hub_name(name)
            || name.parse::<Digest>().is_ok()
            || (others && !name.contains(':'))
            || catalogue.has_called(name)
            || is_at_hand(name, config)
            || !may_be_fetched(name)
    };
    let mut names = config.models.iter().chain(&config.ring.models);
    let Some(name) = names.find(|name| !may_be(name)) else {
        return Ok(());
    };
    let nearby = nearby(config);
    let known = nearby.iter().map(String::as_str);
    Err(WorkerError::Unknown {
        name: name.clone(),
        hint: unknown(name, known.chain(catalogue.manifest_names())),
    })
}

pub(super) fn nearby(config: &Config) -> Vec<String> {
    let models = local::list(&config.folders()).unwrap_or_default();
    models.into_iter().map(|model| model.name).collect()
}

#[cfg(test)]
mod tests {
    use mesh_worker_core::Rules;

    use super::*;

    fn config(name: &str) -> Config {
        Config {
            models: vec![name.to_owned()],
            head: Some("127.0.0.1:1".to_owned()),
            ..Config::default()
        }
    }

    fn refusal(config: &Config) -> Option<String> {
        let checked = check(config, &Catalogue::new(Rules::default(), []));
        checked.err().map(|error| error.to_string())
    }

    #[test]
    fn a_mistyped_short_name_is_refused_with_those_like_it() {
        assert_eq!(refusal(&config("qwen2.5:7b")), None);
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
