//! A node's identity in words, for operators.

use std::fmt::Write as _;
use std::path::Path;

use mesh_base::clock;
use mesh_identity::ALGORITHM_NAME;

use super::error::TrustError;
use super::identity::NodeIdentity;
use super::identity_keys::{IdentityIds, identity_ids, read_document, rotate_identity};

/// Describes the identity in a state directory, a line for each part.
///
/// # Errors
/// If a file of it is damaged.
pub fn describe_identity(dir: &Path) -> Result<String, TrustError> {
    let IdentityIds { key, next } = identity_ids(dir)?;
    let Some(key) = key else {
        return Ok(format!(
            "{} holds no identity yet: the node makes one at its first start.\n",
            dir.display()
        ));
    };
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "{name:<12} {value}");
    };
    line("node id", &key.to_string());
    line("algorithm", ALGORITHM_NAME);
    if let Some(next) = next {
        line("next id", &format!("{next}, when the node starts again"));
    }
    match NodeIdentity::load(dir) {
        Ok(identity) => {
            let member = identity.member();
            line("mesh", &member.mesh);
            line("name", &member.name);
            line("role", member.role.as_str());
            line("certificate", &member.dates());
            if !member.has_identity() {
                line(
                    "note",
                    "the mesh root signs the identity at the next renewal",
                );
            }
        }
        Err(TrustError::NoIdentity { .. }) => line("mesh", "none: the node has not joined"),
        Err(error) => return Err(error),
    }
    if let Some(document) = read_document(dir) {
        let (from, to) = (document.not_before, document.not_after);
        let dates = format!(
            "valid from {} to {}",
            clock::utc_of(from),
            clock::utc_of(to)
        );
        line("document", &format!("signed by the mesh root, {dates}"));
    }
    Ok(text)
}

/// Rotates the identity in a state directory, and says what happens next. `service` is the node's program.
///
/// # Errors
/// As [`rotate_identity`].
pub fn rotate_and_describe(dir: &Path, service: &str) -> Result<String, TrustError> {
    let (old, next) = rotate_identity(dir)?;
    Ok(format!(
        "The new id is {next}.\nRestart {service}: it proves both keys to the head and gets a certificate for the new one; from then \
         on {old} is refused everywhere.\n"
    ))
}
