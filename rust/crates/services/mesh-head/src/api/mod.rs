//! Bodies: read into the tasks of [`crate::flight`], and written from their answers. No I/O.
//!
//! - [`generate`], [`embeddings`], [`images`] and [`image_edits`]: what bodies of the OpenAI API ask for; [`wire`]: what its answers
//!   consist of;
//! - [`dcf`]: the payload of a DCF Task;
//! - [`preview`]: images on their way; `form`: forms with files;
//! - [`text_inputs`]: texts and token ids, as both have them;
//! - [`json`] and [`fields`]: JSON within bounds, its fields by their types, errors that name the field.

pub mod dcf;
pub mod embeddings;
pub(crate) mod fields;
mod form;
pub(crate) mod generate;
pub mod image_edits;
pub mod images;
pub(crate) mod invalid;
pub(crate) mod json;
pub(crate) mod parse;
pub(crate) mod preview;
mod text_inputs;
pub(crate) mod wire;
