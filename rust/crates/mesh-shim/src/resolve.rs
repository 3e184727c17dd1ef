//! Names of heads become addresses, again and again, without the loop ever waiting for a name server.

use std::{
    io,
    net::{SocketAddr, ToSocketAddrs},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError, Sender},
    },
    thread,
    time::Duration,
};

/// The addresses of all heads as far as they are known.
#[derive(Debug)]
pub(crate) struct HeadAddresses {
    names: Vec<String>,
    addresses: Mutex<Vec<Option<SocketAddr>>>,
    version: AtomicU64,
}

impl HeadAddresses {
    /// Knows at once those that need no name server.
    pub(crate) fn new(names: &[String]) -> Self {
        let addresses = names.iter().map(|name| name.parse().ok()).collect();
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

    pub(crate) fn get(&self, head: usize) -> Option<SocketAddr> {
        self.lock()[head]
    }

    pub(crate) fn name(&self, head: usize) -> &str {
        &self.names[head]
    }

    /// Looks up all names once; true if an address changed. One that is no longer found keeps its address.
    fn look_up(&self) -> bool {
        let mut changed = false;
        for (head, name) in self
            .names
            .iter()
            .enumerate()
            .filter(|(_, name)| !is_literal(name))
        {
            let found: Vec<SocketAddr> = match name.to_socket_addrs() {
                Ok(found) => found.collect(),
                Err(error) => {
                    tracing::debug!(head = name, %error, "name of a head is not known");
                    continue;
                }
            };
            let known = self.get(head);
            // Several addresses may come in any order: what works is kept.
            if known.is_none_or(|known| !found.contains(&known))
                && let Some(&first) = found.first()
            {
                self.lock()[head] = Some(first);
                changed = true;
            }
        }
        if changed {
            self.version.fetch_add(1, Ordering::Release);
        }
        changed
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Option<SocketAddr>>> {
        // Nothing under the lock can leave the list half changed.
        self.addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
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
        thread::Builder::new()
            .name("resolver".into())
            .spawn(move || {
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
        assert_eq!(addresses.get(1), Some("[::1]:7777".parse().unwrap()));
        assert!(Resolver::start(addresses, || ()).unwrap().is_none());
    }

    #[test]
    fn a_name_becomes_an_address_and_stays_the_same() {
        let addresses = HeadAddresses::new(&["localhost:7777".into()]);
        assert_eq!(addresses.get(0), None);
        assert!(addresses.look_up());
        assert!(addresses.get(0).unwrap().ip().is_loopback());
        assert!(!addresses.look_up());
        assert_eq!(addresses.version(), 2);
    }
}
