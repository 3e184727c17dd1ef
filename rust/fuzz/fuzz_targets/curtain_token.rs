//! Any bytes are a curtain token or an error; a token has one encoding, and none is accepted that the issuer did not sign.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mesh_curtain::{Door, Token};
use mesh_identity::{IdentityKey, PublicKey};

static ISSUER: LazyLock<PublicKey> = LazyLock::new(|| IdentityKey::generate().public().clone());

fuzz_target!(|bytes: &[u8]| {
    let Ok(token) = Token::from_bytes(bytes) else {
        return;
    };
    assert_eq!(token.to_bytes(), bytes);
    assert_eq!(
        Token::parse(&token.to_text()).expect("a token that was printed"),
        token
    );
    let door = Door {
        issuer: &ISSUER,
        audience: "home",
        tenant: None,
    };
    assert!(door.accept(&token, 1, |_, _| false).is_err());
});
