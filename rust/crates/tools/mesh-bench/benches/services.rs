//! Cost of real services on loopback: a worker's start and memory, and the time that shim and head add to a
//! task.
//!
//! The anchor of a round trip is the same task sent straight to the worker; both take turns, task by task. One worker is an echo
//! on a bare socket (DCF v5.0.0), so that next to nothing but the path is timed. The other is a real one that joined over
//! QUIC and computes one token.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use mesh_api::{CompletionRequest, GenerationOptions};
use mesh_bench::median;
use mesh_launcher::{Mesh, paths, until_signal};
use mesh_model::Model;
use mesh_testkit::v5::{HEARTBEAT, RESULT, V5Client, V5Worker};
use serde_json::json;

/// Starts real services and measures a worker's start and memory, and the way of a task through shim and head
#[derive(Parser)]
struct Args {
    /// Tasks sent each way
    #[arg(long, default_value_t = 2_000)]
    tasks: u32,
    /// Starts of a worker
    #[arg(long, default_value_t = 5)]
    starts: usize,
    /// cargo bench gives it
    #[arg(long, hide = true)]
    bench: bool,
}

const LIMIT: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    until_signal(async {
        round_trip_to_an_echo(args.tasks).await?;
        start_memory_and_round_trip_of_a_worker(&args).await
    })
    .await
}

async fn round_trip_to_an_echo(tasks: u32) -> Result<()> {
    let mesh = Mesh::builder()
        .head_config("[dcf]\nlegacy_workers = true\n")
        .shim()
        .start()
        .await?;
    let answer = |task: &mesh_testkit::v5::Datagram| Some(task.payload.clone());
    let _behind_the_head = V5Worker::start(
        mesh.head.address("dcf.workers")?,
        Duration::from_secs(1),
        answer,
    )?;
    // The worker of the direct way takes the client for its head: that is where a v5.0.0 worker sends its results.
    let direct = std::net::UdpSocket::bind("127.0.0.1:0")?;
    let alone = V5Worker::start(direct.local_addr()?, Duration::from_secs(3_600), answer)?;
    direct.connect(alone.address())?;
    let direct = V5Client::from_socket(direct);
    let heartbeat = direct.receive(LIMIT)?.context("a heartbeat")?;
    ensure!(heartbeat.kind == HEARTBEAT, "{heartbeat:?}");

    while mesh.usable_workers().await?.is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let through = V5Client::new(shim(&mesh)?)?;
    println!("wanted of the echo: at most 150 us added");
    let task = |_| "x".repeat(200);
    compare("echo, v5.0.0 worker", [direct, through], tasks, task).await?;
    mesh.shutdown().await
}

async fn start_memory_and_round_trip_of_a_worker(args: &Args) -> Result<()> {
    let model = Model::open(&paths::smollm2()?)?;
    let file = model.tensors().file_len() as f64;
    let config = model.config();
    // A key and a value of f16 for each head that has them, in each layer.
    let kv_bytes_per_token = 2 * config.layers as usize * config.kv_elements();
    let mut mesh = Mesh::builder().shim().start().await?;
    let mut starts = Vec::new();
    // With the usual slots, and with one: idle slots keep rows of earlier conversations, which are KV cache but not of this
    // prompt, and so are not taken off.
    for slots in [1, 8] {
        let mut resident = Vec::new();
        for _ in 0..args.starts.max(1) {
            if let Some(mut worker) = mesh.workers.pop() {
                worker.terminate(LIMIT).await?;
                mesh.wait_for_workers(0).await?;
            }
            let start = Instant::now();
            let index = mesh.start_worker(&format!("slots = {slots}")).await?;
            mesh.workers[index].wait_for("/ready").await?;
            starts.push(start.elapsed().as_secs_f64());
            mesh.wait_for_workers(1).await?;

            let prompt = "All work and no play makes a dull day. ".repeat(100);
            let options = GenerationOptions {
                max_tokens: Some(1),
                ..GenerationOptions::default()
            };
            let request = CompletionRequest::new(prompt, options);
            let answer = mesh.client()?.complete(&request).await?;
            let usage = answer.usage.flatten().context("usage")?;
            let kv = u64::from(usage.total_tokens) * kv_bytes_per_token as u64;
            resident.push((mesh.workers[index].resident_bytes()? - kv) as f64);
        }
        println!(
            "worker of {slots} slots, resident with a prompt of 1,000 tokens, less that prompt's KV cache: {:.1} MB = {:.3} x the model file (wanted: at most 1.5)",
            median(&resident) / 1e6,
            median(&resident) / file
        );
    }
    println!(
        "worker, from its start to ready: {:.2} s (wanted: at most 2)",
        median(&starts)
    );
    let direct = V5Client::new(mesh.workers[0].address("dcf")?)?;
    let through = V5Client::new(shim(&mesh)?)?;
    let tasks = args.tasks / 4;
    compare(
        "one token, real worker",
        [direct, through],
        tasks,
        one_token,
    )
    .await?;
    mesh.shutdown().await
}

fn one_token(number: u32) -> String {
    json!({"prompt": format!("{number} is the number of this task."), "max_tokens": 1, "temperature": 0}).to_string()
}

fn shim(mesh: &Mesh) -> Result<SocketAddr> {
    mesh.shim.as_ref().context("a shim")?.address("ingress")
}

/// Asks both ways in turn, directly and through shim and head, and prints the time that the longer way adds.
async fn compare(
    what: &str,
    ways: [V5Client; 2],
    tasks: u32,
    task: fn(u32) -> String,
) -> Result<()> {
    // The clients block.
    let [of_direct, of_through] =
        tokio::task::spawn_blocking(move || round_trips(&ways, tasks, task)).await??;
    let (direct, through) = (median(&of_direct), median(&of_through));
    println!(
        "{what}: p50 {direct:.0} us direct, {through:.0} us through shim and head, {:.2} x: {:.0} us added",
        through / direct,
        through - direct
    );
    Ok(())
}

/// Microseconds of each round trip, by the way.
fn round_trips(ways: &[V5Client; 2], tasks: u32, task: fn(u32) -> String) -> Result<[Vec<f64>; 2]> {
    let mut times = [Vec::new(), Vec::new()];
    // The first tenth warms up.
    let warm_up = tasks / 10;
    for number in 0..tasks + warm_up {
        for (way, (times, client)) in times.iter_mut().zip(ways).enumerate() {
            // Another text each time: a prompt that was computed before costs less.
            let task = task(2 * number + way as u32);
            let start = Instant::now();
            let answer = client.ask(number + 10, &task, LIMIT)?;
            let time = start.elapsed();
            ensure!(answer.kind == RESULT, "{:?}", answer.error());
            if number >= warm_up {
                times.push(time.as_secs_f64() * 1e6);
            }
        }
    }
    Ok(times)
}
