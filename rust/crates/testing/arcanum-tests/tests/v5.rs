//! Peers of DCF v5.0.0 and v5.1 over raw sockets against our head, shim and worker.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use arcanum_tests::alone;
use mesh_testkit::v5::{Datagram, HEALTH, RESULT, SHUTDOWN, V5Client, V5Head, V5Worker, Wire};
use mesh_testkit::{Launcher, Mesh, paths};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);
const SILENCE: Duration = Duration::from_millis(700);
const ADMIT_OLD_WORKERS: &str = "[dcf]\nlegacy_workers = true\n";
/// A plain prompt cannot say how long its answer may be.
const SHORT_ANSWERS: &str = "threads = 1\n[sampling]\nmax_tokens = 16\ntemperature = 0.0\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_gets_exactly_one_datagram_with_its_own_sequence() -> Result<()> {
    let _alone = alone();
    let mesh = Mesh::builder()
        .workers(1)
        .worker_config(SHORT_ANSWERS)
        .shim()
        .start()
        .await?;
    let head = mesh.head.address("dcf.clients")?;
    let shim = mesh.shim.as_ref().context("a shim")?.address("ingress")?;
    for target in [head, shim] {
        let client = V5Client::new(target)?;
        let plain = client.ask(7, "What is the capital of France?", LIMIT)?;
        ensure!(plain.kind == RESULT, "{plain:?}");
        ensure!(!plain.text().trim().is_empty(), "an empty answer");
        let with_parameters =
            json!({"prompt": "Say hello.", "max_tokens": 4, "steps": 25, "guidance": 7.5});
        let answer = client.ask(u32::MAX, &with_parameters.to_string(), LIMIT)?;
        ensure!(answer.kind == RESULT, "{answer:?}");
        let more = client.receive(SILENCE)?;
        ensure!(more.is_none(), "a second datagram came: {more:?}");
    }
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_clients_with_one_sequence_at_once_each_get_their_own_answer() -> Result<()> {
    let _alone = alone();
    let mesh = Mesh::builder()
        .workers(1)
        .worker_config(SHORT_ANSWERS)
        .shim()
        .start()
        .await?;
    let head = mesh.head.address("dcf.clients")?;
    let shim = mesh.shim.as_ref().context("a shim")?.address("ingress")?;
    let questions = [
        "What is the capital of France?",
        "Count from one to five.",
        "Name a large animal.",
        "Write a rhyme.",
    ];
    for target in [head, shim] {
        let mut alone_answers = HashMap::new();
        for (index, question) in questions.iter().enumerate() {
            let answer = V5Client::new(target)?.ask(100 + index as u32, question, LIMIT)?;
            alone_answers.insert(*question, answer.text());
        }
        let distinct: std::collections::HashSet<&String> = alone_answers.values().collect();
        ensure!(
            distinct.len() == questions.len(),
            "the answers cannot be told apart: {alone_answers:?}"
        );

        let together = Arc::new(Barrier::new(questions.len()));
        let threads: Vec<_> = questions
            .iter()
            .map(|question| {
                let together = Arc::clone(&together);
                let question = (*question).to_owned();
                std::thread::spawn(move || -> Result<(String, String)> {
                    let client = V5Client::new(target)?;
                    together.wait();
                    let answer = client.ask(42, &question, LIMIT)?;
                    ensure!(
                        client.receive(SILENCE)?.is_none(),
                        "more than one datagram for {question:?}"
                    );
                    Ok((question, answer.text()))
                })
            })
            .collect();
        for thread in threads {
            let (question, answer) = thread.join().expect("no panic")?;
            ensure!(
                alone_answers[question.as_str()] == answer,
                "{question:?} was answered with {answer:?}"
            );
        }
    }
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_task_does_not_run_twice() -> Result<()> {
    let _alone = alone();
    let runs = Arc::new(AtomicUsize::new(0));
    let mesh = Mesh::builder()
        .head_config(ADMIT_OLD_WORKERS)
        .shim()
        .start()
        .await?;
    let counted = Arc::clone(&runs);
    let _worker = V5Worker::start(
        mesh.head.address("dcf.workers")?,
        Duration::from_millis(500),
        move |task| {
            counted.fetch_add(1, Ordering::Relaxed);
            // Long enough for the repeats to come while it runs.
            std::thread::sleep(Duration::from_millis(400));
            Some(format!("echo: {}", task.text()).into_bytes())
        },
    )?;
    wait_for_legacy_worker(&mesh).await?;
    let shim = mesh.shim.as_ref().context("a shim")?.address("ingress")?;
    for target in [mesh.head.address("dcf.clients")?, shim] {
        runs.store(0, Ordering::Relaxed);
        let client = V5Client::new(target)?;
        for _ in 0..5 {
            client.send(9, "once")?;
            std::thread::sleep(Duration::from_millis(50));
        }
        let answer = client.receive(LIMIT)?.context("an answer")?;
        ensure!(
            (answer.kind, answer.sequence, answer.text().as_str()) == (RESULT, 9, "echo: once"),
            "{answer:?}"
        );
        // After its end the answer is sent again, and not made again.
        let again = client.ask(9, "once", LIMIT)?;
        ensure!(again.text() == "echo: once", "{again:?}");
        ensure!(
            runs.load(Ordering::Relaxed) == 1,
            "it ran {} times",
            runs.load(Ordering::Relaxed)
        );
    }
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_serves_our_head_and_its_death_is_made_up_for() -> Result<()> {
    let _alone = alone();
    let mesh = Mesh::builder()
        .head_config(&format!("worker_timeout = \"3s\"\n{ADMIT_OLD_WORKERS}"))
        .start()
        .await?;
    let bus = mesh.head.address("dcf.workers")?;
    // One takes tasks and never answers; the other answers.
    let silent = V5Worker::start(bus, Duration::from_millis(500), |_| None)?;
    wait_for_legacy_worker(&mesh).await?;
    let client = V5Client::new(mesh.head.address("dcf.clients")?)?;
    client.send(5, "hello")?;
    std::thread::sleep(Duration::from_millis(200));
    let payloads = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = Arc::clone(&payloads);
    let _answering = V5Worker::start(bus, Duration::from_millis(500), move |task| {
        seen.lock()
            .expect("no panic")
            .push((task.sequence, task.text()));
        Some(format!("echo: {}", task.text()).into_bytes())
    })?;
    drop(silent);
    let answer = client
        .receive(LIMIT)?
        .context("the task is run again on the other worker")?;
    ensure!(
        (answer.kind, answer.sequence, answer.text().as_str()) == (RESULT, 5, "echo: hello"),
        "{answer:?}"
    );
    ensure!(client.receive(SILENCE)?.is_none(), "a second answer");
    let payloads = payloads.lock().expect("no panic").clone();
    ensure!(
        payloads.len() == 1 && payloads[0].1 == "hello",
        "the task's payload goes on as it is: {payloads:?}"
    );
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_worker_serves_a_v5_head() -> Result<()> {
    let _alone = alone();
    let head = V5Head::start()?;
    let launcher = Launcher::of_this_build()?;
    let config: toml::Table = format!(
        "models = [{:?}]\nnode_name = \"old-mesh\"\n{SHORT_ANSWERS}\n[http]\nlisten = \"127.0.0.1:0\"\n[dcf]\nlisten = \"127.0.0.1:0\"\n[legacy]\nhead = \"{}\"\n",
        paths::smollm2()?,
        head.bus()?
    )
    .parse()?;
    let mut worker = launcher.start("mesh-worker", "old-mesh", &config).await?;
    let address = worker.address("dcf")?;
    let (announced, payload) = head.heartbeat(LIMIT)?;
    ensure!(
        announced == address,
        "the heartbeat names {announced}, the worker listens at {address}"
    );
    ensure!(
        payload == address.port().to_string().into_bytes(),
        "{payload:?}"
    );
    let answer = head.ask(announced, 77, "What is the capital of France?", LIMIT)?;
    ensure!(
        answer.kind == RESULT && !answer.text().trim().is_empty(),
        "{answer:?}"
    );
    let again = head.ask(announced, 78, "What is the capital of France?", LIMIT)?;
    ensure!(
        again.text() == answer.text(),
        "greedy answers are the same: {again:?}"
    );
    let empty = head.ask(announced, 79, "", LIMIT)?;
    ensure!(
        empty.error().is_some_and(|(code, _)| code == 1),
        "{empty:?}"
    );
    let status = worker.terminate(Duration::from_secs(30)).await?;
    ensure!(status.success(), "{status}");
    Ok(())
}

/// An image: binary data, in more than one datagram of v5.1.
fn image() -> Vec<u8> {
    let noise = (0..40_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8);
    b"\x89PNG\r\n\x1a\n".iter().copied().chain(noise).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_both_versions_get_a_v5_1_workers_image_from_head_and_shim() -> Result<()> {
    let _alone = alone();
    let mesh = Mesh::builder()
        .head_config(ADMIT_OLD_WORKERS)
        .shim()
        .start()
        .await?;
    let bus = mesh.head.address("dcf.workers")?;
    let tasks = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = Arc::clone(&tasks);
    let interval = Duration::from_millis(500);
    let _worker = V5Worker::speaking(Wire::V5_1, bus, interval, move |task| {
        seen.lock().expect("no panic").push(task.text());
        Some(image())
    })?;
    wait_for_legacy_worker(&mesh).await?;
    let shim = mesh.shim.as_ref().context("a shim")?.address("ingress")?;
    let task = r#"{"prompt": "a red fox", "steps": 25, "guidance": 7.5}"#;
    for target in [mesh.head.address("dcf.clients")?, shim] {
        for wire in [Wire::V5_0, Wire::V5_1] {
            let client = V5Client::new(target)?.speaking(wire);
            let answer = client.ask(9, task, LIMIT)?;
            ensure!(answer.kind == RESULT, "{:?}", answer.error());
            ensure!(
                answer.payload == image(),
                "another image, of {} bytes",
                answer.payload.len()
            );
            ensure!(client.receive(SILENCE)?.is_none(), "more came");
            client.send_raw(&Datagram::new(HEALTH, 5, "").on(wire).encode())?;
            let health = client.receive(LIMIT)?.context("an answer to Health")?;
            ensure!(
                (health.kind, health.sequence, health.wire) == (HEALTH, 5, wire),
                "{health:?}"
            );
        }
    }
    let tasks = tasks.lock().expect("no panic").clone();
    ensure!(
        tasks.len() == 4 && tasks.iter().all(|seen| seen == task),
        "{tasks:?}"
    );
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_worker_finds_out_that_its_head_speaks_v5_1_and_obeys_its_shutdown() -> Result<()> {
    let _alone = alone();
    let head = V5Head::start()?.speaking(Wire::V5_1);
    let launcher = Launcher::of_this_build()?;
    let config: toml::Table = format!(
        "models = [{:?}]\nnode_name = \"new-mesh\"\n{SHORT_ANSWERS}\n[http]\nlisten = \"127.0.0.1:0\"\n[dcf]\nlisten = \"127.0.0.1:0\"\n[legacy]\nhead = \"{}\"\n",
        paths::smollm2()?,
        head.bus()?
    )
    .parse()?;
    let mut worker = launcher.start("mesh-worker", "new-mesh", &config).await?;
    let (announced, _) = head.heartbeat(LIMIT)?;
    ensure!(announced == worker.address("dcf")?, "{announced}");
    let answer = head.ask(announced, 77, "What is the capital of France?", LIMIT)?;
    ensure!(
        answer.kind == RESULT && !answer.text().trim().is_empty(),
        "{answer:?}"
    );
    // An order from another source is refused, even if that source may ask.
    let order = Datagram::new(SHUTDOWN, 0, "").on(Wire::V5_1);
    let stranger = std::net::UdpSocket::bind("127.0.0.2:0")?;
    stranger.send_to(&order.encode(), announced)?;
    let again = head.ask(announced, 78, "What is the capital of France?", LIMIT)?;
    ensure!(again.text() == answer.text(), "{again:?}");
    head.tell(announced, &order)?;
    let status = worker.wait_for_end(LIMIT).await?;
    ensure!(status.success(), "{status}");
    Ok(())
}

async fn wait_for_legacy_worker(mesh: &Mesh) -> Result<()> {
    for _ in 0..200 {
        if !mesh.usable_workers().await?.is_empty() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    anyhow::bail!(
        "the head did not take the v5.0.0 worker: {:?}",
        mesh.registry().await?
    )
}
