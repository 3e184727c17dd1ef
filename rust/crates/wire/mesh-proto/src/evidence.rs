//! Attestation evidence: a node's statement about its system and hardware.

use prost::Message;

use crate::IdentityProof;

messages! {
    /// A node's statement about itself, in the `body` of [`SignedEvidence`]. Unknown parts are empty.
    pub struct Evidence {
        /// Version of the form; 1 here.
        form: u32 = [uint32, tag = 1],
        /// Version of HydraMesh.
        version: String = [string, tag = 2],
        /// Release of the kernel.
        kernel: String = [string, tag = 3],
        /// `ID` of /etc/os-release.
        os: String = [string, tag = 4],
        /// `VERSION_ID` or `BUILD_ID` of /etc/os-release.
        os_version: String = [string, tag = 5],
        /// Processor architecture, as Rust names it.
        architecture: String = [string, tag = 6],
        /// The processor's model.
        processor: String = [string, tag = 7],
        /// Hardware threads.
        threads: u32 = [uint32, tag = 8],
        /// Memory in MiB.
        memory_mib: u64 = [uint64, tag = 9],
        /// Graphics cards.
        gpus: Vec<String> = [string, repeated, tag = 10],
        /// Id of the running boot.
        boot: String = [string, tag = 11],
        /// Models that the node serves.
        models: Vec<ServedFingerprint> = [message, repeated, tag = 12],
        /// The running system, on NixOS.
        system: Option<NixSystem> = [message, optional, tag = 13],
    }

    /// A model that a node serves.
    pub struct ServedFingerprint {
        /// Name of the model.
        name: String = [string, tag = 1],
        /// SHA-256 of the model.
        fingerprint: String = [string, tag = 2],
    }

    /// The running NixOS system.
    pub struct NixSystem {
        /// Its store path.
        path: String = [string, tag = 1],
        /// SHA-256 of the path's NAR as the node computed it, `sha256:` and the digest in Nix's base 32.
        nar_hash: String = [string, tag = 2],
        /// The path's narinfo, with its signatures.
        narinfo: String = [string, tag = 3],
    }

    /// An [`Evidence`] with a signature by the node's identity. In a control stream it is a message of its own (DCF 0x18).
    pub struct SignedEvidence {
        /// The encoded evidence.
        body: Vec<u8> = [bytes = "vec", tag = 1],
        /// Proof whose text contains the body's digest (`mesh_identity::Transcript`).
        proof: Option<IdentityProof> = [message, optional, tag = 2],
        /// Quote of the node's TPM for the proof's text, if it has one.
        quote: Option<TpmQuote> = [message, optional, tag = 3],
    }

    /// A quote of a TPM 2.0. Names in capitals are those of the TPM 2.0 Library, part 2; integers are
    /// big-endian there.
    pub struct TpmQuote {
        /// TPMT_PUBLIC of the attestation key.
        public: Vec<u8> = [bytes = "vec", tag = 1],
        /// TPMS_ATTEST that the key signed.
        attest: Vec<u8> = [bytes = "vec", tag = 2],
        /// TPMT_SIGNATURE of the key.
        signature: Vec<u8> = [bytes = "vec", tag = 3],
        /// Registers of the SHA-256 bank that are quoted, by ascending index.
        pcrs: Vec<PcrValue> = [message, repeated, tag = 4],
        /// Manufacturer, as the TPM names it (TPM_PT_MANUFACTURER).
        manufacturer: String = [string, tag = 5],
    }

    /// A platform configuration register.
    pub struct PcrValue {
        /// Its number.
        index: u32 = [uint32, tag = 1],
        /// Its SHA-256 value.
        value: Vec<u8> = [bytes = "vec", tag = 2],
    }
}
