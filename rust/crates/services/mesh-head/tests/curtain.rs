//! Curtain tokens at the HTTP doors of a running head.

mod support;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mesh_curtain::{Child, Token};
use mesh_identity::IdentityKey;
use serde_json::{Value, json};
use support::{MODEL, Script, TestHead, chat, issue, issued, send, trail};

fn refused(answer: &(u16, Value), status: u16, code: &str, part: &str) {
    let error = &answer.1["error"];
    assert_eq!(
        (answer.0, &error["code"]),
        (status, &json!(code)),
        "{answer:?}"
    );
    assert!(error["message"].as_str().unwrap().contains(part), "{error}");
}

const CHAT: &str = "/v1/chat/completions";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_door_asks_for_its_right_and_names_what_is_missing() {
    let head = TestHead::start(|config| config.http.require_key = true).await;
    let _worker = head.worker("w", Script::default()).await;
    head.until_ready("w").await;
    let ask = || Some(chat("why?", 3));
    let unnamed =
        || Some(json!({ "max_tokens": 3, "messages": [{ "role": "user", "content": "why?" }] }));
    let embed = || Some(json!({ "model": MODEL, "input": "x" }));
    let image = || Some(json!({ "prompt": "x" }));
    let (status, error) = head.post(CHAT, chat("why?", 3)).await;
    assert_eq!(
        (status, &error["error"]["code"]),
        (401, &json!("invalid_api_key"))
    );

    let (infer, _) = issued(
        &head,
        json!({ "rights": [format!("infer:{MODEL}")], "tenant": "lab" }),
    )
    .await;
    assert_eq!(send(&head, &infer, CHAT, ask()).await.0, 200);
    assert_eq!(send(&head, &infer, CHAT, unnamed()).await.0, 200);
    let (_, list) = send(&head, &infer, "/v1/models", None).await;
    assert_eq!(list["data"][0]["id"], MODEL);
    for (path, body, need) in [
        ("/v1/embeddings", embed(), "the right embed"),
        ("/v1/images/generations", image(), "the right image"),
        ("/v1/images/edits", image(), "the right image"),
        ("/v1/mesh", None, "the right infer:*"),
        ("/v1/mesh/nodes", None, "the right admin"),
        ("/v1/mesh/keys", None, "the right admin"),
        ("/v1/mesh/tokens", None, "the right join"),
    ] {
        refused(
            &send(&head, &infer, path, body).await,
            403,
            "missing_right",
            need,
        );
    }

    let (other, _) = issued(&head, json!({ "rights": ["infer:Qwen*", "embed", "join"] })).await;
    refused(
        &send(&head, &other, CHAT, ask()).await,
        403,
        "missing_right",
        "infer:tiny",
    );
    refused(
        &send(&head, &other, CHAT, unnamed()).await,
        403,
        "missing_right",
        "infer:tiny",
    );
    refused(
        &send(&head, &other, "/v1/models/tiny", None).await,
        404,
        "model_not_found",
        "tiny",
    );
    assert_eq!(
        send(&head, &other, "/v1/models", None).await.1["data"],
        json!([])
    );
    assert_ne!(send(&head, &other, "/v1/embeddings", embed()).await.0, 403);
    assert_eq!(send(&head, &other, "/v1/mesh/tokens", None).await.0, 200);

    let wanted = json!({ "rights": ["admin"] });
    refused(
        &issue(&head, &head.admin_key(), wanted).await,
        400,
        "invalid_value",
        "tier master",
    );
    let (admin, _) = issued(&head, json!({ "rights": ["admin"], "tier": "master" })).await;
    assert_eq!(send(&head, &admin, "/v1/mesh/nodes", None).await.0, 200);
    refused(
        &send(&head, &admin, CHAT, ask()).await,
        403,
        "missing_right",
        "infer:tiny",
    );
    // A token gives what it has, and no more.
    let wanted = json!({ "rights": ["infer:*"] });
    refused(
        &issue(&head, &admin, wanted).await,
        403,
        "missing_right",
        "infer:*",
    );

    // OpenAI's clients name their organization.
    let request = head.http.get(head.url("/v1/models")).bearer_auth(&infer);
    let answer = request
        .header("openai-organization", "shop")
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 403);
    let answer: Value = answer.json().await.unwrap();
    assert_eq!(answer["error"]["code"], "wrong_tenant");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn altered_expired_revoked_and_foreign_tokens_are_refused_and_that_outlives_a_restart() {
    let head = TestHead::start(|_| {}).await;
    let (good, _) = issued(&head, json!({})).await;
    let models = |token: String| {
        let head = &head;
        async move { send(head, &token, "/v1/models", None).await }
    };
    assert_eq!(models(good.clone()).await.0, 200);
    let mut altered = good.clone();
    altered.replace_range(
        2_000..2_001,
        if &good[2_000..2_001] == "A" { "B" } else { "A" },
    );
    refused(&models(altered).await, 401, "invalid_api_key", "token");
    let (short, _) = issued(&head, json!({ "ttl_seconds": 1 })).await;
    tokio::time::sleep(std::time::Duration::from_millis(1_100)).await;
    refused(&models(short).await, 401, "invalid_api_key", "expired");
    let foreign = TestHead::start(|_| {}).await;
    let (stranger, _) = issued(&foreign, json!({})).await;
    refused(
        &models(stranger).await,
        401,
        "invalid_api_key",
        "another issuer",
    );

    // What an administrator's token has issued goes with it.
    let asked = json!({ "tier": "master", "rights": ["admin", "infer:*"] });
    let (deputy, deputy_id) = issued(&head, asked).await;
    let wanted = json!({ "rights": ["infer:*"], "ttl_seconds": 60 });
    let (status, child) = issue(&head, &deputy, wanted).await;
    assert_eq!(status, 200, "{child}");
    let child = child["token"].as_str().unwrap().to_owned();
    assert_eq!(models(child.clone()).await.0, 200);
    let long = json!({ "rights": ["infer:*"], "ttl_seconds": 90 * 86_400 + 600 });
    refused(
        &issue(&head, &deputy, long).await,
        403,
        "missing_right",
        "outlive",
    );
    let body = json!({ "id": deputy_id });
    let admin = head.admin_key();
    let (status, answer) = send(&head, &admin, "/v1/mesh/keys/revoke", Some(body)).await;
    assert_eq!((status, &answer["revoked"]), (200, &json!(true)));
    refused(
        &models(deputy.clone()).await,
        401,
        "invalid_api_key",
        "revoked",
    );
    refused(
        &models(child.clone()).await,
        401,
        "invalid_api_key",
        "revoked",
    );
    let (_, list) = send(&head, &admin, "/v1/mesh/keys", None).await;
    let states = list["keys"].as_array().unwrap().iter();
    let states: Vec<&str> = states.map(|key| key["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["open", "expired", "revoked", "revoked"]);

    let TestHead { handle, dir, .. } = head;
    handle.shutdown().await.unwrap();
    let state_dir = dir.path().to_owned();
    let again = TestHead::start(move |config| config.state_dir = state_dir).await;
    assert_eq!(send(&again, &good, "/v1/models", None).await.0, 200);
    assert_eq!(send(&again, &child, "/v1/models", None).await.0, 401);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_narrows_its_token_and_records_name_the_token_that_was_shown() {
    let head = TestHead::start(|_| {}).await;
    let _worker = head.worker("w", Script::default()).await;
    head.until_ready("w").await;
    let key = IdentityKey::generate();
    let holder = STANDARD.encode(key.public().as_bytes());
    let asked =
        json!({ "tier": "goodlife", "tenant": "lab", "rights": ["infer:*"], "holder_key": holder });
    let (parent, parent_id) = issued(&head, asked).await;
    refused(
        &send(&head, &parent, CHAT, Some(chat("why?", 3))).await,
        401,
        "invalid_api_key",
        "delegation only",
    );
    let parent = Token::parse(&parent).unwrap();
    let claims = parent.claims().next().unwrap();
    let child = Child {
        rights: format!("infer:{MODEL}").parse().unwrap(),
        tier: None,
        subject: "anna".to_owned(),
        not_before: claims.not_before,
        expires: claims.expires,
        holder: None,
    };
    let token = parent.delegate(child, &key).unwrap();
    let id = token.claims().last().unwrap().id.to_string();
    let text = token.to_text();
    // Longer than the usual 8 KiB of headers.
    assert!(text.len() > 8 << 10);
    let (status, answer) = send(&head, &text, CHAT, Some(chat("my secret question", 3))).await;
    assert_eq!(status, 200, "{answer}");
    refused(
        &send(&head, &text, "/v1/mesh", None).await,
        403,
        "missing_right",
        &id,
    );
    let admin = head.admin_key();
    let body = Some(json!({ "id": id }));
    assert_eq!(
        send(&head, &admin, "/v1/mesh/keys/revoke", body).await.0,
        200
    );
    refused(
        &send(&head, &text, CHAT, Some(chat("why?", 3))).await,
        401,
        "invalid_api_key",
        &id,
    );

    let TestHead { handle, dir, .. } = head;
    handle.shutdown().await.unwrap();
    let trail = |tier: &str| trail(dir.path(), tier);
    let requests = trail("goodlife");
    let request = requests
        .iter()
        .find(|record| record["kind"] == "request")
        .unwrap();
    assert_eq!(
        (&request["key"], &request["outcome"]),
        (&json!(id), &json!("complete"))
    );
    let master = trail("master");
    let decisions = |id: &str| {
        let of = master.iter().filter(|record| record["token"] == id);
        of.map(|record| record["decision"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(decisions(&parent_id), ["created", "refused"]);
    assert_eq!(decisions(&id), ["refused", "revoked", "refused"]);
    let all = format!("{requests:?}{master:?}");
    assert!(!all.contains(&text[100..140]) && !all.contains("secret question"));
}
