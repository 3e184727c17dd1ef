//! Tests that start a real mesh: real processes, real sockets, a real model.
//!
//! - [`Cluster`] is a mesh of machines that share a model, with faults for each of them: killed, stopped,
//!   cut off, slowed, restarted;
//! - [`ChatQuestion`], [`RunningStreams`] and [`StreamedAnswer`] are its clients, with the time at which each token
//!   came; [`gaps`] sums up pauses;
//! - [`Undisturbed`] knows the answers without failures;
//! - [`alone`] keeps these tests apart: each wants the whole machine;
//! - [`rescore`] checks a stream against the model itself;
//! - [`flood`] makes malformed and malicious datagrams;
//! - `images` (feature `images`) writes models with random weights and follows images on their way;
//! - [`load`] keeps streams open beside threads that burn processor time;
//! - [`mesh_state`] waits for states of a mesh and checks that nothing died;
//! - [`liar`] is a member that gives away other models than it claims;
//! - [`rogue`] is a worker with one lie of its own;
//! - [`report`] is the table of a long run;
//! - [`Seed`] makes every random choice of a test repeatable.

#![forbid(unsafe_code)]

pub mod brain;
pub mod clients;
pub mod cluster;
pub mod flood;
pub mod gaps;
#[cfg(feature = "images")]
pub mod images;
pub mod liar;
pub mod load;
pub mod mesh_state;
pub mod report;
pub mod rescore;
pub mod rogue;
pub mod undisturbed;
pub mod view;

pub use clients::{
    ChatQuestion, RunningStreams, StreamedAnswer, assert_same_tokens, first_model, question,
};
pub use cluster::{Cluster, ClusterBuilder, Fault};
pub use undisturbed::Undisturbed;
pub use view::RingView;

use std::fs::File;

use nix::fcntl::{Flock, FlockArg};

/// Waits until no other of these tests runs on this machine, and keeps them away until it is dropped. Timeouts that a mesh
/// has for good reasons would strike where several meshes share two cores.
///
/// # Panics
/// If the lock file cannot be made.
pub fn alone() -> Flock<File> {
    let path = std::env::temp_dir().join("hydramesh-tests.lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Flock::lock(file, FlockArg::LockExclusive)
        .unwrap_or_else(|(_, error)| panic!("{}: {error}", path.display()))
}

/// A repeatable random generator: the seed is `HYDRAMESH_TEST_SEED`, else fixed.
#[derive(Debug, Clone)]
pub struct Seed(u64);

impl Seed {
    /// The seed of this run, printed so that a failure can be repeated.
    pub fn of_this_run(default: u64) -> Self {
        let seed = std::env::var("HYDRAMESH_TEST_SEED")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(default);
        println!("seed {seed} (HYDRAMESH_TEST_SEED sets another)");
        Self(seed)
    }

    /// A generator with exactly this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number (SplitMix64).
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `end`, which must not be 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.draw() % end as u64) as usize
    }
}
