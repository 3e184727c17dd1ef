//! What can happen to one worker, as a value.

use std::fmt;

use anyhow::Result;

use crate::cluster::Cluster;

/// What happens to a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Its process is killed.
    Kill,
    /// Its process hangs.
    Stop,
    /// Its network cable is pulled.
    Cut,
    /// Its process runs for a tenth of the time.
    Slow,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fault::Kill => "killed",
            Fault::Stop => "stopped",
            Fault::Cut => "cut off",
            Fault::Slow => "slowed",
        })
    }
}

impl Cluster {
    /// Lets it happen.
    ///
    /// # Errors
    /// If the worker is gone, or cannot be cut off because it is not in a network namespace.
    pub fn strike(&mut self, name: &str, fault: Fault) -> Result<()> {
        match fault {
            Fault::Kill => self.kill(name),
            Fault::Stop => self.stop(name),
            Fault::Cut => self.cut(name),
            Fault::Slow => self.slow(name, 10),
        }
    }

    /// Ends it, where it ends: who is killed stays dead.
    ///
    /// # Errors
    /// If the worker is gone.
    pub fn relieve(&mut self, name: &str, fault: Fault) -> Result<()> {
        match fault {
            Fault::Kill => Ok(()),
            Fault::Stop => self.cont(name),
            Fault::Cut => self.mend(name),
            Fault::Slow => {
                self.hurry(name);
                Ok(())
            }
        }
    }
}
