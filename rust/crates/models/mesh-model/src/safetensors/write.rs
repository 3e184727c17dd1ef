//! Writing safetensors files.

use std::io::{self, Write};

use super::Dtype;
use super::header::LENGTH_SIZE;

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

/// Writes a file with `tensors`, widest elements first, as the format's own library does. `data` is called for each in that
/// order and writes its bytes, so that a file may be larger than memory.
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
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(LENGTH_SIZE), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for tensor in order {
        let mut counted = Counted {
            inner: out,
            written: 0,
        };
        data(tensor, &mut counted)?;
        let written = counted.written;
        if written != tensor.bytes() {
            return Err(io::Error::other(format!(
                "tensor {} takes {} bytes, but {written} were written",
                tensor.name,
                tensor.bytes()
            )));
        }
    }
    out.flush()
}

/// Counts what goes through it.
struct Counted<'a, W> {
    inner: &'a mut W,
    written: u64,
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(data)?;
        self.written += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
