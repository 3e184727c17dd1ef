//! The models of a mesh for people.

use serde::Serialize;

/// A model that workers hold or seek.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrackedModel {
    /// Name of the model.
    pub name: String,
    /// SHA-256 of its manifest; absent while no worker has one.
    pub fingerprint: Option<String>,
    /// Bytes of its files; 0 while they are unknown.
    pub bytes: u64,
    /// True if its manifest is signed.
    pub signed: bool,
    /// Workers that hold pieces of it.
    pub holders: Vec<HolderView>,
    /// Workers that seek pieces of it.
    pub seekers: Vec<SeekerView>,
    /// The worker that downloads it from outside the mesh.
    pub origin: Option<String>,
}

/// A worker with pieces of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HolderView {
    /// Name of the worker.
    pub worker: String,
    /// Pieces that it has.
    pub pieces: u32,
    /// Pieces of the model.
    pub of: u32,
    /// Workers that say it sent them bad pieces.
    pub accused_by: Vec<String>,
}

/// A worker that seeks pieces of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SeekerView {
    /// Name of the worker.
    pub worker: String,
    /// Bytes that it has of those that it needs.
    pub bytes: u64,
    /// Bytes that it needs; 0 while they are unknown.
    pub bytes_total: u64,
    /// Error of its attempt to fetch the model from outside the mesh, if it tried.
    pub error: Option<String>,
}
