//! Bodies: read into the tasks of [`crate::flight`], and written from their answers. No I/O.
//!
//! - [`generate`], [`embeddings`] and [`images`]: what bodies of the OpenAI API ask for; [`wire`]: what its answers
//!   consist of;
//! - [`dcf`]: the payload of a DCF Task;
//! - [`text_inputs`]: texts and token ids, as both have them;
//! - [`json`] and [`fields`]: JSON within bounds, its fields by their types, errors that name the field.

pub mod dcf;
pub mod embeddings;
pub(crate) mod fields;
pub(crate) mod generate;
pub mod images;
pub(crate) mod invalid;
pub(crate) mod json;
pub(crate) mod parse;
mod text_inputs;
pub(crate) mod wire;
