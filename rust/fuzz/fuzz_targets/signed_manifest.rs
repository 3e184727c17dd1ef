//! Any bytes are a signed manifest or an error, and no policy that trusts a key lets one pass that the key did not sign.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use mesh_store::{Policy, PublicKey, SignedManifest, SigningKey, Verdict};

fn public() -> &'static PublicKey {
    static KEY: OnceLock<PublicKey> = OnceLock::new();
    KEY.get_or_init(|| SigningKey::generate().public())
}

fuzz_target!(|data: &[u8]| {
    let Ok(signed) = SignedManifest::parse(data) else {
        return;
    };
    assert_eq!(signed.to_bytes(), data);
    let strict = Policy::new(vec![public().clone()], true).expect("a key is trusted");
    assert!(strict.check(&signed).is_err());
    let lax = Policy::new(vec![public().clone()], false).expect("none is required");
    assert!(!matches!(lax.check(&signed), Ok(Verdict::Signed { .. })));
});
