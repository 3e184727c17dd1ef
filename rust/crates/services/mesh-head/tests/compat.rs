//! Behaviour of the HTTP port towards clients of other servers, browsers and old peers.

mod support;

use std::process::{Command, Stdio};

use client::send;
use mesh_proto::{Generate, Prompt};
use serde_json::{Value, json};
use support::{
    DcfPeer, MODEL, Script, TestHead, Worker, chat, datagram, eventually, streamed, streamed_text,
    truth,
};

/// Requests with headers of one's own.
mod client {
    use serde_json::Value;

    use super::support::TestHead;

    pub(crate) async fn send(
        head: &TestHead,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<String>,
    ) -> (u16, reqwest::header::HeaderMap, Value) {
        let method = method.parse().unwrap();
        let mut request = head.http.request(method, head.url(path)).body(body.into());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = request.send().await.unwrap();
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        let text = answer.text().await.unwrap();
        let value = serde_json::from_str(&text).unwrap_or(Value::String(text));
        (status, headers, value)
    }
}

const JSON: (&str, &str) = ("content-type", "application/json");

fn last_generate(worker: &Worker) -> Generate {
    worker
        .seen
        .generates
        .lock()
        .unwrap()
        .last()
        .unwrap()
        .clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fields_reach_the_worker_or_are_refused_or_named() {
    let head = TestHead::start(|_| {}).await;
    let worker = head.worker("w", Script::default()).await;
    let mut body = chat("why?", 9);
    let begun = json!({"role": "assistant", "content": "Because"});
    body["messages"].as_array_mut().unwrap().push(begun);
    body["continue_final_message"] = true.into();
    body["chat_template_kwargs"] = json!({"enable_thinking": false});
    body["stop_token_ids"] = json!([7]);
    body["min_tokens"] = 3.into();
    body["frobnicate"] = 1.into();
    body["user"] = "u".into();
    let path = "/v1/chat/completions";
    let (status, headers, answer) = send(&head, "POST", path, &[JSON], body.to_string()).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(headers["x-hydramesh-ignored"], "frobnicate");
    let generate = last_generate(&worker);
    let params = generate.params.unwrap();
    assert_eq!((params.stop_token_ids, params.min_tokens), (vec![7], 3));
    let Some(Prompt::Chat(sent)) = generate.prompt else {
        panic!("no chat");
    };
    assert!(sent.continue_final_message);
    assert_eq!(sent.template_variables, r#"{"enable_thinking":false}"#);
    for (name, value) in [
        ("grammar_lazy", json!(true)),
        ("prompt_logprobs", json!(1)),
        ("mirostat", json!(2)),
    ] {
        let mut body = chat("why?", 5);
        body[name] = value;
        let (status, answer) = head.post(path, body).await;
        assert_eq!(status, 400, "{name} {answer}");
        assert_eq!(answer["error"]["param"], name);
    }
    let schema = json!({"type": "object"});
    for (name, value, text) in [
        (
            "grammar",
            json!("root ::= \"x\""),
            Some("root ::= \"x\"".to_owned()),
        ),
        ("json_schema", schema.clone(), Some(schema.to_string())),
        ("guided_json", json!({}), None),
    ] {
        let mut body = chat("why?", 5);
        body[name] = value;
        let (status, answer) = head.post(path, body).await;
        assert_eq!(status, 200, "{name} {answer}");
        let grammar = last_generate(&worker).params.unwrap().grammar;
        assert_eq!(grammar.map(|grammar| grammar.text), text, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strict_head_refuses_unknown_fields() {
    let head = TestHead::start(|config| config.http.strict = true).await;
    let _worker = head.worker("w", Script::default()).await;
    let mut body = chat("why?", 5);
    body["frobnicate"] = 1.into();
    let (status, answer) = head.post("/v1/chat/completions", body).await;
    assert_eq!(
        (status, &answer["error"]["param"]),
        (400, &json!("frobnicate"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_would_ignore_fields_is_not_asked() {
    let head = TestHead::start(|_| {}).await;
    let old = Script {
        revision: 0,
        ..Script::default()
    };
    let worker = head.worker("old", old).await;
    let mut body = chat("why?", 5);
    assert_eq!(head.post("/v1/chat/completions", body.clone()).await.0, 200);
    body["json_schema"] = json!({"type": "object"});
    let (status, answer) = head.post("/v1/chat/completions", body).await;
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(
        status == 503 && message.contains("older version"),
        "{answer}"
    );
    assert_eq!(worker.requests(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_cannot_use_a_head_without_keys() {
    let head = TestHead::start(|_| {}).await;
    let _worker = head.worker("w", Script::default()).await;
    let port = head.address("http").port();
    let own = format!("http://127.0.0.1:{port}");
    let body = || chat("why?", 5).to_string();
    for (headers, status) in [
        (vec![("host", "evil.example"), JSON], 403),
        (vec![("origin", "https://evil.example"), JSON], 403),
        (vec![("origin", "null"), JSON], 403),
        (vec![("content-type", "text/plain")], 415),
        (
            vec![
                ("host", "evil.example"),
                ("origin", "http://evil.example"),
                ("content-type", "text/plain"),
            ],
            403,
        ),
        (vec![("origin", own.as_str()), JSON], 200),
        (
            vec![
                ("host", "localhost"),
                ("content-type", "application/json; charset=utf-8"),
            ],
            200,
        ),
        (vec![], 200),
    ] {
        let (got, _, answer) = send(&head, "POST", "/v1/chat/completions", &headers, body()).await;
        assert_eq!(got, status, "{headers:?} {answer}");
        if status != 200 {
            assert!(
                answer["error"]["message"].as_str().unwrap().len() > 30,
                "{answer}"
            );
        }
    }
    // Administration, too, before any key is looked at.
    let bearer = format!("Bearer {}", head.admin_key());
    let foreign = [
        ("authorization", bearer.as_str()),
        ("origin", "https://evil.example"),
    ];
    for path in ["/v1/mesh/tokens", "/v1/mesh/drain", "/v1/mesh/rebalance"] {
        assert_eq!(
            send(&head, "POST", path, &foreign, "").await.0,
            403,
            "{path}"
        );
    }
    for (path, status) in [
        ("/v1/mesh", 403),
        ("/metrics", 403),
        ("/health", 200),
        ("/ready", 200),
    ] {
        let (got, ..) = send(&head, "GET", path, &[("host", "evil.example")], "").await;
        assert_eq!(got, status, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_that_are_named_may() {
    let head =
        TestHead::start(|config| config.http.cors = vec!["https://chat.example".parse().unwrap()])
            .await;
    let _worker = head.worker("w", Script::default()).await;
    let origin = ("origin", "https://chat.example");
    let asking = [
        origin,
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization"),
    ];
    let (status, headers, _) = send(&head, "OPTIONS", "/v1/chat/completions", &asking, "").await;
    assert_eq!(
        (status, &headers["access-control-allow-origin"]),
        (200, &"https://chat.example".parse().unwrap())
    );
    assert_eq!(headers["access-control-allow-headers"], "authorization");
    let body = chat("why?", 5).to_string();
    let (status, headers, _) =
        send(&head, "POST", "/v1/chat/completions", &[origin, JSON], body).await;
    assert_eq!(
        (status, &headers["access-control-allow-origin"]),
        (200, &"https://chat.example".parse().unwrap())
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_real_clients_send_is_understood() {
    let head = TestHead::start(|_| {}).await;
    let worker = head.worker("w", Script::default()).await;
    let cut = format!(
        r#"{{"model":"{MODEL}","max_tokens":2.0,"top_k":-1,"messages":[{{"role":"user","content":"smile \ud83d"}}]}}"#
    );
    let (status, _, answer) = send(
        &head,
        "POST",
        "/v1/chat/completions",
        &[JSON],
        format!("\u{feff}{cut}"),
    )
    .await;
    assert_eq!(status, 200, "{answer}");
    let generate = last_generate(&worker);
    assert_eq!(generate.params.unwrap().top_k, Some(0));
    let Some(Prompt::Chat(sent)) = generate.prompt else {
        panic!("no chat");
    };
    assert_eq!(sent.messages[0].content, "smile \u{fffd}");
    let mut unnamed = chat("why?", 2);
    unnamed["model"] = "".into();
    for path in [
        "/v1/chat/completions",
        "/v1/chat/completions/",
        "//v1/chat/completions",
        "/v1/v1/chat/completions",
        "/chat/completions",
    ] {
        let (status, answer) = head.post(path, unnamed.clone()).await;
        assert_eq!((status, &answer["model"]), (200, &json!(MODEL)), "{path}");
    }
    let (status, answer) = head
        .post("/v1/embeddings", json!({"model": "", "input": "x"}))
        .await;
    let without = head.post("/v1/embeddings", json!({"input": "x"})).await;
    assert_eq!((status, answer), without);
    for name in ["openai/tiny", "tiny:latest", "ollama/tiny:latest"] {
        let mut named = chat("why?", 2);
        named["model"] = name.into();
        assert_eq!(
            head.post("/v1/chat/completions", named).await.0,
            200,
            "{name}"
        );
    }
    let long = head
        .post("/v1/chat/completions", chat("why?", 100_000))
        .await;
    let message = long.1["error"]["message"].as_str().unwrap();
    assert!(message.contains("maximum context length is"), "{message}");
    assert_eq!(send(&head, "HEAD", "/v1/models", &[], "").await.0, 200);
    let (status, headers, _) = send(&head, "DELETE", "/v1/models", &[], "").await;
    assert_eq!((status, headers.contains_key("allow")), (405, true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_v5_0_0_worker_alone_answers_a_plain_chat() {
    let head = TestHead::start(|config| config.dcf.legacy_workers = true).await;
    let worker = DcfPeer::toward(head.address("dcf.workers")).await;
    let port = worker.socket.local_addr().unwrap().port();
    worker.send(0x01, 0, port.to_string().as_bytes()).await;
    eventually("ready", || async { head.get("/ready").await.0 == 200 }).await;
    let answering = async {
        for _ in 0..2 {
            let (kind, sequence, payload) = worker.receive().await;
            assert_eq!((kind, payload.as_slice()), (0x02, &b"why?"[..]));
            worker
                .send_raw(&datagram(0x03, sequence, "Because é.".as_bytes()))
                .await;
        }
    };
    let body = json!({"model": "gpt-4", "messages": [{"role": "user", "content": "why?"}]});
    let asking = async {
        let (status, answer) = head.post("/v1/chat/completions", body.clone()).await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["choices"][0]["message"]["content"], "Because é.");
        let events = head
            .stream("/v1/chat/completions", streamed(body.clone()))
            .await;
        assert_eq!(streamed_text(&events), "Because é.");
    };
    tokio::join!(answering, asking);
    let mut more = body;
    more["logprobs"] = true.into();
    assert_eq!(head.post("/v1/chat/completions", more).await.0, 503);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_api_describes_itself_and_metrics_come_as_asked() {
    let head = TestHead::start(|_| {}).await;
    let _worker = head.worker("w", Script::default()).await;
    let (status, answer) = head.post("/v1/chat/completions", chat("why?", 2)).await;
    assert_eq!(
        (status, answer["choices"][0]["message"]["content"].as_str()),
        (200, Some(truth("why?", 2).as_str()))
    );
    let (status, spec) = head.get("/openapi.json").await;
    assert_eq!((status, &spec["openapi"]), (200, &json!("3.1.0")));
    let key = format!("Bearer {}", head.admin_key());
    for (path, operations) in spec["paths"].as_object().unwrap() {
        for (method, other) in [("get", "GET"), ("post", "POST")] {
            let path = path.replace("{name}", MODEL);
            let sent = [("authorization", key.as_str()), JSON];
            let (status, _, answer) = send(&head, other, &path, &sent, "").await;
            let allowed = operations.get(method).is_some();
            assert_eq!(allowed, status != 405, "{method} {path}: {answer}");
            assert_ne!(answer["error"]["code"], "unknown_url", "{path}");
        }
    }
    let open = [(
        "accept",
        "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;q=0.4,*/*;q=0.1",
    )];
    let (_, headers, text) = send(&head, "GET", "/metrics", &open, "").await;
    assert!(
        headers["content-type"]
            .to_str()
            .unwrap()
            .starts_with("application/openmetrics-text")
    );
    assert!(text.as_str().unwrap().ends_with("# EOF\n"));
    let (_, headers, text) = send(&head, "GET", "/metrics", &[("accept", "text/plain")], "").await;
    assert_eq!(
        headers["content-type"],
        "text/plain; version=0.0.4; charset=utf-8"
    );
    check_with_promtool(text.as_str().unwrap());
}

/// Asks Prometheus' own checker, where it is installed.
fn check_with_promtool(text: &str) {
    use std::io::Write as _;

    let mut command = Command::new("promtool");
    command.args(["check", "metrics"]).stdin(Stdio::piped());
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        eprintln!("promtool is not installed: not checked");
        return;
    };
    child
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.trim().is_empty(),
        "{said}\n{text}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_probabilities_of_completions_name_what_was_chosen() {
    let head = TestHead::start(|_| {}).await;
    let _worker = head.worker("w", Script::default()).await;
    let body = json!({"model": MODEL, "prompt": "a", "max_tokens": 3, "logprobs": 0});
    let (_, answer) = head.post("/v1/completions", body).await;
    let logprobs = &answer["choices"][0]["logprobs"];
    for index in 0..3 {
        let token = logprobs["tokens"][index].as_str().unwrap();
        let alternatives: &Value = &logprobs["top_logprobs"][index];
        assert_eq!(
            alternatives[token], logprobs["token_logprobs"][index],
            "{alternatives}"
        );
    }
}
