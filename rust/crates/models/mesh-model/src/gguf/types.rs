//! Tensor element types and their block layouts, as ggml defines them.

use std::fmt;

/// A tensor element type that this crate can read.
///
/// The names are ggml's own, so that they read the same in files, errors and code.
#[allow(non_camel_case_types, missing_docs)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum GgmlType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
}

/// A type's number in GGUF files, its name, and the elements and the bytes of one of its blocks.
struct BlockLayout(u32, &'static str, usize, usize);

impl GgmlType {
    /// Every type, for tests and tables.
    pub const ALL: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
    ];

    const fn layout(self) -> BlockLayout {
        match self {
            GgmlType::F32 => BlockLayout(0, "F32", 1, 4),
            GgmlType::F16 => BlockLayout(1, "F16", 1, 2),
            GgmlType::BF16 => BlockLayout(30, "BF16", 1, 2),
            GgmlType::Q4_0 => BlockLayout(2, "Q4_0", 32, 18),
            GgmlType::Q4_1 => BlockLayout(3, "Q4_1", 32, 20),
            GgmlType::Q5_0 => BlockLayout(6, "Q5_0", 32, 22),
            GgmlType::Q5_1 => BlockLayout(7, "Q5_1", 32, 24),
            GgmlType::Q8_0 => BlockLayout(8, "Q8_0", 32, 34),
            GgmlType::Q4_K => BlockLayout(12, "Q4_K", 256, 144),
            GgmlType::Q5_K => BlockLayout(13, "Q5_K", 256, 176),
            GgmlType::Q6_K => BlockLayout(14, "Q6_K", 256, 210),
        }
    }

    /// The type with this number in a GGUF file, if this crate reads it.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|ty| ty.id() == id)
    }

    /// The number of this type in a GGUF file.
    pub const fn id(self) -> u32 {
        self.layout().0
    }

    /// ggml's name of this type.
    pub const fn name(self) -> &'static str {
        self.layout().1
    }

    /// Elements that share one block, that is, one set of scales. Rows are whole blocks.
    pub const fn block_size(self) -> usize {
        self.layout().2
    }

    /// Bytes of one block.
    pub const fn type_size(self) -> usize {
        self.layout().3
    }

    /// Bytes of `elements` elements, or `None` if they are not whole blocks or the size overflows.
    pub fn bytes_for(self, elements: u64) -> Option<u64> {
        let block = self.block_size() as u64;
        if !elements.is_multiple_of(block) {
            return None;
        }
        (elements / block).checked_mul(self.type_size() as u64)
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// ggml's name for a type number that this crate does not read, for error messages.
pub(super) fn foreign_type_name(id: u32) -> &'static str {
    match id {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => "unknown",
    }
}
