//! Where `make fetch` puts what is never committed.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// The cache folder: `HYDRAMESH_CACHE`, else `.cache` at the root of the repository.
pub fn cache_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("HYDRAMESH_CACHE") {
        return PathBuf::from(dir);
    }
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(3)
        .expect("the crate lies three folders below the root")
        .join(".cache")
}

/// ONNX Runtime's shared library.
pub fn ort_library() -> Result<PathBuf> {
    fetched("onnxruntime/libonnxruntime.so.1.24.4")
}

/// The SmolLM2-135M-Instruct Q4_1 GGUF file.
pub fn smollm2() -> Result<PathBuf> {
    fetched("models/SmolLM2-135M-Instruct.Q4_1.gguf")
}

/// A file below the cache folder.
///
/// # Errors
/// If it is not there.
pub fn fetched(relative: &str) -> Result<PathBuf> {
    let path = cache_dir().join(relative);
    if !path.is_file() {
        bail!("{} is missing: run `make fetch`", path.display());
    }
    Ok(path)
}
