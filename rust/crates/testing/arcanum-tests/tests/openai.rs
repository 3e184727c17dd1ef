//! The public OpenAI clients against the head, unchanged: Python's `openai`, Rust's `async-openai`.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use arcanum_tests::alone;
use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use async_openai::types::chat::{
    ChatCompletionRequestUserMessageArgs, CreateChatCompletionRequest,
    CreateChatCompletionRequestArgs,
};
use futures::StreamExt;
use mesh_testkit::{Mesh, paths};

const WORKER: &str = "threads = 0\ncontext = 512\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_python_client_works_unchanged() -> Result<()> {
    let _alone = alone();
    let python = paths::fetched("python/bin/python")?;
    let keys = tempfile::NamedTempFile::new()?;
    std::fs::write(&keys, "test-key\n")?;
    let mesh = Mesh::builder()
        .workers(1)
        .worker_config(WORKER)
        .head_config(&format!("[http]\napi_keys_file = {:?}\n", keys.path()))
        .start()
        .await?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/python/openai_client.py");
    let base = format!("http://{}/v1", mesh.head.address("http")?);
    let output = tokio::task::spawn_blocking(move || {
        Command::new(python)
            .arg(script)
            .arg(base)
            .arg("test-key")
            .output()
    })
    .await??;
    let words = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{words}\n{}", mesh.head.log_end());
    println!("{words}");
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn async_openai_works_unchanged() -> Result<()> {
    let _alone = alone();
    let mesh = Mesh::builder()
        .workers(1)
        .worker_config(WORKER)
        .start()
        .await?;
    let config = OpenAIConfig::new()
        .with_api_base(format!("http://{}/v1", mesh.head.address("http")?))
        .with_api_key("none");
    let client = Client::with_config(config);

    let models = client.models().list().await?;
    let model = models.data.first().context("a model")?.id.clone();
    let answer = client.chat().create(question(&model)?).await?;
    let text = answer.choices[0].message.content.clone().context("text")?;
    let usage = answer.usage.context("usage")?;
    ensure!(
        !text.trim().is_empty() && usage.completion_tokens > 0,
        "{text:?} {usage:?}"
    );
    ensure!(
        usage.total_tokens == usage.prompt_tokens + usage.completion_tokens,
        "{usage:?}"
    );

    let mut stream = client.chat().create_stream(question(&model)?).await?;
    let mut streamed = String::new();
    while let Some(chunk) = stream.next().await {
        for choice in chunk?.choices {
            streamed += choice.delta.content.as_deref().unwrap_or_default();
        }
    }
    ensure!(streamed == text, "streamed {streamed:?}, whole {text:?}");

    let unknown = client.chat().create(question("gpt-9")?).await;
    match unknown {
        Err(OpenAIError::ApiError(error)) => {
            ensure!(error.to_string().contains("gpt-9"), "{error}")
        }
        other => anyhow::bail!("an unknown model: {other:?}"),
    }
    mesh.shutdown().await
}

fn question(model: &str) -> Result<CreateChatCompletionRequest> {
    let message = ChatCompletionRequestUserMessageArgs::default()
        .content("What is the capital of France?")
        .build()?;
    Ok(CreateChatCompletionRequestArgs::default()
        .model(model)
        .messages([message.into()])
        .max_completion_tokens(24_u32)
        .temperature(0.0)
        .build()?)
}
