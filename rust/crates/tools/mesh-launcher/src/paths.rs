//! Paths of files outside version control: those that `make fetch` downloads and cargo builds.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, ensure};

/// ONNX Runtime's shared library below the cache folder.
pub const ORT_LIBRARY: &str = "onnxruntime/libonnxruntime.so.1.24.4";

/// The SmolLM2-135M-Instruct Q4_1 GGUF file below the cache folder.
pub const SMOLLM2: &str = "models/SmolLM2-135M-Instruct.Q4_1.gguf";

/// The cache folder: `HYDRAMESH_CACHE`, else `.cache` at the root of the repository.
pub fn cache_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("HYDRAMESH_CACHE") {
        return PathBuf::from(dir);
    }
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(4)
        .expect("the crate lies four folders below the root")
        .join(".cache")
}

/// ONNX Runtime's shared library.
pub fn ort_library() -> Result<PathBuf> {
    fetched(ORT_LIBRARY)
}

/// ONNX Runtime's WebGPU plugin.
pub fn webgpu_plugin() -> Result<PathBuf> {
    fetched("onnxruntime/webgpu/libonnxruntime_providers_webgpu.so")
}

/// The description of Mesa's software Vulkan driver, for `VK_DRIVER_FILES`. Its libraries lie beside it in
/// `lib`.
pub fn vulkan_driver() -> Result<PathBuf> {
    fetched("vulkan/lvp.json")
}

/// The program of swtpm, a TPM in software. Its libraries lie beside its folder in `lib`.
pub fn swtpm() -> Result<PathBuf> {
    fetched("swtpm/bin/swtpm")
}

/// The SmolLM2-135M-Instruct Q4_1 GGUF file.
pub fn smollm2() -> Result<PathBuf> {
    fetched(SMOLLM2)
}

/// The Gemma 3 270M (base) Q4_K_M GGUF file.
pub fn gemma3() -> Result<PathBuf> {
    fetched("models/gemma-3-270m-q4_k_m.gguf")
}

/// The stories15M checkpoint with its tokenizer, as llama2.c has them.
pub fn stories() -> Result<PathBuf> {
    fetched("models/stories15M.data")
}

/// The folder of the embedding model all-MiniLM-L6-v2.
pub fn minilm() -> Result<PathBuf> {
    let weights = fetched("models/all-MiniLM-L6-v2/model.safetensors")?;
    Ok(weights.parent().unwrap_or(&weights).to_path_buf())
}

/// A file below the cache folder.
///
/// # Errors
/// If it is not there.
pub fn fetched(relative: &str) -> Result<PathBuf> {
    let path = cache_dir().join(relative);
    let name = path.display();
    ensure!(path.is_file(), "{name} is missing: run `make fetch`");
    Ok(path)
}

/// The folder with the services of the same build as the running test or benchmark: `HYDRAMESH_BIN_DIR`, else
/// `target/<profile>`, where they are built first so that no test runs against yesterday's services.
///
/// # Errors
/// If they cannot be built.
pub fn bin_dir() -> Result<PathBuf> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    BUILT
        .get_or_init(|| find_or_build().map_err(|error| format!("{error:#}")))
        .clone()
        .map_err(|error| anyhow!(error))
}

/// Features of the services that this build's own features want.
fn features() -> &'static [&'static str] {
    match cfg!(feature = "images") {
        true => &["--features", "mesh-worker/images"],
        false => &[],
    }
}

fn find_or_build() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("HYDRAMESH_BIN_DIR") {
        return Ok(PathBuf::from(dir));
    }
    let program = std::env::current_exe().context("where is this program?")?;
    // target/<profile>/deps/<test>-<hash> or target/<profile>/<program>
    let mut dirs = program.ancestors().skip(1);
    let dir = dirs.find(|dir| dir.file_name().is_some_and(|name| name != "deps"));
    let name = dir.and_then(|dir| dir.file_name()?.to_str());
    let (dir, name) = dir
        .zip(name)
        .with_context(|| format!("{} is in no build folder", program.display()))?;
    let profile = match name {
        "debug" => "dev",
        name => name,
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(3)
        .expect("the crate lies three folders below the workspace");
    let status = Command::new(cargo)
        .current_dir(workspace)
        .args(["build", "--quiet", "--bins", "--profile", profile])
        .args(["-p", "mesh-head", "-p", "mesh-worker"])
        .args(["-p", "mesh-shim", "-p", "mesh-cli"])
        .args(features())
        .status()
        .context("starting cargo")?;
    let built = status.success();
    ensure!(
        built,
        "the services cannot be built (cargo's words are above)"
    );
    Ok(dir.to_owned())
}
