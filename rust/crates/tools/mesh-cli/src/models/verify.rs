//! `hydramesh models verify`.

use std::path::PathBuf;

use mesh_model::Model;
use mesh_store::local::LocalKind;
use mesh_store::{Digest, Manifest, Policy, SignedManifest, Store, Target};
use serde_json::json;

use super::describe::verdict;
use super::progress::bar;
use super::{damaged, dirs, failed, manifest, not_here, open_if_there, resolve};
use crate::args::PlacesArgs;
use crate::failure::Failure;

/// Requirements for the model.
pub(super) struct Wanted {
    pub(super) sha256: Option<String>,
    pub(super) trusted_keys: Vec<PathBuf>,
    pub(super) require_signature: bool,
}

pub(super) fn run(
    name: &str,
    places: &PlacesArgs,
    wanted: &Wanted,
    as_json: bool,
) -> Result<(), Failure> {
    let policy =
        Policy::from_files(&wanted.trusted_keys, wanted.require_signature).map_err(failed)?;
    let store = open_if_there(places.store.clone())?;
    let resolved = resolve(name, &dirs(places), store.as_ref(), places.store.as_deref())?;
    match (&resolved.target, &store) {
        (Target::Local(model), _) => local(model, store.as_ref(), &policy, wanted, as_json),
        (Target::Stored { name, fingerprint }, Some(store)) => {
            // That it has its fingerprint is checked here.
            let signed = manifest(store, name, fingerprint)?;
            stored(store, fingerprint, &signed, &policy, wanted, as_json)
        }
        (Target::Stored { .. }, None) => unreachable!("it was found in a store"),
        (Target::Hub { id }, _) => Err(not_here(name, id)),
    }
}

fn local(
    model: &mesh_store::local::LocalModel,
    store: Option<&Store>,
    policy: &Policy,
    wanted: &Wanted,
    as_json: bool,
) -> Result<(), Failure> {
    // As a worker would; of safetensors only what says where the tensors are, which making the manifest does.
    if matches!(model.kind, LocalKind::Gguf | LocalKind::SplitGguf) {
        Model::open(&model.path).map_err(failed)?;
    }
    let bar = bar("reading", model.bytes);
    let manifest = Manifest::of_path(&model.name, &model.path, &|bytes| bar.inc(bytes));
    bar.finish_and_clear();
    let manifest = manifest.map_err(failed)?;
    check_sha256(&manifest, wanted)?;
    let fingerprint = manifest.fingerprint();
    let known = store.map(|store| store.manifest(&fingerprint)).transpose();
    let known = known
        .map_err(|error| damaged(&model.name, &fingerprint, &error))?
        .flatten();
    let signed = known.unwrap_or_else(|| SignedManifest::unsigned(manifest.clone()));
    let found = policy.check(&signed).map_err(failed)?;
    let sha256 = match &manifest.files[..] {
        [only] => Some(only.sha256),
        _ => None,
    };
    if as_json {
        println!(
            "{}",
            json!({
                "name": model.name,
                "path": model.path,
                "sha256": sha256,
                "fingerprint": fingerprint,
                "signature": verdict(found),
            })
        );
        return Ok(());
    }
    match sha256 {
        Some(sha256) => println!("{sha256}  {}", model.path.display()),
        None => {
            for file in &manifest.files {
                println!("{}  {}", file.sha256, file.path);
            }
        }
    }
    eprintln!("fingerprint {fingerprint}, {}", verdict(found));
    match model.kind {
        LocalKind::Gguf | LocalKind::SplitGguf => eprintln!("whole, and can be served"),
        _ => eprintln!("whole"),
    }
    Ok(())
}

fn stored(
    store: &Store,
    fingerprint: &Digest,
    signed: &SignedManifest,
    policy: &Policy,
    wanted: &Wanted,
    as_json: bool,
) -> Result<(), Failure> {
    let manifest = &signed.manifest;
    check_sha256(manifest, wanted)?;
    let found = policy.check(signed).map_err(failed)?;
    let mut bad: Vec<String> = Vec::new();
    let (mut checked, mut present) = (0, 0);
    let bar = bar("checking", manifest.bytes());
    for file in &manifest.files {
        let presence = store.presence(fingerprint, file);
        let Some(path) = presence.path else {
            continue;
        };
        let here: Vec<u32> = (0..)
            .zip(&file.pieces)
            .filter(|(_, piece)| presence.have.contains(&piece.range()))
            .map(|(index, _)| index)
            .collect();
        let broken = file
            .bad_pieces(&path, &here, &|bytes| bar.inc(bytes))
            .map_err(failed)?;
        checked += here.len();
        present += presence.have.bytes();
        for index in broken {
            if let Err(error) = file.check_piece(index, &[]) {
                bad.push(error.to_string());
            }
        }
    }
    bar.finish_and_clear();
    if as_json {
        println!(
            "{}",
            json!({
                "name": manifest.name,
                "fingerprint": fingerprint,
                "bytes": manifest.bytes(),
                "present_bytes": present,
                "checked_pieces": checked,
                "bad": bad,
                "signature": verdict(found),
            })
        );
    } else {
        for line in &bad {
            eprintln!("{line}");
        }
        println!("{fingerprint}  {}", manifest.name);
        let all = manifest.pieces().count();
        eprintln!(
            "{checked} of {all} pieces are here, {} of them bad; {}",
            bad.len(),
            verdict(found)
        );
    }
    match bad.is_empty() {
        true => Ok(()),
        false => Err(Failure::failed(format!(
            "{} pieces of {} are damaged",
            bad.len(),
            manifest.name
        ))
        .hint(format!(
            "`hydramesh models rm {}`, and fetch it again.",
            fingerprint.short()
        ))),
    }
}

fn check_sha256(manifest: &Manifest, wanted: &Wanted) -> Result<(), Failure> {
    let Some(text) = &wanted.sha256 else {
        return Ok(());
    };
    let wanted: Digest = text.parse().map_err(|error| {
        let error: mesh_store::DigestError = error;
        Failure::usage(error.to_string())
    })?;
    let [only] = &manifest.files[..] else {
        return Err(Failure::usage(format!(
            "{} has {} files; --sha256 is for models of one",
            manifest.name,
            manifest.files.len()
        )));
    };
    match only.sha256 == wanted {
        true => Ok(()),
        false => Err(Failure::failed(format!(
            "{} has SHA-256 {}, but {wanted} was expected: it is damaged or another model",
            only.path, only.sha256
        ))),
    }
}
