//! Addresses, keys and model under attack, as a file from one process to the others.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Addresses and names of a mesh.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Targets {
    /// The head's HTTP API.
    pub(crate) http: SocketAddr,
    /// The head's port for workers, QUIC.
    pub(crate) quic: SocketAddr,
    /// The head's port for DCF clients, UDP.
    pub(crate) clients: SocketAddr,
    /// The head's worker bus, UDP.
    pub(crate) bus: SocketAddr,
    /// The shim's ingress, UDP.
    pub(crate) shim: SocketAddr,
    /// The attackers' API key.
    pub(crate) key: String,
    /// Name of the model.
    pub(crate) model: String,
    /// Fingerprint of the model.
    pub(crate) fingerprint: String,
    /// Context of the model, in tokens.
    pub(crate) context: u32,
    /// A folder whose models a worker serves.
    pub(crate) models_dir: PathBuf,
    /// Path of the model's file.
    pub(crate) model_file: PathBuf,
}

impl Targets {
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        serde_json::from_str(&text).with_context(|| path.display().to_string())
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        fs::write(path, serde_json::to_string_pretty(self)?)
            .with_context(|| path.display().to_string())
    }
}
