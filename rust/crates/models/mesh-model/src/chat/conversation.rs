//! Conversations, as clients send them and as templates get them.

use serde::{Deserialize, Serialize};

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// "system", "user", "assistant", or another role of the template.
    pub role: String,
    /// Text of the message.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message {
            role: role.into(),
            content: content.into(),
        }
    }
}

/// A conversation with options for rendering.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RenderRequest {
    /// The messages, the oldest first.
    pub messages: Vec<Message>,
    /// End where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// End inside the last message, so that the answer goes on with it. Excludes
    /// [`Self::add_generation_prompt`].
    pub continue_final_message: bool,
    /// Variables of the template beyond the conversation, such as `enable_thinking`.
    pub kwargs: serde_json::Map<String, serde_json::Value>,
}

impl Default for RenderRequest {
    fn default() -> Self {
        RenderRequest {
            messages: Vec::new(),
            add_generation_prompt: true,
            continue_final_message: false,
            kwargs: serde_json::Map::new(),
        }
    }
}

/// A conversation that was made ready for a template, and what [`crate::ChatTemplate::unguarded`] needs to
/// know behind it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Guarded {
    /// The request with broken names of control tokens.
    pub request: RenderRequest,
    /// Mark that breaks the names.
    pub mark: Option<char>,
    /// A character that marks the end of the last message, if it is to be continued; the rest of the
    /// conversation does not contain it.
    pub sentinel: Option<char>,
}
