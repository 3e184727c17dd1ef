//! The trait every inference engine implements: a contiguous range of a model's layers.
//!
//! A whole model is the range `0..layers`. A stage that holds layer 0 takes tokens, any other takes hidden rows; a stage
//! that holds the last layer gives logits, any other gives hidden rows.
//!
//! **Rows are independent.** The values of an output row depend on the row itself and on the KV rows of its own slot, bit
//! for bit: not on which other rows share the step, how a prompt was cut into chunks, or how many threads ran. Recovery
//! relies on it: a stream that is run again elsewhere, prompt plus tokens so far, continues exactly as it would have. Stages on
//! a GPU cannot promise it to the last bit: there a stream that is run again may part at a near tie.

use std::ops::Range;

/// A KV cache slot: the cached keys and values of one sequence.
pub type SlotId = u32;

/// Dimensions of a model that callers of a stage need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelShape {
    /// Number of transformer layers in the whole model.
    pub layers: u32,
    /// Width of a hidden row.
    pub hidden: usize,
    /// Length of a logits row.
    pub vocab: usize,
    /// Key/value heads per layer.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
}

/// Shape, layers and limits of a loaded stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageInfo {
    /// Shape of the whole model.
    pub shape: ModelShape,
    /// The layers this stage runs.
    pub layers: Range<u32>,
    /// Number of KV slots; valid [`SlotId`]s are `0..slots`.
    pub slots: u32,
    /// Most tokens one slot can hold.
    pub context: u32,
    /// Most rows one [`Stage::forward`] call takes.
    pub max_rows: u32,
    /// Bytes of KV cache that one token takes in this stage.
    pub kv_bytes_per_token: u64,
    /// Bytes of packed weights held in memory.
    pub weight_bytes: u64,
}

impl StageInfo {
    /// True if this stage holds the first layer: its input is tokens.
    pub fn is_first(&self) -> bool {
        self.layers.start == 0
    }

    /// True if this stage holds the last layer: its output is logits.
    pub fn is_last(&self) -> bool {
        self.layers.end == self.shape.layers
    }
}

/// The rows of a segment that the last stage turns into logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitRows {
    /// None: a prompt chunk that is not the last one.
    None,
    /// The segment's last row.
    Last,
    /// Every row, for scoring and perplexity.
    All,
}

impl LogitRows {
    /// Number of rows, of `rows`, that become logits.
    pub fn count(self, rows: u32) -> u32 {
        match self {
            LogitRows::None => 0,
            LogitRows::Last => rows.min(1),
            LogitRows::All => rows,
        }
    }
}

/// Consecutive rows of one sequence within a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The slot whose KV cache the rows read and extend.
    pub slot: SlotId,
    /// Position of the first row; the slot must hold KV rows for `0..position`. Rows from `position` on are overwritten.
    pub position: u32,
    /// Number of rows, at least 1.
    pub rows: u32,
    /// The rows that become logits.
    pub logits: LogitRows,
}

/// Input of a step: the rows of all its segments, back to back.
#[derive(Debug, Clone, Copy)]
pub enum StageInput<'a> {
    /// Token ids, for a first stage.
    Tokens(&'a [u32]),
    /// Hidden rows, row-major `[rows, hidden]`, for any other stage.
    Hidden(&'a [f32]),
}

/// Output of a step, borrowed from the stage until the next call.
#[derive(Debug, Clone, Copy)]
pub enum StageOutput<'a> {
    /// Hidden rows, row-major `[rows, hidden]`, one per input row.
    Hidden(&'a [f32]),
    /// Logits, row-major `[n, vocab]`: the rows chosen by each segment's [`LogitRows`], in segment order.
    Logits(&'a [f32]),
}

/// One loaded range of layers with its KV cache.
///
/// Calls are synchronous and use the stage's own threads; a caller that must not block runs the stage on its own thread.
pub trait Stage: Send {
    /// Shape, layers and limits of this stage.
    fn info(&self) -> &StageInfo;

    /// Runs `segments` through the layers, extending each slot's KV cache by its rows. A slot appears at most once.
    fn forward(
        &mut self,
        segments: &[Segment],
        input: StageInput<'_>,
    ) -> Result<StageOutput<'_>, StageError>;

    /// Number of KV rows that `slot` holds.
    fn kv_len(&self, slot: SlotId) -> u32;

    /// Forgets the KV rows of `slot` from `len` on; `0` also gives their memory back to the system.
    fn truncate(&mut self, slot: SlotId, len: u32);

    /// Copies the first `len` KV rows of `from` to `to`, which then holds exactly those.
    fn copy_prefix(&mut self, from: SlotId, to: SlotId, len: u32) -> Result<(), StageError>;

    /// The KV rows `rows` of `slot` over all layers, in this engine's own layout: `rows.len() * kv_bytes_per_token` bytes.
    fn kv_export(&self, slot: SlotId, rows: Range<u32>) -> Result<Vec<u8>, StageError>;

    /// Writes exported rows at `position`, which must not be past the slot's length; the slot then ends behind them.
    fn kv_import(&mut self, slot: SlotId, position: u32, bytes: &[u8]) -> Result<(), StageError>;
}

/// Errors of a stage's calls. The stage remains usable after any of them; the KV of the slots named in the
/// call is as before it, except after [`StageError::Backend`] and [`StageError::OutOfMemory`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum StageError {
    /// The slot does not exist.
    #[error("KV slot {slot} does not exist: this stage has {slots}")]
    NoSuchSlot { slot: SlotId, slots: u32 },
    /// A position beyond the cached rows.
    #[error("slot {slot} holds {held} KV rows, but the step starts at position {position}")]
    Gap {
        slot: SlotId,
        held: u32,
        position: u32,
    },
    /// More tokens than the slot's context.
    #[error("{needed} tokens do not fit the context of {context}")]
    ContextExceeded { needed: u64, context: u32 },
    /// A token id outside the vocabulary.
    #[error("token id {token} is outside the vocabulary of {vocab}")]
    NoSuchToken {
        token: u32,
        /// Number of tokens in the vocabulary.
        vocab: usize,
    },
    /// Input of the wrong kind or length, too many rows, a slot named twice.
    #[error("malformed step: {0}")]
    Malformed(String),
    /// The engine itself failed.
    #[error("{backend} failed: {message}")]
    Backend {
        backend: &'static str,
        message: String,
    },
    /// The engine's device has no memory left for the call. Other calls would fail, too: the model must be
    /// loaded anew with less of it there.
    #[error("{backend} has no memory left: {message}")]
    OutOfMemory {
        backend: &'static str,
        message: String,
    },
}
