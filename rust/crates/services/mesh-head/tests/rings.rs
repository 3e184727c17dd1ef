//! Models that no single worker holds: rings over real links.

mod support;

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};
use support::ring::RingWorker;
use support::{
    Fate, MODEL, Script, TestHead, chat, eventually, script, streamed, streamed_text, truth,
};

const TOKENS: u32 = 30;

async fn start(change: impl FnOnce(&mut mesh_head::Config)) -> TestHead {
    TestHead::start(|config| {
        config.ring.gather = Duration::from_millis(200);
        // One context of KV rows, so that a layer takes 10 MiB.
        config.ring.slots = 1;
        config.ring.stages = 2;
        change(config);
    })
    .await
}

impl TestHead {
    async fn ring_worker(&self, name: &str, layers: u64) -> RingWorker {
        RingWorker::join(self, name, layers, script(Fate::Finish)).await
    }

    async fn ring(&self) -> Value {
        self.get("/v1/mesh").await.1["rings"][0].clone()
    }

    async fn until_serving(&self) {
        eventually("the ring serves", || async {
            self.get(&format!("/ready?model={MODEL}")).await.0 == 200
        })
        .await;
    }

    /// The ring serves, and every stage has a standby that is loaded.
    async fn until_covered(&self) {
        self.until_serving().await;
        eventually("every stage has a standby", || async {
            let ring = self.ring().await;
            let stages = ring["stages"].as_array().unwrap();
            stages
                .iter()
                .all(|stage| stage["standby"]["phase"] == "ready")
        })
        .await;
    }

    async fn admin(&self, path: &str, body: Value) -> (u16, Value) {
        let request = self.http.post(self.url(path)).bearer_auth(self.admin_key());
        let answer = request.body(body.to_string()).send().await.unwrap();
        (answer.status().as_u16(), answer.json().await.unwrap())
    }

    async fn ask(&self, question: &str) -> (String, u64) {
        let events = self
            .stream("/v1/chat/completions", streamed(chat(question, TOKENS)))
            .await;
        let usage: Value = serde_json::from_str(&events[events.len() - 2]).unwrap();
        (
            streamed_text(&events),
            usage["timings"]["reruns"].as_u64().unwrap(),
        )
    }

    async fn metric(&self, line: &str) -> bool {
        let metrics = self.http.get(self.url("/metrics")).send().await.unwrap();
        metrics.text().await.unwrap().contains(line)
    }
}

/// The worker that a ring names as member of a stage.
fn member<'a>(ring: &Value, stage: usize, workers: &'a [RingWorker]) -> &'a RingWorker {
    let id = ring["stages"][stage]["member"]["node_id"].as_str().unwrap();
    workers.iter().find(|worker| worker.node_id == id).unwrap()
}

fn standby<'a>(ring: &Value, stage: usize, workers: &'a [RingWorker]) -> &'a RingWorker {
    let id = ring["stages"][stage]["standby"]["node_id"]
        .as_str()
        .unwrap();
    workers.iter().find(|worker| worker.node_id == id).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_two_workers_hold_together_is_served() {
    let head = start(|config| config.ring.gather = Duration::from_secs(1)).await;
    let (status, body) = head.get("/ready").await;
    assert_eq!(
        (status, &body["reason"]),
        (503, &json!("no worker is connected"))
    );
    let workers = [
        head.ring_worker("a", 7).await,
        head.ring_worker("b", 7).await,
    ];
    eventually("both have offered", || async {
        head.get("/v1/mesh").await.1["unformed"] == json!([])
    })
    .await;
    // It comes before the ring does, and waits.
    let (status, answer) = head.post("/v1/chat/completions", chat("why?", 5)).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["choices"][0]["message"]["content"], truth("why?", 5));
    let ring = head.ring().await;
    assert_eq!(
        (&ring["model"], &ring["state"], &ring["epoch"]),
        (&json!(MODEL), &json!("serving"), &json!(1))
    );
    assert_eq!(ring["stages"][0]["layers"], json!([0, 6]));
    assert_eq!(ring["stages"][1]["member"]["step_ms"], json!(1.5));
    let driver = member(&ring, 1, &workers);
    assert_eq!(driver.generates().len(), 1);
    let told = workers.each_ref().map(|worker| worker.ring().unwrap());
    assert_eq!(told[0], told[1], "both were told the same");
    head.until_serving().await;
    let (_, models) = head.get("/v1/models").await;
    assert_eq!(models["data"][0]["id"], MODEL);
    eventually("both stages are counted", || {
        head.metric("ring_stages{model=\"tiny\",part=\"member\",phase=\"ready\"} 2")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_goes_on_when_the_driver_dies() {
    let head = start(|_| {}).await;
    let workers = [
        head.ring_worker("a", 7).await,
        head.ring_worker("b", 7).await,
        head.ring_worker("s", 14).await,
    ];
    head.until_covered().await;
    let ring = head.ring().await;
    let (driver, next) = (member(&ring, 1, &workers), standby(&ring, 1, &workers));
    let death = async {
        eventually("it runs", || async { !driver.generates().is_empty() }).await;
        tokio::time::sleep(Duration::from_millis(60)).await;
        driver.die().await;
    };
    let (answer, ()) = tokio::join!(head.ask("why?"), death);
    assert_eq!(answer, (truth("why?", TOKENS), 1));
    let resumed = next.generates();
    assert_eq!(resumed.len(), 1);
    assert!(
        !resumed[0].generated.is_empty(),
        "it continues after the tokens so far"
    );
    let ring = head.ring().await;
    assert_eq!(ring["epoch"], 2);
    for worker in workers
        .iter()
        .filter(|worker| worker.node_id != driver.node_id)
    {
        assert_eq!(worker.ring().unwrap().epoch, 2);
    }
    assert!(head.metric("ring_failovers_total{model=\"tiny\"} 1").await);
    assert!(head.metric("ring_gap_seconds_count{model=\"tiny\"}").await);
    let (_, mesh) = head.get("/v1/mesh").await;
    assert_eq!(mesh["recoveries"][0]["epoch"], 2, "{mesh}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_outlasts_a_recovery_that_takes_longer_than_the_silence_limit() {
    let head = start(|config| config.silence_limit = Duration::from_millis(300)).await;
    let workers = [
        head.ring_worker("a", 7).await,
        head.ring_worker("b", 7).await,
        head.ring_worker("s", 14).await,
    ];
    head.until_covered().await;
    let ring = head.ring().await;
    let (driver, next) = (member(&ring, 1, &workers), standby(&ring, 1, &workers));
    next.hold.store(true, Ordering::SeqCst);
    let trouble = async {
        eventually("it runs", || async { !driver.generates().is_empty() }).await;
        driver.die().await;
        tokio::time::sleep(Duration::from_millis(1200)).await;
        let (status, body) = head.get("/ready").await;
        assert_eq!(status, 503, "{body}");
        assert!(
            body["reason"]
                .as_str()
                .unwrap()
                .contains("the ring of tiny is recovering"),
            "{body}"
        );
        let (_, models) = head.get("/v1/models").await;
        assert_eq!(models["data"][0]["id"], MODEL, "it is a model all the same");
        next.hold.store(false, Ordering::SeqCst);
    };
    // One that runs, and one that comes while nobody serves.
    let late = async {
        eventually("it is dead", || async { head.ring().await["epoch"] == 2 }).await;
        head.ask("later?").await
    };
    let (answer, later, ()) = tokio::join!(head.ask("why?"), late, trouble);
    assert_eq!(answer, (truth("why?", TOKENS), 1));
    assert_eq!(later, (truth("later?", TOKENS), 0));
    assert_eq!(
        head.ring().await["epoch"],
        2,
        "nobody was suspected for a silence that has a reason"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_that_falls_silent_is_replaced() {
    let head = start(|config| config.silence_limit = Duration::from_secs(1)).await;
    let silent = script(Fate::SilentAfter(5));
    let mut workers = vec![head.ring_worker("s", 14).await];
    for name in ["a", "b"] {
        workers.push(RingWorker::join(&head, name, 7, silent.clone()).await);
    }
    head.until_covered().await;
    let ring = head.ring().await;
    let driver = member(&ring, 1, &workers);
    assert_eq!(head.ask("why?").await, (truth("why?", TOKENS), 1));
    let (_, mesh) = head.get("/v1/mesh").await;
    assert_eq!(mesh["rings"][0]["epoch"], 2);
    let reason = mesh["rings"][0]["reason"].as_str().unwrap();
    assert!(
        reason.contains(&driver.name) && reason.contains("no more tokens"),
        "{reason}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_lives_is_replaced_only_if_a_new_link_does_not_help() {
    let head = start(|_| {}).await;
    let workers = [
        head.ring_worker("a", 7).await,
        head.ring_worker("b", 7).await,
        head.ring_worker("s", 14).await,
    ];
    head.until_covered().await;
    let ring = head.ring().await;
    let (first, driver, spare) = (
        member(&ring, 0, &workers),
        member(&ring, 1, &workers),
        standby(&ring, 0, &workers),
    );
    driver.complain(&[first]);
    eventually("all make new links", || async {
        let ring = head.ring().await;
        let told = first.ring().unwrap().epoch == 2 && driver.ring().unwrap().epoch == 2;
        told && ring["epoch"] == 2 && ring["stages"][0]["member"]["node_id"] == first.node_id
    })
    .await;
    head.until_serving().await;
    driver.complain(&[first]);
    eventually("the standby has the stage", || async {
        let ring = head.ring().await;
        ring["epoch"] == 3 && ring["stages"][0]["member"]["node_id"] == spare.node_id
    })
    .await;
    eventually("the suspect is told, too", || async {
        first.ring().unwrap().epoch == 3
    })
    .await;
    assert_eq!(head.ask("why?").await, (truth("why?", TOKENS), 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_anybody_to_take_over_requests_hear_why_and_a_node_that_comes_back_is_used() {
    let head = start(|config| config.rejoin_grace = Duration::from_millis(300)).await;
    let workers = [
        head.ring_worker("a", 7).await,
        head.ring_worker("b", 7).await,
    ];
    head.until_serving().await;
    let lost = &workers[0];
    lost.die().await;
    eventually("the ring is gone", || async { head.ring().await.is_null() }).await;
    let (status, answer) = head.post("/v1/chat/completions", chat("why?", 5)).await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (503, &json!("no_worker"))
    );
    let text = answer["error"]["message"].as_str().unwrap();
    assert!(text.contains("add a node"), "{text}");
    let (_, mesh) = head.get("/v1/mesh").await;
    assert_eq!(mesh["unformed"][0]["model"], MODEL);
    let other = workers[1].ring().unwrap();
    assert!(
        other.stages.is_empty() && other.reason.contains("worker a is lost"),
        "{}",
        other.reason
    );

    let back = lost.come_back(&head, 7, script(Fate::Finish)).await;
    eventually("its offer is there", || async {
        head.get("/v1/mesh").await.1["unformed"] == json!([])
    })
    .await;
    let (status, answer) = head.post("/v1/chat/completions", chat("why?", 5)).await;
    assert_eq!(status, 200, "{answer}");
    assert!(back.ring().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_member_hands_over_and_an_undrained_one_is_used_again() {
    let head = start(|_| {}).await;
    let workers = [
        head.ring_worker("a", 7).await,
        head.ring_worker("b", 7).await,
        head.ring_worker("s", 14).await,
    ];
    head.until_covered().await;
    let ring = head.ring().await;
    let (driver, spare) = (member(&ring, 1, &workers), standby(&ring, 1, &workers));
    let drained = async {
        eventually("it runs", || async { !driver.generates().is_empty() }).await;
        let (status, body) = head
            .admin("/v1/mesh/drain", json!({"worker": driver.name}))
            .await;
        assert_eq!((status, &body["draining"]), (200, &json!(true)), "{body}");
    };
    let (answer, ()) = tokio::join!(head.ask("why?"), drained);
    assert_eq!(answer, (truth("why?", TOKENS), 0), "a move is no failure");
    eventually("it holds nothing", || async {
        let (_, mesh) = head.get("/v1/mesh").await;
        let workers = mesh["workers"].as_array().unwrap();
        let worker = workers
            .iter()
            .find(|worker| worker["name"] == driver.name.as_str())
            .unwrap();
        worker["state"] == "draining" && worker["holds"] == json!([])
    })
    .await;
    let ring = head.ring().await;
    assert_eq!(ring["stages"][1]["member"]["node_id"], spare.node_id);

    // Now that nobody else has room, the next one stays where it is.
    let first = member(&ring, 0, &workers);
    let (status, body) = head
        .admin("/v1/mesh/drain", json!({"worker": spare.name}))
        .await;
    assert_eq!(
        (status, &body["error"]["code"]),
        (409, &json!("no_room")),
        "{body}"
    );
    assert!(
        body["error"]["message"]
            .as_str()
            .unwrap()
            .contains("nothing was changed"),
        "{body}"
    );
    assert_eq!(
        head.ring().await["stages"][0]["member"]["node_id"],
        first.node_id
    );

    let (status, body) = head
        .admin("/v1/mesh/undrain", json!({"worker": driver.name}))
        .await;
    assert_eq!((status, &body["draining"]), (200, &json!(false)), "{body}");
    eventually("it has a stage again", || async {
        let rings = head.get("/v1/mesh").await.1["rings"].to_string();
        rings.contains(&driver.node_id)
    })
    .await;
    let (status, _) = head
        .admin("/v1/mesh/drain", json!({"worker": "nobody"}))
        .await;
    assert_eq!(status, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_faster_worker_takes_over_while_running_answers_end_where_they_are() {
    let head = start(|config| config.ring.stages = 0).await;
    let workers = [
        head.ring_worker("a", 7).await,
        head.ring_worker("b", 7).await,
    ];
    head.until_serving().await;
    let old = head.ring().await;
    let driver = member(&old, 1, &workers);
    let newcomer = async {
        eventually("it runs", || async { !driver.generates().is_empty() }).await;
        let fast =
            RingWorker::join_with_speed(&head, "fast", 13, 100.0, script(Fate::Finish)).await;
        eventually("the new ring is formed", || async { fast.ring().is_some() }).await;
        eventually("new requests go there", || async {
            head.post("/v1/chat/completions", chat("new?", 2)).await.0 == 200
                && !fast.generates().is_empty()
        })
        .await;
        fast
    };
    let long = chat("why?", 300);
    let (events, fast) = tokio::join!(
        head.stream("/v1/chat/completions", streamed(long)),
        newcomer
    );
    assert_eq!(streamed_text(&events), truth("why?", 300));
    assert_eq!(
        driver
            .generates()
            .iter()
            .filter(|asked| asked.generated.is_empty())
            .count(),
        driver.generates().len()
    );
    let usage: Value = serde_json::from_str(&events[events.len() - 2]).unwrap();
    assert_eq!(
        (&usage["timings"]["reruns"], &usage["timings"]["worker"]),
        (&json!(0), &json!(driver.name))
    );
    eventually("the old ring is dissolved", || async {
        let rings = head.get("/v1/mesh").await.1["rings"]
            .as_array()
            .unwrap()
            .clone();
        rings.len() == 1 && rings[0]["stages"][0]["member"]["node_id"] == fast.node_id
    })
    .await;
    let told = driver.ring().unwrap();
    assert!(
        told.stages.is_empty() && told.reason.starts_with("moved"),
        "{}",
        told.reason
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ring_that_ends_for_a_better_one_takes_its_requests_along() {
    let head = start(|config| {
        config.ring.stages = 0;
        config.max_reruns = 0;
    })
    .await;
    let workers = [
        head.ring_worker("a", 7).await,
        head.ring_worker("b", 7).await,
    ];
    head.until_serving().await;
    let old = head.ring().await;
    let (first, driver) = (member(&old, 0, &workers), member(&old, 1, &workers));
    // The driver comes to hold the whole model faster than both: it cannot serve the model twice.
    let better = async {
        eventually("it runs", || async { !driver.generates().is_empty() }).await;
        driver.offer_again(13, 100.0);
        eventually("the ring moved", || async {
            let ring = head.ring().await;
            ring["ring"] != old["ring"] && ring["state"] == "serving"
        })
        .await;
    };
    let long = chat("why?", 300);
    let (events, ()) = tokio::join!(head.stream("/v1/chat/completions", streamed(long)), better);
    assert_eq!(
        streamed_text(&events),
        truth("why?", 300),
        "without a rerun to spare"
    );
    let asked = driver.generates();
    assert!(asked.len() >= 2 && !asked[asked.len() - 1].generated.is_empty());
    assert!(first.ring().unwrap().stages.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plans_and_comparisons_are_shown_to_administrators_only() {
    let head = start(|config| config.ring.stages = 0).await;
    let _workers = [
        head.ring_worker("a", 7).await,
        head.ring_worker("b", 7).await,
    ];
    head.until_serving().await;
    let path = format!("/v1/mesh/plan?model={MODEL}");
    assert_eq!(head.get(&path).await.0, 401);
    let plan = async |path: String| {
        let request = head.http.get(head.url(&path)).bearer_auth(head.admin_key());
        let answer = request.send().await.unwrap();
        (
            answer.status().as_u16(),
            answer.json::<Value>().await.unwrap(),
        )
    };
    let (status, body) = plan(path).await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(body["plan"]["stages"].as_array().unwrap().len(), 2);
    let text = body["text"].as_str().unwrap();
    assert!(
        text.contains("STANDBY") && text.contains("one token"),
        "{text}"
    );
    let (status, body) = plan("/v1/mesh/plan?model=gpt-9".into()).await;
    assert_eq!(status, 404);
    assert!(
        body["error"]["message"]
            .as_str()
            .unwrap()
            .contains("`ring.models`"),
        "{body}"
    );
    assert_eq!(plan("/v1/mesh/plan".into()).await.0, 400);

    let (status, body) = head
        .admin("/v1/mesh/rebalance", json!({"dry_run": true}))
        .await;
    assert_eq!(status, 200, "{body}");
    let compared = &body["rings"][0];
    assert!(
        compared["gain"].as_f64().unwrap().abs() < 0.01,
        "{compared}"
    );
    assert!(
        compared["verdict"].as_str().unwrap().starts_with("nothing"),
        "{compared}"
    );
    let (status, body) = head
        .admin("/v1/mesh/rebalance", json!({"model": "gpt-9"}))
        .await;
    assert_eq!(
        (status, &body["error"]["code"]),
        (409, &json!("cannot_rebalance"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readiness_is_told_for_one_model() {
    let head = start(|_| {}).await;
    let _whole = head.worker("w", Script::default()).await;
    assert_eq!(head.get("/ready?model=tiny").await.0, 200);
    let (status, body) = head.get("/ready?model=gpt-9").await;
    assert_eq!(
        (status, &body["reason"]),
        (503, &json!("no worker serves gpt-9"))
    );
    let (status, body) = head.get("/ready").await;
    assert_eq!((status, body), (200, json!({"status": "ready"})));
}

/// Workers of earlier versions compare what the head calls a worker with the key of its certificate, and newer ones with its
/// identity.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_of_both_versions_serve_a_ring_and_each_knows_the_others_as_it_can() {
    let head = start(|_| {}).await;
    let earlier = RingWorker::join_earlier(&head, "old", 7, script(Fate::Finish)).await;
    let newer = head.ring_worker("new", 7).await;
    head.until_serving().await;
    let (text, _) = head.ask("why?").await;
    assert_eq!(text, truth("why?", TOKENS));
    let members = |worker: &RingWorker| {
        let stages = worker.ring().unwrap().stages.into_iter();
        let mut ids: Vec<String> = stages.map(|stage| stage.member.unwrap().node_id).collect();
        ids.sort_unstable();
        ids
    };
    let sorted = |mut ids: [String; 2]| {
        ids.sort_unstable();
        ids
    };
    let by_identity = sorted([earlier.node_id.clone(), newer.node_id.clone()]);
    let by_key = sorted([earlier.key_id(), newer.key_id()]);
    assert_ne!(by_identity, by_key);
    assert_eq!(members(&newer), by_identity);
    assert_eq!(members(&earlier), by_key);
}
