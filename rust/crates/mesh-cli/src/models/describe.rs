//! What a model is, by what its files say.

use std::path::{Path, PathBuf};

use mesh_model::{GgmlType, Model};
use mesh_store::{Manifest, SignedManifest, Store, StoredModel, Verdict};
use serde_json::{Value, json};

/// What is opened to look at a model of the store: its only GGUF file, or its folder.
pub(super) fn to_open(store: &Store, model: &StoredModel) -> Option<PathBuf> {
    let folder = store.folder(&model.fingerprint).ok()?;
    Some(match &model.signed.manifest.files[..] {
        [only] => folder.join(only.relative_path()),
        _ => folder,
    })
}

/// Facts about the model at `path`, or why it cannot be served.
pub(super) fn facts(path: &Path) -> Result<Vec<(&'static str, Value)>, String> {
    let model = Model::open(path).map_err(|error| error.kind.to_string())?;
    let config = model.config();
    Ok(vec![
        ("title", json!(config.name)),
        ("architecture", json!(config.architecture.name())),
        ("parameters", json!(config.parameters())),
        ("weights", json!(weight_format(&model))),
        ("context", json!(config.context)),
        ("layers", json!(config.layers)),
        ("hidden", json!(config.hidden)),
        ("heads", json!(config.heads)),
        ("kv_heads", json!(config.kv_heads)),
        ("vocabulary", json!(model.tokenizer().vocab_size())),
        ("chat_template", json!(!model.template().is_fallback())),
    ])
}

/// One of the facts.
pub(super) fn fact(facts: &[(&str, Value)], key: &str) -> Option<Value> {
    facts
        .iter()
        .find(|(known, _)| *known == key)
        .map(|(_, value)| value.clone())
}

/// The format that most weight bytes have.
fn weight_format(model: &Model) -> String {
    let mut formats: Vec<(GgmlType, usize)> = Vec::new();
    for tensor in model.gguf().tensors() {
        match formats.iter_mut().find(|(ty, _)| *ty == tensor.ty) {
            Some((_, total)) => *total += tensor.data.len(),
            None => formats.push((tensor.ty, tensor.data.len())),
        }
    }
    formats
        .into_iter()
        .max_by_key(|(_, total)| *total)
        .map_or_else(String::new, |(ty, _)| format!("{ty:?}"))
}

/// Ids of the keys that signed, unchecked.
pub(super) fn signers(signed: &SignedManifest) -> Vec<String> {
    let keys = signed.signatures.iter();
    keys.map(|signature| signature.key.to_string()).collect()
}

/// For people.
pub(super) fn verdict(verdict: Verdict) -> String {
    match verdict {
        Verdict::Signed { key } => format!("signed by the trusted key {}", key.short()),
        Verdict::Stranger => "signed, by no key that is trusted".to_owned(),
        Verdict::Unsigned => "not signed".to_owned(),
    }
}

/// Layers of which every byte is there, such as `0-11, 24-29`; none where the manifest knows no layers.
pub(super) fn whole_layers(
    store: &Store,
    fingerprint: &mesh_store::Digest,
    manifest: &Manifest,
) -> Option<String> {
    let total = manifest.layers();
    if total == 0 {
        return None;
    }
    let mut whole = vec![true; total as usize];
    for file in &manifest.files {
        let have = store.presence(fingerprint, file).have;
        for tensor in &file.tensors {
            if let Some(layer) = tensor.layer
                && !have.contains(&tensor.range())
            {
                whole[layer as usize] = false;
            }
        }
    }
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for layer in (0..total).filter(|&layer| whole[layer as usize]) {
        match ranges.last_mut() {
            Some((_, end)) if *end + 1 == layer => *end = layer,
            _ => ranges.push((layer, layer)),
        }
    }
    let ranges: Vec<String> = ranges
        .into_iter()
        .map(|(start, end)| match start == end {
            true => start.to_string(),
            false => format!("{start}-{end}"),
        })
        .collect();
    Some(match ranges.is_empty() {
        true => "none".to_owned(),
        false => ranges.join(", "),
    })
}
