//! Any text is a join token or an error; a token prints as itself.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_net::trust::JoinToken;

fuzz_target!(|text: &str| {
    if let Ok(token) = text.parse::<JoinToken>() {
        let again: JoinToken = token.to_string().parse().expect("a token that was printed");
        assert_eq!(again.to_string(), token.to_string());
    }
});
