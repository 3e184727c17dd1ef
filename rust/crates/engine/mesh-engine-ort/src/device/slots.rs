//! The KV cache of a device stage: for each slot, keys and values of each layer on the device, and the
//! binding that gives them to the graph.

use std::ops::Range;

use ort::AsPointer;
use ort::environment::Environment;
use ort::memory::Allocator;
use ort::session::{IoBinding, Session};
use ort::value::DynTensor;

use mesh_model::ModelConfig;

use super::Device;
use super::lower::{OUTPUT, kv_names};
use super::memory::{DeviceMemory, Reserved};
use super::tensors::Precision;

/// Shape of the caches, and how they grow.
pub(super) struct CacheShape {
    pub(super) layers: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) precision: Precision,
    pub(super) transfer: Transfer,
    /// Most rows a slot is ever given room for.
    pub(super) limit: usize,
    /// Rows that a slot gets room for at first; the room doubles from there.
    pub(super) first: usize,
}

impl CacheShape {
    /// The caches of so many layers, for slots of at most `limit` rows, for devices that a session copies to.
    pub(super) fn of(config: &ModelConfig, layers: usize, limit: usize, device: Device) -> Self {
        CacheShape {
            layers,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            precision: device.precision,
            transfer: Transfer::Session,
            limit,
            first: match device.few_shapes {
                true => limit,
                false => FIRST_ROWS.min(limit),
            },
        }
    }

    /// Bytes of one row of one head.
    fn head_bytes(&self) -> usize {
        self.head_dim * self.precision.bytes()
    }

    /// Bytes of one token over all layers, in the precision of the graph.
    pub(super) fn token_bytes(&self) -> usize {
        2 * self.layers * self.kv_heads * self.head_bytes()
    }

    /// Rows to make room for where `rows` are needed and `held` are there.
    fn capacity(&self, rows: usize, held: usize) -> usize {
        let mut capacity = self.first.max(held);
        while capacity < rows {
            capacity *= 2;
        }
        capacity.min(self.limit).max(rows)
    }

    fn tensor(&self, capacity: usize) -> [usize; 4] {
        [1, self.kv_heads, capacity, self.head_dim]
    }
}

/// The memory of one slot.
pub(super) struct DeviceSlot {
    /// Rows that are valid.
    pub(super) len: u32,
    room: Option<Allocation>,
}

struct Allocation {
    capacity: usize,
    /// Keys and values, layer by layer, `[1, kv_heads, capacity, head_dim]`.
    tensors: Vec<DynTensor>,
    binding: IoBinding,
    _reserved: Reserved,
}

/// The session, allocator and account from which a slot takes memory.
pub(super) type SlotDevice<'a> = (&'a Session, &'a Allocator, &'a DeviceMemory);

impl DeviceSlot {
    pub(super) fn empty() -> DeviceSlot {
        DeviceSlot { len: 0, room: None }
    }

    /// Forgets the rows from `len` on; 0 gives the memory back.
    pub(super) fn truncate(&mut self, len: u32) {
        self.len = self.len.min(len);
        if self.len == 0 {
            self.room = None;
        }
    }

    /// Makes room for `rows` rows, keeping the valid ones, and returns the binding.
    pub(super) fn reserve(
        &mut self,
        device: SlotDevice<'_>,
        shape: &CacheShape,
        rows: usize,
    ) -> ort::Result<&mut IoBinding> {
        if self.growth(shape, rows) > 0 || self.room.is_none() {
            let capacity = shape.capacity(rows, self.capacity());
            self.replace(device, shape, capacity)?;
        }
        self.room
            .as_mut()
            .map(|room| &mut room.binding)
            .ok_or_else(|| ort::Error::new("a slot has no memory"))
    }

    /// Bytes by which making room for `rows` rows enlarges the slot's memory.
    pub(super) fn growth(&self, shape: &CacheShape, rows: usize) -> u64 {
        let held = self.capacity();
        let capacity = match held >= rows && self.room.is_some() {
            true => held,
            false => shape.capacity(rows, held),
        };
        ((capacity - held) * shape.token_bytes()) as u64
    }

    /// Gives back the memory that the valid rows do not need.
    pub(super) fn shrink(&mut self, device: SlotDevice<'_>, shape: &CacheShape) -> ort::Result<()> {
        let capacity = shape.capacity(self.len as usize, 0);
        match self.capacity() > capacity {
            true => self.replace(device, shape, capacity),
            false => Ok(()),
        }
    }

    fn capacity(&self) -> usize {
        self.room.as_ref().map_or(0, |room| room.capacity)
    }

    /// Moves the valid rows to memory for `capacity` rows.
    fn replace(
        &mut self,
        device: SlotDevice<'_>,
        shape: &CacheShape,
        capacity: usize,
    ) -> ort::Result<()> {
        let kept = self.read(shape, 0..self.len)?;
        // Before the other one is allocated: the device may not have room for both.
        self.room = None;
        let room = Allocation::new(device, shape, capacity, &kept);
        // Its rows are lost without memory.
        self.room = Some(room.inspect_err(|_| self.len = 0)?);
        Ok(())
    }

    /// Rows in the order token, layer, head, the key before the value; in the precision of the graph.
    pub(super) fn read(&self, shape: &CacheShape, rows: Range<u32>) -> ort::Result<Vec<u8>> {
        let (first, count) = (rows.start as usize, rows.len());
        let mut out = vec![0; count * shape.token_bytes()];
        let Some(room) = self.room.as_ref().filter(|_| count > 0) else {
            return Ok(out);
        };
        for (index, tensor) in room.tensors.iter().enumerate() {
            let bytes = shape.precision.write_bytes(&to_host(tensor, shape)?)?;
            for (out_at, at) in places(shape, room.capacity, index, first, count) {
                out[out_at..][..shape.head_bytes()]
                    .copy_from_slice(&bytes[at..][..shape.head_bytes()]);
            }
        }
        Ok(out)
    }

    /// Writes rows at `position`, for which there is room.
    pub(super) fn write(
        &mut self,
        shape: &CacheShape,
        position: u32,
        rows: &[u8],
    ) -> ort::Result<()> {
        let count = rows.len() / shape.token_bytes();
        let Some(room) = self.room.as_mut().filter(|_| count > 0) else {
            return Ok(());
        };
        for (index, tensor) in room.tensors.iter_mut().enumerate() {
            let mut bytes = shape.precision.write_bytes(&to_host(tensor, shape)?)?;
            for (from, at) in places(shape, room.capacity, index, position as usize, count) {
                bytes[at..][..shape.head_bytes()]
                    .copy_from_slice(&rows[from..][..shape.head_bytes()]);
            }
            let from = shape
                .precision
                .read_bytes(&shape.tensor(room.capacity), &bytes)?;
            shape.transfer.copy(&from, tensor)?;
        }
        Ok(())
    }
}

impl Allocation {
    /// Memory for `capacity` rows that begins with `kept`, then zeros: a kernel gives rows beyond the valid
    /// ones no weight, but 0 times a NaN of old memory would not be 0.
    fn new(
        (session, allocator, memory): SlotDevice<'_>,
        shape: &CacheShape,
        capacity: usize,
        kept: &[u8],
    ) -> ort::Result<Allocation> {
        let bytes = (capacity * shape.token_bytes()) as u64;
        let reserved = memory.reserve(bytes, "the KV cache of a slot")?;
        let mut binding = session.create_binding()?;
        // Outputs come back in the order of binding: the one that is read first.
        binding.bind_output_to_device(OUTPUT, Allocator::default().memory_info())?;
        let dims = shape.tensor(capacity);
        let names = (0..shape.layers).flat_map(kv_names);
        let mut tensors = Vec::with_capacity(2 * shape.layers);
        for (index, (past, present)) in names.enumerate() {
            let mut bytes = vec![0; shape.kv_heads * capacity * shape.head_bytes()];
            let count = kept.len() / shape.token_bytes();
            for (from, at) in places(shape, capacity, index, 0, count) {
                bytes[at..][..shape.head_bytes()]
                    .copy_from_slice(&kept[from..][..shape.head_bytes()]);
            }
            let mut tensor = DynTensor::new(allocator, shape.precision.tensor_type(), dims)?;
            let from = shape.precision.read_bytes(&dims, &bytes)?;
            shape.transfer.copy(&from, &mut tensor)?;
            // The same memory as past and as present: the operator then appends in place.
            binding.bind_input(past, &tensor)?;
            binding.bind_output(present, &mut tensor)?;
            tensors.push(tensor);
        }
        Ok(Allocation {
            capacity,
            tensors,
            binding,
            _reserved: reserved,
        })
    }
}

/// The way in which tensors are copied between the host and the device.
pub(super) enum Transfer {
    /// By a session whose graph does nothing, which `ort` makes.
    Session,
    /// By the provider of a plugin, whose devices such a session does not know.
    Plugin(Environment),
}

impl Transfer {
    /// Copies to a tensor of the same type and shape.
    fn copy(&self, from: &DynTensor, to: &mut DynTensor) -> ort::Result<()> {
        let Transfer::Plugin(environment) = self else {
            return from.copy_into(to);
        };
        let (from, mut to) = ([from.ptr().cast()], [to.ptr().cast()]);
        // SAFETY: the environment and both tensors are alive, the lists have one entry each, and without a stream
        // the copy has ended when the call returns.
        unsafe {
            let status = (ort::api().CopyTensors)(
                environment.ptr().cast_mut(),
                from.as_ptr(),
                to.as_mut_ptr(),
                std::ptr::null_mut(),
                from.len(),
            );
            ort::Error::result_from_status(status)
        }
    }
}

/// A copy on the host.
fn to_host(tensor: &DynTensor, shape: &CacheShape) -> ort::Result<DynTensor> {
    let dims = tensor.shape().clone();
    let mut host = DynTensor::new(&Allocator::default(), shape.precision.tensor_type(), dims)?;
    shape.transfer.copy(tensor, &mut host)?;
    Ok(host)
}

/// Positions of each head of `count` rows from `first` on, in exported rows and in tensor `index`.
fn places(
    shape: &CacheShape,
    capacity: usize,
    index: usize,
    first: usize,
    count: usize,
) -> impl Iterator<Item = (usize, usize)> {
    let (heads, bytes, token) = (shape.kv_heads, shape.head_bytes(), shape.token_bytes());
    let (layer, is_value) = (index / 2, index % 2);
    (0..count).flat_map(move |row| {
        (0..heads).map(move |head| {
            (
                row * token + (2 * (layer * heads + head) + is_value) * bytes,
                (head * capacity + first + row) * bytes,
            )
        })
    })
}

/// Rows that a slot's memory has at first.
const FIRST_ROWS: usize = 256;
