//! Describes a model from its files.

use std::fmt::Debug;
use std::path::{Path, PathBuf};

use mesh_engine_ort::WeightFormat;
use mesh_model::encoder::Pooling;
use mesh_model::{EncoderModel, Model, encoder};
use mesh_store::{Manifest, SignedManifest, Store, StoredModel, Verdict};
use serde_json::{Value, json};

/// The path to open for a model of the store.
pub(super) fn to_open(store: &Store, model: &StoredModel) -> Option<PathBuf> {
    let folder = store.folder(&model.fingerprint).ok()?;
    Some(model.signed.manifest.path_in(&folder))
}

/// Facts about the model at `path`, or why it cannot be served.
pub(super) fn facts(path: &Path) -> Result<Vec<(&'static str, Value)>, String> {
    if path.is_dir() && encoder::is_encoder(path) {
        let model = EncoderModel::open(path).map_err(|error| error.to_string())?;
        return Ok(embedding_facts(&model));
    }
    let model = Model::open(path).map_err(|error| error.kind.to_string())?;
    let config = model.config();
    let tensors = model.tensors().iter();
    let weights = tensors.map(|tensor| (tensor.ty, tensor.data.len()));
    Ok(vec![
        ("title", json!(config.name)),
        ("purpose", json!("chat")),
        ("architecture", json!(config.architecture.name())),
        ("parameters", json!(config.parameters())),
        // The format that most weight bytes have.
        ("weights", json!(most_bytes(weights))),
        ("memory_bytes", json!(in_memory(&model))),
        ("context", json!(config.context)),
        ("layers", json!(config.layers)),
        ("hidden", json!(config.hidden)),
        ("heads", json!(config.heads)),
        ("kv_heads", json!(config.kv_heads)),
        ("vocabulary", json!(model.tokenizer().vocab_size())),
        ("chat_template", json!(!model.template().is_fallback())),
    ])
}

/// The same about a model that makes vectors of texts.
fn embedding_facts(model: &EncoderModel) -> Vec<(&'static str, Value)> {
    let (config, sentences) = (model.config(), model.sentences());
    let tensors = || model.tensors().tensors();
    let parameters: u64 = tensors().map(|tensor| tensor.elements()).sum();
    let types = tensors().map(|tensor| (tensor.dtype, tensor.data.len()));
    let pooling = match sentences.pooling {
        Pooling::Mean => "the mean of all tokens",
        Pooling::Cls => "the first token",
    };
    vec![
        ("purpose", json!("embeddings")),
        ("architecture", json!(config.architecture)),
        ("parameters", json!(parameters)),
        ("weights", json!(most_bytes(types))),
        ("context", json!(sentences.max_tokens)),
        ("dimensions", json!(config.hidden)),
        ("pooling", json!(pooling)),
        ("normalised", json!(sentences.normalise)),
        ("layers", json!(config.layers)),
        ("hidden", json!(config.hidden)),
        ("heads", json!(config.heads)),
        ("vocabulary", json!(config.vocab)),
    ]
}

pub(super) fn fact(facts: &[(&str, Value)], key: &str) -> Option<Value> {
    let fact = facts.iter().find(|(known, _)| *known == key)?;
    Some(fact.1.clone())
}

/// Bytes that the weights take once they are loaded, without those of conversations.
fn in_memory(model: &Model) -> u64 {
    mesh_engine_ort::memory_bytes(model, WeightFormat::suited(model))
}

/// The type that has most bytes, of tensors with their lengths.
fn most_bytes<T: PartialEq + Debug>(tensors: impl Iterator<Item = (T, usize)>) -> String {
    let mut types: Vec<(T, usize)> = Vec::new();
    for (ty, bytes) in tensors {
        match types.iter_mut().find(|(known, _)| *known == ty) {
            Some((_, total)) => *total += bytes,
            None => types.push((ty, bytes)),
        }
    }
    let most = types.into_iter().max_by_key(|(_, total)| *total);
    most.map_or_else(String::new, |(ty, _)| format!("{ty:?}"))
}

/// Ids of the keys that signed, unchecked.
pub(super) fn signers(signed: &SignedManifest) -> Vec<String> {
    let keys = signed.signatures.iter();
    keys.map(|signature| signature.key.to_string()).collect()
}

/// The verdict on a signature in words.
pub(super) fn verdict(verdict: Verdict) -> String {
    match verdict {
        Verdict::Signed { key } => format!("signed by the trusted key {}", key.short()),
        Verdict::Stranger => "signed, by no key that is trusted".to_owned(),
        Verdict::Unsigned => "not signed".to_owned(),
    }
}

/// Complete layers, such as `0-11, 24-29`; none if the manifest lists no layers.
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
    if ranges.is_empty() {
        return Some("none".to_owned());
    }
    let ranges = ranges.into_iter().map(|(start, end)| match start == end {
        true => start.to_string(),
        false => format!("{start}-{end}"),
    });
    Some(ranges.collect::<Vec<_>>().join(", "))
}
