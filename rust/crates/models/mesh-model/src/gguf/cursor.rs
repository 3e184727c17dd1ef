//! Reading fields one after the other.

use super::error::GgufError;

/// Bytes of the length field of a string or an array.
pub(super) const LENGTH_SIZE: u64 = 8;

/// A position in a byte slice, with the name of the current field for errors.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    /// Length of the whole file, of which the bytes are the beginning.
    length: u64,
    pos: usize,
    what: String,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self::at(bytes, 0)
    }

    /// At the beginning of a file of `length` bytes, of which `bytes` are the first.
    pub(super) fn of_file(bytes: &'a [u8], length: u64) -> Self {
        Cursor {
            length,
            ..Self::new(bytes)
        }
    }

    pub(super) fn at(bytes: &'a [u8], pos: usize) -> Self {
        Cursor {
            bytes,
            length: bytes.len() as u64,
            pos,
            what: String::new(),
        }
    }

    /// Sets the name of the next fields for errors.
    pub(super) fn naming(&mut self, what: &str) {
        self.what.clear();
        self.what.push_str(what);
    }

    pub(super) fn position(&self) -> u64 {
        self.pos as u64
    }

    /// The bytes from `start`, an earlier [`Self::position`], to here.
    pub(super) fn since(&self, start: u64) -> &'a [u8] {
        &self.bytes[start as usize..self.pos]
    }

    pub(super) fn u32(&mut self) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    pub(super) fn bytes<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    /// A length and that many bytes.
    pub(super) fn string(&mut self) -> Result<&'a [u8], GgufError> {
        let len = self.u64()?;
        self.take(len)
    }

    /// A string that names something: not empty, UTF-8 and no longer than `limit`.
    pub(super) fn name(&mut self, limit: u64) -> Result<&'a str, GgufError> {
        let len = self.u64()?;
        if len > limit || len == 0 {
            let what = format!("the length of the name of {}", self.what);
            return Err(GgufError::Limit {
                what,
                value: len,
                limit,
            });
        }
        let name = self.take(len)?;
        std::str::from_utf8(name).map_err(|_| GgufError::Utf8 {
            what: format!("the name of {}", self.what),
        })
    }

    pub(super) fn skip(&mut self, len: u64) -> Result<(), GgufError> {
        self.take(len).map(|_| ())
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8], GgufError> {
        self.require(len)?;
        let start = self.pos;
        self.pos += len as usize;
        Ok(&self.bytes[start..self.pos])
    }

    /// Fails unless `len` more bytes are left.
    pub(super) fn require(&self, len: u64) -> Result<(), GgufError> {
        if len <= self.bytes.len().saturating_sub(self.pos) as u64 {
            return Ok(());
        }
        let in_file = len <= self.length.saturating_sub(self.pos as u64);
        Err(GgufError::Truncated {
            what: self.what.clone(),
            at: self.pos as u64,
            needed: len,
            length: match in_file {
                true => self.bytes.len() as u64,
                false => self.length,
            },
        })
    }

    /// Steps to the next multiple of `alignment` and gives it.
    pub(super) fn align(&mut self, alignment: u64) -> Result<u64, GgufError> {
        self.skip(self.position().next_multiple_of(alignment) - self.position())?;
        Ok(self.position())
    }

    pub(super) fn unknown_type(&self, ty: u32) -> GgufError {
        GgufError::ValueType {
            key: self.what.clone(),
            ty,
        }
    }

    pub(super) fn nested_array(&self) -> GgufError {
        GgufError::NestedArray {
            key: self.what.clone(),
        }
    }
}
