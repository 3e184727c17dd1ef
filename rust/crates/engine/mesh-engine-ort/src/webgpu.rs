//! WebGPU: ONNX Runtime's plugin for any GPU with a Vulkan driver.
//!
//! The plugin is a library of its own (PyPI package `onnxruntime-ep-webgpu`), loaded once per process.

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ort::device::Device;
use ort::environment::Environment;

use crate::provider::Provider;
use crate::runtime;
use crate::vulkan::{self, Adapter, AdapterKind};

/// Where the plugin's library is, unless the options say it.
pub(crate) const VARIABLE: &str = "ORT_WEBGPU_EP";

/// The plugin's own switch: with `1` software renderers are devices.
pub(crate) const SOFTWARE_VARIABLE: &str = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER";

/// The library's name in its package.
const LIBRARY: &str = "libonnxruntime_providers_webgpu.so";

/// The plugin's name for its devices.
const PROVIDER: &str = "WebGpuExecutionProvider";

/// The library that is loaded, and the device that it takes. ONNX Runtime keeps a plugin for as long as its
/// environment lives, which is as long as the process.
static LOADED: Mutex<Option<Adapter>> = Mutex::new(None);

/// The plugin's library: `option`, else what [`VARIABLE`] names, else one beside ONNX Runtime's library.
pub(crate) fn library(option: Option<&Path>) -> Option<PathBuf> {
    if let Some(path) = option {
        return Some(path.to_path_buf());
    }
    if let Some(path) = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
        return Some(path.into());
    }
    let beside = runtime::folder()?.join(LIBRARY);
    beside.is_file().then_some(beside)
}

/// Loads the plugin unless it is loaded, and returns the device on which it computes. The first load of a
/// process decides about the library.
///
/// # Errors
/// Why it cannot compute here, and what would help.
pub(crate) fn load(environment: &Environment, option: Option<&Path>) -> Result<Adapter, String> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(adapter) = &*loaded {
        return Ok(adapter.clone());
    }
    let path = library(option).ok_or_else(|| {
        format!(
            "its plugin {LIBRARY} is not configured and does not lie beside ONNX Runtime: take it from the PyPI package \
             `onnxruntime-ep-webgpu` 0.4.0 and name it in webgpu_library or {VARIABLE}"
        )
    })?;
    // A relative path would be taken from ONNX Runtime's own folder.
    let path = std::path::absolute(&path).unwrap_or(path);
    if !path.is_file() {
        return Err(format!(
            "there is no plugin at {}: correct webgpu_library or {VARIABLE}",
            path.display()
        ));
    }
    let adapters = vulkan::adapters(path.parent()).map_err(|error| error.to_string())?;
    let adapter = choose(&adapters, is_software_allowed())?.clone();
    environment
        .register_ep_library("hydramesh.webgpu", &path)
        .map_err(|error| format!("{} cannot be loaded: {error}", path.display()))?;
    if device(environment).is_none() {
        return Err(format!(
            "Vulkan has {adapter}, but the plugin lists no device: it looks for cards in /sys/class/drm, so load the card's kernel \
             driver (for NVIDIA nvidia-drm) and let this process see that folder"
        ));
    }
    tracing::info!(library = %path.display(), device = %adapter, half = adapter.half, "WebGPU plugin loaded");
    Ok(loaded.insert(adapter).clone())
}

/// The plugin's device. It lists one at most: which GPU that stands for is its own choice.
pub(crate) fn device(environment: &Environment) -> Option<Device<'_>> {
    environment
        .devices()
        .find(|device| device.ep().is_ok_and(|name| name == PROVIDER))
}

/// One user of the device at a time: all sessions of a process share the plugin's queue, which no lock of its own
/// protects, and two that run at once end the process.
static TURN: Mutex<()> = Mutex::new(());

/// Waits until nothing else uses the device; for other providers there is nothing to wait for.
pub(crate) fn turn(provider: Provider) -> Option<MutexGuard<'static, ()>> {
    (provider == Provider::WebGpu).then(|| TURN.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Something of the device, which is dropped in a [`turn`] of its own.
pub(crate) struct InTurn<T> {
    provider: Provider,
    /// Until the drop.
    value: Option<T>,
}

impl<T> InTurn<T> {
    pub(crate) fn new(provider: Provider, value: T) -> Self {
        InTurn {
            provider,
            value: Some(value),
        }
    }
}

impl<T> Deref for InTurn<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value.as_ref().expect("taken by the drop alone")
    }
}

impl<T> DerefMut for InTurn<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().expect("taken by the drop alone")
    }
}

impl<T> Drop for InTurn<T> {
    fn drop(&mut self) {
        let _turn = turn(self.provider);
        self.value = None;
    }
}

fn is_software_allowed() -> bool {
    std::env::var_os(SOFTWARE_VARIABLE).is_some_and(|value| value == "1")
}

/// The best of the devices, which are in the plugin's order.
fn choose(adapters: &[Adapter], software: bool) -> Result<&Adapter, String> {
    const REMEDY: &str = "install the Vulkan driver of the GPU (AMD and Intel: mesa-vulkan-drivers; NVIDIA: the proprietary driver's \
                          Vulkan part or Mesa's NVK; NixOS: hardware.graphics.enable), give this process access to /dev/dri, and \
                          check with vulkaninfo --summary";
    match adapters.first() {
        None => Err(format!("there is no Vulkan device: {REMEDY}")),
        Some(adapter) if adapter.kind == AdapterKind::Software && !software => Err(format!(
            "the only Vulkan device is {adapter}, which is slower than the CPU's own kernels: {REMEDY} \
             ({SOFTWARE_VARIABLE}=1 allows it, for tests)"
        )),
        Some(adapter) => Ok(adapter),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(name: &str, kind: AdapterKind) -> Adapter {
        Adapter {
            name: name.into(),
            vendor: 0x1002,
            kind,
            half: true,
        }
    }

    #[test]
    fn software_is_refused_unless_it_is_allowed_and_named_with_the_remedy() {
        let software = [adapter("llvmpipe (LLVM 15)", AdapterKind::Software)];
        let reason = choose(&software, false).unwrap_err();
        for part in [
            "llvmpipe",
            "software",
            "mesa-vulkan-drivers",
            SOFTWARE_VARIABLE,
        ] {
            assert!(reason.contains(part), "{reason}");
        }
        assert_eq!(choose(&software, true), Ok(&software[0]));
    }

    #[test]
    fn a_card_is_taken_beside_software_and_no_device_is_said() {
        let both = [
            adapter("Radeon", AdapterKind::Discrete),
            adapter("llvmpipe", AdapterKind::Software),
        ];
        assert_eq!(choose(&both, false).unwrap().name, "Radeon");
        let reason = choose(&[], true).unwrap_err();
        assert!(
            reason.contains("no Vulkan device") && reason.contains("/dev/dri"),
            "{reason}"
        );
    }
}
