//! Requests on their way: each has a task of its own that finds a worker, follows the answer and goes on
//! elsewhere when the worker dies.
//!
//! - [`drive`]: answers that are generated, told to the front end as [`event`]s;
//! - [`embed`]: vectors, in parts on several workers;
//! - [`deaths`] and [`blame`]: which workers died of a request, and whose fault a failure is.

mod blame;
mod deaths;
pub(crate) mod drive;
pub(crate) mod embed;
pub(crate) mod event;
mod outcome;
pub(crate) mod task;
