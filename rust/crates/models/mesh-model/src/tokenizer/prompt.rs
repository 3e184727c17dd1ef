//! Prompts that a chat template wrote.

/// A rendered conversation: the prompt text for the model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rendered {
    /// Text of the prompt.
    pub text: String,
    /// Byte positions in it, ascending, that no special token spans: there a client wrote the name of one.
    pub barriers: Vec<usize>,
}
