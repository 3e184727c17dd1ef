//! Plain DCF, v5.0.0 and v5.1: heartbeats to a head of either, and Tasks, each answered in the version that
//! it came in.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dcf::{ErrorCode, Message, MsgType, Version};
use futures::StreamExt;
use mesh_base::addresses::{self, canonical};
use mesh_engine::{Event, Generation};
use mesh_net::quic::timestamp_us;
use mesh_proto::{Chat, ChatMessage, Generate, GenerateParams, Prompt};
use mesh_service::shutdown::Shutdown;
use serde_json::{Map, Value};
use tokio::net::UdpSocket;
use tokio_util::task::TaskTracker;

use crate::answer;
use crate::codec;
use crate::config::{Config, HeadVersion, SamplingDefaults};
use crate::host::Host;
use crate::lock::lock;
use crate::metrics::Counters;

pub(crate) struct PlainDcf {
    pub(crate) socket: Arc<UdpSocket>,
    /// As configured at the start.
    pub(crate) config: Arc<Config>,
    /// The current configuration, for the trusted networks.
    pub(crate) live: Arc<Mutex<Config>>,
    pub(crate) host: Arc<Host>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) shutdown: Shutdown,
    pub(crate) answers: TaskTracker,
}

impl PlainDcf {
    /// Takes tasks and sends heartbeats; never returns.
    pub(crate) async fn run(self) -> std::convert::Infallible {
        let defaults = Arc::new(self.config.sampling.clone());
        let running = Arc::new(Mutex::new(HashSet::new()));
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut heads = Vec::new();
        let mut speech = Speech::new(self.config.legacy.version);
        let mut buffer = vec![0; LARGEST];
        loop {
            tokio::select! {
                received = self.socket.recv_from(&mut buffer) => {
                    // An error here is an answer to something sent before, such as "port closed".
                    let Ok((len, source)) = received else { continue };
                    let source = canonical(source);
                    let head = heads.iter().copied().find(|head: &SocketAddr| head.ip() == source.ip());
                    let from_head = head.is_some();
                    let Some((version, message)) = self.accept(&buffer[..len], source, from_head) else {
                        self.counters.dropped.inc();
                        continue;
                    };
                    if from_head {
                        speech.heard(version, Instant::now());
                    }
                    let peer = Peer {
                        // Results go to the worker bus of a head, whichever port its tasks come from.
                        reply_to: head.unwrap_or(source),
                        version,
                    };
                    match message.kind {
                        MsgType::HEALTH => {
                            self.send(&Message::new(MsgType::HEALTH, message.sequence, timestamp_us(), Bytes::new()), peer).await;
                        }
                        MsgType::SHUTDOWN if from_head => {
                            tracing::info!(head = %source, %version, "the head asks this worker to stop");
                            self.shutdown.begin();
                        }
                        MsgType::TASK => self.take(message, source, peer, &running, &defaults).await,
                        _ => {
                            self.counters.dropped.inc();
                        }
                    }
                }
                _ = heartbeat.tick() => heads = self.heartbeat(&mut speech).await,
            }
        }
    }

    async fn take(
        &self,
        task: Message,
        source: SocketAddr,
        peer: Peer,
        running: &Arc<Mutex<HashSet<TaskKey>>>,
        defaults: &Arc<SamplingDefaults>,
    ) {
        if self.answers.len() >= MOST_TASKS {
            let text = "too many tasks at once; try again later";
            let busy = error(&task, ErrorCode::WORKER_BUSY, text);
            return self.send(&busy, peer).await;
        }
        let Some(claim) = Claim::new(running, (source, peer.version, task.sequence)) else {
            return;
        };
        self.counters.tasks.inc();
        let (socket, host, defaults) = (self.socket.clone(), self.host.clone(), defaults.clone());
        self.answers.spawn(async move {
            let _claim = claim;
            let answer = run(&task, &host, defaults, peer.version).await;
            let answer = answer.unwrap_or_else(|(code, text)| vec![error(&task, code, &text)]);
            for (index, message) in answer.iter().enumerate() {
                // A receiver's socket holds about ninety Chunks that were not read yet.
                if index > 0 && index.is_multiple_of(BURST) {
                    tokio::time::sleep(PAUSE).await;
                }
                let datagram = message.encode_as(peer.version);
                if let Err(error) = socket.send_to(&datagram, peer.reply_to).await {
                    tracing::warn!(to = %peer.reply_to, %error, "a result could not be sent");
                }
            }
        });
    }

    /// The message in a datagram and its version, if it is one and its source may speak to this worker.
    fn accept(
        &self,
        datagram: &[u8],
        source: SocketAddr,
        from_head: bool,
    ) -> Option<(Version, Message)> {
        if !from_head && !lock(&self.live).trusts(source.ip()) {
            return None;
        }
        match Message::decode_versioned(Bytes::copy_from_slice(datagram)) {
            Ok(decoded) => Some(decoded),
            Err(error) => {
                tracing::debug!(%source, %error, "datagram dropped");
                None
            }
        }
    }

    /// Tells the head of DCF v5, if there is one, where tasks are taken; returns its addresses. At which of
    /// them it listens cannot be known before it sends something: all get the heartbeat.
    async fn heartbeat(&self, speech: &mut Speech) -> Vec<SocketAddr> {
        let (Some(name), Ok(own)) = (&self.config.legacy.head, self.socket.local_addr()) else {
            return Vec::new();
        };
        let heads = match addresses::resolve(name).await {
            Ok(heads) => heads,
            Err(error) => {
                tracing::warn!(head = name, %error, "the name of the DCF v5 head has no address");
                return Vec::new();
            }
        };
        let port = own.port().to_string();
        for (version, sequence) in speech.beat(Instant::now()) {
            let beat = Message::new(MsgType::HEARTBEAT, sequence, timestamp_us(), port.clone());
            for head in &heads {
                let peer = Peer {
                    reply_to: *head,
                    version,
                };
                self.send(&beat, peer).await;
            }
        }
        heads
    }

    async fn send(&self, message: &Message, to: Peer) {
        let datagram = message.encode_as(to.version);
        if let Err(error) = self.socket.send_to(&datagram, to.reply_to).await {
            tracing::debug!(to = %to.reply_to, %error, "datagram not sent");
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Peer {
    reply_to: SocketAddr,
    version: Version,
}

/// The version of the heartbeats to the head, and their sequence.
///
/// If the version is unknown, it is v5.0.0 at first, as ever. If nothing has come from the head after a few
/// of those, heartbeats of v5.1 go beside them, which a v5.0.0 head ignores. A datagram from the head tells
/// its version, for a while.
#[derive(Debug, Default)]
struct Speech {
    version: HeadVersion,
    heard: Option<(Version, Instant)>,
    beats: u32,
}

impl Speech {
    fn new(version: HeadVersion) -> Self {
        Speech {
            version,
            ..Speech::default()
        }
    }

    fn heard(&mut self, version: Version, now: Instant) {
        self.heard = Some((version, now));
    }

    /// The heartbeats that are due now, as versions and sequences.
    fn beat(&mut self, now: Instant) -> Vec<(Version, u32)> {
        self.beats = self.beats.wrapping_add(1);
        let known = self.heard.filter(|(_, at)| now < *at + HEARD_FOR);
        let versions = match (self.version, known) {
            (HeadVersion::V5_0, _) | (HeadVersion::Auto, Some((Version::V5_0, _))) => {
                vec![Version::V5_0]
            }
            (HeadVersion::V5_1, _) | (HeadVersion::Auto, Some((Version::V5_1, _))) => {
                vec![Version::V5_1]
            }
            (HeadVersion::Auto, None) if self.beats <= FIRST_BEATS => vec![Version::V5_0],
            (HeadVersion::Auto, None) => vec![Version::V5_0, Version::V5_1],
        };
        // Those of v5.0.0 have sequence 0, those of v5.1 count.
        let sequence = |version| match version {
            Version::V5_0 => 0,
            Version::V5_1 => self.beats,
        };
        let versions = versions.into_iter();
        versions
            .map(|version| (version, sequence(version)))
            .collect()
    }
}

/// Answers a task: a Result, or the Chunks of one that goes in no single datagram of this version.
async fn run(
    task: &Message,
    host: &Arc<Host>,
    defaults: Arc<SamplingDefaults>,
    version: Version,
) -> Result<Vec<Message>, (ErrorCode, String)> {
    let generate = parse(task).map_err(|reason| (ErrorCode::INVALID_PAYLOAD, reason))?;
    let tokenising = OnceLock::new();
    let started =
        answer::start::<Generation>(host, generate, Bytes::new(), defaults, &tokenising).await;
    let (mut events, _, _precedence) =
        started.map_err(|refusal| (refusal.code(), refusal.to_string()))?;
    let mut text = String::new();
    while let Some(event) = events.next().await {
        match event {
            Event::Tokens(tokens) => text += &tokens.text,
            Event::Done(done) => text += &done.text,
            Event::Failed(failure) => return Err((codec::code(&failure), failure.to_string())),
            Event::Scored(_) => {}
        }
    }
    let result = Message::new(MsgType::RESULT, task.sequence, timestamp_us(), text);
    if result.is_single_answer(version) {
        return Ok(vec![result]);
    }
    let chunks = dcf::chunk::split(task.sequence, timestamp_us(), result.payload);
    let chunks = chunks.map_err(|failure| (ErrorCode::INTERNAL, failure.to_string()))?;
    Ok(chunks.collect())
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
    let model = fields.get("model").and_then(Value::as_str);
    Ok(Generate {
        request_id,
        model: model.unwrap_or_default().to_owned(),
        prompt: Some(Prompt::Chat(chat)),
        params: Some(params(&fields)),
        ..Generate::default()
    })
}

fn conversation(messages: &Value) -> Result<Chat, String> {
    let text = |message: &Value, key| message.get(key).and_then(Value::as_str).map(str::to_owned);
    let messages = messages.as_array().map(Vec::as_slice).unwrap_or_default();
    let messages = messages.iter().map(|message| {
        Some(ChatMessage {
            role: text(message, "role")?,
            content: text(message, "content")?,
        })
    });
    match messages.collect::<Option<Vec<ChatMessage>>>() {
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
    let whole = |key: &str| u32::try_from(fields.get(key)?.as_u64()?).ok();
    let stop = match fields.get("stop") {
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(texts)) => {
            let texts = texts.iter().filter_map(Value::as_str);
            texts.map(str::to_owned).collect()
        }
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
    let text = &text[..text.floor_char_boundary(Version::V5_1.max_answer() - 1)];
    Message::error(task.sequence, timestamp_us(), code, text)
}

type TaskKey = (SocketAddr, Version, u32);

/// Keeps a repeated task from running twice, as long as it lives.
struct Claim {
    running: Arc<Mutex<HashSet<TaskKey>>>,
    key: TaskKey,
}

impl Claim {
    fn new(running: &Arc<Mutex<HashSet<TaskKey>>>, key: TaskKey) -> Option<Self> {
        let running = lock(running).insert(key).then(|| running.clone())?;
        Some(Claim { running, key })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        lock(&self.running).remove(&self.key);
    }
}

const HEARTBEAT: Duration = Duration::from_secs(2);
/// Heartbeats of v5.0.0 alone, before those of v5.1 go beside them.
const FIRST_BEATS: u32 = 2;
/// Time for which a head is believed to speak the version that it spoke.
const HEARD_FOR: Duration = Duration::from_secs(600);
/// Chunks that are sent at once, and the pause after them.
const BURST: usize = 16;
const PAUSE: Duration = Duration::from_millis(2);
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
    fn heartbeats_go_in_the_heads_version_once_that_is_known() {
        let (old, new) = (Version::V5_0, Version::V5_1);
        let now = Instant::now();
        let mut speech = Speech::new(HeadVersion::Auto);
        assert_eq!(speech.beat(now), [(old, 0)]);
        assert_eq!(speech.beat(now), [(old, 0)]);
        assert_eq!(speech.beat(now), [(old, 0), (new, 3)]);
        speech.heard(new, now);
        assert_eq!(speech.beat(now), [(new, 4)]);
        assert_eq!(speech.beat(now), [(new, 5)], "they count");
        speech.heard(old, now);
        assert_eq!(speech.beat(now), [(old, 0)]);
        assert_eq!(
            speech.beat(now + HEARD_FOR).len(),
            2,
            "it may be another one by now"
        );
        let mut fixed = Speech::new(HeadVersion::V5_1);
        fixed.heard(old, now);
        assert_eq!(fixed.beat(now), [(new, 1)]);
        assert_eq!(Speech::new(HeadVersion::V5_0).beat(now), [(old, 0)]);
    }

    #[test]
    fn a_repeated_task_does_not_run_twice() {
        let running = Arc::default();
        let key = (SocketAddr::from(([127, 0, 0, 1], 9)), Version::V5_0, 3);
        let claim = Claim::new(&running, key);
        assert!(claim.is_some());
        assert!(Claim::new(&running, key).is_none());
        let newer = (key.0, Version::V5_1, key.2);
        assert!(
            Claim::new(&running, newer).is_some(),
            "another version is another task"
        );
        drop(claim);
        assert!(Claim::new(&running, key).is_some());
    }
}
