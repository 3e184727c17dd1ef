//! Any stream, in any pieces, decodes to the same messages, and to no more bytes than arrived.
#![no_main]

use bytes::BytesMut;
use dcf::{Message, StreamCodec};
use libfuzzer_sys::fuzz_target;
use tokio_util::codec::Decoder;

fuzz_target!(|data: (u8, Vec<u8>)| {
    let (step, stream) = data;
    let whole = decode(&stream, stream.len().max(1));
    let in_pieces = decode(&stream, usize::from(step) + 1);
    assert_eq!(whole, in_pieces);
});

fn decode(stream: &[u8], step: usize) -> (Vec<Message>, bool) {
    let mut codec = StreamCodec::new(1 << 16);
    let mut buffer = BytesMut::new();
    let mut messages = Vec::new();
    for piece in stream.chunks(step) {
        buffer.extend_from_slice(piece);
        loop {
            match codec.decode(&mut buffer) {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(_) => return (messages, false),
            }
        }
        assert!(buffer.capacity() <= 2 * stream.len() + (256 << 10));
    }
    (messages, true)
}
