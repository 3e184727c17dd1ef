//! Join tokens: made, listed, withdrawn.

use std::time::{Duration, SystemTime};

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use mesh_base::clock::unix_seconds;
use mesh_net::trust::{Revocation, TokenRecord, TrustError};
use serde::Deserialize;
use serde_json::{Value, json};

use super::admin::read;
use super::error::ApiError;
use super::state::Api;

/// `POST /v1/mesh/tokens`: makes a join token. The body may hold `ttl_seconds` and `note`.
pub(super) async fn create(State(api): State<Api>, body: Bytes) -> Result<Json<Value>, ApiError> {
    #[derive(Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Ask {
        ttl_seconds: u64,
        note: String,
    }
    impl Default for Ask {
        fn default() -> Self {
            Self {
                ttl_seconds: TOKEN_LIFE.as_secs(),
                note: String::new(),
            }
        }
    }
    let ask: Ask = read(&body)?;
    let life = Duration::from_secs(ask.ttl_seconds);
    if life.is_zero() || life > LONGEST_TOKEN_LIFE || ask.note.len() > LONGEST_NOTE {
        let text = format!(
            "'ttl_seconds' must be from 1 to {}, 'note' at most {LONGEST_NOTE} bytes",
            LONGEST_TOKEN_LIFE.as_secs()
        );
        return Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            "invalid_value",
            text,
        ));
    }
    let now = SystemTime::now();
    let authority = api.authority.clone();
    let created = blocking(move || authority.create_token(life, &ask.note, now)).await?;
    let token = created.map_err(|error| match error {
        TrustError::TooManyTokens { .. } => {
            ApiError::new(StatusCode::CONFLICT, "too_many_tokens", error.to_string())
        }
        error => failed(format!("no token was made: {error}")),
    })?;
    let expires = unix_seconds(now).saturating_add(life.as_secs());
    tracing::info!(
        token = token.id(),
        life_seconds = life.as_secs(),
        "join token created"
    );
    Ok(Json(
        json!({ "token": token.to_string(), "id": token.id(), "expires_at": expires }),
    ))
}

/// `GET /v1/mesh/tokens`: the tokens that are remembered, never their secrets. The state of one is `open`,
/// `used` or `expired`.
pub(super) async fn list(State(api): State<Api>) -> Result<Json<Value>, ApiError> {
    let now = unix_seconds(SystemTime::now());
    let authority = api.authority.clone();
    let records = blocking(move || authority.token_records()).await?;
    let tokens: Vec<Value> = records.iter().map(|record| shown(record, now)).collect();
    Ok(Json(json!({ "tokens": tokens })))
}

fn shown(record: &TokenRecord, now: u64) -> Value {
    let open = record.is_open(now);
    let state = match (&record.used, open) {
        (Some(_), _) => "used",
        (None, true) => "open",
        (None, false) => "expired",
    };
    json!({
        "id": record.id,
        "note": record.note,
        "state": state,
        "created_at": record.created,
        "expires_at": record.expires,
        "age_seconds": now.saturating_sub(record.created),
        "expires_in_seconds": record.expires.saturating_sub(now),
        "uses_left": u32::from(open),
        "used_by": record.used.as_ref().map(|used| json!({
            "node_id": used.node_id,
            "name": used.node_name,
            "at": used.at,
        })),
    })
}

/// `POST /v1/mesh/tokens/revoke`: withdraws the open token with this `id`.
pub(super) async fn revoke(State(api): State<Api>, body: Bytes) -> Result<Json<Value>, ApiError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Asked {
        id: String,
    }
    let asked: Asked = read(&body)?;
    let (authority, id) = (api.authority.clone(), asked.id.clone());
    let revoked = blocking(move || authority.revoke_token(&id, SystemTime::now())).await?;
    revoked.map_err(|error| {
        let text = error.to_string();
        match error {
            Revocation::Unknown(_) => ApiError::new(StatusCode::NOT_FOUND, "token_not_found", text),
            Revocation::Used { .. } => ApiError::new(StatusCode::CONFLICT, "token_used", text),
            _ => failed(format!("the token was not withdrawn: {text}")),
        }
    })?;
    tracing::warn!(
        event = "token revoked",
        token = asked.id,
        "join token revoked by an operator"
    );
    Ok(Json(json!({ "id": asked.id, "revoked": true })))
}

/// Runs work that waits for the disk.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| failed(error.to_string()))
}

fn failed(text: String) -> ApiError {
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "token_failed", text)
}

const TOKEN_LIFE: Duration = Duration::from_secs(24 * 3600);
const LONGEST_TOKEN_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);
const LONGEST_NOTE: usize = 256;
