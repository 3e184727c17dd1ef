//! `hydramesh models rm`.

use std::path::PathBuf;

use mesh_store::Target;
use serde_json::json;

use super::{failed, not_here, open, resolve};
use crate::failure::Failure;
use crate::output::bytes;

pub(super) fn run(name: &str, store: Option<PathBuf>, as_json: bool) -> Result<(), Failure> {
    let store = open(store)?;
    let resolved = resolve(name, &[], Some(&store), None)?;
    let (known, fingerprint) = match resolved.target {
        Target::Stored { name, fingerprint } => (name, fingerprint),
        Target::Hub { id } => return Err(not_here(name, &id)),
        Target::Local(model) => {
            return Err(Failure::usage(format!(
                "{} lies outside the store and is yours to remove",
                model.path.display()
            )));
        }
    };
    let freed = store.remove(&fingerprint).map_err(failed)?;
    if as_json {
        let object = json!({"name": known, "fingerprint": fingerprint, "freed_bytes": freed});
        println!("{object}");
    } else {
        let (short, freed) = (fingerprint.short(), bytes(freed));
        println!("removed {known} ({short}), {freed} freed");
    }
    Ok(())
}
