//! Faults of a single worker.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result};
use mesh_testkit::Namespaces;
use mesh_testkit::namespaces::Machine;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Cluster;

/// A fault of one worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// SIGKILL ends its process.
    Kill,
    /// SIGSTOP halts its process.
    Stop,
    /// Its network link is down.
    Cut,
    /// Its process gets a tenth of the time.
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
    /// Kills a worker as a crash would.
    ///
    /// # Errors
    /// If it is gone already.
    pub fn kill(&mut self, name: &str) -> Result<()> {
        self.hurry(name);
        self.worker(name)?.crash()
    }

    /// Makes a worker hang.
    ///
    /// # Errors
    /// If it is gone.
    pub fn stop(&mut self, name: &str) -> Result<()> {
        self.worker(name)?.signal(Signal::SIGSTOP)
    }

    /// Lets a worker that hangs go on.
    ///
    /// # Errors
    /// If it is gone.
    pub fn cont(&mut self, name: &str) -> Result<()> {
        self.worker(name)?.signal(Signal::SIGCONT)
    }

    /// Pulls a worker's network cable.
    ///
    /// # Errors
    /// If the workers are not in network namespaces.
    pub fn cut(&mut self, name: &str) -> Result<()> {
        let (network, machine) = self.machine(name)?;
        network.cut(machine)
    }

    /// Plugs a worker's network cable in again.
    ///
    /// # Errors
    /// If the workers are not in network namespaces.
    pub fn mend(&mut self, name: &str) -> Result<()> {
        let (network, machine) = self.machine(name)?;
        network.mend(machine)
    }

    /// Gives a worker's network a bandwidth, in megabits per second.
    ///
    /// # Errors
    /// If the workers are not in network namespaces.
    pub fn limit(&mut self, name: &str, megabits: u32) -> Result<()> {
        let (network, machine) = self.machine(name)?;
        network.limit(machine, megabits)
    }

    /// Lets a worker run only for `percent` of the time, in turns of 20 ms, until [`Cluster::hurry`].
    ///
    /// # Errors
    /// If it is gone.
    pub fn slow(&mut self, name: &str, percent: u32) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.worker(name)?.pid())?);
        let turn = Duration::from_millis(20);
        let running = turn * percent.min(100) / 100;
        let turns = tokio::spawn(async move {
            // The process is the cluster's child: its id is not reused until it is waited for.
            while kill(pid, Signal::SIGSTOP).is_ok() {
                tokio::time::sleep(turn - running).await;
                let _ = kill(pid, Signal::SIGCONT);
                tokio::time::sleep(running).await;
            }
        });
        if let Some(before) = self.slowed.insert(name.to_owned(), turns) {
            before.abort();
        }
        Ok(())
    }

    /// Ends [`Cluster::slow`] for a worker.
    pub fn hurry(&mut self, name: &str) {
        if let Some(turns) = self.slowed.remove(name) {
            turns.abort();
            let _ = self.cont(name);
        }
    }

    /// Starts a worker that was killed again, as the same node.
    ///
    /// # Errors
    /// If it still runs, or does not start.
    pub async fn restart(&mut self, name: &str) -> Result<()> {
        self.worker(name)?.restart(None).await
    }

    /// Removes a worker for good.
    pub fn remove(&mut self, name: &str) {
        self.hurry(name);
        self.mesh.workers.retain(|worker| worker.name() != name);
    }

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

    /// Ends `fault` if it can end: a killed worker stays dead.
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

    fn machine(&self, name: &str) -> Result<(&Namespaces, Machine)> {
        let machine = self.machines.get(name);
        self.network
            .as_ref()
            .zip(machine.copied())
            .with_context(|| format!("{name} is not in a network namespace"))
    }
}
