//! DCF v5.0.0 and v5.1 peers as they exist in the field: a client, a worker and a head over plain sockets.
//!
//! Written from the wire format alone and on purpose without the `dcf` crate: a mistake there must not cancel itself out.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use md5::{Digest, Md5};
use mesh_base::clock::timestamp_us;

/// Message type of a heartbeat.
pub const HEARTBEAT: u8 = 0x01;
/// Message type of a task.
pub const TASK: u8 = 0x02;
/// Message type of a result.
pub const RESULT: u8 = 0x03;
/// Message type of a piece of a result.
pub const CHUNK: u8 = 0x06;
/// Message type of a probe and of its answer.
pub const HEALTH: u8 = 0x08;
/// Message type of a head's order to stop.
pub const SHUTDOWN: u8 = 0x09;
/// Message type of an error.
pub const ERROR: u8 = 0xFF;

const HEADER: usize = 17;
const LARGEST: usize = 65_507;
/// The byte that every v5.1 datagram begins with.
const V5_1: u8 = 0x51;
/// Maximum size of one datagram of a v5.1 peer, and of one piece of a longer payload.
const SINGLE: usize = 1_454;
const PIECE: usize = 1_400;

/// Version of the wire format of a peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Wire {
    /// 17 bytes before the payload.
    #[default]
    V5_0,
    /// The version byte, then the same.
    V5_1,
}

/// One message: type u8, sequence u32, timestamp u64, payload length u32, all big-endian, then the payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Datagram {
    /// Version of the wire format.
    pub wire: Wire,
    /// Message type.
    pub kind: u8,
    /// Sequence number.
    pub sequence: u32,
    /// Payload bytes.
    pub payload: Vec<u8>,
}

impl Datagram {
    /// A v5.0.0 message with these fields.
    pub fn new(kind: u8, sequence: u32, payload: impl Into<Vec<u8>>) -> Self {
        Self {
            wire: Wire::V5_0,
            kind,
            sequence,
            payload: payload.into(),
        }
    }

    /// The same message in another version.
    #[must_use]
    pub fn on(self, wire: Wire) -> Self {
        Self { wire, ..self }
    }

    /// Encodes the message, with the current time as timestamp.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = match self.wire {
            Wire::V5_0 => vec![self.kind],
            Wire::V5_1 => vec![V5_1, self.kind],
        };
        bytes.extend(self.sequence.to_be_bytes());
        bytes.extend(timestamp_us().to_be_bytes());
        bytes.extend((self.payload.len() as u32).to_be_bytes());
        bytes.extend(&self.payload);
        bytes
    }

    /// Decodes a datagram; `None` if it is shorter than its header requires.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        if let Some((&V5_1, message)) = bytes.split_first() {
            return Some(Self::decode_message(message)?.on(Wire::V5_1));
        }
        Self::decode_message(bytes)
    }

    fn decode_message(bytes: &[u8]) -> Option<Self> {
        let header: &[u8; HEADER] = bytes.first_chunk()?;
        let sequence = u32::from_be_bytes([header[1], header[2], header[3], header[4]]);
        let len = u32::from_be_bytes([header[13], header[14], header[15], header[16]]);
        let payload = bytes[HEADER..].get(..len as usize)?;
        Some(Self::new(header[0], sequence, payload))
    }

    /// The payload as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.payload).into_owned()
    }

    /// Code and text of an Error; `None` for other messages.
    pub fn error(&self) -> Option<(u8, String)> {
        let (&code, text) = self.payload.split_first()?;
        (self.kind == ERROR).then(|| (code, String::from_utf8_lossy(text).into_owned()))
    }
}

/// A result as a v5.1 peer sends it: one datagram, or pieces.
fn result_of(wire: Wire, sequence: u32, result: Vec<u8>) -> Vec<Datagram> {
    if wire == Wire::V5_0 || result.len() <= SINGLE {
        return vec![Datagram::new(RESULT, sequence, result).on(wire)];
    }
    // In any order: the last one first.
    let mut datagrams = pieces(wire, sequence, &result);
    datagrams.reverse();
    datagrams
}

/// A payload in pieces of total u16, index u16, MD5 and data.
pub fn pieces(wire: Wire, sequence: u32, payload: &[u8]) -> Vec<Datagram> {
    let sum = Md5::digest(payload);
    let pieces: Vec<&[u8]> = payload.chunks(PIECE).collect();
    let total = pieces.len() as u16;
    let datagrams = pieces.iter().zip(0_u16..).map(|(piece, index)| {
        let head = [total.to_be_bytes(), index.to_be_bytes()].concat();
        let payload = [head.as_slice(), sum.as_slice(), piece].concat();
        Datagram::new(CHUNK, sequence, payload).on(wire)
    });
    datagrams.collect()
}

/// A client: one Task out, one datagram back; of v5.1 also pieces.
#[derive(Debug)]
pub struct V5Client {
    socket: UdpSocket,
    wire: Wire,
}

impl V5Client {
    /// A client of the shim or head at `target`.
    ///
    /// # Errors
    /// If no socket can be opened.
    pub fn new(target: SocketAddr) -> Result<Self> {
        let socket = UdpSocket::bind("127.0.0.1:0").context("a UDP socket")?;
        socket.connect(target)?;
        Ok(Self::from_socket(socket))
    }

    /// The same client, speaking this version.
    #[must_use]
    pub fn speaking(self, wire: Wire) -> Self {
        Self { wire, ..self }
    }

    /// A client on a connected socket.
    pub fn from_socket(socket: UdpSocket) -> Self {
        Self {
            socket,
            wire: Wire::V5_0,
        }
    }

    /// Sends a task and does not wait.
    ///
    /// # Errors
    /// If nothing listens there.
    pub fn send(&self, sequence: u32, prompt: &str) -> Result<()> {
        self.send_raw(&Datagram::new(TASK, sequence, prompt).on(self.wire).encode())
    }

    /// Sends raw bytes as one datagram.
    ///
    /// # Errors
    /// If nothing listens there.
    pub fn send_raw(&self, bytes: &[u8]) -> Result<()> {
        self.socket.send(bytes).context("sending a datagram")?;
        Ok(())
    }

    /// The next datagram, `None` if none comes within `limit`.
    ///
    /// # Errors
    /// If the socket fails or the datagram is not a DCF message.
    pub fn receive(&self, limit: Duration) -> Result<Option<Datagram>> {
        self.socket.set_read_timeout(Some(limit))?;
        let mut buffer = vec![0; LARGEST];
        match self.socket.recv(&mut buffer) {
            Ok(len) => match Datagram::decode(&buffer[..len]) {
                Some(datagram) => Ok(Some(datagram)),
                None => bail!("{len} bytes came that are no DCF message"),
            },
            Err(error) if timed_out(&error) => Ok(None),
            Err(error) => Err(error).context("receiving a datagram"),
        }
    }

    /// Sends a task and waits for the response: one datagram, or the pieces of one result, put together.
    ///
    /// # Errors
    /// If none comes within `limit`, or if it has another sequence or version, or if a v5.0.0 client gets a piece.
    pub fn ask(&self, sequence: u32, prompt: &str, limit: Duration) -> Result<Datagram> {
        self.send(sequence, prompt)?;
        let mut pieces: Vec<Option<Vec<u8>>> = Vec::new();
        loop {
            let answer = self
                .receive(limit)?
                .with_context(|| format!("no answer to task {sequence} within {limit:?}"))?;
            if (answer.sequence, answer.wire) != (sequence, self.wire) {
                bail!(
                    "task {sequence} was answered as {} in {:?}",
                    answer.sequence,
                    answer.wire
                );
            }
            if answer.kind != CHUNK {
                if self.wire == Wire::V5_1 && answer.payload.len() > SINGLE {
                    bail!(
                        "a datagram of v5.1 has {} bytes of payload",
                        answer.payload.len()
                    );
                }
                return Ok(answer);
            }
            if self.wire == Wire::V5_0 {
                bail!("a v5.0.0 client got a piece");
            }
            let Some((&[t0, t1, i0, i1], rest)) = answer.payload.split_first_chunk::<4>() else {
                bail!("a piece without a header");
            };
            let (total, index) = (u16::from_be_bytes([t0, t1]), u16::from_be_bytes([i0, i1]));
            pieces.resize(total.into(), None);
            let place = pieces
                .get_mut(usize::from(index))
                .context("a piece beyond the total")?;
            *place = Some(
                rest.get(16..)
                    .context("a piece without a checksum")?
                    .to_vec(),
            );
            if pieces.iter().all(Option::is_some) {
                let whole: Vec<u8> = pieces.into_iter().flatten().flatten().collect();
                if Md5::digest(&whole)[..] != rest[..16] {
                    bail!("the pieces do not have the MD5 that they announce");
                }
                return Ok(Datagram::new(RESULT, sequence, whole).on(self.wire));
            }
        }
    }
}

/// A worker: heartbeats to a head, answers each task by a function of its text.
#[derive(Debug)]
pub struct V5Worker {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    address: SocketAddr,
}

impl V5Worker {
    /// Starts one that announces itself at `bus` every `interval` (2 s in the field). `answer` gives the result of a task;
    /// `None` leaves the task without one.
    ///
    /// # Errors
    /// If no socket can be opened.
    pub fn start(
        bus: SocketAddr,
        interval: Duration,
        answer: impl FnMut(&Datagram) -> Option<Vec<u8>> + Send + 'static,
    ) -> Result<Self> {
        Self::speaking(Wire::V5_0, bus, interval, answer)
    }

    /// As [`V5Worker::start`], speaking this version.
    ///
    /// # Errors
    /// As there.
    pub fn speaking(
        wire: Wire,
        bus: SocketAddr,
        interval: Duration,
        mut answer: impl FnMut(&Datagram) -> Option<Vec<u8>> + Send + 'static,
    ) -> Result<Self> {
        let socket = UdpSocket::bind("127.0.0.1:0").context("a UDP socket")?;
        let address = socket.local_addr()?;
        socket.set_read_timeout(Some(interval.min(Duration::from_millis(100))))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            // Those of v5.0.0 all have sequence 0.
            let mut count = u32::from(wire == Wire::V5_1);
            let step = count;
            let mut buffer = vec![0; LARGEST];
            let mut next = std::time::Instant::now();
            while !stopped.load(Ordering::Relaxed) {
                if std::time::Instant::now() >= next {
                    let port = address.port().to_string();
                    let heartbeat = Datagram::new(HEARTBEAT, count, port).on(wire);
                    let _ = socket.send_to(&heartbeat.encode(), bus);
                    count += step;
                    next += interval;
                }
                let Ok((len, _)) = socket.recv_from(&mut buffer) else {
                    continue;
                };
                let Some(task) = Datagram::decode(&buffer[..len]) else {
                    continue;
                };
                if (task.kind, task.wire) == (TASK, wire)
                    && let Some(result) = answer(&task)
                {
                    for (count, result) in (1..).zip(result_of(wire, task.sequence, result)) {
                        let _ = socket.send_to(&result.encode(), bus);
                        if count % 16 == 0 {
                            std::thread::sleep(Duration::from_millis(2));
                        }
                    }
                }
            }
        });
        Ok(Self {
            stop,
            thread: Some(thread),
            address,
        })
    }

    /// Address at which it takes tasks.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for V5Worker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A head: hears heartbeats, sends tasks to the worker it heard last.
#[derive(Debug)]
pub struct V5Head {
    bus: UdpSocket,
    wire: Wire,
}

impl V5Head {
    /// A head with its worker bus on a port that the system chose.
    ///
    /// # Errors
    /// If no socket can be opened.
    pub fn start() -> Result<Self> {
        Ok(Self {
            bus: UdpSocket::bind("127.0.0.1:0").context("a UDP socket")?,
            wire: Wire::V5_0,
        })
    }

    /// The same head with another wire version. It ignores messages of the other one.
    #[must_use]
    pub fn speaking(self, wire: Wire) -> Self {
        Self { wire, ..self }
    }

    /// Address for the heartbeats and results of workers.
    ///
    /// # Errors
    /// If the socket fails.
    pub fn bus(&self) -> Result<SocketAddr> {
        Ok(self.bus.local_addr()?)
    }

    /// Waits for a heartbeat; returns the address in it, and its payload.
    ///
    /// # Errors
    /// If none comes within `limit`, or if one is malformed.
    pub fn heartbeat(&self, limit: Duration) -> Result<(SocketAddr, Vec<u8>)> {
        let (from, datagram) = self.receive(limit, HEARTBEAT)?;
        if (datagram.sequence == 0) != (self.wire == Wire::V5_0) {
            bail!("a heartbeat has sequence {}", datagram.sequence);
        }
        let port = datagram
            .text()
            .parse()
            .with_context(|| format!("a heartbeat names the port {:?}", datagram.text()))?;
        Ok((SocketAddr::new(from.ip(), port), datagram.payload))
    }

    /// Sends a task to `worker` and waits for its answer, heartbeats aside.
    ///
    /// # Errors
    /// If none comes within `limit`.
    pub fn ask(
        &self,
        worker: SocketAddr,
        sequence: u32,
        prompt: &str,
        limit: Duration,
    ) -> Result<Datagram> {
        self.tell(worker, &Datagram::new(TASK, sequence, prompt))?;
        let (_, answer) = self.receive_other(limit, HEARTBEAT)?;
        if answer.sequence != sequence {
            bail!("task {sequence} was answered as {}", answer.sequence);
        }
        Ok(answer)
    }

    /// Sends a message to `worker`.
    ///
    /// # Errors
    /// If the socket fails.
    pub fn tell(&self, worker: SocketAddr, message: &Datagram) -> Result<()> {
        let message = message.clone().on(self.wire);
        self.bus.send_to(&message.encode(), worker)?;
        Ok(())
    }

    fn receive(&self, limit: Duration, kind: u8) -> Result<(SocketAddr, Datagram)> {
        self.receive_where(limit, |datagram| datagram.kind == kind)
    }

    fn receive_other(&self, limit: Duration, kind: u8) -> Result<(SocketAddr, Datagram)> {
        self.receive_where(limit, |datagram| datagram.kind != kind)
    }

    fn receive_where(
        &self,
        limit: Duration,
        wanted: impl Fn(&Datagram) -> bool,
    ) -> Result<(SocketAddr, Datagram)> {
        let deadline = std::time::Instant::now() + limit;
        let mut buffer = vec![0; LARGEST];
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                bail!("nothing came within {limit:?}");
            }
            self.bus.set_read_timeout(Some(left))?;
            match self.bus.recv_from(&mut buffer) {
                Ok((len, from)) => {
                    let datagram = Datagram::decode(&buffer[..len])
                        .with_context(|| format!("{len} bytes from {from} are no DCF message"))?;
                    if datagram.wire == self.wire && wanted(&datagram) {
                        return Ok((from, datagram));
                    }
                }
                Err(error) if timed_out(&error) => {}
                Err(error) => return Err(error).context("receiving a datagram"),
            }
        }
    }
}

fn timed_out(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peers_understand_each_other() {
        let head = V5Head::start().expect("a head");
        let bus = head.bus().expect("bound");
        let worker = V5Worker::start(bus, Duration::from_millis(50), |task| {
            Some(format!("answer to {}", task.text()).into_bytes())
        })
        .expect("a worker");
        let limit = Duration::from_secs(5);
        let (address, payload) = head.heartbeat(limit).expect("a heartbeat");
        assert_eq!(address, worker.address());
        assert_eq!(payload, address.port().to_string().into_bytes());
        let answer = head.ask(address, 41, "why?", limit).expect("an answer");
        assert_eq!(
            (answer.kind, answer.text().as_str()),
            (RESULT, "answer to why?")
        );
    }

    #[test]
    fn a_v5_1_datagram_has_one_byte_more() {
        let datagram = Datagram::new(TASK, 42, "hi").on(Wire::V5_1);
        let bytes = datagram.encode();
        assert_eq!(bytes[..6], [0x51, 2, 0, 0, 0, 42]);
        assert_eq!(
            (&bytes[14..18], &bytes[18..]),
            (&[0, 0, 0, 2][..], &b"hi"[..])
        );
        assert_eq!(Datagram::decode(&bytes), Some(datagram));
        let pieces = result_of(Wire::V5_1, 7, vec![1; 3_000]);
        assert_eq!(pieces.len(), 3);
        assert_eq!(pieces[0].payload[..4], [0, 3, 0, 2], "the last one first");
        assert_eq!(result_of(Wire::V5_1, 7, vec![1; SINGLE]).len(), 1);
    }

    #[test]
    fn the_bytes_are_those_of_the_field() {
        // The published vector "task_plain_text", its timestamp aside.
        let bytes = Datagram::new(TASK, 1, "Why is the sky blue?").encode();
        assert_eq!(bytes[..5], [2, 0, 0, 0, 1]);
        assert_eq!(bytes[13..17], [0, 0, 0, 0x14]);
        assert_eq!(&bytes[17..], b"Why is the sky blue?");
        assert_eq!(
            Datagram::decode(&bytes[..bytes.len() - 1]),
            None,
            "cut short"
        );
    }
}
