//! BERT-family encoders on ONNX Runtime.
//!
//! ```text
//! tokens i32 [rows] ─ Embed ─ Attention 0 ─ FeedForward 0 ─ …
//!   … ─ FeedForward n ─ Pool ─ vectors f32 [sequences, hidden]
//! ```
//!
//! As for stages, the nodes are custom operators over `mesh-kernels` and the graph is built in memory.
//! Sequences of any lengths lie side by side, so nothing is padded; weights are f32 (or f16 and bf16 where
//! the file has those) and so is the arithmetic.

mod operators;
mod weights;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_engine::{Encoder, EncoderInfo, StageError};
use mesh_kernels::{Pool, Reclaim, in_background};
use mesh_model::EncoderModel;
use mesh_model::encoder::{EncoderConfig, Sentences};
use ort::session::Session;
use ort::value::TensorRef;

use crate::graph;
use crate::node::{DOMAIN, INPUT, OUTPUT, chain, domain};
use crate::onnx::{Dim, ElementType, ModelProto, ValueInfo};
use crate::options::{LoadError, OrtOptions};
use crate::runtime;
use operators::EncoderNode;
use weights::EncoderWeights;

const BACKEND: &str = "ONNX Runtime";

/// A whole embedding model on ONNX Runtime.
pub struct OrtEncoder {
    info: EncoderInfo,
    shared: Arc<EncoderContext>,
    session: Session,
    tokens: Vec<i32>,
    _reclaim: Reclaim,
}

/// State that the operators share with the encoder.
pub(crate) struct EncoderContext {
    pub(crate) config: EncoderConfig,
    pub(crate) sentences: Sentences,
    pub(crate) weights: EncoderWeights,
    pub(crate) pool: Pool,
    pub(crate) step: Mutex<EncoderStep>,
}

/// The call that is running, and the memory that it works in.
#[derive(Default)]
pub(crate) struct EncoderStep {
    /// Rows of each sequence.
    pub(crate) lengths: Vec<usize>,
    pub(crate) rows: usize,
    pub(crate) qkv: Vec<f32>,
    pub(crate) attended: Vec<f32>,
    pub(crate) middle: Vec<f32>,
}

impl EncoderContext {
    pub(crate) fn step(&self) -> MutexGuard<'_, EncoderStep> {
        // A panic inside a node is turned into an error there; the step is rewritten before the next run.
        self.step.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OrtEncoder {
    /// Loads `model`: packs its weights and builds the session. Of `options` the library, the threads and the
    /// most rows of a batch count.
    ///
    /// # Errors
    /// If ONNX Runtime is not there, or a tensor is missing or has another shape than the configuration says.
    pub fn load(model: &EncoderModel, options: &OrtOptions) -> Result<OrtEncoder, LoadError> {
        let environment = runtime::environment(options.library.as_deref())?;
        let threads = options.thread_count();
        let weights = in_background(threads, |pool| EncoderWeights::load(model, pool))?;
        let pool = Pool::new(threads);
        let config = model.config().clone();
        let sentences = model.sentences().clone();
        let info = EncoderInfo {
            dimensions: config.hidden,
            max_tokens: sentences.max_tokens,
            vocab: config.vocab,
            max_rows: (options.max_rows as usize).max(1),
            weight_bytes: weights.bytes(),
        };
        let shared = Arc::new(EncoderContext {
            config,
            sentences,
            weights,
            pool,
            step: Mutex::default(),
        });
        let domain = domain::<EncoderNode>(&shared)?;
        let session = graph::commit(&environment, domain, &network(&shared.config).encode())?;
        Ok(OrtEncoder {
            info,
            shared,
            session,
            tokens: Vec::new(),
            _reclaim: Reclaim,
        })
    }

    fn check(&self, sequences: &[&[u32]]) -> Result<(), StageError> {
        for sequence in sequences {
            if sequence.is_empty() {
                return Err(StageError::Malformed("a sequence is empty".into()));
            }
            if sequence.len() > self.info.max_tokens {
                return Err(StageError::ContextExceeded {
                    needed: sequence.len() as u64,
                    context: u32::try_from(self.info.max_tokens).unwrap_or(u32::MAX),
                });
            }
            let vocab = self.info.vocab;
            if let Some(&token) = sequence.iter().find(|&&token| token as usize >= vocab) {
                return Err(StageError::NoSuchToken { token, vocab });
            }
        }
        let rows: usize = sequences.iter().map(|sequence| sequence.len()).sum();
        if sequences.len() > 1 && rows > self.info.max_rows.max(self.info.max_tokens) {
            return Err(StageError::Malformed(format!(
                "{rows} tokens are more than the {} of a batch",
                self.info.max_rows
            )));
        }
        Ok(())
    }

    fn run(&mut self, sequences: &[&[u32]]) -> ort::Result<Vec<f32>> {
        let tokens = sequences.iter().copied().flatten();
        self.tokens.clear();
        self.tokens.extend(tokens.map(|&token| token as i32));
        {
            let mut step = self.shared.step();
            step.lengths.clear();
            step.lengths.extend(sequences.iter().map(|s| s.len()));
            step.rows = self.tokens.len();
        }
        let tensor = TensorRef::from_array_view(([self.tokens.len()], self.tokens.as_slice()))?;
        let mut outputs = self.session.run(ort::inputs![INPUT => tensor])?;
        let output = outputs
            .remove(OUTPUT)
            .ok_or_else(|| ort::Error::new("the session gave no output"))?;
        let (_, numbers) = output.try_extract_tensor::<f32>()?;
        Ok(numbers.to_vec())
    }
}

impl Encoder for OrtEncoder {
    fn info(&self) -> &EncoderInfo {
        &self.info
    }

    fn encode(&mut self, sequences: &[&[u32]]) -> Result<Vec<f32>, StageError> {
        self.check(sequences)?;
        if sequences.is_empty() {
            return Ok(Vec::new());
        }
        self.run(sequences).map_err(|error| StageError::Backend {
            backend: BACKEND,
            message: error.to_string(),
        })
    }
}

fn network(config: &EncoderConfig) -> ModelProto<'static> {
    let mut plan = vec![(EncoderNode::Embed, 0)];
    for layer in 0..config.layers {
        plan.push((EncoderNode::Attention, layer));
        plan.push((EncoderNode::FeedForward, layer));
    }
    plan.push((EncoderNode::Pool, 0));
    ModelProto {
        opsets: &[("", 21), (DOMAIN, 1)],
        nodes: chain(&plan, 0),
        initializers: Vec::new(),
        inputs: vec![ValueInfo {
            name: INPUT.to_owned(),
            element: ElementType::I32,
            dims: vec![Dim::Named("rows")],
        }],
        outputs: vec![ValueInfo {
            name: OUTPUT.to_owned(),
            element: ElementType::F32,
            dims: vec![Dim::Named("sequences"), Dim::Fixed(config.hidden)],
        }],
    }
}
