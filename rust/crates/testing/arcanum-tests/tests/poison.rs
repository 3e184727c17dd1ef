//! Requests that are made to cost as much as they can.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use arcanum_tests::clients::greedy;
use arcanum_tests::{alone, first_model};
use mesh_api::{ChatCompletion, ChatCompletionRequest, paths};
use mesh_testkit::Mesh;
use mesh_testkit::client::http::HttpError;
use serde_json::{Value, json};

const SMALL: &str = "threads = 1\nslots = 2\ncontext = 256\n[sampling]\nmax_tokens = 8\n";
const MIB: u64 = 1 << 20;

/// The most memory that these processes have had so far, by their own account now.
fn resident(mesh: &Mesh) -> Result<Vec<u64>> {
    let workers = mesh.workers.iter();
    std::iter::once(&mesh.head)
        .chain(workers)
        .map(|service| service.resident_bytes())
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prompts_of_8_mib_are_refused_at_once_and_cost_no_worker_anything() -> Result<()> {
    let _alone = alone();
    let mesh = Mesh::builder()
        .workers(2)
        .worker_config(SMALL)
        .start()
        .await?;
    let client = mesh.client()?;
    let model = first_model(&client).await?;
    let honest = ChatCompletionRequest::question("Hello", greedy(&model, 4));
    let answered = client.complete(&honest).await?;
    let before = resident(&mesh)?;
    let begun = Instant::now();
    let long = "1".repeat(8 * MIB as usize - 1024);
    let poison: Vec<_> = (0..12)
        .map(|number| {
            let client = client.clone();
            // As a conversation, and as a prompt that is tokenised as it is.
            let (path, body) = match number % 2 {
                0 => {
                    let messages = json!([{"role": "user", "content": long}]);
                    (
                        paths::CHAT_COMPLETIONS,
                        json!({"model": model, "messages": messages}),
                    )
                }
                _ => (paths::COMPLETIONS, json!({"model": model, "prompt": long})),
            };
            tokio::spawn(async move { client.post::<Value>(path, &body).await })
        })
        .collect();
    // Others are served meanwhile; without keys, all of this machine are one client.
    let mut most = before.clone();
    while poison.iter().any(|request| !request.is_finished()) {
        for (most, now) in most.iter_mut().zip(resident(&mesh)?) {
            *most = now.max(*most);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (mut too_long, mut refused) = (0, Vec::new());
    for request in poison {
        match request.await? {
            Err(HttpError::Api {
                status: 400,
                code: Some(code),
                message,
                ..
            }) => {
                ensure!(
                    code == "context_length_exceeded" && message.contains("256"),
                    "{code}: {message}"
                );
                too_long += 1;
            }
            // No more of them at once than the memory for requests holds.
            Err(HttpError::Api {
                status: 429 | 503,
                message,
                ..
            }) => refused.push(message),
            other => anyhow::bail!("{other:?}"),
        }
    }
    ensure!(too_long >= 1, "none was read: {refused:#?}");
    ensure!(
        begun.elapsed() < Duration::from_secs(30),
        "{:?}",
        begun.elapsed()
    );
    for (index, (most, before)) in most.iter().zip(&before).enumerate() {
        // The head holds a few of them; a worker one at most, if its card does not tell how long it is.
        let limit = if index == 0 { 160 * MIB } else { 64 * MIB };
        ensure!(
            most - before < limit,
            "process {index} grew by {} MiB",
            (most - before) / MIB
        );
    }
    let again = client.complete(&honest).await?;
    let text = |answer: &ChatCompletion<'_>| answer.choices[0].message.content.to_string();
    ensure!(text(&again) == text(&answered), "{again:?}");
    mesh.shutdown().await
}
