//! Cost of a change: two builds of the services take turns, and the ratios of their speeds are printed.
//!
//! Both meshes run all the time and only one has work, so that other load affects both alike. Without folders
//! a build is compared with itself: that is the noise of the method.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use mesh_api::ChatCompletionRequest;
use mesh_bench::round_trips::{SocketThread, echo_head, round_trips_per_second};
use mesh_bench::{Ratios, greedy, median};
use mesh_launcher::{Launcher, Mesh, Service, paths, until_signal};

/// Compares decode speed and the shim's throughput of two builds of the services
#[derive(Debug, Parser)]
struct Args {
    /// Folder with the services before the change; those of this build otherwise
    #[arg(long)]
    before: Option<PathBuf>,
    /// Folder with the services after it; those of this build otherwise
    #[arg(long)]
    after: Option<PathBuf>,
    /// Rounds; each measures both
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Tokens of an answer
    #[arg(long, default_value_t = 128)]
    tokens: u32,
    /// Seconds for which a shim is measured in a round
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Exit with an error if the median of a ratio is below this
    #[arg(long)]
    at_least: Option<f64>,
}

struct Build {
    mesh: Mesh,
    shim: Service,
}

#[tokio::main]
async fn main() -> Result<()> {
    until_signal(compare(Args::parse())).await
}

async fn compare(args: Args) -> Result<()> {
    let echo = SocketThread::start("head", echo_head)?;
    let own = paths::bin_dir()?;
    let before = args.before.as_ref().unwrap_or(&own);
    let after = args.after.as_ref().unwrap_or(&own);
    println!("before: {}\nafter:  {}", before.display(), after.display());
    let heads = echo.address.to_string();
    let mut builds = [
        Build::start(before, &heads).await.context("before")?,
        Build::start(after, &heads).await.context("after")?,
    ];
    let mut worst: f64 = f64::MAX;
    let table: [(&str, Measure); 4] = [
        ("decode, one stream, tokens/s", Measure::Decode(1)),
        ("decode, 8 streams, tokens/s", Measure::Decode(8)),
        ("chat of one token, requests/s", Measure::Short),
        ("shim, round trips/s", Measure::Shim),
    ];
    for (name, measure) in table {
        // The first ones fill caches.
        for build in &mut builds {
            build.measure(measure, &args).await?;
        }
        let (mut ratios, mut speeds) = (Ratios::default(), [Vec::new(), Vec::new()]);
        for round in 0..args.rounds.max(1) {
            let mut found = [0.0; 2];
            // The build that goes first alternates, in case the order matters.
            for turn in 0..2 {
                let which = (round + turn) % 2;
                found[which] = builds[which].measure(measure, &args).await?;
                speeds[which].push(found[which]);
            }
            ratios.0.push(found[1] / found[0]);
        }
        let (ratio, least, most) = (ratios.median(), ratios.least(), ratios.most());
        worst = worst.min(ratio);
        println!(
            "{name:30} before {:9.1}  after {:9.1}  after / before {ratio:.3} ({least:.3}-{most:.3})",
            median(&speeds[0]),
            median(&speeds[1])
        );
    }
    for build in builds {
        build.mesh.shutdown().await?;
    }
    if let Some(least) = args.at_least {
        ensure!(worst >= least, "a ratio is {worst:.3}, below {least}");
    }
    Ok(())
}

#[derive(Debug, Clone, Copy)]
enum Measure {
    /// So many streams at once.
    Decode(usize),
    /// Requests one after the other that compute next to nothing.
    Short,
    /// The shim before an echo.
    Shim,
}

impl Build {
    async fn start(folder: &Path, heads: &str) -> Result<Self> {
        let launcher = Launcher::from_folder(folder)?;
        let mesh = Mesh::builder()
            .launcher(launcher.clone())
            .workers(1)
            .start()
            .await?;
        let config = format!(
            "listen = \"127.0.0.1:0\"\nheads = [{heads:?}]\n[rate_limit]\nper_second = 0\n[http]\nlisten = \"127.0.0.1:0\"\n"
        );
        let mut shim = launcher
            .start("mesh-shim", "shim", &config.parse()?)
            .await?;
        shim.wait_for("/health").await?;
        Ok(Self { mesh, shim })
    }

    async fn measure(&mut self, measure: Measure, args: &Args) -> Result<f64> {
        match measure {
            Measure::Decode(streams) => self.decode(streams, args.tokens).await,
            Measure::Short => self.short().await,
            Measure::Shim => {
                let ingress = self.shim.address("ingress")?;
                let time = Duration::from_secs_f64(args.seconds.clamp(0.05, 60.0));
                let measured = move || round_trips_per_second(ingress, 256, 200, time);
                tokio::task::spawn_blocking(measured).await?
            }
        }
    }

    /// Tokens a second from the first to the last, over all streams.
    async fn decode(&self, streams: usize, tokens: u32) -> Result<f64> {
        let mut answers = Vec::new();
        for stream in 0..streams {
            let http = self.mesh.client()?;
            let question = format!("Tell me story number {stream}.");
            let request = ChatCompletionRequest::question(question, greedy(tokens));
            answers.push(tokio::spawn(async move {
                let mut stream = http.stream(request).await?;
                let mut times = Vec::new();
                while let Some(piece) = stream.next().await? {
                    if !piece.text.is_empty() {
                        times.push(Instant::now());
                    }
                }
                Ok::<_, anyhow::Error>(times)
            }));
        }
        let (mut first, mut last) = (Vec::new(), Vec::new());
        for answer in answers {
            let times = answer.await??;
            first.extend(times.first().copied());
            last.extend(times.last().copied());
        }
        let begun = first.into_iter().min().context("no token came")?;
        let ended = last.into_iter().max().context("no token came")?;
        let tokens = streams as f64 * f64::from(tokens.saturating_sub(1));
        Ok(tokens / (ended - begun).as_secs_f64())
    }

    /// Measures short requests per second.
    async fn short(&self) -> Result<f64> {
        const REQUESTS: u32 = 30;
        let http = self.mesh.client()?;
        let request = ChatCompletionRequest::question("Hi", greedy(1));
        let begun = Instant::now();
        for _ in 0..REQUESTS {
            http.complete(&request).await?;
        }
        Ok(f64::from(REQUESTS) / begun.elapsed().as_secs_f64())
    }
}
