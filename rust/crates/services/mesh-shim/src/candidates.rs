//! The addresses of one head, of which one is used.
//!
//! A name may have several addresses, and only some may lead to the head. Probes go to all of them until one
//! answers. Tasks go to one at a time: the head would take the same task from two sources for two.

use std::net::{SocketAddr, UdpSocket};

/// See the module's page.
#[derive(Debug, Default)]
pub(crate) struct Candidates {
    all: Vec<Candidate>,
    /// The one that answered.
    chosen: Option<usize>,
}

#[derive(Debug)]
struct Candidate {
    address: SocketAddr,
    /// Connected, so that the system takes datagrams from the head alone and reports when its port is closed.
    socket: UdpSocket,
    /// The port is closed, as far as is known.
    refused: bool,
}

impl Candidates {
    /// Takes the present addresses in; sockets of those that stay are kept. Returns those for which none
    /// could be had.
    pub(crate) fn update(
        &mut self,
        addresses: &[SocketAddr],
        mut connect: impl FnMut(SocketAddr) -> std::io::Result<UdpSocket>,
    ) -> Vec<(SocketAddr, std::io::Error)> {
        let chosen = self.chosen.take().map(|index| self.all[index].address);
        let mut before = std::mem::take(&mut self.all);
        let mut failed = Vec::new();
        for &address in addresses.iter().take(MOST) {
            let known = before.iter().position(|known| known.address == address);
            let socket = match known {
                Some(known) => Ok(before.swap_remove(known).socket),
                None => connect(address),
            };
            match socket {
                Ok(socket) => self.all.push(Candidate {
                    address,
                    socket,
                    refused: false,
                }),
                Err(error) => failed.push((address, error)),
            }
        }
        self.chosen = self.all.iter().position(|c| Some(c.address) == chosen);
        failed
    }

    /// All sockets, each with its number.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = (usize, &UdpSocket)> {
        let sockets = self.all.iter().map(|candidate| &candidate.socket);
        sockets.enumerate()
    }

    pub(crate) fn socket(&self, candidate: usize) -> Option<&UdpSocket> {
        self.all.get(candidate).map(|candidate| &candidate.socket)
    }

    /// The head that tasks go to: the one that answered, else the first that does not refuse.
    pub(crate) fn for_tasks(&self) -> Option<(usize, &UdpSocket)> {
        let willing = || self.all.iter().position(|candidate| !candidate.refused);
        let index = self.chosen.or_else(willing).unwrap_or(0);
        self.socket(index).map(|socket| (index, socket))
    }

    /// The heads that probes go to.
    pub(crate) fn for_probes(&self) -> Vec<usize> {
        match self.chosen {
            Some(chosen) => vec![chosen],
            None => (0..self.all.len()).collect(),
        }
    }

    /// This one answered. True if tasks went to another one before.
    pub(crate) fn answered(&mut self, candidate: usize) -> bool {
        if self.chosen.is_some() {
            return false;
        }
        let before = self.for_tasks().map(|(index, _)| index);
        if let Some(answering) = self.all.get_mut(candidate) {
            answering.refused = false;
            self.chosen = Some(candidate);
        }
        before != Some(candidate)
    }

    /// Notes that the port of this candidate is closed. Returns true if it was the chosen one or all are
    /// refused now: then the head counts as refused.
    pub(crate) fn refused(&mut self, candidate: usize) -> bool {
        if let Some(refusing) = self.all.get_mut(candidate) {
            refusing.refused = true;
        }
        let was_chosen = self.chosen == Some(candidate);
        if was_chosen {
            self.chosen = None;
        }
        was_chosen || self.all.iter().all(|candidate| candidate.refused)
    }

    /// The head is no longer heard: the others are asked, too.
    pub(crate) fn lost(&mut self) {
        if self.all.len() > 1 {
            self.chosen = None;
        }
    }

    /// The address that is used.
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        let (index, _) = self.for_tasks()?;
        Some(self.all[index].address)
    }
}

/// Most addresses of one head.
pub(crate) const MOST: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(ports: &[u16]) -> Candidates {
        let mut candidates = Candidates::default();
        let addresses: Vec<SocketAddr> = ports
            .iter()
            .map(|port| ([127, 0, 0, 1], *port).into())
            .collect();
        let failed = candidates.update(&addresses, |_| UdpSocket::bind("127.0.0.1:0"));
        assert!(failed.is_empty());
        candidates
    }

    fn for_tasks(candidates: &Candidates) -> Option<usize> {
        candidates.for_tasks().map(|(index, _)| index)
    }

    #[test]
    fn probes_go_to_all_until_one_answers_and_tasks_to_one() {
        let mut head = candidates(&[1, 2, 3]);
        assert_eq!(
            (head.for_probes(), for_tasks(&head)),
            (vec![0, 1, 2], Some(0))
        );
        assert!(!head.refused(0), "two are left");
        assert_eq!(for_tasks(&head), Some(1));
        assert!(head.answered(2), "tasks went to another one");
        assert!(!head.answered(1), "one is enough");
        assert_eq!((head.for_probes(), for_tasks(&head)), (vec![2], Some(2)));
        head.lost();
        assert_eq!(head.for_probes(), [0, 1, 2]);
        assert!(!head.answered(1), "tasks went there: the first one refused");
    }

    #[test]
    fn a_head_refuses_when_all_do_or_the_one_in_use_does() {
        let mut head = candidates(&[1, 2]);
        assert!(!head.refused(0));
        assert!(head.refused(1));
        assert!(head.answered(1));
        assert!(head.refused(1));
        assert!(candidates(&[1]).refused(0));
        assert!(Candidates::default().for_tasks().is_none());
    }

    #[test]
    fn new_addresses_keep_the_one_in_use_if_it_stays() {
        let mut head = candidates(&[1, 2]);
        head.answered(1);
        let address = |port| SocketAddr::from(([127, 0, 0, 1], port));
        head.update(&[address(3), address(2)], |_| {
            UdpSocket::bind("127.0.0.1:0")
        });
        assert_eq!(head.address(), Some(address(2)));
        head.update(&[address(3)], |_| UdpSocket::bind("127.0.0.1:0"));
        assert_eq!(head.for_probes(), [0]);
        let many: Vec<SocketAddr> = (1..9).map(address).collect();
        head.update(&many, |_| UdpSocket::bind("127.0.0.1:0"));
        assert_eq!(head.sockets().count(), MOST);
    }
}
