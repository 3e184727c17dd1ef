//! Measures a machine once, and keeps slow measurements in a file.

use std::io;
use std::path::{Path, PathBuf};

use arcanum_profiler::profile::{Key, LayerSpeed, Profile};
use mesh_base::files;
use mesh_engine_ort::WeightFormat;
use mesh_kernels::Isa;
use mesh_model::Model;
use mesh_model::file::read_limited;
use serde::{Deserialize, Serialize};

use super::bandwidth::read_bandwidth;
use super::disk;
use super::layers::{MeasureError, measure_layers};
use super::options::ProfileOptions;
use crate::hardware::probe;
use crate::memory::Memory;
use crate::nvml;
use crate::processor::{last_level_cache, load};

/// A machine's profile, and the inputs for further measurements.
#[derive(Debug)]
pub struct Profiler {
    /// All that is known so far.
    pub profile: Profile,
    options: ProfileOptions,
    disk_folder: Option<PathBuf>,
}

/// Content of `profile.json`.
#[derive(Debug, Serialize, Deserialize)]
struct SavedProfile {
    key: Key,
    memory_bandwidth: f64,
    disk: Option<SavedDisk>,
    speeds: Vec<LayerSpeed>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedDisk {
    folder: PathBuf,
    bytes_per_second: f64,
}

impl Profiler {
    /// Reads the machine's hardware and measures its speed. Earlier measurements on the same processor, with
    /// the same threads, kernels and program, are taken from the file; the rest takes about half a second.
    /// Never fails: unmeasurable values are unknown, and an unusable file is a warning.
    pub fn take(options: ProfileOptions) -> Profiler {
        let root = options.root.as_path();
        // Before measuring, which is load itself.
        let load = load(root);
        let threads = options.threads();
        let mut hardware = probe(root);
        nvml::report(&mut hardware.gpus);
        hardware.gpus.retain(|gpu| gpu.reported.is_some());
        hardware.gpus.truncate(MOST_GPUS);
        let key = Key {
            cpu: hardware.cpu.model.unwrap_or_else(|| "unknown".into()),
            threads: threads.min(4096) as u32,
            isa: Isa::current().name().into(),
            program: env!("CARGO_PKG_VERSION").into(),
        };
        let file = options.file();
        let (kept, remeasured) = match file.as_deref().map(read) {
            None | Some(Ok(None)) => (None, None),
            Some(Ok(Some(kept))) if kept.key == key => (Some(kept), None),
            Some(Ok(Some(kept))) => (None, Some(kept.key.difference(&key))),
            Some(Err(error)) => (None, Some(format!("it cannot be read: {error}"))),
        };
        if let (Some(why), Some(file)) = (&remeasured, &file) {
            tracing::warn!(file = %file.display(), "measuring this machine again, the kept profile is not used: {why}");
        }
        let memory = Memory::read(root);
        let available = memory.available.unwrap_or(0);
        let mut disk_folder = options.model.as_deref().and_then(folder);
        let mut profile = Profile {
            memory_total: memory.total.unwrap_or(0),
            memory_available: usable(available, options.memory_limit),
            memory_bandwidth: 0.0,
            disk_read: 0.0,
            gpus: hardware.gpus,
            load,
            reserved_for: options.reserved_for.clone(),
            paths: Vec::new(),
            speeds: Vec::new(),
            remeasured,
            key,
        };
        let mut changed = false;
        if let Some(kept) = kept {
            profile.memory_bandwidth = sane(kept.memory_bandwidth);
            let same = |disk: &SavedDisk| disk_folder.as_ref().is_none_or(|it| *it == disk.folder);
            if let Some(disk) = kept.disk.filter(same) {
                profile.disk_read = sane(disk.bytes_per_second);
                disk_folder = Some(disk.folder);
            }
            profile.speeds = kept.speeds;
            profile.speeds.retain(|speed| {
                speed.is_sane() && WeightFormat::from_name(&speed.format).is_some()
            });
        }
        if profile.memory_bandwidth == 0.0 {
            let cache = last_level_cache(root, threads);
            let bytes = (4 * cache).clamp(64 << 20, 512 << 20).min(available / 4);
            profile.memory_bandwidth = sane(read_bandwidth(threads, bytes));
            changed = true;
        }
        if let Some(model) = options.model.as_deref()
            && profile.disk_read == 0.0
        {
            profile.disk_read = sane(disk::read_speed(model));
            changed = true;
        }
        let profiler = Profiler {
            profile,
            options,
            disk_folder,
        };
        if changed {
            profiler.keep();
        }
        profiler
    }

    /// Speed of `model`'s layers in `format`: from the file, or measured now and written to it.
    ///
    /// # Errors
    /// If they cannot be measured.
    pub fn layers(
        &mut self,
        model: &Model,
        format: WeightFormat,
    ) -> Result<LayerSpeed, MeasureError> {
        let fingerprint = model.fingerprint()?;
        let speeds = &mut self.profile.speeds;
        let same =
            |speed: &&LayerSpeed| speed.fingerprint == fingerprint && speed.format == format.name();
        if let Some(known) = speeds.iter().find(same) {
            return Ok(known.clone());
        }
        let speed = measure_layers(model, format, &self.options)?;
        if speeds.len() >= MOST_SPEEDS {
            speeds.remove(0);
        }
        speeds.push(speed.clone());
        self.keep();
        Ok(speed)
    }

    /// Writes the slow measurements. A failure only costs the time to measure again.
    fn keep(&self) {
        let Some(file) = self.options.file() else {
            return;
        };
        let profile = &self.profile;
        let disk = self.disk_folder.clone().filter(|_| profile.disk_read > 0.0);
        let kept = SavedProfile {
            key: profile.key.clone(),
            memory_bandwidth: profile.memory_bandwidth,
            disk: disk.map(|folder| SavedDisk {
                folder,
                bytes_per_second: profile.disk_read,
            }),
            speeds: profile.speeds.clone(),
        };
        if let Err(error) = write(&file, &kept) {
            tracing::warn!(file = %file.display(), %error, "the profile of this machine cannot be kept");
        }
    }
}

/// Memory for this program: a tenth of the available memory stays free for the rest of the system.
fn usable(available: u64, limit: Option<u64>) -> u64 {
    (available - available / 10).min(limit.unwrap_or(u64::MAX))
}

/// Rounds to whole bytes per second, which JSON returns unchanged; 0 for an implausible speed.
fn sane(speed: f64) -> f64 {
    match (1.0..=1e15).contains(&speed) {
        true => speed.round(),
        false => 0.0,
    }
}

fn folder(model: &Path) -> Option<PathBuf> {
    Some(model.canonicalize().ok()?.parent()?.to_owned())
}

fn read(file: &Path) -> io::Result<Option<SavedProfile>> {
    let text = read_limited(file, MOST_FILE)?;
    let saved = text.map(|text| serde_json::from_slice(&text)).transpose();
    Ok(saved?)
}

/// Replaces the file by renaming a complete one, so that no reader sees half of it.
fn write(file: &Path, kept: &SavedProfile) -> io::Result<()> {
    let mut text = serde_json::to_vec_pretty(kept)?;
    text.push(b'\n');
    files::replace(file, &text, files::PUBLIC)
}

/// No file of ours is larger.
const MOST_FILE: u64 = 1 << 20;
const MOST_GPUS: usize = 32;
/// Models times formats whose speeds are kept.
const MOST_SPEEDS: usize = 256;

#[cfg(test)]
mod tests {
    use arcanum_profiler::profile::MeasuredPath;
    use mesh_proto::NodeProfile;

    use super::*;

    fn speed(format: &str, decode_us: f64) -> LayerSpeed {
        LayerSpeed {
            fingerprint: "ab".repeat(32),
            format: format.into(),
            layers: 30,
            hidden: 576,
            layer_bytes: 2_000_000,
            first_bytes: 30_000_000,
            last_bytes: 30_000_000,
            kv_bytes: 768,
            decode_us,
            prefill_us: 10.0,
            logits_us: 0.0,
        }
    }

    fn options(dir: &Path) -> ProfileOptions {
        ProfileOptions {
            state_dir: Some(dir.to_owned()),
            threads: 1,
            ..ProfileOptions::default()
        }
    }

    #[test]
    fn a_profile_is_measured_once() {
        let dir = tempfile::tempdir().expect("a folder");
        let options = options(dir.path());
        let mut profiler = Profiler::take(options.clone());
        let first = &mut profiler.profile;
        assert!(first.memory_bandwidth > 1e8, "{first:?}");
        assert!(first.memory_total >= first.memory_available && first.memory_available > 0);
        assert_eq!(first.remeasured, None);
        first.speeds = vec![
            speed("file", 100.0),
            speed("file", f64::MAX),
            speed("int2", 1.0),
        ];
        let bandwidth = first.memory_bandwidth;
        profiler.keep();
        let second = Profiler::take(options).profile;
        assert_eq!(second.memory_bandwidth, bandwidth);
        assert_eq!(second.speeds, [speed("file", 100.0)]);
        let names: Vec<_> = std::fs::read_dir(dir.path()).expect("a folder").collect();
        assert_eq!(names.len(), 1, "{names:?}");
    }

    #[test]
    fn another_machine_or_a_damaged_file_is_measured_again_and_said() {
        let dir = tempfile::tempdir().expect("a folder");
        let options = options(dir.path());
        let file = options.file().expect("a file");
        let take = || Profiler::take(options.clone()).profile;
        let mut kept = SavedProfile {
            key: take().key,
            memory_bandwidth: 12345.0,
            disk: None,
            speeds: vec![speed("file", 100.0)],
        };
        write(&file, &kept).expect("written");
        assert_eq!(take().memory_bandwidth, 12345.0);

        kept.key.cpu = "Z80".into();
        write(&file, &kept).expect("written");
        let again = take();
        let why = again.remeasured.expect("a reason");
        assert!(
            why.starts_with("the processor was \"Z80\" and is "),
            "{why}"
        );
        assert!(again.memory_bandwidth > 1e6 && again.speeds.is_empty());

        for damage in ["", "{", "[1e999]", "\u{0}"] {
            std::fs::write(&file, damage).expect("written");
            let again = take();
            assert!(
                again
                    .remeasured
                    .expect("a reason")
                    .contains("cannot be read")
            );
            assert!(again.memory_bandwidth > 1e6);
            assert_eq!(take().remeasured, None, "it was written anew");
        }
    }

    #[test]
    fn a_profile_travels_as_a_node_profile() {
        let mut profile = Profiler::take(ProfileOptions {
            threads: 1,
            memory_limit: Some(1 << 20),
            reserved_for: vec!["embeddings".into()],
            ..ProfileOptions::default()
        })
        .profile;
        profile.paths.push(MeasuredPath {
            node: String::new(),
            rtt_us: 250,
            bandwidth: 1e8,
        });
        let node = NodeProfile::from(&profile);
        assert_eq!((node.threads, node.memory_available), (1, 1 << 20));
        assert_eq!(node.paths[0].rtt_us, 250);
        assert_eq!(node.reserved_for, ["embeddings"]);
        assert_eq!(usable(1000, None), 900);
    }
}
