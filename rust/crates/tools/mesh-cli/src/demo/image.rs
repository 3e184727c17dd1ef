//! An image whose worker dies in the middle.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mesh_api::{CreateImageRequest, ImageStreamEvent, paths as api};
use mesh_client::http::{Arrived, HttpClient};
use mesh_launcher::{Launcher, Mesh, paths};
use nix::sys::signal::Signal;

use super::{Demo, END_LIMIT, LOOK, Stop, expect, there, wait_until_joined};
use crate::args::DemoArgs;
use crate::failure::Failure;
use crate::output::{Terminal, duration};

const PROMPT: &str = "a lighthouse in a storm, oil painting";
const STEPS: u32 = 20;
const KILLED_AFTER: u32 = STEPS / 2;
const SEED: u64 = 7;
/// The smallest image: with random weights nothing is to be seen on a larger one.
const RANDOM_SIZE: &str = "128x128";
/// Folder of the cache with the model with random weights.
const RANDOM_MODEL: &str = "models/random-stable-diffusion";
const WORKERS: usize = 2;

pub(super) async fn run(args: DemoArgs, terminal: Terminal) -> Result<(), Failure> {
    let is_random = args.model.is_none();
    let model = model(&args)?;
    let runtime = there(args.cache.join(paths::ORT_LIBRARY))?;
    let demo = Demo { terminal };
    let mut stop = Stop::new()?;

    demo.heading(&format!(
        "Starting a head and {WORKERS} workers that make images, on loopback"
    ));
    if is_random {
        demo.note(
            "The model's weights are random, so the image shows nothing. --model names a real one",
        );
    }
    let mut mesh = tokio::select! {
        mesh = start(&demo, &model, &runtime) => mesh?,
        () = stop.requested() => return Err(Failure::interrupted()),
    };
    let file = args.cache.join("demo-image.png");
    let size = is_random.then_some(RANDOM_SIZE);
    let shown = tokio::select! {
        shown = show(&demo, &mut mesh, size, &file) => shown,
        () = stop.requested() => Err(Failure::interrupted()),
    };
    demo.heading("Shutting down");
    demo.shut_down(mesh).await?;
    shown
}

/// The model to serve: a folder, or one file.
fn model(args: &DemoArgs) -> Result<PathBuf, Failure> {
    let path = match &args.model {
        Some(path) => path.clone(),
        None => args.cache.join(RANDOM_MODEL),
    };
    if !path.exists() {
        let missing = Failure::failed(format!("{} is not there", path.display()));
        return Err(missing.hint(
            "`make demo-image` makes a model with random weights; --model names a folder in diffusers' form or \
             one .safetensors file.",
        ));
    }
    Ok(std::path::absolute(&path).unwrap_or(path))
}

async fn start(demo: &Demo, model: &Path, runtime: &Path) -> Result<Mesh, Failure> {
    let models = toml::Value::from(vec![model.display().to_string()]);
    let mut mesh = Mesh::builder()
        .launcher(Launcher::beside_this_program(runtime)?)
        .worker_config(&format!("models = {models}\n"))
        .start()
        .await?;
    let http = mesh.head.address("http")?;
    demo.part(&mesh.head, &format!("OpenAI API at http://{http}/v1"));
    for _ in 0..WORKERS {
        let worker = mesh.start_worker("").await?;
        wait_until_joined(&mut mesh, worker).await?;
        demo.part(&mesh.workers[worker], "joined with a one-time token");
    }
    Ok(mesh)
}

async fn show(
    demo: &Demo,
    mesh: &mut Mesh,
    size: Option<&str>,
    file: &Path,
) -> Result<(), Failure> {
    let client = mesh.client()?;
    let request = CreateImageRequest {
        prompt: PROMPT.to_owned(),
        size: size.map(str::to_owned),
        steps: Some(STEPS),
        seed: Some(SEED),
        stream: Some(true),
        progress: Some(true),
        ..CreateImageRequest::default()
    };
    demo.heading(&format!(
        "An image in {STEPS} steps; its worker is killed after step {KILLED_AFTER}"
    ));
    demo.question(PROMPT);
    let mut victim = None;
    let mut stepped = Instant::now();
    let mut pause = Duration::ZERO;
    let disturbed = make(&client, &request, async |step| {
        let (before, now) = (stepped, Instant::now());
        stepped = now;
        if step == KILLED_AFTER && victim.is_none() {
            let worker = busy(mesh).await?;
            // As a power cut would.
            mesh.workers[worker].signal(Signal::SIGKILL)?;
            stepped = Instant::now();
            println!(
                "  step {step:>2}  {} is killed here",
                mesh.workers[worker].name()
            );
            victim = Some(worker);
            return Ok(());
        }
        if victim.is_some() {
            pause = pause.max(now - before);
        }
        println!("  step {step:>2}");
        Ok(())
    })
    .await?;
    let victim =
        victim.ok_or_else(|| Failure::failed("the image was done before its worker died"))?;
    mesh.workers[victim].wait_for_end(END_LIMIT).await?;
    let victim = mesh.workers[victim].name().to_owned();
    std::fs::write(file, &disturbed.png)
        .map_err(|error| Failure::failed(format!("cannot write {}: {error}", file.display())))?;
    demo.note(&format!("{} by {}", file.display(), disturbed.worker));

    demo.heading("The same image without a disturbance");
    let undisturbed = make(&client, &request, async |_| Ok(())).await?;
    let differs =
        format!("the image during which {victim} was killed differs from an undisturbed one");
    expect(disturbed.png == undisturbed.png, &differs)?;
    demo.good(&format!(
        "{victim} died with the image half done. {} went on after its last step; the longest step took {}, and the file \
         is the same to the last byte",
        disturbed.worker,
        duration(pause)
    ));
    Ok(())
}

/// An image that is done.
struct Made {
    png: Vec<u8>,
    /// Name of the worker that finished it.
    worker: String,
}

/// Asks for an image; `on_step` is called after each step.
async fn make(
    client: &HttpClient,
    request: &CreateImageRequest,
    mut on_step: impl AsyncFnMut(u32) -> Result<(), Failure>,
) -> Result<Made, Failure> {
    let mut events = client
        .events::<ImageStreamEvent>(api::IMAGES, request)
        .await?;
    let mut made = None;
    while let Some(arrived) = events.next().await? {
        match arrived {
            Arrived::Event(ImageStreamEvent::Progress { step, .. }) => on_step(step).await?,
            Arrived::Event(ImageStreamEvent::PartialImage { .. }) => {}
            Arrived::Event(ImageStreamEvent::Completed { image, .. }) => {
                let png = STANDARD.decode(image.b64_json.unwrap_or_default());
                let png = png.map_err(|error| {
                    Failure::failed(format!(
                        "the head sent an image that is not base64: {error}"
                    ))
                })?;
                let worker = image.timings.unwrap_or_default().worker;
                made = Some(Made { png, worker });
            }
            Arrived::Waits(_) => {}
        }
    }
    made.ok_or_else(|| Failure::failed("the head sent no image"))
}

/// Index of the worker that makes the image.
async fn busy(mesh: &Mesh) -> Result<usize, Failure> {
    let until = Instant::now() + END_LIMIT;
    loop {
        let registry = mesh.registry().await?;
        let busy = registry.workers.iter().find(|worker| worker.assigned > 0);
        let index = busy.and_then(|busy| {
            let mut workers = mesh.workers.iter();
            workers.position(|worker| worker.name() == busy.name)
        });
        if let Some(index) = index {
            return Ok(index);
        }
        expect(Instant::now() < until, "no worker makes the image")?;
        tokio::time::sleep(LOOK).await;
    }
}
