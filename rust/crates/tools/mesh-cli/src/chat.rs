//! `hydramesh chat`: a conversation, streamed over HTTP.

use std::io::{self, BufRead, IsTerminal};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use mesh_api::{ChatCompletionRequest, GenerationOptions, Message};
use mesh_client::http::{Heard, HttpClient};
use rustyline::error::ReadlineError;

use crate::args::{ChatArgs, HeadArgs};
use crate::ask::{http_client, name_the_model, sampling};
use crate::failure::Failure;
use crate::output::{Stats, Terminal, Timer, WaitLine, print_now};

const HELP: &str = "\
/help          this list
/reset         forget the conversation, keep the instructions
/system TEXT   new instructions, and a new conversation; without TEXT: none
/stats         show times and speed after each answer, or stop doing so
/quit          end (Ctrl-D, too); Ctrl-C stops an answer";

pub(crate) async fn run(
    head: &HeadArgs,
    args: ChatArgs,
    terminal: Terminal,
) -> Result<(), Failure> {
    let client = http_client(head)?;
    let mut options = sampling(&args.sampling);
    name_the_model(&client, &mut options).await?;
    let person = io::stdin().is_terminal() && io::stdout().is_terminal();
    if person {
        let model = options.model.as_deref().unwrap_or_default();
        println!(
            "{} at {}. /help lists the commands, Ctrl-D ends.",
            terminal.bold(model),
            client.base()
        );
    }
    let mut talk = Talk {
        conversation: Conversation::new(args.system),
        client,
        options,
        stats: args.stats,
        terminal,
    };
    let lines = Lines::new(person, terminal)?;
    loop {
        let read = tokio::select! {
            line = lines.next() => line?,
            // With a terminal, the line editor sees Ctrl-C itself.
            _ = tokio::signal::ctrl_c() => return Err(Failure::interrupted()),
        };
        let Some(line) = read else { break };
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        let command = line.strip_prefix('/');
        match command.map(|command| command.split_once(' ').unwrap_or((command, ""))) {
            Some(("quit" | "exit" | "q", _)) => break,
            Some((name, rest)) => talk.command(name, rest),
            None => talk.turn(line, person).await?,
        }
    }
    Ok(())
}

struct Talk {
    conversation: Conversation,
    client: HttpClient,
    options: GenerationOptions,
    stats: bool,
    terminal: Terminal,
}

impl Talk {
    fn command(&mut self, name: &str, rest: &str) {
        match name {
            "help" | "?" => println!("{HELP}"),
            "reset" => {
                self.conversation.reset();
                println!("{}", self.terminal.dim("a new conversation"));
            }
            "system" => {
                let text = rest.trim();
                self.conversation = Conversation::new((!text.is_empty()).then(|| text.to_owned()));
                println!("{}", self.terminal.dim("a new conversation"));
            }
            "stats" => {
                self.stats = !self.stats;
                let state = if self.stats { "shown" } else { "not shown" };
                println!("{}", self.terminal.dim(&format!("times are {state}")));
            }
            _ => println!("there is no /{name}; /help lists what there is"),
        }
    }

    /// One question and its answer. A person sees the error and goes on; a script ends.
    async fn turn(&mut self, line: &str, person: bool) -> Result<(), Failure> {
        self.conversation.ask(line);
        let result = self.answer().await;
        print_now("\n");
        match result {
            Ok(stats) if self.stats => eprintln!("{}", self.terminal.dim(&stats.line())),
            Ok(_) => {}
            Err(failure) => {
                self.conversation.take_back();
                if !person {
                    return Err(failure);
                }
                eprintln!("{failure}");
            }
        }
        Ok(())
    }

    async fn answer(&mut self) -> Result<Stats, Failure> {
        let request = ChatCompletionRequest {
            messages: self.conversation.messages(),
            options: self.options.clone(),
            ..ChatCompletionRequest::default()
        };
        let mut timer = Timer::since(Instant::now());
        let mut stream = self.client.stream(request).await?;
        let mut text = String::new();
        let mut line = WaitLine::new();
        loop {
            let heard = tokio::select! {
                heard = stream.next_or_wait() => heard?,
                // Dropping the stream closes the request, and the worker stops.
                _ = tokio::signal::ctrl_c() => break,
            };
            let piece = match heard {
                Some(Heard::Piece(piece)) => piece,
                Some(Heard::Waits(what)) => {
                    line.show(&what);
                    continue;
                }
                None => break,
            };
            timer.note(&piece);
            if !piece.text.is_empty() {
                line.clear();
                text += &piece.text;
                print_now(&piece.text);
            }
        }
        self.conversation.answered(text);
        Ok(timer.stats())
    }
}

/// The messages so far.
#[derive(Debug, Default, PartialEq, Eq)]
struct Conversation {
    system: Option<String>,
    turns: Vec<(&'static str, String)>,
}

impl Conversation {
    fn new(system: Option<String>) -> Self {
        Self {
            system,
            turns: Vec::new(),
        }
    }

    fn reset(&mut self) {
        self.turns.clear();
    }

    fn ask(&mut self, text: &str) {
        self.turns.push(("user", text.to_owned()));
    }

    fn answered(&mut self, text: String) {
        self.turns.push(("assistant", text));
    }

    /// Forgets a question that got no answer.
    fn take_back(&mut self) {
        if self.turns.last().is_some_and(|(role, _)| *role == "user") {
            self.turns.pop();
        }
    }

    fn messages(&self) -> Vec<Message> {
        let system = self.system.iter().map(|text| ("system", text));
        let turns = self.turns.iter().map(|(role, text)| (*role, text));
        let messages = system.chain(turns);
        messages
            .map(|(role, text)| Message::new(role, text))
            .collect()
    }
}

/// Lines from a line editor at a terminal, from a pipe otherwise, read off the async threads.
struct Lines {
    editor: Option<Arc<Mutex<rustyline::DefaultEditor>>>,
    prompt: String,
}

impl Lines {
    fn new(person: bool, terminal: Terminal) -> Result<Self, Failure> {
        let editor = person.then(rustyline::DefaultEditor::new).transpose();
        let editor = editor.map_err(|error| Failure::failed(format!("the terminal: {error}")))?;
        Ok(Self {
            editor: editor.map(|editor| Arc::new(Mutex::new(editor))),
            prompt: format!("{} ", terminal.cyan("you>")),
        })
    }

    /// The next line, `None` at the end.
    async fn next(&self) -> Result<Option<String>, Failure> {
        let editor = self.editor.clone();
        let prompt = self.prompt.clone();
        let read = tokio::task::spawn_blocking(move || match editor {
            Some(editor) => edited_line(&editor, &prompt),
            None => piped_line(),
        });
        read.await
            .map_err(|error| Failure::failed(format!("reading the keyboard: {error}")))?
            .map_err(|error| Failure::failed(format!("standard input: {error}")))
    }
}

fn edited_line(
    editor: &Mutex<rustyline::DefaultEditor>,
    prompt: &str,
) -> Result<Option<String>, ReadlineError> {
    let mut editor = editor.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        match editor.readline(prompt) {
            Ok(line) => {
                let _ = editor.add_history_entry(&line);
                return Ok(Some(line));
            }
            // Ctrl-C at the prompt throws the line away, as in a shell.
            Err(ReadlineError::Interrupted) => {}
            Err(ReadlineError::Eof) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}

fn piped_line() -> Result<Option<String>, ReadlineError> {
    let mut line = String::new();
    let read = io::stdin().lock().read_line(&mut line)?;
    Ok((read > 0).then_some(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_carries_its_instructions_and_all_turns() {
        let mut conversation = Conversation::new(Some("Be brief.".to_owned()));
        conversation.ask("One?");
        conversation.answered("1".to_owned());
        conversation.ask("Two?");
        let roles = |conversation: &Conversation| -> Vec<String> {
            let messages = conversation.messages().into_iter();
            messages.map(|message| message.role).collect()
        };
        assert_eq!(
            roles(&conversation),
            ["system", "user", "assistant", "user"]
        );
        conversation.take_back();
        assert_eq!(roles(&conversation), ["system", "user", "assistant"]);
        conversation.take_back();
        assert_eq!(roles(&conversation).len(), 3, "an answered question stays");
        conversation.reset();
        assert_eq!(roles(&conversation), ["system"]);
    }
}
