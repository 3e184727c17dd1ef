//! Protobuf bodies of the mesh's internal DCF messages.
//!
//! Field numbers are never reused; unknown fields are ignored, so that heads and workers of neighbouring versions talk.
//! docs/reference/protocol.md lists the body of each DCF type.

use prost::Message;

/// Messages: each field with its type in Rust, and its type and number in protobuf.
macro_rules! messages {
    ($($(#[$doc:meta])* pub struct $name:ident { $($(#[$about:meta])* $field:ident: $type:ty = [$($wire:tt)*],)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Message)]
        pub struct $name {
            $($(#[$about])* #[prost($($wire)*)] pub $field: $type,)*
        }
    )*};
}

mod client;
mod evidence;
mod gossip;
mod identity;
mod image;
mod ring;
mod share;

pub use client::{ClientHello, ClientWelcome};
pub use evidence::{Evidence, NixSystem, PcrValue, ServedFingerprint, SignedEvidence, TpmQuote};
pub use gossip::{
    GossipBody, GossipContent, GossipFrame, GossipIdentities, GossipPulse, GossipRecord,
    GossipSighting, GossipSwim, GossipSync,
};
pub use identity::{
    IdentityDocument, IdentityProof, IntermediatePapers, IntermediateRequest,
    IntermediateStatement, RootHistory, RootIdentity, RootSuccession, SignedIdentity,
    SignedIntermediate, SignedSuccession, StoredIdentity,
};
pub use image::{
    IMAGE_PART, ImageCard, ImageData, ImageStep, ImageTask, InitialImage, PREVIEW_SHARE,
    image_file_bytes, image_state_bytes, initial_image_bytes, part_cards, preview_bytes,
    preview_is_due,
};
pub use ring::*;
pub use share::*;

messages! {
    /// A worker's first message on its control stream (DCF 0x10).
    pub struct Hello {
        /// Name that the node's configuration gives it. Heads take the name in its certificate instead; older ones show this one.
        node_name: String = [string, tag = 1],
        /// Version of the worker's program.
        version: String = [string, tag = 2],
        /// Models that the worker serves.
        models: Vec<ModelCard> = [message, repeated, tag = 3],
        /// Protocol version; [`PROTOCOL_VERSION`] here.
        protocol: u32 = [uint32, tag = 4],
        /// Purposes that the node is reserved for (`chat`, `embeddings`, `images`); empty allows all.
        reserved_for: Vec<String> = [string, repeated, tag = 5],
        /// Random number of this process. It distinguishes a worker that reconnects from another one with a copy
        /// of its identity; 0 is unknown.
        instance: u64 = [fixed64, tag = 6],
        /// Host name of the machine, for messages.
        host: String = [string, tag = 7],
        /// IP addresses of the machine, at which other workers may reach it.
        addresses: Vec<String> = [string, repeated, tag = 8],
        /// The fields of [`Generate`] that the worker acts upon; [`REQUEST_REVISION`] here, 0 in workers before
        /// it was counted.
        request_revision: u32 = [uint32, tag = 20],
        /// Models that make images: see [`Hello::all_models`].
        image_models: Vec<ModelCard> = [message, repeated, tag = 21],
        /// Evidence of the node; absent from nodes of earlier versions.
        evidence: Option<SignedEvidence> = [message, optional, tag = 30],
    }

    /// The nodes that an operator has expelled: all of them, in place of those that were named before. Sent after Welcome and
    /// whenever the list changes.
    pub struct Expelled {
        /// Expelled nodes.
        nodes: Vec<ExpelledNode> = [message, repeated, tag = 1],
    }

    /// A node that was expelled from the mesh.
    pub struct ExpelledNode {
        /// SHA-256 of its public key, lower-case hex.
        node_id: String = [string, tag = 1],
        /// Name of the node, for messages.
        name: String = [string, tag = 2],
        /// Time of the expulsion, seconds since the Unix epoch.
        since: u64 = [uint64, tag = 3],
    }

    /// One model that a worker serves.
    pub struct ModelCard {
        /// Name in the API.
        name: String = [string, tag = 1],
        /// Architecture as in the file (`llama`, `qwen2`, ...).
        architecture: String = [string, tag = 2],
        /// SHA-256 over the file, lower-case hex: two workers with the same one are replicas.
        fingerprint: String = [string, tag = 3],
        /// Most tokens of prompt and answer together.
        context: u32 = [uint32, tag = 4],
        /// Number of requests that it runs at once.
        slots: u32 = [uint32, tag = 5],
        /// Measured decode speed of one stream, tokens per second; 0 is unknown.
        decode_tps: f32 = [float, tag = 6],
        /// Measured prefill speed, tokens per second; 0 is unknown.
        prefill_tps: f32 = [float, tag = 7],
        /// Bytes of the file.
        file_bytes: u64 = [uint64, tag = 8],
        /// Weight format of most bytes (`Q4_1`, ...).
        quantization: String = [string, tag = 9],
        /// First layer held (with `layer_end`, the range of a stage).
        layer_start: u32 = [uint32, tag = 10],
        /// One past the last layer held.
        layer_end: u32 = [uint32, tag = 11],
        /// Kind of output; a [`ModelKind`].
        kind: i32 = [enumeration = "ModelKind", tag = 12],
        /// Length of a vector, for models that make embeddings.
        dimensions: u32 = [uint32, tag = 13],
        /// For each byte, the length of the longest token that covers it: 256 numbers of a byte each, 0 where nothing is claimed. Empty
        /// where the tokenizer may lose text. So a head can tell that a text is far too long.
        byte_spans: Vec<u8> = [bytes = "vec", tag = 24],
        /// The chat template writes all that users say, but for blanks around a message.
        keeps_text: bool = [bool, tag = 25],
        /// Sizes and defaults of a model that makes images.
        image: Option<ImageCard> = [message, optional, tag = 26],
        /// Device that computes it (`cpu`, `cuda`, `migraphx`, `webgpu`); empty in messages of older workers.
        backend: String = [string, tag = 28],
        /// Division of its layers between a GPU and the CPU, if any of them is on a GPU.
        split: Option<DeviceSplit> = [message, optional, tag = 29],
    }

    /// The layers of a model on a GPU and on the CPU beside it.
    pub struct DeviceSplit {
        /// Layers on the GPU, the first ones.
        device_layers: u32 = [uint32, tag = 1],
        /// Layers among those whose experts the CPU computes.
        expert_layers: u32 = [uint32, tag = 2],
        /// Layers on the CPU.
        cpu_layers: u32 = [uint32, tag = 3],
        /// Bytes of weights and KV cache on the GPU when the model was loaded.
        device_bytes: u64 = [uint64, tag = 4],
        /// Bytes of weights on the CPU.
        cpu_bytes: u64 = [uint64, tag = 5],
    }
}

/// Kind of output of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum ModelKind {
    /// Text, asked for with [`Generate`].
    Chat = 0,
    /// Embeddings, asked for with [`Embed`].
    Embed = 1,
    /// Images, asked for with [`ImageTask`].
    Image = 2,
}

messages! {
    /// The head's answer to [`Hello`] (DCF 0x11).
    pub struct Welcome {
        /// Name of the mesh.
        mesh: String = [string, tag = 1],
        /// Seconds between two heartbeats.
        heartbeat_seconds: f32 = [float, tag = 2],
        /// UDP port for heartbeats.
        heartbeat_port: u32 = [uint32, tag = 3],
        /// Identifier of the session in sealed datagrams.
        session: u64 = [fixed64, tag = 4],
        /// Program version of the head.
        version: String = [string, tag = 5],
    }

    /// Load and speed, sent sealed in every heartbeat and on the control stream when it changes (DCF 0x12).
    pub struct Load {
        /// Number of requests that hold a slot.
        running: u32 = [uint32, tag = 1],
        /// Number of requests that wait for a slot.
        queued: u32 = [uint32, tag = 2],
        /// KV cache in use, tokens.
        kv_tokens_used: u64 = [uint64, tag = 3],
        /// Size of the KV cache, in tokens.
        kv_tokens_total: u64 = [uint64, tag = 4],
        /// Measured speeds, one entry per model.
        speeds: Vec<ModelSpeed> = [message, repeated, tag = 5],
        /// The worker finishes running requests and accepts none.
        draining: bool = [bool, tag = 6],
        /// Resident memory of the process, in bytes.
        resident_bytes: u64 = [uint64, tag = 7],
        /// Prompt tokens not yet prefilled, over all requests.
        prefill_backlog: u64 = [uint64, tag = 8],
    }

    /// Measured speeds of one model on one worker.
    pub struct ModelSpeed {
        /// Name of the model.
        name: String = [string, tag = 1],
        /// Decode speed, tokens per second over all streams at the current batch.
        decode_tps: f32 = [float, tag = 2],
        /// Prefill speed, tokens per second.
        prefill_tps: f32 = [float, tag = 3],
        /// Requests for this model that wait for a slot or for memory; absent in messages of older workers.
        queued: Option<u32> = [uint32, optional, tag = 4],
    }

    /// A request for text (DCF 0x20), head to worker, first message of its stream.
    pub struct Generate {
        /// Request id, for logs of all services.
        request_id: String = [string, tag = 1],
        /// Name of the model.
        model: String = [string, tag = 2],
        /// Input of the model.
        prompt: Option<Prompt> = [oneof = "Prompt", tags = "3, 4, 5"],
        /// Sampling parameters and limits.
        params: Option<GenerateParams> = [message, optional, tag = 6],
        /// Tokens already generated elsewhere. The answer continues after them; they are not sent again.
        generated: Vec<u32> = [uint32, repeated, tag = 7],
        /// Bytes of answer text already sent to the client from `generated`.
        text_sent: u64 = [uint64, tag = 8],
        /// Time limit for the worker in milliseconds from now; 0 means unlimited.
        deadline_ms: u64 = [uint64, tag = 9],
        /// Send a [`Progress`] whenever nothing else was sent for this many milliseconds; 0 disables it.
        progress_ms: u32 = [uint32, tag = 15],
        /// Requests share cached rows of prompts only with requests of the same salt, which reveals nothing about
        /// its owner. 0 is the salt of all requests whose head sends none.
        cache_salt: u64 = [fixed64, tag = 24],
    }
}

/// A request is alive (DCF 0x26), worker to head, on the stream of a [`Generate`], an [`Embed`] or an
/// [`ImageTask`] that asks for it.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Progress {
    /// Cause of the request's wait; a [`RequestPhase`].
    #[prost(enumeration = "RequestPhase", tag = "1")]
    pub phase: i32,
    /// While queued: number of requests ahead of it.
    #[prost(uint32, tag = "2")]
    pub position: u32,
    /// Tokens of the prompt; 0 is unknown.
    #[prost(uint32, tag = "3")]
    pub prompt_tokens: u32,
    /// Tokens of the prompt whose KV rows are computed.
    #[prost(uint32, tag = "4")]
    pub prompt_done: u32,
    /// Milliseconds since the engine last completed a step. The engine measures this, so that a hung engine
    /// in a live process is noticed.
    #[prost(uint64, tag = "5")]
    pub quiet_ms: u64,
}

/// The cause of a request's wait at its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum RequestPhase {
    /// Unset.
    Unspecified = 0,
    /// Rendering the chat template and tokenizing.
    Preparing = 1,
    /// Waiting for a slot or KV memory.
    Queued = 2,
    /// Computing the rows of the prompt.
    Prefilling = 3,
    /// Computing the next token, or the next step of an image.
    Decoding = 4,
}

/// Input of a generating model.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Prompt {
    /// Text to complete as it is.
    #[prost(string, tag = "3")]
    Text(String),
    /// Chat messages, rendered with the model's template.
    #[prost(message, tag = "4")]
    Chat(Chat),
    /// Token ids, passed to the model without tokenizing.
    #[prost(message, tag = "5")]
    Tokens(TokenList),
}

messages! {
    /// Chat messages and template variables.
    pub struct Chat {
        /// Messages in the order of the conversation.
        messages: Vec<ChatMessage> = [message, repeated, tag = 1],
        /// Continue the last message instead of beginning a new one. Revision 1.
        continue_final_message: bool = [bool, tag = 20],
        /// Leave out the beginning of the assistant's turn. Revision 1.
        no_generation_prompt: bool = [bool, tag = 21],
        /// More variables for the template: a JSON object, or empty. Revision 1.
        template_variables: String = [string, tag = 22],
    }
}

impl Chat {
    /// The texts that a template which keeps text ([`ModelCard::keeps_text`]) writes whole: what users say, without blanks around it.
    pub fn kept_texts(&self) -> impl Iterator<Item = &str> {
        let of_users = self
            .messages
            .iter()
            .filter(|message| message.role == "user");
        of_users.map(|message| message.content.trim())
    }
}

messages! {
    /// One message of a conversation.
    pub struct ChatMessage {
        /// `system`, `user` or `assistant`.
        role: String = [string, tag = 1],
        /// Text of the message.
        content: String = [string, tag = 2],
    }

    /// A list of token ids.
    pub struct TokenList {
        /// Token ids of the model's vocabulary.
        tokens: Vec<u32> = [uint32, repeated, tag = 1],
    }

    /// Sampling and limits. An absent field means the worker's default for the model.
    pub struct GenerateParams {
        /// Maximum number of new tokens, `generated` included.
        max_tokens: Option<u32> = [uint32, optional, tag = 1],
        /// Sampling temperature; 0 selects the most likely token.
        temperature: Option<f32> = [float, optional, tag = 2],
        /// Nucleus sampling: smallest set of tokens with this total probability.
        top_p: Option<f32> = [float, optional, tag = 3],
        /// Number of most likely tokens to sample from; 0 uses all.
        top_k: Option<u32> = [uint32, optional, tag = 4],
        /// Minimum probability relative to the most likely token.
        min_p: Option<f32> = [float, optional, tag = 5],
        /// Multiplicative penalty for repeated tokens; 1 disables it.
        repetition_penalty: Option<f32> = [float, optional, tag = 6],
        /// Additive penalty for tokens that occurred at least once.
        presence_penalty: Option<f32> = [float, optional, tag = 7],
        /// Additive penalty per occurrence of a token.
        frequency_penalty: Option<f32> = [float, optional, tag = 8],
        /// Seed; the head sets one for every request so that a rerun draws the same.
        seed: Option<u64> = [uint64, optional, tag = 9],
        /// Texts that end the answer and are not part of it.
        stop: Vec<String> = [string, repeated, tag = 10],
        /// Number of alternatives to report per token; absent disables log probabilities.
        logprobs: Option<u32> = [uint32, optional, tag = 11],
        /// Additions to the logits of single tokens.
        logit_bias: Vec<LogitBias> = [message, repeated, tag = 12],
        /// Continue past the end-of-sequence token (for measurements).
        ignore_eos: bool = [bool, tag = 13],
        /// Put the prompt before the answer (`/v1/completions` with `echo`).
        echo: bool = [bool, tag = 14],
        /// Token ids that end the answer, besides the model's own. Revision 1.
        stop_token_ids: Vec<u32> = [uint32, repeated, tag = 20],
        /// Minimum number of tokens before the answer may end. Revision 1.
        min_tokens: u32 = [uint32, tag = 21],
        /// The form of the answer. Revision 3.
        grammar: Option<Grammar> = [message, optional, tag = 22],
    }

    /// The form that an answer must have.
    pub struct Grammar {
        /// A [`GrammarKind`].
        kind: i32 = [enumeration = "GrammarKind", tag = 1],
        /// The schema, grammar or regular expression; empty for [`GrammarKind::JsonObject`].
        text: String = [string, tag = 2],
    }
}

/// How the text of a [`Grammar`] is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum GrammarKind {
    /// Unset.
    Unspecified = 0,
    /// Any JSON object.
    JsonObject = 1,
    /// A JSON Schema.
    JsonSchema = 2,
    /// A grammar in Lark's syntax with the rule `start`.
    Lark = 3,
    /// A regular expression for the whole answer.
    Regex = 4,
    /// A grammar in llama.cpp's GBNF with the rule `root`.
    Gbnf = 5,
}

/// Most bytes of a [`Grammar`]'s text.
pub const MOST_GRAMMAR_BYTES: usize = 256 << 10;

impl Generate {
    /// Lowest [`Hello::request_revision`] of a worker that supports all fields that this request uses.
    pub fn revision(&self) -> u32 {
        let params = self.params.as_ref().map_or(0, GenerateParams::revision);
        let prompt = self.prompt.as_ref().map_or(0, Prompt::revision);
        params.max(prompt)
    }
}

impl GenerateParams {
    /// Lowest revision that these fields need, as in [`Generate::revision`].
    pub fn revision(&self) -> u32 {
        match &self.grammar {
            Some(_) => 3,
            None => u32::from(self.min_tokens > 0 || !self.stop_token_ids.is_empty()),
        }
    }
}

impl Prompt {
    /// Lowest revision that these fields need, as in [`Generate::revision`].
    pub fn revision(&self) -> u32 {
        match self {
            Prompt::Chat(chat) => u32::from(
                chat.continue_final_message
                    || chat.no_generation_prompt
                    || !chat.template_variables.is_empty(),
            ),
            Prompt::Text(_) | Prompt::Tokens(_) => 0,
        }
    }
}

messages! {
    /// An addition to one token's logit.
    pub struct LogitBias {
        /// Token id that the bias applies to.
        token: u32 = [uint32, tag = 1],
        /// Added to its logit; -100 bans, 100 forces.
        bias: f32 = [float, tag = 2],
    }

    /// New tokens of an answer (DCF 0x21), worker to head.
    pub struct Tokens {
        /// Index of the first token here in the whole answer, `Generate::generated` included.
        index: u32 = [uint32, tag = 1],
        /// Ids of the new tokens.
        tokens: Vec<u32> = [uint32, repeated, tag = 2],
        /// New text, whole characters only; may be empty while a character or a possible stop text is incomplete.
        text: String = [string, tag = 3],
        /// Log probabilities, one entry per token when asked for.
        logprobs: Vec<TokenLogprob> = [message, repeated, tag = 4],
    }

    /// Log probability of a chosen token and its likeliest alternatives.
    pub struct TokenLogprob {
        /// Id of the token.
        token: u32 = [uint32, tag = 1],
        /// Bytes of the token, possibly part of a character.
        bytes: Vec<u8> = [bytes = "vec", tag = 2],
        /// Natural logarithm of the token's probability.
        logprob: f32 = [float, tag = 3],
        /// Most likely alternatives, in descending order.
        top: Vec<TokenLogprob> = [message, repeated, tag = 4],
    }

    /// The end of an answer (DCF 0x22), worker to head.
    pub struct Done {
        /// Cause of the end; a [`FinishReason`].
        finish: i32 = [enumeration = "FinishReason", tag = 1],
        /// Tokens of the prompt.
        prompt_tokens: u32 = [uint32, tag = 2],
        /// Tokens of the answer, `Generate::generated` included.
        completion_tokens: u32 = [uint32, tag = 3],
        /// Prompt tokens found in the KV cache.
        cached_tokens: u32 = [uint32, tag = 4],
        /// Microseconds from arrival to the first token.
        first_token_us: u64 = [uint64, tag = 5],
        /// Microseconds from arrival to the end.
        total_us: u64 = [uint64, tag = 6],
        /// Text that was held back and is now certain.
        text: String = [string, tag = 7],
    }
}

/// Cause of the end of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum FinishReason {
    /// Unset.
    Unspecified = 0,
    /// End-of-sequence token or a stop text.
    Stop = 1,
    /// `max_tokens` or the context was reached.
    Length = 2,
}

messages! {
    /// Texts to embed (DCF 0x24), head to worker, first message of its stream. Answered by one [`Embeddings`] or an Error.
    pub struct Embed {
        /// Request id, for logs of all services.
        request_id: String = [string, tag = 1],
        /// Name of the model.
        model: String = [string, tag = 2],
        /// Texts to embed, one vector each.
        inputs: Vec<EmbedInput> = [message, repeated, tag = 3],
        /// Name of the prompt that the model puts in front of texts (`query`, `passage`); empty is its default.
        prompt_name: String = [string, tag = 4],
        /// Truncate vectors to this length and scale them to length 1 again; 0 keeps all dimensions.
        dimensions: u32 = [uint32, tag = 5],
        /// Milliseconds the worker may spend from now; 0 is without limit.
        deadline_ms: u64 = [uint64, tag = 6],
        /// Interval of progress reports, as in [`Generate::progress_ms`].
        progress_ms: u32 = [uint32, tag = 7],
    }

    /// One text to embed.
    pub struct EmbedInput {
        /// The text itself or its tokens.
        text: Option<EmbedText> = [oneof = "EmbedText", tags = "1, 2"],
    }
}

/// A text in either form.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum EmbedText {
    /// Text that the worker tokenizes.
    #[prost(string, tag = "1")]
    Text(String),
    /// Token ids, passed to the model without tokenizing.
    #[prost(message, tag = "2")]
    Tokens(TokenList),
}

messages! {
    /// The vectors of all texts of an [`Embed`] (DCF 0x25), worker to head.
    pub struct Embeddings {
        /// Length of one vector.
        dimensions: u32 = [uint32, tag = 1],
        /// f32, little-endian, vector after vector in the order of the texts.
        vectors: prost::bytes::Bytes = [bytes = "bytes", tag = 2],
        /// Tokens of each text that the model saw.
        tokens: Vec<u32> = [uint32, repeated, tag = 3],
        /// Microseconds from arrival to the answer.
        total_us: u64 = [uint64, tag = 4],
    }

    /// Asks to join (DCF 0x30), on a connection that is authenticated by the token's pin only.
    pub struct JoinRequest {
        /// Public part of the token.
        token_id: String = [string, tag = 1],
        /// Secret part of the token.
        token_secret: Vec<u8> = [bytes = "vec", tag = 2],
        /// PKCS#10 request for the node's own key, DER.
        csr: Vec<u8> = [bytes = "vec", tag = 3],
        /// Name of the node.
        node_name: String = [string, tag = 4],
        /// Proof of the node's identity; absent from nodes of earlier versions.
        identity: Option<IdentityProof> = [message, optional, tag = 5],
        /// SHA-256 of the root that the token pins; empty from nodes of earlier versions.
        root: Vec<u8> = [bytes = "vec", tag = 15],
        /// Evidence of the node; absent from nodes of earlier versions.
        evidence: Option<SignedEvidence> = [message, optional, tag = 10],
    }

    /// The answer to [`JoinRequest`] (DCF 0x31).
    pub struct JoinResponse {
        /// Certificate for the node, then the mesh root, DER.
        certificates: Vec<Vec<u8>> = [bytes = "vec", repeated, tag = 1],
        /// Name of the mesh.
        mesh: String = [string, tag = 2],
        /// The node's identity document, a [`SignedIdentity`]; empty for a node that proved none.
        identity: Vec<u8> = [bytes = "vec", tag = 3],
        /// The ML-DSA key of the mesh root, which signed it.
        root: Option<RootIdentity> = [message, optional, tag = 4],
        /// While the mesh root is rotated: a certificate of the former root for the same key, DER, for peers
        /// that know that one only.
        former: Vec<u8> = [bytes = "vec", tag = 15],
        /// While the mesh root is rotated: the statement of both.
        succession: Option<SignedSuccession> = [message, optional, tag = 16],
    }

    /// Asks for a fresh certificate before the old one ends (DCF 0x32), on an authenticated link; answered by 0x31.
    pub struct RenewRequest {
        /// PKCS#10 request, DER: for the same key, or for another one with a proof of the same identity.
        csr: Vec<u8> = [bytes = "vec", tag = 1],
        /// Proof of the identity in the certificate, or of the first one that the node has.
        identity: Option<IdentityProof> = [message, optional, tag = 2],
        /// Proof of the identity that takes its place, if the node's key is rotated.
        successor: Option<IdentityProof> = [message, optional, tag = 3],
        /// SHA-256 of the newest root that the node knows; empty from nodes of earlier versions.
        root: Vec<u8> = [bytes = "vec", tag = 15],
        /// Evidence of the node; absent from nodes of earlier versions.
        evidence: Option<SignedEvidence> = [message, optional, tag = 10],
    }
}

/// Version of the internal messages.
pub const PROTOCOL_VERSION: u32 = 1;

/// Counts additions to requests that change an answer: a worker that ignores them would give another one. 1
/// added the options of [`Chat`], [`GenerateParams::stop_token_ids`] and [`GenerateParams::min_tokens`], 2
/// added [`ImageTask::init`], 3 added [`GenerateParams::grammar`].
pub const REQUEST_REVISION: u32 = 3;

/// The fields of these revisions, as clients call them.
pub const REVISED_FIELDS: &str = "chat_template_kwargs, continue_final_message, add_generation_prompt, min_tokens and stop_token_ids, \
    the image to edit, or response_format";
