//! Any datagram of either version decodes to what it contains, or to an error.
#![no_main]

use bytes::Bytes;
use dcf::{HEADER_LEN, Header, Message, Version, chunk::Chunk};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(header) = Header::decode(data) {
        assert_eq!(header.encode(), data[..HEADER_LEN]);
    }
    check(data);
    // Most random bytes are not v5.1.
    check(&[Version::V5_1.prefix(), data].concat());
});

fn check(data: &[u8]) {
    let decoded = Message::decode_versioned(Bytes::copy_from_slice(data));
    let header = Header::decode_datagram(data);
    assert_eq!(decoded.as_ref().err(), header.as_ref().err());
    let Ok((version, message)) = decoded else {
        return;
    };
    assert!(message.kind.is_datagram());
    assert_eq!(version, Version::of(data));
    let encoded = message.encode_as(version);
    assert_eq!(encoded, data[..encoded.len()]);
    if let Some(error) = message.error_body() {
        let _ = error.to_string();
    }
    let _ = message.partial_body();
    if let Ok(chunk) = Chunk::parse(&message.payload) {
        assert_eq!(chunk.encode(), message.payload);
    }
}
