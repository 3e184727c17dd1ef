//! Any bytes are evidence of a node, or an error; what is kept is short and has no control character, and no change of a narinfo
//! is signed. The first byte says which part the others are.
#![no_main]

use arcanum_attestor::{Evidence, TrustedKey};
use libfuzzer_sys::fuzz_target;
use mesh_proto::NixSystem;
use prost::Message;

const PATH: &str = "/nix/store/w9yy7v61ipb5rx6i35zq1mvc2iqfmps1-hello-2.10";
const KEY: &str = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    let key: TrustedKey = KEY.parse().expect("a key");
    let bytes = match kind % 2 {
        0 => data.to_vec(),
        _ => {
            let said = mesh_proto::Evidence {
                form: 1,
                system: Some(NixSystem {
                    path: PATH.to_owned(),
                    nar_hash: String::new(),
                    narinfo: String::from_utf8_lossy(data).into_owned(),
                }),
                ..mesh_proto::Evidence::default()
            };
            said.encode_to_vec()
        }
    };
    let Ok(evidence) = Evidence::read(&bytes, &[key]) else {
        return;
    };
    let text = serde_json::to_string(&evidence).expect("text");
    assert!(!text.contains(char::is_control) && text.len() < 100_000);
    if let Some(system) = &evidence.system {
        // The public cache signed one hash of this path.
        assert!(
            system.signed_by.is_empty()
                || system.nar_hash == "sha256:1mi14cqk363wv368ffiiy01knardmnlyphi6h9xv6dkjz44hk30i"
        );
    }
    let _ = evidence.changes_to(&Evidence::default());
});
