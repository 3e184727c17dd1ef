//! TLS of a listener: certificate and key from PEM files, which a reload reads again.
//!
//! TLS is 1.3 only, with the key exchange X25519MLKEM768. Clients without ML-KEM are refused unless
//! [`TlsConfig::classical`] allows them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rustls::ServerConfig;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::error_body;

/// Settings of TLS for HTTP. Without both files, HTTP is plain.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsConfig {
    /// PEM file with the certificate, followed by those of its issuers.
    pub certificate_file: Option<PathBuf>,
    /// PEM file with the certificate's private key.
    pub key_file: Option<PathBuf>,
    /// Also accept clients that can only exchange keys by X25519 or NIST's curves, without ML-KEM: whoever records their
    /// traffic can read it once there are quantum computers.
    pub classical: bool,
}

impl TlsConfig {
    /// TLS as configured; `None` without files.
    ///
    /// # Errors
    /// [`TlsError`] names the key or the file.
    pub fn open(&self) -> Result<Option<ServerTls>, TlsError> {
        match (&self.certificate_file, &self.key_file) {
            (None, None) => Ok(None),
            (Some(certificate), Some(key)) => {
                ServerTls::open(certificate, key, self.classical).map(Some)
            }
            (Some(_), None) => Err(TlsError::Half("key_file", "certificate_file")),
            (None, Some(_)) => Err(TlsError::Half("certificate_file", "key_file")),
        }
    }
}

/// Errors of certificates and keys for HTTPS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// One of the two files is not set.
    #[error("http.tls.{0} is missing: HTTPS needs it beside http.tls.{1}")]
    Half(&'static str, &'static str),
    /// A file cannot be read as PEM.
    #[error("http.tls: cannot read {}: {}", .0.display(), .1)]
    Unreadable(PathBuf, pem::Error),
    /// A file without a certificate.
    #[error("http.tls: {} has no certificate (a block BEGIN CERTIFICATE)", .0.display())]
    Empty(PathBuf),
    /// Certificate and key do not fit each other or are of an unknown kind.
    #[error("http.tls: the certificate in {} cannot be used with the key in {}: {error}", .certificate.display(), .key.display())]
    Unusable {
        /// File of the certificate.
        certificate: PathBuf,
        /// File of the key.
        key: PathBuf,
        /// The reason.
        error: rustls::Error,
    },
}

/// TLS of a listener. Clones share certificate and key.
#[derive(Clone)]
pub struct ServerTls {
    acceptor: TlsAcceptor,
    current: Arc<Current>,
    certificate: PathBuf,
    key: PathBuf,
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls")
            .field("certificate", &self.certificate)
            .finish_non_exhaustive()
    }
}

impl ServerTls {
    /// Reads a certificate and its key.
    ///
    /// # Errors
    /// [`TlsError`] names the file.
    pub fn open(certificate: &Path, key: &Path, classical: bool) -> Result<Self, TlsError> {
        let provider = Arc::new(provider(classical));
        let pair = read(certificate, key, &provider)?;
        let current = Arc::new(Current(RwLock::new(pair)));
        let unusable = |error| TlsError::Unusable {
            certificate: certificate.to_owned(),
            key: key.to_owned(),
            error,
        };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unusable)?
            .with_no_client_auth()
            .with_cert_resolver(current.clone());
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            current,
            certificate: certificate.to_owned(),
            key: key.to_owned(),
        })
    }

    /// Reads both files again; true if the certificate has changed. Open connections keep theirs.
    ///
    /// # Errors
    /// [`TlsError`] names the file. The certificate stays as it was.
    pub fn reload(&self) -> Result<bool, TlsError> {
        let fresh = read(&self.certificate, &self.key, &provider(true))?;
        let mut current = self
            .current
            .0
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let changed = current.cert != fresh.cert;
        *current = fresh;
        Ok(changed)
    }

    /// Shakes hands with a client.
    pub(super) async fn accept<S>(&self, stream: S) -> std::io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        self.acceptor.accept(stream).await
    }
}

/// Whether the first byte of a connection begins a TLS handshake (RFC 8446, section 5.1).
pub(super) fn is_handshake(first: u8) -> bool {
    first == 0x16
}

/// Tells a client that speaks plain HTTP to use HTTPS.
pub(super) async fn refuse_plain(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    // A connection that is closed with unread data is reset, and the answer is lost.
    let _ = stream.read(&mut [0; 8192]).await;
    let text = "this port speaks HTTPS: use https:// in place of http://";
    let axum::Json(body) = error_body(text, "invalid_request_error", "https_required");
    let body = body.to_string();
    let answer = format!(
        "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    let _ = stream.write_all(answer.as_bytes()).await;
    let _ = stream.shutdown().await;
}

#[derive(Debug)]
struct Current(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let current = self.0.read().unwrap_or_else(PoisonError::into_inner);
        Some(current.clone())
    }
}

fn read(
    certificate: &Path,
    key: &Path,
    provider: &CryptoProvider,
) -> Result<Arc<CertifiedKey>, TlsError> {
    let unreadable = |path: &Path| {
        let path = path.to_owned();
        move |error| TlsError::Unreadable(path, error)
    };
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(unreadable(certificate))?;
    if chain.is_empty() {
        return Err(TlsError::Empty(certificate.to_owned()));
    }
    let secret = PrivateKeyDer::from_pem_file(key).map_err(unreadable(key))?;
    let pair = CertifiedKey::from_der(chain, secret, provider);
    pair.map(Arc::new).map_err(|error| TlsError::Unusable {
        certificate: certificate.to_owned(),
        key: key.to_owned(),
        error,
    })
}

fn provider(classical: bool) -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    if !classical {
        provider.kx_groups = vec![aws_lc_rs::kx_group::X25519MLKEM768];
    }
    provider
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};
    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, NamedGroup, RootCertStore};
    use tempfile::TempDir;
    use tokio::io::{DuplexStream, duplex};
    use tokio_rustls::TlsConnector;
    use tokio_rustls::client;

    use super::*;

    fn write(folder: &TempDir, certificate: &str, key: &str) -> TlsConfig {
        let place = |name: &str| Some(folder.path().join(name));
        let config = TlsConfig {
            certificate_file: place("head.pem"),
            key_file: place("head.key"),
            classical: false,
        };
        let files = [
            (&config.certificate_file, certificate),
            (&config.key_file, key),
        ];
        for (path, text) in files {
            std::fs::write(path.as_ref().expect("a path"), text).expect("written");
        }
        config
    }

    fn pair() -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec!["head".to_owned()]).expect("a name");
        let certificate = params.self_signed(&key).expect("a certificate");
        (certificate, key)
    }

    async fn shake(
        tls: &ServerTls,
        trusted: &rcgen::Certificate,
        classical_only: bool,
    ) -> std::io::Result<client::TlsStream<DuplexStream>> {
        let mut provider = provider(true);
        if classical_only {
            provider.kx_groups = vec![aws_lc_rs::kx_group::X25519];
        }
        let mut roots = RootCertStore::empty();
        roots.add(trusted.der().clone()).expect("a root");
        let config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let (near, far) = duplex(1 << 16);
        let name = ServerName::try_from("head").expect("a name");
        let connector = TlsConnector::from(Arc::new(config));
        let (near, _far) = tokio::join!(connector.connect(name, near), tls.accept(far));
        near
    }

    #[tokio::test]
    async fn keys_are_exchanged_with_ml_kem_and_classical_clients_need_leave() {
        let (certificate, key) = pair();
        let folder = tempfile::tempdir().expect("a folder");
        let mut config = write(&folder, &certificate.pem(), &key.serialize_pem());
        let tls = config.open().expect("files").expect("TLS");
        let stream = shake(&tls, &certificate, false).await.expect("a handshake");
        let group = stream.get_ref().1.negotiated_key_exchange_group();
        assert_eq!(
            group.map(|group| group.name()),
            Some(NamedGroup::X25519MLKEM768)
        );
        assert!(shake(&tls, &certificate, true).await.is_err());

        config.classical = true;
        let tls = config.open().expect("files").expect("TLS");
        let stream = shake(&tls, &certificate, true).await.expect("a handshake");
        let group = stream.get_ref().1.negotiated_key_exchange_group();
        assert_eq!(group.map(|group| group.name()), Some(NamedGroup::X25519));
    }

    #[tokio::test]
    async fn a_reload_takes_a_renewed_certificate_and_keeps_the_old_one_where_it_cannot() {
        let (first, key) = pair();
        let folder = tempfile::tempdir().expect("a folder");
        let config = write(&folder, &first.pem(), &key.serialize_pem());
        let tls = config.open().expect("files").expect("TLS");
        assert!(!tls.reload().expect("the same files"));

        let (second, other) = pair();
        write(&folder, &second.pem(), &key.serialize_pem());
        let error = tls.reload().expect_err("the key of another").to_string();
        assert!(
            error.contains("head.pem") && error.contains("head.key"),
            "{error}"
        );
        shake(&tls, &first, false).await.expect("the old one");

        write(&folder, &second.pem(), &other.serialize_pem());
        assert!(tls.reload().expect("both"));
        shake(&tls, &second, false).await.expect("the new one");
        assert!(shake(&tls, &first, false).await.is_err());
    }

    #[test]
    fn files_that_cannot_be_used_are_named() {
        let (certificate, key) = pair();
        let folder = tempfile::tempdir().expect("a folder");
        let config = write(&folder, "", &key.serialize_pem());
        let error = config.open().expect_err("empty").to_string();
        assert!(error.contains("head.pem has no certificate"), "{error}");
        let config = write(&folder, &certificate.pem(), "nothing");
        let error = config.open().expect_err("no key").to_string();
        assert!(error.contains("head.key"), "{error}");
        let half = TlsConfig {
            key_file: None,
            ..config
        };
        let error = half.open().expect_err("no key file").to_string();
        assert!(error.contains("http.tls.key_file is missing"), "{error}");
        assert!(TlsConfig::default().open().expect("plain").is_none());
    }

    #[tokio::test]
    async fn a_client_that_speaks_plain_http_is_told_to_use_https() {
        let (mut near, far) = duplex(1 << 16);
        near.write_all(b"GET / HTTP/1.1\r\n\r\n")
            .await
            .expect("sent");
        refuse_plain(far).await;
        let mut answer = String::new();
        near.read_to_string(&mut answer).await.expect("an answer");
        assert!(
            answer.starts_with("HTTP/1.1 400 ") && answer.contains("https://"),
            "{answer}"
        );
    }
}
