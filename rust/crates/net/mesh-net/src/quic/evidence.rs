//! Evidence on a link: what a member reports after it has joined.

use mesh_identity::{PublicKey, Purpose, Transcript};
use mesh_proto::SignedEvidence;

use super::join::PROOF_LABEL;
use super::link::Link;
use crate::trust::{NodeIdentity, Refusal, TrustError, Vouched, vouch, vouched};

/// The evidence of this node, signed for this link; `None` for a node without evidence or identity.
///
/// # Errors
/// If the link's session has no key.
pub async fn report_evidence(
    link: &Link,
    identity: &NodeIdentity,
) -> Result<Option<SignedEvidence>, TrustError> {
    let (Some(source), Some(key)) = (identity.evidence(), identity.identity_key()) else {
        return Ok(None);
    };
    let root = identity.root_sha256();
    let session = link.export_key(PROOF_LABEL, &root)?;
    let transcript = transcript(&session, &root);
    Ok(Some(vouch(&transcript, &key, source).await))
}

/// The evidence that the peer of this link vouches for; `None` if it sends none. Nothing of it is parsed.
///
/// # Errors
/// If it is too long, or not signed by the peer for this link.
pub fn reported_evidence<'a>(
    link: &Link,
    root: &[u8; 32],
    signed: Option<&'a SignedEvidence>,
) -> Result<Option<Vouched<'a>>, Refusal> {
    let Some(signed) = signed else {
        return Ok(None);
    };
    let session = link.export_key(PROOF_LABEL, root)?;
    let transcript = transcript(&session, root);
    let sender = signed.proof.as_ref();
    let sender = sender.and_then(|proof| PublicKey::from_bytes(&proof.public_key).ok());
    let sender = sender.filter(|key| key.node_id().to_string() == link.node_id());
    vouched(&transcript, Some(signed), sender.as_ref())
}

fn transcript<'a>(session: &'a [u8; 32], root: &'a [u8; 32]) -> Transcript<'a> {
    Transcript {
        purpose: Purpose::Report,
        session,
        root,
        request: &[],
        token: "",
        name: "",
        successor: None,
        evidence: None,
    }
}
