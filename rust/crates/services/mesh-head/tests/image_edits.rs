//! `/v1/images/edits`: forms and JSON, hostile files, and the pixels on their way to workers.

mod support;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use dcf::ErrorCode;
use serde_json::{Value, json};
use support::{Fate, Script, TestHead, script};

const PATH: &str = "/v1/images/edits";

fn draws(fate: Fate) -> Script {
    Script {
        draws: true,
        ..script(fate)
    }
}

/// A PNG file whose left half is transparent if it has an alpha channel.
fn png(width: u32, height: u32, alpha: bool) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width, height);
    encoder.set_color(match alpha {
        true => png::ColorType::Rgba,
        false => png::ColorType::Rgb,
    });
    let pixel = |at: u32| {
        let opacity = if at % width < width / 2 { 0 } else { 255 };
        let pixel = [10, 20, 30, opacity];
        pixel.into_iter().take(if alpha { 4 } else { 3 })
    };
    let mut writer = encoder.write_header().unwrap();
    let pixels: Vec<u8> = (0..width * height).flat_map(pixel).collect();
    writer.write_image_data(&pixels).unwrap();
    writer.finish().unwrap();
    file
}

/// A form as OpenAI's clients send it.
fn form(texts: &[(&str, &str)], files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, text) in texts {
        let part =
            format!("--XX\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{text}\r\n");
        body.extend_from_slice(part.as_bytes());
    }
    for (name, file) in files {
        let head = format!(
            "--XX\r\nContent-Disposition: form-data; name=\"{name}\"; filename=\"a.png\"\r\nContent-Type: image/png\r\n\r\n"
        );
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(file);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(b"--XX--\r\n");
    body
}

async fn post_form(head: &TestHead, body: Vec<u8>) -> (u16, String) {
    let request = head.http.post(head.url(PATH)).body(body);
    let request = request.header("content-type", "multipart/form-data; boundary=XX");
    let answer = request.send().await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_form_brings_pixels_and_mask_to_every_worker_that_goes_on() {
    for fate in [
        Fate::Finish,
        Fate::DiesAfter(2),
        Fate::FailsAfter(3, ErrorCode::INFERENCE_FAILED),
    ] {
        let head = TestHead::start(|_| {}).await;
        let first = Script {
            decode_tps: 500.0,
            ..draws(fate)
        };
        let bad = head.worker("bad", first).await;
        let good = head.worker("good", draws(Fate::Finish)).await;
        // Large enough for several parts.
        let body = form(
            &[("prompt", "a fox"), ("seed", "5"), ("size", "512x512")],
            &[
                ("image", png(600, 300, false)),
                ("mask", png(600, 300, true)),
            ],
        );
        let (status, text) = post_form(&head, body).await;
        assert_eq!(status, 200, "{text}");
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(answer["size"], "512x512");
        let mut seen = 0;
        for worker in [&bad, &good] {
            let tasks = worker.seen.images.lock().unwrap();
            let pixels = worker.seen.pixels.lock().unwrap();
            for (task, pixels) in tasks.iter().zip(&*pixels) {
                let Some(init) = &task.init else { continue };
                seen += 1;
                assert_eq!((init.strength, init.masked), (1.0, true));
                let (rgb, mask) = pixels.split_at(512 * 512 * 3);
                assert!(rgb.chunks(3).all(|pixel| pixel == [10, 20, 30]));
                assert_eq!((mask[0], mask[63], mask.len()), (255, 0, 512 * 64));
            }
        }
        assert!(seen >= if bad.requests() > 0 { 2 } else { 1 } || fate == Fate::Finish);
        assert!(seen > 0, "{fate:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn json_streams_events_of_edits() {
    let head = TestHead::start(|_| {}).await;
    let worker = head.worker("w", draws(Fate::Finish)).await;
    let url = format!(
        "data:image/png;base64,{}",
        STANDARD.encode(png(100, 70, false))
    );
    let body = json!({
        "prompt": "a fox", "image": url, "strength": 0.5, "stream": true, "progress": true, "partial_images": 1,
    });
    let response = head.http.post(head.url(PATH)).body(body.to_string());
    let text = response.send().await.unwrap().text().await.unwrap();
    let names: Vec<&str> = text
        .split("\n\n")
        .filter_map(|frame| frame.strip_prefix("event: ")?.split_once('\n'))
        .map(|(name, _)| name)
        .collect();
    let of = |wanted: &str| names.iter().filter(|name| **name == wanted).count();
    assert_eq!(of("image_edit.progress"), 6, "{names:?}");
    assert_eq!(of("image_edit.partial_image"), 1, "{names:?}");
    assert_eq!(names.last(), Some(&"image_edit.completed"));
    let tasks = worker.seen.images.lock().unwrap();
    let task = tasks.last().unwrap();
    // Its own size in multiples of 8.
    assert_eq!((task.width, task.height, task.previews), (96, 64, 1));
    assert_eq!(task.init.as_ref().unwrap().strength, 0.5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_and_forms_that_cannot_be_used_are_refused_by_name() {
    let head = TestHead::start(|_| {}).await;
    let _worker = head.worker("w", draws(Fate::Finish)).await;
    let image = || ("image", png(64, 64, false));
    let mut claims = png(64, 64, false);
    // A size of 2^30 each way, with a checksum that no longer fits.
    claims[16..24].copy_from_slice(&[0x40, 0, 0, 0, 0x40, 0, 0, 0]);
    let whole = png(64, 64, false);
    let cases = [
        (vec![("image", whole[..whole.len() / 2].to_vec())], "image"),
        (vec![("image", claims)], "image"),
        (vec![("image", b"GIF89a".to_vec())], "image"),
        (
            vec![("image[]", whole.clone()), ("image[]", whole)],
            "image",
        ),
        (vec![], "image"),
        (vec![image(), ("mask", png(64, 64, false))], "mask"),
        (vec![image(), ("mask", png(32, 64, true))], "mask"),
        (vec![image(), ("images", b"x".to_vec())], "images"),
    ];
    for (files, param) in cases {
        let (status, text) = post_form(&head, form(&[("prompt", "a fox")], &files)).await;
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (status, &answer["error"]["param"]),
            (400, &json!(param)),
            "{text}"
        );
    }
    let (status, text) = post_form(&head, b"--XX\r\n".to_vec()).await;
    assert!(
        status == 400 && text.contains("multipart/form-data"),
        "{text}"
    );
    // A bomb: a few kilobytes that are 16 million pixels are read, and scaled to what was asked for.
    let bomb = form(
        &[("prompt", "a fox"), ("size", "64x64")],
        &[("image", png(4096, 4096, false))],
    );
    assert!(bomb.len() < 1 << 20, "{}", bomb.len());
    let (status, text) = post_form(&head, bomb).await;
    assert_eq!(status, 200, "{text}");
    let (status, answer) = head
        .post(
            "/v1/images/generations",
            json!({"prompt": "a fox", "image": "AAAA"}),
        )
        .await;
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(
        status == 400 && message.contains("/v1/images/edits"),
        "{message}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_would_ignore_the_image_does_not_get_it() {
    let head = TestHead::start(|_| {}).await;
    let old = Script {
        revision: 1,
        ..draws(Fate::Finish)
    };
    let worker = head.worker("old", old).await;
    let body = json!({"prompt": "a fox", "image": STANDARD.encode(png(64, 64, false))});
    let (status, answer) = head.post(PATH, body).await;
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(
        status == 503 && message.contains("the image to edit"),
        "{message}"
    );
    assert_eq!(worker.requests(), 0);
}
