//! Requests that cannot be answered as they are.

use serde_json::Value;

/// A request that cannot be answered as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Invalid {
    /// The field, as a path: `messages[0].content`.
    pub param: String,
    /// Description of the fault, for the client.
    pub message: String,
    /// True if the field asks for something that this mesh does not support.
    pub unsupported: bool,
}

impl Invalid {
    /// An error for a wrong value.
    pub(crate) fn new(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: param.into(),
            message: message.into(),
            unsupported: false,
        }
    }

    /// A feature that does not exist here.
    pub(crate) fn unsupported(param: impl Into<String>, remedy: &str) -> Self {
        let param = param.into();
        let message = format!("'{param}' is not supported by this mesh; {remedy}");
        Self {
            param,
            message,
            unsupported: true,
        }
    }

    /// A value of another type.
    pub(crate) fn wrong_type(param: &str, expected: &str, got: &Value) -> Self {
        Self::new(
            param,
            format!(
                "Invalid type for '{param}': expected {expected}, got {}",
                kind(got)
            ),
        )
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
