//! `hydramesh demo`: a mesh on this machine whose workers hold one model together, two questions, and a worker that dies in
//! mid-answer.

mod answer;
mod image;
mod ring;

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use mesh_api::{ChatCompletionRequest, GenerationOptions};
use mesh_client::dcf_udp::DcfClient;
use mesh_launcher::{Launcher, Mesh, MeshBuilder, Service, paths};
use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::DemoArgs;
use crate::ask::datagram_stats;
use crate::failure::{Exit, Failure};
use crate::output::{Terminal, duration};
use answer::AnswerPrinter;

const FIRST_QUESTION: &str = "Why is the sky blue? Answer in two sentences.";
const SECOND_QUESTION: &str = "Tell me a short story about a lighthouse keeper and a whale.";
const SECOND_TOKENS: i64 = 120;
/// Pieces of the second answer that come before a worker is killed.
const PIECES_BEFORE_KILL: usize = 30;
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// Longest time for a worker to measure the machine and join, on a busy one.
const JOIN_LIMIT: Duration = Duration::from_secs(90);
const END_LIMIT: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(50);
/// Number of workers that hold the model; each gets layers for about equally long steps.
const STAGES: usize = 3;
/// A member and a standby for each stage.
const WORKERS: usize = 2 * STAGES;

pub(crate) async fn run(args: DemoArgs, terminal: Terminal) -> Result<(), Failure> {
    if args.image {
        return image::run(args, terminal).await;
    }
    let in_cache = || args.cache.join(paths::SMOLLM2);
    let model = there(args.model.clone().unwrap_or_else(in_cache))?;
    let runtime = there(args.cache.join(paths::ORT_LIBRARY))?;
    let demo = Demo { terminal };
    let mut stop = Stop::new()?;

    demo.heading(&format!(
        "Starting a head, a shim and {WORKERS} workers on loopback"
    ));
    demo.note("Each worker measures this machine and offers to hold layers of one model. None holds all of it.");
    let started = Instant::now();
    let mut mesh = tokio::select! {
        mesh = demo.start(&model, &runtime, args.keep) => mesh?,
        () = stop.requested() => return Err(Failure::interrupted()),
    };
    demo.note(&format!("joined after {}", duration(started.elapsed())));

    let shown = tokio::select! {
        shown = demo.show(&mut mesh) => shown,
        () = stop.requested() => Err(Failure::interrupted()),
    };
    if shown.is_ok() && args.keep {
        demo.keep(&mut mesh, &mut stop).await?;
    }

    demo.heading("Shutting down");
    demo.shut_down(mesh).await?;
    shown
}

struct Demo {
    terminal: Terminal,
}

impl Demo {
    async fn show(&self, mesh: &mut Mesh) -> Result<(), Failure> {
        self.form_a_ring(mesh).await?;
        self.over_datagrams(mesh).await?;
        self.over_http_with_a_death(mesh).await
    }

    async fn start(&self, model: &Path, runtime: &Path, keep: bool) -> Result<Mesh, Failure> {
        let mut mesh = builder(model, runtime, keep)?.start().await?;
        let shim = mesh.shim.as_ref().expect("the demo has a shim");
        let http = mesh.head.address("http")?;
        self.part(&mesh.head, &format!("OpenAI API at http://{http}/v1"));
        self.part(shim, &format!("DCF/UDP at {}", ingress(&mesh)?));
        // One by one: they would measure how much they disturb each other, and the layers would be spread by that.
        for _ in 0..WORKERS {
            let worker = mesh.start_worker("").await?;
            wait_until_joined(&mut mesh, worker).await?;
            self.part(&mesh.workers[worker], "joined with a one-time token");
        }
        Ok(mesh)
    }

    async fn form_a_ring(&self, mesh: &mut Mesh) -> Result<(), Failure> {
        self.heading("The head makes a ring of them: each stage on a worker, and loaded once more on one that stands by");
        let started = Instant::now();
        let registry = ring::wait_for_standbys(mesh).await?;
        self.ring(&registry);
        let took = duration(started.elapsed());
        self.note(&format!("formed and loaded in {took}"));
        Ok(())
    }

    async fn over_datagrams(&self, mesh: &Mesh) -> Result<(), Failure> {
        let shim = ingress(mesh)?;
        self.heading("A question over DCF/UDP, through the shim");
        self.question(FIRST_QUESTION);
        let mut client = DcfClient::connect(&shim.to_string()).await?;
        let options = GenerationOptions {
            max_tokens: Some(80),
            temperature: Some(0.0),
            stream: Some(true),
            ..GenerationOptions::default()
        };
        let task = ChatCompletionRequest::question(FIRST_QUESTION, options);
        let mut printer = AnswerPrinter::new(self.terminal);
        let answer = client
            .ask(&task, ANSWER_LIMIT, &mut |text| printer.push(text))
            .await?;
        printer.finish();
        expect(!answer.text.trim().is_empty(), "the answer is empty")?;
        self.note(&datagram_stats(&answer).line());
        Ok(())
    }

    async fn over_http_with_a_death(&self, mesh: &mut Mesh) -> Result<(), Failure> {
        self.heading(
            "A question over HTTP; a worker that holds a part of the model is killed meanwhile",
        );
        self.question(SECOND_QUESTION);
        let client = mesh.client()?;
        let model = client.models().await?.into_iter().next();
        let none = || Failure::new(Exit::NoWorker, "no ring serves a model");
        let options = GenerationOptions {
            model: Some(model.ok_or_else(none)?),
            max_tokens: Some(SECOND_TOKENS),
            temperature: Some(0.0),
            ..GenerationOptions::default()
        };
        let request = ChatCompletionRequest::question(SECOND_QUESTION, options);
        let mut printer = AnswerPrinter::new(self.terminal);
        let victim = ring::member(mesh).await?;
        let victim = &mut mesh.workers[victim];
        let mut pieces = 0;
        let mut died = None;
        let disturbed = answer::stream(&client, &request, async |text| {
            printer.push(text);
            pieces += 1;
            if pieces == PIECES_BEFORE_KILL {
                // As a power cut would. Nothing is waited for: that would pass for a pause, or hide one.
                victim.signal(Signal::SIGKILL)?;
                died = Some(Instant::now());
                printer.remark(&format!("[{} is killed here]", victim.name()));
            }
            Ok(())
        })
        .await?;
        printer.finish();
        let died = died
            .ok_or_else(|| Failure::failed("the answer ended before a worker could be killed"))?;
        self.note(&disturbed.stats.line());
        victim.wait_for_end(END_LIMIT).await?;
        let victim = victim.name().to_owned();

        let registry = ring::wait_for_recovery(mesh).await?;
        self.ring(&registry);
        self.note(&ring::recovery(&registry));

        // The ring as it is now is asked the same without a disturbance: the client must not have seen a difference.
        let undisturbed = answer::stream(&client, &request, async |_| Ok(())).await?;
        expect(
            disturbed.text == undisturbed.text,
            &format!(
                "the answer during which {victim} was killed differs from an undisturbed one:\n{:?}\n{:?}",
                disturbed.text, undisturbed.text
            ),
        )?;
        // As the client saw it: its longest wait for text.
        let pause = disturbed.longest_wait(Some(died)).as_millis();
        let usual = undisturbed.longest_wait(None).as_millis();
        self.good(&format!(
            "{victim} died in mid-sentence with its layers. The answer paused for {pause} ms (its longest wait without a \
             death: {usual} ms); the text is the same as without the death"
        ));
        Ok(())
    }

    async fn keep(&self, mesh: &mut Mesh, stop: &mut Stop) -> Result<(), Failure> {
        // A new worker replaces the killed one: its stage gets a standby again.
        mesh.start_worker("").await?;
        let http = mesh.head.address("http")?;
        let shim = ingress(mesh)?;
        let program = std::env::current_exe().unwrap_or_else(|_| "hydramesh".into());
        let key = mesh.head.state_dir().join("admin.key");
        let (program, key) = (program.display(), key.display());
        self.heading("The mesh stays up. Talk to it:");
        println!(
            "  {program} chat --url http://{http}\n  \
             {program} ask --to {shim} \"Name three rivers.\"\n  \
             {program} status --url http://{http}     # the ring, its stages and standbys\n  \
             {program} drain worker-1 --wait --url http://{http} --admin-key-file {key}     # its layers move to another\n  \
             curl http://{http}/v1/chat/completions -H 'content-type: application/json' \\\n    \
             -d '{{\"model\": \"SmolLM2-135M-Instruct.Q4_1\", \"messages\": [{{\"role\": \"user\", \"content\": \"Hello!\"}}]}}'\n  \
             OPENAI_BASE_URL=http://{http}/v1 OPENAI_API_KEY=none     # for any OpenAI client\n  \
             {program} token create --url http://{http} --admin-key-file {key}     # one more worker"
        );
        self.note("Ctrl-C ends it");
        stop.requested().await;
        println!();
        Ok(())
    }

    async fn shut_down(&self, mut mesh: Mesh) -> Result<(), Failure> {
        if let Some(shim) = &mut mesh.shim {
            end(shim).await?;
            println!("  {:<9} exit code 0", shim.name());
        }
        // Before the workers: while it lives, a worker that ends looks for another to take its layers over.
        end(&mut mesh.head).await?;
        println!("  {:<9} exit code 0", mesh.head.name());
        let mut running: Vec<&mut Service> = mesh.workers.iter_mut().collect();
        running.retain_mut(|worker| worker.is_running());
        for worker in &running {
            worker.signal(Signal::SIGTERM)?;
        }
        let ended = running.len();
        for worker in running {
            expect_success(worker.wait_for_end(END_LIMIT).await?, worker)?;
        }
        println!("  {:<9} exit code 0, all {ended}", "workers");
        Ok(())
    }

    fn ring(&self, registry: &mesh_api::Mesh) {
        for line in ring::stages(registry) {
            println!("  {line}");
        }
    }

    fn part(&self, service: &Service, what: &str) {
        println!("  {:<9} pid {:<8} {what}", service.name(), service.pid());
    }

    fn heading(&self, text: &str) {
        println!("\n{}", self.terminal.bold(text));
    }

    fn question(&self, text: &str) {
        println!("  {}", self.terminal.cyan(text));
    }

    fn note(&self, text: &str) {
        println!("  {}", self.terminal.dim(text));
    }

    fn good(&self, text: &str) {
        println!("  {}", self.terminal.green(text));
    }
}

/// The shim's address for clients.
fn ingress(mesh: &Mesh) -> Result<SocketAddr, Failure> {
    let shim = mesh.shim.as_ref().expect("the demo has a shim");
    Ok(shim.address("ingress")?)
}

fn builder(model: &Path, runtime: &Path, keep: bool) -> Result<MeshBuilder, Failure> {
    let models = toml::Value::from(vec![model.display().to_string()]);
    let mut builder = Mesh::builder()
        .launcher(Launcher::beside_this_program(runtime)?)
        // Six processes share this machine: one thread each. All keep the weights as in the file, so that a
        // successor computes the same bits; by default each takes the format that it measures to be fastest.
        .worker_config(&format!(
            "models = []\nthreads = 1\n[ring]\nmodels = {models}\nlisten = \"127.0.0.1:0\"\nformat = \"file\"\n"
        ))
        // The model would fit on one worker, so the number of stages is given; and they disturb each other too much for
        // a plan that promises more speed to mean anything.
        .head_config(&format!(
            "[ring]\nstages = {STAGES}\nobjective = \"throughput\"\ngather = \"4s\"\nmargin = 0.9\n"
        ))
        .shim();
    // A mesh that stays is easier to talk to at the ports that every command assumes.
    if keep && TcpListener::bind("127.0.0.1:8080").is_ok() {
        builder = builder.head_config("[http]\nlisten = \"127.0.0.1:8080\"\n");
    }
    if keep && UdpSocket::bind("127.0.0.1:9999").is_ok() {
        builder = builder.shim_config("listen = \"127.0.0.1:9999\"\n");
    }
    Ok(builder)
}

async fn wait_until_joined(mesh: &mut Mesh, worker: usize) -> Result<(), Failure> {
    let until = Instant::now() + JOIN_LIMIT;
    loop {
        let usable = mesh.usable_workers().await?;
        let worker = &mut mesh.workers[worker];
        if usable.iter().any(|usable| usable.name == worker.name()) {
            return Ok(());
        }
        let has_ended = !worker.is_running();
        if has_ended || Instant::now() >= until {
            let how = match has_ended {
                true => "has ended",
                false => "does not join",
            };
            return Err(worker.error(how).into());
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn end(service: &mut Service) -> Result<(), Failure> {
    let status = service.terminate(END_LIMIT).await?;
    expect_success(status, service)
}

fn expect_success(status: ExitStatus, service: &Service) -> Result<(), Failure> {
    let (name, log) = (service.name(), service.log_end());
    let ended = format!("{name} ended with {status}:\n{log}");
    expect(status.success(), &ended)
}

/// The signals that stop the demo: Ctrl-C, SIGTERM, a closed terminal, Ctrl-\\.
struct Stop([tokio::signal::unix::Signal; 4]);

impl Stop {
    fn new() -> Result<Self, Failure> {
        let handler = |kind| {
            signal(kind).map_err(|error| Failure::failed(format!("a signal handler: {error}")))
        };
        Ok(Self([
            handler(SignalKind::interrupt())?,
            handler(SignalKind::terminate())?,
            handler(SignalKind::hangup())?,
            handler(SignalKind::quit())?,
        ]))
    }

    async fn requested(&mut self) {
        let [interrupt, terminate, hangup, quit] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
            _ = quit.recv() => {}
        }
    }
}

fn expect(holds: bool, otherwise: &str) -> Result<(), Failure> {
    match holds {
        true => Ok(()),
        false => Err(Failure::failed(otherwise)),
    }
}

/// The absolute path of a file that must be there.
fn there(path: PathBuf) -> Result<PathBuf, Failure> {
    if !path.is_file() {
        let missing = Failure::failed(format!("{} is not there", path.display()));
        return Err(missing
            .hint("`make fetch` brings the model and ONNX Runtime; --cache names their folder."));
    }
    Ok(std::path::absolute(&path).unwrap_or(path))
}
