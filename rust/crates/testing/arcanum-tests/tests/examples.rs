//! The examples of the crates, run against a real mesh and a real model.

#[expect(dead_code, reason = "main is not called")]
#[path = "../../../wire/dcf/examples/udp_client.rs"]
mod udp_client;

#[expect(dead_code, reason = "main is not called")]
#[path = "../../../tools/mesh-client/examples/openai_stream.rs"]
mod openai_stream;

#[expect(dead_code, reason = "main is not called")]
#[path = "../../../engine/mesh-engine-ort/examples/embedder.rs"]
mod embedder;

use anyhow::{Result, anyhow, ensure};
use arcanum_tests::alone;
use mesh_engine_ort::OrtOptions;
use mesh_testkit::{Mesh, paths};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_clients_get_the_same_text_over_udp_and_http() -> Result<()> {
    let _alone = alone();
    let mesh = Mesh::builder()
        .shim()
        .workers(1)
        .worker_config("context = 512\n[sampling]\ntemperature = 0.0\n")
        .start()
        .await?;
    let prompt = "Hello! Who are you?";

    let shim = mesh
        .shim
        .as_ref()
        .expect("it was asked for")
        .address("ingress")?;
    let asked = tokio::task::spawn_blocking(move || {
        udp_client::ask(&shim.to_string(), prompt).map_err(|error| anyhow!("{error}"))
    });
    let whole = asked.await??;
    ensure!(!whole.trim().is_empty(), "no text came over UDP");

    let mut streamed = String::new();
    let mut pieces = 0;
    let head = format!("http://{}", mesh.head.address("http")?);
    let on_text = |text: &str| {
        streamed += text;
        pieces += 1;
        Ok(())
    };
    openai_stream::stream(&head, prompt, on_text)
        .await
        .map_err(|error| anyhow!("{error}"))?;
    ensure!(streamed == whole, "streamed {streamed:?}, whole {whole:?}");
    ensure!(pieces > 1, "the answer came in one piece");
    mesh.shutdown().await
}

#[test]
fn the_embedder_finds_the_related_text() -> Result<()> {
    let options = OrtOptions {
        library: Some(paths::ort_library()?),
        ..OrtOptions::default()
    };
    let texts = ["a lighthouse", "a beacon on the coast", "income tax"].map(str::to_owned);
    let vectors =
        embedder::embed(&paths::minilm()?, &texts, options).map_err(|error| anyhow!("{error}"))?;
    let cosine = |other: usize| -> f32 {
        let pairs = vectors[0].iter().zip(&vectors[other]);
        pairs.map(|(a, b)| a * b).sum()
    };
    ensure!(vectors.len() == 3 && (cosine(0) - 1.0).abs() < 1e-4);
    ensure!(cosine(1) > cosine(2) + 0.2, "{} {}", cosine(1), cosine(2));
    Ok(())
}
