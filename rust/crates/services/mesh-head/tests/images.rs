//! Images over HTTP and DCF, across the deaths of workers.

mod support;

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use dcf::ErrorCode;
use dcf::chunk::{Chunk, Reassembler};
use mesh_proto::ImageTask;
use serde_json::{Value, json};
use support::{Fate, MODEL, PICTURES, Script, TestHead, Worker, script, undisturbed};

const PATH: &str = "/v1/images/generations";

fn draws(fate: Fate) -> Script {
    Script {
        draws: true,
        ..script(fate)
    }
}

/// The same as the head makes of a request that leaves all else to the model.
fn task(prompt: &str, seed: u64) -> ImageTask {
    ImageTask {
        prompt: prompt.into(),
        width: 128,
        height: 64,
        steps: 6,
        guidance: 3.0,
        seed,
        ..ImageTask::default()
    }
}

fn file(answer: &Value, index: usize) -> Vec<u8> {
    let encoded = answer["data"][index]["b64_json"].as_str();
    STANDARD.decode(encoded.unwrap_or_default()).unwrap()
}

fn drawn_by(worker: &Worker) -> Vec<ImageTask> {
    worker.seen.images.lock().unwrap().clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_images_come_with_seeds_that_count_up_and_the_models_own_defaults() {
    let head = TestHead::start(|_| {}).await;
    let worker = head.worker("w", draws(Fate::Finish)).await;
    let (status, answer) = head
        .post(PATH, json!({"prompt": "a fox", "seed": 7, "n": 2}))
        .await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(
        (&answer["model"], &answer["size"]),
        (&json!(PICTURES), &json!("128x64"))
    );
    for index in 0..2 {
        assert_eq!(answer["data"][index]["seed"], 7 + index);
        let expected = undisturbed(&task("a fox", 7 + index as u64));
        assert_eq!(file(&answer, index), expected, "{index}");
    }
    assert_eq!(answer["data"][0]["timings"]["worker"], "w");
    let tasks = drawn_by(&worker);
    assert!(
        tasks
            .iter()
            .all(|task| task.sampler == "euler" && task.steps == 6)
    );

    // All else as asked for.
    let asked = json!({
        "model": format!("openai/{PICTURES}"), "prompt": "b", "negative_prompt": "c", "size": "64x64", "steps": 3, "cfg_scale": 1.5,
        "sampler": "DPM++ 2M Karras", "seed": 1,
    });
    let (status, answer) = head.post(PATH, asked).await;
    assert_eq!(
        (status, &answer["size"]),
        (200, &json!("64x64")),
        "{answer}"
    );
    let last = drawn_by(&worker).pop().unwrap();
    assert_eq!((last.width, last.steps, last.guidance), (64, 3, 1.5));
    assert_eq!(
        (&*last.negative_prompt, &*last.sampler, last.karras),
        ("c", "dpmpp_2m", true)
    );
    let metrics = head.http.get(head.url("/metrics")).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    assert!(
        metrics.contains("hydramesh_head_images_total 3"),
        "{metrics}"
    );
    assert!(
        metrics.contains("hydramesh_head_image_steps_total 15"),
        "{metrics}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_goes_on_where_a_failing_worker_left_it() {
    let fates = [
        (Fate::DiesAfter(0), None),
        (Fate::DiesAfter(1), Some(1)),
        (Fate::DiesAfter(3), Some(3)),
        (Fate::DiesAfter(5), Some(5)),
        (Fate::FailsAfter(2, ErrorCode::INFERENCE_FAILED), Some(2)),
        (Fate::FailsAfter(4, ErrorCode::DRAINING), Some(4)),
        (Fate::SilentAfter(2), Some(2)),
        (Fate::Endless, None),
        (Fate::Huge, None),
    ];
    for (fate, resumed) in fates {
        let head = TestHead::start(|config| {
            config.silence_limit = Duration::from_secs(1);
            config.first_token_limit = Duration::from_secs(1);
        })
        .await;
        let first = Script {
            decode_tps: 500.0,
            ..draws(fate)
        };
        let bad = head.worker("bad", first).await;
        let good = head.worker("good", draws(Fate::Finish)).await;
        let mut answer = Value::Null;
        // The faster one has it first, unless it was still slower in the head's eyes.
        for _ in 0..4 {
            let body = json!({"prompt": "a fox", "seed": 5});
            let (status, got) = head.post(PATH, body).await;
            assert_eq!(status, 200, "{fate:?} {got}");
            answer = got;
            assert_eq!(file(&answer, 0), undisturbed(&task("a fox", 5)), "{fate:?}");
            if bad.requests() > 0 {
                break;
            }
        }
        assert!(bad.requests() > 0, "{fate:?}");
        assert_eq!(answer["data"][0]["timings"]["worker"], "good", "{fate:?}");
        let last = drawn_by(&good).pop().unwrap();
        let step = last.resume.map(|step| step.step);
        match fate {
            // What was on its way is lost with the link.
            Fate::DiesAfter(_) => assert!(step <= resumed, "{fate:?} {step:?}"),
            Fate::Endless => {}
            _ => assert_eq!(step, resumed, "{fate:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_tells_of_each_step_and_ends_with_the_image() {
    let head = TestHead::start(|_| {}).await;
    let _worker = head.worker("w", draws(Fate::Finish)).await;
    let body = json!({"prompt": "a fox", "seed": 5, "stream": true, "progress": true});
    let response = head.http.post(head.url(PATH)).body(body.to_string());
    let text = response.send().await.unwrap().text().await.unwrap();
    let mut events = Vec::new();
    for frame in text.split("\n\n") {
        let Some((name, data)) = frame.split_once("\ndata: ") else {
            continue;
        };
        let value: Value = serde_json::from_str(data).unwrap();
        assert_eq!(name, format!("event: {}", value["type"].as_str().unwrap()));
        events.push(value);
    }
    let steps: Vec<&Value> = events[..events.len() - 1]
        .iter()
        .map(|e| &e["step"])
        .collect();
    assert_eq!(
        steps,
        [1, 2, 3, 4, 5, 6]
            .map(Value::from)
            .iter()
            .collect::<Vec<_>>()
    );
    let last = events.last().unwrap();
    assert_eq!(last["type"], "image_generation.completed");
    let image = STANDARD.decode(last["b64_json"].as_str().unwrap()).unwrap();
    assert_eq!(image, undisturbed(&task("a fox", 5)));
    assert!(text.ends_with("data: [DONE]\n\n"));

    let quiet = json!({"prompt": "a fox", "seed": 5, "stream": true});
    let response = head.http.post(head.url(PATH)).body(quiet.to_string());
    let text = response.send().await.unwrap().text().await.unwrap();
    assert!(
        !text.contains("progress") && text.contains("completed"),
        "{text}"
    );
}

/// The events of a streamed answer.
async fn events(head: &TestHead, path: &str, body: Value) -> Vec<Value> {
    let response = head.http.post(head.url(path)).body(body.to_string());
    let text = response.send().await.unwrap().text().await.unwrap();
    let data = text.split("\n\n").filter_map(|frame| {
        let (name, data) = frame.split_once("\ndata: ")?;
        let value: Value = serde_json::from_str(data).unwrap();
        assert_eq!(name, format!("event: {}", value["type"].as_str().unwrap()));
        Some(value)
    });
    data.collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partial_images_come_once_each_across_the_death_of_a_worker() {
    for fate in [Fate::Finish, Fate::DiesAfter(2), Fate::DiesAfter(4)] {
        let head = TestHead::start(|_| {}).await;
        let first = Script {
            decode_tps: 500.0,
            ..draws(fate)
        };
        let _first = head.worker("first", first).await;
        let _other = head.worker("other", draws(Fate::Finish)).await;
        let body = json!({"prompt": "a fox", "seed": 5, "stream": true, "partial_images": 2});
        let events = events(&head, PATH, body).await;
        let types: Vec<&Value> = events.iter().map(|event| &event["type"]).collect();
        let partial = "image_generation.partial_image";
        assert_eq!(
            types,
            [partial, partial, "image_generation.completed"],
            "{fate:?}"
        );
        for (index, event) in events[..2].iter().enumerate() {
            assert_eq!(event["partial_image_index"], index);
            for (field, value) in [
                ("size", "128x64"),
                ("quality", "auto"),
                ("background", "opaque"),
                ("output_format", "png"),
            ] {
                assert_eq!(event[field], value);
            }
            assert!(event["created_at"].as_u64() > Some(0));
            let png = STANDARD
                .decode(event["b64_json"].as_str().unwrap())
                .unwrap();
            let mut reader = png::Decoder::new(std::io::Cursor::new(png))
                .read_info()
                .unwrap();
            let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
            let frame = reader.next_frame(&mut pixels).unwrap();
            assert_eq!((frame.width, frame.height), (128, 64));
            // The scripted worker's previews after steps 2 and 4.
            assert_eq!(pixels[0], 2 * (index as u8 + 1), "{fate:?}");
        }
        let usage = &events[2]["usage"];
        assert_eq!(usage["output_tokens"], 2 * 6, "two squares, six steps");
        assert!(usage["input_tokens"].as_u64() > Some(0), "{usage}");
        let image = STANDARD.decode(events[2]["b64_json"].as_str().unwrap());
        assert_eq!(image.unwrap(), undisturbed(&task("a fox", 5)), "{fate:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_url_gives_the_image_without_a_key_until_its_time_is_over() {
    let head = TestHead::start(|config| config.http.image_lifetime = Duration::from_secs(2)).await;
    let _worker = head.worker("w", draws(Fate::Finish)).await;
    let body = json!({"prompt": "a fox", "seed": 5, "response_format": "url"});
    let (status, answer) = head.post(PATH, body).await;
    assert_eq!(status, 200, "{answer}");
    let url = answer["data"][0]["url"].as_str().unwrap();
    assert!(
        url.starts_with(&head.url("/v1/images/files/")) && url.len() > 80,
        "{url}"
    );
    assert!(answer["data"][0].get("b64_json").is_none());
    let fetched = head.http.get(url).send().await.unwrap();
    assert_eq!(fetched.headers()["content-type"], "image/png");
    let expected = undisturbed(&task("a fox", 5));
    assert_eq!(fetched.bytes().await.unwrap(), expected);
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let gone = head.http.get(url).send().await.unwrap();
    assert_eq!(gone.status(), 404);
    let error: Value = gone.json().await.unwrap();
    assert_eq!(error["error"]["code"], "image_not_found");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_say_what_makes_images_and_what_does_not() {
    let head = TestHead::start(|_| {}).await;
    let _text = head.worker("text", script(Fate::Finish)).await;
    let (status, answer) = head.post(PATH, json!({"prompt": "a fox"})).await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (503, &json!("no_worker"))
    );
    let (status, answer) = head
        .post(PATH, json!({"prompt": "a fox", "model": MODEL}))
        .await;
    assert_eq!(status, 400);
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(message.contains("makes text, not images"), "{message}");
    let _worker = head.worker("w", draws(Fate::Finish)).await;
    let chat = json!({"model": PICTURES, "messages": [{"role": "user", "content": "hi"}]});
    let (status, answer) = head.post("/v1/chat/completions", chat).await;
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(
        status == 400 && message.contains("/v1/images/generations"),
        "{message}"
    );
    let (status, answer) = head
        .post(PATH, json!({"prompt": "a fox", "size": "2048x2048"}))
        .await;
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(
        status == 400 && message.contains("smaller 'size'"),
        "{message}"
    );
    let (_, models) = head.get("/v1/models").await;
    let kinds: Vec<(&Value, &Value)> = models["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| (&model["id"], &model["kind"]))
        .collect();
    assert!(
        kinds.contains(&(&json!(PICTURES), &json!("image"))),
        "{kinds:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dcf_task_with_steps_is_answered_with_the_png_file_in_chunks() {
    let head = TestHead::start(|_| {}).await;
    let _worker = head.worker("w", draws(Fate::Finish)).await;
    let peer = head.dcf().await;
    let task_of_v5_1 = json!({"prompt": "a fox", "steps": 6, "guidance": 3.0, "seed": 5, "width": 512, "height": 512});
    peer.send(0x02, 9, task_of_v5_1.to_string().as_bytes())
        .await;
    let expected = undisturbed(&ImageTask {
        width: 512,
        height: 512,
        ..task("a fox", 5)
    });
    let mut chunks = Reassembler::new(dcf::chunk::Limits::default());
    let file = loop {
        let (kind, sequence, payload) = peer.receive().await;
        assert_eq!(sequence, 9);
        if kind == 0x03 {
            break payload;
        }
        assert_eq!(kind, 0x06, "{}", String::from_utf8_lossy(&payload));
        let payload = payload.into();
        let chunk = Chunk::parse(&payload).unwrap();
        if let Some(whole) = chunks.push(0, &chunk, std::time::Instant::now()).unwrap() {
            break whole.to_vec();
        }
    };
    assert_eq!(file, expected);
    // A kind says it, too; what is wrong is named.
    let wrong = json!({"kind": "image", "prompt": "a fox", "steps": 0});
    peer.send(0x02, 10, wrong.to_string().as_bytes()).await;
    let (kind, _, payload) = peer.receive().await;
    let text = String::from_utf8_lossy(&payload[1..]).into_owned();
    assert!(kind == 0xFF && text.contains("'steps'"), "{text}");
}
