//! Workers that joined and lie, beside honest ones.

mod support;

use std::time::{Duration, Instant};

use dcf::ErrorCode;
use serde_json::{Value, json};
use support::{
    Fate, Script, TestHead, Worker, chat, eventually, script, streamed, streamed_text, truth,
};

async fn shown(head: &TestHead, name: &str) -> Value {
    let (_, mesh) = head.get("/v1/mesh").await;
    let workers = mesh["workers"].as_array().unwrap();
    let found = workers.iter().find(|worker| worker["name"] == name);
    found.cloned().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_liar_gets_no_request_and_is_out_within_30_s() {
    let head = TestHead::start(|_| {}).await;
    let _honest = [
        head.worker("one", script(Fate::Finish)).await,
        head.worker("two", script(Fate::Finish)).await,
    ];
    let lies = Script {
        lies: true,
        decode_tps: 1e6,
        slots: 1000,
        ..script(Fate::Finish)
    };
    let joined = Instant::now();
    let liar = Worker::join(&head, "liar", lies.clone()).await;
    let out = async {
        eventually("the liar is out", || async {
            let (_, mesh) = head.get("/v1/mesh").await;
            mesh["quarantined"][0]["name"] == "liar"
        })
        .await;
    };
    let asks = async {
        for number in 0..30 {
            let question = format!("question {number}");
            let (status, answer) = head.post("/v1/chat/completions", chat(&question, 3)).await;
            assert_eq!(status, 200, "{answer}");
            let text = &answer["choices"][0]["message"]["content"];
            assert_eq!(*text, truth(&question, 3));
        }
    };
    tokio::join!(out, asks);
    assert!(joined.elapsed() < Duration::from_secs(30));
    assert_eq!(liar.requests(), 0, "it saw a client's prompt");
    let again = liar.come_back(&head, "liar", lies).await;
    eventually("it is there, and out", || async {
        shown(&head, "liar").await["state"] == "quarantined"
    })
    .await;
    let (_, mesh) = head.get("/v1/mesh").await;
    let warnings = mesh["warnings"].to_string();
    assert!(warnings.contains("`liar` is in quarantine"), "{warnings}");
    let metrics = head.http.get(head.url("/metrics")).send().await.unwrap();
    let text = metrics.text().await.unwrap();
    let counted = "hydramesh_head_worker_quarantines_total{worker=\"liar\"} 1";
    assert!(text.contains(counted), "{text}");
    let (status, _) = head.post("/v1/chat/completions", chat("why?", 3)).await;
    assert_eq!((status, again.requests()), (200, 0));
    for name in ["one", "two"] {
        assert_eq!(shown(&head, name).await["state"], "ready");
    }
    // An operator who knows better ends it.
    let readmit = || async {
        let request = head.http.post(head.url("/v1/mesh/nodes/readmit"));
        let body = json!({ "node": "liar" });
        let request = request.bearer_auth(head.admin_key()).json(&body);
        request.send().await.unwrap().status().as_u16()
    };
    assert_eq!(readmit().await, 200);
    assert_ne!(shown(&head, "liar").await["state"], "quarantined");
    let (_, mesh) = head.get("/v1/mesh").await;
    assert_eq!(mesh["quarantined"], json!([]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_get_the_right_answer_whatever_one_worker_does_to_their_requests() {
    let fates = [
        Fate::FailsAfter(0, ErrorCode::INVALID_PAYLOAD),
        Fate::FailsAfter(0, ErrorCode::CONTEXT_TOO_LONG),
        Fate::Endless,
        Fate::Huge,
        Fate::Floods,
    ];
    for fate in fates {
        let head = TestHead::start(|_| {}).await;
        // The faster one gets the request first.
        let fast = Script {
            decode_tps: 1000.0,
            ..script(fate)
        };
        let bad = head.worker("bad", fast).await;
        let slow = Script {
            decode_tps: 50.0,
            ..script(Fate::Finish)
        };
        let _good = head.worker("good", slow).await;
        let events = head
            .stream("/v1/chat/completions", streamed(chat("why?", 10)))
            .await;
        assert_eq!(streamed_text(&events), truth("why?", 10), "{fate:?}");
        assert_eq!(bad.requests(), 1, "{fate:?}");
        let failed = shown(&head, "bad").await["failed"].as_u64();
        assert_eq!(failed, Some(1), "{fate:?}");
        // Nobody accepts this one: a second worker confirms that, and nobody is to blame.
        let (status, answer) = head.post("/v1/chat/completions", chat("why?", 2001)).await;
        assert_eq!(
            (status, &answer["error"]["code"]),
            (400, &json!("context_length_exceeded")),
            "{fate:?}"
        );
        assert_eq!(shown(&head, "good").await["failed"], 0, "{fate:?}");
    }
}
