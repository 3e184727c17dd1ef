//! Any bytes are a member's certificate or an error: a stranger's are read before its signature is looked at. So are the
//! statements of mesh roots, which no made-up bytes pass for.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_net::trust::{Member, Succession, read_papers};
use mesh_proto::SignedSuccession;
use prost::Message;

fuzz_target!(|data: &[u8]| {
    if let Ok(member) = Member::from_certificate(data) {
        assert_eq!(member.node_id.len(), 64);
        let _ = member.dates();
    }
    if let Ok(signed) = SignedSuccession::decode(data) {
        assert!(Succession::verify(&signed).is_err());
    }
    let bare = SignedSuccession {
        body: data.to_vec(),
        ..SignedSuccession::default()
    };
    assert!(Succession::verify(&bare).is_err());
    assert!(read_papers(data).is_err());
});
