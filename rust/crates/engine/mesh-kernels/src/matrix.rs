//! A weight matrix in packed form.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use mesh_quant::Codebook;

use crate::layout::{Layout, PANEL};
use crate::mem::{Buffer, TaskPointer};
use crate::{KernelError, Pool, WeightType, pack};

/// A matrix of `n` outputs by `k` inputs, packed for [`linear`](crate::linear) (layout.rs says how).
///
/// It may be several matrices of equal `k` under each other ([`QMatrix::concat`]), also of different types.
#[derive(Debug)]
pub struct QMatrix {
    n: usize,
    k: usize,
    parts: Vec<PackedPart>,
}

/// Choices at packing time. The default keeps every weight of the file exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PackOptions {
    /// Store the scales of Q4_0, and the scales and minima of Q4_1, as 8-bit codes per 256 weights: 0.539 bytes
    /// a weight instead of 0.5625, and 0.578 instead of 0.625. The codes of the weights stay; scale and minimum
    /// are off by up to 0.4 % of their group's largest.
    pub coded_scales: bool,
    /// Number of bits kept of Q8_0 weights.
    pub q8_0: EightBit,
}

/// Precision of packed Q8_0 weights, which are a third of a small model's bytes where they are its tied
/// embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EightBit {
    /// All 8 bits: 1.0625 bytes a weight.
    #[default]
    Keep,
    /// Rounded to 6 bits: 0.8125 bytes.
    Six,
    /// Rounded to 5 bits: 0.6875 bytes.
    Five,
}

/// A packed matrix with one layout.
#[derive(Debug)]
pub(crate) struct PackedPart {
    pub(crate) layout: Layout,
    pub(crate) n: usize,
    pub(crate) panel_bytes: usize,
    pub(crate) data: Buffer,
}

impl PackedPart {
    pub(crate) fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    /// The bytes of a panel.
    pub(crate) fn panel(&self, index: usize) -> &[u8] {
        &self.data.bytes()[index * self.panel_bytes..][..self.panel_bytes]
    }
}

/// So many bytes of a matrix are read at once: enough to make a system call cheap, few enough for a cache.
const READ_BYTES: usize = 64 << 10;

/// Largest dimension taken; keeps every size computation within the address space.
const LIMIT: usize = 1 << 28;

impl QMatrix {
    /// Packs `n` rows of `k` weights each, in the layout of a GGUF file, on the calling thread.
    ///
    /// # Errors
    /// When `rows` is not exactly `n` rows of that type, or memory is short.
    pub fn pack(ty: WeightType, n: usize, k: usize, rows: &[u8]) -> Result<QMatrix, KernelError> {
        QMatrix::pack_with(&Pool::new(1), ty, n, k, rows, PackOptions::default())
    }

    /// The same with the threads of `pool` and a choice of layout.
    ///
    /// # Errors
    /// As [`QMatrix::pack`].
    pub fn pack_with(
        pool: &Pool,
        ty: WeightType,
        n: usize,
        k: usize,
        rows: &[u8],
        options: PackOptions,
    ) -> Result<QMatrix, KernelError> {
        let need = matrix_bytes(ty, n, k)?;
        crate::error::expect_len("the weight rows (in bytes)", rows.len(), need)?;
        pack_panels(pool, ty, n, k, options, |bytes, pack| {
            pack(&rows[bytes]);
            Ok(())
        })
    }

    /// The same with rows that are read where and when they are packed: `read` fills its buffer with the
    /// matrix's bytes from the given one on. It is called on all threads, for some rows at a time, so no copy
    /// of the whole matrix is ever held.
    ///
    /// # Errors
    /// As [`QMatrix::pack`], and if `read` fails.
    pub fn pack_reading<E>(
        pool: &Pool,
        ty: WeightType,
        n: usize,
        k: usize,
        options: PackOptions,
        read: impl Fn(usize, &mut [u8]) -> Result<(), E> + Sync,
    ) -> Result<QMatrix, E>
    where
        E: From<KernelError> + Send,
    {
        thread_local! {
            /// Bytes of the rows of a panel, so that memory is not asked for again for each.
            static ROWS: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        pack_panels(pool, ty, n, k, options, |bytes, pack| {
            ROWS.with_borrow_mut(|rows| {
                rows.resize(bytes.len(), 0);
                read(bytes.start, rows)?;
                pack(rows);
                Ok(())
            })
        })
    }

    /// Puts matrices of equal `k` under each other: QKV as one product.
    ///
    /// # Errors
    /// When there are no matrices, or their numbers of inputs differ.
    pub fn concat(matrices: impl IntoIterator<Item = QMatrix>) -> Result<QMatrix, KernelError> {
        let mut matrices = matrices.into_iter();
        let mut all = matrices.next().ok_or(KernelError::Dimension {
            what: "number of matrices",
            value: 0,
            need: "at least one is needed",
        })?;
        for matrix in matrices {
            if matrix.k != all.k {
                return Err(KernelError::Mismatch {
                    what: "numbers of inputs of matrices put together",
                    left: all.k,
                    right: matrix.k,
                });
            }
            all.n += matrix.n;
            all.parts.extend(matrix.parts);
        }
        Ok(all)
    }

    /// Number of outputs: columns of the product.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Number of inputs: the length of a row of weights.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes that `n` rows of `k` weights of this type take when packed, which is known without the weights.
    /// `None` if there can be no such matrix.
    pub fn packed_bytes(ty: WeightType, n: usize, k: usize, options: PackOptions) -> Option<u64> {
        matrix_bytes(ty, n, k).ok()?;
        let panel = layout_for(ty, options).panel_bytes(k) as u64;
        panel.checked_mul(n.div_ceil(PANEL) as u64)
    }

    /// Bytes of packed weights in memory, all of which one pass reads.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.data.len()).sum()
    }

    /// The weights of output `row`, as the products use them: the embedding of a token.
    ///
    /// # Errors
    /// When there is no such row or `out` does not hold `k` elements.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) -> Result<(), KernelError> {
        crate::error::expect_len("the row", out.len(), self.k)?;
        let mut local = row;
        for part in &self.parts {
            if local < part.n {
                let panel = &part.data.bytes()[local / PANEL * part.panel_bytes..];
                pack::unpack_column(part.layout, panel, local % PANEL, out);
                return Ok(());
            }
            local -= part.n;
        }
        Err(KernelError::OutOfRange {
            what: "row",
            index: row,
            count: self.n,
        })
    }

    pub(crate) fn parts(&self) -> &[PackedPart] {
        &self.parts
    }

    /// The buffers of all parts.
    pub(crate) fn buffers(&mut self) -> impl Iterator<Item = &mut Buffer> {
        self.parts.iter_mut().map(|part| &mut part.data)
    }

    /// Panels of all parts.
    pub(crate) fn panels(&self) -> usize {
        self.parts.iter().map(PackedPart::panels).sum()
    }
}

/// Bytes of `n` rows of `k` weights in a file.
fn matrix_bytes(ty: WeightType, n: usize, k: usize) -> Result<usize, KernelError> {
    for (what, value) in [("number of outputs", n), ("number of inputs", k)] {
        if value == 0 || value > LIMIT {
            return Err(KernelError::Dimension {
                what,
                value,
                need: "it must be at least 1 and at most 2^28",
            });
        }
    }
    let bytes = n.checked_mul(row_bytes(ty, k)?);
    bytes.ok_or(KernelError::Dimension {
        what: "matrix size",
        value: n,
        need: "it must fit the address space",
    })
}

/// Bytes of a row of `k` weights in a file.
fn row_bytes(ty: WeightType, k: usize) -> Result<usize, KernelError> {
    let block = ty.block_size();
    if k == 0 || !k.is_multiple_of(block) {
        return Err(KernelError::Block { ty, k, block });
    }
    ty.row_bytes(k).ok_or(KernelError::Dimension {
        what: "row length",
        value: k,
        need: "a row must fit the address space",
    })
}

/// Packs a matrix panel by panel: `rows` hands the bytes in a range of the matrix to a function that packs
/// them.
fn pack_panels<E>(
    pool: &Pool,
    ty: WeightType,
    n: usize,
    k: usize,
    options: PackOptions,
    rows: impl Fn(Range<usize>, &mut dyn FnMut(&[u8])) -> Result<(), E> + Sync,
) -> Result<QMatrix, E>
where
    E: From<KernelError> + Send,
{
    let len = matrix_bytes(ty, n, k)?;
    let row_bytes = row_bytes(ty, k)?;
    let layout = layout_for(ty, options);
    let panel_bytes = layout.panel_bytes(k);
    let panels = n.div_ceil(PANEL);
    let mut data = Buffer::zeroed("packed weights", panels * panel_bytes)?;
    let start = TaskPointer(data.as_mut_ptr());
    let failure = Mutex::new(None);
    let failed = AtomicBool::new(false);
    // Panels of small rows are read several at a time.
    let source_bytes = PANEL * row_bytes;
    let group = (READ_BYTES / source_bytes).clamp(1, panels);
    pool.run(panels.div_ceil(group), &|task| {
        if failed.load(Ordering::Relaxed) {
            return;
        }
        let first = task * group * source_bytes;
        let last = (first + group * source_bytes).min(len);
        let packed = rows(first..last, &mut |rows| {
            let mine = group.min(panels - task * group);
            for (i, rows) in rows.chunks(source_bytes).take(mine).enumerate() {
                let panel = task * group + i;
                // SAFETY: panel `panel` of `panels` within the buffer, written by this task alone: the rows
                // of a group make up no more panels than that.
                let out = unsafe {
                    std::slice::from_raw_parts_mut(
                        start.get().add(panel * panel_bytes),
                        panel_bytes,
                    )
                };
                pack::panel(layout, ty, k, rows, row_bytes, out);
            }
        });
        if let Err(error) = packed {
            failed.store(true, Ordering::Relaxed);
            let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
            failure.get_or_insert(error);
        }
    });
    let failure = failure.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(error) = failure {
        return Err(error);
    }
    Ok(QMatrix {
        n,
        k,
        parts: vec![PackedPart {
            layout,
            n,
            panel_bytes,
            data,
        }],
    })
}

fn layout_for(ty: WeightType, options: PackOptions) -> Layout {
    match ty {
        WeightType::F32 => Layout::F32,
        WeightType::F16 => Layout::F16,
        WeightType::BF16 => Layout::Bf16,
        WeightType::Q4_0 if options.coded_scales => Layout::Q4Signed,
        WeightType::Q4_0 => Layout::Q4,
        WeightType::Q4_1 if options.coded_scales => Layout::Q4Coded,
        WeightType::Q4_1 => Layout::Q4Min,
        WeightType::Q5_0 => Layout::Q5,
        WeightType::Q5_1 => Layout::Q5Min,
        WeightType::Q8_0 => match options.q8_0 {
            EightBit::Keep => Layout::Q8,
            EightBit::Six => Layout::Q6,
            EightBit::Five => Layout::Q5,
        },
        WeightType::Q2_K | WeightType::TQ1_0 | WeightType::TQ2_0 => Layout::Q2Nibbles,
        WeightType::Q3_K => Layout::Book3Halves(Codebook::Q3),
        WeightType::IQ1_S | WeightType::IQ1_M => Layout::Book3Halves(Codebook::Iq1),
        WeightType::IQ2_XXS | WeightType::IQ2_XS | WeightType::IQ2_S => {
            Layout::Book3Halves(Codebook::Iq2)
        }
        WeightType::IQ3_XXS => Layout::Book4Halves(Codebook::Iq3Xxs),
        WeightType::IQ3_S => Layout::Book4Halves(Codebook::Iq3S),
        WeightType::IQ4_NL => Layout::Book4(Codebook::Iq4),
        WeightType::IQ4_XS => Layout::Book4Halves(Codebook::Iq4),
        WeightType::MXFP4 => Layout::Book4Exponent(Codebook::Mxfp4),
        WeightType::Q4_K => Layout::Q4Coded,
        WeightType::Q5_K => Layout::Q5Coded,
        WeightType::Q6_K => Layout::Q6Halves,
    }
}
