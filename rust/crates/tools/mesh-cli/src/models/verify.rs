//! `hydramesh models verify`.

use mesh_model::Model;
use mesh_store::local::{LocalKind, LocalModel};
use mesh_store::{Digest, DigestError, Manifest, Policy, SignedManifest, Store, Target};
use serde_json::json;

use super::describe::verdict;
use super::progress::bar;
use super::{damaged, failed, find, manifest, not_here};
use crate::args::VerifyArgs;
use crate::failure::Failure;

pub(super) fn run(args: &VerifyArgs) -> Result<(), Failure> {
    let policy = Policy::from_files(&args.trusted_keys, args.require_signature).map_err(failed)?;
    let (store, resolved) = find(&args.model, &args.places)?;
    match (&resolved.target, &store) {
        (Target::Local(model), _) => local(model, store.as_ref(), &policy, args),
        (Target::Stored { name, fingerprint }, Some(store)) => {
            // That it has its fingerprint is checked here.
            let signed = manifest(store, name, fingerprint)?;
            stored(store, fingerprint, &signed, &policy, args)
        }
        (Target::Stored { .. }, None) => unreachable!("it was found in a store"),
        (Target::Hub { id }, _) => Err(not_here(&args.model, id)),
    }
}

fn local(
    model: &LocalModel,
    store: Option<&Store>,
    policy: &Policy,
    args: &VerifyArgs,
) -> Result<(), Failure> {
    // As a worker would; of safetensors only what says where the tensors are, which making the manifest does.
    if matches!(model.kind, LocalKind::Gguf | LocalKind::SplitGguf) {
        Model::open(&model.path).map_err(failed)?;
    }
    let bar = bar("reading", model.bytes);
    let manifest = Manifest::of_path(&model.name, &model.path, &|bytes| bar.inc(bytes));
    bar.finish_and_clear();
    let manifest = manifest.map_err(failed)?;
    check_sha256(&manifest, args)?;
    let fingerprint = manifest.fingerprint();
    let known = store.map_or(Ok(None), |store| store.manifest(&fingerprint));
    let known = known.map_err(|error| damaged(&model.name, &fingerprint, &error))?;
    let signed = known.unwrap_or_else(|| SignedManifest::unsigned(manifest.clone()));
    let found = policy.check(&signed).map_err(failed)?;
    let only = match &manifest.files[..] {
        [only] => Some(only.sha256),
        _ => None,
    };
    if args.json {
        let object = json!({
            "name": model.name,
            "path": model.path,
            "sha256": only,
            "fingerprint": fingerprint,
            "signature": verdict(found),
        });
        println!("{object}");
        return Ok(());
    }
    match only {
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
    args: &VerifyArgs,
) -> Result<(), Failure> {
    let manifest = &signed.manifest;
    check_sha256(manifest, args)?;
    let found = policy.check(signed).map_err(failed)?;
    let mut bad: Vec<String> = Vec::new();
    let (mut checked, mut present) = (0, 0);
    let bar = bar("checking", manifest.bytes());
    for file in &manifest.files {
        let presence = store.presence(fingerprint, file);
        let Some(path) = presence.path else {
            continue;
        };
        let here = file.pieces_in(&presence.have);
        let broken = file
            .bad_pieces(&path, &here, &|bytes| bar.inc(bytes))
            .map_err(failed)?;
        checked += here.len();
        present += presence.have.bytes();
        let errors = broken
            .into_iter()
            .map(|index| file.bad_piece(index).to_string());
        bad.extend(errors);
    }
    bar.finish_and_clear();
    if args.json {
        let object = json!({
            "name": manifest.name,
            "fingerprint": fingerprint,
            "bytes": manifest.bytes(),
            "present_bytes": present,
            "checked_pieces": checked,
            "bad": bad,
            "signature": verdict(found),
        });
        println!("{object}");
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
    if bad.is_empty() {
        return Ok(());
    }
    let (count, name, short) = (bad.len(), &manifest.name, fingerprint.short());
    Err(
        Failure::failed(format!("{count} pieces of {name} are damaged")).hint(format!(
            "`hydramesh models rm {short}`, and fetch it again."
        )),
    )
}

fn check_sha256(manifest: &Manifest, args: &VerifyArgs) -> Result<(), Failure> {
    let Some(text) = &args.sha256 else {
        return Ok(());
    };
    let wanted: Digest = text
        .parse()
        .map_err(|error: DigestError| Failure::usage(error.to_string()))?;
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
