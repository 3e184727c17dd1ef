//! Fetching the pieces of a model from several sources at once.
//!
//! A model's manifest divides its files into pieces and lists the SHA-256 of each. [`Swarm`] fetches the
//! pieces that a node lacks from the sources that have them. It decides which source to ask for which piece.
//! It has no socket, file or clock: its caller reports pieces of sources, arrivals and the time, and carries
//! out its [`Action`]s.
//!
//! Only a [`Verified`] piece counts, and only a comparison with the manifest's digest creates one. A source
//! that sends a piece with another digest is dropped for good and reported.
//!
//! [`PieceSet`] is a set of pieces, with a compact form for the wire.

#![forbid(unsafe_code)]

mod set;
mod swarm;

pub use set::{BadPieceSet, MOST_PIECES, PieceSet};
pub use swarm::{Action, BadPiece, DropReason, Kind, Progress, Settings, Swarm, Verified, Wanted};
