//! The machine's Vulkan devices, on which the WebGPU plugin computes.
//!
//! The plugin chooses a device by itself and does not say which: without a card's driver it takes a software
//! renderer, which is slower than the CPU's own stage. So they are looked at before.

use std::ffi::CStr;
use std::fmt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;

use ash::vk;

/// A Vulkan device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adapter {
    /// The driver's name for it, such as `AMD Radeon RX 580 (RADV POLARIS10)`.
    pub name: String,
    /// PCI vendor id, or an id of the Khronos group for software.
    pub vendor: u32,
    /// The kind reported by the driver.
    pub kind: AdapterKind,
    /// Shaders compute with f16 and read it from buffers.
    pub half: bool,
}

/// The kind of a Vulkan device.
// In the order in which the plugin, asked for speed, prefers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum AdapterKind {
    /// A card with memory of its own.
    Discrete,
    /// A GPU that shares the processor's memory.
    Integrated,
    /// A part of a GPU, or one behind a virtual machine.
    Virtual,
    /// None of these.
    Other,
    /// A program on the processor: lavapipe (llvmpipe), SwiftShader.
    Software,
}

impl fmt::Display for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            AdapterKind::Discrete => "a card of its own",
            AdapterKind::Integrated => "part of the processor",
            AdapterKind::Virtual => "virtual",
            AdapterKind::Other => "of unknown kind",
            AdapterKind::Software => "a software renderer",
        };
        write!(f, "{} ({kind}, vendor {:#06x})", self.name, self.vendor)
    }
}

/// Why there is no list of devices.
#[derive(Debug, thiserror::Error)]
pub enum VulkanError {
    /// The loader's library is absent.
    #[error(
        "the Vulkan loader libvulkan.so.1 cannot be loaded ({0}): install it (Debian, Ubuntu: libvulkan1; Fedora: vulkan-loader; \
         NixOS: hardware.graphics.enable)"
    )]
    NoLoader(String),
    /// A call of the loader or of a driver failed.
    #[error("Vulkan cannot be used: {0}")]
    Call(vk::Result),
}

impl From<vk::Result> for VulkanError {
    fn from(result: vk::Result) -> Self {
        VulkanError::Call(result)
    }
}

/// The loader, which stays in the process: the plugin then finds it by its name, wherever it came from.
static LOADER: Mutex<Option<ash::Entry>> = Mutex::new(None);

/// The Vulkan devices, best first; an empty list without a driver. The loader is taken from the folder
/// `beside`, if it has one, or from the system's folders.
///
/// # Errors
/// If there is no loader, or a driver fails.
pub fn adapters(beside: Option<&Path>) -> Result<Vec<Adapter>, VulkanError> {
    let entry = loader(beside)?;
    // SAFETY: the entry's functions are those of a Vulkan loader, and it is never unloaded.
    let version = unsafe { entry.try_enumerate_instance_version()? };
    let application = vk::ApplicationInfo::default().api_version(version.map_or(
        vk::API_VERSION_1_0,
        |version| match vk::api_version_minor(version) {
            0 => vk::API_VERSION_1_0,
            _ => vk::API_VERSION_1_1,
        },
    ));
    let info = vk::InstanceCreateInfo::default().application_info(&application);
    // SAFETY: the structures are complete and live as long as the call.
    let instance = match unsafe { entry.create_instance(&info, None) } {
        Ok(instance) => instance,
        // The loader's answer without any driver.
        Err(vk::Result::ERROR_INCOMPATIBLE_DRIVER) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    // SAFETY: the instance is alive.
    let devices = match unsafe { instance.enumerate_physical_devices() } {
        Ok(devices) => devices,
        Err(vk::Result::ERROR_INITIALIZATION_FAILED) => Vec::new(),
        Err(error) => {
            // SAFETY: nothing of the instance is used any more.
            unsafe { instance.destroy_instance(None) };
            return Err(error.into());
        }
    };
    let mut adapters: Vec<Adapter> = devices
        .into_iter()
        .map(|device| describe(&instance, device))
        .collect();
    // SAFETY: as above.
    unsafe { instance.destroy_instance(None) };
    adapters.sort_by_key(|adapter| adapter.kind);
    Ok(adapters)
}

fn loader(beside: Option<&Path>) -> Result<ash::Entry, VulkanError> {
    let mut loader = LOADER.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(entry) = &*loader {
        return Ok(entry.clone());
    }
    let own = beside.map(|folder| folder.join("libvulkan.so.1"));
    let loaded = match own.filter(|path| path.is_file()) {
        // SAFETY: loading a Vulkan loader runs its initialisers, which have no requirements.
        Some(path) => unsafe { ash::Entry::load_from(path) },
        // SAFETY: as above.
        None => unsafe { ash::Entry::load() },
    };
    let entry = loaded.map_err(|error| VulkanError::NoLoader(error.to_string()))?;
    Ok(loader.insert(entry).clone())
}

fn describe(instance: &ash::Instance, device: vk::PhysicalDevice) -> Adapter {
    // SAFETY: the device is one of this instance, which is alive.
    let properties = unsafe { instance.get_physical_device_properties(device) };
    let name = properties
        .device_name_as_c_str()
        .map_or("a device without a name".into(), CStr::to_string_lossy)
        .into_owned();
    let kind = match properties.device_type {
        _ if is_software(&name) => AdapterKind::Software,
        vk::PhysicalDeviceType::CPU => AdapterKind::Software,
        vk::PhysicalDeviceType::DISCRETE_GPU => AdapterKind::Discrete,
        vk::PhysicalDeviceType::INTEGRATED_GPU => AdapterKind::Integrated,
        vk::PhysicalDeviceType::VIRTUAL_GPU => AdapterKind::Virtual,
        _ => AdapterKind::Other,
    };
    Adapter {
        half: properties.api_version >= vk::API_VERSION_1_2 && computes_half(instance, device),
        vendor: properties.vendor_id,
        name,
        kind,
    }
}

/// Some software renderers call themselves GPUs.
fn is_software(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["llvmpipe", "lavapipe", "swiftshader"]
        .iter()
        .any(|software| name.contains(software))
}

/// All that WebGPU's f16 needs; of Vulkan 1.2.
fn computes_half(instance: &ash::Instance, device: vk::PhysicalDevice) -> bool {
    let mut arithmetic = vk::PhysicalDeviceShaderFloat16Int8Features::default();
    let mut storage = vk::PhysicalDevice16BitStorageFeatures::default();
    let mut features = vk::PhysicalDeviceFeatures2::default()
        .push_next(&mut arithmetic)
        .push_next(&mut storage);
    // SAFETY: the device is one of this instance, and its version has both structures.
    unsafe { instance.get_physical_device_features2(device, &mut features) };
    arithmetic.shader_float16 == vk::TRUE
        && storage.storage_buffer16_bit_access == vk::TRUE
        && storage.uniform_and_storage_buffer16_bit_access == vk::TRUE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn software_renderers_are_known_by_name() {
        for (name, software) in [
            ("llvmpipe (LLVM 15.0.6, 256 bits)", true),
            ("SwiftShader Device (LLVM 10.0.0)", true),
            ("AMD Radeon RX 580 Series (RADV POLARIS10)", false),
            ("Intel(R) HD Graphics 4000 (IVB GT2)", false),
            ("NVIDIA GeForce GTX 1060 6GB", false),
        ] {
            assert_eq!(is_software(name), software, "{name}");
        }
    }

    #[test]
    fn hardware_comes_before_software() {
        assert!(AdapterKind::Discrete < AdapterKind::Integrated);
        assert!(AdapterKind::Other < AdapterKind::Software);
    }
}
