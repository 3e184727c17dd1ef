//! Judges whether a model is what its name says: the worker that offers a file is not believed about that.
//!
//! These count, in this order: an operator's pin at the head; the hub, which lists a model's files in a few
//! kilobytes, wherever their bytes come from; where it does not, a signature of a key that the operator
//! trusts; else the pin that the head keeps for the name. A model that none of them vouches for is not taken
//! under that name.

use mesh_hub::HubName;
use mesh_proto::ModelSources;
use mesh_store::{Digest, Manifest, SignedManifest, Verdict};

use crate::names::is_hub_name;
use crate::rules::Rules;

/// A model's name that is vouched for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vouched<U> {
    /// The party that vouches, for people.
    pub by: String,
    /// Files whose content has yet to be compared with the hub's list.
    pub unchecked: Vec<U>,
}

/// Reasons for which a model is not taken under a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Doubt {
    /// The name stands for another model.
    Other(String),
    /// No party vouches for the name.
    Nobody(String),
}

/// The hub's answer about a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubAnswer<U> {
    /// Commit that the answer is about.
    pub commit: String,
    /// The files of the manifest that the answer does not settle, or the difference between the two.
    pub compared: Result<Vec<U>, String>,
}

/// True if the hub's answer counts for this name and manifest, so that it has to be asked.
pub(crate) fn needs_hub(name: &str, told: Option<&ModelSources>, rules: &Rules) -> bool {
    let pinned = told.is_some_and(|told| told.pinned_by_operator);
    !pinned && is_hub_name(name) && rules.hub && !rules.policy.requires_signature()
}

/// Finds a party that vouches that the model with this manifest is called `name`. `told` is the head's answer
/// about that name, `hub` the hub's, where it counts, or the reason why it does not answer.
///
/// # Errors
/// The doubt that is left.
pub fn judge<U>(
    name: &str,
    signed: &SignedManifest,
    told: Option<&ModelSources>,
    hub: Option<Result<HubAnswer<U>, String>>,
    rules: &Rules,
) -> Result<Vouched<U>, Doubt> {
    let manifest = &signed.manifest;
    let fingerprint = manifest.fingerprint();
    let verdict = rules.policy.check(signed);
    // Signatures may come later.
    let verdict = verdict.map_err(|error| Doubt::Nobody(error.to_string()))?;
    let vouched = |by: String| Vouched {
        by,
        unchecked: Vec::new(),
    };
    if let Ok(wanted) = name.parse::<Digest>() {
        return match wanted == fingerprint {
            true => Ok(vouched("it is asked for by its fingerprint".to_owned())),
            false => Err(Doubt::Other(format!("its fingerprint is {fingerprint}"))),
        };
    }
    if let Some(told) = told.filter(|told| told.pinned_by_operator) {
        return match told.pin == fingerprint.to_string() {
            true => Ok(vouched("the operator's pin at the head".to_owned())),
            false => Err(Doubt::Nobody(format!(
                "an operator pinned {name} to another model, {:.12}: `hydramesh models pins release {name}` lets the hub or a signature \
                 decide again",
                told.pin
            ))),
        };
    }
    let mut tried = Vec::new();
    match hub.filter(|_| needs_hub(name, told, rules)) {
        Some(Ok(HubAnswer { commit, compared })) => {
            let unchecked = compared.map_err(|reason| {
                Doubt::Other(format!(
                    "the hub has another model under this name (commit {commit:.12}): {reason}"
                ))
            })?;
            let by = format!("the hub, commit {commit}");
            return Ok(Vouched { by, unchecked });
        }
        Some(Err(reason)) => tried.push(format!("the hub does not say ({reason})")),
        // The operator's word counts alone.
        None if rules.policy.requires_signature() => {}
        None if is_hub_name(name) => tried.push("`store.hub` forbids to ask the hub".to_owned()),
        None => {}
    }
    match verdict {
        Verdict::Signed { key } if may_be_called(name, manifest) => {
            return Ok(vouched(format!("the signature of key {}", key.short())));
        }
        Verdict::Signed { .. } => tried.push(format!(
            "a trusted key signed it as {:?}, from which it cannot be seen that it is {name}",
            manifest.name
        )),
        Verdict::Stranger => tried.push("no trusted key signed it".to_owned()),
        Verdict::Unsigned => tried.push("it is not signed".to_owned()),
    }
    match told {
        Some(told) if told.disputed => {
            tried.push("the head knows several models that claim this name".to_owned());
        }
        Some(told) if told.pin == fingerprint.to_string() => {
            return Ok(vouched("the pin at the head".to_owned()));
        }
        Some(told) if told.pin.is_empty() => {
            tried.push("the head keeps no pin for this name".to_owned());
        }
        Some(told) => tried.push(format!("the head's pin is another model, {:.12}", told.pin)),
        None => tried.push("the head has said nothing of it".to_owned()),
    }
    Err(Doubt::Nobody(format!(
        "nobody vouches that the model {} is {name}: {}. Let this worker reach the hub, sign the model (`hydramesh models sign`) with a key \
         of `store.trusted_keys`, or pin it (`hydramesh models pins set {name} {fingerprint}`)",
        fingerprint.short(),
        tried.join("; "),
    )))
}

/// True if a signed manifest may be the model `name`: a signature covers the name and the files, not the name
/// on the hub. So that a signed model cannot be passed off as another signed one, its files have to be called
/// as that name says.
fn may_be_called(name: &str, manifest: &Manifest) -> bool {
    let Ok(hub) = name.parse::<HubName>() else {
        return manifest.name.eq_ignore_ascii_case(name);
    };
    let plain = |text: &str| -> String {
        let text = text.rsplit('/').next().unwrap_or(text).to_ascii_lowercase();
        let text = text.strip_suffix("-gguf").unwrap_or(&text);
        text.chars().filter(char::is_ascii_alphanumeric).collect()
    };
    let model = plain(&hub.repo);
    let called = plain(&manifest.name).starts_with(&model);
    match &hub.which {
        None => called,
        Some(file) if manifest.files.iter().any(|held| held.path == *file) => true,
        Some(which) => called && plain(&manifest.name)[model.len()..] == plain(which),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{manifest, rules};

    const NAME: &str = "acme/m";

    type Answer = Result<HubAnswer<u32>, String>;

    fn judged(
        told: Option<&ModelSources>,
        hub: Option<Answer>,
        rules: &Rules,
    ) -> Result<Vouched<u32>, Doubt> {
        judge(
            NAME,
            &SignedManifest::unsigned(manifest("m", 1)),
            told,
            hub,
            rules,
        )
    }

    fn says(compared: Result<Vec<u32>, String>) -> Option<Answer> {
        let commit = "c".repeat(40);
        Some(Ok(HubAnswer { commit, compared }))
    }

    #[test]
    fn a_signed_model_is_not_passed_off_as_another_one() {
        let mut qwen = manifest("Qwen3-0.6B-Q8_0", 1);
        "Qwen3-0.6B-Q8_0.gguf".clone_into(&mut qwen.files[0].path);
        for name in [
            "Qwen/Qwen3-0.6B-GGUF:Q8_0",
            "Qwen/Qwen3-0.6B-GGUF:Qwen3-0.6B-Q8_0.gguf",
            "Qwen/Qwen3-0.6B-GGUF",
            "qwen3-0.6b-q8_0",
        ] {
            assert!(may_be_called(name, &qwen), "{name}");
        }
        for name in [
            "Qwen/Qwen3-0.6B-GGUF:Q4_0",
            "Qwen/Qwen3-8B-GGUF:Q8_0",
            "Qwen/Qwen3-0.6B-GGUF:other.gguf",
            "meta/Llama-3-8B",
            "qwen3",
        ] {
            assert!(!may_be_called(name, &qwen), "{name}");
        }
    }

    #[test]
    fn an_operators_pin_counts_before_the_hub() {
        let fingerprint = manifest("m", 1).fingerprint().to_string();
        let mut told = ModelSources {
            pin: fingerprint.clone(),
            ..ModelSources::default()
        };
        let refuted = || says(Err("a file differs".to_owned()));
        let doubt = judged(Some(&told), refuted(), &rules()).unwrap_err();
        assert!(matches!(doubt, Doubt::Other(_)), "{doubt:?}");
        told.pinned_by_operator = true;
        assert!(!needs_hub(NAME, Some(&told), &rules()));
        let vouched = judged(Some(&told), refuted(), &rules()).unwrap();
        assert_eq!(vouched.by, "the operator's pin at the head");
        told.pin = "a".repeat(64);
        // The hub does not say otherwise: nobody is to hear that it refutes this model.
        let doubt = judged(Some(&told), refuted(), &rules()).unwrap_err();
        assert!(matches!(doubt, Doubt::Nobody(_)), "{doubt:?}");
    }

    #[test]
    fn the_hub_counts_before_the_heads_pin_and_its_silence_does_not() {
        let told = ModelSources {
            pin: manifest("m", 1).fingerprint().to_string(),
            ..ModelSources::default()
        };
        let vouched = judged(Some(&told), says(Ok(vec![3])), &rules()).unwrap();
        assert!(vouched.by.starts_with("the hub, commit c"), "{vouched:?}");
        assert_eq!(vouched.unchecked, [3]);
        let silent = || Some(Err("no route".to_owned()));
        let vouched = judged(Some(&told), silent(), &rules()).unwrap();
        assert_eq!(vouched.by, "the pin at the head");
        let doubt = judged(None, silent(), &rules()).unwrap_err();
        let Doubt::Nobody(text) = doubt else {
            panic!("{doubt:?}");
        };
        assert!(text.contains("the hub does not say (no route)"), "{text}");
        assert!(text.contains("the head has said nothing of it"), "{text}");
    }

    #[test]
    fn a_wrong_or_disputed_pin_vouches_for_nothing() {
        let own = manifest("m", 1).fingerprint().to_string();
        let alone = Rules {
            hub: false,
            ..rules()
        };
        for (pin, disputed, why) in [
            (own.clone(), true, "several models that claim this name"),
            (String::new(), false, "keeps no pin"),
            (
                "b".repeat(64),
                false,
                "the head's pin is another model, bbbbbbbbbbbb",
            ),
        ] {
            let told = ModelSources {
                pin,
                disputed,
                ..ModelSources::default()
            };
            let Err(Doubt::Nobody(text)) = judged(Some(&told), None, &alone) else {
                panic!("{told:?} is believed");
            };
            assert!(text.contains(why), "{text}");
            assert!(text.contains("forbids to ask the hub"), "{text}");
        }
    }

    #[test]
    fn a_fingerprint_as_a_name_means_that_model_only() {
        let signed = SignedManifest::unsigned(manifest("m", 1));
        let own = signed.manifest.fingerprint().to_string();
        let judged = |name: &str| judge::<u32>(name, &signed, None, None, &rules());
        assert!(judged(&own).is_ok());
        assert!(matches!(judged(&"a".repeat(64)), Err(Doubt::Other(_))));
    }
}
