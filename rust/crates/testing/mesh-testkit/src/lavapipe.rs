//! Tests on WebGPU with Mesa's software Vulkan driver, lavapipe, which `scripts/fetch.py webgpu` puts into the
//! cache. Libraries and drivers are found by variables of the process, so such tests run in one of their own.

use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::paths;

/// The variable that lets WebGPU compute in software.
pub const ALLOWED: &str = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER";

/// The provider under test, in a process that [`run`] started.
pub const PROVIDER: &str = "HYDRAMESH_TEST_GPU";

/// Variables of a process in which WebGPU computes in software.
///
/// # Errors
/// If the plugin or the driver has not been fetched.
pub fn environment() -> Result<Vec<(&'static str, String)>> {
    let text = |path: &Path| path.display().to_string();
    let (plugin, driver) = (paths::webgpu_plugin()?, paths::vulkan_driver()?);
    Ok(vec![
        ("ORT_DYLIB_PATH", text(&paths::ort_library()?)),
        ("ORT_WEBGPU_EP", text(&plugin)),
        ("VK_DRIVER_FILES", text(&driver)),
        ("VK_ICD_FILENAMES", text(&driver)),
        ("LD_LIBRARY_PATH", text(&driver.with_file_name("lib"))),
        // Some shaders take half a minute to compile.
        (
            "MESA_SHADER_CACHE_DIR",
            text(&driver.with_file_name("shaders")),
        ),
        (ALLOWED, "1".into()),
        (PROVIDER, "webgpu".into()),
    ])
}

/// Runs tests of the calling test program again, ignored ones too, in a process where WebGPU computes in
/// software. Does nothing in such a process, and prints the reason where there is no such driver.
///
/// # Panics
/// Unless all of them pass.
pub fn run(tests: &[&str]) {
    run_with(tests, &[]);
}

/// The same with other variables.
///
/// # Panics
/// As [`run`].
pub fn run_with(tests: &[&str], variables: &[(&str, &str)]) {
    if std::env::var_os(PROVIDER).is_some_and(|provider| !provider.is_empty()) {
        return;
    }
    let environment = match environment() {
        Ok(environment) => environment,
        Err(error) => {
            // Past the capture of tests that pass: a skipped one should be seen.
            let text = format!("skipped without a software Vulkan driver: {tests:?} ({error})\n");
            let _ = std::io::stderr().write_all(text.as_bytes());
            return;
        }
    };
    let test = std::env::current_exe().expect("a test knows its program");
    let output = Command::new(test)
        .args(["--exact", "--include-ignored"])
        .args(tests)
        .envs(environment)
        .envs(variables.iter().copied())
        .output()
        .expect("a test can be started again");
    let text = String::from_utf8_lossy(&output.stdout);
    let passed = format!("test result: ok. {} passed", tests.len());
    assert!(
        output.status.success() && text.contains(&passed),
        "{}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}
