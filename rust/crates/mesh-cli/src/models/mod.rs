//! `hydramesh models`: models on this machine. One file for each command.

mod describe;
mod gc;
mod list;
mod progress;
mod pull;
mod rm;
mod show;
mod sign;
mod verify;

use std::path::PathBuf;

use mesh_store::{Places, Resolved, Store, Target, default_store};

use crate::args::{ModelsCommand, PlacesArgs};
use crate::failure::{Exit, Failure};

pub(crate) async fn run(command: ModelsCommand) -> Result<(), Failure> {
    match command {
        ModelsCommand::Pull(args) => pull::run(args).await,
        ModelsCommand::List { dirs, store, json } => list::run(dirs, store, json),
        ModelsCommand::Show {
            model,
            places,
            json,
        } => show::run(&model, &places, json),
        ModelsCommand::Verify {
            model,
            places,
            sha256,
            trusted_keys,
            require_signature,
            json,
        } => {
            let wanted = verify::Wanted {
                sha256,
                trusted_keys,
                require_signature,
            };
            verify::run(&model, &places, &wanted, json)
        }
        ModelsCommand::Rm { model, store, json } => rm::run(&model, store, json),
        ModelsCommand::Gc {
            limit,
            dry_run,
            store,
            json,
        } => gc::run(limit, dry_run, store, json),
        ModelsCommand::Sign {
            model,
            key,
            places,
            json,
        } => sign::run(&model, &key, &places, json),
        ModelsCommand::Key { file, json } => sign::make_key(&file, json),
    }
}

/// Folders that are looked into where none are named.
fn default_dirs() -> Vec<PathBuf> {
    vec![".cache/models".into(), "local-models".into()]
}

/// The folders of `places`.
fn dirs(places: &PlacesArgs) -> Vec<PathBuf> {
    match places.dirs.is_empty() {
        true => default_dirs(),
        false => places.dirs.clone(),
    }
}

/// The store's folder.
fn store_dir(named: Option<PathBuf>) -> PathBuf {
    named.unwrap_or_else(default_store)
}

/// The store, if its folder is there: looking at it makes none.
fn open_if_there(named: Option<PathBuf>) -> Result<Option<Store>, Failure> {
    let is_named = named.is_some();
    let dir = store_dir(named);
    if !dir.is_dir() {
        return match is_named {
            true => Err(no_store(&dir)),
            false => Ok(None),
        };
    }
    Store::open(dir).map(Some).map_err(failed)
}

/// The store, which must be there.
fn open(named: Option<PathBuf>) -> Result<Store, Failure> {
    let dir = store_dir(named);
    match dir.is_dir() {
        true => Store::open(dir).map_err(failed),
        false => Err(no_store(&dir)),
    }
}

fn no_store(dir: &std::path::Path) -> Failure {
    Failure::failed(format!("there is no store at {}", dir.display()))
        .hint("`hydramesh models pull` makes one; --store or HYDRAMESH_STORE names another.")
}

/// What `name` means. A model that only the hub has is none where `here` says so.
fn resolve(name: &str, dirs: &[PathBuf], store: Option<&Store>) -> Result<Resolved, Failure> {
    let places = Places {
        folders: dirs,
        store,
    };
    places.resolve(name).map_err(failed)
}

/// The failure for a model that is not on this machine.
fn not_here(name: &str, id: &str) -> Failure {
    Failure::new(
        Exit::Failed,
        format!("{name} ({id}) is not on this machine"),
    )
    .hint(format!("`hydramesh models pull {id}` fetches it."))
}

fn failed(error: impl std::error::Error) -> Failure {
    Failure::failed(error.to_string())
}

/// Where something is, as text for JSON.
fn place(target: &Target) -> &'static str {
    match target {
        Target::Local(_) => "folder",
        Target::Stored { .. } => "store",
        Target::Hub { .. } => "hub",
    }
}
