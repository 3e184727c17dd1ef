//! Network namespaces: a bridge, and for each machine a namespace with a cable to it that can be pulled or made slow.
//!
//! Needs root and iproute2. Everything is removed on drop; the next run removes the leftovers of a killed
//! process.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};
use mesh_launcher::Launcher;

/// Simulated machines on one network: a namespace for each.
#[derive(Debug)]
pub struct Namespaces {
    /// Begins the names of this network's links.
    prefix: String,
    subnet: u8,
    machines: u8,
}

/// A machine of a [`Namespaces`], by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine(u8);

impl Namespaces {
    /// A network without machines.
    ///
    /// # Errors
    /// If this machine does not allow it; the message names the missing permission or program.
    pub fn new() -> Result<Self> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "network namespaces need root"
        );
        remove_left_behind();
        let pid = std::process::id();
        let number = NETWORKS.fetch_add(1, Ordering::Relaxed);
        let this = Self {
            prefix: format!("hm{pid}x{number}"),
            subnet: free_subnet(pid.wrapping_add(number))?,
            machines: 0,
        };
        let bridge = this.bridge();
        // Else it takes the lowest address of its ports: with each new machine the others may send to one that is gone, until they ask
        // anew half a minute later.
        let hardware = format!("02:48:4d:00:00:{:02x}", this.subnet);
        ip(&[
            "link", "add", &bridge, "address", &hardware, "type", "bridge",
        ])?;
        let address = format!("{}/24", this.own_address());
        ip(&["addr", "add", &address, "dev", &bridge])?;
        ip(&["link", "set", &bridge, "up"])?;
        Ok(this)
    }

    /// The address at which the machines reach the test itself.
    pub fn own_address(&self) -> String {
        self.address(Machine(0))
    }

    /// The address of a machine.
    pub fn address(&self, machine: Machine) -> String {
        format!("10.213.{}.{}", self.subnet, machine.0 + 1)
    }

    /// Adds a machine to the network.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn add(&mut self) -> Result<Machine> {
        ensure!(self.machines < 100, "{} machines are enough", self.machines);
        self.machines += 1;
        let machine = Machine(self.machines);
        let (name, cable) = (self.namespace(machine), self.cable(machine));
        ip(&["netns", "add", &name])?;
        ip(&[
            "link", "add", &cable, "type", "veth", "peer", "name", "eth0", "netns", &name,
        ])?;
        ip(&["link", "set", &cable, "master", &self.bridge(), "up"])?;
        let address = format!("{}/24", self.address(machine));
        ip(&["-n", &name, "addr", "add", &address, "dev", "eth0"])?;
        ip(&["-n", &name, "link", "set", "lo", "up"])?;
        ip(&["-n", &name, "link", "set", "eth0", "up"])?;
        Ok(machine)
    }

    /// Starts services on `machine`.
    pub fn launcher(&self, launcher: &Launcher, machine: Machine) -> Launcher {
        let wrapper = self.wrapper(machine);
        launcher.wrapped(&wrapper.each_ref().map(String::as_str))
    }

    /// Words to put before a command so that it runs on `machine`.
    pub fn wrapper(&self, machine: Machine) -> [String; 4] {
        let words = ["ip", "netns", "exec", &self.namespace(machine)];
        words.map(str::to_owned)
    }

    /// Replaces the machine's address by another, as a DHCP server may.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn readdress(&self, machine: Machine) -> Result<String> {
        let (name, address) = (self.namespace(machine), self.second_address(machine));
        let device = ["dev", "eth0"];
        let before = format!("{}/24", self.address(machine));
        ip(&[&["-n", &name, "addr", "del", &before], &device[..]].concat())?;
        ip(&[
            &["-n", &name, "addr", "add", &format!("{address}/24")],
            &device[..],
        ]
        .concat())?;
        Ok(address)
    }

    fn second_address(&self, machine: Machine) -> String {
        format!("10.213.{}.{}", self.subnet, 255 - machine.0 - 1)
    }

    /// Pulls the cable: no packet passes, and neither end is notified.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn cut(&self, machine: Machine) -> Result<()> {
        ip(&["link", "set", &self.cable(machine), "down"])
    }

    /// Plugs the cable in again.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn mend(&self, machine: Machine) -> Result<()> {
        ip(&["link", "set", &self.cable(machine), "up"])
    }

    /// Limits the machine's sending and receiving rates, in megabits per second each.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn limit(&self, machine: Machine, megabits: u32) -> Result<()> {
        let rate = format!("{megabits}mbit");
        let shape = [
            "root", "tbf", "rate", &rate, "burst", "64kb", "latency", "200ms",
        ];
        let cable = self.cable(machine);
        let replace = ["qdisc", "replace", "dev"];
        command("tc", &[&replace[..], &[&cable], &shape].concat())?;
        let inside = ["netns", "exec", &self.namespace(machine), "tc"];
        ip(&[&inside[..], &replace, &["eth0"], &shape].concat())
    }

    fn namespace(&self, machine: Machine) -> String {
        format!("hydramesh-{}-{}", self.prefix, machine.0)
    }

    fn cable(&self, machine: Machine) -> String {
        format!("{}v{}", self.prefix, machine.0)
    }

    fn bridge(&self) -> String {
        format!("{}b", self.prefix)
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for machine in (1..=self.machines).map(Machine) {
            // The link first: a namespace lives on while a process in it ends.
            quietly(&["link", "del", &self.cable(machine)]);
            quietly(&["netns", "del", &self.namespace(machine)]);
        }
        quietly(&["link", "del", &self.bridge()]);
    }
}

/// Removes the networks of processes that are gone.
fn remove_left_behind() {
    let is_gone = |name: &str| {
        let digits = name.split('x').next().unwrap_or_default();
        digits.parse::<u32>().is_ok() && !Path::new("/proc").join(digits).exists()
    };
    for line in output(&["netns", "list"]).lines() {
        let name = line.split(' ').next().unwrap_or_default();
        if name.strip_prefix("hydramesh-hm").is_some_and(is_gone) {
            quietly(&["netns", "del", name]);
        }
    }
    for line in output(&["-o", "link", "show"]).lines() {
        let name = line.split(": ").nth(1).unwrap_or_default();
        let name = name.split('@').next().unwrap_or_default();
        if name.strip_prefix("hm").is_some_and(is_gone) {
            quietly(&["link", "del", name]);
        }
    }
}

/// An N of 10.213.N.0/24 that no interface of this machine uses.
fn free_subnet(first: u32) -> Result<u8> {
    let addresses = output(&["-o", "addr", "show"]);
    let used = |subnet: &u8| addresses.contains(&format!("10.213.{subnet}."));
    (0..=255)
        .map(|step| (first.wrapping_add(step) % 256) as u8)
        .find(|subnet| !used(subnet))
        .context("all of 10.213.0.0/16 is in use")
}

fn ip(arguments: &[&str]) -> Result<()> {
    command("ip", arguments)
}

fn command(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{program} (iproute2) cannot be started"))?;
    if !output.status.success() {
        bail!(
            "{program} {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

fn output(arguments: &[&str]) -> String {
    let output = Command::new("ip").args(arguments).output();
    output
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default()
}

/// Runs a command for cleaning up; a missing object is not an error.
fn quietly(arguments: &[&str]) {
    let _ = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

static NETWORKS: AtomicU32 = AtomicU32::new(0);

#[cfg(test)]
mod tests {
    use super::*;

    fn pings(from: &str, to: &str) -> bool {
        // Without ping(8), which may be missing: a UDP datagram to the bridge's address.
        let listener = std::net::UdpSocket::bind((to, 0)).expect("the bridge's address");
        listener
            .set_read_timeout(Some(std::time::Duration::from_millis(500)))
            .expect("a socket");
        let port = listener.local_addr().expect("bound").port();
        let send = format!("echo x > /dev/udp/{to}/{port}");
        let sent = Command::new("ip")
            .args(["netns", "exec", from, "bash", "-c", &send])
            .status();
        sent.is_ok() && listener.recv(&mut [0; 8]).is_ok()
    }

    #[test]
    fn a_pulled_cable_is_silent_and_nothing_is_left_behind() {
        let mut network = match Namespaces::new() {
            Ok(network) => network,
            Err(error) => return println!("not possible here: {error:#}"),
        };
        let machine = network.add().expect("a machine");
        let name = network.namespace(machine);
        let own = network.own_address();
        assert!(pings(&name, &own));
        network.cut(machine).expect("cut");
        assert!(!pings(&name, &own));
        network.mend(machine).expect("mended");
        assert!((0..10).any(|_| pings(&name, &own)));
        network.limit(machine, 100).expect("limited");
        let prefix = network.prefix.clone();
        drop(network);
        assert!(!output(&["netns", "list"]).contains(&prefix));
        assert!(!output(&["link", "show"]).contains(&prefix));
    }
}
