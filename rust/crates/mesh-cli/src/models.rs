//! `hydramesh models`: model files on this machine.

use std::path::PathBuf;

use mesh_model::{GgmlType, Model};
use mesh_store::local;
use serde_json::{Value, json};

use crate::args::ModelsCommand;
use crate::failure::Failure;
use crate::output::{bytes, table};

pub(crate) fn run(command: ModelsCommand) -> Result<(), Failure> {
    match command {
        ModelsCommand::Pull(_) => unreachable!("it is async, and done elsewhere"),
        ModelsCommand::List { dirs, json } => list(&dirs, json),
        ModelsCommand::Show { model, dirs, json } => show(&model, &dirs, json),
        ModelsCommand::Verify {
            model,
            dirs,
            sha256,
            json,
        } => verify(&model, &dirs, sha256.as_deref(), json),
    }
}

fn list(dirs: &[PathBuf], as_json: bool) -> Result<(), Failure> {
    if let Some(missing) = dirs.iter().find(|dir| !dir.is_dir()) {
        return Err(
            Failure::failed(format!("{} is not a folder", missing.display())).hint(
                "`make fetch` brings a first model into .cache/models; or name your own folder.",
            ),
        );
    }
    let entries = local::list(dirs).map_err(failed)?;
    // A file that cannot be opened is listed with its reason: that it lies there is what was asked.
    let opened: Vec<_> = entries
        .iter()
        .map(|entry| (entry, Model::open(&entry.path)))
        .collect();
    if as_json {
        let list: Vec<Value> = opened
            .iter()
            .map(|(entry, model)| {
                let mut object =
                    json!({"name": entry.name, "path": entry.path, "bytes": entry.bytes});
                match model {
                    Ok(model) => object["architecture"] = model.config().architecture.name().into(),
                    Err(error) => object["error"] = error.kind.to_string().into(),
                }
                object
            })
            .collect();
        println!("{}", Value::from(list));
        return Ok(());
    }
    if opened.is_empty() {
        eprintln!("no .gguf files there");
        return Ok(());
    }
    let rows: Vec<Vec<String>> = opened
        .iter()
        .map(|(entry, model)| {
            let (kind, weights, context) = match model {
                Ok(model) => (
                    model.config().architecture.name().to_owned(),
                    weight_format(model),
                    model.config().context.to_string(),
                ),
                Err(error) => (
                    format!("cannot be served: {}", error.kind),
                    String::new(),
                    String::new(),
                ),
            };
            vec![
                entry.name.clone(),
                bytes(entry.bytes),
                weights,
                context,
                kind,
            ]
        })
        .collect();
    print!(
        "{}",
        table(
            &["MODEL", "SIZE", "WEIGHTS", "CONTEXT", "ARCHITECTURE"],
            &rows
        )
    );
    Ok(())
}

fn show(name: &str, dirs: &[PathBuf], as_json: bool) -> Result<(), Failure> {
    let model = open(name, dirs)?;
    let config = model.config();
    let file_bytes = std::fs::metadata(model.path()).map_or(0, |metadata| metadata.len());
    let facts = [
        ("name", json!(model.name())),
        ("path", json!(model.path())),
        ("bytes", json!(file_bytes)),
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
    ];
    if as_json {
        let object: serde_json::Map<String, Value> = facts
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect();
        println!("{}", Value::from(object));
        return Ok(());
    }
    for (key, value) in facts {
        let text = match (&value, key) {
            (Value::Null, _) => continue,
            (_, "bytes") => bytes(file_bytes),
            (_, "chat_template") if model.template().is_fallback() => {
                "none in the file; a plain one is used".to_owned()
            }
            (_, "chat_template") => "yes".to_owned(),
            (Value::String(text), _) => text.clone(),
            _ => value.to_string(),
        };
        println!("{:<14} {text}", key.replace('_', " "));
    }
    Ok(())
}

fn verify(
    name: &str,
    dirs: &[PathBuf],
    sha256: Option<&str>,
    as_json: bool,
) -> Result<(), Failure> {
    let model = open(name, dirs)?;
    let fingerprint = model.fingerprint().map_err(failed)?;
    if let Some(wanted) = sha256
        && !wanted.eq_ignore_ascii_case(fingerprint)
    {
        return Err(Failure::failed(format!(
            "{} has SHA-256 {fingerprint}, but {wanted} was expected: it is damaged or another model",
            model.path().display()
        )));
    }
    if as_json {
        println!(
            "{}",
            json!({"name": model.name(), "path": model.path(), "sha256": fingerprint})
        );
    } else {
        println!("{fingerprint}  {}", model.path().display());
        eprintln!("whole, and can be served");
    }
    Ok(())
}

fn open(name: &str, dirs: &[PathBuf]) -> Result<Model, Failure> {
    let path = local::resolve(name, dirs).map_err(failed)?;
    Model::open(path).map_err(failed)
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

fn failed(error: impl std::error::Error) -> Failure {
    Failure::failed(error.to_string())
}
