//! The stage: validates a step, hands it to ONNX Runtime, keeps the KV cache.

use std::ops::Range;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use mesh_engine::{
    ModelShape, Segment, SlotId, Stage, StageError, StageInfo, StageInput, StageOutput,
};
use mesh_kernels::{KernelError, KvShape, Pool, Reclaim, in_background};
use mesh_model::Model;
use ort::session::Session;
use ort::value::{DynValue, TensorRef};

use crate::check;
use crate::graph;
use crate::kv::Kv;
use crate::node::{INPUT, OUTPUT};
use crate::options::{LoadError, OrtOptions, suited_kv};
use crate::runtime;
use crate::shared::{StageContext, StageStep};
use crate::size::pack_options;
use crate::weights::StageWeights;

const BACKEND: &str = "ONNX Runtime";

/// A range of layers on ONNX Runtime's CPU provider, with our kernels as operators. See the crate's page.
pub struct OrtStage {
    info: StageInfo,
    shared: Arc<StageContext>,
    session: Session,
    /// The last step's output, which callers borrow.
    output: Option<DynValue>,
    tokens: Vec<i32>,
    _reclaim: Reclaim,
}

impl OrtStage {
    /// Loads `layers` of `model`: packs its weights, reserves the KV cache and builds the session.
    pub fn load(
        model: &Model,
        layers: Range<u32>,
        options: OrtOptions,
    ) -> Result<OrtStage, LoadError> {
        let config = model.config();
        let total = config.layers;
        check::layers(&layers, total)?;
        let context = check::options(&options, config.context)?;
        let environment = runtime::environment(options.library.as_deref())?;

        let threads = options.thread_count();
        let packing = pack_options(options.compact);
        // Other stages may be at work.
        let weights = in_background(threads, |pool| {
            let (layers, cache) = (layers.clone(), options.cache.as_ref());
            StageWeights::load(model, layers, pool, packing, options.weights, cache)
        })?;
        let pool = Pool::new(threads);
        let kv = Kv::new(KvShape {
            layers: layers.len(),
            slots: options.slots as usize,
            context: context as usize,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            value_dim: config.value_dim,
            format: options
                .kv
                .unwrap_or_else(|| suited_kv(model, options.weights)),
        })?;

        let shape = ModelShape {
            layers: total,
            hidden: config.hidden,
            vocab: config.vocab,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
        };
        let info = StageInfo {
            shape: shape.clone(),
            layers: layers.clone(),
            slots: options.slots,
            context,
            max_rows: options.max_rows,
            kv_bytes_per_token: kv.cache.bytes_per_position() as u64,
            weight_bytes: weights.bytes(),
        };
        let step = StageStep::new(kv, options.profile);
        let shared =
            StageContext::new(shape, layers.clone(), config, weights, pool, step, context)?;
        let shared = Arc::new(shared);
        let session = graph::session(&environment, &shared, layers)?;
        Ok(OrtStage {
            info,
            shared,
            session,
            output: None,
            tokens: Vec::new(),
            _reclaim: Reclaim,
        })
    }

    /// Time spent in each operator since the last call, and how often it ran, by its name. Empty unless
    /// [`OrtOptions::profile`] is set.
    pub fn profile(&self) -> Vec<(&'static str, Duration, u64)> {
        self.step().take_profile()
    }

    fn step(&self) -> MutexGuard<'_, StageStep> {
        // A panic inside a node is turned into an error there; the step is rewritten before the next run.
        self.shared
            .step
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&mut self, rows: usize, input: StageInput<'_>) -> ort::Result<DynValue> {
        let outputs = match input {
            StageInput::Tokens(tokens) => {
                self.tokens.clear();
                self.tokens.extend(tokens.iter().map(|&token| token as i32));
                let tensor = TensorRef::from_array_view(([rows], self.tokens.as_slice()))?;
                self.session.run(ort::inputs![INPUT => tensor])
            }
            StageInput::Hidden(hidden) => {
                let shape = [rows, self.info.shape.hidden];
                let tensor = TensorRef::from_array_view((shape, hidden))?;
                self.session.run(ort::inputs![INPUT => tensor])
            }
        };
        outputs?
            .remove(OUTPUT)
            .ok_or_else(|| ort::Error::new("the session gave no output"))
    }
}

impl Stage for OrtStage {
    fn info(&self) -> &StageInfo {
        &self.info
    }

    fn forward(
        &mut self,
        segments: &[Segment],
        input: StageInput<'_>,
    ) -> Result<StageOutput<'_>, StageError> {
        let rows = check::step(&self.info, segments, &input, |slot| self.kv_len(slot))?;
        self.step().begin(segments, self.info.is_last());
        // Before the run: its memory can then be used again for this step's output.
        self.output = None;
        let result = self.run(rows, input);
        let kept = self.step().end(result.is_ok());
        let output = self.output.insert(result.map_err(backend)?);
        let (_, numbers) = output.try_extract_tensor::<f32>().map_err(backend)?;
        Ok(if self.info.is_last() {
            StageOutput::Logits(&numbers[..kept * self.info.shape.vocab])
        } else {
            StageOutput::Hidden(numbers)
        })
    }

    fn kv_len(&self, slot: SlotId) -> u32 {
        self.step().kv.len(slot)
    }

    fn truncate(&mut self, slot: SlotId, len: u32) {
        let mut step = self.step();
        if len < step.kv.len(slot) {
            step.kv.set_len(slot, len);
        }
    }

    fn copy_prefix(&mut self, from: SlotId, to: SlotId, len: u32) -> Result<(), StageError> {
        check::slot(&self.info, from)?;
        check::slot(&self.info, to)?;
        let mut step = self.step();
        check::held(from, step.kv.len(from), len)?;
        step.kv.copy_prefix(from, to, len).map_err(kernel)
    }

    fn kv_export(&self, slot: SlotId, rows: Range<u32>) -> Result<Vec<u8>, StageError> {
        check::slot(&self.info, slot)?;
        let step = self.step();
        check::held(slot, step.kv.len(slot), rows.end)?;
        step.kv.export(slot, rows).map_err(kernel)
    }

    fn kv_import(&mut self, slot: SlotId, position: u32, bytes: &[u8]) -> Result<(), StageError> {
        check::import(&self.info, slot, self.kv_len(slot), position, bytes)?;
        self.step().kv.import(slot, position, bytes).map_err(kernel)
    }
}

fn backend(error: ort::Error) -> StageError {
    StageError::Backend {
        backend: BACKEND,
        message: error.to_string(),
    }
}

fn kernel(error: KernelError) -> StageError {
    StageError::Backend {
        backend: BACKEND,
        message: error.to_string(),
    }
}
