//! Evidence that a member reports on its link.

use std::sync::Arc;
use std::time::SystemTime;

use arcanum_attestor::Attestor;
use mesh_net::quic::{Link, reported_evidence};
use mesh_net::trust::Refusal;
use mesh_proto::SignedEvidence;

/// Judges evidence from the peer of this link; `None` where it sends none.
///
/// # Errors
/// [`Refusal`] if the link has to end.
pub(super) async fn judge(
    authority: &Arc<Attestor>,
    link: &Link,
    evidence: Option<SignedEvidence>,
) -> Result<(), Refusal> {
    let (authority, link) = (authority.clone(), link.clone());
    // Signatures take a while, and the record is on the disk.
    let judged = tokio::task::spawn_blocking(move || {
        let root = authority.root().sha256();
        let evidence = reported_evidence(&link, &root, evidence.as_ref())?;
        authority.report(link.peer(), evidence, SystemTime::now())
    });
    let judged = judged.await;
    judged.unwrap_or_else(|error| Err(Refusal::Internal(error.to_string())))
}
