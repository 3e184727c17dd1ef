//! Images by a real mesh: a tiny Stable Diffusion with random weights on libtorch, across the deaths of workers.
//!
//! Run with `cargo test -p arcanum-tests --features images --test images`.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arcanum_tests::alone;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mesh_api::paths::{CHAT_COMPLETIONS, IMAGES};
use mesh_api::{CreateImageRequest, ImageStreamEvent, ImagesResponse};
use mesh_diffusion::config::Family;
use mesh_diffusion::synth;
use mesh_model::safetensors::Dtype;
use mesh_testkit::client::dcf_udp::DcfClient;
use mesh_testkit::client::http::{Arrived, HttpClient};
use mesh_testkit::{Mesh, paths};
use serde_json::{Value, json};

const MODEL: &str = "tiny-sd";

/// A model of a few megabytes in `folder`, with a tokenizer that knows single letters.
fn model(folder: &Path) -> Result<String> {
    let path = folder.join(MODEL);
    std::fs::create_dir_all(path.join("tokenizer"))?;
    synth::write_folder(&synth::tiny(Family::Sd1), &path, Dtype::F32)?;
    let mut vocab = BTreeMap::new();
    for ending in ["", "</w>"] {
        for letter in byte_letters() {
            let id = vocab.len();
            vocab.insert(format!("{letter}{ending}"), id);
        }
    }
    // A vocabulary has no gaps, and the model's has 1,000 tokens.
    while vocab.len() < 998 {
        let id = vocab.len();
        vocab.insert(format!("filler{id}"), id);
    }
    vocab.insert("<|startoftext|>".to_owned(), 998);
    vocab.insert("<|endoftext|>".to_owned(), 999);
    let tokenizer = path.join("tokenizer");
    std::fs::write(tokenizer.join("vocab.json"), serde_json::to_vec(&vocab)?)?;
    std::fs::write(tokenizer.join("merges.txt"), "#version: 0.2\n")?;
    Ok(path.display().to_string())
}

/// The characters that stand for bytes in GPT-2's vocabularies.
fn byte_letters() -> Vec<char> {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut others = 256u32..;
    let letter = |byte: u32| match printable(byte) {
        true => char::from_u32(byte),
        false => others.next().and_then(char::from_u32),
    };
    (0..256).filter_map(letter).collect()
}

fn request(steps: u32) -> CreateImageRequest {
    CreateImageRequest {
        prompt: "a lighthouse in a storm".to_owned(),
        negative_prompt: Some("blurry".to_owned()),
        size: Some("96x64".to_owned()),
        steps: Some(steps),
        seed: Some(7),
        ..CreateImageRequest::default()
    }
}

fn file(encoded: Option<String>) -> Result<Vec<u8>> {
    let file = STANDARD.decode(encoded.context("base64")?)?;
    ensure!(file.starts_with(b"\x89PNG"), "no PNG file");
    Ok(file)
}

async fn made(client: &HttpClient, request: &CreateImageRequest) -> Result<(Vec<u8>, u32)> {
    let answer: ImagesResponse = client.post(IMAGES, request).await?;
    let image = answer.data.into_iter().next().context("an image")?;
    let reruns = image.timings.map_or(0, |timings| timings.reruns);
    Ok((file(image.b64_json)?, reruns))
}

/// The image of a stream, in the middle of which `disturb` is called with each step.
async fn streamed(
    client: &HttpClient,
    request: &CreateImageRequest,
    mut disturb: impl AsyncFnMut(u32) -> Result<()>,
) -> Result<(Vec<u8>, Vec<u32>)> {
    let request = CreateImageRequest {
        stream: Some(true),
        progress: Some(true),
        ..request.clone()
    };
    let mut events = client.events::<ImageStreamEvent>(IMAGES, &request).await?;
    let mut steps = Vec::new();
    let mut image = None;
    while let Some(arrived) = events.next().await? {
        match arrived {
            Arrived::Event(ImageStreamEvent::Progress { step, .. }) => {
                steps.push(step);
                disturb(step).await?;
            }
            Arrived::Event(ImageStreamEvent::Completed { image: done, .. }) => {
                image = Some(file(done.b64_json)?);
            }
            Arrived::Waits(_) => {}
        }
    }
    Ok((image.context("an image")?, steps))
}

/// The worker that has a request, by its place in the mesh.
async fn busy(mesh: &Mesh) -> Result<usize> {
    let started = Instant::now();
    loop {
        let registry = mesh.registry().await?;
        let mut workers = registry.workers.iter();
        if let Some(worker) = workers.find(|worker| worker.assigned > 0) {
            let number = worker.name.rsplit('-').next().context("a number")?;
            return Ok(number.parse::<usize>()? - 1);
        }
        ensure!(started.elapsed() < Duration::from_secs(20), "{registry:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_survives_its_worker_killed_at_several_steps_to_the_last_byte() -> Result<()> {
    let _alone = alone();
    let folder = tempfile::tempdir()?;
    let config = format!("models = [{:?}]\nthreads = 1\n", model(folder.path())?);
    let mut mesh = Mesh::builder().start().await?;
    for _ in 0..4 {
        mesh.start_worker(&config).await?;
    }
    mesh.wait_for_workers(4).await?;
    let client = mesh.client()?;
    const STEPS: u32 = 20;
    let (undisturbed, reruns) = made(&client, &request(STEPS)).await?;
    ensure!(reruns == 0);
    let (again, steps) = streamed(&client, &request(STEPS), async |_| Ok(())).await?;
    ensure!(again == undisturbed, "the same request gave another image");
    ensure!(steps == (1..=STEPS).collect::<Vec<_>>(), "{steps:?}");

    // Killed after the first step, in the middle, and near the end: once each, and all in one image.
    for kills in [vec![1], vec![10], vec![STEPS - 2]] {
        let mut left = kills.clone();
        let mut killed = Vec::new();
        let (disturbed, steps) = streamed(&client, &request(STEPS), async |step| {
            if left.first() == Some(&step) {
                left.remove(0);
                let victim = busy(&mesh).await?;
                mesh.workers[victim].crash()?;
                killed.push(victim);
            }
            Ok(())
        })
        .await?;
        ensure!(killed.len() == kills.len(), "{killed:?} for {kills:?}");
        ensure!(disturbed == undisturbed, "another image after {kills:?}");
        // A step that was on its way when the worker died is done again, and no other.
        let again = steps.len() - STEPS as usize;
        ensure!(again <= kills.len(), "{steps:?}");
    }
    let registry = mesh.registry().await?;
    ensure!(registry.requests.reruns >= 3, "{registry:?}");
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_mesh_makes_images_over_http_udp_and_on_the_command_line_and_talks() -> Result<()> {
    let _alone = alone();
    let folder = tempfile::tempdir()?;
    let chat = paths::smollm2()?.display().to_string();
    let models = [chat, model(folder.path())?];
    let mut mesh = Mesh::builder().shim().start().await?;
    mesh.start_worker(&format!("models = {models:?}\ncontext = 512\n"))
        .await?;
    mesh.wait_for_workers(1).await?;
    let client = mesh.client()?;
    let (whole, _) = made(&client, &request(4)).await?;

    let shim = mesh.shim.as_ref().context("a shim")?;
    let mut udp = DcfClient::connect(&shim.address("ingress")?.to_string()).await?;
    let task = json!({
        "prompt": "a lighthouse in a storm", "negative_prompt": "blurry", "steps": 4, "seed": 7, "size": "96x64",
    });
    let file = udp.ask_file(&task, Duration::from_secs(60)).await?;
    ensure!(
        file == whole,
        "{} bytes over UDP, {} over HTTP",
        file.len(),
        whole.len()
    );

    let url = format!("http://{}", mesh.head.address("http")?);
    let output = folder.path().join("out.png");
    let mut command = Command::new(paths::bin_dir()?.join("hydramesh"));
    command.args(["image", "a lighthouse in a storm", "--negative", "blurry"]);
    command.args([
        "--steps", "4", "--seed", "7", "--size", "96x64", "--json", "--url", &url,
    ]);
    command
        .arg("-o")
        .arg(&output)
        .env_remove("HYDRAMESH_API_KEY_FILE");
    let ran = tokio::task::spawn_blocking(move || command.output()).await??;
    ensure!(
        ran.status.success(),
        "{}",
        String::from_utf8_lossy(&ran.stderr)
    );
    let told: Value = serde_json::from_slice(&ran.stdout)?;
    ensure!(told["seed"] == 7 && told["model"] == MODEL, "{told}");
    ensure!(
        std::fs::read(&output)? == whole,
        "another file from the command line"
    );

    let url = CreateImageRequest {
        response_format: Some(mesh_api::ImageFormat::Url),
        n: Some(2),
        ..request(2)
    };
    let answer: ImagesResponse = client.post(IMAGES, &url).await?;
    ensure!(
        answer
            .data
            .iter()
            .map(|image| image.seed)
            .eq([Some(7), Some(8)])
    );
    ensure!(
        answer.data.iter().all(|image| image.url.is_some()),
        "{answer:?}"
    );

    let hi = json!({"messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 4});
    let answer: Value = client.post(CHAT_COMPLETIONS, &hi).await?;
    ensure!(
        answer["choices"][0]["message"]["content"].is_string(),
        "{answer}"
    );
    mesh.shutdown().await
}
