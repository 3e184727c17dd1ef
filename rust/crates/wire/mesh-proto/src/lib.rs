//! Protobuf bodies of the mesh's internal DCF messages.
//!
//! Field numbers are never reused; unknown fields are ignored, so that heads and workers of neighbouring versions talk.
//! docs/reference/protocol.md lists the body of each DCF type.

use prost::Message;

mod ring;
mod share;

pub use ring::*;
pub use share::*;

/// A worker's first message on its control stream (DCF 0x10).
#[derive(Clone, PartialEq, Message)]
pub struct Hello {
    /// Name that the node's configuration gives it. Heads take the name in its certificate instead; older ones show this one.
    #[prost(string, tag = "1")]
    pub node_name: String,
    /// Version of the worker's program.
    #[prost(string, tag = "2")]
    pub version: String,
    /// Models that the worker serves.
    #[prost(message, repeated, tag = "3")]
    pub models: Vec<ModelCard>,
    /// Protocol version; [`PROTOCOL_VERSION`] here.
    #[prost(uint32, tag = "4")]
    pub protocol: u32,
    /// Purposes that the node is reserved for (`chat`, `embeddings`, `images`); empty allows all.
    #[prost(string, repeated, tag = "5")]
    pub reserved_for: Vec<String>,
    /// Random number of this process. It distinguishes a worker that reconnects from another one with a copy
    /// of its identity; 0 is unknown.
    #[prost(fixed64, tag = "6")]
    pub instance: u64,
    /// Host name of the machine, for messages.
    #[prost(string, tag = "7")]
    pub host: String,
    /// IP addresses of the machine, at which other workers may reach it.
    #[prost(string, repeated, tag = "8")]
    pub addresses: Vec<String>,
    /// The fields of [`Generate`] that the worker acts upon; [`REQUEST_REVISION`] here, 0 in workers before
    /// it was counted.
    #[prost(uint32, tag = "20")]
    pub request_revision: u32,
}

/// The nodes that an operator has expelled: all of them, in place of those that were named before. Sent after Welcome and
/// whenever the list changes.
#[derive(Clone, PartialEq, Message)]
pub struct Expelled {
    /// Expelled nodes.
    #[prost(message, repeated, tag = "1")]
    pub nodes: Vec<ExpelledNode>,
}

/// A node that was expelled from the mesh.
#[derive(Clone, PartialEq, Message)]
pub struct ExpelledNode {
    /// SHA-256 of its public key, lower-case hex.
    #[prost(string, tag = "1")]
    pub node_id: String,
    /// Name of the node, for messages.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Time of the expulsion, seconds since the Unix epoch.
    #[prost(uint64, tag = "3")]
    pub since: u64,
}

/// One model that a worker serves.
#[derive(Clone, PartialEq, Message)]
pub struct ModelCard {
    /// Name in the API.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Architecture as in the file (`llama`, `qwen2`, ...).
    #[prost(string, tag = "2")]
    pub architecture: String,
    /// SHA-256 over the file, lower-case hex: two workers with the same one are replicas.
    #[prost(string, tag = "3")]
    pub fingerprint: String,
    /// Most tokens of prompt and answer together.
    #[prost(uint32, tag = "4")]
    pub context: u32,
    /// Number of requests that it runs at once.
    #[prost(uint32, tag = "5")]
    pub slots: u32,
    /// Measured decode speed of one stream, tokens per second; 0 is unknown.
    #[prost(float, tag = "6")]
    pub decode_tps: f32,
    /// Measured prefill speed, tokens per second; 0 is unknown.
    #[prost(float, tag = "7")]
    pub prefill_tps: f32,
    /// Bytes of the file.
    #[prost(uint64, tag = "8")]
    pub file_bytes: u64,
    /// Weight format of most bytes (`Q4_1`, ...).
    #[prost(string, tag = "9")]
    pub quantization: String,
    /// First layer held (with `layer_end`, the range of a stage).
    #[prost(uint32, tag = "10")]
    pub layer_start: u32,
    /// One past the last layer held.
    #[prost(uint32, tag = "11")]
    pub layer_end: u32,
    /// Kind of output; a [`ModelKind`].
    #[prost(enumeration = "ModelKind", tag = "12")]
    pub kind: i32,
    /// Length of a vector, for models that make embeddings.
    #[prost(uint32, tag = "13")]
    pub dimensions: u32,
    /// For each byte, the length of the longest token that covers it: 256 numbers of a byte each, 0 where nothing is claimed. Empty
    /// where the tokenizer may lose text. So a head can tell that a text is far too long.
    #[prost(bytes = "vec", tag = "24")]
    pub byte_spans: Vec<u8>,
    /// The chat template writes all that users say, but for blanks around a message.
    #[prost(bool, tag = "25")]
    pub keeps_text: bool,
}

/// Kind of output of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum ModelKind {
    /// Text, asked for with [`Generate`].
    Chat = 0,
    /// Embeddings, asked for with [`Embed`].
    Embed = 1,
}

/// The head's answer to [`Hello`] (DCF 0x11).
#[derive(Clone, PartialEq, Message)]
pub struct Welcome {
    /// Name of the mesh.
    #[prost(string, tag = "1")]
    pub mesh: String,
    /// Seconds between two heartbeats.
    #[prost(float, tag = "2")]
    pub heartbeat_seconds: f32,
    /// UDP port for heartbeats.
    #[prost(uint32, tag = "3")]
    pub heartbeat_port: u32,
    /// Identifier of the session in sealed datagrams.
    #[prost(fixed64, tag = "4")]
    pub session: u64,
    /// Program version of the head.
    #[prost(string, tag = "5")]
    pub version: String,
}

/// Load and speed, sent sealed in every heartbeat and on the control stream when it changes (DCF 0x12).
#[derive(Clone, PartialEq, Message)]
pub struct Load {
    /// Number of requests that hold a slot.
    #[prost(uint32, tag = "1")]
    pub running: u32,
    /// Number of requests that wait for a slot.
    #[prost(uint32, tag = "2")]
    pub queued: u32,
    /// KV cache in use, tokens.
    #[prost(uint64, tag = "3")]
    pub kv_tokens_used: u64,
    /// Size of the KV cache, in tokens.
    #[prost(uint64, tag = "4")]
    pub kv_tokens_total: u64,
    /// Measured speeds, one entry per model.
    #[prost(message, repeated, tag = "5")]
    pub speeds: Vec<ModelSpeed>,
    /// The worker finishes running requests and accepts none.
    #[prost(bool, tag = "6")]
    pub draining: bool,
    /// Resident memory of the process, in bytes.
    #[prost(uint64, tag = "7")]
    pub resident_bytes: u64,
    /// Prompt tokens not yet prefilled, over all requests.
    #[prost(uint64, tag = "8")]
    pub prefill_backlog: u64,
}

/// Measured speeds of one model on one worker.
#[derive(Clone, PartialEq, Message)]
pub struct ModelSpeed {
    /// Name of the model.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Decode speed, tokens per second over all streams at the current batch.
    #[prost(float, tag = "2")]
    pub decode_tps: f32,
    /// Prefill speed, tokens per second.
    #[prost(float, tag = "3")]
    pub prefill_tps: f32,
    /// Requests for this model that wait for a slot or for memory; absent in messages of older workers.
    #[prost(uint32, optional, tag = "4")]
    pub queued: Option<u32>,
}

/// A request for text (DCF 0x20), head to worker, first message of its stream.
#[derive(Clone, PartialEq, Message)]
pub struct Generate {
    /// Request id, for logs of all services.
    #[prost(string, tag = "1")]
    pub request_id: String,
    /// Name of the model.
    #[prost(string, tag = "2")]
    pub model: String,
    /// Input of the model.
    #[prost(oneof = "Prompt", tags = "3, 4, 5")]
    pub prompt: Option<Prompt>,
    /// Sampling parameters and limits.
    #[prost(message, optional, tag = "6")]
    pub params: Option<GenerateParams>,
    /// Tokens already generated elsewhere. The answer continues after them; they are not sent again.
    #[prost(uint32, repeated, tag = "7")]
    pub generated: Vec<u32>,
    /// Bytes of answer text already sent to the client from `generated`.
    #[prost(uint64, tag = "8")]
    pub text_sent: u64,
    /// Time limit for the worker in milliseconds from now; 0 means unlimited.
    #[prost(uint64, tag = "9")]
    pub deadline_ms: u64,
    /// Send a [`Progress`] whenever nothing else was sent for this many milliseconds; 0 disables it.
    #[prost(uint32, tag = "15")]
    pub progress_ms: u32,
    /// Requests share cached rows of prompts only with requests of the same salt, which reveals nothing about
    /// its owner. 0 is the salt of all requests whose head sends none.
    #[prost(fixed64, tag = "24")]
    pub cache_salt: u64,
}

/// A request is alive (DCF 0x26), worker to head, on the stream of a [`Generate`] or an [`Embed`] that asks for it.
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
    /// Computing the next token.
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

/// Chat messages and template variables.
#[derive(Clone, PartialEq, Message)]
pub struct Chat {
    /// Messages in the order of the conversation.
    #[prost(message, repeated, tag = "1")]
    pub messages: Vec<ChatMessage>,
    /// Continue the last message instead of beginning a new one. Revision 1.
    #[prost(bool, tag = "20")]
    pub continue_final_message: bool,
    /// Leave out the beginning of the assistant's turn. Revision 1.
    #[prost(bool, tag = "21")]
    pub no_generation_prompt: bool,
    /// More variables for the template: a JSON object, or empty. Revision 1.
    #[prost(string, tag = "22")]
    pub template_variables: String,
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

/// One message of a conversation.
#[derive(Clone, PartialEq, Message)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    #[prost(string, tag = "1")]
    pub role: String,
    /// Text of the message.
    #[prost(string, tag = "2")]
    pub content: String,
}

/// A list of token ids.
#[derive(Clone, PartialEq, Message)]
pub struct TokenList {
    /// Token ids of the model's vocabulary.
    #[prost(uint32, repeated, tag = "1")]
    pub tokens: Vec<u32>,
}

/// Sampling and limits. An absent field means the worker's default for the model.
#[derive(Clone, PartialEq, Message)]
pub struct GenerateParams {
    /// Maximum number of new tokens, `generated` included.
    #[prost(uint32, optional, tag = "1")]
    pub max_tokens: Option<u32>,
    /// Sampling temperature; 0 selects the most likely token.
    #[prost(float, optional, tag = "2")]
    pub temperature: Option<f32>,
    /// Nucleus sampling: smallest set of tokens with this total probability.
    #[prost(float, optional, tag = "3")]
    pub top_p: Option<f32>,
    /// Number of most likely tokens to sample from; 0 uses all.
    #[prost(uint32, optional, tag = "4")]
    pub top_k: Option<u32>,
    /// Minimum probability relative to the most likely token.
    #[prost(float, optional, tag = "5")]
    pub min_p: Option<f32>,
    /// Multiplicative penalty for repeated tokens; 1 disables it.
    #[prost(float, optional, tag = "6")]
    pub repetition_penalty: Option<f32>,
    /// Additive penalty for tokens that occurred at least once.
    #[prost(float, optional, tag = "7")]
    pub presence_penalty: Option<f32>,
    /// Additive penalty per occurrence of a token.
    #[prost(float, optional, tag = "8")]
    pub frequency_penalty: Option<f32>,
    /// Seed; the head sets one for every request so that a rerun draws the same.
    #[prost(uint64, optional, tag = "9")]
    pub seed: Option<u64>,
    /// Texts that end the answer and are not part of it.
    #[prost(string, repeated, tag = "10")]
    pub stop: Vec<String>,
    /// Number of alternatives to report per token; absent disables log probabilities.
    #[prost(uint32, optional, tag = "11")]
    pub logprobs: Option<u32>,
    /// Additions to the logits of single tokens.
    #[prost(message, repeated, tag = "12")]
    pub logit_bias: Vec<LogitBias>,
    /// Continue past the end-of-sequence token (for measurements).
    #[prost(bool, tag = "13")]
    pub ignore_eos: bool,
    /// Put the prompt before the answer (`/v1/completions` with `echo`).
    #[prost(bool, tag = "14")]
    pub echo: bool,
    /// Token ids that end the answer, besides the model's own. Revision 1.
    #[prost(uint32, repeated, tag = "20")]
    pub stop_token_ids: Vec<u32>,
    /// Minimum number of tokens before the answer may end. Revision 1.
    #[prost(uint32, tag = "21")]
    pub min_tokens: u32,
}

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
        u32::from(self.min_tokens > 0 || !self.stop_token_ids.is_empty())
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

/// An addition to one token's logit.
#[derive(Clone, PartialEq, Message)]
pub struct LogitBias {
    /// Token id that the bias applies to.
    #[prost(uint32, tag = "1")]
    pub token: u32,
    /// Added to its logit; -100 bans, 100 forces.
    #[prost(float, tag = "2")]
    pub bias: f32,
}

/// New tokens of an answer (DCF 0x21), worker to head.
#[derive(Clone, PartialEq, Message)]
pub struct Tokens {
    /// Index of the first token here in the whole answer, `Generate::generated` included.
    #[prost(uint32, tag = "1")]
    pub index: u32,
    /// Ids of the new tokens.
    #[prost(uint32, repeated, tag = "2")]
    pub tokens: Vec<u32>,
    /// New text, whole characters only; may be empty while a character or a possible stop text is incomplete.
    #[prost(string, tag = "3")]
    pub text: String,
    /// Log probabilities, one entry per token when asked for.
    #[prost(message, repeated, tag = "4")]
    pub logprobs: Vec<TokenLogprob>,
}

/// Log probability of a chosen token and its likeliest alternatives.
#[derive(Clone, PartialEq, Message)]
pub struct TokenLogprob {
    /// Id of the token.
    #[prost(uint32, tag = "1")]
    pub token: u32,
    /// Bytes of the token, possibly part of a character.
    #[prost(bytes = "vec", tag = "2")]
    pub bytes: Vec<u8>,
    /// Natural logarithm of the token's probability.
    #[prost(float, tag = "3")]
    pub logprob: f32,
    /// Most likely alternatives, in descending order.
    #[prost(message, repeated, tag = "4")]
    pub top: Vec<TokenLogprob>,
}

/// The end of an answer (DCF 0x22), worker to head.
#[derive(Clone, PartialEq, Message)]
pub struct Done {
    /// Cause of the end; a [`FinishReason`].
    #[prost(enumeration = "FinishReason", tag = "1")]
    pub finish: i32,
    /// Tokens of the prompt.
    #[prost(uint32, tag = "2")]
    pub prompt_tokens: u32,
    /// Tokens of the answer, `Generate::generated` included.
    #[prost(uint32, tag = "3")]
    pub completion_tokens: u32,
    /// Prompt tokens found in the KV cache.
    #[prost(uint32, tag = "4")]
    pub cached_tokens: u32,
    /// Microseconds from arrival to the first token.
    #[prost(uint64, tag = "5")]
    pub first_token_us: u64,
    /// Microseconds from arrival to the end.
    #[prost(uint64, tag = "6")]
    pub total_us: u64,
    /// Text that was held back and is now certain.
    #[prost(string, tag = "7")]
    pub text: String,
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

/// Texts to embed (DCF 0x24), head to worker, first message of its stream. Answered by one [`Embeddings`] or an Error.
#[derive(Clone, PartialEq, Message)]
pub struct Embed {
    /// Request id, for logs of all services.
    #[prost(string, tag = "1")]
    pub request_id: String,
    /// Name of the model.
    #[prost(string, tag = "2")]
    pub model: String,
    /// Texts to embed, one vector each.
    #[prost(message, repeated, tag = "3")]
    pub inputs: Vec<EmbedInput>,
    /// Name of the prompt that the model puts in front of texts (`query`, `passage`); empty is its default.
    #[prost(string, tag = "4")]
    pub prompt_name: String,
    /// Truncate vectors to this length and scale them to length 1 again; 0 keeps all dimensions.
    #[prost(uint32, tag = "5")]
    pub dimensions: u32,
    /// Milliseconds the worker may spend from now; 0 is without limit.
    #[prost(uint64, tag = "6")]
    pub deadline_ms: u64,
    /// Interval of progress reports, as in [`Generate::progress_ms`].
    #[prost(uint32, tag = "7")]
    pub progress_ms: u32,
}

/// One text to embed.
#[derive(Clone, PartialEq, Message)]
pub struct EmbedInput {
    /// The text itself or its tokens.
    #[prost(oneof = "EmbedText", tags = "1, 2")]
    pub text: Option<EmbedText>,
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

/// The vectors of all texts of an [`Embed`] (DCF 0x25), worker to head.
#[derive(Clone, PartialEq, Message)]
pub struct Embeddings {
    /// Length of one vector.
    #[prost(uint32, tag = "1")]
    pub dimensions: u32,
    /// f32, little-endian, vector after vector in the order of the texts.
    #[prost(bytes = "bytes", tag = "2")]
    pub vectors: prost::bytes::Bytes,
    /// Tokens of each text that the model saw.
    #[prost(uint32, repeated, tag = "3")]
    pub tokens: Vec<u32>,
    /// Microseconds from arrival to the answer.
    #[prost(uint64, tag = "4")]
    pub total_us: u64,
}

/// Asks to join (DCF 0x30), on a connection that is authenticated by the token's pin only.
#[derive(Clone, PartialEq, Message)]
pub struct JoinRequest {
    /// Public part of the token.
    #[prost(string, tag = "1")]
    pub token_id: String,
    /// Secret part of the token.
    #[prost(bytes = "vec", tag = "2")]
    pub token_secret: Vec<u8>,
    /// PKCS#10 request for the node's own key, DER.
    #[prost(bytes = "vec", tag = "3")]
    pub csr: Vec<u8>,
    /// Name of the node.
    #[prost(string, tag = "4")]
    pub node_name: String,
}

/// The answer to [`JoinRequest`] (DCF 0x31).
#[derive(Clone, PartialEq, Message)]
pub struct JoinResponse {
    /// Certificate for the node, then the mesh root, DER.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub certificates: Vec<Vec<u8>>,
    /// Name of the mesh.
    #[prost(string, tag = "2")]
    pub mesh: String,
}

/// Asks for a fresh certificate before the old one ends (DCF 0x32), on an authenticated link; answered by 0x31.
#[derive(Clone, PartialEq, Message)]
pub struct RenewRequest {
    /// PKCS#10 request for the same key, DER.
    #[prost(bytes = "vec", tag = "1")]
    pub csr: Vec<u8>,
}

/// Version of the internal messages.
pub const PROTOCOL_VERSION: u32 = 1;

/// Counts additions to [`Generate`] that change an answer: a worker that ignores them would give another one. 1 added the options of
/// [`Chat`], [`GenerateParams::stop_token_ids`] and [`GenerateParams::min_tokens`].
pub const REQUEST_REVISION: u32 = 1;

/// The fields of revision 1, as clients call them.
pub const REVISED_FIELDS: &str = "chat_template_kwargs, continue_final_message, add_generation_prompt, min_tokens and stop_token_ids";
