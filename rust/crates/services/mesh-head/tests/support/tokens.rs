//! Curtain tokens, and the records about them.

use std::path::Path;

use mesh_audit::archive::Archive;
use mesh_audit::record;
use serde_json::Value;

use super::TestHead;

/// Sends a request with a token; the status and the answer.
pub(crate) async fn send(
    head: &TestHead,
    token: &str,
    path: &str,
    body: Option<Value>,
) -> (u16, Value) {
    let url = head.url(path);
    let request = match body {
        Some(body) => head.http.post(url).json(&body),
        None => head.http.get(url),
    };
    let answer = request.bearer_auth(token).send().await.unwrap();
    let status = answer.status().as_u16();
    (status, answer.json().await.unwrap_or_default())
}

/// Issues a token with the admin key, or another token.
pub(crate) async fn issue(head: &TestHead, with: &str, asked: Value) -> (u16, Value) {
    send(head, with, "/v1/mesh/keys", Some(asked)).await
}

/// A token of these claims, and its id.
pub(crate) async fn issued(head: &TestHead, asked: Value) -> (String, String) {
    let (status, answer) = issue(head, &head.admin_key(), asked).await;
    assert_eq!(status, 200, "{answer}");
    let text = |name: &str| answer[name].as_str().unwrap().to_owned();
    (text("token"), text("id"))
}

/// The records in the trail of a tier of a head that has stopped.
pub(crate) fn trail(state_dir: &Path, tier: &str) -> Vec<Value> {
    let archive = Archive::open(&state_dir.join("audit").join(tier)).unwrap();
    let mut records = Vec::new();
    let read = archive.entries(0, |_, entry| {
        let (text, _) = record::split(entry).unwrap();
        records.push(serde_json::from_slice(text).unwrap());
        true
    });
    read.unwrap();
    records
}
