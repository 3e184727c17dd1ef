//! Attacks by UDP datagrams.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arcanum_tests::flood::Generator;
use mesh_testkit::v5::{CHUNK, Datagram, HEARTBEAT, RESULT, TASK, Wire, pieces};
use tokio::net::UdpSocket;

use super::Tally;
use crate::targets::Targets;

const CHALLENGE: u8 = 0x28;
const CHALLENGE_REPLY: u8 = 0x29;
/// Datagrams a second, so that the sockets of one attacker are not the bottleneck.
const PACE: u64 = 8_000;

/// A task of 16 MiB of small objects in Chunks every 10 s; between them the beginnings of payloads that never become whole.
pub(super) async fn bombs(target: SocketAddr, targets: Arc<Targets>, tally: Tally) {
    let head = format!(
        r#"{{"model":{:?},"prompt":"hi","max_tokens":1,"x":["#,
        targets.model
    );
    let objects = "{},".repeat((16 << 20) / 3);
    let task = format!("{head}{}]}}", objects.trim_end_matches(',')).into_bytes();
    for round in 0u32.. {
        let Ok(socket) = UdpSocket::bind("0.0.0.0:0").await else {
            tally.count("no socket");
            return;
        };
        if prove_address(&socket, target).await {
            tally.count("cookies echoed");
        }
        let sequence = round * 100_000;
        let begun = Instant::now();
        for (sent, chunk) in pieces(Wire::V5_0, sequence, &task).iter().enumerate() {
            let _ = socket.send_to(&chunk.encode(), target).await;
            pace(begun, sent as u64).await;
        }
        tally.count("whole bombs");
        match tokio::time::timeout(Duration::from_secs(2), receive(&socket)).await {
            Ok(Some(answer)) => tally.count(describe(&answer)),
            _ => tally.count("no answer to a bomb"),
        }
        // Beginnings: each claims 90 MB.
        let begun = Instant::now();
        for number in 1..4_000u32 {
            let chunk = Datagram::new(CHUNK, sequence + number, beginning(number)).encode();
            let _ = socket.send_to(&chunk, target).await;
            pace(begun, u64::from(number) * 8).await;
        }
        tally.add("beginnings", 4_000);
        tokio::time::sleep(Duration::from_secs(4)).await;
    }
}

/// Asks for nothing, and echoes the cookie of a shim that wants one.
async fn prove_address(socket: &UdpSocket, target: SocketAddr) -> bool {
    // A shim answers with no more bytes than came: the task is as long as a challenge.
    let task = format!("hi{}", " ".repeat(200));
    let task = Datagram::new(TASK, 1, task).encode();
    if socket.send_to(&task, target).await.is_err() {
        return false;
    }
    let heard = tokio::time::timeout(Duration::from_millis(500), receive(socket)).await;
    let Ok(Some(challenge)) = heard else {
        return false;
    };
    if challenge.kind != CHALLENGE {
        return false;
    }
    let reply = Datagram::new(CHALLENGE_REPLY, challenge.sequence, challenge.payload);
    socket.send_to(&reply.encode(), target).await.is_ok()
}

async fn receive(socket: &UdpSocket) -> Option<Datagram> {
    let mut buffer = vec![0; 65_536];
    let (length, _) = socket.recv_from(&mut buffer).await.ok()?;
    Datagram::decode(&buffer[..length])
}

fn describe(answer: &Datagram) -> String {
    match answer.error() {
        Some((code, text)) => format!("error {code:#04x} {text}"),
        None if answer.kind == RESULT => "a result".to_owned(),
        None => format!("a datagram of type {:#04x}", answer.kind),
    }
}

/// The first piece of 65,535.
fn beginning(number: u32) -> Vec<u8> {
    let mut payload = u16::MAX.to_be_bytes().to_vec();
    payload.extend([0, 0]);
    payload.extend([number as u8; 16]);
    payload.extend([b'['; 1_400]);
    payload
}

async fn pace(begun: Instant, sent: u64) {
    let due = Duration::from_secs_f64(sent as f64 / PACE as f64);
    let ahead = due.saturating_sub(begun.elapsed());
    if ahead > Duration::from_millis(2) {
        tokio::time::sleep(ahead).await;
    }
}

/// Heartbeats of DCF v5.0.0, and a forged answer to every task.
pub(super) async fn forged(targets: Arc<Targets>, tally: Tally) {
    let Ok(socket) = UdpSocket::bind("0.0.0.0:0").await else {
        return tally.count("no socket");
    };
    let port = socket.local_addr().map_or(0, |address| address.port());
    loop {
        let beat = Datagram::new(HEARTBEAT, 0, port.to_string()).encode();
        let _ = socket.send_to(&beat, targets.bus).await;
        tally.count("heartbeats");
        let until = tokio::time::Instant::now() + Duration::from_secs(1);
        while let Ok(received) = tokio::time::timeout_at(until, receive(&socket)).await {
            let Some(received) = received else { continue };
            if received.kind == TASK {
                tally.count("TASKS OF CLIENTS");
                let answer = Datagram::new(RESULT, received.sequence, "forged").encode();
                let _ = socket.send_to(&answer, targets.bus).await;
            }
        }
    }
}

/// 500 bad datagrams a second at each port.
pub(super) async fn datagrams(targets: Arc<Targets>, tally: Tally) {
    let Ok(socket) = UdpSocket::bind("0.0.0.0:0").await else {
        return tally.count("no socket");
    };
    let mut generator = Generator::new(12);
    let ports = [targets.clients, targets.bus, targets.quic, targets.shim];
    loop {
        for _ in 0..50 {
            for port in ports {
                let _ = socket.send_to(generator.datagram(), port).await;
            }
        }
        tally.add("datagrams", 50 * ports.len() as u64);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
