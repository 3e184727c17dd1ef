//! Names of heads become addresses, again and again, without the loop ever waiting for a name server.

use std::{
    io,
    net::{SocketAddr, ToSocketAddrs},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError, Sender},
    },
    thread,
    time::Duration,
};

use mesh_base::{addresses::ordered, sync::lock};

/// The addresses of all heads as far as they are known.
#[derive(Debug)]
pub(crate) struct HeadAddresses {
    names: Vec<String>,
    addresses: Mutex<Vec<Vec<SocketAddr>>>,
    version: AtomicU64,
}

impl HeadAddresses {
    /// Resolves at once the names that need no name server.
    pub(crate) fn new(names: &[String]) -> Self {
        let literal = |name: &String| name.parse().into_iter().collect();
        let addresses = names.iter().map(literal).collect();
        Self {
            names: names.to_vec(),
            addresses: Mutex::new(addresses),
            version: AtomicU64::new(1),
        }
    }

    /// Another number after every change.
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// All of a head's, in the order to try them; empty while none is known.
    pub(crate) fn get(&self, head: usize) -> Vec<SocketAddr> {
        lock(&self.addresses)[head].clone()
    }

    pub(crate) fn name(&self, head: usize) -> &str {
        &self.names[head]
    }

    /// Looks up all names once; true if an address changed. One that is no longer found keeps its addresses.
    fn look_up(&self) -> bool {
        let mut changed = false;
        let names = self.names.iter().enumerate();
        for (head, name) in names.filter(|(_, name)| !is_literal(name)) {
            let found = name.to_socket_addrs().inspect_err(
                |error| tracing::debug!(head = name, %error, "name of a head is not known"),
            );
            let found = ordered(found.into_iter().flatten());
            let known = self.get(head);
            // They may come in another order each time, which does not count as a change.
            let same = known.len() == found.len() && found.iter().all(|one| known.contains(one));
            if !same && !found.is_empty() {
                lock(&self.addresses)[head] = found;
                changed = true;
            }
        }
        if changed {
            self.version.fetch_add(1, Ordering::Release);
        }
        changed
    }
}

/// The thread that looks names up; it ends when this is dropped and the look-up under way is over.
#[derive(Debug)]
pub(crate) struct Resolver {
    _stop: Sender<()>,
}

impl Resolver {
    /// Starts the thread, unless no head needs it. `changed` is called after every change.
    pub(crate) fn start(
        addresses: Arc<HeadAddresses>,
        changed: impl Fn() + Send + 'static,
    ) -> io::Result<Option<Self>> {
        if addresses.names.iter().all(|name| is_literal(name)) {
            return Ok(None);
        }
        let (stop, stopped) = mpsc::channel();
        let thread = thread::Builder::new().name("resolver".into());
        thread.spawn(move || {
            loop {
                if addresses.look_up() {
                    changed();
                }
                if stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Disconnected) {
                    return;
                }
            }
        })?;
        Ok(Some(Self { _stop: stop }))
    }
}

fn is_literal(name: &str) -> bool {
    name.parse::<SocketAddr>().is_ok()
}

const INTERVAL: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literal_addresses_need_no_thread() {
        let addresses = Arc::new(HeadAddresses::new(&[
            "127.0.0.1:7777".into(),
            "[::1]:7777".into(),
        ]));
        assert_eq!(addresses.get(1), ["[::1]:7777".parse().unwrap()]);
        assert!(Resolver::start(addresses, || ()).unwrap().is_none());
    }

    #[test]
    fn a_name_becomes_its_addresses_and_stays_the_same() {
        let addresses = HeadAddresses::new(&["localhost:7777".into()]);
        assert!(addresses.get(0).is_empty());
        assert!(addresses.look_up());
        let found = addresses.get(0);
        assert!(!found.is_empty() && found.iter().all(|one| one.ip().is_loopback()));
        assert!(!addresses.look_up());
        assert_eq!(addresses.version(), 2);
    }
}
