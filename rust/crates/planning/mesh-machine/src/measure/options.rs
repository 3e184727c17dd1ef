//! Options for measuring a machine.

use std::path::PathBuf;

/// Inputs, limits and storage of the measurements.
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
    /// Purposes that the operator reserves this node for; empty means any.
    pub reserved_for: Vec<String>,
    /// ONNX Runtime's library; `None` is the environment's.
    pub library: Option<PathBuf>,
    /// Folder with proc and sys: `/` except in tests.
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

    /// The file in which measurements are kept.
    pub(super) fn file(&self) -> Option<PathBuf> {
        Some(self.state_dir.as_ref()?.join("profile.json"))
    }
}
