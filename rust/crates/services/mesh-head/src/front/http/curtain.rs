//! Curtain tokens and API keys: issued, listed, revoked.

use std::time::SystemTime;

use axum::extract::State;
use axum::{Extension, Json};
use data_encoding::BASE64;
use mesh_api::{Code, CreateKeyRequest, Key, KeyCreated, KeyList, KeyRequest, RevokedKey};
use mesh_base::clock::unix_seconds;
use mesh_curtain::{
    LedgerError, Record, Revoked, Right, RightError, Rights, Tier, TierError, TokenId, TokenIdError,
};
use mesh_identity::PublicKey;

use super::admin::read;
use super::error::ApiError;
use super::intake::Received;
use super::keys::{Client, KeyInfo};
use super::state::Api;
use super::tokens::blocking;
use crate::sanctum::{IssueError, Wanted};

/// `POST /v1/mesh/keys`: issues a curtain token. It is no wider than the token with which it is asked for.
pub(super) async fn create(
    State(api): State<Api>,
    Extension(client): Extension<Client>,
    body: Received,
) -> Result<Json<KeyCreated>, ApiError> {
    let request: CreateKeyRequest = read(&api, body)?;
    let note = request.note.clone();
    let wanted = wanted(request, client.papers.tenant.as_deref())?;
    let limits = client.papers.limits();
    let now = unix_seconds(SystemTime::now());
    let sanctum = api.keys.sanctum().clone();
    let issued = blocking(move || sanctum.issue(wanted, &limits, now)).await?;
    let (token, claims) = issued.map_err(refused)?;
    let id = claims.id.to_string();
    api.mesh.audit.token(&id, "created", Some(&note));
    tracing::info!(
        token = id,
        tenant = claims.tenant,
        rights = %claims.rights,
        expires = claims.expires,
        "curtain token issued"
    );
    Ok(Json(KeyCreated {
        token: token.to_text(),
        id,
        expires_at: claims.expires,
    }))
}

fn wanted(request: CreateKeyRequest, own_tenant: Option<&str>) -> Result<Wanted, ApiError> {
    let invalid = |text: String| ApiError::new(Code::InvalidValue, text);
    let life = request.ttl_seconds.unwrap_or(LIFE);
    if !(1..=LONGEST_LIFE).contains(&life) || request.note.len() > LONGEST_NOTE {
        return Err(invalid(format!(
            "'ttl_seconds' must be from 1 to {LONGEST_LIFE}, 'note' at most {LONGEST_NOTE} bytes"
        )));
    }
    let rights = request.rights.iter().map(|right| right.parse::<Right>());
    let rights: Rights = rights
        .collect::<Result<_, _>>()
        .map_err(|error: RightError| invalid(format!("'rights': {error}")))?;
    let tier = match request.tier.as_deref() {
        None => Tier::default(),
        Some(tier) => tier
            .parse()
            .map_err(|error: TierError| invalid(format!("'tier': {error}")))?,
    };
    let holder = request.holder_key.map(|key| {
        let bytes = BASE64.decode(key.as_bytes()).ok();
        let key = bytes.and_then(|bytes| PublicKey::from_bytes(&bytes).ok());
        key.ok_or_else(|| {
            invalid("'holder_key' must be an ML-DSA-65 public key in base64".to_owned())
        })
    });
    Ok(Wanted {
        tenant: request
            .tenant
            .or_else(|| own_tenant.map(str::to_owned))
            .unwrap_or_else(|| TENANT.to_owned()),
        tier,
        subject: request.subject,
        rights: if rights.is_empty() {
            Rights::of_clients()
        } else {
            rights
        },
        life,
        holder: holder.transpose()?,
        note: request.note,
    })
}

fn refused(error: IssueError) -> ApiError {
    let code = match error {
        IssueError::Claims(_) => Code::InvalidValue,
        IssueError::Right(_)
        | IssueError::Tenant(_)
        | IssueError::Tier(_)
        | IssueError::Expiry(_) => Code::MissingRight,
        IssueError::Ledger(LedgerError::Unknown(_)) => Code::TokenNotFound,
        IssueError::Ledger(_) => Code::TooManyTokens,
        IssueError::Trust(_) => Code::TokenFailed,
    };
    ApiError::new(code, error.to_string())
}

/// `GET /v1/mesh/keys`: the curtain tokens that are remembered, and the API keys by their ids.
pub(super) async fn list(State(api): State<Api>) -> Json<KeyList> {
    let now = unix_seconds(SystemTime::now());
    let sanctum = api.keys.sanctum();
    let ledger = sanctum.ledger();
    let issued = ledger
        .issued()
        .iter()
        .map(|record| issued(record, ledger.refuses(0, &record.id), now));
    let keys = api.keys.infos();
    let keys = keys.iter().map(|info| listed(info, now));
    Json(KeyList {
        issuer: sanctum.id().to_string(),
        endorsement: sanctum.endorsement().to_owned(),
        keys: keys
            .chain(issued)
            .chain(ledger.revoked().iter().map(narrowed))
            .collect(),
    })
}

fn issued(record: &Record, refused: bool, now: u64) -> Key {
    let state = match (record.revoked, now < record.expires) {
        (Some(_), _) => "revoked",
        (None, false) => "expired",
        // What it follows from is revoked.
        (None, true) if refused => "revoked",
        (None, true) => "open",
    };
    Key {
        id: record.id.to_string(),
        kind: "token".into(),
        state: state.into(),
        tenant: Some(record.tenant.clone()),
        tier: record.tier.to_string(),
        subject: record.subject.clone(),
        rights: texts(&record.rights),
        note: record.note.clone(),
        created_at: Some(record.created),
        expires_at: Some(record.expires),
        revoked_at: record.revoked,
        parent: record.parent.map(|id| id.to_string()),
        holder: record.holder.clone(),
    }
}

/// A token that a holder signed and that is revoked: only its id is known.
fn narrowed(revoked: &Revoked) -> Key {
    Key {
        id: revoked.id.to_string(),
        kind: "narrowed".into(),
        state: "revoked".into(),
        revoked_at: Some(revoked.at),
        expires_at: Some(revoked.until),
        ..Key::default()
    }
}

fn listed(info: &KeyInfo, now: u64) -> Key {
    let entry = info.entry.as_ref();
    let expires = entry.and_then(|entry| entry.expires);
    Key {
        id: info.id.clone(),
        kind: "api-key".into(),
        state: if expires.is_some_and(|end| now >= end) {
            "expired"
        } else {
            "open"
        }
        .into(),
        tenant: entry.and_then(|entry| entry.tenant.clone()),
        tier: entry
            .map_or(Tier::default(), |entry| entry.tier)
            .to_string(),
        rights: entry.map_or_else(
            || texts(&Rights::of_clients()),
            |entry| texts(&entry.rights),
        ),
        expires_at: expires,
        ..Key::default()
    }
}

fn texts(rights: &Rights) -> Vec<String> {
    rights.iter().map(ToString::to_string).collect()
}

/// `POST /v1/mesh/keys/revoke`: revokes the curtain token with this `id`, and all that follow from it.
pub(super) async fn revoke(
    State(api): State<Api>,
    body: Received,
) -> Result<Json<RevokedKey>, ApiError> {
    let KeyRequest { id } = read(&api, body)?;
    if api.keys.infos().iter().any(|info| info.id == id) {
        let text = format!(
            "{id} is an API key: remove its line from http.api_keys_file and reload the head"
        );
        return Err(ApiError::new(Code::InvalidValue, text));
    }
    let token: TokenId = id.parse().map_err(|error: TokenIdError| {
        ApiError::new(Code::InvalidValue, format!("'id': {error}"))
    })?;
    let (sanctum, now) = (api.keys.sanctum().clone(), unix_seconds(SystemTime::now()));
    let revoked = blocking(move || sanctum.revoke(token, now)).await?;
    revoked.map_err(refused)?;
    api.mesh.audit.token(&id, "revoked", None);
    tracing::warn!(
        event = "token revoked",
        token = id,
        "curtain token revoked by an operator"
    );
    Ok(Json(RevokedKey { id, revoked: true }))
}

/// Tenant of tokens for which none is named.
const TENANT: &str = "default";
/// 90 days.
const LIFE: u64 = 90 * 24 * 3600;
/// Five years.
const LONGEST_LIFE: u64 = 5 * 366 * 24 * 3600;
const LONGEST_NOTE: usize = 256;
