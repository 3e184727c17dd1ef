//! Stages for execution providers: the second lowering, to ONNX Runtime's own operators.

mod bandwidth;
mod builder;
mod lower;
mod matrix;
pub(crate) mod memory;
mod size;
mod slots;
mod tensors;

use std::ops::Range;

use mesh_engine::{
    LogitRows, ModelShape, Segment, SlotId, Stage, StageError, StageInfo, StageInput, StageOutput,
};
use mesh_model::{GgmlType, Model, dequantize};
use ort::environment::Environment;
use ort::memory::Allocator;
use ort::session::{IoBinding, Session};
use ort::value::Tensor;

use crate::check;
use crate::options::{KvFormat, LoadError, OrtOptions, suited_kv};
use crate::provider::Provider;
use crate::runtime;
use crate::webgpu::{self, InTurn};
pub use bandwidth::bandwidth;
pub(crate) use lower::Parts;
use lower::{HIDDEN, KEPT, LAST_POSITION, LENGTH, LoweringPlan, OUTPUT};
pub use memory::DeviceMemory;
use memory::Reserved;
use mesh_kernels::Reclaim;
use slots::{CacheShape, DeviceSlot, Transfer};
pub use tensors::Precision;

/// Provider and settings of a [`DeviceStage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// The execution provider to use.
    pub provider: Provider,
    /// Precision of the weights' scales, activations and KV cache.
    pub precision: Precision,
    /// Keep to few shapes: rows are padded to a power of two, and a slot has its whole context from the
    /// beginning. For providers that compile a program for each shape.
    pub few_shapes: bool,
}

impl Device {
    /// The default settings for `provider`.
    pub fn new(provider: Provider) -> Device {
        Device {
            provider,
            precision: match provider {
                Provider::Cpu => Precision::F32,
                Provider::Cuda | Provider::MiGraphX | Provider::WebGpu => Precision::F16,
            },
            few_shapes: provider == Provider::MiGraphX,
        }
    }

    /// The same at a precision that the device has; loads a provider that is a plugin.
    pub(crate) fn supported(
        self,
        environment: &Environment,
        options: &OrtOptions,
    ) -> Result<Device, LoadError> {
        if self.provider != Provider::WebGpu {
            return Ok(self);
        }
        let adapter = webgpu::load(environment, options.webgpu_library.as_deref());
        let adapter = adapter.map_err(|reason| LoadError::Provider {
            provider: self.provider,
            reason,
        })?;
        Ok(match adapter.half {
            true => self,
            false => Device {
                precision: Precision::F32,
                ..self
            },
        })
    }

    /// Positions of a slot with this context: rows of padding may follow the last one.
    fn positions(self, context: u32, max_rows: u32) -> usize {
        let padding = match self.few_shapes {
            true => (max_rows as usize).next_power_of_two(),
            false => 0,
        };
        context as usize + padding
    }
}

/// Bytes that a range of layers takes on a device, layer by layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DeviceSizes {
    /// Constants of each layer.
    pub(crate) layers: Vec<u64>,
    /// Constants that come with the first layer.
    pub(crate) fixed: u64,
    /// Constants that come with the last layer, if it ends the model.
    pub(crate) end: u64,
    /// Keys and values of one token in one layer.
    pub(crate) kv_row: u64,
    /// Rows of a slot in use at first, and at most.
    pub(crate) cache_rows: (u64, u64),
    /// Tokens of one slot.
    pub(crate) context: u32,
}

impl DeviceSizes {
    /// The sizes of these parts of `layers` of `model`.
    ///
    /// # Errors
    /// If the options do not fit the model.
    pub(crate) fn of(
        model: &Model,
        layers: &Range<u32>,
        options: &OrtOptions,
        device: Device,
        parts: Parts,
    ) -> Result<DeviceSizes, LoadError> {
        let (config, tensors, precision) = (model.config(), model.tensors(), device.precision);
        let context = check::options(options, config.context)?;
        let positions = device.positions(context, options.max_rows);
        let shape = CacheShape::of(config, 1, positions, device);
        let sizes = layers.clone();
        let rotations = |layers| size::rotations(config, layers, positions, precision);
        let layer = |layer| size::layer(tensors, config, layer, precision);
        Ok(DeviceSizes {
            layers: match parts {
                Parts::Whole => sizes.map(layer).collect(),
                Parts::WithoutExperts => sizes
                    .map(|number| layer(number).saturating_add(rotations(number..number + 1)))
                    .collect(),
            },
            fixed: match parts {
                Parts::Whole => rotations(layers.clone()),
                Parts::WithoutExperts => 0,
            },
            end: match layers.end == config.layers && parts == Parts::Whole {
                true => size::head(tensors, config, precision),
                false => 0,
            },
            kv_row: shape.token_bytes() as u64,
            cache_rows: (shape.first as u64, shape.limit as u64),
            context,
        })
    }

    /// Bytes of the constants of the first `count` layers.
    pub(crate) fn weights(&self, count: usize) -> u64 {
        let end = if count == self.layers.len() {
            self.end
        } else {
            0
        };
        let layers = self.layers.iter().take(count);
        layers.fold(self.fixed.saturating_add(end), |sum, bytes| {
            sum.saturating_add(*bytes)
        })
    }
}

/// Fails if ONNX Runtime's operators cannot express the model.
pub(crate) fn check_operators(
    model: &Model,
    layers: Range<u32>,
    device: Device,
) -> Result<(), LoadError> {
    let plan = LoweringPlan {
        tensors: model.tensors(),
        config: model.config(),
        layers: layers.clone(),
        precision: device.precision,
        positions: 0,
        threads: 1,
        parts: Parts::of(model.config(), layers),
    };
    plan.check()
}

/// A range of layers on an execution provider, as a graph of ONNX Runtime's own operators.
///
/// Rows are **not** independent bit for bit, as [`Stage`] asks: the provider's products choose their
/// algorithm by the number of rows. The same prompt cut into other chunks gives logits that differ in their
/// last digits, and where two tokens are almost equally likely a stream that is run again may continue with
/// the other one.
pub struct DeviceStage {
    info: StageInfo,
    device: Device,
    shape: CacheShape,
    /// Format of exported KV rows: that of the CPU's stage, so that streams can move between both.
    exported: KvFormat,
    parts: InTurn<Objects>,
    _weights: Reserved,
    memory: DeviceMemory,
    /// The graph ends the model, and gives logits.
    is_last: bool,
    /// On a first stage.
    embedding: Option<Embedding>,
    output: Vec<f32>,
    _reclaim: Reclaim,
}

/// A stage's objects of ONNX Runtime.
// Dropped in this order: the memory of the slots is the allocator's, which is the session's.
struct Objects {
    slots: Vec<DeviceSlot>,
    allocator: Allocator,
    session: Session,
}

/// The embedding table as in the file.
struct Embedding {
    ty: GgmlType,
    data: Vec<u8>,
    /// Factor on the rows.
    scale: f32,
}

impl DeviceStage {
    /// Loads `layers` of `model`, whatever memory they take on the device within the limit of
    /// [`OrtOptions::device`]. Of the options, `threads` counts only on [`Provider::Cpu`], and `compact`
    /// and `profile` do not count.
    pub fn load(
        model: &Model,
        layers: Range<u32>,
        options: OrtOptions,
        device: Device,
    ) -> Result<DeviceStage, LoadError> {
        DeviceStage::load_parts(model, layers, options, device, Parts::Whole)
    }

    /// [`load`](Self::load) of some parts. Without experts the stage is of one layer, and gives hidden rows even if
    /// the layer ends the model.
    pub(crate) fn load_parts(
        model: &Model,
        layers: Range<u32>,
        options: OrtOptions,
        device: Device,
        parts: Parts,
    ) -> Result<DeviceStage, LoadError> {
        let config = model.config();
        check::layers(&layers, config.layers)?;
        let context = check::options(&options, config.context)?;
        let environment = runtime::environment(options.library.as_deref())?;
        let device = device.supported(&environment, &options)?;
        let threads = options.thread_count();
        let limit = device.positions(context, options.max_rows);
        let plan = LoweringPlan {
            tensors: model.tensors(),
            config,
            layers: layers.clone(),
            precision: device.precision,
            positions: limit,
            threads,
            parts,
        };
        plan.check()?;
        let provider = device.provider;
        let memory = options.device.memory.clone();
        let sizes = DeviceSizes::of(model, &layers, &options, device, parts)?;
        let exhausted = |full: memory::Full| LoadError::DeviceMemory {
            provider,
            reason: full.to_string(),
        };
        // Before the weights are read, which takes longest.
        let reserved = memory.reserve(sizes.weights(layers.len()), "the weights of its layers");
        let reserved = reserved.map_err(exhausted)?;
        let lowered = plan.lower()?;
        let is_last = plan.is_last();
        let parts = {
            let _turn = webgpu::turn(provider);
            let session =
                provider.session(&environment, threads, &lowered.model, lowered.weights)?;
            Objects {
                slots: (0..options.slots).map(|_| DeviceSlot::empty()).collect(),
                allocator: provider.allocator(&session)?,
                session,
            }
        };
        let embedding = (layers.start == 0)
            .then(|| Embedding::read(model))
            .transpose()?;
        let shape = CacheShape {
            transfer: match provider {
                Provider::WebGpu => Transfer::Plugin(environment.clone()),
                _ => Transfer::Session,
            },
            ..CacheShape::of(config, layers.len(), limit, device)
        };
        let table = embedding.as_ref().map_or(0, |table| table.data.len());
        let exported = options
            .kv
            .unwrap_or_else(|| suited_kv(model, options.weights));
        let info = StageInfo {
            shape: ModelShape {
                layers: config.layers,
                hidden: config.hidden,
                vocab: config.vocab,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
            },
            layers,
            slots: options.slots,
            context,
            max_rows: options.max_rows,
            kv_bytes_per_token: (shape.token_bytes() / shape.precision.bytes() * exported.bytes())
                as u64,
            weight_bytes: lowered.bytes + table as u64,
        };
        Ok(DeviceStage {
            parts: InTurn::new(provider, parts),
            _weights: reserved,
            memory,
            info,
            device,
            shape,
            exported,
            is_last,
            embedding,
            output: Vec::new(),
            _reclaim: Reclaim,
        })
    }

    /// Runs one segment and appends its result to the output.
    fn run(&mut self, segment: &Segment, mut hidden: Vec<f32>) -> ort::Result<()> {
        let rows = segment.rows as usize;
        // Padding rows follow the real ones and do not affect them; later rows overwrite their keys and
        // values.
        let padded = match self.device.few_shapes {
            true => rows.next_power_of_two(),
            false => rows,
        };
        hidden.resize(padded * self.info.shape.hidden, 0.0);
        let length = segment.position as usize + padded;
        self.make_room(segment.slot, length)?;
        let parts = &mut *self.parts;
        let slot = &mut parts.slots[segment.slot as usize];
        let device = (&parts.session, &parts.allocator, &self.memory);
        let binding = slot.reserve(device, &self.shape, length)?;
        bind(
            binding,
            HIDDEN,
            &[1, padded, self.info.shape.hidden],
            hidden,
        )?;
        bind(binding, LAST_POSITION, &[1], vec![length as i32 - 1])?;
        bind(binding, LENGTH, &[1], vec![length as i32])?;
        let last = rows as i64 - 1;
        if self.is_last {
            // Not every provider can multiply with zero rows: without logits, one unused row is computed.
            let kept: Vec<i64> = match segment.logits {
                LogitRows::All => (0..rows as i64).collect(),
                LogitRows::Last | LogitRows::None => vec![last],
            };
            bind(binding, KEPT, &[kept.len()], kept)?;
        }
        // Bound anew: otherwise the tensor of the last run would be taken, which may have another shape.
        binding.bind_output_to_device(OUTPUT, Allocator::default().memory_info())?;
        let outputs = parts.session.run_binding(binding)?;
        let output = outputs
            .get(OUTPUT)
            .ok_or_else(|| ort::Error::new("the session gave no output"))?;
        let (_, numbers) = output.try_extract_tensor::<f32>()?;
        let count = match self.is_last {
            true => segment.logits.count(segment.rows) as usize * self.info.shape.vocab,
            false => rows * self.info.shape.hidden,
        };
        let numbers = numbers
            .get(..count)
            .ok_or_else(|| ort::Error::new("the session gave too few rows"))?;
        self.output.extend_from_slice(numbers);
        Ok(())
    }

    /// Takes memory from slots that do not need it any more, before `slot` grows to `rows` beyond what was
    /// planned for all of them.
    fn make_room(&mut self, slot: SlotId, rows: usize) -> ort::Result<()> {
        let parts = &mut *self.parts;
        let more = parts.slots[slot as usize].growth(&self.shape, rows);
        if more == 0 || !self.memory.exceeds_promise(more) {
            return Ok(());
        }
        let device = (&parts.session, &parts.allocator, &self.memory);
        for (id, other) in parts.slots.iter_mut().enumerate() {
            if id != slot as usize {
                other.shrink(device, &self.shape)?;
            }
        }
        Ok(())
    }

    fn run_all(&mut self, segments: &[Segment], input: &StageInput<'_>) -> ort::Result<()> {
        let _turn = webgpu::turn(self.device.provider);
        self.output.clear();
        let mut from = 0;
        for segment in segments {
            let rows = from..from + segment.rows as usize;
            from = rows.end;
            let width = self.info.shape.hidden;
            let hidden = match (input, &self.embedding) {
                (StageInput::Tokens(tokens), Some(table)) => table.rows(&tokens[rows], width)?,
                (StageInput::Hidden(hidden), _) => {
                    hidden[rows.start * width..rows.end * width].to_vec()
                }
                (StageInput::Tokens(_), None) => {
                    return Err(ort::Error::new("tokens without an embedding table"));
                }
            };
            self.run(segment, hidden)?;
            // At once: a slot that grows later in the step may make this one shrink to its rows.
            self.parts.slots[segment.slot as usize].len = segment.position + segment.rows;
        }
        Ok(())
    }
}

/// Binds an input of the host; it is on the device when this returns.
fn bind<T>(binding: &mut IoBinding, name: &str, shape: &[usize], data: Vec<T>) -> ort::Result<()>
where
    T: ort::value::PrimitiveTensorElementType + std::fmt::Debug + Clone + 'static,
{
    binding.bind_input(name, &Tensor::from_array((shape.to_vec(), data))?)
}

impl Embedding {
    fn read(model: &Model) -> Result<Embedding, LoadError> {
        const NAME: &str = "token_embd.weight";
        let tensor = model
            .tensors()
            .get(NAME)
            .ok_or_else(|| LoadError::MissingTensor(NAME.into()))?;
        Ok(Embedding {
            ty: tensor.ty,
            data: tensor.data.read()?.into_owned(),
            scale: model.config().embedding_scale,
        })
    }

    /// The rows of `tokens`, which lie within the vocabulary.
    fn rows(&self, tokens: &[u32], width: usize) -> ort::Result<Vec<f32>> {
        let bytes = width / self.ty.block_size() * self.ty.type_size();
        let mut out = vec![0.0; tokens.len() * width];
        for (row, &token) in out.chunks_exact_mut(width).zip(tokens) {
            let data = self
                .data
                .get(token as usize * bytes..)
                .and_then(|data| data.get(..bytes))
                .ok_or_else(|| ort::Error::new("the embedding table is too short"))?;
            dequantize(self.ty, data, row).map_err(|error| ort::Error::new(error.to_string()))?;
        }
        out.iter_mut().for_each(|x| *x *= self.scale);
        Ok(out)
    }
}

impl Stage for DeviceStage {
    fn info(&self) -> &StageInfo {
        &self.info
    }

    fn forward(
        &mut self,
        segments: &[Segment],
        input: StageInput<'_>,
    ) -> Result<StageOutput<'_>, StageError> {
        check::step(&self.info, segments, &input, |slot| self.kv_len(slot))?;
        // Rows from the position on are overwritten, so they need not be kept when a slot's memory grows.
        for segment in segments {
            let slot = &mut self.parts.slots[segment.slot as usize];
            slot.len = slot.len.min(segment.position);
        }
        self.run_all(segments, &input)
            .map_err(|e| self.failed(&e))?;
        Ok(match self.is_last {
            true => StageOutput::Logits(&self.output),
            false => StageOutput::Hidden(&self.output),
        })
    }

    fn kv_len(&self, slot: SlotId) -> u32 {
        self.parts
            .slots
            .get(slot as usize)
            .map_or(0, |slot| slot.len)
    }

    fn truncate(&mut self, slot: SlotId, len: u32) {
        let _turn = webgpu::turn(self.device.provider);
        if let Some(slot) = self.parts.slots.get_mut(slot as usize) {
            slot.truncate(len);
        }
    }

    fn copy_prefix(&mut self, from: SlotId, to: SlotId, len: u32) -> Result<(), StageError> {
        check::slot(&self.info, from)?;
        check::slot(&self.info, to)?;
        check::held(from, self.kv_len(from), len)?;
        if from != to {
            let rows = self.read(from, 0..len)?;
            self.truncate(to, 0);
            self.write(to, 0, &rows)?;
        }
        self.truncate(to, len);
        Ok(())
    }

    fn kv_export(&self, slot: SlotId, rows: Range<u32>) -> Result<Vec<u8>, StageError> {
        check::slot(&self.info, slot)?;
        check::held(slot, self.kv_len(slot), rows.end)?;
        let rows = self.read(slot, rows)?;
        Ok(self.shape.precision.to_exported(rows, self.exported))
    }

    fn kv_import(&mut self, slot: SlotId, position: u32, bytes: &[u8]) -> Result<(), StageError> {
        check::import(&self.info, slot, self.kv_len(slot), position, bytes)?;
        let rows = self.shape.precision.of_exported(bytes, self.exported);
        self.write(slot, position, &rows)
    }
}

impl DeviceStage {
    /// Rows that `slot` holds, in the graph's precision.
    fn read(&self, slot: SlotId, rows: Range<u32>) -> Result<Vec<u8>, StageError> {
        let _turn = webgpu::turn(self.device.provider);
        let read = self.parts.slots[slot as usize].read(&self.shape, rows);
        read.map_err(|error| self.failed(&error))
    }

    /// Writes rows that fit; the slot then ends behind them.
    fn write(&mut self, slot: SlotId, position: u32, rows: &[u8]) -> Result<(), StageError> {
        let end = position + (rows.len() / self.shape.token_bytes()) as u32;
        let _turn = webgpu::turn(self.device.provider);
        // Later positions are overwritten, or the sequence ends here.
        self.parts.slots[slot as usize].len = position;
        let rows_to_hold = end.max(1) as usize;
        let made = self.make_room(slot, rows_to_hold);
        let parts = &mut *self.parts;
        let place = &mut parts.slots[slot as usize];
        let device = (&parts.session, &parts.allocator, &self.memory);
        let written = made
            .and_then(|()| place.reserve(device, &self.shape, rows_to_hold).map(drop))
            .and_then(|()| place.write(&self.shape, position, rows));
        if let Err(error) = written {
            return Err(self.failed(&error));
        }
        self.parts.slots[slot as usize].len = end;
        Ok(())
    }

    fn failed(&self, error: &ort::Error) -> StageError {
        let backend = match self.device.provider {
            Provider::Cpu => "ONNX Runtime",
            Provider::Cuda => "ONNX Runtime on CUDA",
            Provider::MiGraphX => "ONNX Runtime on MIGraphX",
            Provider::WebGpu => "ONNX Runtime on WebGPU",
        };
        let message = error.to_string();
        if memory::says_exhausted(&message) {
            self.memory.set_exhausted(true);
            return StageError::OutOfMemory { backend, message };
        }
        StageError::Backend { backend, message }
    }
}
