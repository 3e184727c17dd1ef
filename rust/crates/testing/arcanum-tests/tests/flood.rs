//! Random and mutated datagrams at every UDP port: no crash, no growth in memory, service continues.
//!
//! `HYDRAMESH_FLOOD_DATAGRAMS` sets how many go to each port: 10 million in `make flood`, fewer where it is not set.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arcanum_tests::flood::{Generator, flood, flood_with};
use arcanum_tests::mesh_state::ensure_alive;
use arcanum_tests::{Seed, alone};
use dcf::{Message, MsgType};
use mesh_net::quic::open_session;
use mesh_net::trust::root_digest;
use mesh_testkit::v5::{RESULT, V5Client};
use mesh_testkit::{Mesh, Service};

const USUAL: u64 = 200_000;
const LIMIT: Duration = Duration::from_secs(60);
/// Largest growth after the first quarter: allocators round, caches of bounded size fill.
const GROWTH: u64 = 24 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_udp_port_outlives_a_flood_of_bad_datagrams() -> Result<()> {
    let _alone = alone();
    let mut seed = Seed::of_this_run(4);
    let count = match std::env::var("HYDRAMESH_FLOOD_DATAGRAMS") {
        Ok(text) => text.parse().context("HYDRAMESH_FLOOD_DATAGRAMS")?,
        Err(_) => USUAL,
    };
    let mut mesh = Mesh::builder()
        .workers(1)
        // Bad datagrams may be good tasks: these are answered in one token.
        .worker_config("threads = 1\n[sampling]\nmax_tokens = 1\n")
        .head_config("queue_limit = 32\n")
        .shim()
        // The shutdown must not wait for unanswered requests of the flood.
        .shim_config("drain_limit = \"2s\"\n")
        .start()
        .await?;
    let shim = mesh.shim.as_ref().context("a shim")?;
    let ports: Vec<(&str, SocketAddr)> = vec![
        ("the shim's clients", shim.address("ingress")?),
        ("the head's clients", mesh.head.address("dcf.clients")?),
        ("the head's workers", mesh.head.address("dcf.workers")?),
        ("the head's QUIC", mesh.head.address("quic")?),
        ("the worker's tasks", mesh.workers[0].address("dcf")?),
    ];
    for (name, port) in ports {
        let started = Instant::now();
        let quarter = seed.draw();
        send(port, count / 4, quarter).await?;
        let before = resident(&mesh)?;
        let sent = send(port, count - count / 4, seed.draw()).await?;
        let after = resident(&mesh)?;
        println!(
            "{name}: {} datagrams in {:.1} s, resident memory {before:?} -> {after:?}",
            sent + count / 4,
            started.elapsed().as_secs_f64()
        );
        for ((service, before), (_, after)) in before.iter().zip(&after) {
            ensure!(
                after.saturating_sub(*before) <= GROWTH,
                "{name}: {service} grew from {before} to {after} bytes"
            );
        }
        still_serves(&mut mesh)
            .await
            .with_context(|| format!("after the flood at {name}"))?;
    }
    sealed_ports(&mesh, count, &mut seed).await?;
    mesh.shutdown().await
}

/// Changed and repeated datagrams of a session, at the port of sealed DCF and at that of sealed heartbeats:
/// none is accepted.
async fn sealed_ports(mesh: &Mesh, count: u64, seed: &mut Seed) -> Result<()> {
    let state_dir = mesh.head.state_dir();
    let key = std::fs::read_to_string(state_dir.join("admin.key"))?;
    let root = root_digest(&std::fs::read_to_string(state_dir.join("root.crt"))?)?;
    let quic = [mesh.head.address("quic")?];
    let (mut session, terms) = open_session(&quic, &root, key.trim(), "").await?;
    let health = Message::new(MsgType::HEALTH, 7, 0, "");
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await?;
    let mut used = Vec::new();
    for _ in 0..64 {
        let sealed = session.seal(&health, 64, Instant::now())?.encode_datagram();
        socket.send_to(&sealed, terms.udp).await?;
        tokio::time::timeout(LIMIT, socket.recv(&mut [0; 2048])).await??;
        used.push(sealed.to_vec());
    }
    let heartbeats: Vec<Vec<u8>> = used
        .iter()
        .map(|sealed| [&[MsgType::SEALED_HEARTBEAT.0], &sealed[1..]].concat())
        .collect();
    let ports = [
        ("sealed DCF", terms.udp, "sealed", &used),
        (
            "sealed heartbeats",
            mesh.head.address("dcf.workers")?,
            "workers",
            &heartbeats,
        ),
    ];
    for (name, port, socket, datagrams) in ports {
        let generator = Generator::new(seed.draw()).with(datagrams);
        let (before, started) = (accepted(mesh, socket).await?, Instant::now());
        let memory = mesh.head.resident_bytes()?;
        // The changed ones, and all of them as they were.
        let changed = tokio::task::spawn_blocking(move || flood_with(port, count, generator));
        let sent = changed.await??;
        let again = tokio::net::UdpSocket::bind("127.0.0.1:0").await?;
        for datagram in datagrams {
            again.send_to(datagram, port).await?;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        let after = accepted(mesh, socket).await?;
        // The worker's own heartbeats go on, one in 2 s or less often.
        let own = match socket {
            "workers" => started.elapsed().as_secs() / 2 + 2,
            _ => 0,
        };
        println!("{name}: {sent} datagrams, {} accepted", after - before);
        let grown = mesh.head.resident_bytes()?.saturating_sub(memory);
        ensure!(grown <= GROWTH, "{name}: the head grew by {grown} bytes");
        ensure!(after - before <= own, "{name}: {} accepted", after - before);
    }
    Ok(())
}

/// Number of datagrams that the head has accepted at a socket.
async fn accepted(mesh: &Mesh, socket: &str) -> Result<u64> {
    let url = format!("http://{}/metrics", mesh.head.address("http")?);
    let text = reqwest::get(url).await?.text().await?;
    let name =
        format!("hydramesh_head_datagrams_total{{socket=\"{socket}\",outcome=\"accepted\"}} ");
    let value = text.lines().find_map(|line| line.strip_prefix(&name));
    Ok(value.with_context(|| format!("no {name}"))?.parse()?)
}

async fn send(port: SocketAddr, count: u64, seed: u64) -> Result<u64> {
    Ok(tokio::task::spawn_blocking(move || flood(port, count, seed)).await??)
}

fn services(mesh: &Mesh) -> impl Iterator<Item = &Service> {
    mesh.shim.iter().chain(&mesh.workers).chain([&mesh.head])
}

fn resident(mesh: &Mesh) -> Result<Vec<(String, u64)>> {
    services(mesh)
        .map(|service| Ok((service.name().to_owned(), service.resident_bytes()?)))
        .collect()
}

async fn still_serves(mesh: &mut Mesh) -> Result<()> {
    ensure_alive(mesh)?;
    // A v5.0.0 worker that the noise made up may stand in the registry until it is pruned; a good task gets through.
    let shim = mesh.shim.as_ref().context("a shim")?.address("ingress")?;
    let started = Instant::now();
    loop {
        let client = V5Client::new(shim)?;
        let answer = client.ask(
            77,
            "{\"prompt\": \"hello\", \"max_tokens\": 1, \"stream\": false}",
            LIMIT,
        )?;
        if answer.kind == RESULT {
            return Ok(());
        }
        // Still busy with tasks of the flood; that ends.
        ensure!(started.elapsed() < LIMIT, "still no result: {answer:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
