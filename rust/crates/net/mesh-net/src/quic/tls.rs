//! TLS 1.3 as the mesh uses it: certificates are checked against the mesh's root, never against names.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use mesh_base::sync::lock;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature,
};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig,
    SignatureScheme,
};

use crate::trust::{NodeIdentity, TrustError, algorithms, root_hint, sha256, verify_issued_by};

/// The server side of all protocols. Whether a certificate is needed depends on the protocol and is checked
/// after the handshake; one that is shown must be of the mesh.
pub(super) fn server(
    identity: &NodeIdentity,
    classical: bool,
) -> Result<QuicServerConfig, TrustError> {
    let mut config = ServerConfig::builder_with_provider(provider(classical))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(MeshVerifier::new(identity)))
        .with_cert_resolver(Arc::new(identity.clone()));
    let protocols = [LINK_PROTOCOL, JOIN_PROTOCOL, CLIENT_PROTOCOL];
    config.alpn_protocols = protocols.map(<[u8]>::to_vec).to_vec();
    // A link lives for days: resuming sessions would save nothing and outlive certificates.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    QuicServerConfig::try_from(config).map_err(|error| TrustError::Crypto(error.to_string()))
}

/// The dialling side of a link, or of a renewal.
pub(super) fn client(
    identity: &NodeIdentity,
    protocol: &[u8],
    classical: bool,
) -> Result<QuicClientConfig, TrustError> {
    let builder = client_builder(Arc::new(MeshVerifier::new(identity)), classical)?;
    let config = builder.with_client_cert_resolver(Arc::new(identity.clone()));
    finish_client(config, protocol)
}

/// A dialling side that has no certificate, and knows the root by its hash.
pub(super) fn anonymous(
    verifier: Arc<PinVerifier>,
    protocol: &[u8],
    classical: bool,
) -> Result<QuicClientConfig, TrustError> {
    let builder = client_builder(verifier, classical)?;
    finish_client(builder.with_no_client_auth(), protocol)
}

fn client_builder(
    verifier: Arc<dyn ServerCertVerifier>,
    classical: bool,
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>, TrustError> {
    Ok(ClientConfig::builder_with_provider(provider(classical))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier))
}

fn finish_client(
    mut config: ClientConfig,
    protocol: &[u8],
) -> Result<QuicClientConfig, TrustError> {
    config.alpn_protocols = vec![protocol.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    QuicClientConfig::try_from(config).map_err(|error| TrustError::Crypto(error.to_string()))
}

/// ALPN of links.
pub(super) const LINK_PROTOCOL: &[u8] = b"hydramesh/1";
/// ALPN of joins and renewals.
pub(super) const JOIN_PROTOCOL: &[u8] = b"hydramesh-join/1";

/// ALPN of clients that ask for a session.
pub(super) const CLIENT_PROTOCOL: &[u8] = b"hydramesh-client/1";

/// aws-lc with the hybrid group alone, or also with X25519 for `classical` peers. A client sends key shares for the first
/// group, which include X25519's.
fn provider(classical: bool) -> Arc<CryptoProvider> {
    let mut kx_groups = vec![aws_lc_rs::kx_group::X25519MLKEM768];
    if classical {
        kx_groups.push(aws_lc_rs::kx_group::X25519);
    }
    Arc::new(CryptoProvider {
        kx_groups,
        ..aws_lc_rs::default_provider()
    })
}

/// The methods that client's and server's verifiers have in common.
macro_rules! signatures_of_tls13 {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(no_tls12())
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls13_signature(message, certificate, signature, &self.algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.algorithms.supported_schemes()
        }
    };
}

/// Accepts certificates of the node's roots, with any names: nodes move between addresses.
#[derive(Debug)]
struct MeshVerifier {
    identity: NodeIdentity,
    /// Names of these roots, for the peer to choose its certificate by.
    hints: Vec<DistinguishedName>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl MeshVerifier {
    fn new(identity: &NodeIdentity) -> Self {
        let roots = identity.roots();
        let accepted = roots.accepted(identity.clock().now());
        Self {
            hints: accepted.map(|root| hint(&sha256(root))).collect(),
            identity: identity.clone(),
            algorithms: algorithms(),
        }
    }

    fn verify(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
    ) -> Result<(), Error> {
        let roots = self.identity.roots();
        let mut verdict = Ok(());
        for root in roots.accepted(self.identity.clock().now()) {
            verdict = verify_issued_by(certificate, others, root, &self.algorithms);
            if verdict.is_ok() {
                break;
            }
        }
        // The roots of a mesh have one name, so another one's signature looks like a bad one of this.
        verdict.map_err(|error| match error {
            Error::InvalidCertificate(CertificateError::BadSignature) => {
                Error::InvalidCertificate(CertificateError::UnknownIssuer)
            }
            error => error,
        })
    }
}

fn hint(root: &[u8; 32]) -> DistinguishedName {
    DistinguishedName::from(root_hint(root))
}

impl ServerCertVerifier for MeshVerifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(certificate, others)?;
        Ok(ServerCertVerified::assertion())
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        Some(&self.hints)
    }

    signatures_of_tls13!();
}

impl ClientCertVerifier for MeshVerifier {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    /// A certificate whose dates do not fit passes: it may still be renewed. The listener refuses it for links, in words that
    /// a TLS alert does not have.
    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(certificate, others)?;
        Ok(ClientCertVerified::assertion())
    }

    signatures_of_tls13!();
}

/// Accepts the root whose certificate has the pinned hash, and certificates that it issued.
#[derive(Debug)]
pub(super) struct PinVerifier {
    pin: [u8; 32],
    hints: [DistinguishedName; 1],
    algorithms: WebPkiSupportedAlgorithms,
    /// Hash of another root that was shown, for the error message.
    foreign: Mutex<Option<[u8; 32]>>,
    matched: AtomicBool,
}

impl PinVerifier {
    pub(super) fn new(pin: [u8; 32]) -> Self {
        Self {
            pin,
            hints: [hint(&pin)],
            algorithms: algorithms(),
            foreign: Mutex::default(),
            matched: AtomicBool::new(false),
        }
    }

    /// True if the peer showed the pinned root.
    pub(super) fn matched(&self) -> bool {
        self.matched.load(Ordering::Relaxed)
    }

    /// The root that the peer showed instead.
    pub(super) fn foreign(&self) -> Option<[u8; 32]> {
        *lock(&self.foreign)
    }
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(root) = others.iter().find(|other| sha256(other) == self.pin) else {
            *lock(&self.foreign) = others.last().map(|root| sha256(root));
            return Err(Error::InvalidCertificate(CertificateError::UnknownIssuer));
        };
        self.matched.store(true, Ordering::Relaxed);
        verify_issued_by(certificate, others, root, &self.algorithms)?;
        Ok(ServerCertVerified::assertion())
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        Some(&self.hints)
    }

    signatures_of_tls13!();
}

/// Cannot happen: QUIC has no TLS 1.2 and the configurations do not offer it.
fn no_tls12() -> Error {
    Error::General("TLS 1.2 is not spoken here".to_owned())
}
