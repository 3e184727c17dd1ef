//! `hydramesh models sign` and `hydramesh models key`.

use std::path::{Path, PathBuf};

use mesh_store::{SignedManifest, SigningKey, Store, Target};
use serde_json::json;

use super::progress::bar;
use super::{dirs, failed, manifest, not_here, resolve, store_dir};
use crate::args::PlacesArgs;
use crate::failure::Failure;

pub(super) fn run(
    name: &str,
    key: &Path,
    places: &PlacesArgs,
    as_json: bool,
) -> Result<(), Failure> {
    let key = SigningKey::read(key).map_err(failed)?;
    let dir = store_dir(places.store.clone());
    let store = Store::open(dir).map_err(failed)?;
    let resolved = resolve(name, &dirs(places), Some(&store), None)?;
    let mut signed: SignedManifest = match &resolved.target {
        Target::Stored { name, fingerprint } => manifest(&store, name, fingerprint)?,
        Target::Local(model) => {
            let bar = bar("reading", model.bytes);
            let signed = store.adopt(&model.name, &model.path, &|bytes| bar.inc(bytes));
            bar.finish_and_clear();
            signed.map_err(failed)?
        }
        Target::Hub { id } => return Err(not_here(name, id)),
    };
    signed.add(key.sign(&signed.manifest));
    let fingerprint = store.put_manifest(&signed).map_err(failed)?;
    let id = key.public().id();
    if as_json {
        let object = json!({
            "name": signed.manifest.name,
            "fingerprint": fingerprint,
            "key": id,
            "signatures": signed.signatures.len(),
        });
        println!("{object}");
    } else {
        println!("{fingerprint}  {}", signed.manifest.name);
        eprintln!("signed by {id}; kept in {}", store.root().display());
    }
    Ok(())
}

pub(super) fn make_key(file: &Path, as_json: bool) -> Result<(), Failure> {
    let mut public = file.as_os_str().to_owned();
    public.push(".pub");
    let public = PathBuf::from(public);
    let key = SigningKey::generate();
    key.write_new(file).map_err(failed)?;
    key.public().write_new(&public).map_err(failed)?;
    let id = key.public().id();
    if as_json {
        println!("{}", json!({"private": file, "public": public, "id": id}));
    } else {
        println!("{id}");
        eprintln!(
            "{} is the private key: keep it off the nodes. {} is for `store.trusted_keys` of theirs.",
            file.display(),
            public.display()
        );
    }
    Ok(())
}
