//! `hydramesh demo`: a mesh on this machine, two questions, and a worker that dies in mid-answer.

mod answer;

use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_client::dcf_udp::DcfClient;
use mesh_testkit::{Launcher, Mesh, Service};
use nix::sys::signal::Signal;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::DemoArgs;
use crate::ask::datagram_stats;
use crate::failure::{Exit, Failure};
use crate::output::{Terminal, duration};
use answer::AnswerPrinter;

const FIRST_QUESTION: &str = "Why is the sky blue? Answer in two sentences.";
const SECOND_QUESTION: &str = "Tell me a short story about a lighthouse keeper and a whale.";
const SECOND_TOKENS: u32 = 120;
/// Pieces of the second answer that come before its worker is killed.
const PIECES_BEFORE_KILL: usize = 30;
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

pub(crate) async fn run(args: DemoArgs, terminal: Terminal) -> Result<(), Failure> {
    let model = args
        .model
        .clone()
        .unwrap_or_else(|| args.cache.join("models/SmolLM2-135M-Instruct.Q4_1.gguf"));
    let runtime = args.cache.join("onnxruntime/libonnxruntime.so.1.24.4");
    for path in [&model, &runtime] {
        if !path.is_file() {
            return Err(
                Failure::failed(format!("{} is not there", path.display())).hint(
                    "`make fetch` brings the model and ONNX Runtime; --cache names their folder.",
                ),
            );
        }
    }
    let (model, runtime) = (absolute(&model), absolute(&runtime));
    let demo = Demo { terminal };
    let mut stop = Stop::new()?;

    demo.heading("Starting a head, a shim and two workers on loopback");
    let started = std::time::Instant::now();
    let mut mesh = tokio::select! {
        mesh = start(&model, &runtime, args.keep) => mesh?,
        () = stop.requested() => return Err(interrupted()),
    };
    demo.parts(&mesh)?;
    demo.note(&format!("ready after {}", duration(started.elapsed())));

    let shown = tokio::select! {
        shown = demo.show(&mut mesh) => shown,
        () = stop.requested() => Err(interrupted()),
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
        self.over_datagrams(mesh).await?;
        self.over_http_with_a_death(mesh).await
    }

    async fn over_datagrams(&self, mesh: &Mesh) -> Result<(), Failure> {
        let shim = mesh
            .shim
            .as_ref()
            .expect("the demo has a shim")
            .address(SHIM_INGRESS)?;
        self.heading("A question over DCF/UDP, through the shim");
        self.question(FIRST_QUESTION);
        let mut client = DcfClient::connect(&shim.to_string()).await?;
        let task = json!({
            "messages": [{"role": "user", "content": FIRST_QUESTION}],
            "max_tokens": 80,
            "temperature": 0,
            "stream": true,
        });
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
        self.heading("A question over HTTP; its worker is killed while it answers");
        self.question(SECOND_QUESTION);
        let client = mesh.client()?;
        let model = client.models().await?.into_iter().next();
        let body = json!({
            "model": model.ok_or_else(|| Failure::new(Exit::NoWorker, "no worker serves a model"))?,
            "messages": [{"role": "user", "content": SECOND_QUESTION}],
            "max_tokens": SECOND_TOKENS,
            "temperature": 0,
        });
        let mut printer = AnswerPrinter::new(self.terminal);
        let mut pieces = 0;
        let mut victim = None;
        let disturbed = answer::stream(&client, &body, async |text| {
            printer.push(text);
            pieces += 1;
            if pieces == PIECES_BEFORE_KILL {
                let name = kill_the_one_that_answers(mesh).await?;
                printer.remark(&format!("[{name} is killed here]"));
                victim = Some(name);
            }
            Ok(())
        })
        .await?;
        printer.finish();
        let victim = victim
            .ok_or_else(|| Failure::failed("the answer ended before its worker could be killed"))?;
        self.note(&disturbed.stats.line());

        // The survivor is asked the same without a disturbance: the client must not have seen a difference.
        let undisturbed = answer::stream(&client, &body, async |_| Ok(())).await?;
        expect(
            disturbed.text == undisturbed.text,
            &format!(
                "the answer whose worker was killed differs from an undisturbed one:\n{:?}\n{:?}",
                disturbed.text, undisturbed.text
            ),
        )?;
        self.good(&format!(
            "{victim} died in mid-answer; another worker went on, and the text is the same as without the death"
        ));
        Ok(())
    }

    async fn keep(&self, mesh: &mut Mesh, stop: &mut Stop) -> Result<(), Failure> {
        // The killed one shall not be missing from here on.
        mesh.start_worker("").await?;
        let http = mesh.head.address("http")?;
        let shim = mesh
            .shim
            .as_ref()
            .expect("the demo has a shim")
            .address(SHIM_INGRESS)?;
        let program = std::env::current_exe()
            .ok()
            .map_or_else(|| "hydramesh".to_owned(), |path| path.display().to_string());
        let key = mesh.head.state_dir().join("admin.key");
        self.heading("The mesh stays up. Talk to it:");
        println!(
            "  {program} chat --url http://{http}\n  \
             {program} ask --to {shim} \"Name three rivers.\"\n  \
             {program} status --url http://{http}\n  \
             curl http://{http}/v1/chat/completions -H 'content-type: application/json' \\\n    \
             -d '{{\"model\": \"SmolLM2-135M-Instruct.Q4_1\", \"messages\": [{{\"role\": \"user\", \"content\": \"Hello!\"}}]}}'\n  \
             OPENAI_BASE_URL=http://{http}/v1 OPENAI_API_KEY=none     # for any OpenAI client\n  \
             {program} token create --url http://{http} --admin-key-file {}     # one more worker",
            key.display()
        );
        self.note("Ctrl-C ends it");
        stop.requested().await;
        println!();
        Ok(())
    }

    async fn shut_down(&self, mut mesh: Mesh) -> Result<(), Failure> {
        let services = mesh
            .shim
            .iter_mut()
            .chain(&mut mesh.workers)
            .chain(std::iter::once(&mut mesh.head));
        for service in services {
            if !service.is_running() {
                continue;
            }
            let status = service.terminate(Duration::from_secs(30)).await?;
            expect(
                status.success(),
                &format!(
                    "{} ended with {status}:\n{}",
                    service.name(),
                    service.log_end()
                ),
            )?;
            println!("  {:<9} exit code 0", service.name());
        }
        Ok(())
    }

    fn parts(&self, mesh: &Mesh) -> Result<(), Failure> {
        let shim = mesh.shim.as_ref().expect("the demo has a shim");
        let line = |service: &Service, what: &str| {
            println!("  {:<9} pid {:<8} {what}", service.name(), service.pid());
        };
        line(
            &mesh.head,
            &format!("OpenAI API at http://{}/v1", mesh.head.address("http")?),
        );
        line(shim, &format!("DCF/UDP at {}", shim.address(SHIM_INGRESS)?));
        for worker in &mesh.workers {
            line(worker, "joined with a one-time token");
        }
        Ok(())
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

/// Name of the shim's client port in its `addresses.json`.
const SHIM_INGRESS: &str = "ingress";

async fn start(model: &Path, runtime: &Path, keep: bool) -> Result<Mesh, Failure> {
    let launcher = Launcher::beside_this_program(runtime)?;
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let threads = (cores / 2).clamp(1, 8);
    let mut builder = Mesh::builder()
        .launcher(launcher)
        .model(model)
        .workers(2)
        .worker_config(&format!("threads = {threads}\n"))
        .shim();
    // A mesh that stays is easier to talk to at the ports that every command assumes.
    if keep && TcpListener::bind("127.0.0.1:8080").is_ok() {
        builder = builder.head_config("[http]\nlisten = \"127.0.0.1:8080\"\n");
    }
    if keep && UdpSocket::bind("127.0.0.1:9999").is_ok() {
        builder = builder.shim_config("listen = \"127.0.0.1:9999\"\n");
    }
    Ok(builder.start().await?)
}

/// Kills the worker that runs a request, as a power cut would, and returns its name.
async fn kill_the_one_that_answers(mesh: &mut Mesh) -> Result<String, Failure> {
    let registry = mesh.registry().await?;
    let busy = registry["workers"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|worker| {
            worker["assigned"]
                .as_u64()
                .is_some_and(|requests| requests > 0)
        })
        .and_then(|worker| worker["name"].as_str())
        .ok_or_else(|| Failure::failed(format!("no worker runs a request: {registry}")))?
        .to_owned();
    let worker = mesh
        .workers
        .iter_mut()
        .find(|worker| worker.name() == busy)
        .ok_or_else(|| {
            Failure::failed(format!("the head names a worker {busy:?} that is not ours"))
        })?;
    worker.signal(Signal::SIGKILL)?;
    worker.wait_for_end(Duration::from_secs(5)).await?;
    Ok(busy)
}

/// Ctrl-C, or whoever ends programs at this machine.
struct Stop {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
}

impl Stop {
    fn new() -> Result<Self, Failure> {
        let handler = |kind| {
            signal(kind).map_err(|error| Failure::failed(format!("a signal handler: {error}")))
        };
        Ok(Self {
            interrupt: handler(SignalKind::interrupt())?,
            terminate: handler(SignalKind::terminate())?,
            hangup: handler(SignalKind::hangup())?,
        })
    }

    async fn requested(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}

fn interrupted() -> Failure {
    Failure::new(Exit::Interrupted, "interrupted")
}

fn expect(holds: bool, otherwise: &str) -> Result<(), Failure> {
    if holds {
        Ok(())
    } else {
        Err(Failure::failed(otherwise))
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
