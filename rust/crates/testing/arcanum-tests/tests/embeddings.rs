//! Embeddings and chat in one mesh: by the public OpenAI client, over UDP, on the command line, across a worker's death.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arcanum_tests::alone;
use arcanum_tests::clients::greedy;
use mesh_api::{
    ChatCompletionRequest, CreateEmbeddingRequest, CreateEmbeddingResponse, EncodingFormat,
    TextInput,
};
use mesh_testkit::client::dcf_udp::DcfClient;
use mesh_testkit::{Mesh, paths};
use serde_json::{Value, json};

const CHAT: &str = "SmolLM2-135M-Instruct.Q4_1";
const EMBED: &str = "all-MiniLM-L6-v2";
/// Clients whose requests share a worker.
const CLIENTS: usize = 3;
/// Texts in each of their requests: together some seconds of work.
const TEXTS: usize = 30;

/// Worker configuration for these models.
fn models(names: &[&str], more: &str) -> Result<String> {
    let paths = names.iter().map(|name| match *name {
        CHAT => paths::smollm2(),
        _ => paths::minilm(),
    });
    let paths: Vec<String> = paths
        .map(|path| Ok(path?.display().to_string()))
        .collect::<Result<_>>()?;
    Ok(format!("models = {paths:?}\ncontext = 512\n{more}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_mesh_chats_and_embeds_and_a_reserved_worker_does_nothing_else() -> Result<()> {
    let _alone = alone();
    let mut mesh = Mesh::builder().shim().start().await?;
    mesh.start_worker(&models(&[CHAT], "")?).await?;
    mesh.start_worker(&models(
        &[CHAT, EMBED],
        "reserved_for = [\"embeddings\"]\n",
    )?)
    .await?;
    mesh.wait_for_workers(2).await?;

    python_client(&mesh).await?;
    over_udp(&mesh).await?;
    on_the_command_line(&mesh).await?;

    // Everything that was said was said by the worker that is not reserved.
    let registry = mesh.registry().await?;
    let worker = |name: &str| {
        let mut workers = registry.workers.iter();
        workers.find(|worker| worker.name == name)
    };
    let reserved = worker("worker-2").context("worker-2")?;
    ensure!(reserved.reserved_for == ["embeddings"], "{reserved:?}");
    let metrics = mesh.workers[1].http()?.get_text("/metrics").await?;
    let decoded = format!("hydramesh_worker_decode_tokens_total{{model=\"{CHAT}\"}}");
    let chat_rows = figure(&metrics, &decoded)?;
    // Its warm-up, and the head's question that shows that tokens come out: eight of them.
    ensure!(
        chat_rows < 20.0,
        "{chat_rows} rows of chat on a worker kept for embeddings"
    );
    let embedded = figure(
        &metrics,
        &format!("hydramesh_worker_answers_finished_total{{model=\"{EMBED}\"}}"),
    )?;
    ensure!(embedded > 5.0, "{embedded} answers");

    // Without the other worker there is no chat model; embeddings continue.
    mesh.workers[0].crash()?;
    mesh.wait_for_workers(1).await?;
    let client = mesh.client()?;
    let question = ChatCompletionRequest::question("hi", greedy(CHAT, 2));
    let refused = client.complete(&question).await;
    let error = refused
        .err()
        .context("a reserved worker talked")?
        .to_string();
    ensure!(error.contains("no worker"), "{error}");
    let request = CreateEmbeddingRequest {
        input: "still here".into(),
        ..CreateEmbeddingRequest::default()
    };
    let _: CreateEmbeddingResponse<'_> = client.post(mesh_api::paths::EMBEDDINGS, &request).await?;
    mesh.shutdown().await
}

/// A figure of a metrics page.
fn figure(page: &str, name: &str) -> Result<f64> {
    let line = page.lines().find_map(|line| line.strip_prefix(name));
    let line = line.with_context(|| format!("no {name} in\n{page}"))?;
    Ok(line.trim().parse()?)
}

async fn python_client(mesh: &Mesh) -> Result<()> {
    let python = paths::fetched("python/bin/python")?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/python/openai_embeddings.py");
    let base = format!("http://{}/v1", mesh.head.address("http")?);
    let output = tokio::task::spawn_blocking(move || {
        Command::new(python)
            .arg(script)
            .args([&base, CHAT, EMBED])
            .output()
    })
    .await??;
    let words = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{words}\n{}", mesh.head.log_end());
    println!("{words}");
    Ok(())
}

async fn over_udp(mesh: &Mesh) -> Result<()> {
    let shim = mesh.shim.as_ref().context("a shim")?;
    let mut client = DcfClient::connect(&shim.address("ingress")?.to_string()).await?;
    let whole: Value = mesh
        .client()?
        .post(
            mesh_api::paths::EMBEDDINGS,
            &json!({"input": ["one", "two"]}),
        )
        .await?;
    let limit = Duration::from_secs(30);
    let task = json!({"kind": "embed", "input": ["one", "two"]});
    let answer = client.ask(&task, limit, &mut |_| {}).await?;
    let answer: Value = serde_json::from_str(&answer.text)?;
    ensure!(answer == whole, "{answer} over UDP, {whole} over HTTP");
    // 40 vectors are 83 kB: Chunks.
    let many = json!({"kind": "embed", "input": vec!["many"; 40], "encoding_format": "base64", "model": EMBED});
    let answer = client.ask(&many, limit, &mut |_| {}).await?;
    let answer: Value = serde_json::from_str(&answer.text)?;
    ensure!(answer["data"].as_array().map(Vec::len) == Some(40));
    let wrong = json!({"kind": "embed", "prompt": "one"});
    let error = client
        .ask(&wrong, limit, &mut |_| {})
        .await
        .err()
        .context("an error")?;
    ensure!(error.to_string().contains("'input'"), "{error}");
    // A task without a kind is a prompt for text, as in earlier versions.
    let chat = client
        .ask(
            &json!({"prompt": "Say hi.", "max_tokens": 4}),
            limit,
            &mut |_| {},
        )
        .await?;
    ensure!(!chat.text.is_empty() && !chat.text.contains("embedding"));
    Ok(())
}

async fn on_the_command_line(mesh: &Mesh) -> Result<()> {
    let url = format!("http://{}", mesh.head.address("http")?);
    let hydramesh = paths::bin_dir()?.join("hydramesh");
    let run = move |arguments: &'static [&'static str]| {
        let mut command = Command::new(&hydramesh);
        command.args(arguments).args(["--url", &url]);
        command.env_remove("HYDRAMESH_API_KEY_FILE");
        tokio::task::spawn_blocking(move || command.output())
    };
    let output = run(&[
        "embed",
        "--json",
        "--dimensions",
        "8",
        "a whale",
        "a lighthouse",
    ])
    .await??;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let lines: Vec<Value> = text
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    ensure!(
        lines.len() == 2 && lines[1]["text"] == "a lighthouse",
        "{text}"
    );
    ensure!(
        lines[0]["embedding"].as_array().map(Vec::len) == Some(8),
        "{text}"
    );
    let output = run(&["status"]).await??;
    let status = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        status.contains("ready, for embeddings") && status.contains(EMBED),
        "{status}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_request_is_shared_and_outlives_a_worker_killed_in_its_middle() -> Result<()> {
    let _alone = alone();
    let mut mesh = Mesh::builder().start().await?;
    for _ in 0..2 {
        mesh.start_worker(&models(&[EMBED], "threads = 1\n")?)
            .await?;
    }
    mesh.wait_for_workers(2).await?;
    let texts: Vec<String> = (0..600)
        .map(|i| {
            format!(
                "Text {i}. {}",
                "The sea is calm and the gulls fly low. ".repeat(i % 12)
            )
        })
        .collect();
    let request = CreateEmbeddingRequest {
        input: TextInput::Texts(texts),
        model: Some(EMBED.to_owned()),
        encoding_format: Some(EncodingFormat::Base64),
        ..CreateEmbeddingRequest::default()
    };
    let client = mesh.client()?;
    let undisturbed: Value = client.post(mesh_api::paths::EMBEDDINGS, &request).await?;
    let registry = mesh.registry().await?;
    for worker in &registry.workers {
        ensure!(worker.completed > 0, "one worker got nothing: {registry:?}");
    }

    let asking =
        tokio::spawn(async move { client.post(mesh_api::paths::EMBEDDINGS, &request).await });
    // Killed while it computes.
    let started = Instant::now();
    loop {
        let registry = mesh.registry().await?;
        let workers = registry.workers.iter();
        if workers.filter(|worker| worker.assigned > 0).count() == 2 {
            break;
        }
        ensure!(started.elapsed() < Duration::from_secs(20), "{registry:?}");
        ensure!(
            !asking.is_finished(),
            "it was over before a worker could be killed"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    mesh.workers[1].crash()?;
    let disturbed: Value = asking.await??;
    ensure!(disturbed == undisturbed, "the vectors differ");
    let registry = mesh.registry().await?;
    ensure!(registry.requests.reruns > 0, "{registry:?}");
    mesh.shutdown().await
}

/// Parts of several requests wait in one worker's queue for several times the limit before the first sign. All
/// are answered, and nothing counts as a failure.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_that_wait_in_a_busy_worker_are_not_run_again() -> Result<()> {
    let _alone = alone();
    let limit = Duration::from_secs(1);
    let mesh = Mesh::builder()
        .workers(1)
        .head_config("first_token_limit = \"1s\"\n")
        .worker_config(&models(&[EMBED], "threads = 1\n")?)
        .start()
        .await?;
    let began = Instant::now();
    let mut asked = tokio::task::JoinSet::new();
    for _ in 0..CLIENTS {
        let client = mesh.client()?;
        let text = "The sea is calm and the gulls fly low. ".repeat(22);
        let request = CreateEmbeddingRequest {
            input: TextInput::Texts(vec![text; TEXTS]),
            model: Some(EMBED.to_owned()),
            ..CreateEmbeddingRequest::default()
        };
        asked.spawn(async move {
            client
                .post::<CreateEmbeddingResponse>(mesh_api::paths::EMBEDDINGS, &request)
                .await
        });
    }
    while let Some(answer) = asked.join_next().await {
        ensure!(answer??.data.len() == TEXTS, "vectors are missing");
    }
    let took = began.elapsed();
    ensure!(took > 2 * limit, "nothing waited: all took {took:?}");
    let registry = mesh.registry().await?;
    ensure!(registry.requests.reruns == 0, "{registry:?}");
    ensure!(registry.workers[0].failed == 0, "{registry:?}");
    mesh.shutdown().await
}
