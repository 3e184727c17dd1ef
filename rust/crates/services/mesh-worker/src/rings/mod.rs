//! This worker's parts of rings: one model over several machines.
//!
//! [`Rings`] (`context`, `local`) is the interface for the rest of the worker. For every ring that the head names it runs
//! a `deployment`, a task that carries out what the core decides: it loads parts (`part`: a thread each), opens
//! and serves the `streams` to the other members in every `epoch` and, where this worker has the last stage,
//! starts the `driver`, an engine like that of a whole model. `mesh-pipeline` decides about rows, replays and
//! mirrors. Models are measured in `offer`, paths in `paths`; streams that others open come in at `accept`.

mod accept;
mod carrier;
mod context;
mod deployment;
mod driver;
mod epoch;
mod local;
mod offer;
mod part;
mod paths;
mod progress;
mod ring_model;
mod streams;
#[cfg(test)]
mod tests;

pub(crate) use self::context::Rings;
