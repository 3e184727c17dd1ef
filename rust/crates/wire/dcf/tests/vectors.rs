//! The published test vectors: the 17-byte header in `vectors/dcf-17.json`, v5.1 in `vectors/dcf-18.json`.

use std::time::Instant;

use bytes::{Bytes, BytesMut};
use data_encoding::HEXLOWER;
use dcf::{
    DecodeError, HEADER_LEN, Header, Message, MsgType, StreamCodec, Version,
    chunk::{self, Chunk, Limits, Reassembler},
};
use serde::Deserialize;
use tokio_util::codec::{Decoder, Encoder};

#[derive(Deserialize)]
struct Vectors {
    header_bytes: usize,
    valid: Vec<Valid>,
    invalid: Vec<Invalid>,
    trailing: Trailing,
    chunked: Chunked,
}

#[derive(Deserialize)]
struct Valid {
    name: String,
    #[serde(rename = "type")]
    kind: u8,
    sequence: u32,
    timestamp_us: u64,
    payload_hex: String,
    datagram_hex: String,
}

#[derive(Deserialize)]
struct Invalid {
    name: String,
    datagram_hex: String,
}

#[derive(Deserialize)]
struct Trailing {
    datagram_hex: String,
}

#[derive(Deserialize)]
struct Chunked {
    sequence: u32,
    payload_len: usize,
    md5_hex: String,
    chunks: Vec<String>,
}

impl Valid {
    fn message(&self) -> Message {
        Message::new(
            MsgType(self.kind),
            self.sequence,
            self.timestamp_us,
            unhex(&self.payload_hex),
        )
    }
}

fn vectors() -> Vectors {
    serde_json::from_str(include_str!("vectors/dcf-17.json")).expect("the vectors are valid JSON")
}

fn unhex(digits: &str) -> Bytes {
    let bytes = HEXLOWER.decode(digits.as_bytes());
    bytes.expect("hexadecimal digits").into()
}

#[test]
fn valid_datagrams_decode_and_encode_byte_for_byte() {
    let vectors = vectors();
    assert_eq!(vectors.header_bytes, HEADER_LEN);
    assert_eq!(vectors.valid.len(), 36);
    for vector in &vectors.valid {
        let datagram = unhex(&vector.datagram_hex);
        let decoded = Message::decode_datagram(datagram.clone())
            .unwrap_or_else(|error| panic!("{}: {error}", vector.name));
        assert_eq!(decoded, vector.message(), "{}", vector.name);
        assert_eq!(
            vector.message().encode_datagram(),
            datagram,
            "{}",
            vector.name
        );
        let header = Header::decode(&datagram).unwrap();
        assert_eq!(header.encode(), datagram[..HEADER_LEN], "{}", vector.name);
    }
}

#[derive(Deserialize)]
struct VectorsOf51 {
    header_bytes: usize,
    valid: Vec<Valid>,
    invalid: Vec<Invalid>,
}

fn vectors_of_51() -> VectorsOf51 {
    serde_json::from_str(include_str!("vectors/dcf-18.json")).expect("the vectors are valid JSON")
}

#[test]
fn valid_v5_1_datagrams_decode_and_encode_byte_for_byte() {
    let vectors = vectors_of_51();
    assert_eq!(vectors.header_bytes, Version::V5_1.header_len());
    assert_eq!(vectors.valid.len(), 8);
    for vector in &vectors.valid {
        let datagram = unhex(&vector.datagram_hex);
        let name = &vector.name;
        let decoded = Message::decode_versioned(datagram.clone());
        assert_eq!(decoded, Ok((Version::V5_1, vector.message())), "{name}");
        assert_eq!(
            vector.message().encode_as(Version::V5_1),
            datagram,
            "{name}"
        );
        // The same message, one version earlier.
        let decoded = Message::decode_versioned(datagram.slice(1..));
        assert_eq!(decoded, Ok((Version::V5_0, vector.message())), "{name}");
        if vector.kind == MsgType::CHUNK.0 {
            let chunk = Chunk::parse(&vector.message().payload).unwrap();
            assert_eq!((chunk.total, chunk.index, chunk.data.len()), (2, 0, 1_400));
        }
    }
}

#[test]
fn invalid_v5_1_datagrams_are_refused_for_the_reason_given() {
    let expected = [
        ("short_header", DecodeError::ShortHeader { len: 4 }),
        (
            "short_payload",
            DecodeError::Truncated {
                payload_len: 9,
                present: 3,
            },
        ),
        ("other_version", DecodeError::OtherVersion(0x52)),
    ];
    let vectors = vectors_of_51();
    assert_eq!(vectors.invalid.len(), expected.len());
    for (vector, (name, error)) in vectors.invalid.iter().zip(expected) {
        assert_eq!(vector.name, name);
        let decoded = Message::decode_datagram(unhex(&vector.datagram_hex));
        assert_eq!(decoded, Err(error), "{name}");
    }
}

#[test]
fn types_for_streams_are_refused_in_datagrams_of_either_version() {
    for kind in MsgType::ASSIGNED.iter().filter(|kind| !kind.is_datagram()) {
        let message = Message::new(*kind, 1, 2, "x");
        for version in [Version::V5_0, Version::V5_1] {
            let datagram = message.encode_as(version);
            // A datagram that begins with 0x51 is v5.1, and this one is shorter than its header.
            if *kind == MsgType::SOURCES && version == Version::V5_0 {
                let error = Message::decode_datagram(datagram).unwrap_err();
                assert!(!matches!(error, DecodeError::UnknownType(_)), "{error}");
                continue;
            }
            let refused = Err(DecodeError::UnknownType(kind.0));
            assert_eq!(
                Message::decode_datagram(datagram),
                refused,
                "{kind} in {version}"
            );
        }
    }
}

#[test]
fn valid_messages_come_back_from_one_stream() {
    let vectors = vectors();
    let mut codec = StreamCodec::default();
    let mut stream = BytesMut::new();
    for vector in &vectors.valid {
        codec.encode(vector.message(), &mut stream).unwrap();
    }
    for vector in &vectors.valid {
        assert_eq!(
            codec.decode(&mut stream).unwrap(),
            Some(vector.message()),
            "{}",
            vector.name
        );
    }
    assert!(codec.decode_eof(&mut stream).unwrap().is_none());
}

#[test]
fn invalid_datagrams_are_refused_for_the_reason_given() {
    let expected = [
        ("empty", DecodeError::ShortHeader { len: 0 }),
        (
            "one_byte_short_header",
            DecodeError::ShortHeader { len: 16 },
        ),
        (
            "payload_truncated",
            DecodeError::Truncated {
                payload_len: 5,
                present: 4,
            },
        ),
        (
            "payload_len_max_no_payload",
            DecodeError::Truncated {
                payload_len: u32::MAX,
                present: 0,
            },
        ),
        ("unknown_type_0x00", DecodeError::UnknownType(0)),
        ("unknown_type_0x7e", DecodeError::UnknownType(0x7e)),
    ];
    let vectors = vectors();
    assert_eq!(vectors.invalid.len(), expected.len());
    for (vector, (name, error)) in vectors.invalid.iter().zip(expected) {
        assert_eq!(vector.name, name);
        assert_eq!(
            Message::decode_datagram(unhex(&vector.datagram_hex)),
            Err(error),
            "{name}"
        );
    }
}

#[test]
fn trailing_bytes_are_ignored_in_a_datagram_and_kept_on_a_stream() {
    let datagram = unhex(&vectors().trailing.datagram_hex);
    let message = Message::decode_datagram(datagram.clone()).unwrap();
    assert_eq!(message.payload, "hello");
    assert_eq!(message.encoded_len() + 2, datagram.len());

    let mut stream = BytesMut::from(datagram);
    assert_eq!(
        StreamCodec::default().decode(&mut stream).unwrap(),
        Some(message)
    );
    assert_eq!(stream, "zz");
}

#[test]
fn chunks_are_cut_and_joined_as_published() {
    let vectors = vectors();
    let chunked = &vectors.chunked;
    let payload: Bytes = (0..chunked.payload_len)
        .map(|i| (31 * i + 7) as u8)
        .collect();
    let published: Vec<Message> = chunked
        .chunks
        .iter()
        .map(|name| {
            vectors
                .valid
                .iter()
                .find(|vector| vector.name == *name)
                .expect("a chunk")
                .message()
        })
        .collect();

    let ours: Vec<Message> = chunk::split(chunked.sequence, 0, payload.clone())
        .unwrap()
        .collect();
    assert_eq!(ours.len(), published.len());
    for (ours, published) in ours.iter().zip(&published) {
        assert_eq!(
            (ours.kind, ours.sequence),
            (published.kind, published.sequence)
        );
        assert_eq!(ours.payload, published.payload);
    }

    let mut reassembler = Reassembler::new(Limits::default());
    let now = Instant::now();
    let mut joined = None;
    for message in published.iter().rev() {
        assert_eq!(joined, None);
        let chunk = Chunk::parse(&message.payload).unwrap();
        assert_eq!(chunk.md5[..], unhex(&chunked.md5_hex));
        joined = reassembler.push(message.sequence, &chunk, now).unwrap();
    }
    assert_eq!(joined, Some(payload));
}
