//! Prompts that are too long for every worker, told by their bytes before anybody is given them.
//!
//! Workers say how long a token over each byte can be ([`mesh_base::tokens`]). What a prompt has at least by
//! that is compared with their contexts. A prompt is refused only if all workers that could take it say so:
//! one that knows nothing of its tokenizer, or lies, refuses nothing that others serve.

use std::sync::Arc;

use mesh_base::tokens::{ByteCounts, ByteSpans};
use mesh_proto::{ModelCard, Prompt};

/// Knowledge of a prompt's length.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Length {
    /// It is short, or its length cannot be estimated.
    #[default]
    Unknown,
    /// Number of tokens, as the prompt gives them.
    Tokens(u64),
    /// Text that is tokenised as it is.
    Text(Arc<ByteCounts>),
    /// Text that is part of a conversation, if the template keeps it.
    Chat(Arc<ByteCounts>),
}

impl Length {
    /// Estimates the length of this prompt.
    pub fn of(prompt: &Prompt) -> Self {
        match prompt {
            Prompt::Tokens(list) => Self::Tokens(list.tokens.len() as u64),
            Prompt::Text(text) if text.len() > SHORT => Self::Text(Arc::new(ByteCounts::of(text))),
            Prompt::Chat(chat) => {
                let bytes: usize = chat.kept_texts().map(str::len).sum();
                match bytes > SHORT {
                    true => Self::Chat(Arc::new(chat.kept_texts().collect())),
                    false => Self::Unknown,
                }
            }
            Prompt::Text(_) => Self::Unknown,
        }
    }

    /// The least number of tokens that it has for this model.
    fn least(&self, card: &ModelCard) -> u64 {
        let by_bytes = |counts: &ByteCounts| {
            ByteSpans::from_bytes(&card.byte_spans).map_or(0, |spans| spans.least_tokens(counts))
        };
        match self {
            Self::Unknown => 0,
            Self::Tokens(tokens) => *tokens,
            Self::Text(counts) => by_bytes(counts),
            Self::Chat(counts) if card.keeps_text => by_bytes(counts),
            Self::Chat(_) => 0,
        }
    }

    /// The largest context of these models and the tokens that the prompt has at least, if it is too long for
    /// all of them.
    pub(crate) fn exceeds<'a>(
        &self,
        cards: impl IntoIterator<Item = &'a ModelCard>,
    ) -> Option<(u32, u64)> {
        if *self == Self::Unknown {
            return None;
        }
        let mut largest = None;
        for card in cards {
            let least = self.least(card);
            if card.context == 0 || least <= u64::from(card.context) {
                return None;
            }
            largest = largest.max(Some((card.context, least)));
        }
        largest
    }
}

/// Prompts of fewer bytes are not worth the look: no context is that short.
const SHORT: usize = 2048;

#[cfg(test)]
mod tests {
    use mesh_proto::{Chat, ChatMessage, TokenList};

    use super::*;

    fn card(context: u32, spans: &ByteSpans) -> ModelCard {
        ModelCard {
            context,
            byte_spans: spans.as_bytes().to_vec(),
            keeps_text: true,
            ..ModelCard::default()
        }
    }

    fn chat(content: String) -> Prompt {
        Prompt::Chat(Chat {
            messages: vec![ChatMessage {
                role: "user".into(),
                content,
            }],
            ..Chat::default()
        })
    }

    #[test]
    fn a_prompt_is_too_long_only_if_it_is_for_all() {
        let spans = ByteSpans::of_characters();
        let (small, large) = (card(1000, &spans), card(8000, &spans));
        let unknown = ModelCard {
            context: 10,
            ..ModelCard::default()
        };
        let text = |bytes| Length::of(&Prompt::Text("1".repeat(bytes)));
        assert_eq!(text(4000).exceeds([&small]), None);
        assert_eq!(text(4004).exceeds([&small]), Some((1000, 1001)));
        assert_eq!(text(4004).exceeds([&small, &large]), None);
        assert_eq!(
            text(8 << 20).exceeds([&small, &large]),
            Some((8000, 2 << 20))
        );
        assert_eq!(text(8 << 20).exceeds([&small, &unknown]), None);
        assert_eq!(text(8 << 20).exceeds([]), None);
    }

    #[test]
    fn of_a_conversation_counts_what_its_template_keeps() {
        let spans = ByteSpans::of_characters();
        let kept = card(1000, &spans);
        let may_drop = ModelCard {
            keeps_text: false,
            ..kept.clone()
        };
        let long = Length::of(&chat("1".repeat(8 << 20)));
        assert_eq!(long.exceeds([&kept]), Some((1000, 2 << 20)));
        assert_eq!(long.exceeds([&may_drop]), None);
        let blank = Length::of(&chat(" ".repeat(8 << 20)));
        assert_eq!(blank.exceeds([&kept]), None, "templates trim");
    }

    #[test]
    fn token_ids_are_counted() {
        let tokens = |count| {
            Length::of(&Prompt::Tokens(TokenList {
                tokens: vec![1; count],
            }))
        };
        let card = ModelCard {
            context: 10,
            ..ModelCard::default()
        };
        assert_eq!(tokens(10).exceeds([&card]), None);
        assert_eq!(tokens(11).exceeds([&card]), Some((10, 11)));
    }
}
