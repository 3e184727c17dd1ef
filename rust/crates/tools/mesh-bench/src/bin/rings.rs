//! Cost of running one model over three processes, and cost of replication: real services on loopback.
//!
//! Three meshes stand side by side and take turns, request by request, while the others idle: one worker with
//! the whole model, three workers with a third of it each, and the same with three standbys. Every process
//! computes with one thread, and there is one request at a time, of which one stage computes at any moment:
//! each arrangement has exactly one computing thread, so the share of compute is 1 and the ratio is the cost
//! of the hops. With `--rpc`, llama.cpp runs the same file over three of its rpc-servers, one thread each, in
//! the same rounds.
//!
//! `--trust` measures something else with the ring of three: what gossip, audit trail and evidence cost, with
//! the same ring without them in the same rounds, and what forged heartbeats cost (`--flood`).

use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use mesh_api::{CompletionRequest, RingStage, TextInput};
use mesh_bench::{Ratios, greedy, median, program};
use mesh_client::http::HttpClient;
use mesh_launcher::{Mesh, paths, until_signal};

/// Measures one model over three processes against one, with and without standbys, and against llama.cpp's RPC
#[derive(Parser)]
struct Args {
    /// The model, a GGUF file; SmolLM2-135M if none is named
    model: Option<PathBuf>,
    /// Rounds; each takes one request of every arrangement
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Tokens of an answer
    #[arg(long, default_value_t = 128)]
    tokens: u32,
    /// Tokens of the prompt whose prefill is timed
    #[arg(long, default_value_t = 512)]
    prompt: u32,
    /// Compare with llama.cpp over three rpc-servers, too
    #[arg(long)]
    rpc: bool,
    /// Compare the ring with one without gossip, audit trail and evidence instead
    #[arg(long, conflicts_with_all = ["rpc", "processor"])]
    trust: bool,
    /// With --trust: forged and random datagrams a second at the head's port for workers; 0 sends none
    #[arg(long, default_value_t = 10_000, requires = "trust")]
    flood: u32,
    /// Keep all workers on this processor (Linux; needs `taskset`)
    #[arg(long, value_name = "NUMBER")]
    processor: Option<u32>,
}

const LIMIT: Duration = Duration::from_secs(120);

/// Speeds in tokens per second.
#[derive(Clone, Copy)]
struct Speed {
    decode: f64,
    prefill: f64,
}

#[tokio::main]
async fn main() -> Result<()> {
    until_signal(compare(Args::parse())).await
}

async fn compare(args: Args) -> Result<()> {
    let model = match &args.model {
        // Others are started in other folders.
        Some(model) => std::fs::canonicalize(model).with_context(|| model.display().to_string())?,
        None => paths::smollm2()?,
    };
    if args.trust {
        return trust(&model, &args).await;
    }
    let whole = start(&model, None, true).await?;
    let ring = start(&model, Some(false), true).await?;
    let mirrored = start(&model, Some(true), true).await?;
    if let Some(processor) = args.processor {
        for mesh in [&whole, &ring, &mirrored] {
            pin(mesh, processor)?;
        }
    }
    let rpc = args.rpc.then(RpcServers::start).transpose()?;

    let mut speeds: [Vec<Speed>; 3] = [const { Vec::new() }; 3];
    let mut anchor = Vec::new();
    for round in 0..=args.rounds {
        for (speeds, mesh) in speeds.iter_mut().zip([&whole, &ring, &mirrored]) {
            let speed = measure(&mesh.client()?, &args, round).await?;
            // The first round warms up.
            if round > 0 {
                speeds.push(speed);
            }
        }
        if let Some(rpc) = &rpc
            && round > 0
        {
            anchor.push(rpc.measure(&model, &args).await?);
        }
    }
    let [whole_speeds, ring_speeds, mirrored_speeds] = &speeds;
    show("one process, whole model:   ", whole_speeds);
    show("three processes:            ", ring_speeds);
    show("three and three standbys:   ", mirrored_speeds);
    let decode = |s: &Speed| s.decode;
    let prefill = |s: &Speed| s.prefill;
    let what = "split: three processes / one,";
    ratio(
        &format!("{what} decode"),
        "0.95",
        ring_speeds,
        whole_speeds,
        decode,
    );
    ratio(
        &format!("{what} prefill"),
        "-",
        ring_speeds,
        whole_speeds,
        prefill,
    );
    let what = "mirroring: with standbys / without, decode";
    ratio(what, "0.95", mirrored_speeds, ring_speeds, decode);
    if rpc.is_some() {
        show("llama.cpp, three rpc-servers:", &anchor);
        let what = "three processes / llama.cpp RPC,";
        ratio(&format!("{what} decode"), "2", ring_speeds, &anchor, decode);
        ratio(
            &format!("{what} prefill"),
            "2",
            ring_speeds,
            &anchor,
            prefill,
        );
    }
    for mesh in [whole, ring, mirrored] {
        mesh.shutdown().await?;
    }
    Ok(())
}

/// The ring with and without gossip, audit trail and evidence, and the former under a flood.
async fn trust(model: &Path, args: &Args) -> Result<()> {
    let without = start(model, Some(false), false).await?;
    let with = start(model, Some(false), true).await?;
    let target = with.head.address("dcf.workers")?;
    let mut speeds: [Vec<Speed>; 3] = [const { Vec::new() }; 3];
    let mut sent = 0;
    for round in 0..=args.rounds {
        // The order changes, in case it matters.
        for turn in 0..3 {
            let which = (round + turn) % 3;
            let mesh = if which == 0 { &without } else { &with };
            let flood = (which == 2 && args.flood > 0).then(|| Flood::start(target, args.flood));
            let flood = flood.transpose()?;
            let speed = measure(&mesh.client()?, args, round).await?;
            sent += flood.map_or(0, |flood| flood.stop());
            // The first round warms up.
            if round > 0 {
                speeds[which].push(speed);
            }
        }
    }
    let [none, all, flooded] = &speeds;
    show("without gossip, audit, evidence:", none);
    show("with them:                      ", all);
    let (decode, prefill) = (|s: &Speed| s.decode, |s: &Speed| s.prefill);
    ratio("trust: with / without, decode", "0.97", all, none, decode);
    ratio("trust: with / without, prefill", "-", all, none, prefill);
    if args.flood > 0 {
        let rate = args.flood;
        println!("{sent} forged and random datagrams at {rate} a second");
        let what = "flood: under it / without, decode";
        ratio(what, "0.95", flooded, all, decode);
    }
    with.shutdown().await?;
    without.shutdown().await
}

/// A thread that sends datagrams which look like sealed heartbeats, or like nothing.
struct Flood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<()>,
}

impl Flood {
    fn start(target: SocketAddr, per_second: u32) -> Result<Self> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.connect(target)?;
        let (stop, sent) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (stopped, count) = (stop.clone(), sent.clone());
        let thread = std::thread::spawn(move || {
            let (began, mut state) = (Instant::now(), 1_u64);
            while !stopped.load(Ordering::Relaxed) {
                let due = (began.elapsed().as_secs_f64() * f64::from(per_second)) as u64;
                while count.load(Ordering::Relaxed) < due {
                    let mut bytes = [0_u8; 200];
                    for part in bytes.chunks_mut(8) {
                        state = state.wrapping_mul(6_364_136_223_846_793_005) + 1;
                        part.copy_from_slice(&state.to_be_bytes()[..part.len()]);
                    }
                    if count.load(Ordering::Relaxed).is_multiple_of(2) {
                        let payload = bytes.len() - dcf::HEADER_LEN;
                        bytes[0] = dcf::MsgType::SEALED_HEARTBEAT.0;
                        bytes[13..17].copy_from_slice(&(payload as u32).to_be_bytes());
                    }
                    // A full queue drops it.
                    let _ = socket.send(&bytes);
                    count.fetch_add(1, Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Ok(Self { stop, sent, thread })
    }

    /// Ends it, and returns the number of datagrams.
    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        // It does nothing that panics.
        let _ = self.thread.join();
        self.sent.load(Ordering::Relaxed)
    }
}

/// Prints the medians of an arrangement's speeds.
fn show(what: &str, speeds: &[Speed]) {
    let of = |of: fn(&Speed) -> f64| median(&speeds.iter().map(of).collect::<Vec<_>>());
    let (decode, prefill) = (of(|s| s.decode), of(|s| s.prefill));
    println!("{what} decode {decode:.1} tok/s, prefill {prefill:.0} tok/s");
}

/// Prints the median of the rounds' ratios and their range.
fn ratio(what: &str, wanted: &str, ours: &[Speed], anchor: &[Speed], of: fn(&Speed) -> f64) {
    let rounds = ours.iter().zip(anchor);
    let ratios = Ratios(rounds.map(|(ours, anchor)| of(ours) / of(anchor)).collect());
    let (ratio, least, most) = (ratios.median(), ratios.least(), ratios.most());
    println!("{what}: {ratio:.3} ({least:.3} to {most:.3}; wanted: at least {wanted})");
}

/// A mesh with the whole model on one worker, or with a third on each of three, perhaps with standbys.
async fn start(model: &Path, ring: Option<bool>, trust: bool) -> Result<Mesh> {
    let file = model.display().to_string();
    let Some(standbys) = ring else {
        let mut mesh = Mesh::builder().start().await?;
        let toml = format!("models = [{file:?}]\nthreads = 1");
        mesh.start_worker(&toml).await?;
        return Ok(mesh);
    };
    let mut mesh = Mesh::builder()
        .head_config(&format!(
            "[ring]\nstages = 3\nobjective = \"throughput\"\nstandbys = {standbys}\n\
             [gossip]\nenabled = {trust}\n[audit]\nenabled = {trust}"
        ))
        .start()
        .await?;
    for _ in 0..if standbys { 6 } else { 3 } {
        let toml = format!(
            "models = []\nthreads = 1\nevidence = {trust}\n[gossip]\nenabled = {trust}\n\
             [ring]\nmodels = [{file:?}]\nlisten = \"127.0.0.1:0\"\nformat = \"file\""
        );
        mesh.start_worker(&toml).await?;
    }
    let started = Instant::now();
    loop {
        let registry = mesh.registry().await?;
        let covered = |stage: &RingStage| {
            let standby = stage.standby.as_ref();
            standby.is_some_and(|standby| standby.phase == "ready")
        };
        if let Some(ring) = registry.rings.first()
            && (ring.state == "serving" && ring.stages.len() == 3)
            && (!standbys || ring.stages.iter().all(covered))
        {
            for stage in &ring.stages {
                println!("{:?} on {}", stage.layers, stage.member.worker);
            }
            return Ok(mesh);
        }
        ensure!(started.elapsed() < LIMIT, "no ring: {registry:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Keeps the threads of a mesh's workers, and those that they start, on one processor.
fn pin(mesh: &Mesh, processor: u32) -> Result<()> {
    for worker in &mesh.workers {
        let status = Command::new("taskset")
            .args(["--all-tasks", "--cpu-list", "--pid"])
            .args([processor.to_string(), worker.pid().to_string()])
            .stdout(Stdio::null())
            .status()
            .context("starting taskset")?;
        ensure!(status.success(), "taskset: {status}");
    }
    Ok(())
}

/// One request: its first token after a prompt that is new, and then token by token.
async fn measure(client: &HttpClient, args: &Args, round: usize) -> Result<Speed> {
    // Another prompt each time: one that was computed before costs less.
    let prompt: Vec<u32> = (0..args.prompt)
        .map(|i| (i * 7_919 + round as u32 * 104_729) % 40_000 + 100)
        .collect();
    let begin = TextInput::Tokens(prompt[..8].to_vec());
    let request = CompletionRequest::new(TextInput::Tokens(prompt), greedy(1));
    let started = Instant::now();
    client.complete(&request).await?;
    let prefill = f64::from(args.prompt) / started.elapsed().as_secs_f64();

    let request = CompletionRequest::new(begin, greedy(args.tokens));
    let mut stream = client.stream(request).await?;
    let (mut first, mut last, mut pieces) = (None, Instant::now(), 0u32);
    while let Some(piece) = stream.next().await? {
        if !piece.text.is_empty() {
            last = Instant::now();
            first.get_or_insert(last);
            pieces += 1;
        }
    }
    let first = first.context("no token")?;
    ensure!(pieces > args.tokens / 2, "only {pieces} pieces");
    // Text may come a token late, the number of tokens between first and last does not change by that.
    let decode = f64::from(args.tokens - 1) / (last - first).as_secs_f64();
    Ok(Speed { decode, prefill })
}

/// llama.cpp's servers of its RPC backend.
struct RpcServers {
    servers: Vec<Child>,
    endpoints: String,
}

impl RpcServers {
    fn start() -> Result<Self> {
        let server = program("llama_rpc_server")?;
        let mut endpoints = Vec::new();
        let mut servers = Vec::new();
        for _ in 0..3 {
            let free = std::net::TcpListener::bind("127.0.0.1:0")?;
            let endpoint = free.local_addr()?.to_string();
            drop(free);
            let child = Command::new(&server)
                .args([&endpoint, "1"])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .context("starting llama.cpp's rpc-server")?;
            servers.push(child);
            endpoints.push(endpoint);
        }
        let servers = RpcServers {
            servers,
            endpoints: endpoints.join(","),
        };
        let started = Instant::now();
        for endpoint in &endpoints {
            while std::net::TcpStream::connect(endpoint).is_err() {
                ensure!(
                    started.elapsed() < LIMIT,
                    "the rpc-server at {endpoint} does not listen"
                );
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        Ok(servers)
    }

    async fn measure(&self, model: &Path, args: &Args) -> Result<Speed> {
        let output = tokio::process::Command::new(program("llama-bench")?)
            .kill_on_drop(true)
            .args(["-m", &model.display().to_string()])
            .args(["--rpc", &self.endpoints, "-ngl", "99"])
            .args(["-t", "1", "-r", "1", "-o", "jsonl"])
            .args(["-p", &args.prompt.to_string()])
            .args(["-n", &args.tokens.to_string()])
            .output()
            .await
            .context("running llama-bench")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let mut speed = Speed {
            decode: 0.0,
            prefill: 0.0,
        };
        for line in text.lines().filter(|line| line.starts_with('{')) {
            let result: serde_json::Value = serde_json::from_str(line)?;
            let per_second = result["avg_ts"].as_f64().context("avg_ts")?;
            match result["n_gen"].as_u64() {
                Some(0) => speed.prefill = per_second,
                _ => speed.decode = per_second,
            }
        }
        let found = speed.decode != 0.0 && speed.prefill != 0.0;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(found, "llama-bench says: {text}{errors}");
        Ok(speed)
    }
}

impl Drop for RpcServers {
    fn drop(&mut self) {
        for server in &mut self.servers {
            // It may have ended by itself.
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}
