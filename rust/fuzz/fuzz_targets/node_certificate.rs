//! Any bytes are a member's certificate or an error: a stranger's are read before its signature is looked at.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_net::trust::Member;

fuzz_target!(|data: &[u8]| {
    if let Ok(member) = Member::from_certificate(data) {
        assert_eq!(member.node_id.len(), 64);
        let _ = member.dates();
    }
});
