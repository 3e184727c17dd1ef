//! A model's template and the engine that runs it.

use std::sync::{Arc, OnceLock};

use minijinja::{Environment, ErrorKind, Value, context};

use super::conversation::{Guarded, Message, RenderRequest};
use super::error::{ChatError, FUEL};
use super::guard::{self, Guard, SENTINELS};
use super::{depth, functions, python};
use crate::checkpoint::Checkpoint;
use crate::tokenizer::{Rendered, Tokenizer};

const MAX_TEMPLATE: usize = 1 << 20;
const MAX_OUTPUT: usize = 64 << 20;
const NAME: &str = "chat";

/// The format that most small models were trained on; for models that bring no template.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + \
     '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// A model's chat template, ready to render.
///
/// Templates are Jinja, run as `transformers` runs them: block trimming on, Python's string and list methods,
/// and the functions `raise_exception` and `strftime_now`. A template is part of the model file and is not
/// trusted to end: it is stopped after a number of steps and bytes of output. A step may still take as much
/// memory as the texts it puts together, so workers render in a process with a memory limit.
///
/// A model's template is parsed when it is first rendered, because parsing computes constants and costs what
/// the source asks for. A source that would overflow the stack is refused before.
///
/// Text of clients never becomes a control token, see [`ChatTemplate::write`].
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    /// Empty until it is parsed; the error instead, if the source does not parse.
    parsed: Arc<OnceLock<Result<Environment<'static>, Arc<str>>>>,
    /// Fixed time in seconds since the Unix epoch; `None` for the system's clock.
    clock: Option<u64>,
    guard: Arc<Guard>,
    source: Arc<str>,
    fallback: bool,
    bos: Arc<str>,
    eos: Arc<str>,
}

/// Gemma's format, for files whose tokenizer has Gemma's turns and that have no template. It has no system
/// role: the system's text goes before the first text of the user.
const GEMMA: &str = "{{ bos_token }}{% set first = namespace(words='') %}{% for message in messages %}\
     {% if message['role'] == 'system' %}{% set first.words = message['content'] | trim + '\n\n' %}{% else %}\
     {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
     {{ '<start_of_turn>' + role + '\n' + first.words + message['content'] | trim + '<end_of_turn>\n' }}\
     {% set first.words = '' %}{% endif %}{% endfor %}\
     {% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}";

/// The default format for a file without a template.
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
    /// The template in `tokenizer.chat_template`; without it, Gemma's format for a tokenizer with
    /// Gemma's turns, else ChatML, see [`ChatTemplate::is_fallback`]. One that does not parse refuses all
    /// conversations when it is rendered.
    pub fn read(checkpoint: &dyn Checkpoint, tokenizer: &Tokenizer) -> Self {
        match checkpoint.string("tokenizer.chat_template") {
            Ok(source) => Self::of(source, tokenizer),
            Err(error) => Self::broken("", &error.to_string()),
        }
    }

    /// The template with this source, or ChatML without one, with the begin and end tokens of `tokenizer`.
    fn of(source: Option<&str>, tokenizer: &Tokenizer) -> Self {
        let text = |id: Option<u32>| match id {
            Some(id) => String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned(),
            None => String::new(),
        };
        let written = source.unwrap_or_else(|| fallback(tokenizer));
        let unparsed = Self::unparsed(written, &text(tokenizer.bos()), &text(tokenizer.eos()));
        let mut template = unparsed.unwrap_or_else(|error| Self::broken("", &error.to_string()));
        template.fallback = source.is_none();
        template.guard = Arc::new(Guard::new(tokenizer.structural(written)));
        template
    }

    /// A template that refuses all conversations, with the reason.
    fn broken(source: &str, problem: &str) -> Self {
        ChatTemplate {
            parsed: Arc::new(OnceLock::from(Err(problem.into()))),
            clock: None,
            guard: Arc::default(),
            source: source.into(),
            fallback: false,
            bos: "".into(),
            eos: "".into(),
        }
    }

    fn unparsed(source: &str, bos: &str, eos: &str) -> Result<Self, ChatError> {
        if source.len() > MAX_TEMPLATE {
            return Err(ChatError::TooLong {
                bytes: source.len(),
                limit: MAX_TEMPLATE,
            });
        }
        Ok(ChatTemplate {
            parsed: Arc::default(),
            clock: None,
            guard: Arc::default(),
            source: source.into(),
            fallback: false,
            bos: bos.into(),
            eos: eos.into(),
        })
    }

    /// The same template with a fixed clock, `seconds` after the Unix epoch.
    #[must_use]
    pub fn at(mut self, seconds: u64) -> Self {
        self.clock = Some(seconds);
        self.parsed = Arc::default();
        self
    }

    /// The parser's error if the template does not parse. Parses it in this process: for a template that is
    /// not trusted, ask the process that renders.
    pub fn problem(&self) -> Option<&str> {
        self.environment().err()
    }

    fn environment(&self) -> Result<&Environment<'static>, &str> {
        let parsed = self
            .parsed
            .get_or_init(|| parse(&self.source, self.clock).map_err(|message| message.into()));
        parsed.as_ref().map_err(|problem| &**problem)
    }

    /// Names of control tokens that the text of clients must not become, beside those of the model's
    /// tokenizer.
    #[must_use]
    pub fn guarding<'a>(mut self, names: impl IntoIterator<Item = &'a str>) -> Self {
        self.guard = Arc::new(Guard::new(names));
        self
    }

    /// A template from its source and the texts of the model's begin and end tokens.
    ///
    /// # Errors
    /// If the template does not parse.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, ChatError> {
        let template = Self::unparsed(source, bos, eos)?;
        match template.problem() {
            None => Ok(template),
            Some(problem) => Err(ChatError::Invalid {
                message: problem.to_owned(),
            }),
        }
    }

    /// True if the model file has no template, so that a default one is used, which may not fit the model.
    pub fn is_fallback(&self) -> bool {
        self.fallback
    }

    /// Name of the format: that of the default one, or "the model's own".
    pub fn name(&self) -> &'static str {
        match &*self.source {
            CHATML => "ChatML",
            GEMMA => "Gemma",
            _ => "the model's own",
        }
    }

    /// Source text of the template.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of the token that begins a sequence, as the template sees it.
    pub fn bos(&self) -> &str {
        &self.bos
    }

    /// The text of the token that ends a sequence.
    pub fn eos(&self) -> &str {
        &self.eos
    }

    /// Renders a conversation to a prompt.
    ///
    /// Names of control tokens in what clients wrote are told apart from those that the template writes:
    /// encode the prompt with [`Tokenizer::encode_prompt`].
    ///
    /// # Errors
    /// If the template refuses the conversation (roles it does not know, turns out of order), fails or does
    /// not end.
    pub fn write(&self, request: &RenderRequest) -> Result<Rendered, ChatError> {
        let guarded = self.guarded(request.clone())?;
        let text = self.render_raw(&guarded.request)?;
        self.unguarded(text, &guarded)
    }

    /// Like [`write`](Self::write), but returns the text only.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, ChatError> {
        let request = RenderRequest {
            messages: messages.to_vec(),
            add_generation_prompt,
            ..RenderRequest::default()
        };
        Ok(self.write(&request)?.text)
    }

    /// The first step of [`write`](Self::write): makes a conversation ready for the template.
    ///
    /// # Errors
    /// If it holds so many private-use characters that none is left to mark it with, and if there is no last
    /// message to continue.
    pub fn guarded(&self, mut request: RenderRequest) -> Result<Guarded, ChatError> {
        let mark = self.guard.mark(&mut request)?;
        let sentinel = match request.continue_final_message {
            true => Some(mark_end(&mut request)?),
            false => None,
        };
        Ok(Guarded {
            request,
            mark,
            sentinel,
        })
    }

    /// The last step of [`write`](Self::write), for what the template made of `guarded`.
    ///
    /// # Errors
    /// If the last message is to be continued and the template leaves its end out.
    pub fn unguarded(&self, mut text: String, guarded: &Guarded) -> Result<Rendered, ChatError> {
        if let Some(sentinel) = guarded.sentinel {
            text = up_to_end(&text, sentinel, &guarded.request)?;
        }
        Ok(guard::unmark(text, guarded.mark))
    }

    /// The middle step of [`write`](Self::write): the template's output for a conversation, including marks.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn render_raw(&self, request: &RenderRequest) -> Result<String, ChatError> {
        let environment = self.environment().map_err(|problem| ChatError::Invalid {
            message: problem.to_owned(),
        })?;
        let template = environment.get_template(NAME).map_err(render_error)?;
        let mut output = BoundedOutput::default();
        let fixed = context! {
            messages => Value::from_serialize(&request.messages),
            add_generation_prompt => request.add_generation_prompt && !request.continue_final_message,
            bos_token => &*self.bos,
            eos_token => &*self.eos,
        };
        // Values that are not given are `none`, which differs from undefined.
        let absent = context! { tools => (), documents => () };
        let context = context! { ..fixed, ..Value::from_serialize(&request.kwargs), ..absent };
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

/// Parses a template, on a stack of its own that is deep enough for all that [`depth`] lets pass.
fn parse(source: &str, clock: Option<u64>) -> Result<Environment<'static>, String> {
    let source = python::prepared(source);
    depth::check(&source)?;
    let work = move || {
        let mut environment = environment(clock);
        let added = environment.add_template_owned(NAME, source);
        added
            .map(|()| environment)
            .map_err(|error| error.to_string())
    };
    let parsing = std::thread::Builder::new()
        .name("chat-template".into())
        .stack_size(depth::STACK)
        .spawn(work);
    let parsed = parsing.map_err(|error| format!("it cannot be parsed now: {error}"))?;
    let failed = |_| Err("the template engine failed to parse it".to_owned());
    parsed.join().unwrap_or_else(failed)
}

/// The template engine as `transformers` sets Jinja up.
fn environment(clock: Option<u64>) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(FUEL));
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(python::method);
    environment.set_formatter(|out, _, value| match value.is_undefined() {
        true => Ok(()),
        false => out.write_str(&python::text(value)).map_err(Into::into),
    });
    functions::install(&mut environment);
    if let Some(seconds) = clock {
        environment.add_function("strftime_now", move |format: &str| {
            functions::strftime(format, seconds)
        });
    }
    environment
}

/// Puts a sentinel at the end of the last message, by which [`up_to_end`] finds it. A blank follows it, as in
/// `transformers`: a template that trims messages takes it away.
fn mark_end(request: &mut RenderRequest) -> Result<char, ChatError> {
    let sentinel = guard::unused(request, SENTINELS)?;
    let last = request.messages.last_mut().ok_or(ChatError::NotContinued {
        reason: "there are no messages",
    })?;
    last.content.extend([sentinel, ' ']);
    Ok(sentinel)
}

/// The template's output up to the end of the last message, without the end of its turn.
fn up_to_end(text: &str, sentinel: char, request: &RenderRequest) -> Result<String, ChatError> {
    let (before, behind) = text.rsplit_once(sentinel).ok_or(ChatError::NotContinued {
        reason: "the model's chat template leaves it out, or its end",
    })?;
    let content = request.messages.last().map_or("", |last| &last.content);
    let blank = content.chars().all(|c| c == sentinel || c.is_whitespace());
    // A template that trims the blank would have trimmed the message, as `transformers` does then. Before a
    // message that is blank stand the template's own line breaks, which stay.
    let trimmed = !behind.starts_with(' ') && !blank;
    let before = if trimmed { before.trim_end() } else { before };
    // A template may write a message more than once.
    let mut out = before.replace(&format!("{sentinel} "), "");
    out.retain(|c| c != sentinel);
    Ok(out)
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

/// Collects the output of a template, up to a limit.
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
