//! Throughput of a shim in datagrams, next to a bare relay that only receives and sends in the same batches.
//!
//! Both are put between the same sender and the same head: tasks go in, each comes back as a Result, so every datagram
//! passes twice. A window of datagrams under way keeps all of them busy without loss. Shim and relay take turns; the
//! medians and their ratio are printed, and the time that the shim adds to a datagram that comes alone.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser;
use mesh_bench::round_trips::{
    LOOPBACK, SocketThread, echo_head, readable, round_trip_times, round_trips_per_second,
};
use mesh_bench::{Ratios, median};
use mesh_shim::batch::{self, RecvBatch};
use mesh_shim::config::RateLimit;
use mesh_shim::{Config, Shim};

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
    let head = SocketThread::start("head", echo_head)?;
    let to_head = head.address;
    let relay = SocketThread::start("relay", move |socket, stop| {
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
    let measure = |target| round_trips_per_second(target, args.window, args.payload, time);
    let (mut of_relay, mut of_shim) = (Vec::new(), Vec::new());
    for round in 0..args.rounds.clamp(1, 1_000) {
        // The first in turn alternates, in case the order matters.
        for turn in 0..2 {
            match (round + turn) % 2 {
                0 => of_relay.push(measure(relay.address)?),
                _ => of_shim.push(measure(shim.addr())?),
            }
        }
    }
    let times = latency(&args, [to_head, relay.address, shim.addr()])?;
    let (of_relay, of_shim) = (median(&of_relay), median(&of_shim));
    let ratio = of_shim / of_relay;
    println!("relay  {of_relay:9.0} round trips/s");
    println!("shim   {of_shim:9.0} round trips/s  {ratio:.2} x relay");
    let [direct, by_relay, by_shim] = times.each_ref().map(|times| median(times));
    println!(
        "alone, p50: direct {direct:.1} µs, relay {by_relay:.1} µs, shim {by_shim:.1} µs a round trip"
    );
    let added = times[0].iter().zip(&times[2]);
    let added = Ratios(added.map(|(direct, shim)| (shim - direct) / 2.0).collect());
    let (added, least, most) = (added.median(), added.least(), added.most());
    println!(
        "the shim adds {added:.1} µs to a datagram's way ({least:.1} to {most:.1}; wanted: at most 50)"
    );
    shim.stop();
    if let Some(least) = args.at_least {
        anyhow::ensure!(ratio >= least, "the ratio is below {least}");
    }
    Ok(())
}

/// Median times of single tasks to each of these targets, in microseconds, of each round.
fn latency(args: &Args, targets: [SocketAddr; 3]) -> anyhow::Result<[Vec<f64>; 3]> {
    const TASKS: u32 = 2_000;
    let mut medians: [Vec<f64>; 3] = Default::default();
    for round in 0..args.rounds.clamp(1, 1_000) {
        for turn in 0..3 {
            let which = (round + turn) % 3;
            let times = round_trip_times(targets[which], args.payload, TASKS)?;
            let times = times.iter().map(|time| time.as_secs_f64() * 1e6);
            medians[which].push(median(&times.collect::<Vec<_>>()));
        }
    }
    Ok(medians)
}

/// Passes datagrams of one client to `head` and back, and looks at none.
fn bare_relay(ingress: UdpSocket, head: SocketAddr, stop: &AtomicBool) {
    let upstream = UdpSocket::bind(LOOPBACK).expect("a free port");
    upstream.connect(head).expect("loopback is reachable");
    let mut received = RecvBatch::new();
    let mut client = None;
    while !stop.load(Ordering::Relaxed) {
        let [from_client, from_head] = readable([&ingress, &upstream], 50);
        if from_client {
            let count = received.recv(&ingress, None).unwrap_or(0);
            client = (count > 0).then(|| received.get(count - 1).1).or(client);
            let tasks = (0..count).map(|index| (received.get(index).0, None));
            batch::send(&upstream, tasks, None);
        }
        if from_head {
            let count = received.recv(&upstream, None).unwrap_or(0);
            let results = (0..count).map(|index| (received.get(index).0, client));
            batch::send(&ingress, results, None);
        }
    }
}
