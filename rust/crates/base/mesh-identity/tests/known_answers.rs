//! NIST's known answers for ML-DSA-65, and a second implementation (fips204).
//!
//! The vectors are of the ACVP server's files for FIPS 204 (key generation; deterministic signatures and
//! verification by the internal interface), with long outputs as digests.

use data_encoding::HEXLOWER;
use fips204::ml_dsa_65;
use fips204::traits::{KeyGen, SerDes, Signer, Verifier};
use mesh_identity::{IdentityKey, PublicKey};
use ml_dsa::{B32, ExpandedSigningKey, Keypair, MlDsa65, Signature, SigningKey, VerifyingKey};
use serde::Deserialize;
use sha2::{Digest, Sha256};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Vectors {
    key_gen: Vec<KeyGenCase>,
    sig_gen: Vec<SigGenCase>,
    sig_ver: SigVer,
}

#[derive(Deserialize)]
struct KeyGenCase {
    seed: String,
    pk_sha256: String,
    sk_sha256: String,
}

#[derive(Deserialize)]
struct SigGenCase {
    sk: String,
    message: String,
    signature_sha256: String,
}

#[derive(Deserialize)]
struct SigVer {
    pk: String,
    tests: Vec<SigVerCase>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SigVerCase {
    message: String,
    signature: String,
    test_passed: bool,
    reason: String,
}

fn vectors() -> Vectors {
    serde_json::from_str(include_str!("data/acvp-ml-dsa-65.json")).unwrap()
}

fn bytes(hex: &str) -> Vec<u8> {
    HEXLOWER.decode(hex.as_bytes()).unwrap()
}

fn digest(bytes: impl AsRef<[u8]>) -> String {
    HEXLOWER.encode(&Sha256::digest(bytes))
}

#[test]
#[allow(deprecated, reason = "the vectors give and expect expanded keys")]
fn keys_are_those_of_nists_vectors() {
    let cases = vectors().key_gen;
    assert_eq!(cases.len(), 25);
    for case in cases {
        let seed: [u8; 32] = bytes(&case.seed).try_into().unwrap();
        let key = IdentityKey::from_seed(&seed);
        assert_eq!(digest(key.public().as_bytes()), case.pk_sha256);
        assert_eq!(key.node_id().to_string(), case.pk_sha256, "the node's id");
        let expanded = ExpandedSigningKey::<MlDsa65>::from_seed(&B32::from(seed));
        assert_eq!(digest(expanded.to_expanded()), case.sk_sha256);
    }
}

#[test]
#[allow(deprecated, reason = "the vectors give and expect expanded keys")]
fn signatures_are_those_of_nists_vectors() {
    for case in vectors().sig_gen {
        let encoded = bytes(&case.sk);
        let encoded = encoded[..].try_into().unwrap();
        let key = ExpandedSigningKey::<MlDsa65>::from_expanded(&encoded);
        let signature = key.sign_internal(&[&bytes(&case.message)], &B32::default());
        assert_eq!(digest(signature.encode()), case.signature_sha256);
    }
}

#[test]
fn nists_vectors_are_verified_and_refused_as_they_say() {
    let SigVer { pk, tests } = vectors().sig_ver;
    let pk = bytes(&pk);
    let key = VerifyingKey::<MlDsa65>::decode(&pk[..].try_into().unwrap());
    assert!(tests.iter().any(|case| case.test_passed));
    assert!(tests.iter().any(|case| !case.test_passed));
    for case in tests {
        let signature = Signature::<MlDsa65>::try_from(&bytes(&case.signature)[..]);
        let message = bytes(&case.message);
        let verified = signature.is_ok_and(|signature| key.verify_internal(&message, &signature));
        assert_eq!(verified, case.test_passed, "{}", case.reason);
    }
}

#[test]
fn a_second_implementation_makes_the_same_keys_and_accepts_the_signatures_and_the_other_way_round()
{
    let context: &[u8] = b"hydramesh test";
    for round in 0..8u8 {
        let seed = [round; 32];
        let ours = IdentityKey::from_seed(&seed);
        let (their_public, theirs) = ml_dsa_65::KG::keygen_from_seed(&seed);
        let public = their_public.clone().into_bytes();
        assert_eq!(public[..], *ours.public().as_bytes());

        let message = [round; 100];
        let signature = ours.sign(b"hydramesh test", &message);
        let signature: [u8; 3309] = signature.try_into().unwrap();
        assert!(their_public.verify(&message, &signature, context));
        assert!(!their_public.verify(&message, &signature, b"another"));

        let signature = theirs.try_sign(&message, context).unwrap();
        let read = PublicKey::from_bytes(&public).unwrap();
        assert!(read.verifies(context, &message, &signature));
        assert!(!read.verifies(b"another", &message, &signature));
        assert!(!read.verifies(context, &message[1..], &signature));
    }
    // A key is 32 bytes of seed in its file, whoever reads it.
    let key = SigningKey::<MlDsa65>::from_seed(&B32::from([1; 32]));
    assert_eq!(
        key.verifying_key().encode()[..],
        *IdentityKey::from_seed(&[1; 32]).public().as_bytes()
    );
}
