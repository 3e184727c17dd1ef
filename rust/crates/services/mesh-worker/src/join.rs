//! Joining the mesh: with the identity in the state directory, or with a token.

use std::net::SocketAddr;
use std::path::Path;

use dcf::ErrorCode;
use mesh_net::quic::{self, ConnectError, JoinError};
use mesh_net::trust::{EvidenceSource, Newcomer, NodeIdentity, TrustError};
use mesh_service::health::Health;
use mesh_worker_core::Refusal;

use crate::config::Config;
use crate::error::WorkerError;
use crate::lan::HeadPlace;
use crate::token::{look_at_token_file, read_token, token_advice, unusable};

/// Loads the identity in the state directory, or joins with the token. `None` means that the head does not
/// answer yet, or that this node waits for approval there; `health` has the reason.
///
/// # Errors
/// If there is neither; if the identity's files are not whole and the token does not mend that; if the head
/// refuses.
pub(crate) async fn identify(
    config: &Config,
    head: &HeadPlace,
    health: &Health,
    evidence: Option<&EvidenceSource>,
) -> Result<Option<NodeIdentity>, WorkerError> {
    let token = read_token(config)?;
    let loaded = NodeIdentity::load(&config.state_dir);
    match (loaded, &token) {
        (Ok(identity), None) => return Ok(Some(identity)),
        (Ok(identity), Some(token)) if identity.roots().is_of_mesh(token.root_sha256()) => {
            return Ok(Some(identity));
        }
        (Ok(_) | Err(TrustError::NoIdentity { .. }), Some(_)) => {}
        (Err(error), None) => return Err(unusable(error)),
        (Err(error), Some(_)) => {
            tracing::warn!(%error, "this worker's identity cannot be used; it tries to join again with its token");
        }
    }
    look_at_token_file(config);
    let addresses = match head.resolve().await {
        Ok(addresses) => addresses,
        Err(reason) => {
            tracing::warn!(%head, reason, "the head has no address yet, trying again");
            return Ok(None);
        }
    };
    let name = config.node_name();
    let node = Newcomer {
        name: &name,
        evidence,
    };
    match quic::load_or_join(&addresses, token.as_ref(), &config.state_dir, node).await {
        Ok(identity) => {
            tracing::info!(
                node = identity.node_id(),
                name = identity.member().name,
                "joined the mesh"
            );
            Ok(Some(identity))
        }
        Err(error) if error.is_transient() => {
            tracing::warn!(%error, "cannot join yet, trying again");
            health.set_unready(format!("this worker has not joined yet: {error}"));
            Ok(None)
        }
        Err(error) => Err(WorkerError::Join {
            head: head.to_string(),
            source: Box::new(error),
        }),
    }
}

/// The reason why there is no link to the head, or no longer one.
pub(crate) struct Ended {
    pub(crate) reason: String,
    pub(crate) refusal: Option<Refusal>,
}

impl From<String> for Ended {
    fn from(reason: String) -> Self {
        let refusal = None;
        Ended { reason, refusal }
    }
}

impl From<&str> for Ended {
    fn from(reason: &str) -> Self {
        reason.to_owned().into()
    }
}

/// The certificate is of no use and cannot be renewed: a token that the configuration names by now can
/// mend that. It is read each time, so that a worker which waits takes a new one.
pub(crate) async fn join_again(
    config: &Config,
    addresses: &[SocketAddr],
    identity: &NodeIdentity,
    refused: &str,
    not_renewed: JoinError,
    evidence: Option<&EvidenceSource>,
) -> Result<(), Ended> {
    let text = format!("{refused}; certificate not renewed: {not_renewed}");
    if not_renewed.is_expulsion() {
        return Err(Ended {
            reason: not_renewed.to_string(),
            refusal: Some(Refusal::Expelled),
        });
    }
    // If this machine or the path to the head fails, a token would be used up for nothing.
    // A certificate of a mesh root that was replaced is refused in the handshake already.
    let is_refused = match &not_renewed {
        JoinError::Refused { .. } => true,
        JoinError::Connect(ConnectError::Refused { code, .. }) => *code == ErrorCode::UNAUTHORIZED,
        _ => false,
    };
    if not_renewed.is_transient() || !is_refused {
        return Err(text.into());
    }
    let credentials = std::env::var_os("CREDENTIALS_DIRECTORY");
    let advice = token_advice(config, credentials.as_deref().map(Path::new));
    let token = match read_token(config) {
        Ok(Some(token)) => token,
        Ok(None) => return Err(format!("{text}{advice}").into()),
        Err(error) => return Err(format!("{text}; {error}{advice}").into()),
    };
    if !identity.roots().is_of_mesh(token.root_sha256()) {
        let foreign = "the join token is for another mesh: restart the worker to join that one";
        return Err(format!("{text}; {foreign}").into());
    }
    look_at_token_file(config);
    let (state_dir, name) = (&config.state_dir, config.node_name());
    let node = Newcomer {
        name: &name,
        evidence,
    };
    let joined = quic::join_again(addresses, &token, state_dir, node).await;
    match joined.and_then(|_| Ok(identity.reload()?)) {
        Ok(_) => {
            tracing::info!(
                node = identity.node_id(),
                "joined again with a new token: the old certificate could not be renewed"
            );
            Ok(())
        }
        Err(error) => Err(Ended {
            refusal: error.is_expulsion().then_some(Refusal::Expelled),
            reason: format!("{text}; its join token does not help: {error}{advice}"),
        }),
    }
}
