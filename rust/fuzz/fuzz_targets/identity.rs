//! Any bytes are a proof of an identity, an identity document or a key in PEM, or an error; and none verifies that its key did
//! not sign. The first byte says which: bytes behind the signed part are added to, removed from or laid over a genuine one.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mesh_identity::{Document, IdentityKey, Purpose, Transcript};
use mesh_proto::IdentityProof;
use prost::Message;

static ROOT: LazyLock<IdentityKey> = LazyLock::new(|| IdentityKey::from_seed(&[1; 32]));
static GENUINE: LazyLock<(Vec<u8>, Vec<u8>)> = LazyLock::new(|| {
    let document = Document {
        key: ROOT.public().clone(),
        name: "attic".to_owned(),
        role: "worker".to_owned(),
        mesh: "home".to_owned(),
        root: [2; 32],
        not_before: 1,
        not_after: 2,
    };
    (document.sign(&ROOT), transcript().prove(&ROOT).encode_to_vec())
});

fn transcript() -> Transcript<'static> {
    Transcript {
        purpose: Purpose::Join,
        session: &[3; 32],
        root: &[2; 32],
        request: b"request",
        token: "8f0c1a7be2d43956",
        name: "attic",
        successor: None,
    }
}

/// The genuine bytes with others laid over them from a place on.
fn laid_over(genuine: &[u8], data: &[u8]) -> Vec<u8> {
    let Some((place, over)) = data.split_first_chunk::<2>() else {
        return genuine.to_vec();
    };
    let mut bytes = genuine.to_vec();
    let at = usize::from(u16::from_be_bytes(*place)) % bytes.len();
    bytes.truncate(at.max(bytes.len().saturating_sub(over.len())));
    bytes.extend_from_slice(over);
    bytes
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    let (document, proof) = &*GENUINE;
    let changed = match kind % 5 {
        0 => data.to_vec(),
        1 => laid_over(document, data),
        2 => data.to_vec(),
        3 => laid_over(proof, data),
        _ => {
            if let Ok(text) = std::str::from_utf8(data) {
                let _ = IdentityKey::from_pem(text);
            }
            return;
        }
    };
    if kind % 5 < 2 {
        if let Ok(read) = Document::verify(&changed, ROOT.public()) {
            assert_eq!(Document::verify(document, ROOT.public()), Ok(read));
        }
    } else if let Ok(claimed) = IdentityProof::decode(&changed[..])
        && transcript().verify(&claimed).is_ok()
    {
        let genuine = IdentityProof::decode(&proof[..]).expect("its own");
        assert_eq!(claimed.public_key, genuine.public_key);
    }
});
