//! `hydramesh models list`.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use mesh_base::clock::unix_seconds;
use mesh_store::{DamagedModel, Store, StoredModel, local};
use serde_json::{Value, json};

use super::describe::{fact, facts, signers, to_open};
use super::{damaged, default_dirs, failed, open_if_there, store_dir};
use crate::failure::Failure;
use crate::output::{bytes, cell, table};

/// A line of the list: for `--json`, and as cells.
type Line = (Value, Vec<String>);

pub(super) fn run(
    named: Vec<PathBuf>,
    store: Option<PathBuf>,
    as_json: bool,
) -> Result<(), Failure> {
    if let Some(missing) = named.iter().find(|dir| !dir.is_dir()) {
        return Err(
            Failure::failed(format!("{} is not a folder", missing.display())).hint(
                "`make fetch` brings a first model into .cache/models; or name your own folder.",
            ),
        );
    }
    // If folders are named, only those are listed.
    let only_named = !named.is_empty() && store.is_none();
    let dirs = match named.is_empty() {
        true => default_dirs(),
        false => named,
    };
    let found = local::list(&dirs).map_err(failed)?;
    let mut lines: Vec<Line> = found.iter().map(in_folder).collect();
    let place = store_dir(store.clone());
    let store = match only_named {
        true => None,
        false => open_if_there(store)?,
    };
    if let Some(store) = store {
        let contents = store.contents().map_err(failed)?;
        for model in &contents.models {
            lines.push(in_store(&store, model));
        }
        for model in &contents.damaged {
            let failure = damaged(&model.name(), &model.fingerprint, &model.error);
            eprintln!("{failure}");
            lines.push(unusable(model));
        }
    }
    if as_json {
        let list: Vec<Value> = lines.into_iter().map(|(json, _)| json).collect();
        println!("{}", Value::from(list));
        return Ok(());
    }
    if lines.is_empty() {
        let dirs: Vec<String> = dirs.iter().map(|dir| dir.display().to_string()).collect();
        let store = match only_named {
            true => String::new(),
            false => format!(" or in the store {}", place.display()),
        };
        eprintln!("no models in {}{store}", dirs.join(", "));
        return Ok(());
    }
    let rows: Vec<Vec<String>> = lines.into_iter().map(|(_, cells)| cells).collect();
    print!("{}", table(&HEADINGS, &rows));
    Ok(())
}

const HEADINGS: [&str; 9] = [
    "MODEL",
    "SIZE",
    "PRESENT",
    "WEIGHTS",
    "CONTEXT",
    "ARCHITECTURE",
    "WHERE",
    "SIGNED BY",
    "LAST USED",
];

fn in_folder(model: &local::LocalModel) -> Line {
    let mut object = json!({
        "name": model.name,
        "path": model.path,
        "bytes": model.bytes,
        "present_bytes": model.bytes,
        "where": "folder",
        "kind": model.kind.name(),
    });
    let columns = look(&model.path, &mut object);
    let folder = model.path.parent().unwrap_or(&model.path);
    let mut cells = vec![model.name.clone(), bytes(model.bytes), "all".to_owned()];
    cells.extend(columns);
    cells.extend([folder.display().to_string(), "-".to_owned(), "-".to_owned()]);
    (object, cells)
}

fn in_store(store: &Store, model: &StoredModel) -> Line {
    let manifest = &model.signed.manifest;
    let keys = signers(&model.signed);
    let names: Vec<&String> = model.names.iter().map(|named| &named.name).collect();
    let total = manifest.bytes();
    let mut object = json!({
        "name": manifest.name,
        "names": names,
        "fingerprint": model.fingerprint,
        "bytes": total,
        "present_bytes": model.present,
        "where": "store",
        "loaded": model.pinned,
        "last_used": unix_seconds(model.last_used),
        "signed_by": keys,
    });
    let path = to_open(store, model);
    let columns = match &path {
        Some(path) => {
            object["path"] = json!(path);
            look(path, &mut object)
        }
        None => Default::default(),
    };
    let percent = 100.0 * model.present as f64 / total.max(1) as f64;
    let present = match model.present == total {
        true => "all".to_owned(),
        false => format!("{percent:.0} %"),
    };
    let signed: Vec<&str> = keys.iter().filter_map(|key| key.get(..12)).collect();
    let signed = cell((!signed.is_empty()).then(|| signed.join(", ")));
    let used = match model.pinned {
        true => "loaded".to_owned(),
        false => ago(model.last_used),
    };
    let mut cells = vec![manifest.name.clone(), bytes(total), present];
    cells.extend(columns);
    cells.extend(["store".to_owned(), signed, used]);
    (object, cells)
}

fn unusable(model: &DamagedModel) -> Line {
    let object = json!({
        "name": model.name(),
        "names": model.names,
        "fingerprint": model.fingerprint,
        "bytes": null,
        "present_bytes": null,
        "where": "store",
        "damaged": true,
        "error": model.error.to_string(),
    });
    let damage = "damaged; `hydramesh models verify` says what";
    let cells = [&*model.name(), "?", "?", "", "", damage, "store", "?", "-"];
    (object, cells.map(str::to_owned).to_vec())
}

/// Weights, context and architecture. A file that cannot be opened is listed with the error.
fn look(path: &Path, object: &mut Value) -> [String; 3] {
    match facts(path) {
        Ok(facts) => {
            let text = |key| match fact(&facts, key) {
                Some(Value::String(text)) => text,
                Some(value) => value.to_string(),
                None => String::new(),
            };
            let mut columns = ["weights", "context", "architecture"].map(text);
            object["architecture"] = columns[2].clone().into();
            object["weights"] = columns[0].clone().into();
            object["purpose"] = text("purpose").into();
            if let Some(dimensions) = fact(&facts, "dimensions") {
                object["dimensions"] = dimensions;
                columns[2] += ", for embeddings";
            }
            columns
        }
        Err(reason) => {
            let shown = format!("cannot be served: {reason}");
            object["error"] = reason.into();
            [String::new(), String::new(), shown]
        }
    }
}

/// Age in words, such as `3 h ago`.
fn ago(time: SystemTime) -> String {
    let seconds = time.elapsed().map_or(0, |since| since.as_secs());
    match seconds {
        0..60 => "now".to_owned(),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..86_400 => format!("{} h ago", seconds / 3600),
        _ => format!("{} d ago", seconds / 86_400),
    }
}
