//! Workers die; clients notice nothing, or get a clear error.

mod support;

use std::time::Duration;

use dcf::ErrorCode;
use serde_json::{Value, json};
use support::{
    Fate, Script, TestHead, VECTORS, chat, eventually, script, streamed, streamed_text, truth,
};

const TOKENS: u32 = 30;

/// The text of a streamed chat, with what its last chunk says about reruns.
async fn ask(head: &TestHead, question: &str) -> (String, u64) {
    let events = head
        .stream("/v1/chat/completions", streamed(chat(question, TOKENS)))
        .await;
    let usage: Value = serde_json::from_str(&events[events.len() - 2]).unwrap();
    (
        streamed_text(&events),
        usage["timings"]["reruns"].as_u64().unwrap(),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_goes_on_where_a_failing_worker_left_it() {
    let fates = [
        Fate::DiesAfter(0),
        Fate::DiesAfter(11),
        Fate::DiesAfter(TOKENS - 1),
        Fate::FailsAfter(0, ErrorCode::INFERENCE_FAILED),
        Fate::FailsAfter(7, ErrorCode::INTERNAL),
        Fate::FailsAfter(7, ErrorCode::DRAINING),
        Fate::SilentAfter(5),
    ];
    for fate in fates {
        let head = TestHead::start(|config| config.silence_limit = Duration::from_secs(1)).await;
        // The faster one gets the request first.
        let _bad = head
            .worker(
                "bad",
                Script {
                    decode_tps: 500.0,
                    ..script(fate)
                },
            )
            .await;
        let good = head.worker("good", script(Fate::Finish)).await;
        let answer = ask(&head, "why?").await;
        assert_eq!(answer.0, truth("why?", TOKENS), "{fate:?}");
        let resumed = good.seen.generates.lock().unwrap();
        assert_eq!(resumed.len(), 1, "{fate:?}");
        let before = match fate {
            Fate::DiesAfter(tokens) | Fate::SilentAfter(tokens) | Fate::FailsAfter(tokens, _) => {
                tokens
            }
            Fate::Finish | Fate::Endless | Fate::Huge | Fate::Floods => unreachable!(),
        };
        if !matches!(fate, Fate::DiesAfter(_)) {
            assert_eq!(resumed[0].generated.len(), before as usize, "{fate:?}");
        }
        assert_eq!(
            resumed[0].text_sent as usize,
            truth("why?", resumed[0].generated.len() as u32).len()
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_worker_that_comes_back_finishes_what_it_began() {
    let head = TestHead::start(|_| {}).await;
    let worker = head.worker("w", script(Fate::DiesAfter(10))).await;
    let comes_back = async {
        eventually("gone", || async {
            head.get("/v1/mesh").await.1["workers"] == json!([])
        })
        .await;
        worker.come_back(&head, "w", script(Fate::Finish)).await
    };
    let (answer, _worker) = tokio::join!(ask(&head, "why?"), comes_back);
    assert_eq!(answer, (truth("why?", TOKENS), 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_nobody_comes_back_the_stream_ends_with_an_error() {
    let head = TestHead::start(|config| config.rejoin_grace = Duration::from_millis(300)).await;
    let _worker = head.worker("w", script(Fate::DiesAfter(10))).await;
    let events = head
        .stream("/v1/chat/completions", streamed(chat("why?", TOKENS)))
        .await;
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "no_worker");
    assert!(
        events.iter().all(|event| event != "[DONE]"),
        "a broken answer does not look complete"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_kills_every_worker_is_given_up() {
    let head = TestHead::start(|config| config.max_reruns = 2).await;
    let fails = script(Fate::FailsAfter(0, ErrorCode::INFERENCE_FAILED));
    let _workers = [
        head.worker("a", fails.clone()).await,
        head.worker("b", fails).await,
    ];
    let (status, answer) = head
        .post("/v1/chat/completions", chat("why?", TOKENS))
        .await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (502, &json!("workers_failed"))
    );
    assert!(
        answer["error"]["message"]
            .as_str()
            .unwrap()
            .contains("3 attempts at this request failed on 2 workers"),
        "{answer}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_fails_on_texts_is_blamed_when_another_one_embeds_them() {
    let head = TestHead::start(|_| {}).await;
    let embeds = |fate| Script {
        embeds: true,
        ..script(fate)
    };
    // The one that joined first is asked first.
    let fails = Fate::FailsAfter(0, ErrorCode::INFERENCE_FAILED);
    let bad = head.worker("bad", embeds(fails)).await;
    let _good = head.worker("good", embeds(Fate::Finish)).await;
    while bad.requests() == 0 {
        let asked = json!({"model": VECTORS, "input": "why?"});
        let (status, answer) = head.post("/v1/embeddings", asked).await;
        assert_eq!(status, 200, "{answer}");
    }
    let metrics = head.http.get(head.url("/metrics")).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    let blamed = "hydramesh_head_worker_faults_total{worker=\"bad\"} 1";
    assert!(metrics.contains(blamed), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_chats_survive_the_death_of_one_of_two_workers() {
    let head = TestHead::start(|_| {}).await;
    let slots = |fate| Script {
        slots: 16,
        ..script(fate)
    };
    let one = head.worker("one", slots(Fate::Finish)).await;
    let two = head.worker("two", slots(Fate::Finish)).await;
    let questions: Vec<String> = (0..100)
        .map(|number| format!("question {number}"))
        .collect();
    let chats = futures::future::join_all(questions.iter().map(|question| ask(&head, question)));
    let death = async {
        tokio::time::sleep(Duration::from_millis(250)).await;
        one.die().await;
    };
    let (answers, ()) = tokio::join!(chats, death);
    for (question, (text, _)) in questions.iter().zip(&answers) {
        assert_eq!(*text, truth(question, TOKENS), "{question}");
    }
    let reruns: u64 = answers.iter().map(|(_, reruns)| reruns).sum();
    assert!(reruns > 0, "nobody was hit");
    // An attempt on a link that is just breaking may never reach its worker.
    let attempts = one.requests() + two.requests();
    assert!(
        (100..=100 + reruns as usize).contains(&attempts),
        "{attempts} attempts, {reruns} reruns"
    );
    eventually("all is free", || async {
        head.handle.mesh().in_flight() == (0, 0)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn later_turns_go_to_the_worker_that_has_the_cache() {
    let head = TestHead::start(|_| {}).await;
    let one = head.worker("one", Script::default()).await;
    let two = head.worker("two", Script::default()).await;
    let long = "word ".repeat(400);
    let mut messages = vec![json!({"role": "user", "content": long})];
    for turn in 0..6 {
        let body = json!({"messages": messages, "max_tokens": 3});
        let (status, answer) = head.post("/v1/chat/completions", body).await;
        assert_eq!(status, 200);
        messages.push(answer["choices"][0]["message"].clone());
        messages.push(json!({"role": "user", "content": format!("turn {turn}")}));
    }
    let counts = [one.requests(), two.requests()];
    assert!(counts.contains(&6), "{counts:?}");
}
