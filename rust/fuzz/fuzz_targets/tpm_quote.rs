//! Any bytes are a quote of a TPM, or an error; a genuine one with any change is refused. The first byte says
//! which part the others are.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_proto::TpmQuote;
use mesh_tpm::verify;
use prost::Message;

const REQUEST: [u8; 32] = [7; 32];

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    let mut quote = genuine();
    match kind % 4 {
        0 => {
            let Ok(other) = TpmQuote::decode(data) else {
                return;
            };
            quote = other;
        }
        1 => quote.public = data.to_vec(),
        2 => quote.attest = data.to_vec(),
        _ => quote.signature = data.to_vec(),
    }
    if let Ok(verified) = verify(&quote, &REQUEST) {
        let known = verify(&genuine(), &REQUEST).expect("genuine");
        assert_eq!((verified.key, verified.pcrs), (known.key, known.pcrs));
    }
});

/// A quote of swtpm 0.7.1 for this request.
fn genuine() -> TpmQuote {
    let digits = include_str!("../../crates/base/mesh-tpm/src/quote.hex");
    let digits: Vec<u8> = digits.bytes().filter(u8::is_ascii_hexdigit).collect();
    let bytes = digits.chunks(2).map(|pair| {
        let pair = std::str::from_utf8(pair).expect("ASCII");
        u8::from_str_radix(pair, 16).expect("digits")
    });
    TpmQuote::decode(&bytes.collect::<Vec<u8>>()[..]).expect("a quote")
}
