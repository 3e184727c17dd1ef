//! Answers that follow a schema or a grammar, from one worker, from a ring, and through the loss of a member.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use arcanum_tests::{
    ChatQuestion, Cluster, Fault, RunningStreams, Seed, Undisturbed, alone, first_model,
};
use mesh_api::{ChatCompletion, ChatCompletionRequest, GenerationOptions};
use mesh_client::http::HttpClient;
use mesh_testkit::{Mesh, paths};
use serde_json::{Value, json};

/// Bounded on all sides, so that an answer of any model ends.
const PERSON: &str = r#"{"type": "object", "additionalProperties": false,
    "required": ["surname", "born", "cities", "alive"], "properties": {
        "surname": {"type": "string", "maxLength": 24}, "born": {"type": "integer", "minimum": 1000, "maximum": 2030},
        "cities": {"type": "array", "minItems": 2, "maxItems": 3, "items": {"type": "string", "maxLength": 16}},
        "alive": {"type": "boolean"}}}"#;

async fn ask(client: &HttpClient, question: &str, options: GenerationOptions) -> Result<String> {
    let model = first_model(client).await?;
    let options = GenerationOptions {
        model: Some(model.clone()),
        ..options
    };
    let request = ChatCompletionRequest::question(question, options);
    let answer: ChatCompletion<'_> = client.post("/v1/chat/completions", &request).await?;
    let choice = answer.choices.into_iter().next().context("a choice")?;
    ensure!(choice.finish_reason == "stop", "{choice:?}");
    Ok(choice.message.content.into_owned())
}

fn person(text: &str) -> Result<()> {
    let value: Value = serde_json::from_str(text).with_context(|| text.to_owned())?;
    let keys: Vec<&String> = value.as_object().context("an object")?.keys().collect();
    // As the schema has them.
    ensure!(keys == ["surname", "born", "cities", "alive"], "{text}");
    let born = value["born"].as_u64().context("a year")?;
    ensure!((1000..=2030).contains(&born), "{text}");
    let cities = value["cities"].as_array().context("cities")?;
    ensure!((2..=3).contains(&cities.len()), "{text}");
    ensure!(value["alive"].is_boolean(), "{text}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_have_the_form_that_was_asked_for() -> Result<()> {
    let _alone = alone();
    let mesh = Mesh::builder()
        .workers(1)
        .worker_config("threads = 0\ncontext = 512\n")
        .start()
        .await?;
    let client = mesh.client()?;
    let options = GenerationOptions {
        max_tokens: Some(200),
        temperature: Some(1.0),
        ..GenerationOptions::default()
    };
    for seed in 0..4 {
        let options = GenerationOptions {
            seed: Some(seed),
            json_schema: Some(serde_json::from_str(PERSON)?),
            ..options.clone()
        };
        person(&ask(&client, "Describe a painter.", options).await?)?;
    }
    let of = |field: &str, value: Value| -> Result<GenerationOptions> {
        let mut all = serde_json::to_value(&options)?;
        all[field] = value;
        Ok(serde_json::from_value(all)?)
    };
    let question = "How many legs has a spider?";
    let year = ask(
        &client,
        question,
        of("regex", json!("It has [0-9]{1,2} legs\\."))?,
    )
    .await?;
    ensure!(
        year.starts_with("It has ") && year.ends_with(" legs."),
        "{year:?}"
    );
    let choice = ask(
        &client,
        question,
        of("guided_choice", json!(["six", "eight"]))?,
    )
    .await?;
    ensure!(["six", "eight"].contains(&choice.as_str()), "{choice:?}");
    let gbnf = "root ::= (\"(\" root \")\") | [0-9]{2}";
    let nested = ask(&client, question, of("grammar", json!(gbnf))?).await?;
    let inner = nested.trim_start_matches('(').trim_end_matches(')');
    ensure!(
        inner.len() == 2 && inner.parse::<u8>().is_ok(),
        "{nested:?}"
    );
    let balance = nested.matches('(').count() == nested.matches(')').count();
    ensure!(balance, "{nested:?}");

    // What cannot be followed is refused before anything is generated, by the name of the feature.
    for (schema, names) in [
        (json!({"type": "array", "uniqueItems": true}), "uniqueItems"),
        (json!({"type": "nothing"}), "nothing"),
        (
            json!({"allOf": [{"type": "string"}, {"type": "integer"}]}),
            "schema",
        ),
    ] {
        let refused = ask(&client, question, of("json_schema", schema)?).await;
        let error = format!("{:#}", refused.err().context("it is refused")?);
        ensure!(error.contains("400") || error.contains(names), "{error}");
        ensure!(error.contains(names), "{error}");
    }
    mesh.shutdown().await
}

/// HYDRAMESH_SCHEMAS is the number of schemas; a few without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn generated_schemas_are_followed_by_a_worker_and_by_a_ring() -> Result<()> {
    let _alone = alone();
    let count = std::env::var("HYDRAMESH_SCHEMAS").unwrap_or_else(|_| "24".to_owned());
    let mut cluster = Cluster::builder().whole(1).threads(2).start().await?;
    cluster.mesh.wait_for_workers(1).await?;
    validate(cluster.mesh.head.address("http")?, &count).await?;
    cluster.shutdown().await?;
    let mut cluster = Cluster::builder().ring_workers(3).stages(3).start().await?;
    cluster.wait_for_whole_ring().await?;
    validate(cluster.mesh.head.address("http")?, &count).await?;
    cluster.shutdown().await
}

async fn validate(head: std::net::SocketAddr, count: &str) -> Result<()> {
    let python = paths::fetched("python/bin/python")?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/python/schemas.py");
    let arguments = [
        script.to_owned(),
        format!("http://{head}/v1"),
        count.to_owned(),
    ];
    let command = move || Command::new(python).args(arguments).output();
    let output = tokio::task::spawn_blocking(command).await??;
    let words = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    println!("{words}");
    ensure!(output.status.success(), "{words}");
    Ok(())
}

/// HYDRAMESH_LOSSES is the number of lost members; a few without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schema_holds_through_the_loss_of_a_member() -> Result<()> {
    let _alone = alone();
    let losses = std::env::var("HYDRAMESH_LOSSES").ok();
    let losses = losses.map_or(Ok(3), |text| text.parse())?;
    let mut seed = Seed::of_this_run(20_261_201);
    let mut cluster = Cluster::builder().ring_workers(4).stages(3).start().await?;
    for run in 0..losses {
        let ask = ChatQuestion::sampled("Describe a painter.", 200, run).following(PERSON);
        let mut undisturbed = Undisturbed::new();
        undisturbed.learn(std::slice::from_ref(&ask)).await?;
        let ring = cluster.wait_for_whole_ring().await?;
        let victim = ring.stages[seed.below(ring.stages.len())]
            .member
            .worker
            .clone();
        let after = 1 + seed.below(12);
        let what = format!("run {run}: {victim} killed after {after} tokens");
        let running = RunningStreams::start(&cluster.client()?, std::slice::from_ref(&ask));
        running.wait_for_tokens(after).await.context(what.clone())?;
        cluster.strike(&victim, Fault::Kill)?;
        let answers = running.answers().await.context(what.clone())?;
        undisturbed.check(&ask, &answers[0]).context(what.clone())?;
        person(&answers[0].transcript.text).context(what)?;
        cluster.remove(&victim);
        cluster.add_ring_worker().await?;
    }
    cluster.shutdown().await
}
