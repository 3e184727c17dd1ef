//! The OpenAI API over real sockets.

mod support;

use std::sync::atomic::Ordering;
use std::time::Duration;

use mesh_head::config::Open;
use serde_json::{Value, json};
use support::{
    Fate, MODEL, Script, TestHead, chat, eventually, script, streamed, streamed_text, truth,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_are_listed_and_retrieved() {
    let head = TestHead::start(|_| {}).await;
    let _worker = head.worker("w", Script::default()).await;
    let (status, list) = head.get("/v1/models").await;
    assert_eq!(
        (status, &list["object"], &list["data"][0]["id"]),
        (200, &json!("list"), &json!(MODEL))
    );
    let (status, model) = head.get("/v1/models/tiny").await;
    assert_eq!(
        (status, &model["object"], &model["owned_by"]),
        (200, &json!("model"), &json!("hydramesh"))
    );
    assert!(model["created"].as_u64().unwrap() > 1_600_000_000);
    let (status, error) = head.get("/v1/models/gpt-9").await;
    assert_eq!(
        (status, &error["error"]["code"]),
        (404, &json!("model_not_found"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chat_has_the_fields_that_clients_read() {
    let head = TestHead::start(|_| {}).await;
    let _worker = head.worker("w", Script::default()).await;
    let (status, answer) = head.post("/v1/chat/completions", chat("why?", 5)).await;
    assert_eq!(status, 200, "{answer}");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], MODEL);
    assert_eq!(answer["system_fingerprint"], "fp_0123456789ab");
    let choice = &answer["choices"][0];
    assert_eq!(
        choice["message"],
        json!({"role": "assistant", "content": truth("why?", 5), "refusal": null})
    );
    assert_eq!(
        (&choice["finish_reason"], &choice["logprobs"]),
        (&json!("length"), &Value::Null)
    );
    assert_eq!(
        answer["usage"],
        json!({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15,
               "prompt_tokens_details": {"cached_tokens": 4}})
    );
    assert_eq!(
        (&answer["timings"]["worker"], &answer["timings"]["reruns"]),
        (&json!("w"), &json!(0))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_streamed_chat_begins_with_the_role_and_ends_with_usage_and_done() {
    let head = TestHead::start(|_| {}).await;
    let _worker = head.worker("w", Script::default()).await;
    let events = head
        .stream("/v1/chat/completions", streamed(chat("why?", 5)))
        .await;
    assert_eq!(streamed_text(&events), truth("why?", 5));
    let usage: Value = serde_json::from_str(&events[events.len() - 2]).unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 5);
    let first: Value = serde_json::from_str(&events[0]).unwrap();
    assert_eq!(first["object"], "chat.completion.chunk");
    assert!(first["usage"].is_null() && first.as_object().unwrap().contains_key("usage"));
    let plain = head.stream("/v1/chat/completions", json!({"model": MODEL, "stream": true, "messages": [{"role": "user", "content": "why?"}]})).await;
    assert!(plain.iter().all(|event| !event.contains("\"usage\"")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_choices_and_prompts_keep_their_indices() {
    let head = TestHead::start(|_| {}).await;
    let worker = head.worker("w", Script::default()).await;
    let body =
        json!({"model": MODEL, "prompt": ["a", "b"], "n": 2, "max_tokens": 3, "logprobs": 0});
    let (status, answer) = head.post("/v1/completions", body.clone()).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["object"], "text_completion");
    let texts: Vec<&str> = answer["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| choice["text"].as_str().unwrap())
        .collect();
    let (a, b) = (truth("a", 3), truth("b", 3));
    assert_eq!(texts, [&a, &a, &b, &b]);
    assert_eq!(
        answer["usage"]["prompt_tokens"], 20,
        "a prompt counts once, not per choice"
    );
    assert_eq!(answer["usage"]["completion_tokens"], 12);
    assert_eq!(
        answer["choices"][0]["logprobs"]["token_logprobs"],
        json!([-0.5, -0.5, -0.5])
    );
    let seeds: Vec<u64> = worker
        .seen
        .generates
        .lock()
        .unwrap()
        .iter()
        .map(|g| g.params.as_ref().unwrap().seed.unwrap())
        .collect();
    assert_eq!(
        seeds.iter().filter(|seed| **seed == seeds[0]).count(),
        2,
        "the choices of one prompt differ"
    );

    let mut body = body;
    body["stream"] = true.into();
    let mut streamed = vec![String::new(); 4];
    for event in head.stream("/v1/completions", body).await {
        if event != "[DONE]" {
            let chunk: Value = serde_json::from_str(&event).unwrap();
            let choice = &chunk["choices"][0];
            streamed[choice["index"].as_u64().unwrap() as usize] +=
                choice["text"].as_str().unwrap();
        }
    }
    assert_eq!(streamed, [&*a, &a, &b, &b]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_probabilities_come_with_a_chat() {
    let head = TestHead::start(|_| {}).await;
    let _worker = head.worker("w", Script::default()).await;
    let mut body = chat("why?", 2);
    body["logprobs"] = true.into();
    let (_, answer) = head.post("/v1/chat/completions", body).await;
    let content = answer["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(content.len(), 2);
    assert_eq!(content[0]["logprob"], -0.5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_requests_get_errors_that_name_the_field() {
    let head = TestHead::start(|config| config.http.body_limit = 2000).await;
    let _worker = head.worker("w", Script::default()).await;
    let with = |name: &str, value: Value| {
        let mut body = chat("why?", 5);
        body[name] = value;
        body
    };
    let cases = [
        (
            with("temperature", json!(9)),
            400,
            json!("temperature"),
            "invalid_value",
        ),
        (
            with("tools", json!([{"type": "function"}])),
            400,
            json!("tools"),
            "unsupported_parameter",
        ),
        (
            with("messages", json!([])),
            400,
            json!("messages"),
            "invalid_value",
        ),
        (
            with("model", json!("gpt-9")),
            404,
            json!("model"),
            "model_not_found",
        ),
        (
            with("max_tokens", json!(100_000)),
            400,
            Value::Null,
            "context_length_exceeded",
        ),
        (
            with("user", json!("x".repeat(3000))),
            413,
            Value::Null,
            "request_too_large",
        ),
    ];
    for (body, status, param, code) in cases {
        for stream in [false, true] {
            let mut body = body.clone();
            body["stream"] = stream.into();
            let (got, answer) = head.post("/v1/chat/completions", body).await;
            let error = &answer["error"];
            assert_eq!(
                (got, &error["param"], &error["code"]),
                (status, &param, &json!(code)),
                "{answer}"
            );
            assert!(error["message"].as_str().unwrap().len() > 10);
        }
    }
    let broken = head
        .http
        .post(head.url("/v1/chat/completions"))
        .body("{\"model\":")
        .send()
        .await
        .unwrap();
    assert_eq!(broken.status(), 400);
    let (status, answer) = head.get("/v1/models/%ff").await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (400, &json!("invalid_value"))
    );
    for path in [
        "/v1/mesh/tokens",
        "/v1/mesh/tokens/revoke",
        "/v1/mesh/nodes/expel",
        "/v1/mesh/nodes/readmit",
        "/v1/mesh/pins",
        "/v1/mesh/drain",
        "/v1/mesh/undrain",
        "/v1/mesh/rebalance",
    ] {
        let request = head.http.post(head.url(path)).bearer_auth(head.admin_key());
        let answer = request.body("x".repeat(3000)).send().await.unwrap();
        assert_eq!(answer.status(), 413, "{path}");
        let answer: Value = answer.json().await.unwrap();
        assert_eq!(answer["error"]["code"], "request_too_large", "{path}");
    }
    assert_eq!(head.get("/v1/moderations").await.0, 404);
    assert_eq!(head.get("/v1/chat/completions").await.0, 405);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_worker_the_head_is_alive_not_ready_and_says_so() {
    let head = TestHead::start(|_| {}).await;
    assert_eq!(head.get("/health").await.0, 200);
    let (status, ready) = head.get("/ready").await;
    assert_eq!(
        (status, &ready["reason"]),
        (503, &json!("no worker is connected"))
    );
    let answer = head
        .http
        .post(head.url("/v1/chat/completions"))
        .body(chat("why?", 5).to_string())
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 503);
    assert!(answer.headers().contains_key("retry-after"));
    let body: Value = answer.json().await.unwrap();
    assert_eq!(body["error"]["code"], "no_worker");

    let worker = head.worker("w", Script::default()).await;
    assert_eq!(head.get("/ready").await.0, 200);
    worker.die().await;
    eventually("not ready", || async { head.get("/ready").await.0 == 503 }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_wanted_where_they_are_configured() {
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "sk-one\n").unwrap();
    let head =
        TestHead::start(|config| config.http.api_keys_file = Some(keys.path().to_owned())).await;
    let _worker = support::Worker::join(&head, "w", Script::default()).await;
    assert_eq!(head.get("/v1/models").await.0, 401);
    let with = |key: String| {
        head.http
            .get(head.url("/v1/models"))
            .bearer_auth(key)
            .send()
    };
    assert_eq!(with("sk-two".into()).await.unwrap().status(), 401);
    assert_eq!(with("sk-one".into()).await.unwrap().status(), 200);
    assert_eq!(with(head.admin_key()).await.unwrap().status(), 200);
    assert_eq!(head.get("/health").await.0, 200);
    let token = head
        .http
        .post(head.url("/v1/mesh/tokens"))
        .bearer_auth("sk-one")
        .send()
        .await
        .unwrap();
    assert_eq!(token.status(), 401, "an API key does not administer");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_open_is_told_to_those_with_a_key() {
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "sk-one\n").unwrap();
    let paths = ["/metrics", "/ready?model=tiny"];
    for open in [vec![Open::Ready, Open::Metrics], vec![]] {
        let head = TestHead::start(|config| {
            config.http.api_keys_file = Some(keys.path().to_owned());
            config.http.open = open.clone();
        })
        .await;
        assert_eq!(head.get("/health").await.0, 200);
        let (status, body) = head.get("/ready").await;
        assert_eq!((status, &body["status"]), (503, &json!("unready")));
        assert_eq!(body["reason"].is_null(), open.is_empty(), "{body}");
        for path in paths {
            let without = head.get(path).await.0;
            assert_eq!(without == 401, open.is_empty(), "{path}: {without}");
            let with = head.http.get(head.url(path)).bearer_auth("sk-one").send();
            assert_ne!(with.await.unwrap().status(), 401, "{path}");
        }
    }
    let head = TestHead::start(|config| config.http.open = vec![]).await;
    assert_eq!(
        head.get("/metrics").await.0,
        200,
        "without keys all is open"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_away_cancels_its_answer() {
    let head = TestHead::start(|_| {}).await;
    let worker = head
        .worker(
            "w",
            Script {
                pace: Duration::from_millis(20),
                ..Script::default()
            },
        )
        .await;
    for body in [chat("why?", 1000), streamed(chat("why?", 1000))] {
        let before = worker.seen.cancelled.load(Ordering::SeqCst);
        let request = head
            .http
            .post(head.url("/v1/chat/completions"))
            .body(body.to_string());
        let asked = tokio::spawn(async move {
            let mut answer = request.send().await.unwrap();
            while answer.chunk().await.unwrap().is_some() {}
        });
        tokio::time::sleep(Duration::from_millis(300)).await;
        asked.abort();
        eventually("cancelled", || async {
            worker.seen.cancelled.load(Ordering::SeqCst) == before + 1
        })
        .await;
    }
    eventually("free again", || async {
        head.handle.mesh().in_flight() == (0, 0)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_is_503_and_a_greedy_client_429() {
    let slow = Script {
        pace: Duration::from_millis(50),
        slots: 1,
        ..Script::default()
    };
    let head = TestHead::start(|config| (config.queue_limit, config.worker_ahead) = (1, 0)).await;
    let _worker = head.worker("w", slow.clone()).await;
    let ask = || head.post("/v1/chat/completions", chat("why?", 10));
    let answers = futures::future::join_all((0..4).map(|_| ask())).await;
    let count = |status| answers.iter().filter(|answer| answer.0 == status).count();
    assert_eq!((count(200), count(503)), (2, 2), "{answers:?}");
    assert!(
        answers
            .iter()
            .filter(|answer| answer.0 == 503)
            .all(|answer| answer.1["error"]["code"] == "overloaded")
    );

    let head = TestHead::start(|config| config.http.concurrent_requests = 2).await;
    let _worker = head.worker("w", slow).await;
    let ask = || head.post("/v1/chat/completions", chat("why?", 5));
    let answers = futures::future::join_all((0..5).map(|_| ask())).await;
    assert_eq!(
        answers.iter().filter(|answer| answer.0 == 429).count(),
        3,
        "{answers:?}"
    );
    assert_eq!(ask().await.0, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_is_504() {
    let head = TestHead::start(|config| config.answer_limit = Duration::from_millis(400)).await;
    let _worker = head
        .worker(
            "w",
            Script {
                pace: Duration::from_millis(50),
                ..Script::default()
            },
        )
        .await;
    let (status, answer) = head.post("/v1/chat/completions", chat("why?", 1000)).await;
    assert_eq!((status, &answer["error"]["code"]), (504, &json!("timeout")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn request_ids_reach_the_worker_and_come_back() {
    let head = TestHead::start(|_| {}).await;
    let worker = head.worker("w", Script::default()).await;
    let request = head
        .http
        .post(head.url("/v1/chat/completions"))
        .header("x-request-id", "mine-7");
    let answer = request
        .body(chat("why?", 2).to_string())
        .send()
        .await
        .unwrap();
    assert_eq!(answer.headers()["x-request-id"], "mine-7");
    assert_eq!(
        worker.seen.generates.lock().unwrap()[0].request_id,
        "mine-7"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_and_registry_tell_what_happened() {
    let head = TestHead::start(|_| {}).await;
    let _worker = head.worker("w", Script::default()).await;
    head.post("/v1/chat/completions", chat("why?", 5)).await;
    let metrics = head
        .http
        .get(head.url("/metrics"))
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    for line in [
        "hydramesh_head_requests_total{front=\"Http\",outcome=\"Complete\"} 1",
        "hydramesh_head_generated_tokens_total 5",
        "hydramesh_head_time_to_first_token_seconds_count 1",
        "hydramesh_head_workers{kind=\"mesh\"} 1",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    eventually("a sealed heartbeat arrived", || async {
        head.get("/v1/mesh").await.1["workers"][0]["resident_bytes"] == 1234
    })
    .await;
    let (_, mesh) = head.get("/v1/mesh").await;
    let model = &mesh["workers"][0]["models"][0];
    assert_eq!(
        (&model["name"], &model["backend"]),
        (&json!(MODEL), &json!("cuda"))
    );
    let layers = ["device_layers", "cpu_layers"].map(|name| model["split"][name].clone());
    assert_eq!(layers, [json!(20), json!(8)]);
    assert_eq!(mesh["workers"][0]["completed"], 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_worker_gets_nothing_new() {
    let head = TestHead::start(|_| {}).await;
    let one = head.worker("one", Script::default()).await;
    let two = head.worker("two", Script::default()).await;
    let drain = head
        .http
        .post(head.url("/v1/mesh/drain"))
        .bearer_auth(head.admin_key());
    let drained = drain
        .body(json!({"worker": "one"}).to_string())
        .send()
        .await
        .unwrap();
    assert_eq!(drained.status(), 200);
    for _ in 0..6 {
        assert_eq!(
            head.post("/v1/chat/completions", chat("why?", 2)).await.0,
            200
        );
    }
    assert_eq!((one.requests(), two.requests()), (0, 6));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_lets_running_answers_finish_and_takes_nothing_new() {
    let head = TestHead::start(|_| {}).await;
    let _worker = head.worker("w", script(Fate::Finish)).await;
    let (http, url) = (head.http.clone(), head.url("/v1/chat/completions"));
    let running = tokio::spawn(async move {
        let answer = http
            .post(url)
            .body(chat("why?", 100).to_string())
            .send()
            .await
            .unwrap();
        answer.json::<Value>().await.unwrap()
    });
    eventually("it runs", || async {
        head.handle.mesh().in_flight().1 == 1
    })
    .await;
    let client = head.dcf().await;
    let stopping = tokio::spawn(head.handle.shutdown());
    tokio::time::sleep(Duration::from_millis(50)).await;
    client.send(2, 5, b"too late").await;
    let (kind, _, payload) = client.receive().await;
    assert_eq!((kind, payload[0]), (0xFF, 0x43));
    let answer = running.await.unwrap();
    assert_eq!(
        answer["choices"][0]["message"]["content"],
        truth("why?", 100)
    );
    assert_eq!(
        stopping.await.unwrap().unwrap(),
        mesh_service::shutdown::Drained::Finished
    );
}
