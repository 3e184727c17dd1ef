//! One key that wants all of it.

use std::sync::Arc;
use std::time::Duration;

use mesh_api::{ChatCompletionRequest, GenerationOptions};
use mesh_testkit::client::http::{HttpClient, HttpError};
use tokio::task::JoinSet;

use super::Tally;
use crate::targets::Targets;

const CONNECTIONS: usize = 80;

/// 80 connections, 16 answers each, one request after the other.
pub(super) async fn greedy(targets: Arc<Targets>, tally: Tally) {
    let mut tasks = JoinSet::new();
    for number in 0..CONNECTIONS {
        let (targets, tally) = (targets.clone(), tally.clone());
        tasks.spawn(async move {
            let address = targets.http.to_string();
            let Ok(http) = HttpClient::new(&address, Some(targets.key.clone())) else {
                return;
            };
            for round in 0.. {
                let options = GenerationOptions {
                    model: Some(targets.model.clone()),
                    n: Some(16),
                    max_tokens: Some(64),
                    ignore_eos: Some(true),
                    ..GenerationOptions::default()
                };
                let question = format!("Number {number}, time {round}: tell me more.");
                match http
                    .complete(&ChatCompletionRequest::question(question, options))
                    .await
                {
                    Ok(answer) => tally.add("choices", answer.choices.len() as u64),
                    Err(HttpError::Api { status, .. }) => tally.count(format!("status {status}")),
                    Err(error) => tally.count(error),
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        });
    }
    while tasks.join_next().await.is_some() {}
}
