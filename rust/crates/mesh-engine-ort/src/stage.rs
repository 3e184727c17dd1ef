//! The stage: validates a step, hands it to ONNX Runtime, keeps the KV cache.

use std::ops::Range;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use mesh_engine::{
    LogitRows, ModelShape, Segment, SlotId, Stage, StageError, StageInfo, StageInput, StageOutput,
};
use mesh_kernels::{KernelError, KvShape, PackOptions, Pool};
use mesh_model::Model;
use ort::session::Session;
use ort::value::{DynValue, TensorRef};

use crate::graph::{self, INPUT, OUTPUT};
use crate::kv::Kv;
use crate::options::{LoadError, OrtOptions};
use crate::runtime;
use crate::shared::{Shared, Step};
use crate::weights::Weights;

const BACKEND: &str = "ONNX Runtime";

/// A range of layers on ONNX Runtime. See the crate's page.
pub struct OrtStage {
    info: StageInfo,
    shared: Arc<Shared>,
    session: Session,
    /// The last step's output, which callers borrow.
    output: Option<DynValue>,
    tokens: Vec<i32>,
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
        if layers.start >= layers.end || layers.end > total {
            let Range { start, end } = layers;
            return Err(LoadError::Layers {
                start,
                end,
                layers: total,
            });
        }
        let context = check_options(&options, config.context)?;
        let environment = runtime::environment(options.library.as_deref())?;

        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let pool = Pool::new(threads);
        let weights = Weights::load(
            model,
            layers.clone(),
            &pool,
            PackOptions {
                coded_scales: options.compact,
                ..PackOptions::default()
            },
            options.weights,
        )?;
        let kv = Kv::new(KvShape {
            layers: layers.len(),
            slots: options.slots as usize,
            context: context as usize,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
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
        let step = Step::new(kv, options.profile);
        let shared = Shared::new(shape, layers.clone(), config, weights, pool, step, context)?;
        let shared = Arc::new(shared);
        let session = graph::session(&environment, &shared, layers)?;
        Ok(OrtStage {
            info,
            shared,
            session,
            output: None,
            tokens: Vec::new(),
        })
    }

    /// Time spent in each operator since the last call, and how often it ran, by its name. Empty unless
    /// [`OrtOptions::profile`] is set.
    pub fn profile(&self) -> Vec<(&'static str, Duration, u64)> {
        self.step().take_profile()
    }

    fn step(&self) -> MutexGuard<'_, Step> {
        // A panic inside a node is turned into an error there; the step is rewritten before the next run.
        self.shared
            .step
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn check_slot(&self, slot: SlotId) -> Result<(), StageError> {
        if slot < self.info.slots {
            return Ok(());
        }
        Err(StageError::NoSuchSlot {
            slot,
            slots: self.info.slots,
        })
    }

    fn check_context(&self, needed: u64) -> Result<(), StageError> {
        if needed <= u64::from(self.info.context) {
            return Ok(());
        }
        Err(StageError::ContextExceeded {
            needed,
            context: self.info.context,
        })
    }

    fn check_step(
        &self,
        segments: &[Segment],
        input: &StageInput<'_>,
    ) -> Result<usize, StageError> {
        let malformed = |text: String| Err(StageError::Malformed(text));
        if segments.is_empty() {
            return malformed("a step needs at least one segment".into());
        }
        let mut rows = 0u64;
        for (i, segment) in segments.iter().enumerate() {
            self.check_slot(segment.slot)?;
            if segments[..i].iter().any(|other| other.slot == segment.slot) {
                return malformed(format!("slot {} appears twice", segment.slot));
            }
            if segment.rows == 0 {
                return malformed(format!("the segment of slot {} has no rows", segment.slot));
            }
            if segment.logits != LogitRows::None && !self.info.is_last() {
                return malformed(format!(
                    "logits were asked of layers {:?}, which do not end the model",
                    self.info.layers
                ));
            }
            let held = self.kv_len(segment.slot);
            if segment.position > held {
                let Segment { slot, position, .. } = *segment;
                return Err(StageError::Gap {
                    slot,
                    held,
                    position,
                });
            }
            self.check_context(u64::from(segment.position) + u64::from(segment.rows))?;
            rows += u64::from(segment.rows);
        }
        if rows > u64::from(self.info.max_rows) {
            return malformed(format!(
                "{rows} rows in one step, at most {}",
                self.info.max_rows
            ));
        }
        let rows = rows as usize;
        match *input {
            StageInput::Tokens(tokens) if self.info.is_first() => {
                if tokens.len() != rows {
                    return malformed(format!("{} tokens for {rows} rows", tokens.len()));
                }
                let vocab = self.info.shape.vocab;
                if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocab) {
                    return Err(StageError::NoSuchToken { token, vocab });
                }
            }
            StageInput::Hidden(hidden) if !self.info.is_first() => {
                let width = self.info.shape.hidden;
                if hidden.len() != rows * width {
                    let found = hidden.len();
                    return malformed(format!("{found} numbers for {rows} hidden rows of {width}"));
                }
            }
            StageInput::Tokens(_) => {
                return malformed("tokens, but this stage takes hidden rows".into());
            }
            StageInput::Hidden(_) => {
                return malformed("hidden rows, but this stage takes tokens".into());
            }
        }
        Ok(rows)
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
        let rows = self.check_step(segments, &input)?;
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
        self.check_slot(from)?;
        self.check_slot(to)?;
        let mut step = self.step();
        let held = step.kv.len(from);
        if len > held {
            return Err(StageError::Gap {
                slot: from,
                held,
                position: len,
            });
        }
        step.kv.copy_prefix(from, to, len).map_err(kernel)
    }

    fn kv_export(&self, slot: SlotId, rows: Range<u32>) -> Result<Vec<u8>, StageError> {
        self.check_slot(slot)?;
        let step = self.step();
        let held = step.kv.len(slot);
        if rows.end > held {
            return Err(StageError::Gap {
                slot,
                held,
                position: rows.end,
            });
        }
        step.kv.export(slot, rows).map_err(kernel)
    }

    fn kv_import(&mut self, slot: SlotId, position: u32, bytes: &[u8]) -> Result<(), StageError> {
        self.check_slot(slot)?;
        let per_token = self.info.kv_bytes_per_token as usize;
        if !bytes.len().is_multiple_of(per_token) {
            return Err(StageError::Malformed(format!(
                "{} bytes are not whole KV rows of {per_token}",
                bytes.len()
            )));
        }
        let held = self.kv_len(slot);
        if position > held {
            return Err(StageError::Gap {
                slot,
                held,
                position,
            });
        }
        self.check_context(u64::from(position) + (bytes.len() / per_token) as u64)?;
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

/// Checks the options against the model's own context length and returns the context to use.
fn check_options(options: &OrtOptions, trained: u32) -> Result<u32, LoadError> {
    let context = if options.context == 0 {
        trained
    } else {
        options.context
    };
    let checks = [
        (
            "slots",
            options.slots,
            options.slots > 0,
            "at least 1".to_owned(),
        ),
        (
            "max_rows",
            options.max_rows,
            options.max_rows > 0,
            "at least 1".to_owned(),
        ),
        (
            "context",
            context,
            (1..=trained).contains(&context),
            format!("1 to {trained}, which the model was made for"),
        ),
    ];
    for (name, value, ok, remedy) in checks {
        if !ok {
            return Err(LoadError::Option {
                name,
                value: value.into(),
                remedy,
            });
        }
    }
    Ok(context)
}
