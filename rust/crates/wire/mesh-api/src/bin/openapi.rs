//! Prints the OpenAPI document, or writes it to openapi.json with `--write`.

use std::io::Write as _;
use std::path::Path;

fn main() -> std::io::Result<()> {
    let document = mesh_api::openapi::document();
    match std::env::args().nth(1).as_deref() {
        None => std::io::stdout().write_all(document.as_bytes()),
        Some("--write") => write(&document),
        Some(other) => {
            let text = format!("unknown argument {other:?}: use --write or none");
            Err(std::io::Error::other(text))
        }
    }
}

/// The crate includes the file, so it is never there in part.
fn write(document: &str) -> std::io::Result<()> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi.json");
    let new = file.with_extension("json.new");
    std::fs::write(&new, document)?;
    std::fs::rename(new, file)
}
