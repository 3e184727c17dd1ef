//! Chat templates: a conversation to the prompt text that a model was trained on.

mod conversation;
mod depth;
mod error;
mod functions;
mod guard;
mod python;
mod template;

pub use crate::tokenizer::Rendered;
pub use conversation::{Guarded, Message, RenderRequest};
pub use error::ChatError;
pub use template::ChatTemplate;
