//! Leases of the head's memory for requests.

use std::sync::Arc;

use mesh_control::fair::Origin;
use mesh_control::memory::TooMuch;

use super::state::Mesh;
use crate::locks::lock;

impl Mesh {
    /// Takes memory for a request of `origin`.
    ///
    /// # Errors
    /// [`TooMuch`] if there is not as much left, or not for that client.
    pub(crate) fn lease(self: &Arc<Self>, origin: Origin, bytes: u64) -> Result<Lease, TooMuch> {
        let mut lease = Lease {
            mesh: self.clone(),
            origin,
            bytes: 0,
        };
        lease.add(bytes)?;
        Ok(lease)
    }

    /// Bytes of memory that requests may still take.
    pub(crate) fn unleased(&self) -> u64 {
        lock(&self.memory).left()
    }
}

/// Memory of one request; dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Lease {
    mesh: Arc<Mesh>,
    origin: Origin,
    bytes: u64,
}

impl Lease {
    /// Takes more.
    ///
    /// # Errors
    /// As [`Mesh::lease`].
    pub(crate) fn add(&mut self, bytes: u64) -> Result<(), TooMuch> {
        self.bytes += lock(&self.mesh.memory).take(self.origin, self.bytes, bytes)?;
        Ok(())
    }

    /// Exchanges what it has for `bytes`.
    ///
    /// # Errors
    /// As [`Mesh::lease`].
    pub(crate) fn set(&mut self, bytes: u64) -> Result<(), TooMuch> {
        let mut memory = lock(&self.mesh.memory);
        memory.give(self.origin, std::mem::take(&mut self.bytes));
        self.bytes = memory.take(self.origin, 0, bytes)?;
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        lock(&self.mesh.memory).give(self.origin, self.bytes);
    }
}
