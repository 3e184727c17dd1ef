//! The arguments of a run.

use std::path::PathBuf;

use clap::Args as ClapArgs;

/// How the run goes.
#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct Args {
    /// Seconds of all attacks at once
    #[arg(long, default_value_t = 300)]
    pub(crate) seconds: u64,
    /// Seconds without attacks, before
    #[arg(long, default_value_t = 60)]
    pub(crate) calm: u64,
    /// Seconds without attacks, afterwards
    #[arg(long, default_value_t = 20)]
    pub(crate) after: u64,
    /// Honest clients
    #[arg(long, default_value_t = 8)]
    pub(crate) clients: usize,
    /// Workers
    #[arg(long, default_value_t = 3)]
    pub(crate) workers: usize,
    /// Milliseconds for which an honest client pauses between two requests
    #[arg(long, default_value_t = 0)]
    pub(crate) think: u64,
    /// Only these attacks
    #[arg(long, value_delimiter = ',')]
    pub(crate) only: Vec<String>,
    /// All attacks but these
    #[arg(long, value_delimiter = ',')]
    pub(crate) without: Vec<String>,
    /// Each attack by itself, for so many seconds, instead of all at once: which one is it?
    #[arg(long)]
    pub(crate) each: Option<u64>,
    /// Most of p95 of the time to the first token, as a multiple of the undisturbed one
    #[arg(long, default_value_t = 3.0)]
    pub(crate) ratio: f64,
    /// Most memory of the head, MiB
    #[arg(long, default_value_t = 64)]
    pub(crate) head_memory: u64,
    /// Most memory of a worker, MiB: that of a machine that would be dead with more
    #[arg(long, default_value_t = 1_536)]
    pub(crate) worker_memory: u64,
    /// How far attackers' processes stand behind the mesh's, as nice(1) has it: 19 is last
    #[arg(long, default_value_t = 10)]
    pub(crate) nice: u8,
    /// Everybody on the loopback address, without network namespaces
    #[arg(long)]
    pub(crate) loopback: bool,
    /// Where the table is written; logs go beside it
    #[arg(long, default_value = "target/attack.md")]
    pub(crate) out: PathBuf,
}
