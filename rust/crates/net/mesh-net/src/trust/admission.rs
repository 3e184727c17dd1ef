//! Admission and continued membership: the trait for policies.

use std::time::SystemTime;

use mesh_identity::PublicKey;

use super::certificate::Member;
use super::evidence::Vouched;
use super::issued::Issued;
use super::refusal::Refusal;

/// Decides who becomes a member and who remains one. A [`quic::Listener`](crate::quic::Listener) asks it.
///
/// The methods may block on the disk; the listener calls them on blocking threads. Identities in the requests are those
/// whose possession the node has proven on this connection.
pub trait Admission: Send + Sync + 'static {
    /// Decides on a node without certificate that presents a token.
    fn join(&self, ask: &JoinAsk<'_>, now: SystemTime) -> Result<Issued, Refusal>;

    /// Decides on a member that asks for a fresh certificate. It is authenticated by its own, which may have ended.
    fn renew(&self, ask: &RenewAsk<'_>, now: SystemTime) -> Result<Issued, Refusal>;

    /// A node with a valid certificate connects. Refuse it here when it has been expelled.
    fn connect(&self, member: &Member, now: SystemTime) -> Result<(), Refusal> {
        let _ = (member, now);
        Ok(())
    }

    /// Name of the mesh.
    fn mesh(&self) -> String;
}

/// A join request.
#[derive(Clone, Copy, Debug)]
pub struct JoinAsk<'a> {
    /// Public part of the token.
    pub token_id: &'a str,
    /// Secret part of the token.
    pub token_secret: &'a [u8],
    /// PKCS#10 request for the node's key, DER.
    pub request: &'a [u8],
    /// Name of the node.
    pub node_name: &'a str,
    /// The node's identity; `None` for nodes of earlier versions.
    pub identity: Option<&'a PublicKey>,
    /// SHA-256 of the mesh root that the token pins, and that the certificate is to be of.
    pub root: [u8; 32],
    /// Evidence that this identity vouches for; `None` for nodes of earlier versions.
    pub evidence: Option<Vouched<'a>>,
}

/// A request for a fresh certificate.
#[derive(Clone, Copy, Debug)]
pub struct RenewAsk<'a> {
    /// The node, by its present certificate.
    pub member: &'a Member,
    /// PKCS#10 request for the node's key, DER.
    pub request: &'a [u8],
    /// The node's identity: that of its certificate, or its first one; `None` for nodes of earlier versions.
    pub identity: Option<&'a PublicKey>,
    /// The identity that takes its place, if the node rotates its key.
    pub successor: Option<&'a PublicKey>,
    /// SHA-256 of the mesh root that the certificate is to be of.
    pub root: [u8; 32],
    /// Evidence that `identity` vouches for; `None` for nodes of earlier versions.
    pub evidence: Option<Vouched<'a>>,
}
