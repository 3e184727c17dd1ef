//! DCF v5.0.0: plain heartbeats to a v5.0.0 head, and plain Tasks, each answered by one Result or Error.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use dcf::{ErrorCode, Message, MsgType};
use futures::StreamExt;
use mesh_engine::Event;
use mesh_net::quic::timestamp_us;
use mesh_proto::{Chat, ChatMessage, Generate, GenerateParams, Prompt};
use serde_json::{Map, Value};
use tokio::net::UdpSocket;
use tokio_util::task::TaskTracker;

use crate::answer;
use crate::config::{Config, SamplingDefaults};
use crate::generate;
use crate::host::Host;
use crate::lan::resolve;
use crate::metrics::Counters;

/// The plain DCF socket of a worker.
pub(crate) struct PlainDcf {
    pub(crate) socket: Arc<UdpSocket>,
    pub(crate) config: Arc<Config>,
    pub(crate) host: Arc<Host>,
    pub(crate) counters: Arc<Counters>,
    /// Answers in progress.
    pub(crate) answers: TaskTracker,
}

impl PlainDcf {
    /// Takes tasks and sends heartbeats for ever.
    pub(crate) async fn run(self) -> std::convert::Infallible {
        let defaults = Arc::new(self.config.sampling.clone());
        let running = Arc::new(Mutex::new(HashSet::new()));
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut head = None;
        let mut buffer = vec![0; LARGEST];
        loop {
            tokio::select! {
                received = self.socket.recv_from(&mut buffer) => {
                    // An error here is an answer to something sent before, such as "port closed".
                    let Ok((len, source)) = received else { continue };
                    let Some(task) = self.accept(&buffer[..len], source, head) else {
                        self.counters.dropped.inc();
                        continue;
                    };
                    if self.answers.len() >= MOST_TASKS {
                        let text = "too many tasks at once; try again later";
                        self.send(&error(&task, ErrorCode::WORKER_BUSY, text), source).await;
                        continue;
                    }
                    if let Some(claim) = Claim::new(&running, (source, task.sequence)) {
                        self.counters.tasks.inc();
                        let (socket, host, defaults) = (self.socket.clone(), self.host.clone(), defaults.clone());
                        // Results go to the worker bus of a v5.0.0 head, whichever port its tasks come from.
                        let reply_to = head.filter(|head: &SocketAddr| head.ip() == source.ip()).unwrap_or(source);
                        self.answers.spawn(async move {
                            let _claim = claim;
                            for message in run(task, &host, defaults).await {
                                if let Err(error) = socket.send_to(&message.encode_datagram(), reply_to).await {
                                    tracing::warn!(%reply_to, %error, "a result could not be sent");
                                }
                            }
                        });
                    }
                }
                _ = heartbeat.tick() => head = self.heartbeat().await,
            }
        }
    }

    /// The task in a datagram, if it is one and its source may ask.
    fn accept(
        &self,
        datagram: &[u8],
        source: SocketAddr,
        head: Option<SocketAddr>,
    ) -> Option<Message> {
        let from_head =
            head.is_some_and(|head| head.ip().to_canonical() == source.ip().to_canonical());
        if !from_head && !self.config.trusts(source.ip()) {
            return None;
        }
        let message = Message::decode_datagram(Bytes::copy_from_slice(datagram)).ok()?;
        (message.kind == MsgType::TASK).then_some(message)
    }

    /// Tells the v5.0.0 head, if there is one, where tasks are taken; returns its address.
    async fn heartbeat(&self) -> Option<SocketAddr> {
        let name = self.config.legacy.head.as_deref()?;
        let Some(head) = resolve(name).await else {
            tracing::warn!(head = name, "the v5.0.0 head's name has no address");
            return None;
        };
        let port = self.socket.local_addr().ok()?.port().to_string();
        self.send(
            &Message::new(MsgType::HEARTBEAT, 0, timestamp_us(), port),
            head,
        )
        .await;
        Some(head)
    }

    async fn send(&self, message: &Message, to: SocketAddr) {
        if let Err(error) = self.socket.send_to(&message.encode_datagram(), to).await {
            tracing::debug!(%to, %error, "datagram not sent");
        }
    }
}

/// Answers a task: one Result or Error, or the Chunks of a Result that no datagram holds.
async fn run(task: Message, host: &Arc<Host>, defaults: Arc<SamplingDefaults>) -> Vec<Message> {
    let generate = match parse(&task) {
        Ok(generate) => generate,
        Err(reason) => return vec![error(&task, ErrorCode::INVALID_PAYLOAD, &reason)],
    };
    let mut events = match answer::start(host, generate, defaults).await {
        Ok((events, _)) => events,
        Err(refusal) => return vec![error(&task, refusal.code(), &refusal.to_string())],
    };
    let mut text = String::new();
    while let Some(event) = events.next().await {
        match event {
            Event::Tokens(tokens) => text += &tokens.text,
            Event::Done(done) => text += &done.text,
            Event::Failed(failure) => {
                return vec![error(&task, generate::code(&failure), &failure.to_string())];
            }
            Event::Scored(_) => {}
        }
    }
    let result = Message::new(MsgType::RESULT, task.sequence, timestamp_us(), text);
    if result.fits_datagram() {
        return vec![result];
    }
    match dcf::chunk::split(task.sequence, timestamp_us(), result.payload) {
        Ok(chunks) => chunks.collect(),
        Err(failure) => vec![error(&task, ErrorCode::INTERNAL, &failure.to_string())],
    }
}

/// Reads a task's payload: a JSON object, or else the prompt itself.
fn parse(task: &Message) -> Result<Generate, String> {
    let text = std::str::from_utf8(&task.payload)
        .map_err(|error| format!("the prompt is not UTF-8: {error}"))?;
    if text.trim().is_empty() {
        return Err("the payload is empty: send a prompt".to_owned());
    }
    let user = |text: &str| Chat {
        messages: vec![ChatMessage {
            role: "user".to_owned(),
            content: text.to_owned(),
        }],
        ..Chat::default()
    };
    let request_id = format!("task-{}", task.sequence);
    let Ok(Value::Object(fields)) = serde_json::from_str::<Value>(text) else {
        let prompt = Some(Prompt::Chat(user(text)));
        return Ok(Generate {
            request_id,
            prompt,
            ..Generate::default()
        });
    };
    let chat = match (fields.get("messages"), fields.get("prompt")) {
        (Some(messages), _) => conversation(messages)?,
        (None, Some(Value::String(prompt))) => user(prompt),
        _ => return Err("the task has neither `prompt` nor `messages`".to_owned()),
    };
    Ok(Generate {
        request_id,
        model: fields
            .get("model")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned(),
        prompt: Some(Prompt::Chat(chat)),
        params: Some(params(&fields)),
        ..Generate::default()
    })
}

fn conversation(messages: &Value) -> Result<Chat, String> {
    let text = |message: &Value, key| message.get(key).and_then(Value::as_str).map(str::to_owned);
    let messages = messages.as_array().map(Vec::as_slice).unwrap_or_default();
    let messages: Option<Vec<ChatMessage>> = messages
        .iter()
        .map(|m| {
            Some(ChatMessage {
                role: text(m, "role")?,
                content: text(m, "content")?,
            })
        })
        .collect();
    match messages {
        Some(messages) if !messages.is_empty() => Ok(Chat {
            messages,
            ..Chat::default()
        }),
        _ => Err(
            "`messages` must be a list of {\"role\": ..., \"content\": ...} with text".to_owned(),
        ),
    }
}

/// Parameters of v5.0.0 that mean nothing to a language model are ignored.
fn params(fields: &Map<String, Value>) -> GenerateParams {
    let number = |key: &str| fields.get(key).and_then(Value::as_f64).map(|x| x as f32);
    let whole = |key: &str| {
        fields
            .get(key)
            .and_then(Value::as_u64)
            .and_then(|n| u32::try_from(n).ok())
    };
    let stop = match fields.get("stop") {
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(texts)) => texts
            .iter()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect(),
        _ => Vec::new(),
    };
    GenerateParams {
        max_tokens: whole("max_tokens"),
        temperature: number("temperature"),
        top_p: number("top_p"),
        top_k: whole("top_k"),
        min_p: number("min_p"),
        repetition_penalty: number("repetition_penalty"),
        presence_penalty: number("presence_penalty"),
        frequency_penalty: number("frequency_penalty"),
        seed: fields.get("seed").and_then(Value::as_u64),
        stop,
        ..GenerateParams::default()
    }
}

fn error(task: &Message, code: ErrorCode, text: &str) -> Message {
    Message::error(task.sequence, timestamp_us(), code, text)
}

type TaskKey = (SocketAddr, u32);

/// Keeps a repeated task from running twice, as long as it lives.
struct Claim {
    running: Arc<Mutex<HashSet<TaskKey>>>,
    key: TaskKey,
}

impl Claim {
    fn new(running: &Arc<Mutex<HashSet<TaskKey>>>, key: TaskKey) -> Option<Self> {
        let is_new = running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key);
        is_new.then(|| Claim {
            running: running.clone(),
            key,
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.key);
    }
}

const HEARTBEAT: Duration = Duration::from_secs(2);
const LARGEST: usize = 65_536;

/// Tasks that are answered at once; more are refused.
const MOST_TASKS: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    fn task(payload: &[u8]) -> Result<Generate, String> {
        parse(&Message::new(MsgType::TASK, 7, 0, payload.to_vec()))
    }

    fn messages(generate: &Generate) -> Vec<(&str, &str)> {
        let Some(Prompt::Chat(chat)) = &generate.prompt else {
            panic!("{generate:?}");
        };
        chat.messages
            .iter()
            .map(|m| (m.role.as_str(), m.content.as_str()))
            .collect()
    }

    #[test]
    fn a_plain_prompt_is_a_users_message_even_if_it_looks_like_json() {
        assert_eq!(messages(&task(b"Hello").unwrap()), [("user", "Hello")]);
        assert_eq!(messages(&task(b"{oops").unwrap()), [("user", "{oops")]);
        assert_eq!(messages(&task(b"[1]").unwrap()), [("user", "[1]")]);
    }

    #[test]
    fn an_object_names_prompt_or_messages_and_parameters() {
        let generate = task(
            br#"{"prompt": "Hi", "max_tokens": 5, "temperature": 0, "stop": "x", "steps": 50, "guidance": 7.5}"#,
        );
        let generate = generate.unwrap();
        assert_eq!(messages(&generate), [("user", "Hi")]);
        let params = generate.params.unwrap();
        assert_eq!(
            (params.max_tokens, params.temperature),
            (Some(5), Some(0.0))
        );
        assert_eq!(params.stop, ["x"]);
        let generate = task(br#"{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}"#);
        assert_eq!(
            messages(&generate.unwrap()),
            [("system", "a"), ("user", "b")]
        );
    }

    #[test]
    fn what_cannot_be_answered_is_named() {
        assert!(task(&[0xff, 0xfe]).unwrap_err().contains("not UTF-8"));
        assert!(
            task(b"{}")
                .unwrap_err()
                .contains("neither `prompt` nor `messages`")
        );
        assert!(
            task(br#"{"messages": [{"role": 1}]}"#)
                .unwrap_err()
                .contains("must be a list")
        );
    }

    #[test]
    fn a_repeated_task_does_not_run_twice() {
        let running = Arc::default();
        let key = (SocketAddr::from(([127, 0, 0, 1], 9)), 3);
        let claim = Claim::new(&running, key);
        assert!(claim.is_some());
        assert!(Claim::new(&running, key).is_none());
        drop(claim);
        assert!(Claim::new(&running, key).is_some());
    }
}
