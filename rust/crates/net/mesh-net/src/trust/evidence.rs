//! Evidence on its way: the source at the node, and its proof. The contents are the policy's to judge.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use mesh_identity::{IdentityKey, PublicKey, Transcript};
use mesh_proto::{SignedEvidence, TpmQuote};

use super::refusal::Refusal;

/// Gives a node's evidence, an encoded `mesh_proto::Evidence`, whenever a request is made.
#[derive(Clone)]
pub struct EvidenceSource {
    collect: Arc<dyn Fn() -> Vec<u8> + Send + Sync>,
    quote: Option<Arc<Quote>>,
}

/// Gives a TPM's quote with this qualifying data; `None` if it cannot.
type Quote = dyn Fn(&[u8; 32]) -> Option<TpmQuote> + Send + Sync;

impl EvidenceSource {
    /// A source that calls this function. It must not block for long.
    pub fn new(source: impl Fn() -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self {
            collect: Arc::new(source),
            quote: None,
        }
    }

    /// The same with quotes of a TPM: the function gives one with this qualifying data, or `None` if it
    /// cannot. It may block.
    #[must_use]
    pub fn with_quotes(
        self,
        quote: impl Fn(&[u8; 32]) -> Option<TpmQuote> + Send + Sync + 'static,
    ) -> Self {
        Self {
            quote: Some(Arc::new(quote)),
            ..self
        }
    }

    /// The evidence as it is now.
    pub fn collect(&self) -> Vec<u8> {
        (self.collect)()
    }

    async fn quote(&self, digest: [u8; 32]) -> Option<TpmQuote> {
        let quote = self.quote.clone()?;
        let quoted = tokio::task::spawn_blocking(move || quote(&digest));
        match tokio::time::timeout(QUOTE_TIMEOUT, quoted).await {
            Ok(quoted) => quoted.ok().flatten(),
            Err(_) => {
                tracing::warn!(
                    "the TPM has not quoted within {} s: the evidence goes without a quote",
                    QUOTE_TIMEOUT.as_secs()
                );
                None
            }
        }
    }
}

impl fmt::Debug for EvidenceSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EvidenceSource")
    }
}

/// Evidence whose signature by a node's identity holds. Nothing of it is parsed.
#[derive(Clone, Copy, Debug)]
pub struct Vouched<'a> {
    /// The encoded `mesh_proto::Evidence`.
    pub body: &'a [u8],
    /// A quote of a TPM, which is not verified.
    pub quote: Option<&'a TpmQuote>,
    /// Qualifying data that such a quote must have.
    pub digest: [u8; 32],
}

impl<'a> Vouched<'a> {
    /// Evidence without a quote.
    pub fn unquoted(body: &'a [u8]) -> Self {
        Self {
            body,
            quote: None,
            digest: [0; 32],
        }
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
pub(crate) async fn vouch(
    transcript: &Transcript<'_>,
    key: &IdentityKey,
    source: &EvidenceSource,
) -> SignedEvidence {
    let body = source.collect();
    let transcript = Transcript {
        evidence: Some(&body),
        ..*transcript
    };
    let (proof, digest) = (
        transcript.prove(key),
        transcript.quoted_digest(key.node_id()),
    );
    SignedEvidence {
        proof: Some(proof),
        quote: source.quote(digest).await,
        body,
    }
}

/// The evidence that this identity vouches for in the session and request of this transcript. Nothing of it is parsed.
pub(crate) fn vouched<'a>(
    transcript: &Transcript<'_>,
    signed: Option<&'a SignedEvidence>,
    identity: Option<&PublicKey>,
) -> Result<Option<Vouched<'a>>, Refusal> {
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
    Ok(Some(Vouched {
        body,
        quote: signed.quote.as_ref(),
        digest: transcript.quoted_digest(signer.node_id()),
    }))
}

/// Time limit for a quote. Heads wait for a request for 3 s.
const QUOTE_TIMEOUT: Duration = Duration::from_secs(2);

/// Maximum bytes of evidence; it has some 300, and a few thousand with a narinfo.
pub const LONGEST_EVIDENCE: usize = 24 << 10;
