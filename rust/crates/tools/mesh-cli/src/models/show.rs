//! `hydramesh models show`.

use mesh_store::{Digest, Resolved, Store, Target};
use serde_json::{Map, Value, json};

use super::describe::{facts, signers, to_open, whole_layers};
use super::{failed, find, manifest, place};
use crate::args::PlacesArgs;
use crate::failure::Failure;
use crate::output::bytes;

pub(super) fn run(name: &str, places: &PlacesArgs, as_json: bool) -> Result<(), Failure> {
    let (store, resolved) = find(name, places)?;
    let lines = match (&resolved.target, &store) {
        (Target::Local(model), _) => {
            let mut lines = vec![
                ("name", json!(model.name)),
                ("path", json!(model.path)),
                ("bytes", json!(model.bytes)),
            ];
            lines.extend(facts(&model.path).map_err(|reason| {
                Failure::failed(format!("model {}: {reason}", model.path.display()))
            })?);
            lines
        }
        (Target::Stored { name, fingerprint }, Some(store)) => stored(store, name, fingerprint)?,
        (Target::Stored { .. }, None) => unreachable!("it was found in a store"),
        (Target::Hub { id }, _) => {
            let present = format!("nothing; `hydramesh models pull {id}` fetches it");
            vec![("name", json!(id)), ("present", json!(present))]
        }
    };
    print(&resolved, lines, as_json);
    Ok(())
}

fn stored(
    store: &Store,
    name: &str,
    fingerprint: &Digest,
) -> Result<Vec<(&'static str, Value)>, Failure> {
    // One that is damaged says so here.
    manifest(store, name, fingerprint)?;
    let models = store.models().map_err(failed)?;
    let model = models
        .into_iter()
        .find(|model| model.fingerprint == *fingerprint)
        .ok_or_else(|| Failure::failed(format!("model {fingerprint} has just been removed")))?;
    let manifest = &model.signed.manifest;
    let sources = model.names.iter().map(|named| match &named.source {
        Some(source) => format!("{} ({source})", named.name),
        None => named.name.clone(),
    });
    let mut pieces = (0, 0);
    for file in &manifest.files {
        let have = store.presence(fingerprint, file).have;
        pieces.0 += file.pieces_in(&have).len();
        pieces.1 += file.pieces.len();
    }
    let path = to_open(store, &model);
    let whole_layers = whole_layers(store, fingerprint, manifest);
    let mut lines = vec![
        ("name", json!(manifest.name)),
        ("names", json!(sources.collect::<Vec<_>>())),
        ("fingerprint", json!(fingerprint)),
        ("path", json!(path)),
        ("bytes", json!(manifest.bytes())),
        ("present_bytes", json!(model.present)),
        ("pieces", json!(format!("{} of {}", pieces.0, pieces.1))),
        ("files", json!(manifest.files.len())),
        ("whole_layers", json!(whole_layers)),
        ("signed_by", json!(signers(&model.signed))),
        ("loaded", json!(model.pinned)),
    ];
    // Without its header, nothing else is known of a model.
    match path.map(|path| facts(&path)) {
        Some(Ok(facts)) => lines.extend(facts),
        Some(Err(reason)) if model.present == manifest.bytes() => {
            lines.push(("cannot_be_served", json!(reason)));
        }
        _ => {}
    }
    Ok(lines)
}

fn print(resolved: &Resolved, lines: Vec<(&'static str, Value)>, as_json: bool) {
    let first = [
        ("where", json!(place(&resolved.target))),
        ("why", json!(resolved.why)),
    ];
    let lines = first.into_iter().chain(lines);
    if as_json {
        let object: Map<String, Value> = lines.map(|(key, value)| (key.into(), value)).collect();
        println!("{}", Value::from(object));
        return;
    }
    for (key, value) in lines {
        let text = match (&value, key) {
            (Value::Null, _) => continue,
            (Value::Array(list), _) if list.is_empty() => continue,
            (Value::Array(list), _) => {
                let texts = list.iter().map(|item| item.as_str().unwrap_or_default());
                texts.collect::<Vec<_>>().join(", ")
            }
            (_, "bytes" | "present_bytes" | "memory_bytes") => {
                bytes(value.as_u64().unwrap_or_default())
            }
            (Value::Bool(false), "chat_template") => {
                "none in the file; a plain one is used".to_owned()
            }
            (Value::Bool(yes), _) => if *yes { "yes" } else { "no" }.to_owned(),
            (Value::String(text), _) => text.clone(),
            _ => value.to_string(),
        };
        println!("{:<14} {text}", key.replace('_', " "));
    }
}
