//! `hydramesh models`: models on this machine. One file for each command.

mod describe;
mod gc;
mod list;
mod pins;
mod progress;
mod pull;
mod rm;
mod show;
mod sign;
mod verify;

use std::path::{Path, PathBuf};

use mesh_store::{
    Digest, NameError, Places, Resolved, SignedManifest, Store, StoreError, Target, default_store,
};

use crate::args::{HeadArgs, ModelsCommand, PinsCommand, PlacesArgs};
use crate::failure::Failure;

pub(crate) async fn run(head: &HeadArgs, command: ModelsCommand) -> Result<(), Failure> {
    match command {
        ModelsCommand::Pull(args) => pull::run(args).await,
        ModelsCommand::List { dirs, store, json } => list::run(dirs, store, json),
        ModelsCommand::Show {
            model,
            places,
            json,
        } => show::run(&model, &places, json),
        ModelsCommand::Verify(args) => verify::run(&args),
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
        ModelsCommand::Pins { command, json } => {
            pins::run(head, command.unwrap_or(PinsCommand::List), json).await
        }
    }
}

/// Folders that are looked into where none are named.
fn default_dirs() -> Vec<PathBuf> {
    vec![".cache/models".into(), "local-models".into()]
}

fn dirs(places: &PlacesArgs) -> Vec<PathBuf> {
    match places.dirs.is_empty() {
        true => default_dirs(),
        false => places.dirs.clone(),
    }
}

fn store_dir(named: Option<PathBuf>) -> PathBuf {
    named.unwrap_or_else(default_store)
}

/// The store, if there is one: looking at it makes none.
fn open_if_there(named: Option<PathBuf>) -> Result<Option<Store>, Failure> {
    Store::find(store_dir(named)).map_err(failed)
}

/// The store, which must be there.
fn open(named: Option<PathBuf>) -> Result<Store, Failure> {
    let dir = store_dir(named);
    let found = Store::find(&dir).map_err(failed)?;
    found.ok_or_else(|| {
        Failure::failed(format!("there is no store at {}", dir.display()))
            .hint("`hydramesh models pull` makes one; --store or HYDRAMESH_STORE names another.")
    })
}

fn manifest(store: &Store, name: &str, fingerprint: &Digest) -> Result<SignedManifest, Failure> {
    match store.manifest(fingerprint) {
        Ok(Some(signed)) => Ok(signed),
        Ok(None) => Err(Failure::failed(format!(
            "model {fingerprint} has just been removed"
        ))),
        Err(error) => Err(damaged(name, fingerprint, &error)),
    }
}

/// The failure for a model whose manifest or signatures have changed or are unreadable.
fn damaged(name: &str, fingerprint: &Digest, error: &StoreError) -> Failure {
    let short = fingerprint.short();
    Failure::failed(format!("model {name} ({short}): {error}")).hint(format!(
        "Fetch it again, or sign it again where its file is: that writes it anew. `hydramesh models rm {short}` removes it."
    ))
}

/// The model that `name` refers to, with the store if there is one.
fn resolve(
    name: &str,
    dirs: &[PathBuf],
    store: Option<&Store>,
    named: Option<&Path>,
) -> Result<Resolved, Failure> {
    let places = Places {
        folders: dirs,
        store,
    };
    places.resolve(name).map_err(|error| {
        let failure = failed(&error);
        match (error, store, named) {
            // Perhaps the name of the store is mistyped.
            (NameError::NotFound { .. }, None, Some(dir)) => {
                failure.hint(format!("There is no store at {}.", dir.display()))
            }
            _ => failure,
        }
    })
}

/// The store, if there is one, and the model that `name` refers to in it or in the folders of `places`.
fn find(name: &str, places: &PlacesArgs) -> Result<(Option<Store>, Resolved), Failure> {
    let store = open_if_there(places.store.clone())?;
    let resolved = resolve(name, &dirs(places), store.as_ref(), places.store.as_deref())?;
    Ok((store, resolved))
}

/// The failure for a model that is not on this machine.
fn not_here(name: &str, id: &str) -> Failure {
    Failure::failed(format!("{name} ({id}) is not on this machine"))
        .hint(format!("`hydramesh models pull {id}` fetches it."))
}

fn failed(error: impl std::error::Error) -> Failure {
    Failure::failed(error.to_string())
}

/// Kind of place as text for JSON.
fn place(target: &Target) -> &'static str {
    match target {
        Target::Local(_) => "folder",
        Target::Stored { .. } => "store",
        Target::Hub { .. } => "hub",
    }
}
