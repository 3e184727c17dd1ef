//! A node's certificate in use, with its keys: checked against the roots that the node knows.

use std::sync::Arc;

use mesh_identity::{Document, IdentityKey};
use mesh_proto::RootIdentity;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use super::certificate::{Member, algorithms, is_intermediate, pem, verify_issued_by};
use super::digest::sha256;
use super::error::TrustError;
use super::identity_keys::IdentityKeys;
use super::node_key::NodeKey;
use super::root_identity::verify_root_identity;
use super::roots::Roots;

/// A node's certificate with its keys.
#[derive(Clone)]
pub(super) struct Current {
    pub(super) key: Arc<NodeKey>,
    pub(super) certified: Arc<CertifiedKey>,
    /// The root that issued the certificate.
    pub(super) root: CertificateDer<'static>,
    /// While the root is rotated: a certificate of the former one, for peers that do not know another.
    pub(super) former: Option<Arc<CertifiedKey>>,
    pub(super) member: Arc<Member>,
    pub(super) identity: IdentityKeys,
}

impl Current {
    /// `chain` is the node's certificate, and that of the intermediate which issued it, if one did; a root
    /// behind them does not count.
    pub(super) fn new(
        key: Arc<NodeKey>,
        chain: &[CertificateDer<'static>],
        roots: &Roots,
        identity: IdentityKeys,
    ) -> Result<Self, TrustError> {
        let none = || TrustError::Mismatch("no certificate was issued".to_owned());
        let (certificate, others) = chain.split_first().ok_or_else(none)?;
        let member = Member::from_certificate(certificate)?;
        let mut verdict = Ok(());
        let root = roots.known().find(|root| {
            verdict = verify_issued_by(certificate, others, root, &algorithms());
            verdict.is_ok()
        });
        verdict.map_err(|error| TrustError::Mismatch(error.to_string()))?;
        let root = root.expect("one of them verified it").clone();
        let mut chain = vec![certificate.clone()];
        chain.extend(others.iter().find(|other| is_intermediate(other)).cloned());
        let certified = certify(&key, chain, root.clone())?;
        Ok(Self {
            key,
            certified: Arc::new(certified),
            root,
            former: None,
            member: Arc::new(member),
            identity,
        })
    }

    /// Takes a certificate of the former root, if it is that and for the same node.
    pub(super) fn add_former(
        &mut self,
        certificate: Option<CertificateDer<'static>>,
        roots: &Roots,
    ) {
        let Some(certificate) = certificate else {
            return;
        };
        let root = roots
            .known()
            .nth(1)
            .filter(|root| verify_issued_by(&certificate, &[], root, &algorithms()).is_ok());
        let member = Member::from_certificate(&certificate).ok();
        let is_same = member.is_some_and(|member| {
            (&member.node_id, &member.name) == (&self.member.node_id, &self.member.name)
        });
        if let Some(root) = root.filter(|root| is_same && **root != self.root) {
            let certified = certify(&self.key, vec![certificate.clone()], root.clone());
            self.former = certified.ok().map(Arc::new);
        }
    }

    /// The text of `node.crt`: the certificate, that of its intermediate, and that of the former root.
    /// Earlier versions read the first.
    pub(super) fn pem(&self) -> String {
        let former = self.former.as_ref().map(|former| pem(&former.cert[0]));
        // The root is last, and has a file of its own.
        let chain = self.certified.cert.iter().rev().skip(1).rev();
        chain.map(|one| pem(one)).chain(former).collect()
    }
}

/// A certificate with its key. The root travels along: a joining node checks it against its token.
fn certify(
    key: &NodeKey,
    mut chain: Vec<CertificateDer<'static>>,
    root: CertificateDer<'static>,
) -> Result<CertifiedKey, TrustError> {
    let private = PrivateKeyDer::Pkcs8(key.pair.serialize_der().into());
    let signer = rustls::crypto::aws_lc_rs::sign::any_supported_type(&private)?;
    chain.push(root);
    let certified = CertifiedKey::new(chain, signer);
    certified
        .keys_match()
        .map_err(|_| TrustError::Mismatch("it is for another key than node.key".to_owned()))?;
    Ok(certified)
}

/// The certificates in the text of `node.crt`: the intermediate behind the node's own, if there is one, and
/// that of the former root.
pub(super) fn further_certificates(
    text: &str,
) -> (
    Option<CertificateDer<'static>>,
    Option<CertificateDer<'static>>,
) {
    let further = CertificateDer::pem_slice_iter(text.as_bytes()).skip(1);
    let mut further = further.map_while(Result::ok).take(2).peekable();
    let intermediate = further.next_if(|one| is_intermediate(one));
    (intermediate, further.next())
}

/// Checks the papers of a node against each other: the document is the root's, and about the identity in the certificate,
/// which is the one that was asked for. Heads of earlier versions know of neither.
pub(super) fn check_document(
    member: &Member,
    wanted: Option<&Arc<IdentityKey>>,
    root: &CertificateDer<'_>,
    document: &[u8],
    root_identity: &RootIdentity,
) -> Result<(), TrustError> {
    if !member.has_identity() && document.is_empty() {
        return Ok(());
    }
    let mismatch = |reason: String| Err(TrustError::Mismatch(reason));
    let signer = verify_root_identity(root, root_identity)?;
    let said = match Document::verify(document, &signer) {
        Ok(said) => said,
        Err(error) => return mismatch(format!("the identity document: {error}")),
    };
    if wanted.is_none_or(|key| *key.public() != said.key) {
        return mismatch(format!("the identity document is about {}", said.node_id()));
    }
    let certified = (
        &*member.node_id,
        &*member.name,
        member.role.as_str(),
        &*member.mesh,
    );
    let id = said.node_id().to_string();
    if certified != (&*id, &*said.name, &*said.role, &*said.mesh) || said.root != sha256(root) {
        return mismatch(
            "the identity document and the certificate name different nodes".to_owned(),
        );
    }
    Ok(())
}
