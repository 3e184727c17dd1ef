//! Profiles as data: a machine, how fast it is, and how it says so to a head.

use mesh_proto::{GpuProfile, LayerOffer, ModelCard, NodeProfile, PathProfile};
use serde::{Deserialize, Serialize};

use crate::gpu::Gpu;
use crate::place::{ModelSpec, known};

/// A machine and its speeds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Profile {
    /// The conditions under which the kept measurements are valid.
    #[serde(flatten)]
    pub key: Key,
    /// Memory of the machine, bytes.
    pub memory_total: u64,
    /// Memory that may be used for weights and KV cache, bytes.
    pub memory_available: u64,
    /// Read bandwidth of the memory, bytes per second; 0 is unknown.
    pub memory_bandwidth: f64,
    /// Read speed of the disk with the models, bytes per second; 0 is unknown.
    pub disk_read: f64,
    /// GPUs whose driver reports their memory.
    pub gpus: Vec<Gpu>,
    /// Processes ready to run per core beside this one's own.
    pub load: f32,
    /// Purposes that the operator reserves this node for; empty means any.
    pub reserved_for: Vec<String>,
    /// Measured paths to other nodes.
    pub paths: Vec<MeasuredPath>,
    /// Layers of models that were measured.
    pub speeds: Vec<LayerSpeed>,
    /// Reason why kept measurements are not used, if there were any.
    pub remeasured: Option<String>,
}

/// The conditions under which measurements are valid: they are repeated when one changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// Name of the processor.
    pub cpu: String,
    /// Number of computing threads.
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
    /// Round-trip time, microseconds.
    pub rtt_us: u32,
    /// Bytes per second; 0 is unknown.
    pub bandwidth: f64,
}

/// Speed and size of one model's layers on this machine, in one weight format.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerSpeed {
    /// SHA-256 of the model file, lower-case hex.
    pub fingerprint: String,
    /// Weight format: `file`, `int8` or `int4`.
    pub format: String,
    /// Layers in the model.
    pub layers: u32,
    /// Width of a hidden row.
    pub hidden: u32,
    /// Bytes of one layer in memory, the mean over all. Of a mixture of experts all experts count, though a
    /// token reads only some: the times below are those of the experts that are used.
    pub layer_bytes: u64,
    /// Bytes that the first stage needs besides.
    pub first_bytes: u64,
    /// Bytes that the last stage needs besides.
    pub last_bytes: u64,
    /// Bytes of KV cache per token and layer.
    pub kv_bytes: u64,
    /// Microseconds that one layer takes for one decode row, with a short context.
    pub decode_us: f64,
    /// Microseconds that one layer takes per row of a prefill chunk.
    pub prefill_us: f64,
    /// Microseconds that the last stage takes besides for one row of logits.
    pub logits_us: f64,
}

impl Key {
    /// Describes the fields in which `now` differs.
    pub fn difference(&self, now: &Key) -> String {
        let threads = (self.threads.to_string(), now.threads.to_string());
        let fields = [
            ("processor", &self.cpu, &now.cpu),
            ("number of threads", &threads.0, &threads.1),
            ("instruction set", &self.isa, &now.isa),
            ("version of the program", &self.program, &now.program),
        ];
        let changed = fields.iter().filter(|(_, then, now)| then != now);
        let changes =
            changed.map(|(what, then, now)| format!("the {what} was {then:?} and is {now:?}"));
        changes.collect::<Vec<_>>().join(", ")
    }
}

impl LayerSpeed {
    /// The offer of this model's layers. `card` says which model it is.
    pub fn offer(&self, card: ModelCard) -> LayerOffer {
        LayerOffer {
            card: Some(card),
            layers: self.layers,
            hidden: self.hidden,
            layer_bytes: self.layer_bytes,
            first_bytes: self.first_bytes,
            last_bytes: self.last_bytes,
            kv_bytes: self.kv_bytes,
            format: self.format.clone(),
            decode_us: self.decode_us as f32,
            prefill_us: self.prefill_us as f32,
            logits_us: self.logits_us as f32,
        }
    }

    /// True if the time of a decode row, by which formats are compared, was measured.
    pub fn is_known(&self) -> bool {
        known(self.decode_us)
    }

    /// True if all values are plausible measurements: a file may hold anything.
    pub fn is_sane(&self) -> bool {
        let zero_or_known = |us: f64| us == 0.0 || known(us);
        self.is_known()
            && zero_or_known(self.prefill_us)
            && zero_or_known(self.logits_us)
            && self.fingerprint.len() == 64
            && ModelSpec::try_from(&self.offer(ModelCard::default())).is_ok()
    }
}

impl From<&Profile> for NodeProfile {
    fn from(profile: &Profile) -> Self {
        let gpus = profile.gpus.iter().filter_map(|gpu| {
            let reported = gpu.reported.as_ref()?;
            Some(GpuProfile {
                name: reported.name.clone(),
                vendor: gpu.vendor.to_string(),
                vram_total: reported.vram_total,
                vram_free: reported.vram_free,
            })
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
