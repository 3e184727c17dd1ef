//! A model of six layers, each of which hashes all its input so far.

use std::ops::Range;

use mesh_engine::{Stage, StageInfo};

#[path = "../../../mesh-engine/src/testing.rs"]
#[allow(dead_code, reason = "the engine's own tests use more of it")]
mod testing;

pub(super) use self::testing::{HashStage, Letters};

pub(super) const LAYERS: u32 = 6;
pub(super) const CONTEXT: u32 = 160;
pub(super) const SLOTS: u32 = 4;

pub(super) fn stage(layers: Range<u32>) -> HashStage {
    HashStage::part(layers, LAYERS, SLOTS, CONTEXT, 16)
}

pub(super) fn info(layers: Range<u32>) -> StageInfo {
    stage(layers).info().clone()
}
