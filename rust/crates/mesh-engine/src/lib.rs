//! The stage trait, the sampler, the batching scheduler and the text pipeline.

mod stage;

pub use stage::{
    LogitRows, ModelShape, Segment, SlotId, Stage, StageError, StageInfo, StageInput, StageOutput,
};
