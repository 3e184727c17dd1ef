//! Certificates to be issued: for whom and how long; and the papers that come of it.

use std::time::Duration;

use mesh_identity::PublicKey;
use mesh_proto::{RootIdentity, SignedSuccession};
use rustls::pki_types::CertificateDer;

use super::certificate::Role;

/// Validity periods of node certificates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// Validity of a certificate from its issue.
    pub life: Duration,
    /// Period after a certificate's end in which it may still be exchanged for a new one (and nothing else).
    pub renewal_grace: Duration,
}

impl Default for Validity {
    fn default() -> Self {
        Self {
            life: 7 * DAY,
            renewal_grace: 30 * DAY,
        }
    }
}

/// A node that a certificate is issued to.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// PKCS#10 request, DER: its key is certified, and its signature proves that the asker holds it.
    pub request: &'a [u8],
    /// Name of the node.
    pub name: &'a str,
    /// Role of the node.
    pub role: Role,
    /// The node's identity, whose possession it has proven; `None` for nodes of earlier versions.
    pub identity: Option<&'a PublicKey>,
}

/// A node's papers.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The node's certificate, that of the intermediate which issued it, if one did, then the root's.
    pub certificates: Vec<CertificateDer<'static>>,
    /// The node's identity document ([`mesh_identity::Document`]), signed; empty for a node without an identity.
    pub document: Vec<u8>,
    /// The root's ML-DSA key, which signed the document.
    pub root: RootIdentity,
    /// While the root is rotated: a certificate of the former root, for peers that know that one only.
    pub former: Option<CertificateDer<'static>>,
    /// While the root is rotated: the statement of both roots.
    pub succession: Option<SignedSuccession>,
}

const DAY: Duration = Duration::from_secs(24 * 3600);
