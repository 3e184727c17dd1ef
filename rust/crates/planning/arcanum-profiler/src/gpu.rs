//! A graphics card or accelerator, as data: its ids and its driver's report.

use std::fmt;

use serde::Serialize;

use crate::generation::Generation;

/// A graphics card or accelerator on the PCI bus.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gpu {
    /// PCI address, such as `0000:01:00.0`.
    pub address: String,
    /// Manufacturer of the card, by its PCI vendor id.
    pub vendor: Vendor,
    /// PCI vendor id, such as `0x10de` for NVIDIA.
    pub vendor_id: u16,
    /// PCI device id, assigned by the vendor.
    pub device_id: u16,
    /// PCI class, 24 bits.
    pub class: u32,
    /// Real or virtual hardware.
    pub kind: GpuKind,
    /// NVIDIA: how old it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<Generation>,
    /// AMD: its instruction set, where the compute driver names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gfx: Option<Gfx>,
    /// Its node below /dev/dri, where a loaded driver lets programs compute on it, such as `renderD128`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub render_node: Option<String>,
    /// Name and memory, where its driver reports them.
    #[serde(flatten)]
    pub reported: Option<Reported>,
}

/// Name and memory of a GPU, as its driver reports them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reported {
    /// Name of the card as the driver reports it.
    pub name: String,
    /// Total memory of the card, bytes.
    pub vram_total: u64,
    /// Free memory of the card, bytes.
    pub vram_free: u64,
}

/// Vendors that are distinguished.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vendor {
    /// NVIDIA Corporation.
    Nvidia,
    /// AMD, formerly ATI.
    Amd,
    /// Intel Corporation.
    Intel,
    /// Any other vendor.
    Other,
}

/// Real or virtual hardware.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum GpuKind {
    /// A card, or a real one handed through to a virtual machine.
    Real,
    /// A picture that a hypervisor draws.
    Virtual,
}

/// Version of AMD's instruction set, `gfx90a` being 9, 0, 10.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(into = "String")]
pub struct Gfx {
    /// Generation of the instruction set: 9 in `gfx90a`.
    pub major: u32,
    /// Family within the generation: 0 in `gfx90a`.
    pub minor: u32,
    /// Chip within the family: 10 (`a`) in `gfx90a`.
    pub step: u32,
}

impl Gpu {
    /// A card with these ids and without a driver's report.
    pub fn new(address: String, vendor_id: u16, device_id: u16, class: u32) -> Self {
        let vendor = match vendor_id {
            0x10de => Vendor::Nvidia,
            0x1002 => Vendor::Amd,
            0x8086 => Vendor::Intel,
            _ => Vendor::Other,
        };
        let kind = match virtual_card(vendor_id) {
            Some(_) => GpuKind::Virtual,
            None => GpuKind::Real,
        };
        Self {
            address,
            vendor,
            vendor_id,
            device_id,
            class,
            kind,
            generation: (vendor == Vendor::Nvidia).then(|| Generation::of(device_id)),
            gfx: None,
            render_node: None,
            reported: None,
        }
    }
}

/// `NVIDIA card 10de:1b80 at 0000:01:00.0 (Maxwell or Pascal)`.
impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let made_by = match self.vendor {
            Vendor::Nvidia => "NVIDIA card",
            Vendor::Amd => "AMD card",
            Vendor::Intel => "Intel GPU",
            Vendor::Other => virtual_card(self.vendor_id).unwrap_or("card"),
        };
        let (vendor, device) = (self.vendor_id, self.device_id);
        write!(f, "{made_by} {vendor:04x}:{device:04x} at {}", self.address)?;
        match (self.generation, self.gfx) {
            (Some(generation), _) => write!(f, " ({generation})"),
            (None, Some(gfx)) => write!(f, " ({gfx})"),
            (None, None) => Ok(()),
        }
    }
}

/// The name in JSON and on the wire.
impl fmt::Display for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Vendor::Nvidia => "nvidia",
            Vendor::Amd => "amd",
            Vendor::Intel => "intel",
            Vendor::Other => "other",
        })
    }
}

impl fmt::Display for Gfx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gfx{}{:x}{:x}", self.major, self.minor, self.step)
    }
}

impl From<Gfx> for String {
    fn from(gfx: Gfx) -> Self {
        gfx.to_string()
    }
}

fn virtual_card(vendor_id: u16) -> Option<&'static str> {
    let known = VIRTUAL_VENDORS.iter().find(|(id, _)| *id == vendor_id);
    known.map(|(_, name)| *name)
}

/// Makers of cards that exist in virtual machines only (pci.ids).
const VIRTUAL_VENDORS: &[(u16, &str)] = &[
    (0x1af4, "virtual card (virtio)"),
    (0x1b36, "virtual card (QXL)"),
    (0x15ad, "virtual card (VMware)"),
    (0x1414, "virtual card (Hyper-V)"),
    (0x1013, "virtual card (Cirrus)"),
    (0x1234, "virtual card (Bochs)"),
    (0x80ee, "virtual card (VirtualBox)"),
    (0x1ab8, "virtual card (Parallels)"),
];
