//! Images by a real mesh: a tiny Stable Diffusion with random weights on libtorch, across the deaths of workers.
//!
//! Run with `cargo test -p arcanum-tests --features images --test images`.

use std::io::Cursor;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use arcanum_tests::alone;
use arcanum_tests::images::{TINY, busy_worker, png_file, streamed, tiny_model};
use image::{DynamicImage, ImageFormat, Rgb, RgbImage, Rgba, RgbaImage};
use mesh_api::paths::{CHAT_COMPLETIONS, IMAGE_EDITS, IMAGES};
use mesh_api::{CreateImageRequest, EditImageRequest, ImagesResponse};
use mesh_testkit::client::dcf_udp::DcfClient;
use mesh_testkit::client::http::HttpClient;
use mesh_testkit::{Mesh, paths};
use serde_json::{Value, json};

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

async fn made(client: &HttpClient, request: &CreateImageRequest) -> Result<(Vec<u8>, u32)> {
    let answer: ImagesResponse = client.post(IMAGES, request).await?;
    let image = answer.data.into_iter().next().context("an image")?;
    let reruns = image.timings.map_or(0, |timings| timings.reruns);
    Ok((png_file(image.b64_json)?, reruns))
}

fn streamed_request(steps: u32) -> CreateImageRequest {
    CreateImageRequest {
        stream: Some(true),
        progress: Some(true),
        ..request(steps)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_survives_its_worker_killed_at_several_steps_to_the_last_byte() -> Result<()> {
    let _alone = alone();
    let folder = tempfile::tempdir()?;
    let config = format!(
        "models = [{:?}]\nthreads = 1\nimages.nice = 0\n",
        tiny_model(folder.path())?
    );
    let mut mesh = Mesh::builder().start().await?;
    for _ in 0..4 {
        mesh.start_worker(&config).await?;
    }
    mesh.wait_for_workers(4).await?;
    let client = mesh.client()?;
    const STEPS: u32 = 20;
    let (undisturbed, reruns) = made(&client, &request(STEPS)).await?;
    ensure!(reruns == 0);
    let again = streamed(&client, IMAGES, &streamed_request(STEPS), async |_| Ok(())).await?;
    ensure!(
        again.file == undisturbed,
        "the same request gave another image"
    );
    let all: Vec<u32> = (1..=STEPS).collect();
    ensure!(again.steps == all, "{:?}", again.steps);

    // Killed after the first step, in the middle, and near the end: once each, and all in one image.
    for kills in [vec![1], vec![10], vec![STEPS - 2]] {
        let mut left = kills.clone();
        let mut killed = Vec::new();
        let disturbed = streamed(&client, IMAGES, &streamed_request(STEPS), async |step| {
            if left.first() == Some(&step) {
                left.remove(0);
                let victim = busy_worker(&mesh).await?;
                mesh.workers[victim].crash()?;
                killed.push(victim);
            }
            Ok(())
        })
        .await?;
        ensure!(killed.len() == kills.len(), "{killed:?} for {kills:?}");
        ensure!(
            disturbed.file == undisturbed,
            "another image after {kills:?}"
        );
        // A step that was on its way when the worker died is done again, and no other.
        let again = disturbed.steps.len() - STEPS as usize;
        ensure!(again <= kills.len(), "{:?}", disturbed.steps);
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
    let models = [chat, tiny_model(folder.path())?];
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
    ensure!(told["seed"] == 7 && told["model"] == TINY, "{told}");
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

/// A picture with a pattern, so that it is recognised.
fn picture(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        Rgb([
            (x * 5) as u8,
            (y * 3) as u8,
            ((x / 8 + y / 8) % 2 * 200) as u8,
        ])
    })
}

fn encoded(image: impl Into<DynamicImage>, format: ImageFormat) -> Result<Vec<u8>> {
    let mut file = Cursor::new(Vec::new());
    image.into().write_to(&mut file, format)?;
    Ok(file.into_inner())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edit_keeps_what_its_mask_keeps_and_goes_on_elsewhere() -> Result<()> {
    let _alone = alone();
    let folder = tempfile::tempdir()?;
    let config = format!(
        "models = [{:?}]\nthreads = 1\nimages.nice = 0\n",
        tiny_model(folder.path())?
    );
    let mut mesh = Mesh::builder().start().await?;
    for _ in 0..2 {
        mesh.start_worker(&config).await?;
    }
    mesh.wait_for_workers(2).await?;
    let client = mesh.client()?;
    let base64 = |file: Vec<u8>| {
        use base64::Engine as _;
        base64::engine::general_purpose::STANDARD.encode(file)
    };
    let (width, height) = (96, 64);
    // The left half is open.
    let mask = RgbaImage::from_fn(width, height, |x, _| {
        Rgba([0, 0, 0, if x < width / 2 { 0 } else { 255 }])
    });
    const STEPS: u32 = 12;
    let edit = EditImageRequest {
        image: base64(encoded(picture(width, height), ImageFormat::Png)?),
        mask: Some(base64(encoded(mask, ImageFormat::Png)?)),
        options: CreateImageRequest {
            partial_images: Some(3),
            ..streamed_request(STEPS)
        },
        ..EditImageRequest::default()
    };
    let whole = streamed(&client, IMAGE_EDITS, &edit, async |_| Ok(())).await?;
    let made = image::load_from_memory(&whole.file)?.into_rgb8();
    ensure!(
        made.dimensions() == (width, height),
        "{:?}",
        made.dimensions()
    );
    let own = picture(width, height);
    let mut changed = 0;
    for (x, y, pixel) in made.enumerate_pixels() {
        let same = pixel == own.get_pixel(x, y);
        ensure!(
            same || x < width / 2,
            "pixel {x}, {y} outside the mask changed"
        );
        changed += u32::from(!same);
    }
    ensure!(
        changed > width / 2 * height * 9 / 10,
        "{changed} pixels changed"
    );
    let numbers: Vec<u32> = whole.partial.iter().map(|(number, _)| *number).collect();
    ensure!(numbers == [0, 1, 2], "{numbers:?}");
    for (_, file) in &whole.partial {
        let partial = image::load_from_memory(file)?;
        ensure!((partial.width(), partial.height()) == (width, height));
    }

    // The same across the death of its worker, with each partial image once.
    let mut killed = false;
    let disturbed = streamed(&client, IMAGE_EDITS, &edit, async |step| {
        if step == STEPS / 2 && !killed {
            killed = true;
            let victim = busy_worker(&mesh).await?;
            mesh.workers[victim].crash()?;
        }
        Ok(())
    })
    .await?;
    ensure!(killed, "{:?}", disturbed.steps);
    ensure!(
        (&disturbed.file, &disturbed.partial) == (&whole.file, &whole.partial),
        "another image after the death of its worker: {:?}",
        disturbed.steps
    );

    // A JPEG file as a form, in its own size, with fewer steps.
    let jpeg = encoded(picture(100, 70), ImageFormat::Jpeg)?;
    let mut form = Vec::new();
    for (name, value) in [
        ("prompt", "a fox".as_bytes()),
        ("strength", b"0.5"),
        ("steps", b"6"),
        ("seed", b"3"),
        ("image\"; filename=\"fox.jpg", &jpeg),
    ] {
        let head = format!("--B\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n");
        form.extend([head.as_bytes(), value, b"\r\n"].concat());
    }
    form.extend(b"--B--\r\n");
    let url = format!("{}{IMAGE_EDITS}", client.base());
    let request = reqwest::Client::new().post(url).body(form);
    let kind = "multipart/form-data; boundary=B";
    let answer = request.header("content-type", kind).send().await?;
    let answer: ImagesResponse = answer.error_for_status()?.json().await?;
    let image = answer.data.into_iter().next().context("an image")?;
    ensure!(answer.size == "96x64", "{}", answer.size);
    let timings = image.timings.context("timings")?;
    ensure!(timings.steps == 3, "{timings:?}");
    png_file(image.b64_json)?;

    // The command line does the same.
    let (init, output) = (folder.path().join("fox.jpg"), folder.path().join("out.png"));
    std::fs::write(&init, &jpeg)?;
    let mut command = Command::new(paths::bin_dir()?.join("hydramesh"));
    command.args(["image", "a fox", "--strength", "0.5", "--steps", "6"]);
    command.args(["--seed", "3", "--url", client.base(), "--init"]);
    command.arg(&init).arg("-o").arg(&output);
    command.env_remove("HYDRAMESH_API_KEY_FILE");
    let ran = tokio::task::spawn_blocking(move || command.output()).await??;
    let said = String::from_utf8_lossy(&ran.stderr).into_owned();
    ensure!(ran.status.success(), "{said}");
    ensure!(!ran.stdout.contains(&0x1B), "escapes where no terminal is");
    let file = std::fs::read(&output)?;
    ensure!(image::load_from_memory(&file)?.width() == 96);
    mesh.shutdown().await
}
