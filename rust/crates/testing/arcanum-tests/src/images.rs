//! Images: models with random weights, and images on their way.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mesh_api::ImageStreamEvent;
use mesh_diffusion::config::{Family, PipelineConfig};
use mesh_diffusion::synth;
use mesh_model::safetensors::Dtype;
use mesh_testkit::Mesh;
use mesh_testkit::client::http::{Arrived, HttpClient};
use serde::Serialize;

/// Name of the tiny model.
pub const TINY: &str = "tiny-sd";

/// A model of a few megabytes in `folder`.
///
/// # Errors
/// If it cannot be written.
pub fn tiny_model(folder: &Path) -> Result<String> {
    model(&synth::tiny(Family::Sd1), folder, TINY)
}

/// A model with the structure of Stable Diffusion 1.5 and a quarter of its weights in `folder`, 0.9 GB.
///
/// # Errors
/// If it cannot be written.
pub fn half_model(folder: &Path) -> Result<String> {
    let config = synth::half_of_stable_diffusion_1_5();
    model(&config, folder, "half-sd")
}

/// A model called `name`, with a tokenizer that knows single letters.
fn model(config: &PipelineConfig, folder: &Path, name: &str) -> Result<String> {
    let path = folder.join(name);
    std::fs::create_dir_all(&path)?;
    synth::write_folder(config, &path, Dtype::F32)?;
    synth::write_tokenizer(&path.join("tokenizer"), config.text[0].vocab)?;
    Ok(path.display().to_string())
}

/// An image that came as a stream.
#[derive(Debug, Default, PartialEq)]
pub struct StreamedImage {
    /// The PNG file.
    pub file: Vec<u8>,
    /// The steps in the order in which they came.
    pub steps: Vec<u32>,
    /// Partial images, each with its number.
    pub partial: Vec<(u32, Vec<u8>)>,
}

/// The image of a stream, which calls `disturb` after each step. `request` asks for a stream with progress.
///
/// # Errors
/// If there is none, or `disturb` fails.
pub async fn streamed(
    client: &HttpClient,
    path: &str,
    request: &impl Serialize,
    mut disturb: impl AsyncFnMut(u32) -> Result<()>,
) -> Result<StreamedImage> {
    let mut events = client.events::<ImageStreamEvent>(path, request).await?;
    let mut streamed = StreamedImage::default();
    while let Some(arrived) = events.next().await? {
        let Arrived::Event(event) = arrived else {
            continue;
        };
        match event {
            ImageStreamEvent::Progress { step, .. } => {
                streamed.steps.push(step);
                disturb(step).await?;
            }
            ImageStreamEvent::PartialImage {
                partial_image_index,
                b64_json,
                ..
            } => {
                let file = png_file(Some(b64_json))?;
                streamed.partial.push((partial_image_index, file));
            }
            ImageStreamEvent::Completed { image, .. } => {
                streamed.file = png_file(image.b64_json)?;
            }
        }
    }
    ensure!(
        !streamed.file.is_empty(),
        "the stream ended without an image"
    );
    Ok(streamed)
}

/// The PNG file of an answer.
///
/// # Errors
/// If it is none.
pub fn png_file(encoded: Option<String>) -> Result<Vec<u8>> {
    let file = STANDARD.decode(encoded.context("base64")?)?;
    ensure!(file.starts_with(b"\x89PNG"), "no PNG file");
    Ok(file)
}

/// The worker that has a request, by its place in the mesh.
///
/// # Errors
/// If none has one within 20 s.
pub async fn busy_worker(mesh: &Mesh) -> Result<usize> {
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
