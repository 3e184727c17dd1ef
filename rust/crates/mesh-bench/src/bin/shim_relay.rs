//! How many datagrams a shim moves, next to a bare relay that only receives and sends in the same batches.
//!
//! Both are put between the same sender and the same head: tasks go in, each comes back as a Result, so every datagram
//! passes twice. A window of datagrams under way keeps all of them busy without loss. Shim and relay take turns; the
//! medians and their ratio are printed.

use std::{
    net::{SocketAddr, UdpSocket},
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::Parser;
use dcf::{Message, MsgType};
use mesh_shim::{
    Config, Shim,
    batch::{self, BATCH, RecvBatch},
    config::RateLimit,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Measures the throughput of a shim against a bare recvmmsg/sendmmsg relay on loopback
#[derive(Parser)]
struct Args {
    /// Rounds; each runs both
    #[arg(long, default_value_t = 7)]
    rounds: usize,

    /// Seconds for each of the two in a round
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,

    /// Tasks under way at once
    #[arg(long, default_value_t = 256)]
    window: usize,

    /// Bytes of a task's payload
    #[arg(long, default_value_t = 200)]
    payload: usize,

    /// Exit with an error if the ratio is below this
    #[arg(long)]
    at_least: Option<f64>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let head = Running::start("head", echo_head)?;
    let to_head = head.address;
    let relay = Running::start("relay", move |socket, stop| {
        bare_relay(socket, to_head, stop)
    })?;
    let shim = Shim::spawn(Config {
        listen: LOOPBACK.parse()?,
        heads: vec![to_head.to_string()],
        rate_limit: RateLimit {
            per_second: 0,
            ..RateLimit::default()
        },
        ..Config::default()
    })?;

    let time = Duration::from_secs_f64(args.seconds.clamp(0.05, 60.0));
    let (mut of_relay, mut of_shim) = (Vec::new(), Vec::new());
    for round in 0..args.rounds.clamp(1, 1_000) {
        // Whoever goes first changes, in case that matters.
        for turn in 0..2 {
            if (round + turn) % 2 == 0 {
                of_relay.push(round_trips_per_second(relay.address, &args, time)?);
            } else {
                of_shim.push(round_trips_per_second(shim.addr(), &args, time)?);
            }
        }
    }
    let (of_relay, of_shim) = (median(of_relay), median(of_shim));
    let ratio = of_shim / of_relay;
    println!("relay  {of_relay:9.0} round trips/s");
    println!("shim   {of_shim:9.0} round trips/s  {ratio:.2} x relay");
    shim.stop();
    if let Some(least) = args.at_least {
        anyhow::ensure!(ratio >= least, "the ratio is below {least}");
    }
    Ok(())
}

/// Sends tasks to `target`, a window of them at a time, and counts their answers.
fn round_trips_per_second(target: SocketAddr, args: &Args, time: Duration) -> anyhow::Result<f64> {
    let socket = UdpSocket::bind(LOOPBACK)?;
    socket.connect(target)?;
    let window = args.window.clamp(1, 1_024);
    let task =
        Message::new(MsgType::TASK, 0, 0, vec![b'q'; args.payload.min(1_400)]).encode_datagram();
    let mut tasks = vec![task.to_vec(); BATCH];
    let mut received = RecvBatch::new();
    let (mut under_way, mut sequence, mut answered) = (0, 0u32, 0u64);
    let start = Instant::now();
    while start.elapsed() < time {
        let count = (window - under_way).min(BATCH);
        for task in &mut tasks[..count] {
            task[1..5].copy_from_slice(&sequence.to_be_bytes());
            sequence += 1;
        }
        under_way += batch::send(&socket, tasks[..count].iter().map(|task| (&task[..], None))).sent;
        if !readable(&socket, Duration::from_millis(100)) {
            // What was lost does not come any more.
            under_way = 0;
            continue;
        }
        let count = received.recv(&socket).unwrap_or(0);
        under_way = under_way.saturating_sub(count);
        answered += count as u64;
    }
    anyhow::ensure!(answered > 0, "nothing came back from {target}");
    Ok(answered as f64 / start.elapsed().as_secs_f64())
}

/// Answers every Task with the same bytes as a Result, and leaves all else as it is.
fn echo_head(socket: UdpSocket, stop: &AtomicBool) {
    let mut received = RecvBatch::new();
    while !stop.load(Ordering::Relaxed) {
        if !readable(&socket, Duration::from_millis(50)) {
            continue;
        }
        let count = received.recv(&socket).unwrap_or(0);
        for index in 0..count {
            let (bytes, _) = received.get_mut(index);
            if bytes.first() == Some(&MsgType::TASK.0) {
                bytes[0] = MsgType::RESULT.0;
            }
        }
        batch::send(
            &socket,
            (0..count)
                .map(|index| received.get(index))
                .map(|(bytes, from)| (bytes, Some(from))),
        );
    }
}

/// Passes datagrams of one client to `head` and back, and looks at none.
fn bare_relay(ingress: UdpSocket, head: SocketAddr, stop: &AtomicBool) {
    let upstream = UdpSocket::bind(LOOPBACK).expect("a free port");
    upstream.connect(head).expect("loopback is reachable");
    let mut received = RecvBatch::new();
    let mut client = None;
    while !stop.load(Ordering::Relaxed) {
        let [from_client, from_head] = readable_of(&ingress, &upstream);
        if from_client {
            let count = received.recv(&ingress).unwrap_or(0);
            client = (count > 0).then(|| received.get(count - 1).1).or(client);
            batch::send(
                &upstream,
                (0..count).map(|index| (received.get(index).0, None)),
            );
        }
        if from_head {
            let count = received.recv(&upstream).unwrap_or(0);
            batch::send(
                &ingress,
                (0..count).map(|index| (received.get(index).0, client)),
            );
        }
    }
}

/// A thread with a socket, stopped when dropped.
struct Running {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start(
        name: &str,
        run: impl FnOnce(UdpSocket, &AtomicBool) + Send + 'static,
    ) -> anyhow::Result<Self> {
        let socket = UdpSocket::bind(LOOPBACK).context("no free port on loopback")?;
        let address = socket.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name(name.into())
            .spawn(move || run(socket, &stopped))?;
        Ok(Self {
            address,
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn readable(socket: &UdpSocket, timeout: Duration) -> bool {
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, timeout_of(timeout)).is_ok_and(|ready| ready > 0)
}

fn readable_of(a: &UdpSocket, b: &UdpSocket) -> [bool; 2] {
    let mut fds = [
        PollFd::new(a.as_fd(), PollFlags::POLLIN),
        PollFd::new(b.as_fd(), PollFlags::POLLIN),
    ];
    let _ = poll(&mut fds, timeout_of(Duration::from_millis(50)));
    fds.map(|fd| fd.any().unwrap_or(false))
}

fn timeout_of(timeout: Duration) -> PollTimeout {
    PollTimeout::from(u16::try_from(timeout.as_millis()).unwrap_or(u16::MAX))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

const LOOPBACK: &str = "127.0.0.1:0";
