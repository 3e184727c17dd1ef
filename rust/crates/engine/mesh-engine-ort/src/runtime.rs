//! ONNX Runtime itself: found, loaded and initialised once per process.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use mesh_kernels::Isa;
use ort::environment::Environment;

use crate::graph;
use crate::options::LoadError;

/// The process's environment and the library's path. ONNX Runtime allows one; it is kept for as long as the
/// process lives.
static ENVIRONMENT: Mutex<Option<(Environment, PathBuf)>> = Mutex::new(None);

/// Loads ONNX Runtime's library as the first stage of a process would: from `path`, or from where
/// `ORT_DYLIB_PATH` says. So that a missing one is found before gigabytes are read.
///
/// # Errors
/// If it is not configured or cannot be loaded.
pub fn load_library(path: Option<&Path>) -> Result<(), LoadError> {
    environment(path).map(|_| ())
}

/// Loads the library at `path`, or the one that `ORT_DYLIB_PATH` names, unless one is loaded already.
pub(crate) fn environment(path: Option<&Path>) -> Result<Environment, LoadError> {
    let mut environment = ENVIRONMENT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((environment, _)) = &*environment {
        return Ok(environment.clone());
    }
    let path = match path {
        Some(path) => path.to_path_buf(),
        None => std::env::var_os("ORT_DYLIB_PATH")
            .filter(|path| !path.is_empty())
            .map(PathBuf::from)
            .ok_or(LoadError::NoLibrary)?,
    };
    // A relative path would be taken from the program's own directory rather than from the working directory.
    let path = std::path::absolute(&path).unwrap_or(path);
    let loaded = ort::init_from(&path)
        .map_err(|error| LoadError::Library {
            path: path.clone(),
            message: error.to_string(),
        })?
        .with_name("hydramesh")
        .with_telemetry(false)
        .build()?;
    graph::register_domain(&loaded)?;
    tracing::debug!(library = %path.display(), build = ort::info(), "ONNX Runtime loaded");
    let kernels = Isa::current().name();
    match Isa::requested() {
        Ok(_) => tracing::debug!(kernels, "instruction set chosen"),
        Err(error) => tracing::warn!(kernels, "{error}; taking the fastest"),
    }
    Ok(environment.insert((loaded, path)).0.clone())
}

/// The folder of the library that is loaded.
pub(crate) fn folder() -> Option<PathBuf> {
    let environment = ENVIRONMENT.lock().unwrap_or_else(PoisonError::into_inner);
    let (_, path) = environment.as_ref()?;
    path.parent().map(Path::to_path_buf)
}
