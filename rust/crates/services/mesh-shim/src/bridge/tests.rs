//! The bridge with simulated time: every datagram in, every datagram out.

mod admission;
mod answers;
mod failover;
mod properties;
mod versions;

use std::time::Duration;

use bytes::Bytes;
use dcf::{Message, chunk};

use super::*;
use crate::config::RateLimit;

const ALICE: &str = "127.0.0.1:1001";
const BOB: &str = "127.0.0.1:1002";
const STRANGER: &str = "203.0.113.5:4444";

/// A bridge with its clock.
struct World {
    bridge: Bridge,
    start: Instant,
    now: Instant,
}

fn two_heads() -> Config {
    Config {
        heads: vec!["head-a:7777".into(), "head-b:7777".into()],
        max_tasks: 8,
        retain_bytes: 64 << 10,
        rate_limit: RateLimit {
            per_second: 0,
            ..RateLimit::default()
        },
        ..Config::default()
    }
}

impl World {
    /// All heads have been heard at 0 ms.
    fn new(config: Config) -> Self {
        let heads = config.heads.len();
        let mut world = Self::unheard(config);
        for head in 0..heads {
            world.health(head);
        }
        world
    }

    /// No head has been heard.
    fn unheard(config: Config) -> Self {
        let secrets = Secrets {
            cookie_key: [7; 32],
            first_generation: 40,
        };
        let start = Instant::now();
        let mut world = Self {
            bridge: Bridge::new(config, &secrets, Arc::default(), start),
            start,
            now: start,
        };
        world.transmits();
        world
    }

    fn at(&mut self, ms: u64) {
        self.now = self.start + Duration::from_millis(ms);
    }

    fn health(&mut self, head: usize) {
        assert_eq!(self.head(head, &message(MsgType::HEALTH, 1, "")), None);
    }

    /// Destination and content of what a client's message becomes.
    fn client(&mut self, client: &str, message: &Message) -> Sent {
        self.client_bytes(client, &message.encode_datagram())
    }

    /// As [`World::client`], with what is sent as it stands on the wire: in which version, and what.
    fn client_of(&mut self, version: Version, client: &str, message: &Message) -> (Version, Sent) {
        let mut seen = version;
        let sent = self.client_frames(client, &message.encode_as(version), &mut seen);
        (seen, sent)
    }

    fn client_bytes(&mut self, client: &str, bytes: &[u8]) -> Sent {
        self.client_frames(client, bytes, &mut Version::V5_0)
    }

    fn client_frames(&mut self, client: &str, bytes: &[u8], seen: &mut Version) -> Sent {
        let mut datagram = bytes.to_vec();
        let mut reply = Reply::empty();
        match self
            .bridge
            .on_client(self.now, client.parse().unwrap(), &mut datagram, &mut reply)
        {
            FromClient::Drop => Sent::Nothing,
            FromClient::Forward { head, len, version } => {
                *seen = version;
                Sent::ToHead(head, framed(&datagram[..len], version))
            }
            FromClient::Reply => {
                *seen = Version::of(reply.as_bytes());
                Sent::Back(decode(reply.as_bytes()))
            }
        }
    }

    /// A task that goes to a head, as the head gets it.
    fn task(&mut self, client: &str, sequence: u32, text: &str) -> Message {
        match self.client(client, &message(MsgType::TASK, sequence, text.to_owned())) {
            Sent::ToHead(_, task) => task,
            other => panic!("not forwarded: {other:?}"),
        }
    }

    /// Receiver and content of what a head's message becomes.
    fn head(&mut self, head: usize, message: &Message) -> Option<(String, Message)> {
        let (_, client, message) = self.head_of(Version::V5_0, head, message)?;
        Some((client, message))
    }

    /// As [`World::head`], with the versions on both sides.
    fn head_of(
        &mut self,
        version: Version,
        head: usize,
        message: &Message,
    ) -> Option<(Version, String, Message)> {
        let mut datagram = message.encode_as(version).to_vec();
        match self.bridge.on_head(self.now, head, &mut datagram) {
            FromHead::Drop => None,
            FromHead::Deliver {
                client,
                len,
                version,
            } => Some((
                version,
                client.to_string(),
                framed(&datagram[..len], version),
            )),
        }
    }

    /// Messages that the bridge sends by itself now, probes left out.
    fn transmits(&mut self) -> Vec<(Destination, Message)> {
        let sent = self.transmits_of();
        sent.into_iter()
            .map(|(to, _, message)| (to, message))
            .collect()
    }

    /// As [`World::transmits`], with their versions.
    fn transmits_of(&mut self) -> Vec<(Destination, Version, Message)> {
        let mut buffer = vec![0; 1 << 16];
        let mut sent = Vec::new();
        while let Some(Transmit { to, len }) = self.bridge.poll_transmit(self.now, &mut buffer) {
            let message = decode(&buffer[..len]);
            if message.kind != MsgType::HEALTH || !message.payload.is_empty() {
                sent.push((to, Version::of(&buffer[..len]), message));
            }
        }
        sent
    }

    /// One head, which has spoken in these versions.
    fn with_head_of(versions: &[Version]) -> Self {
        let mut world = Self::unheard(Config {
            heads: vec!["head:1".into()],
            ..two_heads()
        });
        for version in versions {
            let health = message(MsgType::HEALTH, 1, "");
            assert_eq!(world.head_of(*version, 0, &health), None);
        }
        world
    }

    /// The task of a client of this version, as the head gets it, and the version in which it gets it.
    fn task_of(&mut self, version: Version, client: &str, sequence: u32) -> (Version, Message) {
        match self.client_of(version, client, &message(MsgType::TASK, sequence, "q")) {
            (upstream, Sent::ToHead(0, task)) => (upstream, task),
            other => panic!("not forwarded: {other:?}"),
        }
    }

    fn stats(&self) -> &Stats {
        &self.bridge.stats
    }
}

#[derive(Debug, PartialEq)]
enum Sent {
    Nothing,
    ToHead(usize, Message),
    Back(Message),
}

impl Sent {
    fn error(self) -> (ErrorCode, u32) {
        match self {
            Sent::Back(message) => (
                message.error_body().expect("an Error").code,
                message.sequence,
            ),
            other => panic!("no Error: {other:?}"),
        }
    }
}

fn message(kind: MsgType, sequence: u32, payload: impl Into<Bytes>) -> Message {
    Message::new(kind, sequence, 99, payload)
}

fn decode(bytes: &[u8]) -> Message {
    Message::decode_datagram(Bytes::copy_from_slice(bytes)).expect("the bridge sends messages")
}

/// The message that the receiver decodes from a datagram that is sent on in `version`.
fn framed(datagram: &[u8], version: Version) -> Message {
    let bytes = match reframed(datagram, version) {
        -1 => [version.prefix(), datagram].concat(),
        shift => datagram[shift as usize..].to_vec(),
    };
    let (seen, message) =
        Message::decode_versioned(bytes.into()).expect("the bridge sends messages");
    assert_eq!(seen, version);
    message
}

fn answer_to(task: &Message, text: &str) -> Message {
    message(MsgType::RESULT, task.sequence, text.to_owned())
}
