//! The models of a mesh, as operators see them in `/v1/mesh`.

pub use mesh_api::{
    ModelHolder as HolderView, ModelSeeker as SeekerView, SharedModel as TrackedModel,
};
