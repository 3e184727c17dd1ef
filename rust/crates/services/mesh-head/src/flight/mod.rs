//! Requests on their way: each has a task of its own that finds a worker, follows the answer and goes on
//! elsewhere when the worker dies.
//!
//! - [`attempts`]: the one loop of attempts, for requests of every kind;
//! - [`deaths`] and [`blame`]: which workers died of a request, and whose fault a failure is;
//! - [`codec`]: the interface of a kind of work to that loop;
//! - [`generate`]: texts, told to the front end as [`event`]s;
//! - [`embed`]: vectors, in parts on several workers;
//! - [`image`]: images, after each step of which another worker can go on.
//!
//! A further kind of work needs a codec and nothing else here: the message that puts the request to a
//! worker, the worker's messages read into progress or the end, and what has come so far, so that the next
//! request goes on after it. Placing, deadlines, deaths, blame and reruns are the loop's.

mod attempts;
mod blame;
mod codec;
mod deaths;
pub(crate) mod embed;
pub(crate) mod event;
pub(crate) mod generate;
pub(crate) mod image;
mod outcome;
pub(crate) mod task;
