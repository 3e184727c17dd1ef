//! Datagrams that mean harm: noise, headers that lie, valid messages with bytes changed.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use dcf::{HEADER_LEN, Header, MsgType};

use crate::Seed;

/// Makes one bad datagram after the other.
#[derive(Debug)]
pub struct Generator {
    random: Seed,
    buffer: Vec<u8>,
    templates: Vec<Vec<u8>>,
}

impl Generator {
    /// A generator; equal seeds give equal datagrams.
    pub fn new(seed: u64) -> Self {
        let payloads: [&[u8]; 9] = [
            b"",
            b"7779",
            b"Why is the sky blue?",
            br#"{"prompt":"hi","max_tokens":1,"temperature":0}"#,
            br#"{"messages":[{"role":"user","content":"hi"}],"max_tokens":1,"stream":true}"#,
            b"\x02worker busy",
            b"\xff\xfe\x00not text",
            &[
                0x00, 0x03, 0x00, 0x01, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, b'd', b'a',
                b't', b'a',
            ],
            &[0xAB; 1_200],
        ];
        let kinds = MsgType::ASSIGNED
            .iter()
            .map(|kind| kind.0)
            .chain([0x00, 0x0A, 0x7E, 0x80, 0xFE]);
        let templates = kinds
            .flat_map(|kind| {
                payloads
                    .iter()
                    .map(move |payload| encode(kind, 0, payload.len() as u32, payload))
            })
            .collect();
        Self {
            random: Seed::new(seed),
            buffer: Vec::new(),
            templates,
        }
    }

    /// The same, which also changes these datagrams.
    #[must_use]
    pub fn with(mut self, datagrams: &[Vec<u8>]) -> Self {
        let longer = datagrams
            .iter()
            .filter(|datagram| datagram.len() >= HEADER_LEN);
        self.templates.extend(longer.cloned());
        self
    }

    /// Makes the next bad datagram.
    pub fn datagram(&mut self) -> &[u8] {
        match self.random.below(100) {
            // Noise of any length; long ones are rare, they would only be slow.
            0..20 => {
                let longest = if self.random.below(64) == 0 {
                    9_000
                } else {
                    64
                };
                let len = self.random.below(longest);
                self.buffer.clear();
                for _ in 0..len {
                    self.buffer.push(self.random.draw() as u8);
                }
            }
            // A header with a false payload length.
            20..45 => {
                let kind = self.random.draw() as u8;
                let sequence = self.random.draw() as u32;
                let len = match self.random.below(4) {
                    0 => u32::MAX,
                    1 => self.random.draw() as u32,
                    _ => self.random.below(64) as u32,
                };
                let have = self.random.below(48);
                let body = vec![self.random.draw() as u8; have];
                self.buffer = encode(kind, sequence, len, &body);
            }
            // A valid message with some bytes changed, cut off or added.
            _ => {
                let template = self.random.below(self.templates.len());
                self.buffer.clone_from(&self.templates[template]);
                let sequence = (self.random.draw() as u32).to_be_bytes();
                self.buffer[1..5].copy_from_slice(&sequence);
                for _ in 0..self.random.below(6) {
                    let at = self.random.below(self.buffer.len());
                    self.buffer[at] = self.random.draw() as u8;
                }
                match self.random.below(8) {
                    0 => {
                        let len = self.random.below(self.buffer.len());
                        self.buffer.truncate(len);
                    }
                    1 => self.buffer.extend_from_slice(&[0x55; 33]),
                    _ => {}
                }
            }
        }
        &self.buffer
    }
}

/// Sends `count` bad datagrams from eight sockets to `target`, as fast as it goes. Returns how many the system took.
///
/// # Errors
/// If no socket can be opened.
pub fn flood(target: SocketAddr, count: u64, seed: u64) -> io::Result<u64> {
    flood_with(target, count, Generator::new(seed))
}

/// The same, with the datagrams of this generator.
///
/// # Errors
/// If no socket can be opened.
pub fn flood_with(target: SocketAddr, count: u64, mut generator: Generator) -> io::Result<u64> {
    let sockets: Vec<UdpSocket> = (0..8)
        .map(|_| UdpSocket::bind("127.0.0.1:0"))
        .collect::<io::Result<_>>()?;
    let mut sent = 0;
    for index in 0..count {
        let socket = &sockets[index as usize % sockets.len()];
        // A full buffer is the kernel's business; the flood goes on.
        if socket.send_to(generator.datagram(), target).is_ok() {
            sent += 1;
        }
    }
    Ok(sent)
}

fn encode(kind: u8, sequence: u32, payload_len: u32, body: &[u8]) -> Vec<u8> {
    let header = Header {
        msg_type: kind,
        sequence,
        timestamp_us: 1_767_830_400_000_000,
        payload_len,
    };
    let mut datagram = header.encode().to_vec();
    datagram.extend_from_slice(body);
    datagram
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flood_holds_all_kinds_and_repeats_with_its_seed() {
        let mut first = Generator::new(7);
        let mut second = Generator::new(7);
        let (mut short, mut lying, mut tasks) = (0, 0, 0);
        for _ in 0..10_000 {
            let datagram = first.datagram().to_vec();
            assert_eq!(datagram, second.datagram());
            match Header::decode(&datagram) {
                Err(_) => short += 1,
                Ok(header) if header.payload_len as usize > datagram.len() - dcf::HEADER_LEN => {
                    lying += 1
                }
                Ok(header) if header.kind() == MsgType::TASK => tasks += 1,
                Ok(_) => {}
            }
        }
        assert!(
            short > 500 && lying > 500 && tasks > 50,
            "{short} {lying} {tasks}"
        );
    }
}
