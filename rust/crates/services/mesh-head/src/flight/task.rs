//! Tasks, whichever front end they came through: answers to generate, texts to embed, images to make.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mesh_control::affinity::{estimate_tokens, prefixes};
use mesh_control::fair::{Origin, Source};
use mesh_control::length::Length;
use mesh_control::request::Bounds;
use mesh_control::router::Requirements;
use mesh_proto::{ChatMessage, EmbedInput, GenerateParams, Prompt};

use crate::audit::Holder;

#[derive(Debug, Clone)]
pub(crate) struct GenerateTask {
    /// Request id in the logs of all services.
    pub id: String,
    /// Model name; the head's default if absent.
    pub model: Option<String>,
    /// Prompt; several answers to it share it.
    pub prompt: Arc<Prompt>,
    /// Sampling parameters and limits of the answer.
    pub params: GenerateParams,
    /// Payload of the plain DCF task that asks for the same, where one can: the client's own if it came as
    /// one.
    pub plain: Option<Bytes>,
    pub source: Source,
    /// The key or token that it came with.
    pub holder: Option<Holder>,
    /// Prefixes of prompts are cached for tasks of the same salt only.
    pub salt: u64,
}

impl GenerateTask {
    pub(crate) fn bounds(&self) -> Bounds {
        let (bytes, messages) = match &*self.prompt {
            Prompt::Text(text) => (text.len(), 0),
            // More than any token stands for, where it is echoed as text.
            Prompt::Tokens(list) => (list.tokens.len(), 0),
            Prompt::Chat(chat) => {
                let of = |message: &ChatMessage| message.content.len() + message.role.len();
                let bytes: usize = chat.messages.iter().map(of).sum();
                (bytes + chat.template_variables.len(), chat.messages.len())
            }
        };
        // No token is shorter than a byte; templates put something around every message.
        let around = TEMPLATE_TOKENS + messages * MESSAGE_TOKENS;
        let echoed = match (&*self.prompt, self.params.echo) {
            (_, false) => 0,
            (Prompt::Tokens(_), true) => bytes * ECHOED_TOKEN_BYTES,
            (_, true) => bytes + around,
        };
        let asked = self.params.max_tokens.unwrap_or(u32::MAX);
        Bounds {
            tokens: asked.min(Bounds::default().tokens),
            more_text: echoed as u64,
            alternatives: self.params.logprobs,
            prompt_tokens: u32::try_from(bytes.saturating_add(around)).unwrap_or(u32::MAX),
        }
    }

    /// The router's view of this task, for this model.
    pub(crate) fn ask(&self, model: &str) -> Requirements {
        let prompt_tokens = estimate_tokens(match &*self.prompt {
            Prompt::Text(text) => text.len(),
            Prompt::Chat(chat) => {
                let messages = chat.messages.iter();
                messages.map(|message| message.content.len()).sum()
            }
            Prompt::Tokens(list) => list.tokens.len() * 4,
        });
        let asked = self.params.max_tokens;
        Requirements {
            model: model.to_owned(),
            prompt_tokens,
            answer_tokens: asked.map_or(USUAL_ANSWER, |most| most.min(USUAL_ANSWER)),
            prefixes: prefixes(model, self.salt, &self.prompt),
            length: Length::of(&self.prompt),
            plain: self.plain.is_some(),
            revision: self.params.revision().max(self.prompt.revision()),
            source: self.source,
            ..Requirements::default()
        }
    }
}

/// Texts to embed, whichever front end they came through.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EmbedTask {
    /// Request id in the logs of all services.
    pub id: String,
    /// Model name; the first embedding model if absent.
    pub model: Option<String>,
    /// Texts to embed.
    pub inputs: Vec<EmbedInput>,
    /// Name of the prompt that the model puts in front.
    pub prompt_name: String,
    /// Length of the vectors; 0 is the model's own.
    pub dimensions: u32,
    /// The client that it comes from.
    pub origin: Origin,
    /// The key or token that it came with.
    pub holder: Option<Holder>,
}

/// All vectors of a request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Embedded {
    pub model: String,
    pub dimensions: u32,
    /// f32, little-endian, vector after vector in the order of the texts.
    pub vectors: Bytes,
    /// Tokens that the model saw, over all texts.
    pub tokens: u64,
}

/// An image to make, whichever front end it came through. What is absent is as the model says.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ImageRequest {
    /// Request id in the logs of all services.
    pub id: String,
    /// Model name; the first model for images if absent.
    pub model: Option<String>,
    /// Description of the image.
    pub prompt: String,
    /// Description of what it is to be unlike.
    pub negative_prompt: String,
    /// Width and height in pixels.
    pub size: Option<(u32, u32)>,
    /// Denoising steps.
    pub steps: Option<u32>,
    /// Weight of the prompt.
    pub guidance: Option<f32>,
    /// Seed of the noise; random if absent.
    pub seed: Option<u64>,
    /// Name of the sampler.
    pub sampler: Option<String>,
    /// Noise levels after Karras et al.
    pub karras: bool,
    /// The image to start from, in the pixels of `size`.
    pub init: Option<InitialPixels>,
    /// Previews to send meanwhile.
    pub previews: u32,
    /// Payload of the plain DCF task that asks for the same, where it came as one.
    pub plain: Option<Bytes>,
    /// The client that it comes from.
    pub origin: Origin,
    /// The key or token that it came with.
    pub holder: Option<Holder>,
}

/// An image to start from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct InitialPixels {
    /// Share of the steps that are run.
    pub strength: f32,
    /// A mask keeps some of it.
    pub masked: bool,
    /// As they travel: [`mesh_proto::InitialImage`].
    pub pixels: Bytes,
}

/// A finished image.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct MadeImage {
    pub model: String,
    pub png: Bytes,
    /// Pixels.
    pub width: u32,
    pub height: u32,
    pub steps: u32,
    pub seed: u64,
    /// Name of the worker that finished it.
    pub worker: String,
    /// Times that another worker went on with it.
    pub reruns: u32,
    /// Time from arrival to the end.
    pub total: Duration,
}

/// Tokens that a template puts into any prompt, and around each message, at most.
const TEMPLATE_TOKENS: usize = 4096;

const MESSAGE_TOKENS: usize = 64;

const ECHOED_TOKEN_BYTES: usize = 64;

/// Tokens of an answer of unknown length, for estimates.
const USUAL_ANSWER: u32 = 256;
