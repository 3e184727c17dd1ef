//! `hydramesh models gc`.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{failed, open};
use crate::failure::Failure;
use crate::output::bytes;

pub(super) fn run(
    limit: Option<u64>,
    dry_run: bool,
    store: Option<PathBuf>,
    as_json: bool,
) -> Result<(), Failure> {
    let store = open(store)?;
    let report = store.gc(limit, dry_run).map_err(failed)?;
    if as_json {
        let removed = report.removed.iter().map(|removed| {
            json!({"what": removed.what, "fingerprint": removed.model, "bytes": removed.bytes})
        });
        let object = json!({
            "dry_run": dry_run,
            "removed": removed.collect::<Vec<Value>>(),
            "freed_bytes": report.freed(),
            "used_bytes": report.used,
        });
        println!("{object}");
        return Ok(());
    }
    for removed in &report.removed {
        println!("{:>10}  {}", bytes(removed.bytes), removed.what);
    }
    let (freed, used) = (bytes(report.freed()), bytes(report.used));
    match dry_run {
        true => println!("{freed} would be freed; the store would take {used}"),
        false => println!("{freed} freed; the store takes {used}"),
    }
    // Loaded models are never removed.
    match limit.filter(|&limit| report.used > limit) {
        Some(limit) => Err(Failure::failed(format!(
            "the store still takes more than {}: the rest is loaded or being fetched",
            bytes(limit)
        ))),
        None => Ok(()),
    }
}
