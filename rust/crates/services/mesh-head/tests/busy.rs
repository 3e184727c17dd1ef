//! A busy worker does not count as dead, and a slow answer does not count as missing.

mod support;

use std::time::{Duration, Instant};

use futures::StreamExt;
use serde_json::json;
use support::{MODEL, Script, TestHead, VECTORS, chat, eventually, streamed, truth};

/// Far less than the requests here wait.
const LIMIT: Duration = Duration::from_millis(600);

fn busy(old: bool) -> Script {
    Script {
        pace: Duration::from_millis(20),
        slots: 1,
        queues: true,
        old,
        ..Script::default()
    }
}

/// While a long answer takes the worker's only slot, a second request waits there far longer than any limit
/// on silence: it gets its answer, `/ready` says yes all the time, and nothing counts as a failure.
async fn a_second_request_waits_its_turn(old: bool) {
    let head = TestHead::start(|config| {
        config.first_token_limit = LIMIT;
        config.request_timeout = Duration::from_secs(2);
        config.worker_timeout = Duration::from_secs(2);
    })
    .await;
    let _worker = head.worker("w", busy(old)).await;
    let long = head.stream("/v1/chat/completions", streamed(chat("long?", 150)));
    let second = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        head.post("/v1/chat/completions", chat("why?", 3)).await
    };
    let watch = async {
        let mut looks = 0;
        loop {
            let (status, body) = head.get("/ready").await;
            assert_eq!(status, 200, "{body}");
            looks += 1;
            tokio::time::sleep(Duration::from_millis(50)).await;
            if looks > 10_000 {
                break;
            }
        }
    };
    let answers = async { tokio::join!(long, second) };
    let (_, (status, answer)) = tokio::select! {
        answers = answers => answers,
        () = watch => panic!("it takes too long"),
    };
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["choices"][0]["message"]["content"], truth("why?", 3));
    let failed = head
        .handle
        .mesh()
        .with_registry(|registry| registry.iter().map(|worker| worker.failed).sum::<u64>());
    assert_eq!(failed, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_waits_in_its_workers_queue_is_answered_and_the_head_stays_ready() {
    a_second_request_waits_its_turn(false).await;
}

/// Texts wait in their worker's queue far longer than any limit on silence: signs of life keep the worker in
/// its place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn texts_that_wait_in_their_workers_queue_are_embedded_there_and_once() {
    let head = TestHead::start(|config| {
        config.first_token_limit = LIMIT;
        config.silence_limit = LIMIT;
        // A worker that only claims to work is not believed for longer.
        config.request_timeout = Duration::from_secs(20);
        config.worker_timeout = Duration::from_secs(2);
    })
    .await;
    let waits = Script {
        embeds: true,
        prefill: 6 * LIMIT,
        ..Script::default()
    };
    let first = head.worker("first", waits.clone()).await;
    let second = head.worker("second", waits).await;
    let asked = json!({ "model": VECTORS, "input": "why?" });
    let (status, answer) = head.post("/v1/embeddings", asked).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["data"][0]["embedding"].as_array().unwrap().len(), 4);
    assert_eq!(first.requests() + second.requests(), 1, "asked once");
    let failed = head
        .handle
        .mesh()
        .with_registry(|registry| registry.iter().map(|worker| worker.failed).sum::<u64>());
    assert_eq!(failed, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_worker_that_reports_a_queue_is_busy_as_well() {
    a_second_request_waits_its_turn(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eleven_long_answers_on_eight_slots_all_come_and_the_head_stays_ready() {
    let head = TestHead::start(|config| config.first_token_limit = LIMIT).await;
    let script = Script {
        slots: 8,
        ..busy(false)
    };
    let worker = head.worker("w", script).await;
    let ask = |number: usize| head.post("/v1/chat/completions", chat(&format!("q{number}"), 120));
    let answers = futures::future::join_all((0..11).map(ask));
    let watch = async {
        loop {
            let (status, body) = head.get("/ready").await;
            assert_eq!(status, 200, "{body}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let answers = tokio::select! {
        answers = answers => answers,
        () = watch => panic!("it ends"),
    };
    assert!(
        answers.iter().all(|(status, _)| *status == 200),
        "{answers:?}"
    );
    assert_eq!(worker.requests(), 11, "none was run again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_begins_at_once_and_says_that_it_lives_until_the_first_token() {
    let head = TestHead::start(|config| {
        config.first_token_limit = LIMIT;
        config.http.keep_alive = Duration::from_millis(200);
    })
    .await;
    let slow = Script {
        prefill: Duration::from_secs(3),
        ..Script::default()
    };
    let _worker = head.worker("w", slow).await;
    let asked = Instant::now();
    let body = streamed(chat("why?", 3)).to_string();
    let url = head.url("/v1/chat/completions");
    let answer = head.http.post(url).body(body).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert!(
        asked.elapsed() < Duration::from_secs(2),
        "headers came late"
    );
    let mut stream = answer.bytes_stream();
    let first = stream.next().await.unwrap().unwrap();
    assert!(
        asked.elapsed() < Duration::from_secs(2),
        "{first:?} came late"
    );
    let mut text = String::from_utf8(first.to_vec()).unwrap();
    while let Some(piece) = stream.next().await {
        text += std::str::from_utf8(&piece.unwrap()).unwrap();
    }
    let comments = text
        .split("\n\n")
        .filter(|event| event.starts_with(": waiting"));
    assert!(comments.count() >= 4, "{text}");
    assert!(text.contains("for its prompt, 1 of 10 tokens"), "{text}");
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_known_at_once_keep_their_status_on_streams() {
    let head = TestHead::start(|_| {}).await;
    let (status, _) = head
        .post("/v1/chat/completions", streamed(chat("why?", 3)))
        .await;
    assert_eq!(status, 503, "no worker");
    let _worker = head.worker("w", Script::default()).await;
    let mut unknown = streamed(chat("why?", 3));
    unknown["model"] = json!("gpt-9");
    let (status, _) = head.post("/v1/chat/completions", unknown).await;
    assert_eq!(status, 404);
    let (status, _) = head
        .post("/v1/chat/completions", streamed(chat("why?", 2001)))
        .await;
    assert_eq!(status, 400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_answer_that_takes_long_shows_life_before_it_comes() {
    let head = TestHead::start(|config| {
        config.http.early_headers = Duration::from_millis(300);
        config.http.keep_alive = Duration::from_millis(100);
    })
    .await;
    let slow = Script {
        prefill: Duration::from_secs(2),
        ..Script::default()
    };
    let _worker = head.worker("w", slow).await;
    let url = head.url("/v1/chat/completions");
    let body = chat("why?", 3).to_string();
    let asked = Instant::now();
    let answer = head.http.post(url).body(body).send().await.unwrap();
    assert!(
        asked.elapsed() < Duration::from_millis(1_800),
        "headers came late"
    );
    let text = answer.text().await.unwrap();
    assert!(text.starts_with("   "), "{text:?}");
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["choices"][0]["message"]["content"], truth("why?", 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_over_udp_does_not_keep_a_chat_from_its_answer() {
    let head = TestHead::start(|_| {}).await;
    let _worker = head.worker("w", busy(false)).await;
    let flood = head.dcf().await;
    for sequence in 0..300 {
        let task = json!({"model": MODEL, "prompt": format!("flood {sequence}"), "max_tokens": 5});
        flood.send(2, sequence, task.to_string().as_bytes()).await;
        if sequence % 20 == 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    eventually("the flood is queued", || async {
        head.handle.mesh().in_flight().0 > 100
    })
    .await;
    let (status, answer) = head.post("/v1/chat/completions", chat("why?", 3)).await;
    assert_eq!(status, 200, "{answer}");
    let (queued, _) = head.handle.mesh().in_flight();
    assert!(queued > 50, "the chat waited for the flood: {queued} left");
}
