//! Failures of a ring besides the loss of one member with a standby.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use arcanum_tests::rescore::Judge;
use arcanum_tests::{
    ChatQuestion, Cluster, RingView, RunningStreams, Seed, Undisturbed, alone, question,
};
use mesh_testkit::paths;

const TOKENS: u32 = 96;
const LEAVE_LIMIT: Duration = Duration::from_secs(20);

fn questions(count: usize) -> Vec<ChatQuestion> {
    (0..count)
        .map(|number| match number % 4 {
            3 => ChatQuestion::sampled(question(number * 9), TOKENS, number as u64),
            _ => ChatQuestion::greedy(question(number * 9), TOKENS),
        })
        .collect()
}

/// Kills those whom `victims` names in the middle of three answers, which must end as if nothing had happened.
async fn outlive(
    cluster: &mut Cluster,
    what: &str,
    victims: impl Fn(&RingView) -> Vec<String>,
) -> Result<()> {
    let asks = questions(3);
    let mut undisturbed = Undisturbed::new();
    undisturbed.learn(&asks).await?;
    let ring = cluster.wait_for_whole_ring().await?;
    let running = RunningStreams::start(&cluster.client()?, &asks);
    running.wait_for_tokens(60).await?;
    let struck = Instant::now();
    let mut victims = victims(&ring);
    victims.sort();
    victims.dedup();
    for victim in &victims {
        cluster.kill(victim)?;
    }
    let case = format!("{what} ({victims:?}) killed; {}", ring.layout());
    let answers = match running.answers().await {
        Ok(answers) => answers,
        Err(error) => {
            println!("{}", cluster.log_ends());
            return Err(error.context(case));
        }
    };
    undisturbed
        .check_all(&asks, &answers)
        .context(case.clone())?;
    let gaps = answers.iter().filter_map(|answer| answer.gap_after(struck));
    println!("{case}: a pause of {:?}", gaps.max().unwrap_or_default());
    cluster.wait_until_idle().await?;
    Ok(())
}

fn member(ring: &RingView, stage: usize) -> String {
    ring.stages[stage].member.worker.clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_outlive_the_loss_of_several_at_once() -> Result<()> {
    let _alone = alone();
    let cluster = || Cluster::builder().ring_workers(5).stages(3).start();

    let mut one = cluster().await?;
    outlive(&mut one, "a standby", |ring| {
        ring.standby(1).map(str::to_owned).into_iter().collect()
    })
    .await?;
    // The same ring: it has its standbys back.
    outlive(&mut one, "the driver", |ring| {
        vec![ring.driver().to_owned()]
    })
    .await?;
    one.shutdown().await?;

    let mut one = cluster().await?;
    outlive(&mut one, "a stage and its standby", |ring| {
        let standby = ring.standby(0).map(str::to_owned);
        [member(ring, 0)].into_iter().chain(standby).collect()
    })
    .await?;
    one.shutdown().await?;

    let mut one = cluster().await?;
    outlive(&mut one, "two adjacent stages", |ring| {
        vec![member(ring, 0), member(ring, 1)]
    })
    .await?;
    one.shutdown().await?;

    let mut one = cluster().await?;
    outlive(&mut one, "the driver and the stage before it", |ring| {
        vec![member(ring, 1), member(ring, 2)]
    })
    .await?;
    one.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_standbys_the_rows_are_replayed_where_there_is_room() -> Result<()> {
    let _alone = alone();
    let mut cluster = Cluster::builder()
        .ring_workers(4)
        .stages(3)
        .standbys(false)
        .start()
        .await?;
    outlive(&mut cluster, "the first stage", |ring| {
        vec![member(ring, 0)]
    })
    .await?;
    cluster.add_ring_worker().await?;
    cluster.mesh.wait_for_workers(4).await?;
    outlive(&mut cluster, "the driver", |ring| {
        vec![ring.driver().to_owned()]
    })
    .await?;
    cluster.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_standbys_and_spares_fewer_workers_hold_the_whole_model() -> Result<()> {
    let _alone = alone();
    let mut cluster = Cluster::builder()
        .ring_workers(3)
        .standbys(false)
        .start()
        .await?;
    outlive(&mut cluster, "the first stage", |ring| {
        vec![member(ring, 0)]
    })
    .await?;
    let ring = cluster.wait_for_whole_ring().await?;
    // In a new ring of fewer stages, or with two stages on one of them.
    ensure!(ring.distinct_members() <= 2, "{}", ring.layout());
    cluster.shutdown().await
}

/// A file with the same weights under another name: another model, as far as the mesh knows.
fn another_model(folder: &tempfile::TempDir) -> Result<std::path::PathBuf> {
    let path = folder.path().join("another.gguf");
    std::os::unix::fs::symlink(paths::smollm2()?, &path)?;
    Ok(path)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_there_is_no_room_every_request_is_told_and_other_models_go_on() -> Result<()> {
    let _alone = alone();
    let folder = tempfile::tempdir()?;
    // Three hold the weights and some KV cache, two do not.
    let mut cluster = Cluster::builder()
        .ring_workers_with(3, "[ring]\nmemory = \"58MB\"")
        .whole_model(&another_model(&folder)?)
        .stages(0)
        .standbys(false)
        .head_config("rejoin_grace = \"2s\"\n[ring]\ncontext = 256\nslots = 2\n")
        .start()
        .await?;
    let ring = cluster.wait_for_whole_ring().await?;
    cluster.mesh.wait_for_workers(4).await?;
    let ask = |number: usize| ChatQuestion::greedy(question(number), 150);
    let lost = [ask(1).of(&ring.model), ask(2).of(&ring.model)];
    let other = ask(3).of("another");
    let mut undisturbed = Undisturbed::new();
    undisturbed.learn(std::slice::from_ref(&other)).await?;

    let client = cluster.client()?;
    let running = RunningStreams::start(&client, &lost);
    let beside = RunningStreams::start(&client, std::slice::from_ref(&other));
    running.wait_for_tokens(40).await?;
    let victim = member(&ring, 0);
    cluster.kill(&victim)?;
    for outcome in running.outcomes().await? {
        let Err(error) = outcome else {
            bail!("an answer without the layers that it needs");
        };
        let words = format!("{error:#}");
        println!("told: {words}");
        ensure!(
            words.contains("MiB") && words.contains(&ring.model) && words.contains(&victim),
            "the error does not say what is missing: {words}"
        );
    }
    let answers = beside.answers().await?;
    undisturbed.check(&other, &answers[0])?;
    // The ring returns once there is room again.
    cluster
        .add_worker("models = []\n[ring]\nmemory = \"58MB\"")
        .await?;
    cluster.wait_for_whole_ring().await?;
    lost[0].ask(&client).await?;
    cluster.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_clients_pass_the_rescoring_check_whoever_dies() -> Result<()> {
    let _alone = alone();
    let mut seed = Seed::of_this_run(20_261_126);
    let mut cluster = Cluster::builder().ring_workers(4).stages(3).start().await?;
    let asks: Vec<ChatQuestion> = (0..8)
        .map(|number| ChatQuestion::greedy(question(number * 12), TOKENS).until_it_ends())
        .collect();
    let mut judge = Judge::new()?;
    for round in 0..3 {
        let ring = cluster.wait_for_whole_ring().await?;
        let victim = member(&ring, seed.below(3));
        let running = RunningStreams::start(&cluster.client()?, &asks);
        let after = 1 + seed.below(300);
        running.wait_for_tokens(after).await?;
        cluster.kill(&victim)?;
        let answers = running
            .answers()
            .await
            .with_context(|| format!("round {round}: {victim} killed after {after} tokens"))?;
        for (ask, answer) in asks.iter().zip(&answers) {
            judge
                .check(&ask.question, &answer.transcript)
                .with_context(|| format!("round {round}: {:?}", ask.question))?;
        }
        cluster.remove(&victim);
        cluster.add_ring_worker().await?;
    }
    cluster.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_comes_back_is_used_again() -> Result<()> {
    let _alone = alone();
    let mut cluster = Cluster::builder().ring_workers(2).stages(2).start().await?;
    let ring = cluster.wait_for_whole_ring().await?;
    let victim = member(&ring, 0);
    cluster.kill(&victim)?;
    cluster
        .wait_for_ring(|ring| ring.serves() && !ring.includes(&victim))
        .await?;
    cluster.restart(&victim).await?;
    let again = cluster
        .wait_for_ring(|ring| ring.serves() && ring.has_standbys() && ring.includes(&victim))
        .await?;
    println!("before: {}; after: {}", ring.layout(), again.layout());
    ChatQuestion::greedy(question(1), 20)
        .ask(&cluster.client()?)
        .await?;
    cluster.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_and_the_driver_are_drained_without_a_lost_token() -> Result<()> {
    let _alone = alone();
    let mut cluster = Cluster::builder().ring_workers(4).stages(3).start().await?;
    let asks: Vec<ChatQuestion> = (0..2)
        .map(|number| ChatQuestion::greedy(question(number * 9), 400))
        .collect();
    let mut undisturbed = Undisturbed::new();
    undisturbed.learn(&asks).await?;
    for driver in [false, true] {
        let ring = cluster.wait_for_whole_ring().await?;
        let drained = match driver {
            true => ring.driver().to_owned(),
            false => member(&ring, 0),
        };
        let running = RunningStreams::start(&cluster.client()?, &asks);
        running.wait_for_tokens(100).await?;
        let begun = Instant::now();
        cluster.drain(&drained).await?;
        let took = begun.elapsed();
        let answers = running.answers().await?;
        undisturbed.check_all(&asks, &answers)?;
        let gaps = answers.iter().filter_map(|answer| answer.gap_after(begun));
        println!(
            "{drained} drained in {took:?}; {}: a pause of {:?}",
            ring.layout(),
            gaps.max().unwrap_or_default()
        );
        let ring = cluster.wait_for_ring(RingView::serves).await?;
        ensure!(!ring.includes(&drained), "{}", ring.layout());
        if driver {
            // A restarted head knows of it.
            cluster.mesh.restart_head(Duration::ZERO).await?;
            let begun = Instant::now();
            while !is_draining(&cluster, &drained).await? {
                ensure!(begun.elapsed().as_secs() < 30, "{drained} is not drained");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            let ring = cluster.wait_for_ring(RingView::serves).await?;
            ensure!(!ring.includes(&drained), "{}", ring.layout());
        }
        cluster.undrain(&drained).await?;
    }
    cluster.shutdown().await
}

async fn is_draining(cluster: &Cluster, worker: &str) -> Result<bool> {
    let mesh = cluster.mesh.registry().await?;
    let mut workers = mesh.workers.iter();
    Ok(workers.any(|shown| shown.name == worker && shown.state == "draining"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_that_are_told_to_end_hand_over_and_the_last_one_leaves_at_once() -> Result<()> {
    let _alone = alone();
    let mut cluster = Cluster::builder().ring_workers(3).stages(3).start().await?;
    let asks: Vec<ChatQuestion> = (0..2)
        .map(|number| ChatQuestion::greedy(question(number * 9 + 1), 400))
        .collect();
    let mut undisturbed = Undisturbed::new();
    undisturbed.learn(&asks).await?;
    let ring = cluster.wait_for_whole_ring().await?;
    let running = RunningStreams::start(&cluster.client()?, &asks);
    running.wait_for_tokens(60).await?;
    for leaving in [member(&ring, 0), ring.driver().to_owned()] {
        let begun = Instant::now();
        let worker = cluster.worker(&leaving)?;
        let status = worker.terminate(LEAVE_LIMIT).await?;
        ensure!(status.success(), "{leaving} ended with {status}");
        println!(
            "{leaving} left within {:?}, {} tokens had come",
            begun.elapsed(),
            running.arrived()
        );
    }
    let answers = running.answers().await?;
    undisturbed.check_all(&asks, &answers)?;
    cluster.wait_until_idle().await?;
    let last = cluster.names().pop().context("the last worker")?;
    let begun = Instant::now();
    let worker = cluster.worker(&last)?;
    let status = worker.terminate(LEAVE_LIMIT).await?;
    ensure!(status.success(), "{last} ended with {status}");
    ensure!(
        begun.elapsed() < LEAVE_LIMIT / 2,
        "the last worker, of which nobody wanted anything, took {:?} to leave",
        begun.elapsed()
    );
    cluster.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_a_ring_and_another_model_live_in_one_mesh() -> Result<()> {
    let _alone = alone();
    let folder = tempfile::tempdir()?;
    let mut cluster = Cluster::builder()
        .ring_workers(3)
        .whole(1)
        .whole_model(&another_model(&folder)?)
        .stages(3)
        .head_config("[ring]\nalways = true\n")
        .shim()
        .start()
        .await?;
    let ring = cluster.wait_for_whole_ring().await?;
    cluster.mesh.wait_for_workers(5).await?;
    let client = cluster.client()?;
    let mut models = client.models().await?;
    models.sort();
    ensure!(models == [ring.model.as_str(), "another"], "{models:?}");

    let mut asks = questions(6);
    for (number, ask) in asks.iter_mut().enumerate() {
        let model = if number % 3 == 2 {
            "another"
        } else {
            &ring.model
        };
        *ask = ask.clone().of(model);
    }
    let mut undisturbed = Undisturbed::new();
    undisturbed.learn(&asks).await?;
    let answers = RunningStreams::start(&client, &asks).answers().await?;
    undisturbed.check_all(&asks, &answers)?;

    // With the ring's driver gone and the replica there, the answers go on all the same.
    let running = RunningStreams::start(&client, &asks);
    running.wait_for_tokens(30).await?;
    cluster.kill(ring.driver())?;
    let answers = running.answers().await?;
    undisturbed.check_all(&asks, &answers)?;

    // Through the shim as well, over UDP.
    let shim = cluster.mesh.shim.as_ref().context("a shim")?;
    let address = shim.address("ingress")?.to_string();
    let mut dcf = mesh_testkit::client::dcf_udp::DcfClient::connect(&address).await?;
    let task = serde_json::json!({
        "model": ring.model, "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0
    });
    let limit = Duration::from_secs(30);
    let answer = dcf.ask(&task, limit, &mut |_| {}).await?;
    ensure!(!answer.text.is_empty(), "{answer:?}");
    cluster.shutdown().await
}
