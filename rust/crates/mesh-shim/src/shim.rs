//! The loop between the sockets and the [`Bridge`], on a thread of its own.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use aws_lc_rs::rand;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Socket, Type};

use crate::{
    batch::{self, BATCH, RecvBatch, SendReport},
    bridge::{Bridge, Destination, FromClient, FromHead, Reply, Secrets, Transmit},
    config::{Config, ConfigError},
    resolve::{HeadAddresses, Resolver},
    stats::Stats,
};

/// A shim is started with [`Shim::spawn`].
#[derive(Debug)]
pub struct Shim;

/// A running shim. Dropping it stops the shim at once.
#[derive(Debug)]
pub struct ShimHandle {
    address: SocketAddr,
    stats: Arc<Stats>,
    control: Arc<Control>,
    _resolver: Option<Resolver>,
    thread: Option<JoinHandle<()>>,
}

/// Why a shim could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The port for clients.
    #[error(
        "cannot listen on {address}/udp: {source}; is another shim running, or the port reserved?"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// A thread or a pipe.
    #[error("cannot start the loop of the shim: {0}")]
    System(#[from] io::Error),
    /// No random numbers for the cookies.
    #[error("the system has no random numbers to give")]
    Random,
}

impl Shim {
    /// Starts a shim; its thread runs until the handle says otherwise.
    ///
    /// # Errors
    /// [`StartError`] if the configuration is not sound or the port is taken. A head that cannot be reached, or whose name
    /// is not known yet, is no error: it may come later.
    pub fn spawn(config: Config) -> Result<ShimHandle, StartError> {
        Self::spawn_with(config, || ())
    }

    /// Like [`Shim::spawn`]; `beat` is called at least every [`BEAT_INTERVAL`] by the loop, and proves that it turns.
    ///
    /// # Errors
    /// As [`Shim::spawn`].
    pub fn spawn_with(
        config: Config,
        beat: impl FnMut() + Send + 'static,
    ) -> Result<ShimHandle, StartError> {
        config.validate()?;
        let ingress = bind(config.ingress()).map_err(|source| StartError::Listen {
            address: config.ingress(),
            source,
        })?;
        let address = ingress.local_addr()?;
        let (waker, wake) = UnixStream::pair()?;
        waker.set_nonblocking(true)?;
        wake.set_nonblocking(true)?;
        let control = Arc::new(Control {
            phase: AtomicU8::new(RUNNING),
            fresh: Mutex::new(None),
            waker,
        });
        let addresses = Arc::new(HeadAddresses::new(&config.heads));
        let stats = Arc::new(Stats::default());
        let now = Instant::now();
        let mut shim = Loop {
            heads: (0..config.heads.len()).map(|_| None).collect(),
            drain_timeout: config.drain_timeout,
            bridge: Bridge::new(config, &secrets()?, Arc::clone(&stats), now),
            ingress,
            addresses: Arc::clone(&addresses),
            addresses_seen: 0,
            wake,
            received: RecvBatch::new(),
            from_client: [FromClient::Drop; BATCH],
            from_head: [FromHead::Drop; BATCH],
            replies: vec![Reply::empty(); BATCH].into(),
            own: vec![0; 1 << 16].into(),
            stats: Arc::clone(&stats),
            control: Arc::clone(&control),
            drain_until: None,
            beat,
        };
        let resolver = {
            let control = Arc::clone(&control);
            Resolver::start(addresses, move || control.wake())?
        };
        let thread = thread::Builder::new()
            .name("shim".into())
            .spawn(move || shim.run())?;
        Ok(ShimHandle {
            address,
            stats,
            control,
            _resolver: resolver,
            thread: Some(thread),
        })
    }
}

impl ShimHandle {
    /// Where clients send their datagrams.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// Whether the loop still runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.thread
            .as_ref()
            .is_some_and(|thread| !thread.is_finished())
    }

    /// What takes a new configuration over while the shim runs.
    #[must_use]
    pub fn live(&self) -> Live {
        Live(Arc::clone(&self.control))
    }

    /// Takes no new task from now on, and ends when those under way are answered, or when `drain_timeout` is over: then
    /// their clients get an Error. Returns at once; see [`ShimHandle::join`].
    pub fn drain(&self) {
        self.control.enter(DRAINING);
    }

    /// Waits for the loop to end.
    ///
    /// # Errors
    /// If the loop panicked.
    pub fn join(mut self) -> thread::Result<()> {
        self.thread.take().map_or(Ok(()), JoinHandle::join)
    }

    /// Ends at once; tasks under way get no answer.
    pub fn stop(self) {}
}

impl Drop for ShimHandle {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.control.enter(STOPPED);
            if thread.join().is_err() {
                tracing::error!("the loop of the shim panicked");
            }
        }
    }
}

/// What a running shim can change without a restart.
#[derive(Clone, Debug)]
pub struct Live(Arc<Control>);

impl Live {
    /// The keys of the configuration that [`Live::reload`] applies.
    pub const KEYS: [&str; 4] = Bridge::LIVE_KEYS;

    /// Puts the reloadable keys of `fresh` into effect, with the loop's next turn.
    pub fn reload(&self, fresh: Config) {
        *self.0.fresh() = Some(fresh);
        self.0.wake();
    }
}

/// How others steer the loop.
#[derive(Debug)]
struct Control {
    phase: AtomicU8,
    /// A configuration that the loop is to take over.
    fresh: Mutex<Option<Config>>,
    waker: UnixStream,
}

impl Control {
    fn enter(&self, phase: u8) {
        self.phase.fetch_max(phase, Ordering::SeqCst);
        self.wake();
    }

    fn fresh(&self) -> MutexGuard<'_, Option<Config>> {
        self.fresh.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // A full pipe means that the loop has been woken already.
        let _ = (&self.waker).write(&[0]);
    }
}

struct Loop<F> {
    bridge: Bridge,
    ingress: UdpSocket,
    /// Connected, so that the system takes datagrams from the head alone and says when nobody listens there. `None` while
    /// the address is not known.
    heads: Box<[Option<UdpSocket>]>,
    addresses: Arc<HeadAddresses>,
    addresses_seen: u64,
    wake: UnixStream,
    received: RecvBatch,
    from_client: [FromClient; BATCH],
    from_head: [FromHead; BATCH],
    replies: Box<[Reply]>,
    /// For datagrams of the bridge's own.
    own: Box<[u8]>,
    stats: Arc<Stats>,
    control: Arc<Control>,
    drain_timeout: Duration,
    drain_until: Option<Instant>,
    beat: F,
}

impl<F: FnMut()> Loop<F> {
    fn run(&mut self) {
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
            for head in ready.heads() {
                self.receive_from_head(head);
            }
            if ready.wake {
                let _ = self.wake.read(&mut [0; 64]);
                if let Some(fresh) = self.control.fresh().take() {
                    self.bridge.reconfigure(fresh);
                }
            }
        }
    }

    /// Follows the phase; true when the loop shall end.
    fn is_over(&mut self, now: Instant) -> bool {
        match self.control.phase.load(Ordering::SeqCst) {
            RUNNING => return false,
            STOPPED => return true,
            _ => {}
        }
        let until = *self.drain_until.get_or_insert_with(|| {
            self.bridge.begin_drain();
            now + self.drain_timeout
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
        let mut fds: [PollFd<'_>; 2 + MAX_HEADS] =
            std::array::from_fn(|_| readable(self.wake.as_fd()));
        fds[1] = readable(self.ingress.as_fd());
        let mut count = 2;
        let mut index_of = [0; 2 + MAX_HEADS];
        for (head, socket) in self.heads.iter().enumerate() {
            if let Some(socket) = socket {
                fds[count] = readable(socket.as_fd());
                index_of[count] = head;
                count += 1;
            }
        }
        let mut ready = Ready {
            wake: false,
            ingress: false,
            heads: 0,
        };
        if poll(&mut fds[..count], timeout).is_ok_and(|ready| ready > 0) {
            let is_ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
            ready.wake = is_ready(&fds[0]);
            ready.ingress = is_ready(&fds[1]);
            for (fd, head) in fds[2..count].iter().zip(&index_of[2..count]) {
                ready.heads |= u32::from(is_ready(fd)) << head;
            }
        }
        ready
    }

    fn receive_from_clients(&mut self) {
        for _ in 0..ROUNDS {
            let count = match self.received.recv(&self.ingress) {
                Ok(count) => count,
                Err(error) => return report("receive from clients", &error),
            };
            let now = Instant::now();
            for index in 0..count {
                let (datagram, client) = self.received.get_mut(index);
                self.from_client[index] =
                    self.bridge
                        .on_client(now, client, datagram, &mut self.replies[index]);
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
            self.stats
                .drops
                .send_failed
                .add(batch::send(&self.ingress, replies).failed as u64);
            if count < BATCH {
                return;
            }
        }
    }

    /// Sends what the last batch has for `head`.
    fn forward(&mut self, now: Instant, head: usize, count: usize) {
        let datagrams = (0..count).filter_map(|index| match self.from_client[index] {
            FromClient::Forward {
                head: to,
                len,
                version,
            } if to == head => Some((self.received.reframed(index, len, version), None)),
            _ => None,
        });
        let report = send_to_head(self.heads[head].as_ref(), datagrams);
        self.after_sending(now, head, report);
    }

    fn receive_from_head(&mut self, head: usize) {
        for _ in 0..ROUNDS {
            let Some(socket) = &self.heads[head] else {
                return;
            };
            let received = self.received.recv(socket);
            let now = Instant::now();
            let count = match received {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    self.bridge.on_head_refused(now, head);
                    continue;
                }
                Err(error) => return report("receive from a head", &error),
            };
            for index in 0..count {
                self.from_head[index] =
                    self.bridge
                        .on_head(now, head, self.received.get_mut(index).0);
            }
            let answers = (0..count).filter_map(|index| match self.from_head[index] {
                FromHead::Deliver {
                    client,
                    len,
                    version,
                } => Some((self.received.reframed(index, len, version), Some(client))),
                FromHead::Drop => None,
            });
            self.stats
                .drops
                .send_failed
                .add(batch::send(&self.ingress, answers).failed as u64);
            if count < BATCH {
                return;
            }
        }
    }

    /// Sends what the bridge has to send by itself, some of it at a time; true if there may be more.
    fn transmit_own(&mut self, now: Instant) -> bool {
        for _ in 0..OWN_AT_A_TIME {
            let Some(Transmit { to, len }) = self.bridge.poll_transmit(now, &mut self.own) else {
                return false;
            };
            let bytes = &self.own[..len];
            match to {
                Destination::Head(head) => {
                    let report = send_to_head(self.heads[head].as_ref(), [(bytes, None)]);
                    self.after_sending(now, head, report);
                }
                Destination::Client(client) => {
                    let report = batch::send(&self.ingress, [(bytes, Some(client))]);
                    self.stats.drops.send_failed.add(report.failed as u64);
                }
            }
        }
        true
    }

    fn after_sending(&mut self, now: Instant, head: usize, report: SendReport) {
        self.stats.drops.send_failed.add(report.failed as u64);
        if report.refused {
            self.bridge.on_head_refused(now, head);
        }
    }

    /// Connects to heads whose addresses have become known or have changed.
    fn connect_heads(&mut self, now: Instant) {
        let version = self.addresses.version();
        if version == self.addresses_seen {
            return;
        }
        self.addresses_seen = version;
        for head in 0..self.heads.len() {
            let Some(address) = self.addresses.get(head) else {
                continue;
            };
            let known = self.heads[head]
                .as_ref()
                .and_then(|socket| socket.peer_addr().ok());
            if known == Some(address) {
                continue;
            }
            match connect(address) {
                Ok(socket) => {
                    tracing::info!(head = self.addresses.name(head), %address, "head");
                    self.heads[head] = Some(socket);
                }
                Err(error) => {
                    tracing::warn!(head = self.addresses.name(head), %address, %error, "no socket for a head");
                    self.bridge.on_head_refused(now, head);
                }
            }
        }
    }
}

/// Which sockets have something.
#[derive(Clone, Copy, Debug)]
struct Ready {
    wake: bool,
    ingress: bool,
    /// A bit per head.
    heads: u32,
}

impl Ready {
    fn heads(self) -> impl Iterator<Item = usize> {
        (0..MAX_HEADS).filter(move |head| self.heads >> head & 1 == 1)
    }
}

/// A head whose address is not known is one that nobody listens at.
fn send_to_head<'a>(
    socket: Option<&UdpSocket>,
    datagrams: impl IntoIterator<Item = (&'a [u8], Option<SocketAddr>)>,
) -> SendReport {
    match socket {
        Some(socket) => batch::send(socket, datagrams),
        None => {
            let failed = datagrams.into_iter().count();
            SendReport {
                sent: 0,
                failed,
                refused: failed > 0,
            }
        }
    }
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

fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
    enlarge_buffers(&socket);
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(OwnedFd::from(socket).into())
}

fn connect(address: SocketAddr) -> io::Result<UdpSocket> {
    let any = match address {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    let socket = bind(any)?;
    socket.connect(address)?;
    Ok(socket)
}

fn enlarge_buffers(socket: &Socket) {
    // The system gives what its limits allow, and a smaller buffer still works.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
}

fn secrets() -> Result<Secrets, StartError> {
    let (mut cookie_key, mut generation) = ([0; 32], [0; 4]);
    rand::fill(&mut cookie_key).map_err(|_| StartError::Random)?;
    rand::fill(&mut generation).map_err(|_| StartError::Random)?;
    Ok(Secrets {
        cookie_key,
        first_generation: u32::from_ne_bytes(generation),
    })
}

/// The longest that the loop waits between two beats.
pub const BEAT_INTERVAL: Duration = Duration::from_secs(1);

const RUNNING: u8 = 0;
const DRAINING: u8 = 1;
const STOPPED: u8 = 2;
/// Batches taken from one socket before the others have their turn.
const ROUNDS: usize = 4;
/// Datagrams of the bridge's own that are sent before the sockets have their turn.
const OWN_AT_A_TIME: usize = 256;
const SOCKET_BUFFER: usize = 4 << 20;
const MAX_HEADS: usize = crate::config::MAX_HEADS;
