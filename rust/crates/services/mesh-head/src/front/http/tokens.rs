//! Join tokens: made, listed, withdrawn.

use std::time::{Duration, SystemTime};

use arcanum_attestor::{MOST_NODES, Revocation, TokenRecord, TokenSpec};
use axum::Json;
use axum::extract::State;
use mesh_api::{
    Code, CreateTokenRequest, RevokedToken, Token, TokenCreated, TokenList, TokenRequest, TokenUse,
};
use mesh_base::clock::unix_seconds;
use mesh_net::trust::TrustError;

use super::admin::read;
use super::error::ApiError;
use super::intake::Received;
use super::state::Api;

/// `POST /v1/mesh/tokens`: makes a join token. The body may hold `ttl_seconds` and `note`.
pub(super) async fn create(
    State(api): State<Api>,
    body: Received,
) -> Result<Json<TokenCreated>, ApiError> {
    let request: CreateTokenRequest = read(&api, body)?;
    let life = request.ttl_seconds.map_or(TOKEN_LIFE, Duration::from_secs);
    let nodes = request.nodes.unwrap_or(1);
    let is_bad = life.is_zero() || life > LONGEST_TOKEN_LIFE || request.note.len() > LONGEST_NOTE;
    if is_bad || !(1..=MOST_NODES).contains(&nodes) {
        let text = format!(
            "'ttl_seconds' must be from 1 to {}, 'nodes' from 1 to {MOST_NODES}, 'note' at most {LONGEST_NOTE} bytes",
            LONGEST_TOKEN_LIFE.as_secs()
        );
        return Err(ApiError::new(Code::InvalidValue, text));
    }
    // Heads do not join: there is one, and it holds the root.
    if request.role.as_deref().is_some_and(|role| role != "worker") {
        let text = "'role' must be \"worker\": no other node joins with a token";
        return Err(ApiError::new(Code::InvalidValue, text.to_owned()));
    }
    let note = request.note;
    let spec = TokenSpec {
        lifetime: life,
        nodes,
        note: note.clone(),
    };
    let now = SystemTime::now();
    let authority = api.authority.clone();
    let created = blocking(move || authority.issue_token(&spec, now)).await?;
    let token = created.map_err(|error| match error {
        TrustError::TooManyTokens { .. } => ApiError::new(Code::TooManyTokens, error.to_string()),
        error => failed(format!("no token was made: {error}")),
    })?;
    let expires = unix_seconds(now).saturating_add(life.as_secs());
    api.mesh.audit.token(&token.id(), "created", Some(&note));
    tracing::info!(
        token = token.id(),
        life_seconds = life.as_secs(),
        nodes,
        "join token created"
    );
    Ok(Json(TokenCreated {
        token: token.to_string(),
        id: token.id().to_owned(),
        expires_at: expires,
    }))
}

/// `GET /v1/mesh/tokens`: the tokens that are remembered, never their secrets. The state of one is `open`,
/// `used` or `expired`.
pub(super) async fn list(State(api): State<Api>) -> Result<Json<TokenList>, ApiError> {
    let now = unix_seconds(SystemTime::now());
    let authority = api.authority.clone();
    let records = blocking(move || authority.token_records()).await?;
    let tokens = records.iter().map(|record| shown(record, now)).collect();
    Ok(Json(TokenList { tokens }))
}

fn shown(record: &TokenRecord, now: u64) -> Token {
    let open = record.is_open(now);
    let state = match (record.uses_left(), open) {
        (0, _) => "used",
        (_, true) => "open",
        (_, false) => "expired",
    };
    let shown = |used: &arcanum_attestor::TokenUse| TokenUse {
        node_id: used.node_id.clone(),
        name: used.node_name.clone(),
        at: used.at,
    };
    Token {
        id: record.id.clone(),
        note: record.note.clone(),
        state: state.into(),
        created_at: record.created,
        expires_at: record.expires,
        age_seconds: now.saturating_sub(record.created),
        expires_in_seconds: record.expires.saturating_sub(now),
        uses_left: if open { record.uses_left() } else { 0 },
        used_by: record.uses.last().map(shown),
        nodes: record.nodes,
        role: record.role.clone().into(),
        uses: record.uses.iter().map(shown).collect(),
    }
}

/// `POST /v1/mesh/tokens/revoke`: withdraws the open token with this `id`.
pub(super) async fn revoke(
    State(api): State<Api>,
    body: Received,
) -> Result<Json<RevokedToken>, ApiError> {
    let TokenRequest { id } = read(&api, body)?;
    let (authority, revoked_id) = (api.authority.clone(), id.clone());
    let revoked = blocking(move || authority.revoke_token(&revoked_id, SystemTime::now())).await?;
    revoked.map_err(|error| {
        let text = error.to_string();
        match error {
            Revocation::Unknown(_) => ApiError::new(Code::TokenNotFound, text),
            Revocation::Used { .. } => ApiError::new(Code::TokenUsed, text),
            _ => failed(format!("the token was not withdrawn: {text}")),
        }
    })?;
    api.mesh.audit.token(&id, "withdrawn", None);
    tracing::warn!(
        event = "token revoked",
        token = id,
        "join token revoked by an operator"
    );
    Ok(Json(RevokedToken { id, revoked: true }))
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
    ApiError::new(Code::TokenFailed, text)
}

const TOKEN_LIFE: Duration = Duration::from_secs(24 * 3600);
const LONGEST_TOKEN_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);
const LONGEST_NOTE: usize = 256;
