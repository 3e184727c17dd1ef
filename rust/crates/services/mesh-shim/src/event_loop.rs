//! The loop between the sockets and the [`Bridge`].

use std::{
    io::{self, Read},
    net::{SocketAddr, UdpSocket},
    os::{fd::AsFd, unix::net::UnixStream},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use mesh_base::{listen, random, routes::Routes};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{
    batch::{self, BATCH, RecvBatch, SendReport},
    bridge::{Bridge, Destination, FromClient, FromHead, HeadState, Reply, Secrets, Transmit},
    candidates::{self, Candidates},
    config::Config,
    control::{LoopControl, RUNNING, STOPPED},
    resolve::HeadAddresses,
    stats::Stats,
};

pub(crate) struct EventLoop<F> {
    bridge: Bridge,
    ingress: UdpSocket,
    /// The addresses of this machine from which clients are answered.
    routes: Routes,
    /// Empty while no address is known.
    heads: Box<[Candidates]>,
    addresses: Arc<HeadAddresses>,
    addresses_seen: u64,
    wake: UnixStream,
    received: RecvBatch,
    from_client: [FromClient; BATCH],
    from_head: [FromHead; BATCH],
    replies: Box<[Reply]>,
    /// Buffer for the bridge's own datagrams.
    own: Box<[u8]>,
    stats: Arc<Stats>,
    control: Arc<LoopControl>,
    drain_limit: Duration,
    drain_until: Option<Instant>,
    beat: F,
}

impl<F: FnMut()> EventLoop<F> {
    /// A loop on these sockets.
    pub(crate) fn new(
        config: Config,
        (ingress, wake): (UdpSocket, UnixStream),
        addresses: Arc<HeadAddresses>,
        stats: Arc<Stats>,
        control: Arc<LoopControl>,
        beat: F,
    ) -> Self {
        let secrets = Secrets {
            cookie_key: random::bytes(),
            first_generation: u32::from_ne_bytes(random::bytes()),
        };
        Self {
            heads: config.heads.iter().map(|_| Candidates::default()).collect(),
            drain_limit: config.drain_limit,
            bridge: Bridge::new(config, &secrets, Arc::clone(&stats), Instant::now()),
            ingress,
            routes: Routes::new(),
            addresses,
            addresses_seen: 0,
            wake,
            received: RecvBatch::new(),
            from_client: [FromClient::Drop; BATCH],
            from_head: [FromHead::Drop; BATCH],
            replies: vec![Reply::empty(); BATCH].into(),
            own: vec![0; 1 << 16].into(),
            stats,
            control,
            drain_until: None,
            beat,
        }
    }

    /// Turns until the control says otherwise.
    pub(crate) fn run(&mut self) {
        loop {
            let now = Instant::now();
            (self.beat)();
            self.connect_heads(now);
            let more = self.transmit_own(now);
            self.bridge.publish_gauges(now);
            if self.is_over(now) {
                return;
            }
            let wait = if more {
                Duration::ZERO
            } else {
                self.bridge.next_wakeup().saturating_duration_since(now)
            };
            let ready = self.wait(wait.min(BEAT_INTERVAL));
            if ready.ingress {
                self.receive_from_clients();
            }
            for (head, candidate) in ready.heads() {
                self.receive_from_head(head, candidate);
            }
            if ready.wake {
                let _ = self.wake.read(&mut [0; 64]);
                if let Some(fresh) = self.control.fresh().take() {
                    self.bridge.reconfigure(fresh);
                }
            }
        }
    }

    /// Follows the phase; true when the loop should end.
    fn is_over(&mut self, now: Instant) -> bool {
        match self.control.phase() {
            RUNNING => return false,
            STOPPED => return true,
            _ => {}
        }
        let until = *self.drain_until.get_or_insert_with(|| {
            self.bridge.begin_drain();
            now + self.drain_limit
        });
        if self.bridge.open_tasks() > 0 && now < until {
            return false;
        }
        self.bridge.abandon();
        while self.transmit_own(now) {}
        true
    }

    /// Waits for datagrams, at most for `timeout`.
    fn wait(&self, timeout: Duration) -> Ready {
        let millis = timeout.as_micros().div_ceil(1_000);
        let timeout = PollTimeout::from(u16::try_from(millis).unwrap_or(u16::MAX));
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds: [PollFd<'_>; 2 + MAX_SOCKETS] =
            std::array::from_fn(|_| readable(self.wake.as_fd()));
        fds[1] = readable(self.ingress.as_fd());
        let mut count = 2;
        let mut index_of = [0; 2 + MAX_SOCKETS];
        for (head, candidates) in self.heads.iter().enumerate() {
            for (candidate, socket) in candidates.sockets() {
                fds[count] = readable(socket.as_fd());
                index_of[count] = head * candidates::MOST + candidate;
                count += 1;
            }
        }
        let mut ready = Ready::default();
        if poll(&mut fds[..count], timeout).is_ok_and(|ready| ready > 0) {
            let is_ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
            ready.wake = is_ready(&fds[0]);
            ready.ingress = is_ready(&fds[1]);
            for (fd, index) in fds[2..count].iter().zip(&index_of[2..count]) {
                ready.heads |= u64::from(is_ready(fd)) << index;
            }
        }
        ready
    }

    fn receive_from_clients(&mut self) {
        for _ in 0..ROUNDS {
            let received = self.received.recv(&self.ingress, Some(&mut self.routes));
            let count = match received {
                Ok(count) => count,
                Err(error) => return report("receive from clients", &error),
            };
            let now = Instant::now();
            for index in 0..count {
                let (datagram, client) = self.received.get_mut(index);
                let reply = &mut self.replies[index];
                self.from_client[index] = self.bridge.on_client(now, client, datagram, reply);
            }
            for head in 0..self.heads.len() {
                self.forward(now, head, count);
            }
            let replies = (0..count)
                .filter(|&index| self.from_client[index] == FromClient::Reply)
                .map(|index| {
                    let (_, client) = self.received.get(index);
                    (self.replies[index].as_bytes(), Some(client))
                });
            let sent = batch::send(&self.ingress, replies, Some(&self.routes));
            self.stats.drops.send_failed.add(sent.failed as u64);
            if count < BATCH {
                return;
            }
        }
    }

    /// Sends the datagrams of the last batch for `head`.
    fn forward(&mut self, now: Instant, head: usize, count: usize) {
        let datagrams = (0..count).filter_map(|index| match self.from_client[index] {
            FromClient::Forward {
                head: to,
                len,
                version,
            } if to == head => Some((self.received.reframed(index, len, version), None)),
            _ => None,
        });
        let (candidate, report) = send_to_head(&self.heads[head], datagrams);
        self.after_sending(now, head, candidate, report);
    }

    fn receive_from_head(&mut self, head: usize, candidate: usize) {
        for _ in 0..ROUNDS {
            let Some(socket) = self.heads[head].socket(candidate) else {
                return;
            };
            let received = self.received.recv(socket, None);
            let now = Instant::now();
            let count = match received {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    self.refused(now, head, candidate);
                    continue;
                }
                Err(error) => return report("receive from a head", &error),
            };
            if count > 0 && self.heads[head].answered(candidate) {
                // Datagrams sent to another address may not have arrived: they are sent again once the head
                // is heard.
                self.bridge.on_head_refused(now, head);
            }
            for index in 0..count {
                let (datagram, _) = self.received.get_mut(index);
                self.from_head[index] = self.bridge.on_head(now, head, datagram);
            }
            let answers = (0..count).filter_map(|index| match self.from_head[index] {
                FromHead::Deliver {
                    client,
                    len,
                    version,
                } => Some((self.received.reframed(index, len, version), Some(client))),
                FromHead::Drop => None,
            });
            let sent = batch::send(&self.ingress, answers, Some(&self.routes));
            self.stats.drops.send_failed.add(sent.failed as u64);
            if count < BATCH {
                return;
            }
        }
    }

    /// Sends some of the bridge's own datagrams; true if there may be more.
    fn transmit_own(&mut self, now: Instant) -> bool {
        for _ in 0..OWN_AT_A_TIME {
            let Some(Transmit { to, len }) = self.bridge.poll_transmit(now, &mut self.own) else {
                return false;
            };
            let bytes = &self.own[..len];
            match to {
                Destination::Head(head) if is_probe(bytes) => {
                    let probe = |socket| batch::send(socket, [(bytes, None)], None);
                    let candidates = &self.heads[head];
                    let mut refusing = candidates.for_probes();
                    refusing.retain(|&candidate| {
                        let socket = candidates.socket(candidate);
                        socket.is_some_and(|socket| probe(socket).refused)
                    });
                    for candidate in refusing {
                        self.refused(now, head, candidate);
                    }
                }
                Destination::Head(head) => {
                    let (candidate, report) = send_to_head(&self.heads[head], [(bytes, None)]);
                    self.after_sending(now, head, candidate, report);
                }
                Destination::Client(client) => {
                    let answer = [(bytes, Some(client))];
                    let sent = batch::send(&self.ingress, answer, Some(&self.routes));
                    self.stats.drops.send_failed.add(sent.failed as u64);
                }
            }
        }
        true
    }

    fn after_sending(&mut self, now: Instant, head: usize, candidate: usize, report: SendReport) {
        self.stats.drops.send_failed.add(report.failed as u64);
        if report.refused {
            self.refused(now, head, candidate);
        }
    }

    /// The port at one of a head's addresses is closed.
    fn refused(&mut self, now: Instant, head: usize, candidate: usize) {
        if self.heads[head].refused(candidate) {
            self.bridge.on_head_refused(now, head);
        }
    }

    /// Connects to heads whose addresses have become known or have changed.
    fn connect_heads(&mut self, now: Instant) {
        for (head, candidates) in self.heads.iter_mut().enumerate() {
            if self.bridge.head_state(head, now) == HeadState::Silent {
                candidates.lost();
            }
        }
        let version = self.addresses.version();
        if version == self.addresses_seen {
            return;
        }
        self.addresses_seen = version;
        for head in 0..self.heads.len() {
            let addresses = self.addresses.get(head);
            let name = self.addresses.name(head);
            let before = self.heads[head].address();
            for (address, error) in self.heads[head].update(&addresses, connect) {
                tracing::warn!(head = name, %address, %error, "no socket for a head");
            }
            match self.heads[head].address() {
                None if !addresses.is_empty() => self.bridge.on_head_refused(now, head),
                address if address != before => tracing::info!(head = name, ?addresses, "head"),
                _ => {}
            }
        }
    }
}

/// Sockets that have something to read.
#[derive(Clone, Copy, Debug, Default)]
struct Ready {
    wake: bool,
    ingress: bool,
    /// A bit per address of each head.
    heads: u64,
}

impl Ready {
    /// Readable sockets of heads, as head and candidate.
    fn heads(self) -> impl Iterator<Item = (usize, usize)> {
        let set = (0..MAX_SOCKETS).filter(move |index| self.heads >> index & 1 == 1);
        set.map(|index| (index / candidates::MOST, index % candidates::MOST))
    }
}

/// Sends to a head, which counts as refused if its address is not known. Returns the candidate that was used,
/// too.
fn send_to_head<'a>(
    head: &Candidates,
    datagrams: impl IntoIterator<Item = (&'a [u8], Option<SocketAddr>)>,
) -> (usize, SendReport) {
    match head.for_tasks() {
        Some((candidate, socket)) => (candidate, batch::send(socket, datagrams, None)),
        None => {
            let failed = datagrams.into_iter().count();
            let refused = failed > 0;
            let report = SendReport {
                failed,
                refused,
                ..Default::default()
            };
            (0, report)
        }
    }
}

/// True if a datagram asks if a head lives.
fn is_probe(datagram: &[u8]) -> bool {
    dcf::Header::decode_datagram(datagram)
        .is_ok_and(|(_, header)| header.kind() == dcf::MsgType::HEALTH)
}

fn report(what: &str, error: &io::Error) {
    if !matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    ) {
        tracing::warn!(%error, "cannot {what}");
        // The error may last, and this loop must not spin on it.
        thread::sleep(Duration::from_millis(10));
    }
}

/// A socket of the shim that does not block.
///
/// # Errors
/// The system's.
pub(crate) fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = listen::udp(address, Some(SOCKET_BUFFER))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn connect(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = bind(listen::toward(address))?;
    socket.connect(address)?;
    Ok(socket)
}

/// The longest that the loop waits between two beats.
pub const BEAT_INTERVAL: Duration = Duration::from_secs(1);

/// Batches taken from one socket before the others have their turn.
const ROUNDS: usize = 4;
/// Datagrams of the bridge's own that are sent before the sockets have their turn.
const OWN_AT_A_TIME: usize = 256;
const SOCKET_BUFFER: usize = 4 << 20;
const MAX_SOCKETS: usize = crate::config::MAX_HEADS * candidates::MOST;
