//! Workers that joined with a real token and lie: clients get right answers, and liars get no prompts.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arcanum_tests::mesh_state::ensure_alive;
use arcanum_tests::rogue::{Lie, ReceivedRequest, Rogue};
use arcanum_tests::{ChatQuestion, Undisturbed, alone, question};
use mesh_api::{
    ChatCompletionRequest, CreateEmbeddingRequest, CreateEmbeddingResponse, GenerationOptions,
    TextInput,
};
use mesh_testkit::client::http::HttpClient;
use mesh_testkit::{Mesh, paths};

/// Time after which a liar must be out.
const OUT: Duration = Duration::from_secs(30);
/// Most memory of the head under any lies, bytes.
const HEAD: u64 = 64 << 20;
const SMALL: &str = "threads = 1\ncontext = 1024\n";

/// A slow worker is a bad choice and no liar.
const SLOW: &str = "liar-slow";

/// The lies that harm a client at once.
const HARMFUL: [Lie; 9] = [
    Lie::Fast,
    Lie::Mute,
    Lie::Invalid,
    Lie::Endless,
    Lie::Huge,
    Lie::Wrong,
    Lie::Malformed,
    Lie::Replay,
    Lie::Slow,
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_lies_gets_no_prompts_and_spoils_no_answer() -> Result<()> {
    let _alone = alone();
    let asks = asks();
    let mut undisturbed = Undisturbed::new();
    undisturbed.learn(&asks).await?;
    let mut mesh = Mesh::builder()
        .workers(2)
        .worker_config(SMALL)
        .start()
        .await?;
    let mut liars = Vec::new();
    for lie in HARMFUL {
        let name = format!("liar-{}", lie.name());
        liars.push(Rogue::join(&mesh, &name, lie).await?);
    }
    let joined = Instant::now();
    let http = mesh.client()?;
    let mut wrong = Vec::new();
    let mut answers = 0;
    while joined.elapsed() < OUT + Duration::from_secs(5) {
        for found in ask_all(&http, &asks, &undisturbed).await {
            answers += 1;
            wrong.extend(found.err().map(|error| format!("{error:#}")));
        }
        let registry = mesh.registry().await?;
        let quiet = |liar: &Rogue| {
            let asked = prompts(liar, &asks).last().map(|seen| seen.at);
            let long = asked.is_none_or(|at| at.elapsed() > Duration::from_secs(5));
            long && (liar.name == SLOW || state_of(&registry, &liar.name) != "ready")
        };
        if joined.elapsed() > OUT / 3 && liars.iter().all(quiet) {
            break;
        }
    }
    println!("{answers} answers, {} of them wrong", wrong.len());
    let registry = mesh.registry().await?;
    let mut complaints = Vec::new();
    for liar in &liars {
        let prompts = prompts(liar, &asks);
        let late = prompts.iter().filter(|seen| seen.at > joined + OUT).count();
        let state = state_of(&registry, &liar.name);
        println!(
            "{}: {} prompts of clients, {late} of them late; {state}; {:?}",
            liar.name,
            prompts.len(),
            liar.ends().last()
        );
        if late > 0 || (state == "ready" && liar.name != SLOW) {
            complaints.push(format!(
                "{} is {state} and got {late} prompts late",
                liar.name
            ));
        }
    }
    ensure!(
        wrong.is_empty(),
        "{} of {answers} answers: {wrong:#?}",
        wrong.len()
    );
    ensure!(complaints.is_empty(), "{complaints:#?}");
    sound(&mut mesh)?;
    drop(liars);
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claims_of_slots_memory_context_names_and_rings_change_no_answer() -> Result<()> {
    let _alone = alone();
    let asks = asks();
    let mut undisturbed = Undisturbed::new();
    undisturbed.learn(&asks).await?;
    let mut mesh = Mesh::builder()
        .workers(2)
        .worker_config(SMALL)
        .start()
        .await?;
    let lies = [
        Lie::Slots,
        Lie::Context,
        Lie::Memory,
        Lie::Name,
        Lie::Ring,
        Lie::Chatter,
        Lie::Unasked,
    ];
    let mut liars = Vec::new();
    for lie in lies {
        let name = format!("liar-{}", lie.name());
        liars.push(Rogue::join(&mesh, &name, lie).await?);
    }
    let http = mesh.client()?;
    let begun = Instant::now();
    let mut answers = 0;
    while begun.elapsed() < Duration::from_secs(8) {
        for found in ask_all(&http, &asks, &undisturbed).await {
            found?;
            answers += 1;
        }
    }
    println!("{answers} right answers");
    // A prompt that only the one takes which claims to ends in an error, or in an answer.
    let options = GenerationOptions {
        model: http.models().await?.into_iter().next(),
        max_tokens: Some(1),
        ..GenerationOptions::default()
    };
    let long = ChatCompletionRequest::question("word ".repeat(4_000), options);
    let begun = Instant::now();
    let answer = http.complete(&long).await;
    println!("4,000 words: {answer:?} after {:?}", begun.elapsed());
    ensure!(
        begun.elapsed() < Duration::from_secs(30),
        "that took {:?}",
        begun.elapsed()
    );
    // The one that says that it is another worker goes by the name in its certificate.
    let registry = mesh.registry().await?;
    let workers = registry.workers.iter();
    let namesakes = workers.filter(|worker| worker.name == "worker-1").count();
    ensure!(namesakes == 1, "{namesakes} workers are called worker-1");
    sound(&mut mesh)?;
    drop(liars);
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vectors_of_another_length_reach_nobody() -> Result<()> {
    let _alone = alone();
    let mut mesh = Mesh::builder()
        .model(&paths::minilm()?)
        .workers(1)
        .worker_config("threads = 1\n")
        .start()
        .await?;
    let http = mesh.client()?;
    let texts = ["a lighthouse", "a whale", "a glass of water"].map(str::to_owned);
    let request = CreateEmbeddingRequest {
        input: TextInput::Texts(texts.to_vec()),
        ..CreateEmbeddingRequest::default()
    };
    let known: CreateEmbeddingResponse<'_> =
        http.post(mesh_api::paths::EMBEDDINGS, &request).await?;
    let liar = Rogue::join(&mesh, "liar-dimensions", Lie::Dimensions).await?;
    for round in 0..20 {
        let found = http.post(mesh_api::paths::EMBEDDINGS, &request).await;
        let found: CreateEmbeddingResponse<'_> = found.with_context(|| format!("round {round}"))?;
        ensure!(found.data == known.data, "round {round}: other vectors");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    println!("{} requests reached it", liar.seen().len());
    sound(&mut mesh)?;
    drop(liar);
    mesh.shutdown().await
}

/// Questions of these clients that reached the liar. The head's own questions may look like a client's.
fn prompts(liar: &Rogue, asks: &[ChatQuestion]) -> Vec<ReceivedRequest> {
    let mut seen = liar.seen();
    seen.retain(|seen| asks.iter().any(|ask| ask.question == seen.question));
    seen
}

fn asks() -> Vec<ChatQuestion> {
    (0..4)
        .map(|number| ChatQuestion::greedy(question(number * 13), 12))
        .collect()
}

/// Asks all of them at once; for each answer `Ok`, or the error in it.
async fn ask_all(
    http: &HttpClient,
    asks: &[ChatQuestion],
    undisturbed: &Undisturbed,
) -> Vec<Result<()>> {
    let mut tasks = Vec::new();
    for ask in asks {
        let (http, ask) = (http.clone(), ask.clone());
        tasks.push(tokio::spawn(async move {
            let limit = Duration::from_secs(60);
            tokio::time::timeout(limit, ask.ask(&http)).await
        }));
    }
    let mut found = Vec::new();
    for (ask, task) in asks.iter().zip(tasks) {
        found.push(match task.await {
            Ok(Ok(Ok(answer))) => undisturbed.check(ask, &answer),
            Ok(Ok(Err(error))) => Err(error),
            Ok(Err(_)) => Err(anyhow::anyhow!("no answer within 60 s")),
            Err(error) => Err(error.into()),
        });
    }
    found
}

fn state_of(registry: &mesh_api::Mesh, name: &str) -> String {
    let mut workers = registry.workers.iter();
    let found = workers.find(|worker| worker.name == name);
    found.map_or("gone", |worker| &worker.state).to_owned()
}

/// Nothing died, nothing panicked, and the head's memory is bounded.
fn sound(mesh: &mut Mesh) -> Result<()> {
    let head = mesh.head.resident_bytes()?;
    println!("the head holds {} MiB", head >> 20);
    ensure!(head <= HEAD, "the head holds {head} bytes");
    ensure_alive(mesh)
}
