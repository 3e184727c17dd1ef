//! Round trips and mutations: whatever is encoded comes back, and no bytes do harm.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use dcf::{
    DecodeError, ErrorBody, ErrorCode, HEADER_LEN, Header, Message, MsgType, StreamCodec, Version,
    chunk::{self, Chunk, Limits, Reassembler},
};
use proptest::{collection::vec, prelude::*};
use tokio_util::codec::{Decoder, Encoder};

fn any_message() -> impl Strategy<Value = Message> {
    message_of(MsgType::ASSIGNED.to_vec())
}

fn any_datagram() -> impl Strategy<Value = (Version, Message)> {
    let kinds = MsgType::ASSIGNED.iter().filter(|kind| kind.is_datagram());
    let version = prop::sample::select(vec![Version::V5_0, Version::V5_1]);
    (version, message_of(kinds.copied().collect()))
}

fn message_of(kinds: Vec<MsgType>) -> impl Strategy<Value = Message> {
    let kind = prop::sample::select(kinds);
    (kind, any::<u32>(), any::<u64>(), vec(any::<u8>(), 0..600)).prop_map(
        |(kind, sequence, timestamp, payload)| Message::new(kind, sequence, timestamp, payload),
    )
}

/// Decodes all of a stream that arrives in pieces cut at `cuts`.
fn decode_in_pieces(codec: &mut StreamCodec, stream: &[u8], cuts: &[usize]) -> Vec<Message> {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (stream.len() + 1)).collect();
    cuts.push(stream.len());
    cuts.sort_unstable();
    let (mut buffer, mut at, mut messages) = (BytesMut::new(), 0, Vec::new());
    for cut in cuts {
        buffer.extend_from_slice(&stream[at..cut]);
        at = cut;
        while let Some(message) = codec.decode(&mut buffer).unwrap() {
            messages.push(message);
        }
    }
    assert!(codec.decode_eof(&mut buffer).unwrap().is_none());
    messages
}

proptest! {
    #[test]
    fn headers_round_trip(msg_type: u8, sequence: u32, timestamp_us: u64, payload_len: u32) {
        let header = Header { msg_type, sequence, timestamp_us, payload_len };
        prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn datagrams_round_trip_whatever_trails_them(
        (version, message) in any_datagram(), trailing in vec(any::<u8>(), 0..40),
    ) {
        let mut datagram = BytesMut::from(&message.encode_as(version)[..]);
        datagram.extend_from_slice(&trailing);
        prop_assert_eq!(Message::decode_versioned(datagram.freeze()), Ok((version, message)));
    }

    #[test]
    fn every_cut_of_a_datagram_is_refused((version, message) in any_datagram(), at: prop::sample::Index) {
        let datagram = message.encode_as(version);
        let cut = datagram.slice(..at.index(datagram.len()));
        let len = cut.len().saturating_sub(version.prefix().len());
        let expected = match len.checked_sub(HEADER_LEN) {
            None => DecodeError::ShortHeader { len },
            Some(present) => DecodeError::Truncated { payload_len: message.payload.len() as u32, present },
        };
        prop_assert_eq!(Message::decode_datagram(cut), Err(expected));
    }

    #[test]
    fn arbitrary_bytes_decode_to_what_they_contain_or_not_at_all(bytes in vec(any::<u8>(), 0..200), v5_1: bool) {
        let prefix = if v5_1 { Version::V5_1.prefix() } else { &[] };
        let datagram = Bytes::from([prefix, &bytes].concat());
        if let Ok((version, message)) = Message::decode_versioned(datagram.clone()) {
            let encoded = message.encode_as(version);
            prop_assert_eq!(&datagram[..encoded.len()], &encoded[..]);
            let _ = (message.error_body(), message.partial_body(), Chunk::parse(&message.payload));
        }
    }

    #[test]
    fn a_flipped_bit_changes_one_field_or_is_refused(
        (version, message) in any_datagram(), at: prop::sample::Index, bit in 0u8..8,
    ) {
        let mut datagram = message.encode_as(version).to_vec();
        // The version byte is not a field: without it the rest means something else.
        let start = version.prefix().len();
        let at = start + at.index(datagram.len() - start);
        datagram[at] ^= 1 << bit;
        if let Ok(mutated) = Message::decode_datagram(datagram.into()) {
            let (before, after) = (&message.payload, &mutated.payload);
            let changed = [
                mutated.kind != message.kind,
                mutated.sequence != message.sequence,
                mutated.timestamp_us != message.timestamp_us,
                // A smaller length cuts the payload; a larger one would have been refused.
                after.len() != before.len(),
                after.len() == before.len() && after != before,
            ];
            prop_assert_eq!(changed.iter().filter(|changed| **changed).count(), 1);
        }
    }

    #[test]
    fn streams_round_trip_in_any_pieces(messages in vec(any_message(), 0..8), cuts in vec(any::<usize>(), 0..12)) {
        let mut codec = StreamCodec::default();
        let mut stream = BytesMut::new();
        for message in &messages {
            codec.encode(message, &mut stream).unwrap();
        }
        prop_assert_eq!(decode_in_pieces(&mut codec, &stream, &cuts), messages);
    }

    #[test]
    fn arbitrary_streams_end_in_messages_or_an_error(stream in vec(any::<u8>(), 0..2000)) {
        let mut codec = StreamCodec::new(1 << 20);
        let mut buffer = BytesMut::from(&stream[..]);
        let mut taken = 0;
        while let Ok(Some(message)) = codec.decode(&mut buffer) {
            taken += message.encoded_len();
        }
        prop_assert_eq!(taken + buffer.len(), stream.len());
        prop_assert!(buffer.capacity() <= 256 << 10);
    }

    #[test]
    fn error_bodies_round_trip(code: u8, text in ".{0,80}") {
        let message = Message::error(1, 2, ErrorCode(code), &text);
        prop_assert_eq!(message.error_body(), Some(ErrorBody { code: ErrorCode(code), text: text.into() }));
    }

    #[test]
    fn chunks_round_trip_in_any_order_with_repeats(
        payload in vec(any::<u8>(), 0..20_000),
        order in vec(any::<prop::sample::Index>(), 0..40),
    ) {
        let payload = Bytes::from(payload);
        let chunks: Vec<Chunk> =
            chunk::split(5, 6, payload.clone()).unwrap().map(|message| Chunk::parse(&message.payload).unwrap()).collect();
        let mut reassembler = Reassembler::new(Limits::default());
        let now = Instant::now();
        // Some at random with repeats, then all: the payload comes exactly once, with the last missing Chunk.
        let random = order.iter().map(|at| &chunks[at.index(chunks.len())]);
        let mut seen = vec![false; chunks.len()];
        for chunk in random.chain(&chunks) {
            let had_all = seen.iter().all(|seen| *seen);
            seen[usize::from(chunk.index)] = true;
            let joined = reassembler.push("peer", chunk, now).unwrap();
            if had_all {
                break;
            }
            prop_assert_eq!(joined.is_some(), seen.iter().all(|seen| *seen));
            if let Some(joined) = joined {
                prop_assert_eq!(&joined, &payload);
                prop_assert!(reassembler.is_empty());
                prop_assert_eq!(reassembler.bytes(), 0);
            }
        }
    }

    #[test]
    fn a_reassembler_stays_within_its_limits_whatever_comes(
        chunks in vec((0u8..6, 0u16..8, 0u16..9, 0u8..3, vec(any::<u8>(), 0..300), 0u64..40), 0..200),
    ) {
        let limits = Limits { max_messages: 3, max_payload: 900, max_bytes: 1_500, timeout: Duration::from_millis(200) };
        let mut reassembler = Reassembler::new(limits);
        let mut now = Instant::now();
        for (key, index, total, md5, data, pause_ms) in chunks {
            now += Duration::from_millis(pause_ms);
            let chunk = Chunk { total, index, md5: [md5; 16], data: data.into() };
            if let Ok(chunk) = Chunk::parse(&chunk.encode())
                && let Ok(Some(payload)) = reassembler.push(key, &chunk, now)
            {
                prop_assert!(payload.len() <= limits.max_payload);
            }
            // What came may not have been a Chunk, and only Chunks let time act by themselves.
            reassembler.expire(now);
            prop_assert!(reassembler.len() <= limits.max_messages);
            prop_assert!(reassembler.bytes() <= limits.max_bytes);
            prop_assert!(reassembler.next_deadline().is_none_or(|deadline| deadline > now && deadline <= now + limits.timeout));
        }
        now += limits.timeout;
        reassembler.expire(now);
        prop_assert!(reassembler.is_empty());
        prop_assert_eq!(reassembler.bytes(), 0);
    }
}
