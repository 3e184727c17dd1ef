//! Measures the speed of this machine.
//!
//! [`Profiler::take`] measures the memory's bandwidth and the disk; [`Profiler::layers`] and
//! [`measure_layers`] load a few layers of a real model and time them. Slow measurements are kept in a file,
//! and repeated when the processor, the threads, the kernels or the program change. [`estimate`] says what to
//! expect of machines that are not there.

mod bandwidth;
mod disk;
mod estimate;
mod layers;
mod options;
mod profiler;

pub use bandwidth::read_bandwidth;
pub use estimate::{Estimate, estimate};
pub use layers::{FormatChoice, MeasureError, choose_format, measure_layers};
pub use options::ProfileOptions;
pub use profiler::Profiler;
