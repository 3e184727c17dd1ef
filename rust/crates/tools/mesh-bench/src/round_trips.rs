//! Datagrams there and back, as fast as possible: the load of a relay between a client and a head.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Context;
use dcf::{Message, MsgType};
use mesh_shim::batch::{self, BATCH, RecvBatch};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Sends tasks to `target`, a window of them at a time, and counts their answers.
///
/// # Errors
/// If nothing comes back.
pub fn round_trips_per_second(
    target: SocketAddr,
    window: usize,
    payload: usize,
    time: Duration,
) -> anyhow::Result<f64> {
    let socket = UdpSocket::bind(LOOPBACK)?;
    socket.connect(target)?;
    let window = window.clamp(1, 1_024);
    let task = Message::new(MsgType::TASK, 0, 0, vec![b'q'; payload.min(1_400)]).encode_datagram();
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
        let tasks = tasks[..count].iter().map(|task| (&task[..], None));
        under_way += batch::send(&socket, tasks, None).sent;
        if readable([&socket], 100) == [false] {
            // Lost datagrams never arrive.
            under_way = 0;
            continue;
        }
        let count = received.recv(&socket, None).unwrap_or(0);
        under_way = under_way.saturating_sub(count);
        answered += count as u64;
    }
    anyhow::ensure!(answered > 0, "nothing came back from {target}");
    Ok(answered as f64 / start.elapsed().as_secs_f64())
}

/// Times of so many tasks that go to `target` and back one after the other.
///
/// # Errors
/// If an answer does not come.
pub fn round_trip_times(
    target: SocketAddr,
    payload: usize,
    count: u32,
) -> anyhow::Result<Vec<Duration>> {
    let socket = UdpSocket::bind(LOOPBACK)?;
    socket.connect(target)?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    let task = Message::new(MsgType::TASK, 0, 0, vec![b'q'; payload.min(1_400)]).encode_datagram();
    let (mut task, mut answer) = (task.to_vec(), [0; 2048]);
    let mut times = Vec::new();
    for sequence in 0..count {
        task[1..5].copy_from_slice(&sequence.to_be_bytes());
        let start = Instant::now();
        socket.send(&task)?;
        let received = socket.recv(&mut answer);
        received.with_context(|| format!("nothing came back from {target}"))?;
        times.push(start.elapsed());
    }
    Ok(times)
}

/// Answers every Task with a Result of the same bytes, and ignores other messages.
pub fn echo_head(socket: UdpSocket, stop: &AtomicBool) {
    let mut received = RecvBatch::new();
    while !stop.load(Ordering::Relaxed) {
        if readable([&socket], 50) == [false] {
            continue;
        }
        let count = received.recv(&socket, None).unwrap_or(0);
        for index in 0..count {
            let (bytes, _) = received.get_mut(index);
            if bytes.first() == Some(&MsgType::TASK.0) {
                bytes[0] = MsgType::RESULT.0;
            }
        }
        let answers = (0..count).map(|index| received.get(index));
        batch::send(
            &socket,
            answers.map(|(bytes, from)| (bytes, Some(from))),
            None,
        );
    }
}

/// A thread with a socket, stopped when dropped.
#[derive(Debug)]
pub struct SocketThread {
    /// Address of the socket.
    pub address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl SocketThread {
    /// Starts the thread with a socket on a free port of the loopback address.
    ///
    /// # Errors
    /// If no port is free.
    pub fn start(
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

impl Drop for SocketThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Waits for datagrams, at most so many milliseconds. True for each socket that has one.
pub fn readable<const N: usize>(sockets: [&UdpSocket; N], milliseconds: u16) -> [bool; N] {
    let mut fds = sockets.map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN));
    let _ = poll(&mut fds, PollTimeout::from(milliseconds));
    fds.map(|fd| fd.any().unwrap_or(false))
}

/// A free port of the loopback address.
pub const LOOPBACK: &str = "127.0.0.1:0";
