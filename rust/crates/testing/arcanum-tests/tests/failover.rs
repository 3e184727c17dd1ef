//! 100 conversations at once over two workers, one of which is killed at a random moment.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arcanum_tests::rescore::{Judge, Transcript};
use arcanum_tests::{Seed, alone, first_model, question};
use mesh_api::{ChatCompletionRequest, GenerationOptions};
use mesh_testkit::Mesh;
use mesh_testkit::client::http::HttpClient;

const CHATS: usize = 100;
const ROUNDS: usize = 3;
const TOKENS: u32 = 24;
const ROUND_LIMIT: Duration = Duration::from_secs(300);

/// 300 answers, none lost, none doubled, no stream with a gap or a repeated token.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_chats_survive_the_death_of_a_worker_three_times() -> Result<()> {
    let _alone = alone();
    let mut seed = Seed::of_this_run(20_261_122);
    let mut mesh = Mesh::builder()
        .workers(2)
        .worker_config("threads = 1\n")
        .start()
        .await?;
    let mut transcripts = Vec::new();
    let mut reruns = 0;
    for round in 0..ROUNDS {
        // From before most answers have begun to when most are done.
        let kill_after = seed.below(CHATS * TOKENS as usize * 3 / 4) + 1;
        let victim = mesh.workers.len() - 1 - seed.below(2);
        let started = Instant::now();
        let answers = tokio::time::timeout(ROUND_LIMIT, one_round(&mut mesh, victim, kill_after))
            .await
            .with_context(|| format!("round {round} did not end within {ROUND_LIMIT:?}"))??;
        let rerun = answers.iter().filter(|answer| answer.reruns > 0).count();
        println!(
            "round {round}: {CHATS} answers in {:.1} s; {} killed after {kill_after} tokens, {rerun} answers went on elsewhere",
            started.elapsed().as_secs_f64(),
            mesh.workers[victim].name(),
        );
        reruns += rerun;
        transcripts.extend(answers.into_iter().enumerate());

        mesh.start_worker("threads = 1\n").await?;
        // The dead one leaves the list, so that the two that live are the last two.
        drop(mesh.workers.remove(victim));
        mesh.wait_for_workers(2).await?;
    }
    ensure!(
        reruns > 0,
        "no answer was disturbed: the workers died too late"
    );
    mesh.shutdown().await?;

    // The same question has one greedy answer, with or without a failure.
    let mut whole: HashMap<usize, Transcript> = HashMap::new();
    for (chat, mut transcript) in transcripts {
        transcript.reruns = 0;
        let first = whole.entry(chat).or_insert_with(|| transcript.clone());
        ensure!(
            *first == transcript,
            "chat {chat} has two answers:\n{first:?}\n{transcript:?}"
        );
    }
    let mut judge = Judge::new()?;
    for (chat, transcript) in &whole {
        judge
            .check(&question(*chat), transcript)
            .with_context(|| format!("chat {chat}"))?;
    }
    println!(
        "{} answers re-scored, every token the arg max (tolerance 0)",
        whole.len()
    );
    Ok(())
}

async fn one_round(mesh: &mut Mesh, victim: usize, kill_after: usize) -> Result<Vec<Transcript>> {
    let client = mesh.client()?;
    let model = first_model(&client).await?;
    let arrived = Arc::new(AtomicUsize::new(0));
    let chats: Vec<_> = (0..CHATS)
        .map(|chat| {
            tokio::spawn(one_chat(
                client.clone(),
                model.clone(),
                chat,
                Arc::clone(&arrived),
            ))
        })
        .collect();
    while arrived.load(Ordering::Relaxed) < kill_after {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    mesh.workers[victim].crash()?;
    let mut answers = Vec::with_capacity(CHATS);
    for (chat, task) in chats.into_iter().enumerate() {
        answers.push(task.await?.with_context(|| format!("chat {chat}"))?);
    }
    Ok(answers)
}

async fn one_chat(
    client: HttpClient,
    model: String,
    chat: usize,
    arrived: Arc<AtomicUsize>,
) -> Result<Transcript> {
    let options = GenerationOptions {
        model: Some(model),
        max_tokens: Some(TOKENS.into()),
        temperature: Some(0.0),
        ..GenerationOptions::default()
    };
    let request = ChatCompletionRequest {
        logprobs: Some(true),
        ..ChatCompletionRequest::question(question(chat), options)
    };
    let mut stream = client.stream(request).await?;
    let mut transcript = Transcript::default();
    while let Some(piece) = stream.next().await? {
        let before = transcript.tokens.len();
        transcript.take(&piece)?;
        arrived.fetch_add(transcript.tokens.len() - before, Ordering::Relaxed);
    }
    ensure!(transcript.finish.is_some(), "the answer has no end");
    let counted = transcript.completion_tokens.context("usage")?;
    ensure!(
        transcript.tokens.len() as u64 == counted || transcript.tokens.len() as u64 + 1 == counted,
        "{} tokens came, the mesh counts {counted}",
        transcript.tokens.len()
    );
    Ok(transcript)
}
