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
    pub(crate) fn new(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: param.into(),
            message: message.into(),
            unsupported: false,
        }
    }

    pub(crate) fn unsupported(param: impl Into<String>, remedy: &str) -> Self {
        let param = param.into();
        let message = format!("'{param}' is not supported by this mesh; {remedy}");
        Self {
            param,
            message,
            unsupported: true,
        }
    }

    pub(crate) fn missing(param: &str) -> Self {
        Self::new(param, format!("Missing required parameter: '{param}'"))
    }

    pub(crate) fn too_many(param: &str, count: usize, what: &str, most: usize) -> Self {
        let text = format!("'{param}' has {count} {what}, at most {most} are allowed");
        Self::new(param, text)
    }

    pub(crate) fn wrong_type(param: &str, expected: &str, got: &Value) -> Self {
        let got = match got {
            Value::Null => "null",
            Value::Bool(_) => "a boolean",
            Value::Number(_) => "a number",
            Value::String(_) => "a string",
            Value::Array(_) => "an array",
            Value::Object(_) => "an object",
        };
        let text = format!("Invalid type for '{param}': expected {expected}, got {got}");
        Self::new(param, text)
    }
}
