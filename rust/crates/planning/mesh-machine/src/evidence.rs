//! A node's evidence about its system and hardware, read below any root. Unreadable parts stay empty.

use std::io::Read;
use std::path::Path;

use arcanum_profiler::gpu::Gpu;
use data_encoding::{BitOrder, Encoding, Specification};
use mesh_proto::{Evidence, NixSystem};
use nix_nar::Encoder;
use sha2::{Digest, Sha256};

use crate::files::{kernel_text, read_text};
use crate::hardware::{probe, shown};

/// Reads the evidence of the machine below `root`, which is `/` except in tests. `version` is that of HydraMesh. The models
/// are the caller's to add.
pub fn collect(root: &Path, version: &str) -> Evidence {
    let line = |path: &str| shown(&kernel_text(&root.join(path)).unwrap_or_default());
    let hardware = probe(root);
    let release = OsRelease::read(root);
    let gpus = hardware.gpus.iter().take(MOST_GPUS).map(gpu_name);
    Evidence {
        form: FORM,
        version: shown(version),
        kernel: line("proc/sys/kernel/osrelease"),
        os: release.id,
        os_version: release.version,
        architecture: std::env::consts::ARCH.to_owned(),
        processor: hardware.cpu.model.unwrap_or_default(),
        threads: u32::try_from(hardware.cpu.threads).unwrap_or(u32::MAX),
        memory_mib: hardware.memory_bytes.unwrap_or(0) >> 20,
        gpus: gpus.collect(),
        boot: line("proc/sys/kernel/random/boot_id"),
        models: Vec::new(),
        system: nix_system(root),
    }
}

/// Vendor and device; names and memory depend on drivers.
fn gpu_name(gpu: &Gpu) -> String {
    format!(
        "{:?} {:04x}:{:04x}",
        gpu.vendor, gpu.vendor_id, gpu.device_id
    )
}

/// The parts of os-release (os-release(5)) that count.
#[derive(Debug, Default, PartialEq, Eq)]
struct OsRelease {
    id: String,
    version: String,
}

impl OsRelease {
    fn read(root: &Path) -> Self {
        let files = ["etc/os-release", "usr/lib/os-release"];
        let text = files
            .iter()
            .find_map(|file| read_text(&root.join(file)).ok());
        text.map_or_else(Self::default, |text| Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let value = |wanted: &str| {
            let mut lines = text.lines().filter_map(|line| line.split_once('='));
            let (_, value) = lines.find(|(key, _)| key.trim() == wanted)?;
            let value = value.trim();
            let quoted = ['"', '\''].iter().find_map(|quote| {
                let inner = value.strip_prefix(*quote)?;
                inner.strip_suffix(*quote)
            });
            Some(shown(quoted.unwrap_or(value)))
        };
        // Systems without releases have a build instead.
        let version = value("VERSION_ID").or_else(|| value("BUILD_ID"));
        Self {
            id: value("ID").unwrap_or_default(),
            version: version.unwrap_or_default(),
        }
    }
}

/// The running NixOS system; `None` elsewhere.
fn nix_system(root: &Path) -> Option<NixSystem> {
    let target = std::fs::read_link(root.join("run/current-system")).ok()?;
    let path = target.to_str()?;
    let name = path.strip_prefix(STORE)?;
    if name.contains('/') || path.len() > LONGEST_PATH || path.contains(char::is_control) {
        return None;
    }
    let narinfo = read_text(&root.join(NARINFO)).unwrap_or_default();
    let on_disk = root.join(path.trim_start_matches('/'));
    Some(NixSystem {
        path: path.to_owned(),
        nar_hash: nar_hash(&on_disk).unwrap_or_default(),
        narinfo: match narinfo.len() <= LONGEST_NARINFO {
            true => narinfo,
            false => String::new(),
        },
    })
}

/// SHA-256 of the path's NAR, as Nix writes it. `None` if it cannot be read, or is so large that it is no system: the
/// system's path has links to its parts.
fn nar_hash(path: &Path) -> Option<String> {
    let nar = Encoder::new(path).ok()?;
    let (mut nar, mut hash, mut bytes) = (nar.take(LARGEST_NAR + 1), Sha256::new(), 0);
    // The encoder writes a link into the buffer at once.
    let mut buffer = vec![0; 64 << 10];
    loop {
        match nar.read(&mut buffer).ok()? {
            0 => break,
            read => {
                hash.update(&buffer[..read]);
                bytes += read as u64;
            }
        }
    }
    (bytes <= LARGEST_NAR).then(|| format!("sha256:{}", base32(&hash.finalize())))
}

/// Nix's base 32: its own digits, the last byte first.
fn base32(digest: &[u8]) -> String {
    let mut specification = Specification::new();
    specification
        .symbols
        .push_str("0123456789abcdfghijklmnpqrsvwxyz");
    specification.bit_order = BitOrder::LeastSignificantFirst;
    let encoding: Encoding = specification.encoding().expect("32 distinct digits");
    encoding.encode(digest).chars().rev().collect()
}

/// Form of the evidence that this version writes.
const FORM: u32 = 1;
const STORE: &str = "/nix/store/";
/// The narinfo of the running system, where a service writes it (docs/how-to/join-nodes.md).
const NARINFO: &str = "run/hydramesh/system.narinfo";
const MOST_GPUS: usize = 8;
const LONGEST_PATH: usize = 255;
const LONGEST_NARINFO: usize = 16 << 10;
const LARGEST_NAR: u64 = 64 << 20;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;
    use crate::files::tests::tree;

    const SYSTEM: &str = "/nix/store/1x5yixv9dljwz8bjzmyjxd0dnzi9pxqc-nixos-system-attic-26.05";

    #[test]
    fn a_made_up_machine_is_described_and_no_control_character_comes_through() {
        let gpu = "sys/bus/pci/devices/0000:01:00.0";
        let root = tree(&[
            ("proc/sys/kernel/osrelease", "6.12.30\n"),
            ("proc/sys/kernel/random/boot_id", "0b5f\u{1b}[31m-77\n"),
            (
                "proc/cpuinfo",
                "processor: 0\nmodel name: Old CPU\nprocessor: 1\n",
            ),
            ("proc/meminfo", "MemTotal: 8388608 kB\n"),
            (
                "etc/os-release",
                "NAME=NixOS\nID=nixos\nVERSION_ID=\"26.05\"\n",
            ),
            (&format!("{gpu}/vendor"), "0x10de\n"),
            (&format!("{gpu}/device"), "0x2684\n"),
            (&format!("{gpu}/class"), "0x030000\n"),
        ]);
        let evidence = collect(root.path(), "0.1.0");
        let expected = Evidence {
            form: 1,
            version: "0.1.0".into(),
            kernel: "6.12.30".into(),
            os: "nixos".into(),
            os_version: "26.05".into(),
            architecture: std::env::consts::ARCH.into(),
            processor: "Old CPU".into(),
            threads: 2,
            memory_mib: 8192,
            gpus: vec!["Nvidia 10de:2684".into()],
            boot: "0b5f[31m-77".into(),
            models: Vec::new(),
            system: None,
        };
        assert_eq!(evidence, expected);
        let empty = collect(Path::new("/nowhere"), "0.1.0");
        assert_eq!((empty.os.as_str(), empty.memory_mib), ("", 0));
    }

    #[test]
    fn a_running_nixos_system_has_its_path_narinfo_and_hash() {
        let root = tree(&[(NARINFO, "StorePath: x\n"), ("nix/store/other", "")]);
        let link = root.path().join("run/current-system");
        symlink(SYSTEM, &link).unwrap();
        let system = collect(root.path(), "").system.unwrap();
        assert_eq!(
            (system.path.as_str(), system.nar_hash.as_str()),
            (SYSTEM, "")
        );
        assert_eq!(system.narinfo, "StorePath: x\n");
        std::fs::create_dir_all(root.path().join(&SYSTEM[1..])).unwrap();
        let system = collect(root.path(), "").system.unwrap();
        assert!(system.nar_hash.starts_with("sha256:"), "{system:?}");
        for elsewhere in ["/home/x", "/nix/store/a/b", "/nix/store/a\u{7}"] {
            std::fs::remove_file(&link).unwrap();
            symlink(elsewhere, &link).unwrap();
            assert_eq!(collect(root.path(), "").system, None, "{elsewhere}");
        }
    }

    /// The expected text is that of `nix-hash --type sha256 --base32`.
    #[test]
    fn the_hash_of_a_path_is_the_one_that_nix_computes() {
        let root = tree(&[("system/init", "#!/bin/sh\n"), ("system/name", "attic\n")]);
        let system = root.path().join("system");
        let init = system.join("init");
        std::fs::set_permissions(&init, std::fs::Permissions::from_mode(0o755)).unwrap();
        symlink("/nix/store/kernel", system.join("kernel")).unwrap();
        std::fs::create_dir(system.join("etc")).unwrap();
        assert_eq!(
            nar_hash(&system).as_deref(),
            Some("sha256:01jzbbmqi2salffgf3bidy4b48dgw485jmhqhqh4a385cxkpf7lq")
        );
        assert_eq!(nar_hash(&root.path().join("missing")), None);
    }

    #[test]
    fn the_release_of_a_system_is_read_from_either_file_with_either_quotes() {
        let debian = "ID='debian'\nVERSION_ID = \"12\"\n";
        let (id, version) = ("debian".to_owned(), "12".to_owned());
        let root = tree(&[("usr/lib/os-release", debian)]);
        assert_eq!(OsRelease::read(root.path()), OsRelease { id, version });
        let arch = OsRelease::parse("ID=arch\nBUILD_ID=rolling\n");
        assert_eq!(arch.version, "rolling");
        assert_eq!(OsRelease::parse("ID"), OsRelease::default());
    }
}
