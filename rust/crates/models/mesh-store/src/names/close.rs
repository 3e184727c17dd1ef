//! Suggestions of similar names.

use strsim::osa_distance;

/// The names in `known` similar to `name`, the closest first: a few letters differ, or one is a prefix. Case
/// does not count.
pub fn close_names<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let name = name.to_lowercase();
    // Of longer names more may be wrong.
    let limit = (name.chars().count() / 4).clamp(1, 4);
    let mut close: Vec<(usize, &str)> = Vec::new();
    for known in known {
        let lower = known.to_lowercase();
        let begins = stem(&lower) == stem(&name) || (name.len() > 2 && lower.starts_with(&name));
        // Letters that are inserted, removed, replaced or swapped with their neighbour.
        let distance = osa_distance(&name, &lower);
        if (distance <= limit || begins) && !close.iter().any(|(_, other)| *other == known) {
            close.push((distance, known));
        }
    }
    close.sort();
    let names = close.into_iter().take(MOST).map(|(_, name)| name);
    names.map(str::to_owned).collect()
}

/// A short name without its size: `qwen2.5` of `qwen2.5:7b`.
fn stem(name: &str) -> &str {
    name.split(':').next().unwrap_or(name)
}

/// More would hide the one that was meant.
const MOST: usize = 6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_have_been_meant_is_named_the_closest_first() {
        let known = ["qwen2.5:7b", "qwen2.5:14b", "qwen3:8b", "smollm2:135m"];
        let close = |name| close_names(name, known);
        assert_eq!(close("qwen2.5:7B"), ["qwen2.5:7b", "qwen2.5:14b"]);
        assert_eq!(close("qwen2.5:8b")[0], "qwen2.5:7b");
        assert_eq!(close("qwne3:8b"), ["qwen3:8b"]);
        assert_eq!(close("smolm2:135m"), ["smollm2:135m"]);
        assert_eq!(close("smollm2"), ["smollm2:135m"]);
        assert!(close("mixtral:8x7b").is_empty());
        assert!(close("").is_empty());
    }
}
