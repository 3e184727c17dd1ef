//! Identities of nodes: proofs of possession and the mesh root's statements.

use prost::Message;

messages! {
    /// A node's proof that it holds the key of its identity: a signature over a text that names the TLS session, the mesh
    /// and the request (`mesh_identity::Transcript`).
    pub struct IdentityProof {
        /// Signature algorithm; 1 is ML-DSA-65.
        algorithm: u32 = [uint32, tag = 1],
        /// Public key; its SHA-256 is the node id.
        public_key: Vec<u8> = [bytes = "vec", tag = 2],
        /// Signature.
        signature: Vec<u8> = [bytes = "vec", tag = 3],
    }

    /// The mesh root's statement about a node, in the `body` of [`SignedIdentity`].
    pub struct IdentityDocument {
        /// Version of the document; 1 here.
        version: u32 = [uint32, tag = 1],
        /// Signature algorithm of the node's key; 1 is ML-DSA-65.
        algorithm: u32 = [uint32, tag = 2],
        /// The node's public key; its SHA-256 is the node id.
        public_key: Vec<u8> = [bytes = "vec", tag = 3],
        /// Name of the node.
        name: String = [string, tag = 4],
        /// Role of the node: `head` or `worker`.
        role: String = [string, tag = 5],
        /// Name of the mesh.
        mesh: String = [string, tag = 6],
        /// SHA-256 of the mesh root's certificate.
        root: Vec<u8> = [bytes = "vec", tag = 7],
        /// Start of the validity, seconds since the Unix epoch.
        not_before: u64 = [uint64, tag = 8],
        /// End of the validity, seconds since the Unix epoch.
        not_after: u64 = [uint64, tag = 9],
    }

    /// An [`IdentityDocument`] with the signature of the mesh root's ML-DSA key.
    pub struct SignedIdentity {
        /// The encoded document; the signature is over these bytes.
        body: Vec<u8> = [bytes = "vec", tag = 1],
        /// Signature.
        signature: Vec<u8> = [bytes = "vec", tag = 2],
        /// The root's statement about the intermediate that signed instead of it.
        intermediate: Option<SignedIntermediate> = [message, optional, tag = 3],
    }

    /// The mesh root's statement about an intermediate, in the `body` of [`SignedIntermediate`].
    pub struct IntermediateStatement {
        /// Version of the statement; 1 here.
        version: u32 = [uint32, tag = 1],
        /// Signature algorithm of the intermediate's key; 1 is ML-DSA-65.
        algorithm: u32 = [uint32, tag = 2],
        /// The intermediate's public key.
        public_key: Vec<u8> = [bytes = "vec", tag = 3],
        /// Name of the mesh.
        mesh: String = [string, tag = 4],
        /// SHA-256 of the mesh root's certificate.
        root: Vec<u8> = [bytes = "vec", tag = 5],
        /// Start of the validity, seconds since the Unix epoch.
        not_before: u64 = [uint64, tag = 6],
        /// End of the validity, seconds since the Unix epoch.
        not_after: u64 = [uint64, tag = 7],
    }

    /// An [`IntermediateStatement`] with the signature of the mesh root's ML-DSA key.
    pub struct SignedIntermediate {
        /// The encoded statement; the signature is over these bytes.
        body: Vec<u8> = [bytes = "vec", tag = 1],
        /// Signature.
        signature: Vec<u8> = [bytes = "vec", tag = 2],
    }

    /// A head's request for an intermediate.
    pub struct IntermediateRequest {
        /// Version of the request; 1 here.
        version: u32 = [uint32, tag = 1],
        /// SHA-256 of the certificate of the mesh root that is to sign.
        root: Vec<u8> = [bytes = "vec", tag = 2],
        /// Certificate request (PKCS#10, DER).
        csr: Vec<u8> = [bytes = "vec", tag = 3],
        /// ML-DSA-65 public key.
        public_key: Vec<u8> = [bytes = "vec", tag = 4],
        /// Signature of that key over the root's digest and the certificate request.
        signature: Vec<u8> = [bytes = "vec", tag = 5],
    }

    /// An intermediate as its mesh root has signed it.
    pub struct IntermediatePapers {
        /// Certificate (DER) of the intermediate.
        certificate: Vec<u8> = [bytes = "vec", tag = 1],
        /// The statement about its ML-DSA key.
        statement: Option<SignedIntermediate> = [message, optional, tag = 2],
        /// Certificate (DER) of the mesh root.
        root: Vec<u8> = [bytes = "vec", tag = 3],
        /// The ML-DSA key of the mesh root.
        root_key: Option<RootIdentity> = [message, optional, tag = 4],
    }

    /// A node's identity document in its state directory.
    pub struct StoredIdentity {
        /// A [`SignedIdentity`].
        identity: Vec<u8> = [bytes = "vec", tag = 1],
        /// The ML-DSA key that signed it.
        root: Option<RootIdentity> = [message, optional, tag = 2],
        /// Certificate (DER) of the mesh root with that key; empty in files of earlier versions.
        certificate: Vec<u8> = [bytes = "vec", tag = 3],
    }

    /// The ML-DSA key of a mesh root.
    pub struct RootIdentity {
        /// Public key. The root's certificate names its SHA-256, or the voucher shows that it is the root's.
        public_key: Vec<u8> = [bytes = "vec", tag = 1],
        /// Signature of the certificate's key over the public key, for roots whose certificate does not name it.
        voucher: Vec<u8> = [bytes = "vec", tag = 2],
    }

    /// The statement of two mesh roots that the second takes the place of the first, in the `body` of
    /// [`SignedSuccession`].
    pub struct RootSuccession {
        /// Version of the statement; 1 here.
        version: u32 = [uint32, tag = 1],
        /// Name of the mesh.
        mesh: String = [string, tag = 2],
        /// Certificate of the root whose place is taken, DER.
        former: Vec<u8> = [bytes = "vec", tag = 3],
        /// Its ML-DSA key.
        former_key: Option<RootIdentity> = [message, optional, tag = 4],
        /// Certificate of the root that takes its place, DER.
        next: Vec<u8> = [bytes = "vec", tag = 5],
        /// Its ML-DSA key.
        next_key: Option<RootIdentity> = [message, optional, tag = 6],
        /// End of the time in which both are accepted, seconds since the Unix epoch.
        until: u64 = [uint64, tag = 7],
    }

    /// A [`RootSuccession`] with the signatures of both roots' ML-DSA keys (DCF 0x17).
    pub struct SignedSuccession {
        /// The encoded statement; both signatures are over these bytes.
        body: Vec<u8> = [bytes = "vec", tag = 1],
        /// Signature of the former root.
        former_signature: Vec<u8> = [bytes = "vec", tag = 2],
        /// Signature of the next root.
        next_signature: Vec<u8> = [bytes = "vec", tag = 3],
    }

    /// The successions that a node knows, in its state directory.
    pub struct RootHistory {
        /// Oldest first.
        successions: Vec<SignedSuccession> = [message, repeated, tag = 1],
    }
}
