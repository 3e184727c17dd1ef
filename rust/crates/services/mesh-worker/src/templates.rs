//! Chat templates, run in processes of their own.
//!
//! A template is a program that comes with a model. Its steps and its output are counted where it runs
//! ([`mesh_model::chat`]), but a single step takes as much memory and time as the texts that it works on are
//! long, and a loop can double them at every turn. The same holds for parsing it. The system can limit the
//! memory of a process: [`serve`] is that process, and [`Templates`] asks it, waits for a limited time, and
//! starts another where one was lost.
//!
//! Jobs and answers are frames: a length of 32 bits, big-endian, and so many bytes. A job is JSON; an
//! answer's first byte says if the rest is the prompt, the reason for a refusal, or a fault for which the
//! template never works.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::lock::lock;
use crate::preparations;
use mesh_model::chat::{ChatError, ChatTemplate, RenderRequest, Rendered};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::alarm;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// The subcommand of `mesh-worker` that is [`serve`].
pub const COMMAND: &str = "render-templates";

/// Memory that a template may take, in MiB. The longest prompt that is accepted is held a few times over
/// while it grows.
const MEMORY_MIB: u64 = 512;
/// Time limit for rendering one conversation. A thousand messages take milliseconds.
const TIME: Duration = Duration::from_secs(5);
/// Templates whose processes are kept.
const KEPT: usize = 8;
/// No answer is longer: a prompt has its own limit below that.
const LONGEST_ANSWER: u32 = 128 << 20;

const PROMPT: u8 = 0;
const REFUSED: u8 = 1;
const INVALID: u8 = 2;

/// Reasons for which a conversation becomes no prompt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// The template's error, run in this process.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// The same from another process.
    #[error("{0}")]
    Refused(String),
    /// The template does not parse, so that no conversation becomes a prompt.
    #[error("{0}")]
    Invalid(String),
    /// It took longer than the limit.
    #[error(
        "the model's chat template was stopped after {} s: it is malformed or the conversation is too long",
        TIME.as_secs()
    )]
    TooSlow,
    /// Its process ended before it answered.
    #[error(
        "the model's chat template was stopped: it wanted more than {MEMORY_MIB} MiB of memory, or failed badly; it is malformed or the \
         conversation is too long"
    )]
    TooLarge,
    /// The process cannot be had.
    #[error("no process for chat templates: {0}")]
    Process(#[from] io::Error),
}

impl TemplateError {
    /// Returns true if neither the conversation nor the template is at fault.
    pub fn is_internal(&self) -> bool {
        matches!(self, TemplateError::Process(_))
    }
}

/// Renders conversations to prompts, each model's in a process of its own.
#[derive(Debug, Default)]
pub struct Templates {
    /// `None` is for this process.
    program: Option<PathBuf>,
    /// The last ones used, the latest first.
    renderers: Mutex<VecDeque<Arc<Renderer>>>,
}

/// Renders one template, one conversation at a time.
#[derive(Debug)]
struct Renderer {
    source: String,
    /// True if it is for long conversations, which hold up only each other.
    long: bool,
    process: tokio::sync::Mutex<Option<Process>>,
}

#[derive(Serialize, Deserialize)]
struct Job {
    source: String,
    bos: String,
    eos: String,
    request: RenderRequest,
}

impl Templates {
    /// Renders in this process, where only steps and output are limited: for templates that are trusted.
    pub fn here() -> Self {
        Templates::default()
    }

    /// Renders in processes of `program`, a `mesh-worker`.
    pub fn apart(program: PathBuf) -> Self {
        Templates {
            program: Some(program),
            ..Templates::default()
        }
    }

    /// A conversation as the prompt that the model knows.
    ///
    /// # Errors
    /// When the template refuses or fails, or takes more than it may.
    pub async fn render(
        &self,
        template: &ChatTemplate,
        request: RenderRequest,
    ) -> Result<Rendered, TemplateError> {
        let Some(program) = &self.program else {
            let template = template.clone();
            let rendered = tokio::task::spawn_blocking(move || template.write(&request));
            let rendered = rendered.await.map_err(io::Error::other)?;
            return rendered.map_err(|error| match error {
                ChatError::Invalid { .. } => TemplateError::Invalid(error.to_string()),
                error => error.into(),
            });
        };
        let guarded = template.guarded(request)?;
        let job = serde_json::to_vec(&Job {
            source: template.source().to_owned(),
            bos: template.bos().to_owned(),
            eos: template.eos().to_owned(),
            request: guarded.request.clone(),
        });
        let job = job.map_err(io::Error::other)?;
        let text = self.render_apart(program, template, &job).await?;
        Ok(template.unguarded(text, &guarded)?)
    }

    async fn render_apart(
        &self,
        program: &PathBuf,
        template: &ChatTemplate,
        job: &[u8],
    ) -> Result<String, TemplateError> {
        let renderer = self.renderer(template.source(), preparations::is_long(job.len()));
        let mut kept = renderer.process.lock().await;
        // An idle process may have been killed from outside, which is not this conversation's fault.
        if let Some(process) = kept.take() {
            match process.ask(job, &mut kept).await {
                Err(TemplateError::TooLarge) => {}
                answer => return answer,
            }
        }
        Process::start(program)?.ask(job, &mut kept).await
    }

    fn renderer(&self, source: &str, long: bool) -> Arc<Renderer> {
        let mut renderers = lock(&self.renderers);
        let same = |renderer: &Arc<Renderer>| renderer.source == source && renderer.long == long;
        let found = renderers.iter().position(same);
        let renderer = match found.and_then(|index| renderers.remove(index)) {
            Some(renderer) => renderer,
            None => Arc::new(Renderer {
                source: source.to_owned(),
                long,
                process: tokio::sync::Mutex::default(),
            }),
        };
        renderers.push_front(renderer.clone());
        renderers.truncate(KEPT);
        renderer
    }
}

/// A running [`serve`]; dropped, it is killed.
#[derive(Debug)]
struct Process {
    _child: Child,
    jobs: ChildStdin,
    answers: ChildStdout,
}

impl Process {
    fn start(program: &PathBuf) -> io::Result<Self> {
        let mut command = Command::new(program);
        command
            .arg(COMMAND)
            // The worker's environment is not passed to this process.
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Keys at a terminal signal the worker, which ends this process itself.
            .process_group(0)
            .kill_on_drop(true);
        if let Some(libraries) = std::env::var_os("LD_LIBRARY_PATH") {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        let mut child = command.spawn().map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", program.display()))
        })?;
        let missing = || io::Error::other("it has no pipes");
        Ok(Process {
            jobs: child.stdin.take().ok_or_else(missing)?,
            answers: child.stdout.take().ok_or_else(missing)?,
            _child: child,
        })
    }

    /// The answer to a job; the process is kept for the next one. [`TemplateError::TooLarge`] if it ends.
    async fn ask(
        mut self,
        job: &[u8],
        kept: &mut Option<Process>,
    ) -> Result<String, TemplateError> {
        let exchanged = tokio::time::timeout(TIME, self.exchange(job)).await;
        match exchanged.map_err(|_| TemplateError::TooSlow)? {
            Ok(answer) => {
                *kept = Some(self);
                answer
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(error.into()),
            Err(_) => Err(TemplateError::TooLarge),
        }
    }

    async fn exchange(&mut self, job: &[u8]) -> io::Result<Result<String, TemplateError>> {
        let len = u32::try_from(job.len()).map_err(|_| io::ErrorKind::InvalidData)?;
        self.jobs.write_u32(len).await?;
        self.jobs.write_all(job).await?;
        self.jobs.flush().await?;
        let len = self.answers.read_u32().await?;
        if len == 0 || len > LONGEST_ANSWER {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let kind = self.answers.read_u8().await?;
        let mut text = Vec::new();
        let wanted = u64::from(len - 1);
        let mut answers = (&mut self.answers).take(wanted);
        answers.read_to_end(&mut text).await?;
        if text.len() as u64 != wanted {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let text = String::from_utf8(text).map_err(|_| io::ErrorKind::InvalidData)?;
        Ok(match kind {
            PROMPT => Ok(text),
            INVALID => Err(TemplateError::Invalid(text)),
            _ => Err(TemplateError::Refused(text)),
        })
    }
}

/// Renders conversations until `jobs` ends, with limited memory: it is meant to be a process's only work.
///
/// # Errors
/// When the limits cannot be set, and when pipes break.
pub fn serve(mut jobs: impl Read, mut answers: impl Write) -> io::Result<()> {
    let bytes = MEMORY_MIB << 20;
    setrlimit(Resource::RLIMIT_DATA, bytes, bytes)?;
    // For systems that do not tell mapped memory apart; programs and libraries count here.
    setrlimit(Resource::RLIMIT_AS, 4 * bytes, 4 * bytes)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    let mut last: Option<(Job, ChatTemplate)> = None;
    loop {
        let mut len = [0; 4];
        match jobs.read_exact(&mut len) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        }
        let mut job = Vec::new();
        let wanted = u64::from(u32::from_be_bytes(len));
        jobs.by_ref().take(wanted).read_to_end(&mut job)?;
        // In case the worker dies without ending it.
        alarm::set(2 * TIME.as_secs() as u32);
        let (kind, text) = match render_job(&job, &mut last) {
            Ok(text) => (PROMPT, text),
            Err((kind, reason)) => (kind, reason),
        };
        alarm::cancel();
        let len = u32::try_from(text.len() + 1).map_err(|_| io::ErrorKind::InvalidData)?;
        answers.write_all(&len.to_be_bytes())?;
        answers.write_all(&[kind])?;
        answers.write_all(text.as_bytes())?;
        answers.flush()?;
    }
}

/// The prompt, or the reason why it cannot be rendered. The last job's template is kept.
fn render_job(job: &[u8], last: &mut Option<(Job, ChatTemplate)>) -> Result<String, (u8, String)> {
    // A job that was read once may not be readable inside a larger value: the depth of nesting is limited.
    let job: Job = serde_json::from_slice(job).map_err(|error| {
        let reason = format!("the chat template cannot be given this conversation: {error}; is chat_template_kwargs nested too deep?");
        (REFUSED, reason)
    })?;
    let fits = |known: &&(Job, ChatTemplate)| {
        (&known.0.source, &known.0.bos, &known.0.eos) == (&job.source, &job.bos, &job.eos)
    };
    let template = match last.as_ref().filter(fits) {
        Some((_, template)) => Ok(template.clone()),
        None => ChatTemplate::new(&job.source, &job.bos, &job.eos),
    };
    let rendered = template.and_then(|template| {
        let text = template.render_raw(&job.request);
        *last = Some((job, template));
        text
    });
    rendered.map_err(|error| match error {
        ChatError::Invalid { .. } | ChatError::TooLong { .. } => (INVALID, error.to_string()),
        error => (REFUSED, error.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A job as it is written for another process, with a variable that is a list in lists.
    fn job(depth: usize) -> Vec<u8> {
        let nested = format!("{{\"x\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
        let job = Job {
            source: "{{ x | length }}".into(),
            bos: String::new(),
            eos: String::new(),
            request: RenderRequest {
                kwargs: serde_json::from_str(&nested).unwrap(),
                ..RenderRequest::default()
            },
        };
        serde_json::to_vec(&job).unwrap()
    }

    #[test]
    fn a_job_that_is_nested_too_deep_is_refused_and_the_next_one_is_not() {
        let mut last = None;
        // As deep as a message from the head can be.
        for depth in [125, 126] {
            let (_, refused) = render_job(&job(depth), &mut last).unwrap_err();
            assert!(refused.contains("recursion limit"), "{depth}: {refused}");
        }
        for depth in [2, 124] {
            assert_eq!(render_job(&job(depth), &mut last).unwrap(), "1");
        }
        assert!(render_job(b"{", &mut last).is_err());
    }
}
