//! Cache affinity: the workers that hold the KV cache of a conversation.
//!
//! A prompt is cut into growing prefixes (message by message, or blocks of text), each with a hash. When a
//! worker answers, the prompt's prefixes are noted under its name; the next turn of the conversation begins
//! with the same ones and finds it.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hasher};

use mesh_proto::Prompt;

use super::registry::WorkerId;

/// A beginning of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// Hash of the model's name and everything up to here.
    pub hash: u64,
    /// Tokens up to here, estimated.
    pub tokens: u32,
}

/// Cuts a prompt into prefixes, shortest first, at most 256 of them. Those of another salt are others.
pub fn prefixes(model: &str, salt: u64, prompt: &Prompt) -> Vec<Prefix> {
    // Fixed keys: the same prompt has the same hash in every run. A forged collision costs a cache miss,
    // nothing else.
    let mut hasher = DefaultHasher::new();
    hasher.write(model.as_bytes());
    hasher.write_u64(salt);
    let mut bytes = 0;
    let mut found = Vec::new();
    let mut note = |hasher: &DefaultHasher, bytes: usize| {
        if found.len() < PREFIXES {
            found.push(Prefix {
                hash: hasher.finish(),
                tokens: estimate_tokens(bytes),
            });
        }
    };
    match prompt {
        Prompt::Chat(chat) => {
            for message in &chat.messages {
                hasher.write(message.role.as_bytes());
                hasher.write_u8(0xFF);
                hasher.write(message.content.as_bytes());
                hasher.write_u8(0xFF);
                bytes += message.content.len() + MESSAGE_OVERHEAD;
                note(&hasher, bytes);
            }
        }
        Prompt::Text(text) => {
            for block in text.as_bytes().chunks_exact(TEXT_BLOCK) {
                hasher.write(block);
                bytes += block.len();
                note(&hasher, bytes);
            }
        }
        Prompt::Tokens(list) => {
            for block in list.tokens.chunks_exact(TEXT_BLOCK / BYTES_PER_TOKEN) {
                block.iter().for_each(|token| hasher.write_u32(*token));
                bytes += TEXT_BLOCK;
                note(&hasher, bytes);
            }
        }
    }
    found
}

/// Tokens in a text of that length: about four bytes each in English, and only used to compare workers.
pub fn estimate_tokens(bytes: usize) -> u32 {
    u32::try_from(bytes / BYTES_PER_TOKEN).unwrap_or(u32::MAX - 1) + 1
}

/// A bounded table from prefix to worker; the oldest entries make room.
#[derive(Debug, Default)]
pub(crate) struct Affinity {
    holders: HashMap<u64, WorkerId>,
    order: VecDeque<u64>,
}

impl Affinity {
    pub(crate) fn note(&mut self, prefixes: &[Prefix], worker: WorkerId) {
        for prefix in prefixes {
            if self.holders.insert(prefix.hash, worker).is_none() {
                self.order.push_back(prefix.hash);
            }
        }
        while self.order.len() > ENTRIES {
            if let Some(oldest) = self.order.pop_front() {
                self.holders.remove(&oldest);
            }
        }
    }

    pub(crate) fn forget(&mut self, worker: WorkerId) {
        self.holders.retain(|_, holder| *holder != worker);
        let holders = &self.holders;
        self.order.retain(|hash| holders.contains_key(hash));
    }

    /// The longest of these prefixes that some worker holds, and that worker.
    pub(crate) fn find(&self, prefixes: &[Prefix]) -> Option<(WorkerId, u32)> {
        let mut longest_first = prefixes.iter().rev();
        longest_first.find_map(|prefix| Some((*self.holders.get(&prefix.hash)?, prefix.tokens)))
    }
}

const BYTES_PER_TOKEN: usize = 4;
/// Bytes that a template puts around a message.
const MESSAGE_OVERHEAD: usize = 16;
const TEXT_BLOCK: usize = 256;
const PREFIXES: usize = 256;
const ENTRIES: usize = 16_384;

#[cfg(test)]
mod tests {
    use mesh_proto::{Chat, ChatMessage};

    use super::*;

    fn chat(turns: &[(&str, &str)]) -> Prompt {
        let messages = turns.iter().map(|(role, content)| ChatMessage {
            role: (*role).into(),
            content: (*content).into(),
        });
        Prompt::Chat(Chat {
            messages: messages.collect(),
            ..Chat::default()
        })
    }

    #[test]
    fn the_next_turn_finds_the_worker_of_the_one_before() {
        let mut affinity = Affinity::default();
        affinity.note(
            &prefixes("m", 0, &chat(&[("system", "be kind"), ("user", "hello")])),
            WorkerId(7),
        );
        let next = prefixes(
            "m",
            0,
            &chat(&[
                ("system", "be kind"),
                ("user", "hello"),
                ("assistant", "hi"),
                ("user", "?"),
            ]),
        );
        assert_eq!(affinity.find(&next), Some((WorkerId(7), next[1].tokens)));
        let other = prefixes(
            "other",
            0,
            &chat(&[("system", "be kind"), ("user", "hello")]),
        );
        assert_eq!(affinity.find(&other), None);
        affinity.forget(WorkerId(7));
        assert_eq!(affinity.find(&next), None);
        assert!(affinity.order.is_empty());
    }

    #[test]
    fn moving_text_between_messages_is_another_conversation() {
        let one = prefixes("m", 0, &chat(&[("user", "ab"), ("user", "c")]));
        let two = prefixes("m", 0, &chat(&[("user", "a"), ("user", "bc")]));
        assert_ne!(one.last().unwrap().hash, two.last().unwrap().hash);
    }

    #[test]
    fn the_table_stays_within_its_bound() {
        let mut affinity = Affinity::default();
        for hash in 0..(3 * ENTRIES as u64) {
            affinity.note(&[Prefix { hash, tokens: 1 }], WorkerId(1));
        }
        assert_eq!(affinity.holders.len(), ENTRIES);
        assert_eq!(affinity.order.len(), ENTRIES);
    }
}
