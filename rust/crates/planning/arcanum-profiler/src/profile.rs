//! What a machine is and how fast: measured once, kept in a file.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use mesh_engine_ort::WeightFormat;
use mesh_kernels::Isa;
use mesh_model::Model;
use mesh_proto::{GpuProfile, NodeProfile, PathProfile};
use serde::{Deserialize, Serialize};

use crate::layers::{LayerSpeed, MeasureError, measure_layers};
use crate::{Gpu, LoadMeter, disk, gpu, machine, memory};

/// What to measure, and where to keep it.
#[derive(Debug, Clone)]
pub struct ProfileOptions {
    /// Folder in which `profile.json` is kept; `None` measures every time.
    pub state_dir: Option<PathBuf>,
    /// A model file on the disk whose speed counts; `None` leaves it unknown.
    pub model: Option<PathBuf>,
    /// Threads that compute; 0 is one per available core.
    pub threads: usize,
    /// Most memory that weights and KV cache may take, bytes, if the operator set a limit.
    pub memory_limit: Option<u64>,
    /// What the operator keeps this node for.
    pub reserved_for: Vec<String>,
    /// ONNX Runtime's library; `None` is the environment's.
    pub library: Option<PathBuf>,
    /// Where proc and sys lie: `/` but in tests.
    pub root: PathBuf,
}

impl Default for ProfileOptions {
    fn default() -> Self {
        ProfileOptions {
            state_dir: None,
            model: None,
            threads: 0,
            memory_limit: None,
            reserved_for: Vec::new(),
            library: None,
            root: "/".into(),
        }
    }
}

impl ProfileOptions {
    /// Threads that compute, at least 1.
    pub fn threads(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        }
    }
}

/// What a machine is and how fast.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Profile {
    /// What the kept measurements hold for.
    #[serde(flatten)]
    pub key: Key,
    /// Memory, bytes.
    pub memory_total: u64,
    /// Memory that may be used for weights and KV cache, bytes.
    pub memory_available: u64,
    /// Read bandwidth of the memory, bytes per second; 0 is unknown.
    pub memory_bandwidth: f64,
    /// Read speed of the disk with the models, bytes per second; 0 is unknown.
    pub disk_read: f64,
    /// GPUs whose memory their driver tells.
    pub gpus: Vec<Gpu>,
    /// Processes ready to run per core beside this one's own.
    pub load: f32,
    /// What the operator keeps this node for.
    pub reserved_for: Vec<String>,
    /// Paths to other nodes; whoever measures them adds them.
    pub paths: Vec<MeasuredPath>,
    /// Layers of models that were measured.
    pub speeds: Vec<LayerSpeed>,
    /// Why measurements that were kept are not used, if any were there.
    pub remeasured: Option<String>,
    #[serde(skip)]
    file: Option<PathBuf>,
    #[serde(skip)]
    disk_folder: Option<PathBuf>,
}

/// What measurements hold for: they are made again when it changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// The processor.
    pub cpu: String,
    /// Threads that compute.
    pub threads: u32,
    /// Instruction set of the kernels.
    pub isa: String,
    /// Version of this program.
    pub program: String,
}

/// A measured path to another node.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MeasuredPath {
    /// Node id of the other end; empty is the head.
    pub node: String,
    /// Round trip, microseconds.
    pub rtt_us: u32,
    /// Bytes per second; 0 is unknown.
    pub bandwidth: f64,
}

/// The file.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    key: Key,
    memory_bandwidth: f64,
    disk: Option<KeptDisk>,
    speeds: Vec<LayerSpeed>,
}

#[derive(Debug, Serialize, Deserialize)]
struct KeptDisk {
    folder: PathBuf,
    bytes_per_second: f64,
}

impl Profile {
    /// Finds out what the machine is. What was measured before on the same processor, with the same threads, kernels and program, is
    /// taken from the file; the rest takes about half a second. Nothing in here fails: what cannot be found out is
    /// unknown, and a file that cannot be used is a warning.
    pub fn take(options: &ProfileOptions) -> Profile {
        // Before measuring, which is load itself.
        let load = LoadMeter::new().read();
        let root = options.root.as_path();
        let threads = options.threads();
        let key = Key {
            cpu: machine::cpu_name(root),
            threads: threads.min(4096) as u32,
            isa: Isa::current().name().into(),
            program: env!("CARGO_PKG_VERSION").into(),
        };
        let file = options.state_dir.as_ref().map(|dir| dir.join(FILE));
        let (kept, remeasured) = match file.as_deref().map(read) {
            None | Some(Ok(None)) => (None, None),
            Some(Ok(Some(kept))) if kept.key == key => (Some(kept), None),
            Some(Ok(Some(kept))) => (None, Some(kept.key.difference(&key))),
            Some(Err(error)) => (None, Some(format!("it cannot be read: {error}"))),
        };
        if let (Some(why), Some(file)) = (&remeasured, &file) {
            tracing::warn!(file = %file.display(), "measuring this machine again, the kept profile is not used: {why}");
        }
        let (memory_total, available) = machine::memory(root);
        let disk_folder = options.model.as_deref().and_then(folder);
        let mut profile = Profile {
            memory_total,
            memory_available: usable(available, options.memory_limit),
            memory_bandwidth: 0.0,
            disk_read: 0.0,
            gpus: gpu::all(root),
            load,
            reserved_for: options.reserved_for.clone(),
            paths: Vec::new(),
            speeds: Vec::new(),
            remeasured,
            key,
            file,
            disk_folder,
        };
        let mut changed = false;
        if let Some(kept) = kept {
            profile.memory_bandwidth = sane(kept.memory_bandwidth);
            if let Some(disk) = kept.disk
                && profile
                    .disk_folder
                    .as_ref()
                    .is_none_or(|folder| *folder == disk.folder)
            {
                profile.disk_read = sane(disk.bytes_per_second);
                profile.disk_folder = Some(disk.folder);
            }
            profile.speeds = kept.speeds;
            profile.speeds.retain(LayerSpeed::is_sane);
        }
        if profile.memory_bandwidth == 0.0 {
            let cache = machine::last_level_cache(root, threads);
            let bytes = (4 * cache).clamp(64 << 20, 512 << 20).min(available / 4);
            profile.memory_bandwidth = sane(memory::bandwidth(threads, bytes));
            changed = true;
        }
        if let Some(model) = options.model.as_deref()
            && profile.disk_read == 0.0
        {
            profile.disk_read = sane(disk::read_speed(model));
            changed = true;
        }
        if changed {
            profile.keep();
        }
        profile
    }

    /// Speed of `model`'s layers held as `format`: kept, or measured now and kept.
    ///
    /// # Errors
    /// If they cannot be measured.
    pub fn layers(
        &mut self,
        model: &Model,
        format: WeightFormat,
        options: &ProfileOptions,
    ) -> Result<LayerSpeed, MeasureError> {
        let fingerprint = model.fingerprint()?;
        let known = self
            .speeds
            .iter()
            .find(|speed| speed.fingerprint == fingerprint && speed.format == format.name());
        if let Some(known) = known {
            return Ok(known.clone());
        }
        let speed = measure_layers(model, format, options)?;
        if self.speeds.len() >= MOST_SPEEDS {
            self.speeds.remove(0);
        }
        self.speeds.push(speed.clone());
        self.keep();
        Ok(speed)
    }

    /// Writes what took time to measure. That it cannot be written costs the same time again, and nothing else.
    fn keep(&self) {
        let Some(file) = &self.file else { return };
        let kept = Kept {
            key: self.key.clone(),
            memory_bandwidth: self.memory_bandwidth,
            disk: self
                .disk_folder
                .clone()
                .filter(|_| self.disk_read > 0.0)
                .map(|folder| KeptDisk {
                    folder,
                    bytes_per_second: self.disk_read,
                }),
            speeds: self.speeds.clone(),
        };
        if let Err(error) = write(file, &kept) {
            tracing::warn!(file = %file.display(), %error, "the profile of this machine cannot be kept");
        }
    }
}

impl Key {
    /// What changed, in words.
    fn difference(&self, now: &Key) -> String {
        let threads = (self.threads.to_string(), now.threads.to_string());
        let fields = [
            ("processor", &self.cpu, &now.cpu),
            ("number of threads", &threads.0, &threads.1),
            ("instruction set", &self.isa, &now.isa),
            ("version of the program", &self.program, &now.program),
        ];
        let changes: Vec<String> = fields
            .iter()
            .filter(|(_, then, now)| then != now)
            .map(|(what, then, now)| format!("the {what} was {then:?} and is {now:?}"))
            .collect();
        changes.join(", ")
    }
}

impl From<&Profile> for NodeProfile {
    fn from(profile: &Profile) -> Self {
        let gpus = profile.gpus.iter().map(|gpu| GpuProfile {
            name: gpu.name.clone(),
            vendor: gpu.vendor.clone(),
            vram_total: gpu.vram_total,
            vram_free: gpu.vram_free,
        });
        let paths = profile.paths.iter().map(|path| PathProfile {
            node_id: path.node.clone(),
            rtt_us: path.rtt_us,
            bandwidth: path.bandwidth,
        });
        NodeProfile {
            threads: profile.key.threads,
            isa: profile.key.isa.clone(),
            memory_total: profile.memory_total,
            memory_available: profile.memory_available,
            memory_bandwidth: profile.memory_bandwidth,
            disk_read: profile.disk_read,
            gpus: gpus.collect(),
            paths: paths.collect(),
            load: profile.load,
            reserved_for: profile.reserved_for.clone(),
        }
    }
}

/// What is left to the rest of the system stays free.
fn usable(available: u64, limit: Option<u64>) -> u64 {
    (available - available / 10).min(limit.unwrap_or(u64::MAX))
}

/// Whole bytes per second, which JSON gives back as they were; 0 for what nobody can have measured.
fn sane(speed: f64) -> f64 {
    if (1.0..=1e15).contains(&speed) {
        speed.round()
    } else {
        0.0
    }
}

fn folder(model: &Path) -> Option<PathBuf> {
    Some(model.canonicalize().ok()?.parent()?.to_owned())
}

fn read(file: &Path) -> io::Result<Option<Kept>> {
    let opened = match File::open(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let mut text = Vec::new();
    opened.take(MOST_FILE).read_to_end(&mut text)?;
    Ok(Some(serde_json::from_slice(&text)?))
}

/// A new file takes the old one's place, so that nobody ever reads half of it.
fn write(file: &Path, kept: &Kept) -> io::Result<()> {
    let new = file.with_extension(format!("json.{}", std::process::id()));
    let mut text = serde_json::to_vec_pretty(kept)?;
    text.push(b'\n');
    let written = File::create(&new).and_then(|mut file| file.write_all(&text));
    let renamed = written.and_then(|()| std::fs::rename(&new, file));
    if renamed.is_err() {
        let _ = std::fs::remove_file(&new);
    }
    renamed
}

const FILE: &str = "profile.json";
/// No file of ours is larger.
const MOST_FILE: u64 = 1 << 20;
/// Models times formats whose speeds are kept.
const MOST_SPEEDS: usize = 256;

#[cfg(test)]
mod tests {
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
        let mut first = Profile::take(&options);
        assert!(first.memory_bandwidth > 1e8, "{first:?}");
        assert!(first.memory_total >= first.memory_available && first.memory_available > 0);
        assert_eq!(first.remeasured, None);
        first.speeds = vec![
            speed("file", 100.0),
            speed("file", f64::MAX),
            speed("int2", 1.0),
        ];
        first.keep();
        let second = Profile::take(&options);
        assert_eq!(second.memory_bandwidth, first.memory_bandwidth);
        assert_eq!(second.speeds, [speed("file", 100.0)]);
        let names: Vec<_> = std::fs::read_dir(dir.path()).expect("a folder").collect();
        assert_eq!(names.len(), 1, "{names:?}");
    }

    #[test]
    fn another_machine_or_a_damaged_file_is_measured_again_and_said() {
        let dir = tempfile::tempdir().expect("a folder");
        let options = options(dir.path());
        let file = dir.path().join(FILE);
        let mut kept = Kept {
            key: Profile::take(&options).key,
            memory_bandwidth: 12345.0,
            disk: None,
            speeds: vec![speed("file", 100.0)],
        };
        write(&file, &kept).expect("written");
        assert_eq!(Profile::take(&options).memory_bandwidth, 12345.0);

        kept.key.cpu = "Z80".into();
        write(&file, &kept).expect("written");
        let again = Profile::take(&options);
        let why = again.remeasured.expect("a reason");
        assert!(
            why.starts_with("the processor was \"Z80\" and is "),
            "{why}"
        );
        assert!(again.memory_bandwidth > 1e6 && again.speeds.is_empty());

        for damage in ["", "{", "[1e999]", "\u{0}"] {
            std::fs::write(&file, damage).expect("written");
            let again = Profile::take(&options);
            assert!(
                again
                    .remeasured
                    .expect("a reason")
                    .contains("cannot be read")
            );
            assert!(again.memory_bandwidth > 1e6);
            assert_eq!(
                Profile::take(&options).remeasured,
                None,
                "it was written anew"
            );
        }
    }

    #[test]
    fn a_profile_travels_as_a_node_profile() {
        let mut profile = Profile::take(&ProfileOptions {
            threads: 1,
            memory_limit: Some(1 << 20),
            reserved_for: vec!["embeddings".into()],
            ..ProfileOptions::default()
        });
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
