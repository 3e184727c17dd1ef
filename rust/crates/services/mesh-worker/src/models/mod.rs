//! The models of this worker that are not files at hand: finds them in the store, gets missing pieces from
//! other workers or from the hub, and gives others the pieces that are here. The core's catalogue decides;
//! this carries out.
//!
//! Names that cannot mean anything are refused at the start (`names`). [`Models::obtain`] (`search`, `hub`)
//! finds a model by a name and returns its [`ReplicaFiles`]; [`Models::fetch`] gets pieces of it (`download`, a
//! task for each model that is fetched; `source`, one for each worker that sends some; `writer`, for the files).
//! `serve` is the other side, `library` the rest of the interface. `context` is what all of these share.

mod context;
mod download;
mod files;
mod hub;
mod library;
mod names;
mod search;
mod serve;
mod source;
mod writer;

pub(crate) use self::context::Models;
pub(crate) use self::files::ReplicaFiles;
pub(crate) use self::names::{is_at_hand, path_of};
pub(crate) use self::serve::{is_ours, serve};
pub(crate) use mesh_worker_core::names::may_be_fetched;
