//! Requests that cost more than they look like.

use std::sync::Arc;
use std::time::Duration;

use super::{Tally, exchange};
use crate::targets::Targets;

/// Almost the head's body limit.
const BODY: usize = (8 << 20) - (4 << 10);

/// 12 chats of 8 MiB at once, then 4 at a time for as long as it lasts.
pub(super) async fn digits(targets: Arc<Targets>, tally: Tally) {
    let head = format!(
        r#"{{"model":{:?},"max_tokens":1,"messages":[{{"role":"user","content":""#,
        targets.model
    );
    let body = Arc::new([head.as_bytes(), &vec![b'1'; BODY], b"\"}]}"].concat());
    send(targets, tally, "/v1/chat/completions", vec![body], 12, 4).await;
}

/// Messages, and a field that means nothing, of millions of small objects.
pub(super) async fn objects(targets: Arc<Targets>, tally: Tally) {
    let of = |field: &str, piece: &str| {
        let rest = r#""messages":[{"role":"user","content":"hi"}],"max_tokens":1,"#;
        let rest = if field == "messages" {
            r#""max_tokens":1,"#
        } else {
            rest
        };
        let head = format!(r#"{{"model":{:?},{rest}{field:?}:["#, targets.model);
        let pieces = piece.repeat(BODY / piece.len());
        let pieces = pieces.trim_end_matches(',');
        Arc::new(format!("{head}{pieces}]}}").into_bytes())
    };
    let bodies = vec![
        of("messages", "{},"),
        of("x", "[[]],"),
        of("stop", r#"{"a":0},"#),
        of("tools", r#"{"b":{}},"#),
        of("logit_bias", "0,"),
    ];
    send(targets, tally, "/v1/chat/completions", bodies, 2, 2).await;
}

/// `first` requests at once, then `after` at a time, with a pause behind each.
async fn send(
    targets: Arc<Targets>,
    tally: Tally,
    path: &'static str,
    bodies: Vec<Arc<Vec<u8>>>,
    first: usize,
    after: usize,
) {
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..first {
        let (targets, tally, bodies) = (targets.clone(), tally.clone(), bodies.clone());
        tasks.spawn(async move {
            for round in 0.. {
                let body = &bodies[(number + round) % bodies.len()];
                tally.count(exchange(&targets, path, body).await);
                if number >= after {
                    return;
                }
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
        });
    }
    while tasks.join_next().await.is_some() {}
}
