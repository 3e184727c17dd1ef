//! DCF: header, versions, message types, codecs and chunks.
//!
//! Every message of the mesh is a DCF message: a fixed header, then the payload. This crate converts between
//! bytes and messages. It has no socket, clock or task; callers supply the bytes and the time.
//!
//! - [`Header`] is the 17 bytes, [`MsgType`] the first of them;
//! - [`Version`] is how a datagram is framed: the header alone (v5.0.0), or a version byte before it (v5.1);
//! - [`Message`] is a header with its payload, read from and written to datagrams without copying the payload in;
//! - [`StreamCodec`] frames messages back to back on a stream (feature `codec`, on by default);
//! - [`chunk`] cuts payloads that no datagram can hold and puts them together again within bounds;
//! - [`ErrorCode`] and [`ErrorBody`] are the contents of an Error message.
//!
//! Input from the network is never trusted: nothing panics, and nothing is allocated from a length field
//! alone.
//!
//! ```
//! use bytes::Bytes;
//! use dcf::{Message, MsgType};
//!
//! let task = Message::new(MsgType::TASK, 7, 1_767_830_401_000_000, "Why is the sky blue?");
//! let datagram: Bytes = task.encode_datagram();
//! assert_eq!(Message::decode_datagram(datagram)?, task);
//! # Ok::<(), dcf::DecodeError>(())
//! ```
#![forbid(unsafe_code)]

/// The numbers of a newtype of `u8` with their names.
macro_rules! named_numbers {
    ($type:ident, $unnamed:literal: $($(#[$doc:meta])* $constant:ident = $value:literal, $name:literal;)*) => {
        impl $type {
            $($(#[$doc])* pub const $constant: Self = Self($value);)*

            /// All that are assigned, in order of their number.
            pub const ASSIGNED: &'static [Self] = &[$(Self::$constant),*];

            /// The name, `None` for a number that is not assigned.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some($name),)*
                    _ => None,
                }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, concat!($unnamed, " {:#04x}"), self.0),
                }
            }
        }

        impl std::fmt::Debug for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Display::fmt(self, f)
            }
        }
    };
}

pub mod chunk;
mod error;
mod header;
mod kind;
mod message;
#[cfg(feature = "codec")]
mod stream;
mod version;

pub use error::{ErrorBody, ErrorCode};
pub use header::{HEADER_LEN, Header};
pub use kind::MsgType;
pub use message::{DecodeError, MAX_DATAGRAM, MAX_DATAGRAM_PAYLOAD, Message, PartialBody};
#[cfg(feature = "codec")]
pub use stream::{DEFAULT_MAX_PAYLOAD, StreamCodec, StreamError};
pub use version::Version;
