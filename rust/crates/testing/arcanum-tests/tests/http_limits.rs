//! Clients that hold connections, memory and streams: the services stay reachable, and stay small.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arcanum_tests::alone;
use mesh_testkit::process::Service;
use mesh_testkit::{Launcher, Mesh};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

const SMALL: &str = "threads = 1\nslots = 1\ncontext = 256\n[sampling]\nmax_tokens = 8\n";
/// Longest time for any answer, during any attack.
const SOON: Duration = Duration::from_secs(5);
/// Largest growth of a service under attack, bytes.
const GROWTH: u64 = 64 << 20;

/// Files for the test's own ends of the connections.
fn many_files() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    ensure!(
        hard > 3000,
        "this test needs 3,000 open files, and may have {hard}"
    );
    Ok(())
}

fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, SOON)?;
    stream.set_read_timeout(Some(SOON))?;
    stream.set_write_timeout(Some(SOON))?;
    Ok(stream)
}

/// A connection on which this was said, as far as it was taken.
fn holding(address: SocketAddr, said: &[u8]) -> Result<TcpStream> {
    let mut stream = connect(address)?;
    let _ = stream.write_all(said);
    Ok(stream)
}

fn answer(address: SocketAddr, request: &str) -> Result<String> {
    let mut stream = connect(address)?;
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn is_healthy(address: SocketAddr, attack: &str) -> Result<()> {
    let begun = Instant::now();
    let request = "GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    let said = answer(address, request).with_context(|| format!("{attack}: /health"))?;
    ensure!(
        said.starts_with("HTTP/1.1 200") && begun.elapsed() < SOON,
        "{attack}: {said:?} after {:?}",
        begun.elapsed()
    );
    Ok(())
}

fn has_grown(service: &Service, before: u64, attack: &str) -> Result<()> {
    let now = service.resident_bytes()?;
    ensure!(
        now < before + GROWTH,
        "{attack}: {} grew from {before} to {now} bytes",
        service.name()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_say_nothing_or_half_of_it_leave_health_reachable() -> Result<()> {
    let _alone = alone();
    many_files()?;
    for (files, count, said) in [
        (
            128,
            300,
            "GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx-half: ",
        ),
        (1024, 1100, ""),
        (1024, 1100, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    ] {
        let limit = format!("--nofile={files}:{files}");
        let launcher = Launcher::of_this_build()?.wrapped(&["prlimit", &limit]);
        let everything = files == 128;
        let mut mesh = Mesh::builder()
            .launcher(launcher)
            .workers(usize::from(everything))
            .worker_config(SMALL);
        if everything {
            mesh = mesh.shim_config("[http]\nlisten = \"127.0.0.1:0\"").shim();
        }
        let mesh = mesh.start().await?;
        let services: Vec<&Service> = [&mesh.head]
            .into_iter()
            .chain(&mesh.workers)
            .chain(&mesh.shim)
            .collect();
        let attack = format!("{count} x {said:?} at {files} files");
        let mut held = Vec::new();
        for service in &services {
            let address = service.address("http")?;
            for _ in 0..count {
                held.push(holding(address, said.as_bytes())?);
            }
        }
        for service in &services {
            let address = service.address("http")?;
            for _ in 0..3 {
                is_healthy(address, &format!("{}: {attack}", service.name()))?;
            }
        }
        // Beyond health: a new client gets an answer from the API.
        let models = "GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
        let said = answer(mesh.head.address("http")?, models)?;
        ensure!(said.starts_with("HTTP/1.1 200"), "{attack}: {said}");
        drop(held);
        mesh.shutdown().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unfinished_bodies_and_answers_that_nobody_reads_take_little_memory() -> Result<()> {
    let _alone = alone();
    many_files()?;
    let mesh = Mesh::builder().workers(0).start().await?;
    let head = &mesh.head;
    let address = head.address("http")?;
    let before = head.resident_bytes()?;

    let attack = "150 bodies of 8 MiB without their last byte";
    let len = 8 << 20;
    let mut body = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         content-length: {len}\r\n\r\n"
    )
    .into_bytes();
    body.resize(body.len() + len - 1, b' ');
    let mut held = Vec::new();
    for _ in 0..150 {
        held.push(holding(address, &body)?);
        has_grown(head, before, attack)?;
    }
    is_healthy(address, attack)?;
    let asked = r#"{"model": "none", "messages": [{"role": "user", "content": "why?"}]}"#;
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{asked}",
        asked.len()
    );
    let said = answer(address, &request)?;
    ensure!(
        said.contains("no_worker") || said.contains("model_not_found"),
        "{said}"
    );
    drop(held);

    let attack = "100 clients that ask 200 times and never read";
    let asked = "GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n".repeat(200);
    let held: Vec<TcpStream> = (0..100)
        .map(|_| holding(address, asked.as_bytes()))
        .collect::<Result<_>>()?;
    is_healthy(address, attack)?;
    has_grown(head, before, attack)?;
    drop(held);
    mesh.shutdown().await
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let mut frame = len.to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// HEADERS for a GET of `path` with the end of the stream.
fn get(stream: u32, path: &str, flags: u8) -> Vec<u8> {
    let mut head = vec![0x82, 0x86, 0x41, 9];
    head.extend(b"localhost");
    head.extend([0x04, u8::try_from(path.len()).unwrap_or(0)]);
    head.extend(path.as_bytes());
    frame(1, flags, stream, &head)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_of_http2_frames_harm_only_their_own_connection() -> Result<()> {
    let _alone = alone();
    many_files()?;
    let mesh = Mesh::builder().workers(0).start().await?;
    let head = &mesh.head;
    let address = head.address("http")?;
    let before = head.resident_bytes()?;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    // SETTINGS_INITIAL_WINDOW_SIZE, which is 0 where answers are not to be sent.
    let settings = |window: u32| {
        let mut payload = vec![0, 4];
        payload.extend(window.to_be_bytes());
        frame(4, 0, 0, &payload)
    };
    let streams = || (0..5000u32).map(|number| 2 * number + 1);
    let repeated =
        |frames: Vec<u8>, times| [preface.clone(), settings(65_535), frames.repeat(times)].concat();
    let of_all = |window, make: &dyn Fn(u32) -> Vec<u8>| {
        let frames: Vec<u8> = streams().flat_map(make).collect();
        [preface.clone(), settings(window), frames].concat()
    };
    let attacks: Vec<(&str, Vec<u8>)> = vec![
        (
            "streams without a window",
            of_all(0, &|stream| get(stream, "/openapi.json", 5)),
        ),
        (
            "streams that are reset",
            of_all(65_535, &|stream| {
                [
                    get(stream, "/openapi.json", 5),
                    frame(3, 0, stream, &[0, 0, 0, 8]),
                ]
                .concat()
            }),
        ),
        (
            "heads that do not end",
            [
                repeated(vec![], 0),
                get(1, "/health", 1),
                frame(9, 0, 1, &[0x40, 1, b'x', 1, b'y'].repeat(1000)).repeat(2000),
            ]
            .concat(),
        ),
        (
            "empty continuations",
            [
                repeated(vec![], 0),
                get(1, "/health", 1),
                frame(9, 0, 1, &[]).repeat(100_000),
            ]
            .concat(),
        ),
        ("settings", repeated(settings(1), 200_000)),
        ("pings", repeated(frame(6, 0, 0, &[7; 8]), 200_000)),
        (
            "empty data",
            [
                repeated(vec![], 0),
                get(1, "/health", 4),
                frame(0, 0, 1, &[]).repeat(200_000),
            ]
            .concat(),
        ),
        (
            "priorities",
            repeated(frame(2, 0, 1, &[0, 0, 0, 3, 1]), 200_000),
        ),
    ];
    for (attack, said) in &attacks {
        let attackers: Vec<_> = (0..8)
            .map(|_| {
                let said = said.clone();
                // Nothing that comes back is read.
                std::thread::spawn(move || {
                    let mut stream = connect(address)?;
                    stream.set_write_timeout(Some(Duration::from_secs(2)))?;
                    let _ = stream.write_all(&said);
                    Ok::<_, anyhow::Error>(stream)
                })
            })
            .collect();
        is_healthy(address, attack)?;
        let held: Vec<TcpStream> = attackers
            .into_iter()
            .map(|attacker| attacker.join().map_err(|_| anyhow::anyhow!("a panic"))?)
            .collect::<Result<_>>()?;
        is_healthy(address, attack)?;
        has_grown(head, before, attack)?;
        drop(held);
    }
    mesh.shutdown().await
}
