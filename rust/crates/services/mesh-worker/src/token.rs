//! The join token, and errors of a worker without one.

use std::path::Path;

use mesh_net::trust::{JoinToken, NodeIdentity, TrustError};
use mesh_service::files::{self, Readers};

use crate::config::Config;
use crate::error::WorkerError;

/// Error of a worker that has neither an identity nor a token, or whose identity is damaged.
pub(crate) fn unusable(error: TrustError) -> WorkerError {
    match error {
        TrustError::NoIdentity { .. } => WorkerError::NoToken,
        error => WorkerError::Identity(error),
    }
}

/// The token that the configuration names, if it names one that is to be used still.
pub(crate) fn read_token(config: &Config) -> Result<Option<JoinToken>, WorkerError> {
    let (text, origin) = match (&config.join_token, &config.join_token_file) {
        (Some(text), _) => (text.clone(), "`join_token`".to_owned()),
        (None, Some(path)) => match std::fs::read_to_string(path) {
            Ok(text) => (text, path.display().to_string()),
            // Tokens are used once; after the join their file may be gone. A worker that cannot use its
            // identity is told of that.
            Err(_) if !has_never_joined(&config.state_dir) => return Ok(None),
            Err(source) => {
                return Err(WorkerError::TokenFile {
                    path: path.clone(),
                    source,
                });
            }
        },
        (None, None) => return Ok(None),
    };
    match text.trim().parse() {
        Ok(token) => Ok(Some(token)),
        Err(error) => Err(WorkerError::Token {
            origin,
            reason: format!("{error}"),
        }),
    }
}

fn has_never_joined(state_dir: &Path) -> bool {
    let loaded = NodeIdentity::load(state_dir);
    matches!(loaded, Err(TrustError::NoIdentity { .. }))
}

/// Tells of a token that is still to be used and that others can read.
pub(crate) fn look_at_token_file(config: &Config) {
    if let Some(path) = &config.join_token_file {
        files::warn_if_exposed(path, Readers::Group);
    }
}

/// Further advice where the token file is systemd's copy of another one, in `credentials`.
pub(crate) fn token_advice(config: &Config, credentials: Option<&Path>) -> &'static str {
    let path = config.join_token_file.as_deref();
    match (path, credentials) {
        (Some(path), Some(credentials)) if path.starts_with(credentials) => {
            "; systemd copied the token file when this unit started: restart the unit when a new token is there"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_file_of_systemds_needs_a_restart() {
        let config = |path: &str| Config {
            join_token_file: Some(path.into()),
            ..Config::default()
        };
        let credentials = Path::new("/run/credentials/mesh-worker.service");
        let copied = config("/run/credentials/mesh-worker.service/join-token");
        assert!(token_advice(&copied, Some(credentials)).contains("restart the unit"));
        let own = config("/etc/hydramesh/join-token");
        assert_eq!(token_advice(&own, Some(credentials)), "");
        assert_eq!(token_advice(&own, None), "");
    }
}
