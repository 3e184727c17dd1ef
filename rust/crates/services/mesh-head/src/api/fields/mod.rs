//! Reading the fields of a JSON request, with errors that name the field.
//!
//! DCF tasks and the OpenAI API share their parameters; both read them here.

mod known;
mod messages;
mod reader;
mod sampling;
mod structured;

pub(crate) use known::{Api, check};
pub(crate) use messages::conversation;
pub(crate) use reader::{Fields, token_ids, whole_number};
pub(crate) use sampling::{sampling, seed};
