//! Evidence on its way: the source at the node, and its proof. The contents are the policy's to judge.

use std::fmt;
use std::sync::Arc;

use mesh_identity::{IdentityKey, PublicKey, Transcript};
use mesh_proto::SignedEvidence;

use super::refusal::Refusal;

/// Gives a node's evidence, an encoded `mesh_proto::Evidence`, whenever a request is made.
#[derive(Clone)]
pub struct EvidenceSource(Arc<dyn Fn() -> Vec<u8> + Send + Sync>);

impl EvidenceSource {
    /// A source that calls this function. It must not block for long.
    pub fn new(source: impl Fn() -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self(Arc::new(source))
    }

    /// The evidence as it is now.
    pub fn collect(&self) -> Vec<u8> {
        (self.0)()
    }
}

impl fmt::Debug for EvidenceSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EvidenceSource")
    }
}

/// A node that joins. A name alone is a node without evidence.
#[derive(Clone, Copy, Debug)]
pub struct Newcomer<'a> {
    /// Name that it asks for.
    pub name: &'a str,
    /// Its evidence.
    pub evidence: Option<&'a EvidenceSource>,
}

impl<'a> From<&'a str> for Newcomer<'a> {
    fn from(name: &'a str) -> Self {
        let evidence = None;
        Self { name, evidence }
    }
}

impl<'a> From<&'a String> for Newcomer<'a> {
    fn from(name: &'a String) -> Self {
        name.as_str().into()
    }
}

/// Evidence with a node's signature, for the session and request of this transcript.
pub(crate) fn vouch(
    transcript: &Transcript<'_>,
    key: &IdentityKey,
    body: Vec<u8>,
) -> SignedEvidence {
    let transcript = Transcript {
        evidence: Some(&body),
        ..*transcript
    };
    SignedEvidence {
        proof: Some(transcript.prove(key)),
        body,
    }
}

/// The evidence that this identity vouches for in the session and request of this transcript. Nothing of it is parsed.
pub(crate) fn vouched<'a>(
    transcript: &Transcript<'_>,
    signed: Option<&'a SignedEvidence>,
    identity: Option<&PublicKey>,
) -> Result<Option<&'a [u8]>, Refusal> {
    let Some(signed) = signed else {
        return Ok(None);
    };
    let refused = |reason: String| Refusal::Invalid(format!("evidence refused: {reason}"));
    let body = &signed.body[..];
    if body.len() > LONGEST_EVIDENCE {
        return Err(refused(format!(
            "it has {} bytes, and {LONGEST_EVIDENCE} are the most",
            body.len()
        )));
    }
    let Some(proof) = &signed.proof else {
        return Err(refused("it is not signed".to_owned()));
    };
    let transcript = Transcript {
        evidence: Some(body),
        ..*transcript
    };
    let signer = transcript
        .verify(proof)
        .map_err(|error| refused(error.to_string()))?;
    if identity != Some(&signer) {
        return Err(refused(format!(
            "it is signed by {}, which is not the node that sends it",
            signer.node_id()
        )));
    }
    Ok(Some(body))
}

/// Maximum bytes of evidence; it has some 300, and a few thousand with a narinfo.
pub const LONGEST_EVIDENCE: usize = 24 << 10;
