//! Datagrams of answers: plain ones in the client's version, and sealed ones of sessions.

use std::time::Instant;

use dcf::{ErrorCode, Message};
use mesh_control::dedup::TaskKey;
use mesh_net::sealed::MAX_SEALED_ANSWER;
use mesh_net::udp::SendBatch;

use super::sealed::Sessions;
use crate::mesh::timestamp_us;

/// Puts a message to a task's client into a batch, in the client's version, or sealed for its session.
pub(super) fn queue(batch: &mut SendBatch, sessions: &Sessions, key: TaskKey, message: &Message) {
    match key.session {
        None => {
            let header = message.header().encode();
            let parts = [key.version.prefix(), &header, &message.payload];
            batch.push_parts(key.client, &parts);
        }
        Some(session) => {
            if let Some((to, datagram)) = sessions.seal(session, message, Instant::now()) {
                batch.push_parts(to, &[&datagram]);
            }
        }
    }
}

/// True if an answer goes in one datagram.
pub(super) fn is_single(key: TaskKey, answer: &Message) -> bool {
    answer.payload.len() <= max_answer(key)
}

pub(super) fn max_answer(key: TaskKey) -> usize {
    match key.session {
        None => key.version.max_answer(),
        Some(_) => MAX_SEALED_ANSWER,
    }
}

/// An Error in one datagram: Chunks do not tell the kind of their message.
pub(super) fn error(key: TaskKey, code: ErrorCode, text: &str) -> Message {
    let limit = LONGEST_ERROR.min(max_answer(key) - 1);
    let text = &text[..text.floor_char_boundary(limit)];
    Message::error(key.sequence, timestamp_us(), code, text)
}

/// Most bytes of an Error's text, which may quote the client's payload.
const LONGEST_ERROR: usize = 4096;

#[cfg(test)]
mod tests {
    use dcf::Version;

    use super::*;

    #[test]
    fn an_error_fits_a_datagram_however_much_it_quotes() {
        for version in [Version::V5_0, Version::V5_1] {
            let key = TaskKey {
                client: ([127, 0, 0, 1], 1).into(),
                version,
                sequence: 1,
                session: None,
            };
            let error = error(key, ErrorCode::UNKNOWN_MODEL, &"é".repeat(100_000));
            assert!(error.is_single_answer(version) && error.error_body().is_some());
            let sealed = TaskKey {
                session: Some(1),
                ..key
            };
            let error = super::error(sealed, ErrorCode::UNKNOWN_MODEL, &"é".repeat(100_000));
            assert!(is_single(sealed, &error) && error.payload.len() > 1_000);
        }
    }
}
