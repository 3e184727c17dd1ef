//! NIST's known answers for the keys of a trail, and signatures that a second implementation makes alike.
//!
//! The seeds and public keys are of the ACVP server's files for key generation (FIPS 205, SLH-DSA-SHA2-128f).

use data_encoding::HEXLOWER_PERMISSIVE;
use fips205::slh_dsa_sha2_128f;
use fips205::traits::{SerDes, Signer};
use mesh_audit::keys::{KeyKind, TrailKeys, Vkey};
use slh_dsa::{Sha2_128f, SigningKey};

fn bytes(hex: &str) -> Vec<u8> {
    HEXLOWER_PERMISSIVE.decode(hex.as_bytes()).unwrap()
}

/// SK.seed, SK.prf and PK.seed one behind the other, and the root that ends the public key.
const SLH_DSA: [(&str, &str); 4] = [
    (
        "E2BDAA37C8CFFE5E8D5676C23267890C31441758F573285881CDC82AB911DD8472DC8D26DF6EF708F4C41AF9FD04B65A",
        "8927927229891D47A60D67ECEF3D2C17",
    ),
    (
        "FE622CF6681C536DB475F6C5681EA362832822B33858D2E407360A5D88BB34CC7036B5EE2EEA8FBC6275AA8515E3F32D",
        "A273DE43A6EF33A53E2F6E9B5C5671B5",
    ),
    (
        "D9EFB095EA0F1F927CFD3BAA454B08D03A9C64A8605B30EEF7DCD122DEAFE5539B83EC4D0B0E7556FE89863CC833C215",
        "E0771DCDFD6FCD69CDC67ACD92A3670E",
    ),
    (
        "48C9FCB1BCFC96B9264C74122F775938B468E14E09AEB01292318D636DBC7D3EEE69D45BFA9AF8397AC497D161EA639D",
        "6C2ED6E1496A94D1D2EAA348EA26303B",
    ),
];

#[test]
fn keys_of_slh_dsa_are_those_of_nist() {
    for (seed, root) in SLH_DSA {
        let seed: [u8; 48] = bytes(seed).try_into().unwrap();
        let public = [&seed[32..], &bytes(root)].concat();
        let made = TrailKeys::from_seeds(&[0; 32], &seed).epoch_vkey("a");
        assert_eq!(made, Vkey::new("a", KeyKind::SlhDsa, &public));
    }
}

#[test]
fn deterministic_signatures_of_slh_dsa_are_the_same_byte_for_byte() {
    let (seed, root) = SLH_DSA[0];
    let secret: [u8; 64] = [bytes(seed), bytes(root)].concat().try_into().unwrap();
    let ours = SigningKey::<Sha2_128f>::try_from(&secret[..]).unwrap();
    let theirs = slh_dsa_sha2_128f::PrivateKey::try_from_bytes(secret).unwrap();
    for message in [&b""[..], b"mesh/audit\n3\n", &[7; 1000]] {
        let made = ours
            .try_sign_with_context(message, b"context", None)
            .unwrap();
        let other = theirs.try_sign(message, b"context", false).unwrap();
        assert!(made.to_vec() == other.to_vec(), "{} bytes", message.len());
    }
}
