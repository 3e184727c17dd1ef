//! Names of models: which ones may be fetched, and what a short name stands for.

use mesh_hub::HubName;
use mesh_store::names::{close_names, short_names};

/// True if a name has the form of a hub name.
pub fn is_hub_name(name: &str) -> bool {
    name.parse::<HubName>().is_ok()
}

/// True if `name` is a short name.
pub fn is_short_name(name: &str) -> bool {
    short_names().contains_key(name)
}

/// The name on the hub that a short name stands for; other names are returned unchanged.
pub fn long_name(name: &str) -> &str {
    short_names().get(name).map_or(name, String::as_str)
}

/// True if a name without a meaning on this machine may mean a model of the mesh or of the hub. A name that
/// looks like a file's path does not: it is a mistake that should show at once.
pub fn may_be_fetched(name: &str) -> bool {
    let is_path = name.starts_with(['/', '.', '~']);
    let plain = name.to_ascii_lowercase();
    let is_file = plain.ends_with(".gguf") || plain.ends_with(".safetensors");
    !is_path && (!is_file || name.contains(':'))
}

/// Message that a name is not known, with the `known` names and the short names that are close to it.
pub fn unknown<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    let short = short_names().keys().map(String::as_str);
    let close = match &close_names(name, known.chain(short))[..] {
        [] => String::new(),
        close => format!("; names like it are {}", close.join(", ")),
    };
    format!("and it is neither a short name nor one of the hub's, ORGANISATION/MODEL{close}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_models_are_told_from_paths() {
        for name in ["org/model", "org/model:Q4_K_M", "qwen2.5:7b", "smollm2"] {
            assert!(may_be_fetched(name), "{name}");
        }
        for path in [
            "/srv/m.gguf",
            "./m.gguf",
            "~/m",
            "m.gguf",
            "../m",
            "dir/M.GGUF",
        ] {
            assert!(!may_be_fetched(path), "{path}");
        }
    }

    #[test]
    fn a_short_name_stands_for_one_on_the_hub() {
        let id = "bartowski/Qwen2.5-7B-Instruct-GGUF:Q4_K_M";
        assert_eq!(long_name("qwen2.5:7b"), id);
        assert_eq!(long_name(id), id);
        assert!(is_short_name("qwen2.5:7b") && !is_short_name(id) && is_hub_name(id));
    }

    #[test]
    fn an_unknown_name_comes_with_those_like_it() {
        let text = unknown("smolm2", ["smollm2"].into_iter());
        assert!(text.contains("names like it are smollm2"), "{text}");
        assert!(!unknown("zzzzzzzz", std::iter::empty()).contains("like it"));
    }
}
