//! Writing safetensors files.

use std::io::{self, Write};

use super::dtype::Dtype;
use super::header::LENGTH_SIZE;
use crate::file::write_tensor;

/// A tensor to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// Name of the tensor.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Dimensions of the tensor, the contiguous one last.
    pub shape: Vec<u64>,
}

impl Planned {
    /// Length of the data in bytes.
    ///
    /// # Panics
    /// If the length overflows.
    pub fn bytes(&self) -> u64 {
        self.shape
            .iter()
            .try_fold(self.dtype.size(), |bytes, &dim| bytes.checked_mul(dim))
            .unwrap_or_else(|| panic!("the size of {self:?} overflows"))
    }
}

/// Writes a file with `tensors`, widest elements first, as the format's own library does. `data` is called
/// for each in that order and writes its bytes, so that a file may be larger than memory.
///
/// # Errors
/// If writing fails, or `data` writes more or fewer bytes than the tensor has.
pub fn write<W: Write>(
    out: &mut W,
    tensors: &[Planned],
    mut data: impl FnMut(&Planned, &mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let mut order: Vec<&Planned> = tensors.iter().collect();
    order.sort_by(|a, b| (b.dtype.size(), &a.name).cmp(&(a.dtype.size(), &b.name)));
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), serde_json::json!({"format": "pt"}));
    let mut at = 0;
    for tensor in &order {
        let end = at + tensor.bytes();
        header.insert(
            tensor.name.clone(),
            serde_json::json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, end]}),
        );
        at = end;
    }
    // Sorted, so that the bytes do not depend on their order in memory.
    let mut header = serde_json::Value::from(header);
    header.sort_all_objects();
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(LENGTH_SIZE), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for tensor in order {
        write_tensor(out, &tensor.name, tensor.bytes(), |out| data(tensor, out))?;
    }
    out.flush()
}
