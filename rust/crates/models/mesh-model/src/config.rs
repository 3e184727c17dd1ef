//! The shape of a network, read from a checkpoint's keys and checked against its tensors.

mod architecture;
mod error;
mod keys;
mod latent;
mod mixture;
mod network;
mod read;
mod rope;
mod shapes;
mod window;

pub use crate::checkpoint::RopeStyle;
pub use architecture::Architecture;
pub use error::ConfigError;
pub(crate) use keys::{MAX_CONTEXT, MAX_LAYERS, MAX_VOCAB, MAX_WIDTH};
pub use latent::LatentAttention;
pub(crate) use mixture::MAX_EXPERTS;
pub use mixture::{Mixture, SharedExpert};
pub use network::{Activation, ModelConfig};
pub use rope::{Rope, RopeScaling};
pub use window::SlidingWindow;
