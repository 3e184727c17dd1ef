//! Chat templates: a conversation to the prompt text that a model was trained on.

mod functions;

use std::sync::Arc;

use minijinja::{Environment, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};

use crate::gguf::{Gguf, GgufError};
use crate::tokenizer::Tokenizer;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// "system", "user", "assistant", or what else the template knows.
    pub role: String,
    /// The text.
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

/// Why a conversation could not be rendered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The file's metadata is unusable.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The template is longer than any real one.
    #[error(
        "the chat template has {bytes} bytes, over the limit of {limit}: the model file is damaged"
    )]
    TooLong {
        /// Its length.
        bytes: usize,
        /// The most that is accepted.
        limit: usize,
    },
    /// The template does not parse.
    #[error("the model's chat template is invalid: {message}")]
    Invalid {
        /// Where and why.
        message: String,
    },
    /// The template itself refused the conversation.
    #[error("the model's chat template refuses this conversation: {message}")]
    Refused {
        /// The template's own words.
        message: String,
    },
    /// The template ran for too long.
    #[error(
        "the model's chat template did not end within {FUEL} steps: it is malformed or the conversation is too long"
    )]
    OutOfFuel,
    /// The template wrote too much.
    #[error("the conversation is longer than {limit} bytes as a prompt")]
    OutputTooLong {
        /// The most that is accepted.
        limit: usize,
    },
    /// Anything else that went wrong while it ran.
    #[error("the model's chat template failed: {message}")]
    Failed {
        /// Where and why.
        message: String,
    },
}

/// What a template may do before it is stopped: instructions of the template engine. A message takes a few dozen.
const FUEL: u64 = 2_000_000;
const MAX_TEMPLATE: usize = 1 << 20;
const MAX_OUTPUT: usize = 64 << 20;
const NAME: &str = "chat";

/// The format that most small models were trained on; for models that bring no template.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + \
     '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// A model's chat template, ready to render.
///
/// Templates are Jinja, run as `transformers` runs them: block trimming on, Python's string and list methods, and the
/// functions `raise_exception` and `strftime_now`. A template is part of the model file and is not trusted to end: it is
/// stopped after a number of steps and bytes of output. A step may still take as much memory as the texts it puts together: who
/// runs templates of strangers does so in a process that the system limits, as workers do.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    source: Arc<str>,
    fallback: bool,
    bos: Arc<str>,
    eos: Arc<str>,
}

/// Gemma's turns, for files whose tokenizer has them and that bring no template. There is no role of the system: what it says
/// goes before what the user says first.
const GEMMA: &str = "{{ bos_token }}{% set first = namespace(words='') %}{% for message in messages %}\
     {% if message['role'] == 'system' %}{% set first.words = message['content'] | trim + '\n\n' %}{% else %}\
     {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
     {{ '<start_of_turn>' + role + '\n' + first.words + message['content'] | trim + '<end_of_turn>\n' }}\
     {% set first.words = '' %}{% endif %}{% endfor %}\
     {% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}";

/// The format to take where a file brings none.
fn fallback(tokenizer: &Tokenizer) -> &'static str {
    let turns = ["<start_of_turn>", "<end_of_turn>"];
    let has_turns = turns.iter().all(|name| {
        tokenizer
            .token_id(name)
            .is_some_and(|id| tokenizer.is_special(id))
    });
    if has_turns { GEMMA } else { CHATML }
}

impl ChatTemplate {
    /// The template in `tokenizer.chat_template`; if there is none, Gemma's format for a tokenizer with Gemma's turns, else
    /// ChatML, see [`ChatTemplate::is_fallback`].
    ///
    /// # Errors
    /// If the template does not parse.
    pub fn from_gguf(gguf: &Gguf, tokenizer: &Tokenizer) -> Result<Self, ChatError> {
        Self::of(gguf.string("tokenizer.chat_template")?, tokenizer)
    }

    /// The template with this source, ChatML if there is none, with the begin and end tokens of `tokenizer`.
    ///
    /// # Errors
    /// If the template does not parse.
    pub(crate) fn of(source: Option<&str>, tokenizer: &Tokenizer) -> Result<Self, ChatError> {
        let text = |id: Option<u32>| match id {
            Some(id) => String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned(),
            None => String::new(),
        };
        let mut template = Self::new(
            source.unwrap_or_else(|| fallback(tokenizer)),
            &text(tokenizer.bos()),
            &text(tokenizer.eos()),
        )?;
        template.fallback = source.is_none();
        Ok(template)
    }

    /// A template from its source and the texts of the model's begin and end tokens.
    ///
    /// # Errors
    /// If the template does not parse.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, ChatError> {
        if source.len() > MAX_TEMPLATE {
            return Err(ChatError::TooLong {
                bytes: source.len(),
                limit: MAX_TEMPLATE,
            });
        }
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        functions::install(&mut environment);
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|error| ChatError::Invalid {
                message: error.to_string(),
            })?;
        Ok(ChatTemplate {
            environment: Arc::new(environment),
            source: source.into(),
            fallback: false,
            bos: bos.into(),
            eos: eos.into(),
        })
    }

    /// Whether the model file brings no template, so that one is used that the model may never have seen.
    pub fn is_fallback(&self) -> bool {
        self.fallback
    }

    /// The template's source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of the token that begins a sequence, as the template sees it.
    pub fn bos(&self) -> &str {
        &self.bos
    }

    /// The text of the token that ends one.
    pub fn eos(&self) -> &str {
        &self.eos
    }

    /// Renders `messages` to a prompt. With `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// The template writes the begin token itself where the model wants one: encode the prompt with `parse_special` and
    /// without `add_special`, or the begin token comes twice.
    ///
    /// # Errors
    /// If the template refuses the conversation (roles it does not know, turns out of order), fails or does not end.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, ChatError> {
        let template = self.environment.get_template(NAME).map_err(render_error)?;
        let mut output = BoundedOutput::default();
        let context = context! {
            messages => Value::from_serialize(messages),
            add_generation_prompt,
            bos_token => &*self.bos,
            eos_token => &*self.eos,
        };
        let rendered = template.render_captured_to(context, &mut output);
        if output.overflowed {
            return Err(ChatError::OutputTooLong { limit: MAX_OUTPUT });
        }
        rendered.map_err(render_error)?;
        String::from_utf8(output.bytes).map_err(|error| ChatError::Failed {
            message: error.to_string(),
        })
    }
}

fn render_error(error: minijinja::Error) -> ChatError {
    if error.kind() == ErrorKind::OutOfFuel {
        return ChatError::OutOfFuel;
    }
    if let Some(message) = functions::raised(&error) {
        return ChatError::Refused { message };
    }
    ChatError::Failed {
        message: error.to_string(),
    }
}

/// Takes what a template writes, up to a limit.
#[derive(Default)]
struct BoundedOutput {
    bytes: Vec<u8>,
    overflowed: bool,
}

impl std::io::Write for BoundedOutput {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + data.len() > MAX_OUTPUT {
            self.overflowed = true;
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
