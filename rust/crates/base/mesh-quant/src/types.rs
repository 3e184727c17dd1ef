//! Tensor element types and their block layouts, as ggml defines them.

use std::fmt;

/// A type's number in GGUF files, its name, and the elements and the bytes of one of its blocks.
struct BlockLayout(u32, &'static str, usize, usize);

macro_rules! types {
    ($($name:ident = $id:literal, $elements:literal, $bytes:literal;)*) => {
        /// A tensor element type that can be read.
        ///
        /// The names are ggml's own, so that they read the same in files, errors and code.
        #[allow(non_camel_case_types, missing_docs)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum GgmlType {
            $($name,)*
        }

        impl GgmlType {
            /// Every type, for tests and tables.
            pub const ALL: [Self; [$($id),*].len()] = [$(Self::$name),*];

            const fn layout(self) -> BlockLayout {
                match self {
                    $(Self::$name => BlockLayout($id, stringify!($name), $elements, $bytes),)*
                }
            }
        }
    };
}

// Number in GGUF files, elements and bytes of a block.
types! {
    F32 = 0, 1, 4;
    F16 = 1, 1, 2;
    BF16 = 30, 1, 2;
    Q4_0 = 2, 32, 18;
    Q4_1 = 3, 32, 20;
    Q5_0 = 6, 32, 22;
    Q5_1 = 7, 32, 24;
    Q8_0 = 8, 32, 34;
    Q2_K = 10, 256, 84;
    Q3_K = 11, 256, 110;
    Q4_K = 12, 256, 144;
    Q5_K = 13, 256, 176;
    Q6_K = 14, 256, 210;
    IQ1_S = 19, 256, 50;
    IQ1_M = 29, 256, 56;
    IQ2_XXS = 16, 256, 66;
    IQ2_XS = 17, 256, 74;
    IQ2_S = 22, 256, 82;
    IQ3_XXS = 18, 256, 98;
    IQ3_S = 21, 256, 110;
    IQ4_NL = 20, 32, 18;
    IQ4_XS = 23, 256, 136;
    TQ1_0 = 34, 256, 54;
    TQ2_0 = 35, 256, 66;
    MXFP4 = 39, 32, 17;
}

impl GgmlType {
    /// The type with this number in a GGUF file, if it can be read.
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

    /// The same for a row in memory.
    pub fn row_bytes(self, elements: usize) -> Option<usize> {
        usize::try_from(self.bytes_for(elements as u64)?).ok()
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// ggml's name for a type number that is not read, for error messages.
pub fn foreign_type_name(id: u32) -> &'static str {
    match id {
        9 => "Q8_1",
        15 => "Q8_K",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        40 => "NVFP4",
        _ => "unknown",
    }
}
