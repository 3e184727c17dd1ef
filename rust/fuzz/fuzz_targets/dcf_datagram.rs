//! Any datagram decodes to what it contains, or to an error.
#![no_main]

use bytes::Bytes;
use dcf::{HEADER_LEN, Header, chunk::Chunk};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(header) = Header::decode(data) {
        assert_eq!(header.encode(), data[..HEADER_LEN]);
    }
    let datagram = Bytes::copy_from_slice(data);
    let Ok(message) = dcf::decode_datagram(datagram) else {
        return;
    };
    let encoded = message.encode_datagram();
    assert_eq!(encoded, data[..encoded.len()]);
    if let Some(error) = message.error_body() {
        let _ = error.to_string();
    }
    let _ = message.partial_body();
    if let Ok(chunk) = Chunk::parse(&message.payload) {
        assert_eq!(chunk.encode(), message.payload);
    }
});
