//! Images whose workers are killed, and images beside text.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arcanum_tests::ChatQuestion;
use arcanum_tests::images::{busy_worker, half_model, streamed, tiny_model};
use arcanum_tests::report::Report;
use mesh_api::paths::IMAGES;
use mesh_api::{CreateImageRequest, ImageStreamEvent};
use mesh_testkit::client::http::Arrived;
use mesh_testkit::{Mesh, paths};

use crate::Args;

const STEPS: u32 = 20;

fn request(size: &str, steps: u32, seed: u64) -> CreateImageRequest {
    CreateImageRequest {
        prompt: "a lighthouse in a storm".to_owned(),
        negative_prompt: Some("blurry".to_owned()),
        size: Some(size.to_owned()),
        steps: Some(steps),
        seed: Some(seed),
        stream: Some(true),
        progress: Some(true),
        partial_images: Some(3),
        ..CreateImageRequest::default()
    }
}

/// Kills the image's worker after each of its steps, again and again, and compares the files.
pub(crate) async fn kills(args: &Args, report: &mut Report) -> Result<()> {
    if args.images == 0 {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let model = tiny_model(folder.path())?;
    let config = format!("models = [{model:?}]\nthreads = 1\nimages.nice = 0\n");
    let mut mesh = Mesh::builder().start().await?;
    for _ in 0..3 {
        mesh.start_worker(&config).await?;
    }
    mesh.wait_for_workers(3).await?;
    let mut tally = Tally::default();
    for seed in 0..args.images as u64 {
        // Large enough that a step takes longer than a kill.
        let request = request("64x64", STEPS, seed);
        let client = mesh.client()?;
        let whole = streamed(&client, IMAGES, &request, async |_| Ok(())).await?;
        for after in 1..=STEPS {
            let run = format!("image {seed}, its worker killed after step {after}");
            match one_kill(&mut mesh, &request, &whole.file, after, &mut tally).await {
                Ok(time) => println!("{run}: {:.1} s", time.as_secs_f64()),
                Err(error) => report.failure(format!("{run}: {error:#}")),
            }
        }
    }
    let runs = args.images * STEPS as usize;
    report.row(
        &format!(
            "images whose worker was killed after each of {STEPS} steps, compared byte by byte"
        ),
        format!("{} of {runs} identical", tally.identical),
        Some(tally.identical == runs),
    );
    let recomputed = format!(
        "{} of {runs} began again after the last step that had come ({} steps came twice)",
        tally.seamless, tally.repeated
    );
    let what = "work lost with those workers: the step that was being computed, and no other";
    report.row(what, recomputed, Some(tally.seamless == runs));
    let reruns = format!("{} of {runs}", tally.reruns);
    report.row("killed in the middle of the image", reruns, None);
    let what = "partial images of those, each number once and the same";
    report.row(
        what,
        format!("{} of {runs}", tally.previews),
        Some(tally.previews == runs),
    );
    mesh.shutdown().await
}

#[derive(Default)]
struct Tally {
    identical: usize,
    /// No step came twice or was left out.
    seamless: usize,
    repeated: usize,
    /// The head had to go on elsewhere.
    reruns: usize,
    previews: usize,
}

async fn one_kill(
    mesh: &mut Mesh,
    request: &CreateImageRequest,
    expected: &[u8],
    after: u32,
    tally: &mut Tally,
) -> Result<Duration> {
    let begun = Instant::now();
    let client = mesh.client()?;
    let reruns = mesh.registry().await?.requests.reruns;
    let mut victim = None;
    let image = streamed(&client, IMAGES, request, async |step| {
        if victim.is_none() && step <= after {
            victim = Some((busy_worker(mesh).await?, false));
        }
        if let Some((worker, killed @ false)) = &mut victim
            && step >= after
        {
            *killed = true;
            mesh.workers[*worker].crash()?;
        }
        Ok(())
    })
    .await?;
    let (worker, killed) = victim.context("no worker had the image")?;
    ensure!(killed, "the image was done before the worker was killed");
    tally.reruns += usize::from(mesh.registry().await?.requests.reruns > reruns);
    mesh.workers[worker].restart(None).await?;
    mesh.wait_for_workers(3).await?;
    let all: Vec<u32> = (1..=STEPS).collect();
    tally.seamless += usize::from(image.steps == all);
    tally.repeated += image.steps.len().saturating_sub(all.len());
    let numbers: Vec<u32> = image.partial.iter().map(|(number, _)| *number).collect();
    tally.previews += usize::from(numbers == [0, 1, 2]);
    ensure!(
        image.file == expected,
        "another image: steps {:?}",
        image.steps
    );
    tally.identical += 1;
    Ok(begun.elapsed())
}

/// Text with and without an image beside it on the same worker, in turn.
pub(crate) async fn beside_text(args: &Args, report: &mut Report) -> Result<()> {
    if args.beside == 0 {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let models = [
        paths::smollm2()?.display().to_string(),
        half_model(folder.path())?,
    ];
    for (name, images, wanted) in [
        ("as configured by default", "", Some(0.9)),
        (
            "without patience, at nice 19",
            "images.patience = \"0s\"\nimages.nice = 19\n",
            None,
        ),
        (
            "without patience, at nice 0",
            "images.patience = \"0s\"\nimages.nice = 0\n",
            None,
        ),
    ] {
        let config = format!("models = {models:?}\ncontext = 1024\n{images}");
        let mut mesh = Mesh::builder().start().await?;
        mesh.start_worker(&config).await?;
        mesh.wait_for_workers(1).await?;
        let mut ratios = Vec::new();
        let mut steps = 0;
        for pair in 0..args.beside {
            let mut rates = [0.0; 2];
            // The first in turn alternates from pair to pair.
            for turn in 0..2 {
                let which = (pair + turn) % 2;
                let (rate, done) = text(&mesh, which == 1, pair).await?;
                rates[which] = rate;
                steps += done;
            }
            ratios.push(rates[1] / rates[0]);
            println!(
                "{name}: {:.1} tok/s alone, {:.1} beside an image",
                rates[0], rates[1]
            );
        }
        ratios.sort_by(f64::total_cmp);
        let median = ratios[ratios.len() / 2];
        report.row(
            &format!("speed of a text beside an image over the same alone, {name}"),
            format!(
                "median {median:.3}, {:.3} to {:.3} (n = {}); {steps} steps of images meanwhile",
                ratios[0],
                ratios[ratios.len() - 1],
                ratios.len()
            ),
            wanted.map(|wanted| median >= wanted),
        );
        mesh.shutdown().await?;
    }
    Ok(())
}

/// Tokens a second of an answer, and the steps that an image beside it made meanwhile.
async fn text(mesh: &Mesh, beside: bool, number: usize) -> Result<(f64, usize)> {
    let client = mesh.client()?;
    let steps = Arc::new(AtomicUsize::new(0));
    let image = beside.then(|| {
        let (client, steps) = (client.clone(), steps.clone());
        tokio::spawn(async move {
            // Longer than the answer; it is broken off.
            let request = request("256x256", 150, number as u64);
            let mut events = client.events::<ImageStreamEvent>(IMAGES, &request).await?;
            while let Some(arrived) = events.next().await? {
                if let Arrived::Event(ImageStreamEvent::Progress { .. }) = arrived {
                    steps.fetch_add(1, Ordering::Relaxed);
                }
            }
            anyhow::Ok(())
        })
    });
    let begun = Instant::now();
    while beside && steps.load(Ordering::Relaxed) == 0 {
        ensure!(
            begun.elapsed() < Duration::from_secs(60),
            "the image makes no step"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let before = steps.load(Ordering::Relaxed);
    let question = format!("Tell me a story about the number {number}.");
    let answer = ChatQuestion::greedy(question, TOKENS).ask(&client).await?;
    let done = steps.load(Ordering::Relaxed) - before;
    if let Some(image) = image {
        image.abort();
        let _ = image.await;
    }
    // Until the broken-off image has left its worker.
    let begun = Instant::now();
    while mesh
        .registry()
        .await?
        .workers
        .iter()
        .any(|worker| worker.assigned > 0)
    {
        ensure!(
            begun.elapsed() < Duration::from_secs(60),
            "the image does not end"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(STEP).await;
    Ok((answer.decode_rate(), done))
}

/// Tokens of an answer.
const TOKENS: u32 = 200;
/// More than the step takes that is being computed when an image is broken off.
const STEP: Duration = Duration::from_secs(3);
