//! Any message that nodes send each other over QUIC, in any bytes, is read or refused; what was read is written and read back as the same.
//! The first byte is its kind.
#![no_main]

use dcf::MsgType;
use libfuzzer_sys::fuzz_target;
use mesh_proto::*;
use prost::Message;

/// Reads the body of every kind that has one.
macro_rules! bodies {
    ($kind:expr, $bytes:expr, $($known:ident => $body:ty,)*) => {
        match $kind {
            $(MsgType::$known => again::<$body>($bytes),)*
            _ => {}
        }
    };
}

fn again<M: Message + Default + Clone + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    let Ok(read) = M::decode(bytes) else { return };
    let written = read.encode_to_vec();
    // NaN is not equal to itself: bytes are.
    let back = M::decode(written.as_slice()).expect("what was written can be read");
    assert_eq!(back.encode_to_vec(), written);
}

fuzz_target!(|data: &[u8]| {
    let Some((&kind, bytes)) = data.split_first() else {
        return;
    };
    bodies!(MsgType(kind), bytes,
        HELLO => Hello,
        WELCOME => Welcome,
        LOAD => Load,
        ROOT_SUCCESSION => SignedSuccession,
        GENERATE => Generate,
        TOKENS => Tokens,
        DONE => Done,
        EMBED => Embed,
        EMBEDDINGS => Embeddings,
        PROGRESS => Progress,
        IMAGE_TASK => ImageTask,
        IMAGE_STEP => ImageStep,
        IMAGE_DATA => ImageData,
        JOIN_REQUEST => JoinRequest,
        JOIN_RESPONSE => JoinResponse,
        RENEW_REQUEST => RenewRequest,
        OFFER => Offer,
        RING => Ring,
        RING_STATE => RingState,
        RING_HELLO => RingHello,
        RING_STEP => RingStep,
        RING_HELD => RingHeld,
        RING_MIRROR => RingMirror,
        RING_MIRRORED => RingMirrored,
        RING_PING => RingPing,
        RING_RESEND => RingResend,
        RING_OUTCOME => RingOutcome,
        PROBED => Probed,
        MODELS => Models,
        SOURCES => Sources,
        MANIFEST_REQUEST => ManifestRequest,
        MANIFEST_REPLY => ManifestReply,
        PIECES_HELLO => PiecesHello,
        PIECES_HERE => PiecesHere,
        PIECE_REQUEST => PieceRequest,
        PIECE_DATA => PieceData,
        SERVED => Served,
    );
});
