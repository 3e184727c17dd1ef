//! Fetching the pieces of a model from several sources at once.
//!
//! A model's manifest cuts its files into pieces and says the SHA-256 of each. [`Swarm`] gets those that a node lacks from
//! whoever has them. It decides what to ask of whom, and does nothing else: no socket, no file, no clock. Whoever runs it tells
//! it what sources have, what arrived and what time it is, and carries out its [`Action`]s.
//!
//! A piece counts only as a [`Verified`] one, which nothing but a comparison with the manifest's digest makes. A source that
//! sends a piece with another digest is dropped for good and reported.
//!
//! [`PieceSet`] is a set of pieces, with a compact form for the wire.

#![forbid(unsafe_code)]

mod set;
mod swarm;

pub use set::{BadPieceSet, MOST_PIECES, PieceSet};
pub use swarm::{Action, BadPiece, DropReason, Kind, Progress, Settings, Swarm, Verified, Wanted};
